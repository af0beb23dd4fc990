"""Views: geometric presentations of an image to a propagator, each with its exact inverse.

A view is a slicing plane and a number of quarter turns in it. YoloSeg's three views are `identity`, `rot90` (clockwise)
and `rot180`, on the natural plane (across the thickest axis); `axial`, `coronal` and `sagittal` name a plane, and
`coronal_rot90` is a turned one. Every presentation is oriented alike (axes in the order and direction of an identity
direction matrix), so that a support and a query stored in different orientations meet upright.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TypeVar

import numpy as np
import numpy.typing as npt
from scipy.optimize import linear_sum_assignment

from sam2_propagation.errors import PropagationError
from sam2_propagation.interface import Image

Scalar = TypeVar("Scalar", bound=np.generic)

TURNS = {"identity": 0, "rot90": 1, "rot180": 2}
"""Clockwise quarter turns."""

PLANES = {"sagittal": 0, "coronal": 1, "axial": 2}
"""World axis (x, y, z of SimpleITK) that a plane's slices lie along."""

EVERY_PLANE = ("axial", "coronal", "sagittal")
"""The views along three planes."""

FLAT = "a single slice, of another plane than the slices of the annotated images"
"""The reason why a 2D image that `can_show` refuses gets no label."""

VIEWS: tuple[str, ...] = (
    *TURNS,
    *EVERY_PLANE,
    *(f"{plane}_{turn}" for plane in EVERY_PLANE for turn in ("rot90", "rot180")),
)
"""Every view's name."""

_THICKER = 1.001


@dataclass(frozen=True)
class Presentation:
    """How one image's array is shown in one view.

    Attributes:
        axes: array axes (0 = Z, 1 = Y, 2 = X) that become slice, row and column.
        flips: whether each of those runs against its direction in the array.
        turns: clockwise quarter turns of each slice.
    """

    axes: tuple[int, int, int]
    flips: tuple[bool, bool, bool]
    turns: int

    def forward(self, volume: npt.NDArray[Scalar]) -> npt.NDArray[Scalar]:
        """(..., Z, Y, X) as seen: (..., slice, row, column). A view of the array where possible."""
        lead = volume.ndim - 3
        moved = volume.transpose(*range(lead), *(lead + axis for axis in self.axes))
        return np.rot90(self._flipped(moved), -self.turns, axes=(-2, -1))

    def inverse(self, seen: npt.NDArray[Scalar]) -> npt.NDArray[Scalar]:
        """Undo `forward`: (..., slice, row, column) back to (..., Z, Y, X)."""
        lead = seen.ndim - 3
        moved = self._flipped(np.rot90(seen, self.turns, axes=(-2, -1)))
        back = np.argsort(self.axes)
        return np.ascontiguousarray(moved.transpose(*range(lead), *(lead + int(axis) for axis in back)))

    def _flipped(self, moved: npt.NDArray[Scalar]) -> npt.NDArray[Scalar]:
        which = tuple(axis - 3 for axis, flip in enumerate(self.flips) if flip)
        return np.flip(moved, which) if which else moved


def natural_plane(image: Image) -> str:
    """The plane across the thickest axis; the first array axis (Z) where none is thicker."""
    spacing = np.asarray(image.spacing)
    thickest = int(spacing.argmax())
    return plane_across(image, thickest if spacing[thickest] > _THICKER * spacing[0] and image.shape[0] > 1 else 0)


def plane_across(image: Image, axis: int) -> str:
    """The plane whose slices are counted along an array axis (0 = Z, 1 = Y, 2 = X)."""
    world = _world_axes(image)[axis]
    return next(plane for plane, number in PLANES.items() if number == world)


def present(image: Image, view: str, natural: str | None = None) -> Presentation:
    """How `image` is shown in `view`.

    Args:
        image: a volume, or a 2D image (Z = 1).
        view: one of `VIEWS`.
        natural: the plane of views that name none; the image's own natural plane when None. A query is given the
            support's, so that both are sliced alike.

    Raises:
        PropagationError: unknown view, or a plane across the pixels of a 2D image.
    """
    plane, turn = _parse(view)
    plane = plane or natural or natural_plane(image)
    world = _world_axes(image)
    across = world.index(PLANES[plane])
    if not can_show(image, view, natural):
        raise PropagationError(
            f"expected a volume for view {view}, found the 2D image {image.case}; use identity, rot90 or rot180"
        )
    in_plane = sorted((axis for axis in range(3) if axis != across), key=lambda axis: -world[axis])
    axes = (across, *in_plane)
    backwards = [_runs_backwards(image, axis, world[axis]) for axis in axes]
    return Presentation((axes[0], axes[1], axes[2]), (backwards[0], backwards[1], backwards[2]), TURNS[turn])


def can_show(image: Image, view: str, natural: str | None = None) -> bool:
    """Whether `present` can show an image so: a single slice has pixels in one plane alone.

    Raises:
        PropagationError: unknown view.
    """
    plane = plane_of(view) or natural
    return image.shape[0] > 1 or plane is None or plane == plane_across(image, 0)


def plane_of(view: str) -> str | None:
    """The plane that a view names, or None for the natural one.

    Raises:
        PropagationError: unknown view.
    """
    return _parse(view)[0]


def _parse(view: str) -> tuple[str | None, str]:
    if view not in VIEWS:
        raise PropagationError(f"expected views out of {', '.join(VIEWS)}, found {view!r}; choose among those")
    first, _, turn = view.partition("_")
    return (None, first) if first in TURNS else (first, turn or "identity")


def _cosines(image: Image) -> npt.NDArray[np.float64]:
    """(world axis, array axis in the order Z, Y, X)."""
    return np.asarray(image.direction, float).reshape(3, 3)[:, ::-1]


def _world_axes(image: Image) -> list[int]:
    """The world axis that each array axis (Z, Y, X) runs along most, each taken once."""
    world, array = linear_sum_assignment(-np.abs(_cosines(image)))
    return [int(world[list(array).index(axis)]) for axis in range(3)]


def _runs_backwards(image: Image, axis: int, world: int) -> bool:
    return bool(_cosines(image)[world, axis] < 0)
