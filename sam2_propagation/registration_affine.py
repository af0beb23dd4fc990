"""The affine from support to query: starts refined on the label's neighbourhood, the most plausible one kept."""

from __future__ import annotations

from typing import Literal

import numpy as np
import SimpleITK as sitk

from sam2_propagation.registration_similarity import likeness
from sam2_propagation.registration_start import displacement, starts
from sam2_propagation.registration_volume import Array, Index, coarser, cropped, working_spacing

Metric = Literal["correlation", "information"]

_STARTS = 4
_TRIAL_VOXELS, _TRIAL_STEPS = 5_000, 40
_FINAL_VOXELS, _FINAL_STEPS = 12_000, 60
_NEIGHBOURHOOD = 0.3
"""Margin around the label's box, as a share of the box."""
_DISTANCE_WEIGHT = 4.0
_STRETCH_WEIGHT = 0.5


def label_box(label: sitk.Image, margin: float) -> tuple[Index, Index]:
    """(x, y, z) first and last voxel of the foreground's box, widened by `margin` of its size and one voxel."""
    at = np.argwhere(sitk.GetArrayViewFromImage(label))[:, ::-1]
    low, high = at.min(axis=0), at.max(axis=0)
    pad = ((high - low + 1) * margin / 2 + 1).astype(int)
    return np.maximum(low - pad, 0), np.minimum(high + pad, np.asarray(label.GetSize()) - 1)


class AffineSearch:
    """The affine from one support to one query, by any metric; the starts are looked for once.

    Refined starts compete by likeness in the label's neighbourhood, less a penalty for moving far and for stretching:
    without it a heart is found in a liver that happens to look alike.

    Args:
        support, query: float32, centred.
        label: on the support's grid.
    """

    def __init__(self, support: sitk.Image, label: sitk.Image, query: sitk.Image) -> None:
        self.support, self.query = support, query
        self.around = cropped(support, *label_box(label, _NEIGHBOURHOOD))
        size, spacing = np.asarray(self.around.GetSize()), np.asarray(self.around.GetSpacing())
        self.half = size * spacing / 2
        self.middle = np.asarray(self.around.GetOrigin()) + (size - 1) / 2 * spacing
        self.trial = self._pair(_TRIAL_VOXELS)
        self.starts = [start.transform for start in starts(support, self.middle, self.half, query, _STARTS)]

    def best(self, metric: Metric) -> sitk.AffineTransform:
        """From points of the support to points of the query."""
        refined = [_refined(*self.trial, start, metric, _TRIAL_STEPS) for start in self.starts]
        # Starts compete too: a refinement that slid out of the field of view is worse than where it began.
        best = max([*self.starts, *filter(None, refined)], key=self._worth)
        last = _refined(*self._pair(_FINAL_VOXELS), best, metric, _FINAL_STEPS)
        return last if last is not None and self._worth(last) > self._worth(best) else best

    def _pair(self, voxels: int) -> tuple[sitk.Image, sitk.Image]:
        """The label's neighbourhood at that budget, and the query at the same spacing."""
        small = coarser(self.around, working_spacing(self.around, voxels))
        return small, coarser(self.query, small.GetSpacing())

    def _worth(self, transform: sitk.AffineTransform) -> float:
        """Likeness times overlap (what is pushed out of the field of view matches nothing), less implausibility."""
        similarity, overlap = likeness(*self.trial, transform)
        stretches = np.log(np.linalg.svd(_matrix(transform), compute_uv=False))
        moved = displacement(self.support, self.query, self.middle, transform)
        implausible = (_DISTANCE_WEIGHT * moved + _STRETCH_WEIGHT * float((stretches**2).sum())) / 2
        return min(similarity, similarity * overlap) - implausible


def _refined(
    fixed: sitk.Image, moving: sitk.Image, start: sitk.AffineTransform, metric: Metric, steps: int
) -> sitk.AffineTransform | None:
    method = sitk.ImageRegistrationMethod()
    if metric == "correlation":
        method.SetMetricAsCorrelation()
    else:
        method.SetMetricAsMattesMutualInformation(24)
    method.SetMetricSamplingStrategy(method.NONE)  # every voxel: nothing is drawn, so nothing varies between runs
    method.SetInterpolator(sitk.sitkLinear)
    method.SetOptimizerAsRegularStepGradientDescent(max(fixed.GetSpacing()), 1e-3, steps, 0.6, 1e-8)
    method.SetOptimizerScalesFromPhysicalShift()
    transform = sitk.AffineTransform(start)
    method.SetInitialTransform(transform, True)
    try:
        method.Execute(fixed, moving)
    except RuntimeError:  # ITK's way to say that too few points overlap or that the metric is flat
        return None
    return transform if _invertible(transform) else None


def _matrix(transform: sitk.AffineTransform) -> Array:
    dimension = transform.GetDimension()
    return np.asarray(transform.GetMatrix()).reshape(dimension, dimension)


def _invertible(transform: sitk.AffineTransform) -> bool:
    return float(np.linalg.det(_matrix(transform))) > 1e-2
