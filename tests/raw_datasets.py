"""Small nnU-Net raw datasets for tests, and what the folders hold before and after."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import SimpleITK as sitk
from skimage import io

LABELS = {"background": 0, "organ": 1, "spot": 2}
SHAPE = (5, 9, 8)
SPACING = (0.8, 1.1, 3.0)
ORIGIN = (5.0, -7.0, 11.0)
FLIPPED_OBLIQUE = (0.6, -0.8, 0.0, -0.8, -0.6, 0.0, 0.0, 0.0, 1.0)
"""x and y mirrored and turned: no viewer's default, nothing that survives an axis mistake."""
NATURAL = (".png", ".bmp")


@dataclass(frozen=True)
class Roots:
    """nnU-Net's three folders."""

    raw: Path
    preprocessed: Path
    results: Path

    def snapshot(self) -> dict[str, str]:
        """Every path below the three folders with its content's hash."""
        return {str(p): _digest(p) for root in (self.raw, self.preprocessed, self.results) for p in root.rglob("*")}


def _digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else "folder"


def image_array(index: int, channel: int = 0, shape: tuple[int, ...] = SHAPE) -> np.ndarray:
    """Intensities of case `index`: the labelled structures, brighter than a noisy background."""
    noise = np.random.default_rng([index, channel]).normal(100, 5, shape)
    return np.round(noise + 20 * label_array(index, shape) * (channel + 1)).astype(np.int16)


def label_array(index: int, shape: tuple[int, ...] = SHAPE) -> np.ndarray:
    """An organ with a spot in it, a voxel further along x in every other case."""
    label = np.zeros(shape, np.uint8)
    label[..., 2:7, 1 + index % 2 : 5 + index % 2] = 1
    label[..., 3:5, 2 + index % 2] = 2
    return label


def write_image(path: Path, data: np.ndarray, direction: Sequence[float] = FLIPPED_OBLIQUE) -> None:
    """Write (Z, Y, X), or (Y, X, 3) for natural images, by SimpleITK or scikit-image."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix in NATURAL or data.ndim == 2:
        io.imsave(path, data.astype(np.uint8), check_contrast=False)
        return
    image = sitk.GetImageFromArray(data)
    image.SetSpacing(SPACING)
    image.SetOrigin(ORIGIN)
    image.SetDirection(direction)
    sitk.WriteImage(image, str(path))


def write_raw(
    raw: Path,
    number: int = 501,
    *,
    cases: Sequence[str] = ("case_0", "case_1", "case_2"),
    annotated: Sequence[str] = ("case_0",),
    apart: Sequence[str] = (),
    ending: str = ".nii.gz",
    channels: int = 1,
    labels: Mapping[str, object] = LABELS,
) -> Path:
    """Write a dataset of the cases in imagesTr and of those `apart` in imagesUn; returns its folder."""
    folder = raw / f"Dataset{number:03d}_toy"
    for index, name in enumerate([*cases, *apart]):
        _write_case(folder / ("imagesUn" if name in apart else "imagesTr"), name, index, ending, channels)
        if name in annotated:
            label = label_array(index)
            write_image(folder / "labelsTr" / f"{name}{ending}", label[0] if ending in NATURAL else label)
    write_json(folder, channels=channels, labels=labels, ending=ending, training=len(cases))
    return folder


def _write_case(folder: Path, name: str, index: int, ending: str, channels: int) -> None:
    if ending in NATURAL:
        rgb = np.stack([image_array(index, c)[0] for c in range(channels)], axis=-1)
        write_image(folder / f"{name}_0000{ending}", rgb if channels > 1 else rgb[..., 0])
        return
    for channel in range(channels):
        write_image(folder / f"{name}_{channel:04d}{ending}", image_array(index, channel))


def write_json(folder: Path, *, channels: int, labels: Mapping[str, object], ending: str, training: int) -> None:
    """Write dataset.json."""
    content = {
        "channel_names": {str(c): f"channel {c}" for c in range(channels)},
        "labels": dict(labels),
        "numTraining": training,
        "file_ending": ending,
    }
    (folder / "dataset.json").write_text(json.dumps(content))


def edit_json(folder: Path, **changes: object) -> None:
    """Change keys of dataset.json; None removes a key."""
    path = folder / "dataset.json"
    content = {**json.loads(path.read_text()), **changes}
    path.write_text(json.dumps({key: value for key, value in content.items() if value is not None}))


def geometry(path: Path) -> tuple[object, ...]:
    """Size, spacing, origin and direction as SimpleITK reads them, rounded to what formats keep."""
    image = sitk.ReadImage(str(path))
    floats = (*image.GetSpacing(), *image.GetOrigin(), *image.GetDirection())
    return (*image.GetSize(), *(round(value, 4) + 0.0 for value in floats))


def read(path: Path) -> np.ndarray:
    """Voxels (Z, Y, X) of a file."""
    return sitk.GetArrayFromImage(sitk.ReadImage(str(path)))


def make_sparse(folder: Path, case: str = "case_0", ignore: int = 3) -> np.ndarray:
    """Leave one annotated slice of a case's label, declare the ignore label; returns the label."""
    edit_json(folder, labels={**LABELS, "ignore": ignore})
    path = folder / "labelsTr" / f"{case}.nii.gz"
    label = read(path)
    label[np.arange(len(label)) != 2] = ignore
    write_image(path, label)
    return label
