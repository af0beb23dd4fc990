"""How alike two arrays are, and the feature images that registration compares."""

from __future__ import annotations

import numpy as np
import SimpleITK as sitk
from scipy import ndimage

from sam2_propagation.registration_volume import Array

_QUANTILES = np.linspace(0, 1, 65)
_NOISE = 0.05
"""Contrast, as a share of the whole range, below which a neighbourhood counts as flat."""


def finest(grid: sitk.Image) -> Array:
    """(z, y, x) lengths in voxels of one finest voxel spacing: 1 along the finest axis, less along the others."""
    spacing = np.asarray(grid.GetSpacing()[::-1])
    return (spacing.min() / spacing).astype(np.float32)


def matched(array: Array, reference: Array) -> Array:
    """`array` with the histogram of `reference` (65 quantiles, linear between them)."""
    source = np.quantile(array, _QUANTILES) + np.arange(len(_QUANTILES)) * 1e-7  # strictly rising for np.interp
    return np.interp(array, source, np.quantile(reference, _QUANTILES)).astype(np.float32)


def edges(array: Array, unit: Array) -> Array:
    """Gradient magnitude at a scale of one finest voxel."""
    return ndimage.gaussian_gradient_magnitude(array, unit)


def locally_normalised(array: Array, unit: Array, width: float = 4.0) -> Array:
    """Zero mean and unit deviation in a Gaussian window of `width` finest voxels.

    Squared differences of such images behave as the local correlation coefficient does (Cachier et al., 2003): bias
    fields and contrast that differ between scanners drop out.
    """
    mean = ndimage.gaussian_filter(array, width * unit)
    variance = ndimage.gaussian_filter(array * array, width * unit) - mean * mean
    return (array - mean) / np.sqrt(np.maximum(variance, 0) + _NOISE**2)


def correlation(first: Array, second: Array) -> float:
    """Pearson correlation; 0 where one of them is constant."""
    a, b = first - first.mean(), second - second.mean()
    norm = np.sqrt(float((a * a).sum()) * float((b * b).sum()))
    return float((a * b).sum() / norm) if norm > 0 else 0.0


def likeness(fixed: sitk.Image, moving: sitk.Image, transform: sitk.Transform) -> tuple[float, float]:
    """Mean correlation of intensities and of edges in the overlap, in [-1, 1], and the share of `fixed` that overlaps.

    The correlation is -1 where less than 30 % overlaps.

    Args:
        transform: from points of `fixed` to points of `moving`.
    """
    warped = sitk.GetArrayFromImage(sitk.Resample(moving, fixed, transform, sitk.sitkLinear, -1.0))
    inside = warped >= 0
    if inside.mean() < 0.3:
        return -1.0, float(inside.mean())
    reference, unit = sitk.GetArrayViewFromImage(fixed), finest(fixed)
    # The border of the overlap is an edge of the image's frame, not of anatomy.
    core = ndimage.binary_erosion(inside, border_value=1)
    filled = np.where(inside, warped, warped[inside].mean())
    sharp = correlation(edges(reference, unit)[core], edges(filled, unit)[core]) if core.any() else 0.0
    return (correlation(reference[inside], warped[inside]) + sharp) / 2, float(inside.mean())
