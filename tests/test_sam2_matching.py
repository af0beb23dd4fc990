"""Support slices are found where they are: by position, along a line, or by likeness."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sam2_propagation.matching import matching_line, rank_slices, similarity
from sam2_propagation.sam2_settings import MATCHINGS


def _anatomy(at: np.ndarray) -> np.ndarray:
    """Descriptors that change smoothly along a body; `at` is where each slice lies in it."""
    waves = np.random.default_rng(0).uniform(1, 9, 24)
    return np.sin(at[:, None] * waves + waves).astype(np.float32)


@settings(max_examples=25)
@given(queries=st.integers(5, 40), slices=st.integers(5, 40))
def test_position_matches_ends_to_ends(queries: int, slices: int) -> None:
    everything = np.arange(slices)
    found = rank_slices(np.zeros((queries, 2)), [np.zeros((slices, 2))], [everything], "position")
    assert all(len(ranking) == slices for ranking in found)
    first = [ranking[0][1] for ranking in found]
    assert first == sorted(first)
    assert first[0] <= slices / queries
    assert first[-1] >= slices - 1 - slices / queries


@pytest.mark.parametrize(("begin", "end"), [(0.0, 1.0), (0.2, 0.9), (-0.2, 0.8)])
def test_a_line_finds_a_shifted_and_stretched_stack(begin: float, end: float) -> None:
    support, query = np.linspace(0, 1, 30), np.linspace(begin, end, 25)
    line = matching_line(similarity(_anatomy(query), _anatomy(support)))
    expected = query * 29
    inside = (expected >= 0) & (expected <= 29)
    assert np.abs(line - expected)[inside].max() < 2


def test_similarity_finds_equal_slices_in_any_order() -> None:
    support = _anatomy(np.linspace(0, 1, 12))
    order = np.random.default_rng(1).permutation(12)
    found = rank_slices(support[order], [support], [np.arange(12)], "similarity")
    assert [ranking[0][1] for ranking in found] == list(order)


def test_near_takes_the_most_alike_of_slices_at_about_the_same_place() -> None:
    support = _anatomy(np.linspace(0, 1, 20))
    query = support.copy()
    query[10] = support[12]  # two slices on: a tenth of the stack
    query[4] = support[15]  # too far off to be taken for it
    found = rank_slices(query, [support], [np.arange(20)], "near")
    assert found[10][0] == (0, 12)
    assert abs(found[4][0][1] - 4) <= 2
    assert [ranking[0][1] for i, ranking in enumerate(found) if i not in (4, 10)] == [
        i for i in range(20) if i not in (4, 10)
    ]
    far = [i for _, i in found[4] if abs(i - 4) > 2]
    assert [i for _, i in found[4][-len(far) :]] == sorted(far, key=lambda i: abs(i - 4)), "then by distance"


@pytest.mark.parametrize("slices", [1, 2, 4])
def test_near_finds_a_slice_in_stacks_of_few(slices: int) -> None:
    support, query = _anatomy(np.linspace(0, 1, slices)), _anatomy(np.linspace(0, 1, 9))
    near, position = (
        [ranking[0] for ranking in rank_slices(query, [support], [np.arange(slices)], how)]
        for how in ("near", "position")
    )
    assert near == position


def test_only_usable_slices_of_every_support_are_ranked() -> None:
    supports = [_anatomy(np.linspace(0, 1, 8)), _anatomy(np.linspace(0, 1, 5))]
    usable = [np.array([2, 3]), np.array([4])]
    for how in MATCHINGS:
        found = rank_slices(_anatomy(np.linspace(0, 1, 6)), supports, usable, how)
        assert all(set(ranking) == {(0, 2), (0, 3), (1, 4)} for ranking in found)


def test_equal_matches_go_to_the_first_support() -> None:
    one = _anatomy(np.linspace(0, 1, 4))
    found = rank_slices(one, [one, one], [np.arange(4)] * 2, "position")
    assert [ranking[0] for ranking in found] == [(0, i) for i in range(4)]
