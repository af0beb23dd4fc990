"""The `correspondence` propagator: labels carried by what a network has learnt, without labels, to be alike (OneSeg).

`fit` trains a small network on the data set's own images to rebuild slices from others (`correspondence_training`).
Then a label is carried by the same attention. A volume with annotated slices of its own is labelled slice by slice out
of them (`correspondence_chain`); any other one from the matching slices of annotated cases (`correspondence_cross`),
whose labels are first completed that way where they are sparse.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from torch import Tensor

from sam2_propagation.checkpoints import cache_folder, check_device
from sam2_propagation.correspondence_chain import Carried, Window, chain, survival
from sam2_propagation.correspondence_cross import Known, across, settled
from sam2_propagation.correspondence_learning import Learned, learn
from sam2_propagation.correspondence_stack import Stack, annotated_slices, plane_of_label, spoken, stack_of
from sam2_propagation.correspondence_training import Recipe
from sam2_propagation.errors import PropagationError
from sam2_propagation.interface import BoolVolume, Image, LabelVolume, Propagation, Support
from sam2_propagation.views import FLAT, can_show, natural_plane, present

_BATCH = 8
_DRIFTED = 0.5
_TRUSTED = 0.5
_SUPPORTS = 5


class CorrespondencePropagator:
    """Carries labels by self-learned correspondence; `fit` must have seen the images first.

    Views: `joint` (fine and coarse features together), `coarse` (coarse ones alone, which look twice as far), `checked`
    (`joint`, but a cell that has drifted, or whose label does not lead back to where it came from, says its second
    choice, so that drift shows as divergence).

    Args:
        device: "cpu", "cuda", "mps".
        recipe: how the network is trained.
        window: of the attention on the fine grid.
        cache: folder that keeps trained networks; by default that of downloaded checkpoints.
    """

    name = "correspondence"
    views: tuple[str, ...] = ("joint", "coarse", "checked")
    default_views: tuple[str, ...] = views
    whole_set = False

    def __init__(
        self,
        device: str = "cpu",
        recipe: Recipe | None = None,
        window: Window | None = None,
        cache: Path | None = None,
    ) -> None:
        self.recipe = recipe or Recipe()
        self.window = window or Window()
        self._device = str(check_device(device))
        self._cache = cache
        self._learned: Learned | None = None
        self._known: dict[tuple[object, ...], Known] = {}

    def fit(self, images: Iterable[Image]) -> None:
        """Train on images without labels: minutes on two cores; a stopped training goes on where it was.

        Raises:
            PropagationError: no images, or images that differ in their number of channels.
        """
        self._learned = learn(images, self.recipe, torch.device(self._device), cache_folder(self._cache))
        self._known.clear()

    def adapt(self, supports: Sequence[Support], views: Sequence[str]) -> None:
        """Nothing is learnt from labels."""

    def propagate(
        self, supports: Sequence[Support], queries: Iterable[Image], views: Sequence[str]
    ) -> Iterator[Propagation]:
        """Yield one Propagation for each query and view, in the order given.

        `scores` holds cycle (how much of the foreground leads back to annotated slices, [0, 1]), drift (share of the
        foreground that is not to be believed) and confidence.

        Args:
            supports: annotated images; of sparse labels whole slices count.
            queries: one that is also a support with a sparse label is completed out of its own slices, and in classes
                that are on none of these out of the other supports.
            views: names out of `views`.

        Raises:
            PropagationError: no support with foreground on a whole slice.
            ValueError: an unknown view, or `fit` has not been called.
        """
        unknown = sorted(set(views) - set(self.views))
        if unknown:
            raise ValueError(f"unknown views {unknown} of correspondence; there are {list(self.views)}")
        usable = _usable(supports)
        own = {s.image.case: s for s in usable if s.is_sparse}
        for query in queries:
            yield from self._one(usable, own.get(query.case), query, views)

    @torch.inference_mode()
    def survival(self, image: Image) -> npt.NDArray[np.float32]:
        """What a label is predicted to keep from each slice to the next, without any label: (N - 1,) in [0, 1].

        Slices are those of the image's natural plane, in the order of the array.

        Raises:
            PropagationError: another number of channels than the images that were learnt from.
            ValueError: `fit` has not been called.
        """
        stack = self._stack(image, natural_plane(image))
        found = survival(self._maps(stack).joint, stack.content(), self.window).clamp(min=0).numpy()
        return np.ascontiguousarray(found[::-1] if stack.shown.flips[0] else found)

    @torch.inference_mode()
    def _one(
        self, supports: Sequence[Support], own: Support | None, query: Image, views: Sequence[str]
    ) -> list[Propagation]:
        plane = _common_plane(supports)
        shown = [s for s in supports if can_show(s.image, "identity", plane)]
        every = tuple(sorted({c for s in shown for c in s.classes}))
        if own is not None:
            return self._completed_by_others(own, shown, every, views, plane)
        if not can_show(query, "identity", plane):
            return [Propagation(query.case, view, None, reason=FLAT) for view in views]
        found = self._from_others(shown, query, every, plane)
        return [_propagation(found, query, every, view, None) for view in views]

    def _completed_by_others(
        self, own: Support, supports: Sequence[Support], every: tuple[int, ...], views: Sequence[str], plane: str
    ) -> list[Propagation]:
        """Its own slices carried through a volume, and from others the classes that these do not show.

        Left out, all views would agree that there is nothing of them.
        """
        found = self._through(own)
        results = [_propagation(found, own.image, own.classes, view, own) for view in views]
        missing = sorted(set(every) - set(own.classes))
        lenders = [s for s in supports if s is not own and set(missing) & set(s.classes)]
        if not lenders or not can_show(own.image, "identity", plane):
            return results
        lent = self._from_others(lenders, own.image, every, plane)
        others = [_propagation(lent, own.image, every, view, None) for view in views]
        return [_completed_by(own, mine, other, missing) for mine, other in zip(results, others, strict=True)]

    def _through(self, own: Support) -> _Found:
        stack = self._stack(own.image, plane_of_label(own))
        anchors = _anchors(own, stack)
        maps = self._maps(stack)
        halves = {i: F.avg_pool2d(a, 2) for i, a in anchors.items()}
        near = replace(self.window, margin=self.window.margin // 2)
        return _Found(stack, chain(maps.joint, anchors, self.window), _doubled(chain(maps.coarse, halves, near)))

    def _from_others(self, supports: Sequence[Support], query: Image, classes: tuple[int, ...], plane: str) -> _Found:
        stack = self._stack(query, plane)
        maps = self._maps(stack)
        chosen = _evenly(supports, _SUPPORTS)
        carried = across(maps.coarse, [self._knowledge(s, classes, plane) for s in chosen])
        wide = _doubled(carried)
        joint = Carried(settled(maps.joint, wide.shares, replace(self.window, radius=3)), wide.drift, wide.precision)
        return _Found(stack, joint, wide)

    def _knowledge(self, support: Support, classes: tuple[int, ...], plane: str) -> Known:
        """A support's coarse features and labels, completed where it is sparse; made once."""
        key = (support.image.case, plane, classes, _digest(support.image.data), _digest(support.label))
        if key not in self._known:
            label, trusted = self._completed(support)
            stack = self._stack(support.image, plane)
            cells = [F.avg_pool2d(stack.enter(label, i, classes), 2) for i in range(len(stack))]
            # Completed across another plane, little may be trusted of each slice; then all of them have to do.
            share = stack.shown.forward(trusted).mean(axis=(1, 2))
            usable = np.flatnonzero(share >= min(_TRUSTED, share.max()))
            if len(self._known) >= 2 * _SUPPORTS:
                self._known.clear()
            self._known[key] = Known(self._maps(stack).coarse, torch.stack(cells), usable)
        return self._known[key]

    def _completed(self, support: Support) -> tuple[LabelVolume, BoolVolume]:
        """A label of every voxel, and which of it may be copied: (Z, Y, X) both."""
        if spoken(support).all():
            return support.label, np.ones(support.label.shape, bool)
        found = self._through(support)
        names = np.array([0, *support.classes], np.int16)
        slices = [names[found.stack.leave(shares).argmax(dim=0).numpy()] for shares in found.joint.shares]
        trusted = (found.joint.precision >= _TRUSTED).numpy()[:, None, None]
        shown = found.stack.shown
        label = np.where(spoken(support), support.label, shown.inverse(np.stack(slices)))
        return label.astype(np.int16), shown.inverse(np.broadcast_to(trusted, (len(slices), *found.stack.size)))

    def _stack(self, image: Image, plane: str) -> Stack:
        if self._learned is None:
            raise ValueError("expected fit() before propagate(), found a network that has learnt nothing")
        if len(image.data) != self._learned.channels:
            raise PropagationError(
                f"expected {self._learned.channels} channels in {image.case} as in the images that were learnt from, "
                f"found {len(image.data)}; give all images the same channels"
            )
        return stack_of(image, self._learned.pitch, natural=plane)

    def _maps(self, stack: Stack) -> _Maps:
        assert self._learned is not None
        network = self._learned.network.to(self._device)
        joint, coarse = [], []
        for piece in stack.slices.split(_BATCH):
            features = network(piece.to(self._device))
            both = torch.cat([features.fine, F.normalize(_twice(features.coarse), dim=1)], dim=1) / 2**0.5
            # Half precision halves what a long stack takes; matches hardly change.
            joint.append(both.half().cpu())
            coarse.append(features.coarse.half().cpu())
        return _Maps(torch.cat(joint), torch.cat(coarse))


@dataclass(frozen=True, eq=False)
class _Maps:
    """Features of all slices, float16: joint (N, 64, H, W) on the fine grid, coarse (N, 32, H / 2, W / 2)."""

    joint: Tensor
    coarse: Tensor


@dataclass(frozen=True, eq=False)
class _Found:
    """What attention says of one query, both on the fine grid."""

    stack: Stack
    joint: Carried
    coarse: Carried


def _usable(supports: Sequence[Support]) -> list[Support]:
    """Supports with foreground on a whole slice; PropagationError where there are none."""
    if not supports:
        raise PropagationError("expected at least one annotated case, found none; annotate one")
    kept, reason = [], ""
    for support in supports:
        try:
            plane = plane_of_label(support)
        except PropagationError as error:
            reason = str(error)
            continue
        shown = present(support.image, "identity", plane)
        seen = shown.forward(_silenced(support))[annotated_slices(support, shown)]
        if seen.any():
            kept.append(support)
        else:
            reason = (
                f"expected foreground on the annotated slices of {support.image.case}, found none; annotate a slice "
                "that shows the structures"
            )
    if not kept:
        raise PropagationError(reason)
    return kept


def _common_plane(supports: Sequence[Support]) -> str:
    """The plane that all are sliced in: the first volume's natural one, if there is a volume."""
    volumes = [s.image for s in supports if s.image.shape[0] > 1]
    return natural_plane(volumes[0] if volumes else supports[0].image)


def _anchors(own: Support, stack: Stack) -> dict[int, Tensor]:
    label = _silenced(own)
    return {int(i): stack.enter(label, int(i), own.classes) for i in annotated_slices(own, stack.shown)}


def _silenced(support: Support) -> LabelVolume:
    """The label with background where it is silent."""
    return np.where(spoken(support), support.label, 0).astype(np.int16)


def _digest(data: npt.NDArray[np.generic]) -> int:
    return zlib.crc32(np.ascontiguousarray(data).tobytes())


def _completed_by(own: Support, mine: Propagation, other: Propagation, classes: Sequence[int]) -> Propagation:
    """A label with the classes given where it says background and another label says one of them."""
    if mine.label is None or other.label is None:
        return mine
    there = np.isin(other.label, classes) & (mine.label == 0) & ~spoken(own)
    confidence = mine.confidence
    if confidence is not None and other.confidence is not None:
        confidence = np.where(there, other.confidence, confidence)
    return replace(mine, label=np.where(there, other.label, mine.label).astype(np.int16), confidence=confidence)


def _evenly(supports: Sequence[Support], most: int) -> list[Support]:
    at = np.linspace(0, len(supports) - 1, min(most, len(supports))).round().astype(int)
    return [supports[i] for i in at]


def _twice(maps: Tensor) -> Tensor:
    return F.interpolate(maps, scale_factor=2, mode="bilinear")


def _doubled(carried: Carried) -> Carried:
    return Carried(_twice(carried.shares), _twice(carried.drift[:, None])[:, 0], carried.precision)


def _propagation(found: _Found, query: Image, classes: tuple[int, ...], view: str, own: Support | None) -> Propagation:
    carried, stack = found.coarse if view == "coarse" else found.joint, found.stack
    names = np.array([0, *classes], np.int16)
    labels, certain, foreground, drifted = [], [], 0, 0
    for shares, drift in zip(carried.shares, carried.drift, strict=True):
        best, order = stack.leave(shares).topk(2, dim=0)
        wrong = stack.leave(drift) > _DRIFTED
        first = names[order[0].numpy()]
        foreground, drifted = foreground + int((first > 0).sum()), drifted + int((first > 0)[wrong.numpy()].sum())
        labels.append(names[torch.where(wrong, order[1], order[0]).numpy()] if view == "checked" else first)
        certain.append((best[0].clamp(0, 1) * ~wrong).numpy())
    label, confidence = stack.shown.inverse(np.stack(labels)), stack.shown.inverse(np.stack(certain))
    if own is not None:
        said = spoken(own)
        label, confidence = np.where(said, own.label, label), np.where(said, 1, confidence)
    if not (label > 0).any():
        return Propagation(query.case, view, None, reason="no structure of the annotated images was found in it")
    scores = {"cycle": float(carried.precision.mean()), "drift": drifted / max(foreground, 1)}
    scores["confidence"] = float(confidence[label > 0].mean())
    return Propagation(query.case, view, label.astype(np.int16), confidence.astype(np.float32), scores=scores)
