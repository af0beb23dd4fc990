"""From folders of DICOM series to an nnU-Net raw dataset, by SimpleITK's GDCM (compressed series too).

A series becomes a case. Cases are numbered; names, patient numbers, dates and UIDs come neither into file names nor
into the files. What a NIfTI grid cannot say of a series is said in the notes: oblique slices are kept as they are, a
tilted gantry or uneven gaps make a volume whose geometry is only nearly true.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import SimpleITK as sitk
from tqdm import tqdm

from nnunet_oneshot.conversion import Conversion, DatasetPlan, Step, carry_out, dataset_name
from nnunet_oneshot.errors import OneShotError

POSITION, ORIENTATION, SERIES, MODALITY, DESCRIPTION = (
    "0020|0032",
    "0020|0037",
    "0020|000e",
    "0008|0060",
    "0008|103e",
)
SAMPLES, FRAMES = "0028|0002", "0028|0008"
TOLERANCE = 0.02
"""Share of the slice distance by which slices may be out of place."""


@dataclass(frozen=True)
class Slice:
    """What the header of one file says of its place.

    Attributes:
        position: (x, y, z) in mm of the first pixel.
        orientation: directions of rows and columns, six cosines.
    """

    path: Path
    position: tuple[float, ...]
    orientation: tuple[float, ...]


@dataclass(frozen=True)
class Series:
    """The files of one series, in the order of their places.

    Attributes:
        spacing: distance of neighbouring slices in mm, their median.
        remarks: what is unusual about it, for people.
        refusal: why it cannot become a volume, or None.
    """

    uid: str
    modality: str
    description: str
    slices: tuple[Slice, ...]
    spacing: float
    remarks: tuple[str, ...]
    refusal: str | None

    @property
    def folder(self) -> Path:
        return self.slices[0].path.parent


def convert_dicom(
    source: Path,
    dataset_id: int,
    name: str = "dicom",
    *,
    modality: str | None = None,
    description: str | None = None,
    labels: Sequence[str] = ("structure",),
    min_slices: int = 3,
    mapping: Path | None = None,
    dry_run: bool = False,
) -> Conversion:
    """Make a raw dataset of un-annotated cases, one a series.

    Args:
        source: folder with DICOM files at any depth; other files are passed over.
        modality: take only series of this modality, for example "MR"; needed when there are several.
        description: regular expression that the series description must contain, upper and lower case alike.
        labels: names of the foreground classes that will be drawn, for dataset.json.
        min_slices: series with fewer are localisers and the like, and are passed over.
        mapping: JSON file that tells which case came from which folder and series. It holds identifiers: it is written
            only when asked for, and not inside the dataset.
        dry_run: write nothing.

    Raises:
        OneShotError: no DICOM series, none that fits, several modalities, a bad expression, the dataset id is taken,
            or a file is broken.
    """
    source = Path(source)
    _check_expression(description)
    every = find_series(source)
    chosen = [s for s in every if _fits(s, modality, description)]
    notes = [_passed_over(s, source, reason) for s in chosen if (reason := _refusal(s, min_slices))]
    usable = [s for s in chosen if not _refusal(s, min_slices)]
    _check(every, usable, source)
    cases = {f"case_{i:03d}": s for i, s in enumerate(usable, start=1)}
    notes += [f"{case}: {remark}" for case, s in cases.items() for remark in s.remarks]
    title = dataset_name(dataset_id, name)
    steps = [Step(s.folder, f"imagesTr/{case}_0000.nii.gz", partial(_write, s)) for case, s in cases.items()]
    if mapping is not None and title in Path(mapping).resolve().parts:
        raise OneShotError(f"expected a mapping outside of the dataset, found {mapping}; it holds identifiers")
    plan = DatasetPlan(title, tuple(steps), _dataset_json(usable[0].modality, labels))
    done = carry_out([plan], notes, dry_run=dry_run)
    if mapping is not None and not dry_run:
        _write_mapping(Path(mapping), cases, source)
    return done


def find_series(source: Path) -> list[Series]:
    """All series below a folder, in the order of their folders and UIDs."""
    if not source.is_dir():
        raise OneShotError(f"expected a folder with DICOM files, found no folder {source}; check it")
    files: dict[str, list[Path]] = {}
    folders = [source, *(p for p in sorted(source.rglob("*")) if p.is_dir())]
    with _quiet():
        for folder in tqdm(folders, desc="look for series", unit="folder", disable=None):
            for uid in sitk.ImageSeriesReader.GetGDCMSeriesIDs(str(folder)):
                names = sitk.ImageSeriesReader.GetGDCMSeriesFileNames(str(folder), uid)
                files.setdefault(uid, []).extend(Path(n) for n in names)
        found = [_describe(uid, paths) for uid, paths in files.items()]
    return sorted(found, key=lambda s: (str(s.folder), s.uid))


def _describe(uid: str, paths: Sequence[Path]) -> Series:
    headers = [_header(path) for path in paths]
    first = headers[0]
    words = (first.get(MODALITY, ""), first.get(DESCRIPTION, ""))
    slices = [_slice(p, h) for p, h in zip(paths, headers, strict=True)]
    refusal = _not_a_stack(headers, slices)
    if refusal is None and int(first.get(FRAMES, "1") or 1) > 1:
        return Series(uid, *words, tuple(slices), 0.0, ("one file of many frames: check its slice distance",), None)
    if refusal is not None:
        return Series(uid, *words, tuple(slices), 0.0, (), refusal)
    normal = _normal(slices[0])
    ordered = sorted(slices, key=lambda s: float(np.dot(s.position, normal)))
    gaps, remarks = _gaps(ordered, normal)
    if (gaps < 1e-3).any():
        return Series(
            uid, *words, tuple(ordered), 0.0, (), "several slices at one place (phases or echoes in one series)"
        )
    spacing = float(np.median(gaps)) if gaps.size else 1.0
    return Series(uid, *words, tuple(ordered), spacing, tuple(remarks), None)


def _header(path: Path) -> dict[str, str]:
    reader = sitk.ImageFileReader()
    reader.SetFileName(str(path))
    try:
        reader.ReadImageInformation()
    except RuntimeError as error:
        raise OneShotError(f"expected a readable DICOM file, found {path} damaged; export it again") from error
    return {key: reader.GetMetaData(key).strip(" \0") for key in reader.GetMetaDataKeys()}


def _slice(path: Path, header: dict[str, str]) -> Slice:
    return Slice(path, _numbers(header.get(POSITION, "")), _numbers(header.get(ORIENTATION, "")))


def _numbers(text: str) -> tuple[float, ...]:
    return tuple(float(part) for part in text.split("\\") if part.strip())


def _not_a_stack(headers: Sequence[dict[str, str]], slices: Sequence[Slice]) -> str | None:
    """Why the files are no stack of parallel slices, or None."""
    if any(int(h.get(SAMPLES, "1") or 1) != 1 for h in headers):
        return "colour pictures"
    many_frames = int(headers[0].get(FRAMES, "1") or 1) > 1
    if many_frames:
        return "several files of many frames each" if len(slices) > 1 else None
    if any(len(s.position) != 3 or len(s.orientation) != 6 for s in slices):
        return "no positions in the headers"
    if not np.allclose([s.orientation for s in slices], slices[0].orientation, atol=1e-3):
        return "slices of several orientations (a localiser)"
    return None


def _normal(first: Slice) -> npt.NDArray[np.float64]:
    return np.cross(first.orientation[:3], first.orientation[3:])


def _gaps(ordered: Sequence[Slice], normal: npt.NDArray[np.float64]) -> tuple[npt.NDArray[np.float64], list[str]]:
    """(slice distances in mm, what is unusual about the slices' places)."""
    positions = np.array([s.position for s in ordered])
    gaps = np.diff(positions @ normal)
    if not gaps.size:
        return gaps, []
    step = float(np.median(gaps))
    remarks = []
    if np.abs(normal).max() < 0.999:
        remarks.append("oblique slices; the direction is kept")
    drift = positions - positions[0] - np.outer((positions - positions[0]) @ normal, normal)
    if (far := float(np.linalg.norm(drift, axis=1).max())) > TOLERANCE * step:
        remarks.append(f"a tilted gantry or shifted slices: places are off by up to {far:.1f} mm")
    if (worst := float(np.abs(gaps - step).max())) > TOLERANCE * step:
        where = int(np.abs(gaps - step).argmax()) + 1
        remarks.append(
            f"uneven slice distances: {step:.2f} mm is assumed, but slices {where} and {where + 1} are "
            f"{gaps[where - 1]:.2f} mm apart (off by {worst:.2f} mm)"
        )
    return gaps, remarks


def _check_expression(description: str | None) -> None:
    try:
        re.compile(description or "")
    except re.error as error:
        raise OneShotError(f"expected a regular expression, found {description!r} ({error}); correct it") from error


def _fits(series: Series, modality: str | None, description: str | None) -> bool:
    if modality is not None and series.modality.upper() != modality.upper():
        return False
    return description is None or re.search(description, series.description, re.IGNORECASE) is not None


def _refusal(series: Series, min_slices: int) -> str | None:
    if series.refusal is None and series.spacing > 0 and len(series.slices) < min_slices:
        return f"{len(series.slices)} slices, fewer than {min_slices}"
    return series.refusal


def _passed_over(series: Series, source: Path, reason: str) -> str:
    where = series.folder.relative_to(source)
    return f"passed over: a series in {where} ({series.modality}, {len(series.slices)} files): {reason}"


def _check(every: Sequence[Series], usable: Sequence[Series], source: Path) -> None:
    if not every:
        raise OneShotError(f"expected DICOM series below {source}, found none; give the folder that holds the files")
    if not usable:
        kinds = sorted({f"{s.modality} {s.description!r}" for s in every})
        raise OneShotError(
            f"expected a series that fits, found {len(every)} others ({', '.join(kinds[:5])}); change -modality or "
            "-description, or see a dry run without them"
        )
    if len(kinds := sorted({s.modality for s in usable})) > 1:
        raise OneShotError(f"expected series of one modality, found {', '.join(kinds)}; choose by -modality")


def _dataset_json(modality: str, labels: Sequence[str]) -> dict[str, Any]:
    return {
        # nnU-Net normalises a channel of the name CT by fixed Hounsfield statistics, all others by each image's own.
        "channel_names": {"0": modality or "image"},
        "labels": {"background": 0, **{label: i for i, label in enumerate(labels, start=1)}},
        "numTraining": 0,
        "file_ending": ".nii.gz",
    }


def _write(series: Series, _: Path, target: Path) -> None:
    """The stack with its geometry and nothing else of its headers."""
    names = [str(s.path) for s in series.slices]
    try:
        with _quiet():
            stack = sitk.ReadImage(names[0] if len(names) == 1 else names)
    except RuntimeError as error:
        raise OneShotError(
            f"expected slices of one size in {series.folder}, found others or damage; see them"
        ) from error
    plain = sitk.GetImageFromArray(sitk.GetArrayFromImage(stack))
    plain.SetOrigin(stack.GetOrigin())
    plain.SetDirection(stack.GetDirection())
    x, y, z = stack.GetSpacing()
    plain.SetSpacing((x, y, series.spacing or z))
    sitk.WriteImage(plain, str(target), True)


def _write_mapping(path: Path, cases: dict[str, Series], source: Path) -> None:
    content = {
        case: {"folder": str(s.folder.relative_to(source)), "series": s.uid, "description": s.description}
        for case, s in cases.items()
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


@contextmanager
def _quiet() -> Iterator[None]:
    """GDCM warns of every folder without DICOM files."""
    before = sitk.ProcessObject.GetGlobalWarningDisplay()
    sitk.ProcessObject.SetGlobalWarningDisplay(False)
    try:
        yield
    finally:
        sitk.ProcessObject.SetGlobalWarningDisplay(before)
