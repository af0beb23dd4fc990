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


def best_affine(support: sitk.Image, label: sitk.Image, query: sitk.Image, metric: Metric) -> sitk.AffineTransform:
    """The transform from points of the support to points of the query.

    Starts compete by likeness in the label's neighbourhood, less a penalty for moving far and for stretching:
    without it a heart is found in a liver that happens to look alike.
    """
    low, high = label_box(label, _NEIGHBOURHOOD)
    around = cropped(support, low, high)
    size, spacing = np.asarray(around.GetSize()), np.asarray(around.GetSpacing())
    middle = np.asarray(around.GetOrigin()) + (size - 1) / 2 * spacing
    trial = coarser(around, working_spacing(around, _TRIAL_VOXELS))
    field = coarser(query, trial.GetSpacing())
    first = [start.transform for start in starts(support, middle, size * spacing / 2, query, _STARTS)]
    refined = [_refined(trial, field, transform, metric, _TRIAL_STEPS) for transform in first]

    def worth(transform: sitk.AffineTransform) -> float:
        return _match(trial, field, transform) - _implausibility(support, query, middle, transform)

    # Starts compete too: a refinement that slid out of the field of view is worse than where it began.
    best = max([*first, *filter(None, refined)], key=worth)
    final = coarser(around, working_spacing(around, _FINAL_VOXELS))
    last = _refined(final, coarser(query, final.GetSpacing()), best, metric, _FINAL_STEPS)
    return last if last is not None and worth(last) > worth(best) else best


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


def _match(fixed: sitk.Image, moving: sitk.Image, transform: sitk.AffineTransform) -> float:
    """Likeness times overlap: what is pushed out of the field of view matches nothing."""
    similarity, overlap = likeness(fixed, moving, transform)
    return similarity * overlap if similarity > 0 else similarity


def _matrix(transform: sitk.AffineTransform) -> Array:
    dimension = transform.GetDimension()
    return np.asarray(transform.GetMatrix()).reshape(dimension, dimension)


def _invertible(transform: sitk.AffineTransform) -> bool:
    return float(np.linalg.det(_matrix(transform))) > 1e-2


def _implausibility(support: sitk.Image, query: sitk.Image, middle: Array, transform: sitk.AffineTransform) -> float:
    """On the scale of `likeness`: squared relative move of the label's centre, squared log of each stretch."""
    stretches = np.log(np.linalg.svd(_matrix(transform), compute_uv=False))
    moved = displacement(support, query, middle, transform)
    return (_DISTANCE_WEIGHT * moved + _STRETCH_WEIGHT * float((stretches**2).sum())) / 2
