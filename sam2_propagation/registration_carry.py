"""One support registered to one query and its label carried over, with the figures that tell whether it worked."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import product

import numpy as np
import SimpleITK as sitk

from sam2_propagation.interface import LabelVolume, Support
from sam2_propagation.registration_affine import AffineSearch, Metric, label_box
from sam2_propagation.registration_demons import Demons, demons_field, folding_share
from sam2_propagation.registration_similarity import likeness
from sam2_propagation.registration_volume import (
    Array,
    Channels,
    Index,
    RegistrationFailed,
    centred,
    channels_of,
    coarser,
    cropped,
    joined,
    joint_weights,
    like,
    working_spacing,
)

_WORKING_VOXELS = 60_000
_MARGIN = 0.6
_CLASSES_AT_ONCE = 8
_LEAST_LIKENESS = 0.1
_MOST_FOLDING = 0.01
_VOLUME_RANGE = (0.2, 5.0)


@dataclass(frozen=True, eq=False)
class Source:
    """A support made ready once for all queries: (C, ...) channels, label image, channel weights."""

    case: str
    channels: Channels
    weights: Array
    label: sitk.Image
    classes: tuple[int, ...]

    @cached_property
    def image(self) -> sitk.Image:
        """The joined channels, float32, centred."""
        return joined(self.channels, self.weights)


def source_of(support: Support) -> Source:
    """Raises RegistrationFailed if the label has un-annotated voxels or no foreground, or the image is unusable."""
    case = support.image.case
    if support.ignore is not None and (support.label == support.ignore).any():
        raise RegistrationFailed(
            f"the label of {case} is sparse (value {support.ignore} marks un-annotated voxels): registration carries "
            "whole labels only, use another propagator or annotate the case wholly"
        )
    if not support.classes:
        raise RegistrationFailed(f"the label of {case} has no foreground")
    channels = channels_of(support.image)
    label = centred(channels.frame.enter(support.label.astype(np.int16)), channels.frame.spacing)
    return Source(case, channels, joint_weights(channels.data), label, support.classes)


@dataclass(frozen=True, eq=False)
class Carried:
    """A carried label (Z, Y, X) on the query's grid, and its figures; `problem` tells why it must not be used."""

    label: LabelVolume
    scores: dict[str, float]
    problem: str | None


class Pair:
    """One source and one query; affines are shared by the views that ask for the same metric."""

    def __init__(self, source: Source, query: Channels) -> None:
        if source.channels.frame.flat != query.frame.flat:
            raise RegistrationFailed(
                f"{source.case} has {source.channels.frame.dimension} axes and {query.case} {query.frame.dimension}, "
                "or they are flat in different planes: a label is carried between images of one kind only"
            )
        if len(source.channels.data) != len(query.data):
            raise RegistrationFailed(
                f"{source.case} has {len(source.channels.data)} channels, {query.case} has {len(query.data)}"
            )
        self.source, self.frame, self.query = source, query.frame, joined(query, source.weights)
        self._affines: dict[Metric, sitk.AffineTransform] = {}

    def carry(self, metric: Metric, demons: Demons) -> Carried:
        """Register and carry; raises RegistrationFailed when no affine can be found."""
        affine = self._affine(metric)
        region = cropped(self.query, *self._region(affine))
        work = coarser(region, working_spacing(region, _WORKING_VOXELS))
        moving = coarser(self.source.image, work.GetSpacing())
        back = affine.GetInverse()
        field = demons_field(work, sitk.Resample(moving, work, back, sitk.sitkLinear, 0.0), demons)
        total = sitk.CompositeTransform([back, sitk.DisplacementFieldTransform(_double(field))])
        draft = carried_label(self.source.label, self.source.classes, work, total)
        label = self._whole(total, like(draft, work))
        scores = self._scores(label, likeness(work, moving, _centres(work))[0], likeness(work, moving, total)[0])
        scores["folding"] = folding_share(field, draft > 0)
        return Carried(self.frame.leave(label), scores, problem_of(scores))

    def aligned(self) -> tuple[Array, LabelVolume]:
        """The source's channels (C, Z, Y, X) and label (Z, Y, X) on the query's grid, by the affine alone."""
        back, source = self._affine("correlation").GetInverse(), self.source
        channels = [centred(channel, source.channels.frame.spacing) for channel in source.channels.data]
        moved = [sitk.GetArrayFromImage(sitk.Resample(c, self.query, back, sitk.sitkLinear, 0.0)) for c in channels]
        label = carried_label(source.label, source.classes, self.query, back)
        return np.stack([self.frame.leave(channel) for channel in moved]), self.frame.leave(label)

    def _scores(self, label: LabelVolume, before: float, after: float) -> dict[str, float]:
        volume = _volume(_array(self.source.label), self.source.label)
        return {
            "similarity_before": before,
            "similarity_after": after,
            "volume_ratio": _volume(label, self.query) / volume,
            "classes_lost": float(len(set(self.source.classes) - set(np.unique(label).tolist()))),
        }

    def _affine(self, metric: Metric) -> sitk.AffineTransform:
        if metric not in self._affines:
            self._affines[metric] = self._search.best(metric)
        return self._affines[metric]

    @cached_property
    def _search(self) -> AffineSearch:
        return AffineSearch(self.source.image, self.source.label, self.query)

    def _region(self, affine: sitk.AffineTransform) -> tuple[Index, Index]:
        """(x, y, z) voxel corners in the query of a generous box around the affinely carried label."""
        corners = product(*zip(*label_box(self.source.label, 0.0), strict=True))
        points = np.asarray([self._to_query(affine, [float(v) for v in corner]) for corner in corners])
        low, high = points.min(axis=0), points.max(axis=0)
        pad = (high - low + 1) * _MARGIN / 2 + 2
        last = np.asarray(self.query.GetSize()) - 1
        least = np.minimum(last, 3)
        low = np.clip(np.floor(low - pad), 0, last - least).astype(int)
        return low, np.clip(np.ceil(high + pad), low + least, last).astype(int)

    def _to_query(self, affine: sitk.AffineTransform, corner: Sequence[float]) -> Sequence[float]:
        there = affine.TransformPoint(self.source.label.TransformContinuousIndexToPhysicalPoint(corner))
        return self.query.TransformPhysicalPointToContinuousIndex(there)

    def _whole(self, transform: sitk.Transform, draft: sitk.Image) -> LabelVolume:
        """The label on all of the query, interpolated at full resolution only where a coarse draft has foreground."""
        low, high = _part(draft, self.query)
        part = carried_label(self.source.label, self.source.classes, cropped(self.query, low, high), transform)
        whole = np.zeros(self.query.GetSize()[::-1], np.int16)
        whole[tuple(slice(a, b + 1) for a, b in zip(low[::-1], high[::-1], strict=True))] = part
        return whole


def _part(draft: sitk.Image, grid: sitk.Image) -> tuple[Index, Index]:
    """(x, y, z) voxel corners in `grid` of the draft's foreground and two draft voxels around (all of it if empty)."""
    low, high = np.zeros(draft.GetDimension(), int), np.asarray(draft.GetSize()) - 1
    if _array(draft).any():
        low, high = label_box(draft, 0.0)
    ends = [np.asarray(draft.GetOrigin()) + (low - 2) * draft.GetSpacing()]
    ends.append(np.asarray(draft.GetOrigin()) + (high + 2) * draft.GetSpacing())
    first, last = [(end - grid.GetOrigin()) / grid.GetSpacing() for end in ends]
    most = np.asarray(grid.GetSize()) - 1
    return np.clip(np.floor(first), 0, most).astype(int), np.clip(np.ceil(last), 0, most).astype(int)


def _centres(grid: sitk.Image) -> sitk.Transform:
    """Both volumes are centred at 0 mm: doing nothing puts their centres together."""
    return sitk.Transform(grid.GetDimension(), sitk.sitkIdentity)


def carried_label(
    label: sitk.Image, classes: Sequence[int], grid: sitk.Image, transform: sitk.Transform
) -> LabelVolume:
    """int16 on `grid`: the class with the largest linearly interpolated share, background's included."""
    array = _array(label)
    best = np.zeros(grid.GetSize()[::-1], np.float32)
    rest, chosen = np.ones_like(best), np.zeros(best.shape, np.int16)
    for first in range(0, len(classes), _CLASSES_AT_ONCE):
        for value, share in zip(classes[first:], _shares(array, classes[first:], label, grid, transform), strict=False):
            chosen[share > best] = value
            best = np.maximum(best, share)
            rest -= share
    chosen[rest > best] = 0
    return chosen


def _shares(
    array: LabelVolume, classes: Sequence[int], label: sitk.Image, grid: sitk.Image, transform: sitk.Transform
) -> Array:
    """(classes, ...) share of each of the next few classes; together, so that points are transformed once."""
    onehot = np.stack([array == value for value in classes[:_CLASSES_AT_ONCE]], axis=-1).astype(np.float32)
    image = sitk.GetImageFromArray(onehot, isVector=True)
    image.CopyInformation(label)
    shares = sitk.GetArrayFromImage(sitk.Resample(image, grid, transform, sitk.sitkLinear, 0.0))
    return np.moveaxis(shares.reshape(*grid.GetSize()[::-1], onehot.shape[-1]), -1, 0)


def problem_of(scores: dict[str, float]) -> str | None:
    """One sentence if a registration's figures say that its label must not be trusted, else None."""
    before, after = scores["similarity_before"], scores["similarity_after"]
    if scores["volume_ratio"] == 0:
        return "the carried label is empty"
    if after < _LEAST_LIKENESS:
        return f"similarity after registration is {after:.2f}, below {_LEAST_LIKENESS}"
    if after < before - 1e-3:
        return f"similarity after registration ({after:.2f}) is no better than before it ({before:.2f})"
    if scores["folding"] > _MOST_FOLDING:
        return f"the deformation folds at {scores['folding']:.1%} of the voxels"
    if not _VOLUME_RANGE[0] <= scores["volume_ratio"] <= _VOLUME_RANGE[1]:
        return f"the label's volume changed by a factor of {scores['volume_ratio']:.2f}"
    return None


def _array(image: sitk.Image) -> LabelVolume:
    return sitk.GetArrayFromImage(image)


def _volume(label: LabelVolume, grid: sitk.Image) -> float:
    return float((label > 0).sum()) * float(np.prod(grid.GetSpacing()))


def _double(field: sitk.Image) -> sitk.Image:
    return sitk.Cast(field, sitk.sitkVectorFloat64)
