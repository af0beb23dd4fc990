"""A few annotated slices of a volume carried through it by registering neighbouring slices to each other.

Each slice's label is deformed onto the next by demons, outwards from the annotated ones. By itself it drifts sooner
than a tracker or learnt correspondence does, but it errs in other places than these.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
import SimpleITK as sitk

from sam2_propagation.interface import LabelVolume
from sam2_propagation.registration_demons import Demons, demons_field
from sam2_propagation.registration_volume import Array, coarser

_DEMONS = Demons("local", smoothing=1.0)
_MOST_PIXELS = 128
"""Along each axis of the working grid: the built-in SAM2 sees no finer, and time and memory must not grow with the
scanner's matrix."""


def carried_through(data: Array, label: LabelVolume, drawn: Sequence[int]) -> LabelVolume:
    """The label of every slice, each from the drawn slice nearest to it (of two, the lower).

    Args:
        data: (N, Y, X) intensities, float in [0, 1].
        label: (N, Y, X); only the drawn slices are looked at.
        drawn: their indices, at least one.

    Returns:
        int16 (N, Y, X).

    Raises:
        ValueError: no drawn slice.
    """
    if not len(drawn):
        raise ValueError("expected at least one annotated slice, found none")
    out = np.zeros(data.shape, np.int16)
    out[list(drawn)] = label[list(drawn)]
    images = [_coarse(plane) for plane in data]
    for before, at in _steps(len(data), sorted(drawn)):
        if out[before].any():
            out[at] = _deformed(images[at], images[before], out[before])
    return out


def _steps(count: int, drawn: Sequence[int]) -> Iterator[tuple[int, int]]:
    """(slice that is labelled, its neighbour that is next), outwards from every drawn slice."""
    nearest = np.abs(np.arange(count)[:, None] - np.asarray(drawn)).argmin(axis=1)
    for place, start in enumerate(drawn):
        for step in (1, -1):
            at = start + step
            while 0 <= at < count and nearest[at] == place:
                yield at - step, at
                at += step


def _coarse(plane: Array) -> sitk.Image:
    """(Y, X) on the working grid, which keeps the slice's coordinates, in pixels; an axis that is short stays."""
    image = sitk.GetImageFromArray(np.ascontiguousarray(plane, np.float32))
    return coarser(image, tuple(max(1.0, size / _MOST_PIXELS) for size in image.GetSize()))


def _deformed(fixed: sitk.Image, moving: sitk.Image, label: LabelVolume) -> LabelVolume:
    """The label (Y, X) of the slice `moving` on the slice `fixed`."""
    move = sitk.DisplacementFieldTransform(sitk.Cast(demons_field(fixed, moving, _DEMONS), sitk.sitkVectorFloat64))
    image = sitk.GetImageFromArray(label)
    return sitk.GetArrayFromImage(sitk.Resample(image, image, move, sitk.sitkNearestNeighbor))
