"""Fuse several labels of one image: where all agree is consensus, elsewhere is divergence."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy.ndimage import distance_transform_edt

from sam2_propagation.interface import BoolVolume, LabelVolume

_CAP = 0.2
"""Of a class's radius: beyond, a distance says no more than that the label disagrees."""


@dataclass(frozen=True, eq=False)
class Fused:
    """The fusion of several labels.

    Attributes:
        label: int16 (Z, Y, X), the best guess at every voxel.
        agreed: bool (Z, Y, X), True where all labels are equal (consensus), False in divergence.
    """

    label: LabelVolume
    agreed: BoolVolume

    @property
    def divergence(self) -> float:
        """Share of voxels outside consensus, in [0, 1]."""
        return float(1.0 - self.agreed.mean())


def fuse(
    labels: Sequence[LabelVolume],
    weights: Sequence[float] | None = None,
    spacing: tuple[float, ...] | None = None,
) -> Fused:
    """Fuse labels where they differ, and the consensus mask (YoloSeg's divergence mask is its complement).

    Without spacing: weighted majority vote. With it: shape-based averaging (Rohlfing and Maurer, IEEE Transactions on
    Image Processing 16(1), 2007): the class whose weighted mean signed distance is lowest, out of those that some label
    says there. Distances are cut off at a fifth of a class's radius, so that a label that misses a structure, or has
    it elsewhere, does not outweigh the others. A tie goes to the label given first, so the caller lists the most
    trusted one first.

    Args:
        labels: one or more int arrays (Z, Y, X) of equal shape.
        weights: one non-negative weight a label; equal weights when None.
        spacing: mm of the axes Z, Y, X.

    Raises:
        ValueError: no labels, unequal shapes, or weights that do not fit.
    """
    _check(labels, weights)
    stack = np.stack([np.asarray(label, dtype=np.int16) for label in labels])
    agreed = (stack == stack[0]).all(axis=0)
    fused = stack[0].copy()
    if not agreed.all():
        # Only needed in divergence, a small share of the voxels.
        each = np.ones(len(stack)) if weights is None else np.asarray(weights, float)
        votes = _votes(stack[:, ~agreed], each) if spacing is None else _shapes(stack, ~agreed, each, spacing)
        fused[~agreed] = np.take_along_axis(stack[:, ~agreed], votes.argmax(axis=0)[None], axis=0)[0]
    return Fused(fused, agreed)


def enough_views(given: int, attempted: int) -> bool:
    """Whether most of the views that were attempted gave a label; the few others would only agree with themselves."""
    return 2 * given > attempted


def _check(labels: Sequence[LabelVolume], weights: Sequence[float] | None) -> None:
    if not labels:
        raise ValueError("expected at least one label to fuse, found none")
    shapes = {np.shape(label) for label in labels}
    if len(shapes) > 1:
        raise ValueError(f"expected labels of one shape, found {sorted(shapes)}")
    if weights is not None and (len(weights) != len(labels) or min(weights) < 0 or max(weights) <= 0):
        raise ValueError(f"expected {len(labels)} non-negative weights, not all zero, found {list(weights)}")


def _votes(stack: LabelVolume, weights: np.ndarray) -> np.ndarray:
    """(N labels, V voxels) -> (N, V): the weight of all labels that say what each says."""
    return np.stack([((stack == own) * weights[:, None]).sum(axis=0) for own in stack])


def _shapes(stack: LabelVolume, wanted: BoolVolume, weights: np.ndarray, spacing: tuple[float, ...]) -> np.ndarray:
    """(N labels, V wanted voxels): how deep, over all labels, each voxel lies in the class that each says there."""
    said = stack[:, wanted]
    classes = [int(value) for value in np.unique(said)]
    radii = {value: _radius(stack == value, spacing) for value in classes if value}
    depths = np.zeros(said.shape, np.float32)
    for value in classes:
        cap = max(_CAP * radii.get(value, max(radii.values())), min(_along(stack[0], spacing)))
        depth = _depth(stack == value, weights, cap, spacing, background=value == 0)[wanted]
        depths = np.where(said == value, depth, depths)
    return depths


def _radius(masks: BoolVolume, spacing: tuple[float, ...]) -> float:
    """mm, of a ball (in 2D a disc) of the masks' mean size."""
    sides = _along(masks[0], spacing)
    size = float(masks.sum() / len(masks) * np.prod(sides))
    return float((size * 3 / (4 * np.pi)) ** (1 / 3)) if len(sides) == 3 else float(np.sqrt(size / np.pi))


def _along(array: np.ndarray, spacing: tuple[float, ...]) -> list[float]:
    """Spacing of the axes that are not flat; of all where every one is."""
    return [mm for mm, count in zip(spacing, array.shape, strict=True) if count > 1] or list(spacing)


def _depth(
    masks: BoolVolume, weights: np.ndarray, cap: float, spacing: tuple[float, ...], *, background: bool
) -> np.ndarray:
    """Weighted sum of the masks' signed distances, float32 mm (Z, Y, X), inside positive, each in [-cap, cap]."""
    where = np.asarray((~masks if background else masks).any(axis=0))
    box = _box(where, [int(np.ceil(cap / mm)) for mm in spacing])
    beyond = cap if background else -cap
    depth = np.full(masks.shape[1:], beyond * weights.sum(), np.float32)
    depth[box] = 0
    for mask, weight in zip(masks, weights, strict=True):
        depth[box] += weight * np.clip(_signed(mask[box], spacing), -cap, cap)
    return depth


def _signed(mask: BoolVolume, spacing: tuple[float, ...]) -> np.ndarray:
    """Signed distance; without a surface in sight, infinity."""
    if mask.all() or not mask.any():
        return np.full(mask.shape, np.inf if mask.any() else -np.inf)
    return np.asarray(distance_transform_edt(mask, spacing) - distance_transform_edt(~mask, spacing))


def _box(mask: BoolVolume, margin: Sequence[int]) -> tuple[slice, ...]:
    """Bounding box of a mask, grown by so many voxels along each axis."""
    where = [np.flatnonzero(mask.any(axis=tuple(a for a in range(3) if a != axis))) for axis in range(3)]
    return tuple(
        slice(max(int(at[0]) - more, 0), int(at[-1]) + more + 1) for at, more in zip(where, margin, strict=True)
    )
