"""Tiny random raw datasets for the tests of the nnU-Net side: bright balls on noise, labels made from them."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import SimpleITK as sitk
from batchgenerators.utilities.file_and_folder_operations import load_json
from nnunetv2.paths import nnUNet_preprocessed, nnUNet_raw
from nnunetv2.utilities.plans_handling.plans_handler import PlansManager
from nnunetv2.utilities.utils import get_filenames_of_train_images_and_targets

from nnunet_oneshot.planner import OneShotSmallPlanner

LABELS = {"background": 0, "ball": 1, "core": 2, "ignore": 3}
SHAPE = (16, 24, 24)
SPACING = (1.0, 1.0, 1.0)
"""x, y, z in mm."""
STROKES: Mapping[str, Callable[[np.ndarray], np.ndarray]] = {
    "one slice": lambda distance: np.indices(distance.shape)[0] == SHAPE[0] // 2,
    # A stroke within the ball, one within its core, one well outside: no boundary is drawn.
    "scribbles": lambda distance: _row(distance) & (np.abs(distance - 5) < 1) | (distance < 1.5) | _row(distance, 2),
}
"""Where a person drew, of distances to the ball's centre (Z, Y, X)."""


def write_dataset(
    raw: Path,
    name: str = "Dataset901_Tiny",
    cases: int = 4,
    annotated: Sequence[str] = ("case_000",),
    left_out: Sequence[str] = (),
    labels: Mapping[str, Any] = LABELS,
    shape: tuple[int, int, int] = SHAPE,
    spacing: tuple[float, float, float] = SPACING,
    drawn: str = "whole",
    **dataset_json: Any,
) -> Path:
    """Write a dataset whose un-annotated cases have a rim of ignore voxels around each ball; returns its folder.

    `drawn`, a key of STROKES, says how much of each label a person drew; all else is the ignore label too.
    """
    folder = raw / name
    for sub in ("imagesTr", "labelsTr"):
        (folder / sub).mkdir(parents=True)
    for number in range(cases):
        case = f"case_{number:03d}"
        image, label, distance = _ball(number, shape)
        if "ignore" in labels and case not in annotated:
            label[np.abs(distance - 7) < 1] = labels["ignore"]
        if case in left_out:
            label[:] = labels["ignore"]
        if drawn != "whole":
            label[~STROKES[drawn](distance)] = labels["ignore"]
        _write(image, folder / "imagesTr" / f"{case}_0000.nii.gz", spacing)
        _write(label, folder / "labelsTr" / f"{case}.nii.gz", spacing)
    content = {
        "channel_names": {"0": "MRI"},
        "labels": dict(labels),
        "numTraining": cases,
        "file_ending": ".nii.gz",
        # Named here, nnU-Net need not start twelve processes to list them.
        "dataset": {f"case_{number:03d}": _files(f"case_{number:03d}") for number in range(cases)},
        "oneshot": {
            "schema": 1,
            "round": 0,
            "annotated": list(annotated),
            "left_out": list(left_out),
            "case_weight": {},
        },
        **dataset_json,
    }
    (folder / "dataset.json").write_text(json.dumps({k: v for k, v in content.items() if v is not None}))
    return folder


def _row(distance: np.ndarray, y: int | None = None) -> np.ndarray:
    """A line along x in the middle slice, through the ball's centre unless `y` is given."""
    z, row, _ = np.indices(distance.shape)
    middle = np.unravel_index(distance.argmin(), distance.shape)
    return (z == middle[0]) & (row == (middle[1] if y is None else y))


def _files(case: str) -> dict[str, Any]:
    return {"images": [f"imagesTr/{case}_0000.nii.gz"], "label": f"labelsTr/{case}.nii.gz"}


def _ball(seed: int, shape: tuple[int, int, int]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    centre = np.array(shape) / 2 + rng.uniform(-2, 2, 3)
    grid = np.stack(np.meshgrid(*(np.arange(n) for n in shape), indexing="ij"))
    distance = np.sqrt(((grid - centre[:, None, None, None]) ** 2).sum(0))
    label = ((distance < 7).astype(np.int16) + (distance < 3)).astype(np.int16)
    image = (label * 100 + rng.normal(0, 10, shape) + 200).astype(np.float32)
    return image, label, distance


def _write(array: np.ndarray, path: Path, spacing: tuple[float, float, float]) -> None:
    image = sitk.GetImageFromArray(array)
    image.SetSpacing(spacing)
    sitk.WriteImage(image, str(path))


def preprocess_in_process(name: str, configurations: Sequence[str]) -> None:
    """Plan and preprocess without the worker processes that nnU-Net starts, which cost more than the work here."""
    dataset = load_json(f"{nnUNet_raw}/{name}/dataset.json")
    files = get_filenames_of_train_images_and_targets(f"{nnUNet_raw}/{name}", dataset)
    base = Path(str(nnUNet_preprocessed)) / name
    (base / "gt_segmentations").mkdir(parents=True)
    _write_fingerprint(files, dataset, base)
    plans = PlansManager(OneShotSmallPlanner(name).plan_experiment())
    for configuration in configurations:
        manager = plans.get_configuration(configuration)
        (base / manager.data_identifier).mkdir()
        for case, paths in files.items():
            out = str(base / manager.data_identifier / case)
            preprocessor = manager.preprocessor_class(verbose=False)
            preprocessor.run_case_save(out, paths["images"], paths["label"], plans, manager, dataset)
            shutil.copy(paths["label"], base / "gt_segmentations")


def _write_fingerprint(files: Mapping[str, Any], dataset: Mapping[str, Any], base: Path) -> None:
    images = [sitk.ReadImage(paths["images"][0]) for paths in files.values()]
    intensities = {"mean": 200.0, "median": 200.0, "std": 50.0, "min": 0.0, "max": 400.0}
    channel = {**intensities, "percentile_99_5": 400.0, "percentile_00_5": 0.0}
    fingerprint = {
        "spacings": [image.GetSpacing()[::-1] for image in images],
        "shapes_after_crop": [image.GetSize()[::-1] for image in images],
        "foreground_intensity_properties_per_channel": dict.fromkeys(dataset["channel_names"], channel),
        "median_relative_size_after_cropping": 1.0,
    }
    (base / "dataset_fingerprint.json").write_text(json.dumps(fingerprint))
