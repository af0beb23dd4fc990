"""Views of a training batch: flips and in-plane right-angle rotations, exact and with exact inverses."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from random import Random

import numpy as np
import torch
from torch import Tensor

_SPATIAL = 2
"""Index of the first spatial axis of a batch (B, C, [Z,] Y, X)."""


@dataclass(frozen=True)
class TrainingView:
    """A flip followed by a rotation in the last two axes.

    Attributes:
        flip: spatial axes to flip, counted from 0 as nnU-Net counts mirror axes.
        quarter_turns: number of rotations by 90 degrees in the plane of the last two axes.
    """

    flip: tuple[int, ...] = ()
    quarter_turns: int = 0

    def apply(self, batch: Tensor) -> Tensor:
        """The view of a batch (B, C, [Z,] Y, X)."""
        flipped = torch.flip(batch, self._axes) if self.flip else batch
        return torch.rot90(flipped, self.quarter_turns, (-2, -1)) if self.quarter_turns else flipped

    def invert(self, batch: Tensor) -> Tensor:
        """The batch whose view is `batch`; also for the coarser outputs of deep supervision."""
        turned = torch.rot90(batch, -self.quarter_turns, (-2, -1)) if self.quarter_turns else batch
        return torch.flip(turned, self._axes) if self.flip else turned

    @property
    def _axes(self) -> tuple[int, ...]:
        return tuple(axis + _SPATIAL for axis in self.flip)


@dataclass(frozen=True)
class ViewChoice:
    """The views that a configuration allows.

    Attributes:
        dimensions: 2 or 3.
        mirror_axes: axes that nnU-Net mirrors in its augmentation.
        rotations: True where a quarter turn keeps shape, scale and every level's grid.
    """

    dimensions: int
    mirror_axes: tuple[int, ...]
    rotations: bool

    @property
    def count(self) -> int:
        """How many different views there are, the identity left out."""
        return self._turns * 2 ** len(self.mirror_axes) - 1

    def draw(self, random: Random, count: int = 1) -> list[TrainingView]:
        """So many different views, none the identity, all equally likely; fewer where there are no more."""
        numbers = random.sample(range(1, self.count + 1), min(count, self.count))
        return [self._view(*divmod(number, self._turns)) for number in numbers]

    @property
    def _turns(self) -> int:
        """Quarter turns, none included, that flips do not reach."""
        # Both in-plane flips together are the half turn, so that one quarter turn reaches what is left.
        half_turn_by_flips = {self.dimensions - 2, self.dimensions - 1} <= set(self.mirror_axes)
        return (2 if half_turn_by_flips else 4) if self.rotations else 1

    def _view(self, bits: int, quarter_turns: int) -> TrainingView:
        flip = tuple(axis for position, axis in enumerate(self.mirror_axes) if bits >> position & 1)
        return TrainingView(flip, quarter_turns)


def rotation_obstacle(
    patch: Sequence[int], spacing: Sequence[float], strides: Sequence[Sequence[int]], augmentation: tuple[float, float]
) -> str | None:
    """Why the last two axes allow no rotation by 90 degrees, or None where they do.

    Args:
        patch: patch size, ([z,] y, x) voxels.
        spacing: ([z,] y, x) in mm.
        strides: of each stage, as in the plans.
        augmentation: range of nnU-Net's own rotation in plane, in radians. A view beyond it is one that the network has
            never learnt from, so what it says of that view teaches nothing.
    """
    if patch[-2] != patch[-1]:
        return f"the patch is {patch[-2]} x {patch[-1]} voxels in plane"
    if not np.isclose(spacing[-2], spacing[-1], rtol=1e-2):
        return f"the spacing is {spacing[-2]:.4g} x {spacing[-1]:.4g} mm in plane"
    if any(stage[-2] != stage[-1] for stage in strides):
        return "strides differ in plane"
    if max(augmentation) < np.pi / 2:
        return f"nnU-Net's augmentation rotates by {np.degrees(max(augmentation)):.0f} degrees at most"
    return None
