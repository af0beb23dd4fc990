"""Correct one slice, carry it through the volume: SAM2's `slice` mode over embeddings that are kept.

The first correction of a case encodes its slices; every further one of that case only tracks.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from nnunet_oneshot.errors import OneShotError
from sam2_propagation.checkpoints import check_device, load_checkpoint, prepare_checkpoint
from sam2_propagation.embeddings import Encoder
from sam2_propagation.intensities import ImageSlices, scale
from sam2_propagation.interface import Image, LabelVolume
from sam2_propagation.sam2_labels import finish
from sam2_propagation.sam2_memory import Tools, Viewed, ViewedSupport
from sam2_propagation.sam2_modes import through_volume
from sam2_propagation.sam2_settings import Sam2Settings
from sam2_propagation.tracker import Tracker
from sam2_propagation.views import plane_across, present

BATCH = 8
KEPT = 2
"""Volumes whose embeddings are kept; a third one drops the oldest."""


@dataclass(frozen=True)
class Correction:
    """Where a label was corrected.

    Attributes:
        axis: of (Z, Y, X), across the corrected slices.
        indices: the corrected slices along it.
        classes: label values that were drawn or erased there.
    """

    axis: int
    indices: tuple[int, ...]
    classes: tuple[int, ...]


@dataclass(frozen=True, eq=False)
class Carried:
    """What a correction became.

    Attributes:
        label: int16 (Z, Y, X).
        correction: its slices stay as they were drawn; its classes were carried, all others are as they were.
    """

    label: LabelVolume
    correction: Correction


class Carrier:
    """A SAM2 model with the embeddings of the last volumes; one correction at a time."""

    def __init__(self, checkpoint: str = "builtin", device: str = "cpu") -> None:
        check_device(device)
        prepare_checkpoint(checkpoint, None)
        self._checkpoint, self._device = checkpoint, device
        self._settings = Sam2Settings(mode="slice")
        self._lock = threading.Lock()
        self._model: tuple[Tools, Encoder, int] | None = None
        self._viewed: OrderedDict[tuple[str, int], Viewed] = OrderedDict()

    def carry(
        self,
        image: Image,
        before: LabelVolume,
        edited: LabelVolume,
        kept: Correction | None = None,
        reach: int | None = None,
    ) -> Carried:
        """Carry the slices that were edited to the others.

        Every class on those slices is tracked, so that they compete for voxels, but only the edited ones change.

        Args:
            image: the case's image, a volume.
            before: int16 (Z, Y, X), the label that was edited.
            edited: the same with one or more slices of one plane changed.
            kept: an earlier correction, which is carried along with the new one if it is of the same plane.
            reach: how many slices from the nearest corrected one labels may change; None for all.

        Raises:
            OneShotError: a 2D image, no change, or edited slices without foreground of the edited classes.
        """
        if min(image.shape) == 1:
            raise OneShotError(f"expected a volume to carry a slice through, found the 2D image {image.case}; save it")
        correction = find_correction(before, edited, kept)
        if not np.isin(np.take(edited, correction.indices, correction.axis), correction.classes).any():
            raise OneShotError(
                "expected something drawn on a corrected slice to carry, found all of it erased; correct a slice that "
                "shows the structure"
            )
        with self._lock:
            carried = self._track(image, edited, correction.axis, correction.indices)
        return Carried(_merged(edited, carried, correction, reach), correction)

    def _track(self, image: Image, label: LabelVolume, axis: int, indices: Sequence[int]) -> LabelVolume:
        tools, encoder, size = self._ready()
        viewed = self._view(encoder, size, image, axis)
        annotated = np.zeros(label.shape, bool)
        np.moveaxis(annotated, axis, 0)[list(indices)] = True
        spoken = np.where(annotated, label, 0).astype(np.int16)
        own = ViewedSupport(viewed, viewed.shown.forward(spoken), viewed.shown.forward(annotated))
        classes = [int(v) for v in np.unique(spoken) if v]
        votes = through_volume(tools, own, classes)
        return viewed.shown.inverse(finish(votes, viewed.size, self._settings).label)

    def _view(self, encoder: Encoder, size: int, image: Image, axis: int) -> Viewed:
        key = (image.case, axis)
        if key not in self._viewed:
            shown = present(image, plane_across(image, axis))
            seen = shown.forward(scale(image, self._settings.intensities))
            frames = encoder.encode(ImageSlices(seen, size))
            self._viewed[key] = Viewed(image.case, frames, (seen.shape[-2], seen.shape[-1]), shown)
        self._viewed.move_to_end(key)
        while len(self._viewed) > KEPT:
            self._viewed.popitem(last=False)
        return self._viewed[key]

    def _ready(self) -> tuple[Tools, Encoder, int]:
        if self._model is None:
            loaded = load_checkpoint(self._checkpoint, None, self._device, None)
            tools = Tools(Tracker(loaded.model, self._settings.fill_hole_area), self._settings, BATCH)
            self._model = tools, Encoder(loaded.model, BATCH), loaded.image_size
        return self._model


def find_correction(before: LabelVolume, edited: LabelVolume, kept: Correction | None = None) -> Correction:
    """The plane, slices and classes that were edited; the plane is the one of the three on which fewest slices changed.

    Raises:
        OneShotError: nothing was changed.
    """
    changed = before != edited
    if not changed.any():
        if kept is not None:
            return kept
        raise OneShotError("expected a slice that was changed, found none; correct one with the brush first")
    axes = [np.flatnonzero(changed.any(tuple(a for a in range(3) if a != axis))) for axis in range(3)]
    axis = int(np.argmin([len(indices) for indices in axes]))
    earlier = kept if kept is not None and kept.axis == axis else Correction(axis, (), ())
    classes = {int(v) for v in np.union1d(before[changed], edited[changed]) if v}
    indices = {int(i) for i in axes[axis]}
    return Correction(axis, tuple(sorted({*earlier.indices, *indices})), tuple(sorted({*earlier.classes, *classes})))


def _merged(edited: LabelVolume, carried: LabelVolume, correction: Correction, reach: int | None) -> LabelVolume:
    """The corrected classes within reach as carried; other classes, other slices and what was drawn as they were."""
    axis, classes = correction.axis, correction.classes
    distance = np.abs(np.arange(edited.shape[axis])[:, None] - np.array(correction.indices)).min(axis=1)
    within = (distance > 0) & (distance <= (len(distance) if reach is None else reach))
    merged, source = np.moveaxis(edited.copy(), axis, 0), np.moveaxis(carried, axis, 0)
    for index in np.flatnonzero(within):
        old, new = merged[index], source[index]
        merged[index] = np.where(np.isin(new, classes), new, np.where(np.isin(old, classes), 0, old))
    return np.ascontiguousarray(np.moveaxis(merged, 0, axis))
