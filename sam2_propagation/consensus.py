"""Fuse several labels of one image: where all agree is consensus, elsewhere is divergence."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from sam2_propagation.interface import BoolVolume, LabelVolume


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


def fuse(labels: Sequence[LabelVolume], weights: Sequence[float] | None = None) -> Fused:
    """Weighted majority vote and the consensus mask (YoloSeg's divergence mask is its complement).

    A tie goes to the label given first among those tied, so the caller lists the most trusted one first.

    Args:
        labels: one or more int arrays (Z, Y, X) of equal shape.
        weights: one non-negative weight a label; equal weights when None.

    Raises:
        ValueError: no labels, unequal shapes, or weights that do not fit.
    """
    _check(labels, weights)
    stack = np.stack([np.asarray(label, dtype=np.int16) for label in labels])
    agreed = (stack == stack[0]).all(axis=0)
    fused = stack[0].copy()
    # Votes are only needed in divergence, a small share of the voxels.
    fused[~agreed] = _vote(stack[:, ~agreed], np.ones(len(stack)) if weights is None else np.asarray(weights, float))
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


def _vote(stack: LabelVolume, weights: np.ndarray) -> LabelVolume:
    """(N labels, V voxels) -> (V,): the label with the largest weight; ties to the earliest voter."""
    support = np.stack([((stack == own) * weights[:, None]).sum(axis=0) for own in stack])
    return np.take_along_axis(stack, support.argmax(axis=0)[None], axis=0)[0]
