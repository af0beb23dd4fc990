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
"""Side of the working grid: what SAM2 sees is no finer, and the time must not grow with the scanner's matrix."""


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
    images = [_picture(plane) for plane in data]
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


def _picture(plane: Array) -> sitk.Image:
    return sitk.GetImageFromArray(np.ascontiguousarray(plane, np.float32))


def _deformed(fixed: sitk.Image, moving: sitk.Image, label: LabelVolume) -> LabelVolume:
    spacing = (max(1.0, max(fixed.GetSize()) / _MOST_PIXELS),) * 2
    field = demons_field(coarser(fixed, spacing), coarser(moving, spacing), _DEMONS)
    move = sitk.DisplacementFieldTransform(sitk.Cast(field, sitk.sitkVectorFloat64))
    return sitk.GetArrayFromImage(sitk.Resample(sitk.GetImageFromArray(label), fixed, move, sitk.sitkNearestNeighbor))
