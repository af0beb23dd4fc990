"""Tiny raw datasets that nnU-Net crops, turns and resamples, and its preprocessing of them without worker processes."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import SimpleITK as sitk
from nnunetv2.utilities.plans_handling.plans_handler import PlansManager
from raw_datasets import Roots
from tiny_dataset import LABELS, preprocess_in_process

from nnunet_oneshot.refresh import preprocessed_targets, training_cases

NAME = "Dataset901_Tiny"
CASES = ("case_a", "case_b", "case_c")
REGIONS = {"background": 0, "whole": [1, 2], "core": [2], "ignore": 3}
SPACINGS = ((1.0, 1.0, 1.0), (1.2, 0.9, 1.0), (0.8, 1.1, 1.3))
THICK = tuple((x, y, 6 * z) for x, y, z in SPACINGS)
SAGITTAL = tuple((6 * x, y, z) for x, y, z in SPACINGS)
"""Thick along x, which nnU-Net turns to the front."""


def write(
    roots: Roots,
    shape: tuple[int, int, int] = (12, 26, 22),
    spacings: tuple[tuple[float, ...], ...] = SPACINGS,
    labels: Mapping[str, Any] = LABELS,
    **content: Any,
) -> Path:
    """A raw dataset whose images are zero outside of an odd shape that touches no border."""
    folder = roots.raw / NAME
    for index, case in enumerate(CASES):
        write_image(folder, case, image_of(index, shape), spacings[index])
        write_label(folder, case, label_of(index, shape), spacings[index])
    listed = {c: {"images": [f"imagesTr/{c}_0000.nii.gz"], "label": f"labelsTr/{c}.nii.gz"} for c in CASES}
    json_content = {"channel_names": {"0": "MRI"}, "labels": dict(labels), "numTraining": 3, "file_ending": ".nii.gz"}
    (folder / "dataset.json").write_text(json.dumps({**json_content, "dataset": listed, **content}))
    return folder


def image_of(index: int, shape: tuple[int, int, int]) -> np.ndarray:
    rng = np.random.default_rng(index)
    z, y, x = np.ogrid[tuple(slice(0, n) for n in shape)]
    inside = ((y - shape[1] / 2) / (shape[1] / 2 - 3)) ** 2 + ((x - shape[2] / 2 - 1) / (shape[2] / 2 - 3)) ** 2 < 1
    inside = inside & (z >= (1 if shape[0] > 1 else 0))
    image = np.where(inside, rng.normal(300, 40, shape), 0).astype(np.float32)
    image[:, shape[1] // 2, shape[2] // 2] = 0  # a hole, which nnU-Net fills
    return image


def label_of(index: int, shape: tuple[int, int, int], seed: int = 0) -> np.ndarray:
    rng = np.random.default_rng([index, seed])
    label = np.zeros(shape, np.int16)
    y, x = rng.integers(2, 8, 2)
    label[..., y : y + 11, x : x + 12] = 1
    label[shape[0] // 3 :, y + 3 : y + 7, x + 2 : x + 8] = 2
    label[..., y : y + 2, x : x + 12] = 3
    return label


def write_image(folder: Path, case: str, image: np.ndarray, spacing: tuple[float, ...]) -> None:
    save(image, folder / "imagesTr" / f"{case}_0000.nii.gz", spacing)


def write_label(folder: Path, case: str, label: np.ndarray, spacing: tuple[float, ...]) -> None:
    save(label, folder / "labelsTr" / f"{case}.nii.gz", spacing)


def save(array: np.ndarray, path: Path, spacing: tuple[float, ...]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    image = sitk.GetImageFromArray(array)
    image.SetSpacing(spacing)
    sitk.WriteImage(image, str(path))


def add_lowres(base: Path) -> None:
    """A coarser configuration, as nnU-Net plans one for large images, and the cascade that uses both."""
    path = next(base.glob("*Plans.json"))
    plans = json.loads(path.read_text())
    full = plans["configurations"]["3d_fullres"]
    coarse = {**full, "spacing": [1.5 * s for s in full["spacing"]], "data_identifier": "lowres_data"}
    plans["configurations"]["3d_lowres"] = {**coarse, "next_stage": "3d_cascade_fullres"}
    plans["configurations"]["3d_cascade_fullres"] = {"inherits_from": "3d_fullres", "previous_stage": "3d_lowres"}
    path.write_text(json.dumps(plans))
    (base / "lowres_data").mkdir()


def preprocess_fully(base: Path) -> None:
    """What `nnUNetv2_preprocess` does, case by case by nnU-Net's own preprocessor."""
    dataset_json = json.loads((base / "dataset.json").read_text())
    for target in preprocessed_targets(base):
        plans = PlansManager(str(target.plans))
        manager = plans.get_configuration(target.configuration)
        shutil.rmtree(target.folder)
        target.folder.mkdir()
        for case in training_cases(NAME):
            preprocessor = manager.preprocessor_class(verbose=False)
            out, images = str(target.folder / case.name), [str(i) for i in case.images]
            preprocessor.run_case_save(out, images, str(case.label), plans, manager, dataset_json)
    for case in training_cases(NAME):
        shutil.copy(case.label, base / "gt_segmentations")


def prepare(roots: Roots, configurations: tuple[str, ...]) -> Path:
    preprocess_in_process(NAME, configurations)
    base = roots.preprocessed / NAME
    shutil.copy(roots.raw / NAME / "dataset.json", base)
    return base
