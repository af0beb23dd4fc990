"""Read an nnU-Net raw dataset in which only some images are annotated.

The one way in: every stage gets a `RawDataset`, an immutable description, and reads images and labels through it.
Files are read by nnU-Net's own reader/writers, so every format that nnU-Net reads is read here.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import re
import threading
import zlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
from nibabel.filebasedimages import ImageFileError
from nnunetv2.imageio.base_reader_writer import BaseReaderWriter
from nnunetv2.imageio.natural_image_reader_writer import NaturalImage2DIO
from nnunetv2.imageio.reader_writer_registry import determine_reader_writer_from_dataset_json

from nnunet_oneshot.errors import OneShotError, cut_short
from sam2_propagation.interface import IDENTITY_DIRECTION, Image, LabelVolume, Support

IMAGE_FOLDERS = ("imagesTr", "imagesUn")
IGNORE = "ignore"
READ_ERRORS = (RuntimeError, OSError, ValueError, SyntaxError, EOFError, AssertionError, zlib.error, ImageFileError)
"""What nnU-Net's readers and the libraries below them raise for files that are broken."""
_ONE_AT_A_TIME = threading.Lock()
"""Who redirects standard output: of two threads at once, the second would put the first one's buffer back for good."""

Geometry = tuple[tuple[int, ...], tuple[float, ...], tuple[float, ...], tuple[float, ...]]
"""Shape (Z, Y, X), spacing (z, y, x) in mm, origin (x, y, z) in mm and nine direction cosines."""


@dataclass(frozen=True)
class Case:
    """One training case: its channel files and, when annotated, its label file."""

    name: str
    images: tuple[Path, ...]
    label: Path | None = None


@dataclass(frozen=True)
class RawDataset:
    """An nnU-Net raw dataset, as it lies on disk.

    Attributes:
        folder: the dataset's folder, `nnUNet_raw/DatasetXXX_Name`.
        json: content of dataset.json (read-only).
        cases: all cases of imagesTr and imagesUn, sorted by name.
        reader: nnU-Net's reader/writer class for the dataset's files.
        passed_over: files beside the images whose names are no channel's, as `imagesTr/patient7.nii.gz`.
    """

    folder: Path
    json: Mapping[str, Any] = field(repr=False)
    cases: tuple[Case, ...] = field(repr=False)
    reader: type[BaseReaderWriter]
    passed_over: tuple[str, ...] = field(default=(), repr=False)

    @property
    def name(self) -> str:
        """Folder name, for example `Dataset501_hippocampus`."""
        return self.folder.name

    @property
    def id(self) -> int:
        """Dataset id, for example 501."""
        return int(self.name[7:].split("_")[0])

    @property
    def file_ending(self) -> str:
        """File ending with its dot, for example `.nii.gz`."""
        return self.json["file_ending"]

    @property
    def ignore(self) -> int | None:
        """Value of the ignore label, or None where the dataset declares none."""
        return self.json["labels"].get(IGNORE)

    @property
    def warnings(self) -> list[str]:
        """What a user should know of the folder: images that nobody will read."""
        said = _misnamed(self.passed_over, self.file_ending)
        return [f"{said} passed over; rename what are images"] if said else []

    def drawn_over(self, human: LabelVolume, label: LabelVolume) -> LabelVolume:
        """A label with a person's in its place but where that is the ignore label, int16 (Z, Y, X)."""
        by_hand = np.ones(human.shape, bool) if self.ignore is None else human != self.ignore
        return np.where(by_hand, human, label).astype(np.int16)

    def is_sparse(self, label: LabelVolume) -> bool:
        """Whether a label leaves voxels open, as the ignore label."""
        return self.ignore is not None and bool((label == self.ignore).any())

    @property
    def label_values(self) -> tuple[int, ...]:
        """All label values including background, without the ignore label."""
        return _label_values(self.json["labels"])

    @property
    def has_regions(self) -> bool:
        """Whether a label stands for several values, which nnU-Net then learns as regions."""
        return any(len(_as_list(value)) > 1 for name, value in self.json["labels"].items() if name != IGNORE)

    @property
    def class_names(self) -> dict[int, str]:
        """Name of each foreground label value; of a region dataset, the name of the smallest region holding it."""
        regions = sorted(self.json["labels"].items(), key=lambda item: -len(_as_list(item[1])))
        return {v: name for name, values in regions if name != IGNORE for v in _as_list(values) if v != 0}

    @property
    def annotated(self) -> tuple[Case, ...]:
        """Cases with a label drawn by a person."""
        return tuple(c for c in self.cases if c.label is not None)

    @property
    def unannotated(self) -> tuple[Case, ...]:
        """Cases without a label."""
        return tuple(c for c in self.cases if c.label is None)

    def case(self, name: str) -> Case:
        """The case of that name; KeyError if there is none."""
        return {c.name: c for c in self.cases}[name]

    def read_image(self, case: Case) -> Image:
        """Read all channels of a case, float32 (C, Z, Y, X).

        Raises:
            OneShotError: the file cannot be read, or it holds NaN or infinite intensities.
        """
        data, properties = self._read(case.images)
        if not np.isfinite(data).all():
            bad = int((~np.isfinite(data)).sum())
            raise OneShotError(
                f"{case.images[0]}: expected finite intensities, found {bad} NaN or infinite voxels; replace them"
            )
        return _image(case.name, data, properties)

    def read_label(self, path: Path) -> LabelVolume:
        """Read a label file as int16 (Z, Y, X).

        Raises:
            OneShotError: the file cannot be read, holds several channels or values that are no integers.
        """
        data, _ = self._read((path,), label=True)
        if data.shape[0] != 1:
            raise OneShotError(f"{path}: expected a label with one channel, found {data.shape[0]}; save it as grey")
        with np.errstate(invalid="ignore"):  # NaN is found by the comparison below
            label = data[0].astype(np.int16)
        if not (label == data[0]).all():
            odd = data[0][label != data[0]][0]
            raise OneShotError(f"{path}: expected whole numbers up to 32767 as label values, found {odd}; correct them")
        return label

    def support(self, case: Case) -> Support:
        """The annotated case as a propagator wants it."""
        if case.label is None:
            raise KeyError(f"{case.name} is not annotated")
        label = self.read_label(case.label)
        return Support(self.read_image(case), label, self.ignore if self.is_sparse(label) else None)

    def write_label(self, label: LabelVolume, path: Path, like: Case) -> None:
        """Write a label with the geometry of a case's image, in the dataset's format (not atomic: see store.py).

        Raises:
            OneShotError: the file is not whole, as where the disk is full.
            OSError: the disk is full, by writers that say so.
        """
        # The first channel's geometry is what nnU-Net's readers return for all of them.
        first = like.images[0]
        properties = _properties(self.reader, str(first), first.stat().st_mtime_ns)  # type: ignore[arg-type]
        # Some of nnU-Net's writers expect integers that SimpleITK and scikit-image map to one byte or two.
        try:
            self.reader().write_seg(np.ascontiguousarray(label), str(path), properties)
        except RuntimeError as error:
            raise cut_short(path, error) from error
        if not self._holds(path, label):
            raise cut_short(path)

    def _holds(self, path: Path, label: LabelVolume) -> bool:
        """Whether a label file is whole: SimpleITK writes and reads a NIfTI file cut short without a word."""
        try:
            held = self.read_label(path)
            if label.min(initial=0) < 0:
                # Writers wrap negative values, and to refuse these is not done here.
                return np.array_equal(held.astype(np.uint8), label.astype(np.uint8))
            return np.array_equal(held, label)
        except OneShotError:
            return False

    def image_geometry(self, case: Case) -> Geometry:
        """Shape (Z, Y, X), spacing, origin and direction of a case's first channel."""
        return _geometry(*self._read(case.images[:1]))

    def label_geometry(self, path: Path) -> Geometry:
        """Shape (Z, Y, X), spacing, origin and direction of a label file."""
        return _geometry(*self._read((path,), label=True))

    def _read(self, paths: Iterable[Path], label: bool = False) -> tuple[np.ndarray, dict[str, Any]]:
        return _read_files(self.reader, [str(p) for p in paths], label)


def open_dataset(dataset: int | str) -> RawDataset:
    """Describe a raw dataset by id or name, after checking what can be checked without reading images.

    Raises:
        OneShotError: nnUNet_raw unset, unknown or duplicate id, a broken dataset.json, missing channel files, or a
            label of an unknown case.
    """
    folder = find_raw_folder(dataset)
    content = _read_json(folder)
    _check_labels(folder, content["labels"], content.get("regions_class_order"))
    listed = "dataset" in content
    cases = _listed_cases(folder, content) if listed else _found_cases(folder, content)
    others = () if listed else _other_files(folder, content["file_ending"])
    if not cases:
        found = _misnamed(others, content["file_ending"]) or "none"
        raise OneShotError(f"{folder}: expected images in imagesTr, found {found}; put CASE_0000 files there")
    return RawDataset(folder, content, cases, _reader(content, cases[0].images[0]), others)


def raw_root() -> Path:
    """The folder `nnUNet_raw`; OneShotError where the environment variable is unset or no folder."""
    value = os.environ.get("nnUNet_raw")
    if not value:
        raise OneShotError(
            "expected the environment variable nnUNet_raw to name your raw datasets' folder, found it unset; "
            "set nnUNet_raw, nnUNet_preprocessed and nnUNet_results as nnU-Net's documentation says"
        )
    if not Path(value).is_dir():
        raise OneShotError(f"expected nnUNet_raw to name a folder, found {value}; create it or correct the variable")
    return Path(value)


def dataset_id(dataset: int | str) -> int:
    """The id in `501`, `"501"` or `"Dataset501_name"`; OneShotError for anything else."""
    match = re.fullmatch(r"(?:Dataset)?(\d{1,3})(?:_.+)?", str(dataset))
    if not match:
        raise OneShotError(
            f"expected a dataset id such as 501 or a name such as Dataset501_liver, found {str(dataset)!r}; correct it"
        )
    return int(match.group(1))


def find_raw_folder(dataset: int | str) -> Path:
    """The one folder of nnUNet_raw with that id; OneShotError where there is none or more than one."""
    root, number = raw_root(), dataset_id(dataset)
    found = sorted(p for p in root.glob(f"Dataset{number:03d}_*") if p.is_dir())
    by_name = str(dataset).startswith("Dataset")
    if not found or (by_name and str(dataset) not in {p.name for p in found}):
        known = ", ".join(sorted(p.name for p in root.glob("Dataset*") if p.is_dir())) or "no dataset at all"
        wanted = f"the dataset {dataset}" if by_name else f"a dataset with id {number:03d}"
        raise OneShotError(f"expected {wanted} in {root}, found {known}; check -d")
    if len(found) > 1:
        names = ", ".join(p.name for p in found)
        raise OneShotError(f"expected one dataset with id {number:03d}, found {names}; rename all but one")
    return found[0]


def open_source(name: str, derived: Path) -> RawDataset:
    """The raw dataset that holds the images of a pseudo-label dataset.

    Args:
        name: as the manifest has it.
        derived: the pseudo-label dataset's folder.

    Raises:
        OneShotError: it was renamed or is gone, and whatever `open_dataset` refuses.
    """
    root = raw_root()
    if not (root / name).is_dir():
        found = ", ".join(sorted(p.name for p in root.glob(f"Dataset{dataset_id(name):03d}_*"))) or "none of its id"
        raise OneShotError(
            f"{derived.name}: expected {name}, the dataset whose images it labels, in {root}, found {found}; put it "
            "back there under that name, by which nnU-Net reads the images too"
        )
    return open_dataset(name)


def _read_json(folder: Path) -> dict[str, Any]:
    path = folder / "dataset.json"
    if not path.is_file():
        raise OneShotError(f"expected {path}, found no such file; write it as nnU-Net's dataset format says")
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise OneShotError(f"{path}: expected JSON, found {error}; correct the file") from error
    if not isinstance(content, dict):
        raise OneShotError(f"{path}: expected a JSON object, found a {type(content).__name__}; correct the file")
    missing = [key for key in ("channel_names", "labels", "file_ending") if key not in content]
    if missing:
        raise OneShotError(
            f"{path}: expected the keys channel_names, labels and file_ending, found no "
            f"{', '.join(missing)}; add what is missing"
        )
    return content


def _as_list(value: int | list[int]) -> list[int]:
    return [int(v) for v in value] if isinstance(value, list | tuple) else [int(value)]


def _is_label(value: object) -> bool:
    values = value if isinstance(value, list) else [value]
    return bool(values) and all(isinstance(v, int) and not isinstance(v, bool) for v in values)


def _label_values(labels: Mapping[str, Any]) -> tuple[int, ...]:
    return tuple(sorted({v for name, values in labels.items() if name != IGNORE for v in _as_list(values)}))


def _check_labels(folder: Path, labels: Mapping[str, Any], region_order: list[int] | None) -> None:
    path = folder / "dataset.json"
    if not isinstance(labels, dict) or not all(_is_label(v) for v in labels.values()):
        raise OneShotError(
            f'{path}: expected labels as names with their values, {{"background": 0, "liver": 1}}, found {labels}; '
            "write it as nnU-Net v2's dataset format says"
        )
    values = _label_values(labels)
    if labels.get("background") != 0:
        raise OneShotError(
            f"{path}: expected the label background to be 0, found {labels.get('background')}; correct it"
        )
    if values != tuple(range(len(values))) or len(values) < 2:
        raise OneShotError(
            f"{path}: expected consecutive label values 0, 1, 2, ..., found {list(values)}; renumber them"
        )
    if labels.get(IGNORE, len(values)) != len(values):
        raise OneShotError(
            f"{path}: expected the ignore label to be the highest value, {len(values)}, found "
            f"{labels[IGNORE]}; renumber it"
        )
    if any(isinstance(v, list) and len(v) > 1 for v in labels.values()) and not region_order:
        raise OneShotError(f"{path}: expected regions_class_order because labels are regions, found none; add it")


def _listed_cases(folder: Path, content: Mapping[str, Any]) -> tuple[Case, ...]:
    """Cases of nnU-Net's "dataset" key: an entry without a label (or whose label file is absent) is un-annotated."""

    def absolute(path: str) -> Path:
        return Path(os.path.normpath(folder / os.path.expandvars(path)))

    cases = []
    for name, entry in sorted(content["dataset"].items()):
        if not isinstance(entry, dict) or not entry.get("images"):
            raise OneShotError(f"case {name}: expected images in dataset.json's dataset key, found none; add them")
        label = absolute(entry["label"]) if entry.get("label") else None
        images = tuple(absolute(p) for p in entry["images"])
        missing = [str(p) for p in images if not p.is_file()]
        if missing:
            raise OneShotError(f"case {name}: expected {missing[0]}, which dataset.json names, found none; correct it")
        cases.append(Case(name, images, label if label is not None and label.is_file() else None))
    return tuple(cases)


def _found_cases(folder: Path, content: Mapping[str, Any]) -> tuple[Case, ...]:
    ending = content["file_ending"]
    images: dict[str, dict[int, Path]] = {}
    for sub in IMAGE_FOLDERS:
        for name, files in _channel_files(folder / sub, ending).items():
            if name in images:
                raise OneShotError(f"case {name}: expected it once, found it in imagesTr and imagesUn; remove one")
            images[name] = files
    if not _one_file_holds_all(images, content):
        _check_channels(images, content)
    labels = _label_files(folder, ending, images)
    return tuple(Case(n, tuple(images[n][i] for i in sorted(images[n])), labels.get(n)) for n in sorted(images))


def _check_channels(images: Mapping[str, Mapping[int, Path]], content: Mapping[str, Any]) -> None:
    channels = len(content["channel_names"])
    for name, files in images.items():
        if missing := sorted(set(range(channels)) - set(files)):
            absent = f"{name}_{missing[0]:04d}{content['file_ending']}"
            alone = files[0] if set(files) == {0} else None
            raise OneShotError(f"case {name}: {_channels_said(content, channels, absent, alone)}")


def _channels_said(content: Mapping[str, Any], channels: int, absent: str, alone: Path | None) -> str:
    """What is wrong with a case's channels: `absent` is missing beside others, or its one file holds another number."""
    if alone is None:
        return f"expected {channels} channel files, found no {absent}; add the missing channel"
    held, picture = _held_channels(content, alone), content["file_ending"] in NaturalImage2DIO.supported_file_endings
    expected = f"expected {channels} channels, as many as dataset.json names"
    if held == 1:
        found = f"found 1 channel in {alone} and no {absent}"
        return f"{expected}, {found}; add the missing channel{', save the picture in colour' if picture else ''}"
    alpha = " (RGBA? save it without alpha)" if picture and held == 4 else ""
    return f"{expected}, found {held} channels in {alone}{alpha}; correct the file or channel_names"


def _one_file_holds_all(images: Mapping[str, Mapping[int, Path]], content: Mapping[str, Any]) -> bool:
    """True for RGB and 4D files: every case is one file, and the first one holds all channels."""
    if len(content["channel_names"]) == 1 or not images or any(set(files) != {0} for files in images.values()):
        return False
    first = next(iter(images.values()))[0]
    return _held_channels(content, first) == len(content["channel_names"])


def _held_channels(content: Mapping[str, Any], file: Path) -> int:
    """How many channels one file holds."""
    return int(_read_files(_reader(content, file), [str(file)])[0].shape[0])


def _reader(content: Mapping[str, Any], example: Path) -> type[BaseReaderWriter]:
    """nnU-Net's choice of reader; an example decides where 2D and 3D files share an ending."""
    wanted = dict(content)
    example_file = str(example) if content["file_ending"] == ".tif" else None
    try:
        with _ONE_AT_A_TIME, contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            return determine_reader_writer_from_dataset_json(wanted, example_file, verbose=False)
    except RuntimeError as error:
        raise OneShotError(
            f"{example}: expected a file that one of nnU-Net's readers reads, found none of them for the file ending "
            f"{content['file_ending']}; correct file_ending in dataset.json or export the file again"
        ) from error


def _read_files(reader: type[BaseReaderWriter], names: list[str], label: bool = False) -> tuple[np.ndarray, dict]:
    """Data (C, Z, Y, X) and properties as nnU-Net's reader gives them; OneShotError where it cannot."""
    said = io.StringIO()
    try:
        # The readers print what they then raise without a message.
        with _ONE_AT_A_TIME, contextlib.redirect_stdout(said):
            return reader().read_seg(names[0]) if label else reader().read_images(names)
    except READ_ERRORS as error:
        detail = (str(error) or said.getvalue()).strip().splitlines() or ["no reason given"]
        raise OneShotError(
            f"{names[0]}: expected a whole file that nnU-Net's {reader.__name__} reads, found one that it cannot "
            f"({detail[-1].strip()}); export the file again"
        ) from error


def _channel_files(folder: Path, ending: str) -> dict[str, dict[int, Path]]:
    found: dict[str, dict[int, Path]] = {}
    for path in sorted(folder.iterdir()) if folder.is_dir() else ():
        if match := _channel_name(ending).fullmatch(path.name):
            found.setdefault(match.group(1), {})[int(match.group(2))] = path
    return found


def _channel_name(ending: str) -> re.Pattern[str]:
    return re.compile(r"(.+)_(\d{4})" + re.escape(ending))


def _other_files(folder: Path, ending: str) -> tuple[str, ...]:
    """Files beside the images that no case takes, but for hidden ones and the spacing that lies beside .tif files."""
    beside = [path for sub in IMAGE_FOLDERS if (folder / sub).is_dir() for path in sorted((folder / sub).iterdir())]
    return tuple(
        f"{path.parent.name}/{path.name}"
        for path in beside
        if not (_channel_name(ending).fullmatch(path.name) or path.name.startswith(".") or path.suffix == ".json")
        and path.is_file()
    )


def _misnamed(files: Sequence[str], ending: str) -> str:
    """What files that are no case's are, as `2 files of imagesTr not named ...`; empty where there are none."""
    if not files:
        return ""
    folders = " and ".join(dict.fromkeys(name.split("/")[0] for name in files))
    count = f"{len(files)} file{'s' if len(files) > 1 else ''} of {folders} not named CASE_0000{ending}"
    return f"{count} (for example {files[0].split('/')[1]})"


def _label_files(folder: Path, ending: str, known: Mapping[str, object]) -> dict[str, Path]:
    labels = {p.name[: -len(ending)]: p for p in sorted((folder / "labelsTr").glob(f"*{ending}"))}
    for name, path in labels.items():
        if name not in known:
            raise OneShotError(
                f"{path}: expected an image {name}_0000{ending} in imagesTr for this label, found none; "
                "add the image or remove the label"
            )
    return labels


@lru_cache(maxsize=2)
def _properties(reader: type[BaseReaderWriter], name: str, modified: int) -> dict[str, Any]:
    """What nnU-Net's writers want to know of an image; kept, since several labels of one case follow each other."""
    return _read_files(reader, [name])[1]


def _geometry(data: np.ndarray, properties: Mapping[str, Any]) -> Geometry:
    image = _image("", data, properties)
    return image.shape, image.spacing, image.origin, image.direction


def _image(name: str, data: np.ndarray, properties: Mapping[str, Any]) -> Image:
    spacing = tuple(abs(float(s)) for s in properties["spacing"])
    if data.shape[1] == 1 and spacing[0] > 100 * max(spacing[1:]):
        # nnU-Net marks 2D by an enormous z spacing; a propagator wants a plain number.
        spacing = (1.0, *spacing[1:])
    origin, direction = _position(properties)
    return Image(name, np.ascontiguousarray(data, dtype=np.float32), spacing, origin, direction)  # type: ignore[arg-type]


def _position(properties: Mapping[str, Any]) -> tuple[tuple[float, ...], tuple[float, ...]]:
    if "sitk_stuff" in properties:
        return _three_dimensional(properties["sitk_stuff"])
    if "nibabel_stuff" in properties:
        stuff = properties["nibabel_stuff"]
        affine = np.asarray(stuff.get("reoriented_affine", stuff["original_affine"]))
        to_lps = np.diag([-1.0, -1.0, 1.0])
        axes = affine[:3, :3] / np.linalg.norm(affine[:3, :3], axis=0)
        return tuple((to_lps @ affine[:3, 3]).tolist()), tuple((to_lps @ axes).ravel().tolist())
    return (0.0, 0.0, 0.0), IDENTITY_DIRECTION


def _three_dimensional(stuff: Mapping[str, Any]) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """SimpleITK's origin and direction of the spatial axes; 2D gets a third, 4D loses its fourth."""
    n = len(stuff["origin"])
    direction = np.eye(max(n, 3))
    direction[:n, :n] = np.asarray(stuff["direction"]).reshape(n, n)
    return (*stuff["origin"][:3], *[0.0] * max(0, 3 - n)), tuple(direction[:3, :3].ravel().tolist())
