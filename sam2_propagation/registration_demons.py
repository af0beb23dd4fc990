"""Diffeomorphic demons (Vercauteren et al., NeuroImage 2009) on feature images, coarse to fine."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import SimpleITK as sitk

from sam2_propagation.interface import BoolVolume
from sam2_propagation.registration_similarity import edges, finest, locally_normalised, matched
from sam2_propagation.registration_volume import Array, coarser, like

Feature = Literal["intensity", "local", "edges"]

_LEVELS = ((4, 40), (2, 30), (1, 20))
"""(shrink factor, iterations)"""
_FEWEST_VOXELS = 8
_LONGEST_STEP = 2.0


@dataclass(frozen=True)
class Demons:
    """What drives the demons.

    Attributes:
        feature: what is compared: matched intensities, the same locally normalised, or their locally normalised edges.
        smoothing: deviation of the Gaussian that smooths the field, in finest voxels of each level.
        forward: True: the query is the fixed image; False: the support is, and the field is inverted.
    """

    feature: Feature = "local"
    smoothing: float = 1.0
    forward: bool = True


def demons_field(query: sitk.Image, warped: sitk.Image, demons: Demons) -> sitk.Image:
    """The displacement field, in mm, that takes points of the query to points of the affinely warped support.

    Args:
        query, warped: float32 on one grid.
    """
    fixed = like(_feature(sitk.GetArrayFromImage(query), demons.feature, finest(query)), query)
    same = matched(sitk.GetArrayFromImage(warped), sitk.GetArrayViewFromImage(query))
    moving = like(_feature(same, demons.feature, finest(query)), query)
    if demons.forward:
        return _pyramid(fixed, moving, demons.smoothing)
    return sitk.InvertDisplacementField(_pyramid(moving, fixed, demons.smoothing), 20)


def folding_share(field: sitk.Image, where: BoolVolume) -> float:
    """Share of the voxels `where` at which the field turns space inside out (Jacobian determinant <= 0), in [0, 1].

    Elsewhere it does no harm: an inverted field has a torn rim.
    """
    # A copy: a view would outlive the image that owns its memory.
    jacobian = sitk.GetArrayFromImage(sitk.DisplacementFieldJacobianDeterminant(field))
    return float((jacobian[where] <= 0).mean()) if where.any() else 0.0


def _feature(array: Array, feature: Feature, unit: Array) -> Array:
    if feature == "intensity":
        return array
    return locally_normalised(edges(array, unit) if feature == "edges" else array, unit)


def _pyramid(fixed: sitk.Image, moving: sitk.Image, smoothing: float) -> sitk.Image:
    field: Any = None
    for factor, iterations in _LEVELS:
        spacing = _level_spacing(fixed, factor)
        field = _level(coarser(fixed, spacing), coarser(moving, spacing), field, iterations, smoothing)
    return field


def _level_spacing(image: sitk.Image, factor: int) -> tuple[float, ...]:
    """Axes that would keep too few voxels, or are coarse already (thick slices), keep their spacing."""
    spacing = np.asarray(image.GetSpacing())
    enough = np.asarray(image.GetSize()) // factor >= _FEWEST_VOXELS
    return tuple(np.where(enough, np.maximum(spacing, spacing.min() * factor), spacing))


def _level(
    fixed: sitk.Image, moving: sitk.Image, start: sitk.Image | None, iterations: int, smoothing: float
) -> sitk.Image:
    method = sitk.DiffeomorphicDemonsRegistrationFilter()
    method.SetNumberOfIterations(iterations)
    method.SetMaximumUpdateStepLength(_LONGEST_STEP)
    method.SetSmoothDisplacementField(True)
    # Deviations are in voxels: the same length in mm along every axis keeps thick slices from being smeared.
    method.SetStandardDeviations((smoothing * finest(fixed)[::-1]).astype(float).tolist())
    if start is None:
        return method.Execute(fixed, moving)
    identity = sitk.Transform(fixed.GetDimension(), sitk.sitkIdentity)
    field = sitk.Resample(start, fixed, identity, sitk.sitkLinear, 0.0, start.GetPixelID(), True)
    return method.Execute(fixed, moving, field)
