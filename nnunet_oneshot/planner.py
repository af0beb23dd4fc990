"""nnU-Net's own planning, bounded to networks that two CPU cores can train (plans `nnUNetOneShotSmallPlans`)."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from nnunetv2.experiment_planning.dataset_fingerprint.fingerprint_extractor import DatasetFingerprintExtractor
from nnunetv2.experiment_planning.experiment_planners.default_experiment_planner import ExperimentPlanner

from nnunet_oneshot.settings import PRESETS, SMALL_PLANS, PlannerLimits

FINGERPRINT_VOXELS = 1e6
"""Foreground voxels that the intensity statistics are taken from (nnU-Net: 1e8, about 2 GB of memory a channel)."""
COARSER = 1.05
"""What pixels grow by until a 2D patch holds what it is to hold (nnU-Net, looking for 3d_lowres: 1.03)."""


class OneShotSmallPlanner(ExperimentPlanner):
    """nnU-Net's ExperimentPlanner with few features and a small budget of feature map elements.

    Patch size, strides and batch size follow from nnU-Net's own rules; the networks keep nnU-Net's architecture. In 2D,
    where the patch would hold little of the median image, pixels are coarser, as voxels are in nnU-Net's 3d_lowres.
    """

    limits: PlannerLimits | None = PRESETS["small"].planner

    def __init__(self, dataset_name_or_id: int | str, plans_name: str = SMALL_PLANS, **kwargs: Any) -> None:
        super().__init__(dataset_name_or_id, plans_name=plans_name, **kwargs)
        limits = self.limits
        assert limits is not None
        self.UNet_base_num_features = limits.base_features
        self.UNet_max_features_2d = self.UNet_max_features_3d = limits.max_features
        # nnU-Net's reference is what an iteration of the reference batch may hold, for one sample of that batch.
        self.UNet_reference_val_2d = limits.elements_2d / self.UNet_reference_val_corresp_bs_2d
        self.UNet_reference_val_3d = limits.elements_3d / self.UNet_reference_val_corresp_bs_3d

    def get_plans_for_configuration(
        self, spacing: Any, median_shape: Any, data_identifier: str, voxels: float, cache: dict[str, Any]
    ) -> dict[str, Any]:
        """nnU-Net's plan of one configuration, its batch no larger than the limit.

        Args:
            spacing: mm, in the order of the axes that the configuration has.
            median_shape: of the images at that spacing.
            voxels: of the whole set at that spacing, about.
            cache: nnU-Net's estimates of memory.
        """
        assert self.limits is not None
        first = np.asarray(spacing, float), np.asarray(median_shape, float)
        plan = super().get_plans_for_configuration(*first, data_identifier, voxels, cache)
        if len(first[0]) == 2 and _share(plan, first[1]) < self.limits.least_of_image_2d:
            factor = 1.0
            while _share(plan, first[1] / factor) < 1:
                factor *= COARSER
                shape = np.round(first[1] / factor)
                plan = super().get_plans_for_configuration(
                    first[0] * factor, shape, data_identifier, voxels / factor**2, cache
                )
        plan["batch_size"] = min(plan["batch_size"], self.limits.max_batch)
        return plan


def _share(plan: Mapping[str, Any], shape: np.ndarray) -> float:
    """How much of an image of that shape the plan's patch holds."""
    return float(np.prod(np.minimum(plan["patch_size"], np.round(shape)) / np.round(shape)))


class PseudoLabelFingerprintExtractor(DatasetFingerprintExtractor):
    """nnU-Net's fingerprint, its foreground that of each case's best guess.

    nnU-Net takes every label above 0 for foreground, and so would count ignore: of a case that is left out all of its
    image, air included. Of CT these intensities decide how images are normalised.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        guesses = Path(self.input_folder) / "pseudoTr" / "fused"
        for entry in self.dataset.values():
            if (guess := guesses / Path(entry["label"]).name).is_file():
                entry["label"] = str(guess)


class SmallFingerprintExtractor(PseudoLabelFingerprintExtractor):
    """The same from fewer voxels: percentiles are the same within noise, in seconds and little memory."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.num_foreground_voxels_for_intensitystats = FINGERPRINT_VOXELS
