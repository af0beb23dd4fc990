"""Labels that leave for ITK-SNAP or 3D Slicer, and labels that come back, checked against the case's image."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import SimpleITK as sitk

from nnunet_oneshot.checks import checked_label
from nnunet_oneshot.dataset import Case, RawDataset
from nnunet_oneshot.errors import OneShotError
from nnunet_oneshot.file_hash import hash_of
from nnunet_oneshot.label_formats import write_itksnap_labels, write_seg_nrrd
from nnunet_oneshot.store import Store
from sam2_propagation.interface import Image, LabelVolume

ENDINGS = (".seg.nrrd", ".nrrd", ".nii.gz", ".nii", ".mha")
"""Formats that a label may come back in, besides the dataset's own; longer endings first."""
PICTURES = (".png", ".bmp", ".tif", ".tiff")
"""Formats that hold no direction."""
_SLACK = 1 << 20


@dataclass(frozen=True)
class Checkout:
    """A case's files for another program.

    Attributes:
        images: the channel files, where they lie (not copies).
        label: the label to edit.
        segmentation: the same for 3D Slicer, or None for pictures.
        names: ITK-SNAP's label descriptions.
        command: opens all of it in ITK-SNAP.
    """

    images: tuple[Path, ...]
    label: Path
    segmentation: Path | None
    names: Path
    command: str


def check_out(raw: RawDataset, store: Store, case: Case) -> Checkout:
    """Write the case's best guess to `review/<case>/` of the dataset, for another program to edit.

    A label that was edited there and not taken back is kept.
    """
    folder = store.folder / "review" / case.name
    folder.mkdir(parents=True, exist_ok=True)
    image, label = raw.read_image(case), raw.read_label(store.fused_path(case.name))
    files = [folder / f"label{raw.file_ending if raw.file_ending in PICTURES else '.nii.gz'}"]
    if raw.file_ending not in PICTURES:
        files.append(folder / "label.seg.nrrd")
    if not edited_files(store, case):
        _write(raw, store, case, files, image, label)
    write_itksnap_labels(raw.class_names, folder / "labels.txt")
    segmentation = files[1] if len(files) > 1 else None
    command = f'itksnap -g "{case.images[0]}" -s "{files[0]}" -l "{folder / "labels.txt"}"'
    return Checkout(case.images, files[0], segmentation, folder / "labels.txt", command)


def edited_files(store: Store, case: Case) -> list[Path]:
    """Files of `check_out` whose content is no longer what was written."""
    folder = store.folder / "review" / case.name
    written = folder / "written.json"
    known: dict[str, str] = json.loads(written.read_text(encoding="utf-8")) if written.is_file() else {}
    return [folder / n for n, digest in known.items() if (folder / n).is_file() and hash_of(folder / n) != digest]


def check_in(raw: RawDataset, store: Store, case: Case) -> LabelVolume:
    """The label that was edited in another program.

    Raises:
        OneShotError: no file or both were edited, or what `read_label` refuses.
    """
    edited = edited_files(store, case)
    if len(edited) != 1:
        found = " and ".join(path.name for path in edited) or "none that changed"
        raise OneShotError(
            f"expected one edited label in {store.folder / 'review' / case.name}, found {found}; save it there "
            "under the name it was opened by, or upload the file"
        )
    return read_label(raw, store, case, edited[0].read_bytes(), edited[0].name)


def forget(store: Store, case: Case) -> None:
    """What was checked out is taken back: an edited file no longer waits."""
    (store.folder / "review" / case.name / "written.json").unlink(missing_ok=True)


def read_label(raw: RawDataset, store: Store, case: Case, content: bytes, name: str) -> LabelVolume:
    """A corrected label out of a file's content, int16 (Z, Y, X).

    Args:
        content: the file; only the ending of its `name` matters.

    Raises:
        OneShotError: an unknown format, a broken file, another grid than the image's, or values that are no labels.
    """
    ending = next((e for e in (raw.file_ending, *ENDINGS) if name.lower().endswith(e)), None)
    if ending is None:
        raise OneShotError(
            f"expected a label as {raw.file_ending} or {', '.join(ENDINGS)}, found {name[-40:]!r}; save it as "
            "one of those"
        )
    with store.temporary_folder() as folder:
        path = folder / f"label{ending}"
        path.write_bytes(content)
        if ending != raw.file_ending:
            label = _converted(path, raw, case)
            path = folder / "converted" / f"label{raw.file_ending}"
            path.parent.mkdir()
            raw.write_label(label, path, case)
        try:
            return checked_label(raw, path, case, drawn=False)
        except OneShotError as error:
            raise OneShotError(str(error).replace(str(path), f"the corrected label of {case.name}")) from error


def size_limit(image: Image) -> int:
    """Bytes that no label of that image's grid exceeds."""
    return 8 * int(np.prod(image.shape)) + _SLACK


def _write(raw: RawDataset, store: Store, case: Case, files: list[Path], image: Image, label: LabelVolume) -> None:
    if raw.file_ending in (*PICTURES, ".nii.gz"):
        raw.write_label(label, files[0], case)
    else:
        _write_nifti(label, image, files[0])
    if len(files) > 1:
        write_seg_nrrd(label, image, raw.class_names, files[1])
    store.write_json({path.name: hash_of(path) for path in files}, files[0].parent / "written.json")


def _write_nifti(label: LabelVolume, image: Image, path: Path) -> None:
    written = sitk.GetImageFromArray(label.astype(np.uint8))
    written.SetSpacing([float(s) for s in image.spacing[::-1]])
    written.SetOrigin([float(o) for o in image.origin])
    written.SetDirection([float(d) for d in image.direction])
    sitk.WriteImage(written, str(path))


def _converted(path: Path, raw: RawDataset, case: Case) -> LabelVolume:
    """Read by SimpleITK, after its grid was compared with the image's."""
    try:
        found = sitk.ReadImage(str(path))
    except RuntimeError as error:
        raise OneShotError(
            f"expected a whole label file, found one that cannot be read; save it again ({case.name})"
        ) from error
    if found.GetNumberOfComponentsPerPixel() != 1:
        raise OneShotError(
            f"{case.name}: expected a label with one layer, found {found.GetNumberOfComponentsPerPixel()} (segments "
            "that overlap); export a binary labelmap"
        )
    _check_grid(found, raw.read_image(case), case.name, placed=raw.file_ending not in PICTURES)
    array = sitk.GetArrayFromImage(found)
    if not (array == array.astype(np.int16)).all():
        raise OneShotError(f"{case.name}: expected whole numbers as label values, found others; save it as a labelmap")
    label = array.astype(np.int16).reshape(-1, *array.shape[-2:])
    return _by_names(found, label, raw) if path.name.endswith(".seg.nrrd") else label


def _check_grid(found: sitk.Image, image: Image, name: str, placed: bool) -> None:
    size = tuple(found.GetSize()) if found.GetDimension() == 3 else (*found.GetSize(), 1)
    expected: dict[str, tuple[float, ...]] = {"size (x, y, z)": image.shape[::-1]}
    got: dict[str, tuple[float, ...]] = {"size (x, y, z)": size}
    if placed and found.GetDimension() == 3:
        expected |= {"spacing": image.spacing[::-1], "origin": image.origin, "direction": image.direction}
        got |= {"spacing": found.GetSpacing(), "origin": found.GetOrigin(), "direction": found.GetDirection()}
    for what, wanted in expected.items():
        if len(got[what]) != len(wanted) or not np.allclose(got[what], wanted, rtol=1e-3, atol=1e-3):
            raise OneShotError(
                f"the corrected label of {name}: expected the {what} of its image, {_short(wanted)}, found "
                f"{_short(got[what])}; resample the label onto the image's grid"
            )


def _by_names(found: sitk.Image, label: LabelVolume, raw: RawDataset) -> LabelVolume:
    """3D Slicer may number segments anew: their names say which class they are."""
    values = {name: value for value, name in raw.class_names.items()}
    result, number = np.zeros_like(label), 0
    while found.HasMetaDataKey(f"Segment{number}_Name"):
        name = found.GetMetaData(f"Segment{number}_Name")
        if name not in values:
            raise OneShotError(f"expected segments named {', '.join(values)}, found {name!r}; rename or delete it")
        result[label == int(found.GetMetaData(f"Segment{number}_LabelValue"))] = values[name]
        number += 1
    return result if number else label


def _short(values: tuple[float, ...]) -> tuple[float, ...]:
    return tuple(round(float(v), 4) for v in values)
