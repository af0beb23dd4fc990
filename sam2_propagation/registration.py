"""The `registration` propagator: labels carried by deforming annotated images onto the others.

For each support and query: a template search for the label's neighbourhood, several affine starts refined and the
most plausible kept, then diffeomorphic demons; all without ground truth, all in mm. Views differ in the metric of the
affine and in what drives the demons, so that they err in different places. Several supports are fused per view by
votes weighted by image similarity after registration. Labels travel by linear interpolation of one-hot maps.

Several channels are joined into one by the first principal component of the support's. Un-annotated voxels cannot be
carried, so sparse labels are refused.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace

import SimpleITK as sitk

from sam2_propagation.consensus import fuse
from sam2_propagation.interface import Image, Propagation, Support
from sam2_propagation.registration_affine import Metric
from sam2_propagation.registration_carry import Carried, Pair, Source, source_of
from sam2_propagation.registration_demons import Demons
from sam2_propagation.registration_volume import Channels, RegistrationFailed, channels_of

VOTE_POWER = 4
"""Votes of supports are similarity to this power: one that matches clearly worse hardly counts."""


@dataclass(frozen=True)
class View:
    """The metric of the affine, and what drives the demons."""

    metric: Metric
    demons: Demons


VIEWS = {
    "local": View("correlation", Demons("local", smoothing=1.0)),
    "information": View("information", Demons("local", smoothing=1.0)),
    "edges": View("correlation", Demons("edges", smoothing=1.25)),
    "inverse": View("correlation", Demons("local", smoothing=1.25, forward=False)),
    "intensity": View("correlation", Demons("intensity", smoothing=1.0)),
}


class RegistrationPropagator:
    """Carries whole labels by affine and diffeomorphic registration; see the module for how.

    Views, the default ones first: `local` (demons on locally normalised intensities), `information` (the same after an
    affine by mutual information, so that a wrong place shows as divergence), `edges` (demons on locally normalised
    gradient magnitude), `inverse` (as `local`, the support being the fixed image and the field inverted), `intensity`
    (demons on histogram-matched intensities).

    Args:
        threads: how many threads SimpleITK may use; 1 where several processes work side by side.

    Example:
        >>> propagator = RegistrationPropagator(threads=1)
        >>> propagator.default_views
        ('local', 'information', 'edges')
    """

    name = "registration"
    views: tuple[str, ...] = tuple(VIEWS)
    default_views: tuple[str, ...] = ("local", "information", "edges")
    whole_set = False

    def __init__(self, threads: int = 1) -> None:
        if threads < 1:
            raise ValueError(f"threads must be 1 or more, found {threads}")
        self.threads = threads

    def fit(self, images: Iterable[Image]) -> None:
        """Nothing is learned from images: registration looks at pairs."""

    def adapt(self, supports: Sequence[Support], views: Sequence[str]) -> None:
        """Nothing is learnt from the annotated images."""

    def propagate(
        self, supports: Sequence[Support], queries: Iterable[Image], views: Sequence[str]
    ) -> Iterator[Propagation]:
        """Yield one Propagation for each query and view; what fails says why, and the others go on.

        `scores` holds similarity_before and similarity_after (mean correlation of intensities and edges around the
        label, [-1, 1]), folding (share of voxels), volume_ratio (carried / support), classes_lost and supports (how
        many were used); with several supports, of the most similar one.

        Raises:
            ValueError: no supports, or an unknown view.
        """
        if not supports:
            raise ValueError("expected at least one annotated image, found none")
        unknown = sorted(set(views) - set(self.views))
        if unknown:
            raise ValueError(f"unknown views {unknown} of registration; there are {list(self.views)}")
        return self._stream(supports, queries, views)

    def _stream(
        self, supports: Sequence[Support], queries: Iterable[Image], views: Sequence[str]
    ) -> Iterator[Propagation]:
        sources, refused = _sources(supports)
        for query in queries:
            with limited_threads(self.threads):
                propagations = _one_query(sources, refused, query, views)
            yield from propagations


def affinely_aligned(support: Support, query: Image) -> Support:
    """The support on the query's grid by the affine registration alone, intensities in [0, 1].

    Where it cannot be registered, or the affine loses its foreground, the support comes back as it is.
    """
    try:
        data, label = Pair(source_of(support), channels_of(query)).aligned()
    except RegistrationFailed:
        return support
    image = replace(support.image, data=data, spacing=query.spacing, direction=query.direction)
    return Support(image, label, support.ignore) if label.any() else support


def _sources(supports: Sequence[Support]) -> tuple[list[Source], list[str]]:
    """Usable supports, and the reasons why the others are not."""
    sources, refused = [], []
    for support in supports:
        try:
            sources.append(source_of(support))
        except RegistrationFailed as error:
            refused.append(str(error))
    return sources, refused


def _one_query(sources: list[Source], refused: list[str], query: Image, views: Sequence[str]) -> list[Propagation]:
    if not sources:
        return [_failure(query, view, refused) for view in views]
    try:
        channels = channels_of(query)
    except RegistrationFailed as error:
        return [_failure(query, view, [str(error)]) for view in views]
    pairs, reasons = _pairs(sources, channels)
    return [_one_view(pairs, reasons, query, view) for view in views]


def _pairs(sources: list[Source], query: Channels) -> tuple[list[Pair], list[str]]:
    pairs, reasons = [], []
    for source in sources:
        try:
            pairs.append(Pair(source, query))
        except RegistrationFailed as error:
            reasons.append(str(error))
    return pairs, reasons


def _one_view(pairs: list[Pair], reasons: list[str], query: Image, view: str) -> Propagation:
    good, bad, problems = _carried(pairs, VIEWS[view])
    if not good:
        scores = bad[0].scores if bad else {}
        return _failure(query, view, [*problems, *reasons], scores)
    good.sort(key=lambda carried: -carried.scores["similarity_after"])
    weights = [carried.scores["similarity_after"] ** VOTE_POWER for carried in good]
    label = fuse([carried.label for carried in good], weights).label
    return Propagation(query.case, view, label, scores={**good[0].scores, "supports": float(len(good))})


def _carried(pairs: list[Pair], view: View) -> tuple[list[Carried], list[Carried], list[str]]:
    """Labels to use, labels that must not be used, and the reasons of all that failed."""
    good, bad, problems = [], [], []
    for pair in pairs:
        try:
            carried = pair.carry(view.metric, view.demons)
        except RegistrationFailed as error:
            problems.append(str(error))
            continue
        if carried.problem is None:
            good.append(carried)
        else:
            bad.append(carried)
            problems.append(carried.problem)
    return good, bad, problems


def _failure(query: Image, view: str, reasons: list[str], scores: dict[str, float] | None = None) -> Propagation:
    more = f" (and {len(reasons) - 1} more supports failed)" if len(reasons) > 1 else ""
    return Propagation(query.case, view, None, reason=reasons[0] + more, scores=scores or {})


@contextmanager
def limited_threads(count: int) -> Iterator[None]:
    """SimpleITK's thread count is a global of the process: it is put back for whoever else uses it."""
    before = sitk.ProcessObject.GetGlobalDefaultNumberOfThreads()
    sitk.ProcessObject.SetGlobalDefaultNumberOfThreads(count)
    try:
        yield
    finally:
        sitk.ProcessObject.SetGlobalDefaultNumberOfThreads(before)
