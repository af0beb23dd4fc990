"""The `relay` propagator: labels reach an image by way of other un-annotated images, too.

What `registration` carried to some images is carried on from there to every other one, and all that arrives is put to
the vote (a template library: Chakravarty et al., MAGeT-Brain, Human Brain Mapping 34(10), 2013; passing atlases on
through the set: Wolz et al., LEAP, NeuroImage 49(2), 2010). An image that is unlike the annotated one, or that
registration from there missed, is often like one of the others.

Nothing of this needs a label but the annotated images': candidates are drawn, each carries its label back to these, and
the ones whose label comes back best are the relays. Every image's own label is judged so, too: where the vote of all
comes back clearly worse than registration's alone, which itself comes back, relays have misled; registration's stays.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from itertools import islice
from typing import Protocol

import numpy as np
import SimpleITK as sitk
from tqdm import tqdm

from sam2_propagation.consensus import enough_views, fuse
from sam2_propagation.interface import Image, LabelVolume, Propagation, Support
from sam2_propagation.registration import VIEWS, VOTE_POWER, limited_threads
from sam2_propagation.registration_carry import Pair, Source, carried_label, source_of
from sam2_propagation.registration_volume import (
    Channels,
    RegistrationFailed,
    centred,
    channels_of,
    coarser,
    working_spacing,
)

CANDIDATES = 12
RELAYS = 6
"""The six that are judged best: on phantoms, of ten candidates, four, nine and all did less well
(benchmarks/relay.py)."""
_LEAST_TRUST = 0.5
"""Of the best candidate's: what comes back less well is no relay, and no reason not to follow the others."""
_MISLED = 0.9
"""Of how well registration's own label comes back: a vote below is not followed. On phantoms, where relays mislead
nobody, to follow only what comes back as well costs a tenth of the gain (benchmarks/relay.py)."""
_JUDGES = 3
"""Annotated images that a candidate's label is carried back to: judging must not cost more than relaying."""
_MOST_VOXELS = 8_000_000
"""Of a relay that is kept in memory; larger ones are coarsened."""
_VIEW = VIEWS["local"]
REVERSE_SCORE = "reverse_dice"
"""Name under which scores hold the Dice of a label carried back: `reverse_dice`, `reverse_dice_2`."""


@dataclass(frozen=True, eq=False)
class Vote:
    """One label (Z, Y, X) of an image and how alike the images were after registration, at most 1."""

    label: LabelVolume
    similarity: float

    @property
    def weight(self) -> float:
        """What it counts; never nothing, since it may be all that there is."""
        return max(self.similarity, 0.01) ** VOTE_POWER


class Registered(Protocol):
    """What `registration` said before."""

    def cases(self) -> Sequence[str]:
        """Every case that it was asked for, in a fixed order."""

    def image(self, case: str) -> Image:
        """The image of a case."""

    def votes(self, case: str) -> list[Vote]:
        """Its views of a case; none where registration failed."""


class RelayPropagator:
    """Carries labels on from images that `registration` labelled; one view, `relayed`.

    Args:
        registered: what registration said; it must have done the candidates (`candidates`) before `adapt`, and each
            query before `propagate`.
        threads: how many threads SimpleITK may use; 1 where several processes work side by side.
    """

    name = "relay"
    views: tuple[str, ...] = ("relayed",)
    default_views: tuple[str, ...] = ("relayed",)
    whole_set = False

    def __init__(self, registered: Registered | None = None, threads: int = 1) -> None:
        self.registered = registered
        self.threads = threads
        self._judges: tuple[Source, ...] = ()
        self._least = 0.0
        self._relays: tuple[Source, ...] | None = None

    @property
    def relays(self) -> tuple[str, ...]:
        """The cases that pass labels on, the most trusted one first; none before `adapt`."""
        return tuple(relay.case for relay in self._relays or ())

    def fit(self, images: Iterable[Image]) -> None:
        """Nothing is learned from images: registration looks at pairs."""

    def adapt(self, supports: Sequence[Support], views: Sequence[str]) -> None:
        """Choose the relays: candidates carry their labels back to annotated images, which judge them.

        Raises:
            ValueError: nothing is known of what registration said.
        """
        judged: list[tuple[float, Source]] = []
        with limited_threads(self.threads):
            self._judges = tuple(islice(usable(supports), _JUDGES))
            for case in tqdm(candidates(self._known().cases()), desc="choose relays", unit="case"):
                relay = self._candidate(case)
                if relay is not None and self._judges:
                    judged.append((max(_mean(comes_back(relay, judge)) for judge in self._judges), relay))
        judged.sort(key=lambda entry: -entry[0])
        self._least = _LEAST_TRUST * max((trust for trust, _ in judged), default=0.0)
        self._relays = tuple(relay for trust, relay in judged[:RELAYS] if trust > 0 and trust >= self._least)

    def propagate(
        self, supports: Sequence[Support], queries: Iterable[Image], views: Sequence[str]
    ) -> Iterator[Propagation]:
        """Yield one Propagation for each query: registration's views and what relays carried, by a weighted vote.

        Votes weigh the similarity of images after registration to the fourth power. `scores` holds `relays`, how many
        were counted (0 where their vote comes back clearly worse than registration's own), and `reverse_dice_<value>`,
        the Dice of each class of the label carried back to the first wholly annotated image.

        Raises:
            ValueError: an unknown view, or `adapt` has not been called.
        """
        if unknown := sorted(set(views) - set(self.views)):
            raise ValueError(f"unknown views {unknown} of relay; there are {list(self.views)}")
        if self._relays is None:
            raise ValueError("expected adapt() before propagate(), found no relays chosen")
        return self._stream(queries)

    def _stream(self, queries: Iterable[Image]) -> Iterator[Propagation]:
        for query in queries:
            with limited_threads(self.threads):
                said = self._one(query)
            # Outside: whoever takes it must not find SimpleITK's threads limited.
            yield said

    def _one(self, query: Image) -> Propagation:
        others = [relay for relay in self._relays or () if relay.case != query.case]
        votes, relayed = self._known().votes(query.case), _all_carried(others, query)
        if not votes and not enough_views(len(relayed), len(others)):
            reason = f"registration gave no label, and of {len(others)} images that pass labels on {len(relayed)} did"
            return Propagation(query.case, self.views[0], None, reason=reason)
        label = _voted([*votes, *relayed], query)
        back, used = self._back(label, query), len(relayed)
        if votes and relayed:
            alone = _voted(votes, query)
            without = self._back(alone, query)
            # One that does not come back either is no better: it says nothing that another comes back less well.
            if _mean(without) >= self._least and _mean(back) < _MISLED * _mean(without):
                label, back, used = alone, without, 0
        scores = {f"{REVERSE_SCORE}_{value}": dice for value, dice in back.items()}
        return Propagation(query.case, self.views[0], label, scores={"relays": float(used), **scores})

    def _back(self, label: LabelVolume, query: Image) -> dict[int, float]:
        """How well a query's label comes back to the first annotated image, by class."""
        source, judge = next(usable([Support(query, label)]), None), next(iter(self._judges), None)
        if judge is None:
            return {}
        return dict.fromkeys(judge.classes, 0.0) if source is None else comes_back(source, judge)

    def _candidate(self, case: str) -> Source | None:
        known = self._known()
        votes = known.votes(case)
        if not votes:
            return None
        image = known.image(case)
        label = fuse([vote.label for vote in votes], spacing=image.spacing).label
        return next(usable([Support(image, label)]), None)

    def _known(self) -> Registered:
        if self.registered is None:
            raise ValueError("expected what registration said of the set, found nothing to carry on")
        return self.registered


def candidates(cases: Sequence[str]) -> list[str]:
    """The cases that may pass labels on, the same ones each time, in the order given.

    Drawn and not every n-th: in names such as `patient007_frame01` the kinds of images take turns.
    """
    if len(cases) <= CANDIDATES:
        return list(cases)
    return [cases[int(at)] for at in sorted(np.random.default_rng(0).permutation(len(cases))[:CANDIDATES])]


def usable(supports: Iterable[Support]) -> Iterator[Source]:
    """Those that registration can start from, coarser where they are large."""
    for support in supports:
        with suppress(RegistrationFailed):
            yield _small(source_of(support))


def _all_carried(relays: Sequence[Source], query: Image) -> list[Vote]:
    try:
        channels = channels_of(query)
    except RegistrationFailed:
        return []
    found = (carried_on(relay, channels) for relay in relays)
    return [vote for vote in found if vote is not None]


def carried_on(relay: Source, query: Channels) -> Vote | None:
    """A relay's label on the query's grid; None where the registration failed or looks wrong."""
    try:
        carried = Pair(relay, query).carry(_VIEW.metric, _VIEW.demons)
    except RegistrationFailed:
        return None
    return None if carried.problem else Vote(carried.label, carried.scores["similarity_after"])


def comes_back(relay: Source, judge: Source) -> dict[int, float]:
    """Dice of each of the judge's classes, of the relay's label carried to it; 0 where it cannot be carried."""
    vote = carried_on(relay, judge.channels)
    if vote is None:
        return dict.fromkeys(judge.classes, 0.0)
    truth = judge.channels.frame.leave(sitk.GetArrayFromImage(judge.label))
    return {value: _dice(vote.label == value, truth == value) for value in judge.classes}


def _voted(votes: Sequence[Vote], query: Image) -> LabelVolume:
    """By weight; where two are as deep in what they say, the more alike one is believed."""
    ordered = sorted(votes, key=lambda vote: -vote.weight)
    return fuse([vote.label for vote in ordered], [vote.weight for vote in ordered], query.spacing).label


def _mean(by_class: Mapping[int, float]) -> float:
    return float(np.mean(list(by_class.values()))) if by_class else 0.0


def _dice(first: np.ndarray, second: np.ndarray) -> float:
    return 2 * float((first & second).sum()) / max(float(first.sum() + second.sum()), 1.0)


def _small(source: Source) -> Source:
    """The source on a coarser grid where it has more voxels than are kept in memory; as it is where that loses a class.

    A class that is lost would be voted away by every relay.
    """
    image = source.image
    if image.GetNumberOfPixels() <= _MOST_VOXELS:
        return source
    spacing = working_spacing(image, _MOST_VOXELS)
    own = source.channels.frame.spacing
    data = np.stack([sitk.GetArrayFromImage(coarser(centred(c, own), spacing)) for c in source.channels.data])
    grid = coarser(image, spacing)
    nowhere = sitk.Transform(image.GetDimension(), sitk.sitkIdentity)
    carried = carried_label(source.label, source.classes, grid, nowhere)
    if not set(source.classes) <= set(np.unique(carried).tolist()):
        return source
    label = centred(carried, grid.GetSpacing()[::-1])
    frame = replace(source.channels.frame, spacing=tuple(grid.GetSpacing()[::-1]))
    channels = replace(source.channels, data=data, frame=frame)
    return replace(source, channels=channels, label=label)
