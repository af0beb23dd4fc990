"""The plans of the preset `small`: nnU-Net's own, but for large 2D images, whose pixels get coarser."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest
from nnunetv2.experiment_planning.experiment_planners.default_experiment_planner import ExperimentPlanner
from raw_datasets import Roots, write_image

from nnunet_oneshot.planner import OneShotSmallPlanner

CHANNEL = {"mean": 100.0, "median": 100.0, "std": 9.0, "min": 0.0, "max": 255.0}
CHANNEL |= {"percentile_99_5": 250.0, "percentile_00_5": 3.0}


def plan_2d(roots: Roots, shape: tuple[int, int, int], spacing: tuple[float, float, float]) -> dict[str, Any]:
    """The plan of 2d for images (Z, Y, X) of one shape."""
    name, ending = "Dataset501_set", ".png" if shape[0] == 1 else ".nii.gz"
    raw, folder = roots.raw / name, roots.preprocessed / name
    write_image(raw / "imagesTr" / f"a_0000{ending}", np.zeros((9, 8) if shape[0] == 1 else (5, 9, 8)))
    write_image(raw / "labelsTr" / f"a{ending}", np.zeros((9, 8) if shape[0] == 1 else (5, 9, 8)))
    content = {"channel_names": {"0": "US"}, "labels": {"background": 0, "head": 1}, "numTraining": 30}
    (raw / "dataset.json").write_text(json.dumps({**content, "file_ending": ending}))
    fingerprint: dict[str, Any] = {"spacings": [spacing] * 30, "shapes_after_crop": [shape] * 30}
    fingerprint |= {"foreground_intensity_properties_per_channel": {"0": CHANNEL}}
    folder.mkdir()
    (folder / "dataset_fingerprint.json").write_text(
        json.dumps({**fingerprint, "median_relative_size_after_cropping": 1})
    )
    return dict(OneShotSmallPlanner(name).plan_experiment()["configurations"]["2d"])


def test_a_patch_that_would_hold_little_of_a_large_image_holds_all_of_it_in_coarser_pixels(roots: Roots) -> None:
    plan = plan_2d(roots, (1, 540, 800), (1, 1, 1))
    down, across = plan["spacing"]
    assert down == across > 1.2
    assert np.all(np.array(plan["patch_size"]) >= plan["median_image_size_in_voxels"])
    assert np.allclose(np.multiply(plan["median_image_size_in_voxels"], down), (540, 800), atol=1)
    assert np.prod(plan["patch_size"]) * plan["batch_size"] < 540 * 800


def test_pixels_keep_their_proportions(roots: Roots) -> None:
    down, across = plan_2d(roots, (20, 500, 900), (4, 0.6, 0.3))["spacing"]
    assert down == pytest.approx(2 * across)
    assert across > 0.3


@pytest.mark.parametrize("shape", [(1, 128, 128), (12, 256, 224), (1, 400, 500)])
def test_where_a_patch_holds_half_of_an_image_pixels_stay_as_nnunet_has_them(
    roots: Roots, shape: tuple[int, int, int]
) -> None:
    assert plan_2d(roots, shape, (3, 1.5, 1.5) if shape[0] > 1 else (1, 1, 1))["spacing"] == list(
        (1.5, 1.5) if shape[0] > 1 else (1, 1)
    )


def test_nnunets_own_planner_is_left_alone(roots: Roots) -> None:
    plan_2d(roots, (1, 540, 800), (1, 1, 1))
    plans = ExperimentPlanner("Dataset501_set").plan_experiment()
    assert plans["configurations"]["2d"]["spacing"] == [1, 1]
