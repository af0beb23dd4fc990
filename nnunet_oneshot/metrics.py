"""Overlap and surface distance of two masks, and bootstrap intervals over cases.

Definitions (the usual ones of medical segmentation; see Maier-Hein et al., Metrics Reloaded, Nature Methods 2024):

- The surface of a mask is the set of its voxels that have a face neighbour outside the mask; the image border counts as
  outside. A slice stack of one slice (Z = 1) is 2D: only in-plane neighbours count. Distances are taken between
  voxel centres, in mm, anisotropic spacing included (in pixels for formats without spacing, such as PNG).
- HD is the largest of all surface distances in both directions; HD95 the larger of the two directed 95th percentiles;
  ASSD the mean over the surface voxels of both masks together.
- Ignored voxels belong to neither mask, and a border with them is no surface.

Empty masks:

- Both empty: nothing to find and nothing found. Every metric is NaN and left out of means (as nnU-Net does).
- One empty: Dice 0, and every distance is the diagonal of the image in mm. Leaving such cases out would let a method
  improve its mean distance by not finding hard structures at all.
- Both non-empty but one has no surface (ignored voxels enclose it wholly): Dice as usual, distances NaN.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from scipy import ndimage

BoolVolume = npt.NDArray[np.bool_]
"""bool array, (Z, Y, X)."""
Spacing = tuple[float, float, float]
"""(z, y, x) in mm."""

METRICS = ("Dice", "HD", "HD95", "ASSD")
UNITS = {"Dice": "", "HD": "mm", "HD95": "mm", "ASSD": "mm"}


@dataclass(frozen=True)
class Scores:
    """How well one mask matches another.

    Attributes:
        dice: in [0, 1], or NaN when both masks are empty.
        hd, hd95, assd: in mm; see the module's text for empty masks.
        n_reference, n_prediction: voxels in each mask, ignored ones not counted.
    """

    dice: float
    hd: float
    hd95: float
    assd: float
    n_reference: int
    n_prediction: int

    @property
    def values(self) -> tuple[float, float, float, float]:
        """In the order of `METRICS`."""
        return self.dice, self.hd, self.hd95, self.assd


@dataclass(frozen=True)
class Interval:
    """A mean over cases with its confidence interval.

    Attributes:
        mean: NaN when no case counts.
        low, high: bounds; NaN with fewer than two cases.
        n: cases that count (not NaN).
    """

    mean: float
    low: float
    high: float
    n: int


def score(reference: BoolVolume, prediction: BoolVolume, spacing: Spacing, ignored: BoolVolume | None = None) -> Scores:
    """Dice and surface distances of two masks.

    Args:
        reference, prediction: bool (Z, Y, X).
        spacing: (z, y, x) in mm.
        ignored: bool (Z, Y, X), voxels that do not count, or None.

    Raises:
        ValueError: the shapes differ.
    """
    if reference.shape != prediction.shape:
        raise ValueError(f"masks must have the same shape, found {reference.shape} and {prediction.shape}")
    if ignored is not None:
        reference, prediction = reference & ~ignored, prediction & ~ignored
    n_reference, n_prediction = int(reference.sum()), int(prediction.sum())
    distances = _distance_metrics(reference, prediction, spacing, ignored, n_reference, n_prediction)
    return Scores(_dice(reference, prediction), *distances, n_reference, n_prediction)


def surface(mask: BoolVolume, ignored: BoolVolume | None = None) -> BoolVolume:
    """The voxels of a mask with a face neighbour that is outside of it and not ignored; same shape, bool (Z, Y, X)."""
    solid = mask if ignored is None else mask | ignored
    return mask & ~ndimage.binary_erosion(solid, _neighbours(mask.shape))


def surface_distances(
    reference: BoolVolume, prediction: BoolVolume, spacing: Spacing, ignored: BoolVolume | None = None
) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.float64]]:
    """Distances in mm from each surface voxel of one mask to the other's surface: (reference's, prediction's).

    Both are empty when a mask has no surface.
    """
    reference_surface, prediction_surface = surface(reference, ignored), surface(prediction, ignored)
    if not reference_surface.any() or not prediction_surface.any():
        return np.empty(0), np.empty(0)
    # The distance between two voxels of a box never depends on what lies outside of it.
    box = ndimage.find_objects((reference_surface | prediction_surface).astype(np.uint8))[0]
    reference_surface, prediction_surface = reference_surface[box], prediction_surface[box]
    return (
        ndimage.distance_transform_edt(~prediction_surface, sampling=spacing)[reference_surface],
        ndimage.distance_transform_edt(~reference_surface, sampling=spacing)[prediction_surface],
    )


def image_diagonal(shape: Sequence[int], spacing: Spacing) -> float:
    """The length of the image's diagonal in mm; in-plane when Z = 1."""
    extent = np.multiply(shape, spacing)
    return float(np.linalg.norm(extent[1:] if shape[0] == 1 else extent))


def bootstrap(
    values: npt.NDArray[np.float64],
    statistic: Callable[[npt.NDArray[np.float64]], npt.NDArray[np.float64]],
    *,
    n_bootstrap: int = 2000,
    seed: int = 0,
    confidence: float = 0.95,
) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.float64]]:
    """Percentile bootstrap over cases (Efron): bounds of a statistic, the same resamples for all its entries.

    Args:
        values: one row a case, (cases, ...).
        statistic: from rows (cases, ...) to an array of figures.

    Returns:
        (low, high), each of the statistic's shape; NaN everywhere when there are fewer than two cases.
    """
    cases = len(values)
    if cases < 2:
        blank = np.full_like(statistic(values), np.nan)
        return blank, blank
    draws = np.random.default_rng(seed).integers(cases, size=(n_bootstrap, cases))
    resampled = np.stack([statistic(values[draw]) for draw in draws])
    tail = (1 - confidence) / 2
    return nan_quantile(resampled, tail), nan_quantile(resampled, 1 - tail)


def nan_mean(values: npt.NDArray[np.float64], axis: int) -> npt.NDArray[np.float64]:
    """Mean without NaN; NaN (and no warning) where there is nothing else."""
    present = ~np.isnan(values)
    count = present.sum(axis)
    total = np.where(present, values, 0).sum(axis)
    return np.where(count > 0, total / np.maximum(count, 1), np.nan)


def nan_quantile(values: npt.NDArray[np.float64], q: float) -> npt.NDArray[np.float64]:
    """Quantile over the first axis without NaN; NaN (and no warning) where there is nothing else."""
    empty = np.isnan(values).all(0)
    return np.where(empty, np.nan, np.nanquantile(np.where(empty, 0, values), q, axis=0))


def _dice(reference: BoolVolume, prediction: BoolVolume) -> float:
    total = int(reference.sum()) + int(prediction.sum())
    return 2 * int((reference & prediction).sum()) / total if total else float("nan")


def _distance_metrics(
    reference: BoolVolume,
    prediction: BoolVolume,
    spacing: Spacing,
    ignored: BoolVolume | None,
    n_reference: int,
    n_prediction: int,
) -> tuple[float, float, float]:
    """(HD, HD95, ASSD) in mm."""
    if not n_reference and not n_prediction:
        return (float("nan"),) * 3
    if not n_reference or not n_prediction:
        return (image_diagonal(reference.shape, spacing),) * 3
    there, back = surface_distances(reference, prediction, spacing, ignored)
    if not there.size:
        return (float("nan"),) * 3
    hd95 = max(np.percentile(there, 95), np.percentile(back, 95))
    assd = (there.sum() + back.sum()) / (there.size + back.size)
    return float(max(there.max(), back.max())), float(hd95), float(assd)


def _neighbours(shape: Sequence[int]) -> BoolVolume:
    """Face neighbours; in-plane ones for a single slice, which would be all surface otherwise."""
    cross = ndimage.generate_binary_structure(3, 1)
    if shape[0] == 1:
        cross[[0, 2]] = False
    return cross
