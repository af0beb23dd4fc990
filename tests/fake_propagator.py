"""A propagator that costs nothing: deterministic, importable by workers, failing where a case's name says so."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

import numpy as np

from sam2_propagation.interface import Image, LabelVolume, Propagation, Support

FAILURE = "similarity no better than identity"


class FakePropagator:
    """Hands on the first support's label; the view `shifted` moves it by a voxel along x, or fails for `half...`."""

    views: tuple[str, ...] = ("still", "shifted", "spare")
    default_views: tuple[str, ...] = ("still", "shifted")

    def __init__(self, name: str = "fake", whole_set: bool = False) -> None:
        self.name = name
        self.whole_set = whole_set
        self.asked: list[str] = []
        self.fitted: list[str] = []
        self.adapted: list[str] = []

    def fit(self, images: Iterable[Image]) -> None:
        """Remembers which images it saw."""
        self.fitted = [image.case for image in images]

    def adapt(self, supports: Sequence[Support], views: Sequence[str]) -> None:
        """Remembers what it learnt from."""
        self.adapted = [support.image.case for support in supports]

    def propagate(
        self, supports: Sequence[Support], queries: Iterable[Image], views: Sequence[str]
    ) -> Iterator[Propagation]:
        """One label a view; none for cases called `bad...`."""
        for query in queries:
            self.asked.append(query.case)
            for view in views:
                if query.case.startswith("bad") or (query.case.startswith("half") and view == "shifted"):
                    yield Propagation(query.case, view, None, reason=FAILURE)
                else:
                    label = np.roll(without_ignore(supports[0]), view == "shifted", axis=2)
                    yield Propagation(query.case, view, label, scores={"similarity": 0.5})


def without_ignore(support: Support) -> LabelVolume:
    """The support's label with un-annotated voxels as background."""
    return np.where(support.label == support.ignore, 0, support.label).astype(np.int16)


def make_fake(name: str, options: object) -> FakePropagator:
    """Stands in for `make_propagator`; the name `fake_set` is one that must see the whole set."""
    return FakePropagator(name, whole_set=name == "fake_set")
