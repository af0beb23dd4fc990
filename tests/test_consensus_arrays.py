"""Fusion of label arrays: majority, ties, weights and the consensus mask, for any labels."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from sam2_propagation.consensus import fuse

quick = settings(max_examples=50)


@st.composite
def labels(draw: st.DrawFn, most: int = 5) -> list[np.ndarray]:
    """One to `most` label arrays (Z, Y, X) of one shape, values 0 to 3."""
    shape = draw(hnp.array_shapes(min_dims=3, max_dims=3, max_side=3))
    one = hnp.arrays(np.int16, shape, elements=st.integers(0, 3))
    return draw(st.lists(one, min_size=1, max_size=most))


def vote_by_hand(votes: list[int], weights: list[float]) -> int:
    totals: dict[int, float] = {}
    for vote, weight in zip(votes, weights, strict=True):
        totals[vote] = totals.get(vote, 0.0) + weight
    return max(totals, key=lambda value: totals[value])  # dicts keep order: the first of those tied


@quick
@given(labels(), st.data())
def test_every_voxel_is_the_vote_counted_by_hand(given_labels: list[np.ndarray], data: st.DataObject) -> None:
    n = len(given_labels)
    weights = data.draw(st.none() | st.lists(st.integers(0, 4), min_size=n, max_size=n).filter(any))
    fused = fuse(given_labels, weights)
    for index in np.ndindex(given_labels[0].shape):
        votes = [int(label[index]) for label in given_labels]
        assert fused.label[index] == vote_by_hand(votes, list(map(float, weights or [1] * n)))
        assert fused.agreed[index] == (len(set(votes)) == 1)


@quick
@given(labels(most=1), st.integers(1, 4))
def test_copies_of_one_label_agree_everywhere(one: list[np.ndarray], copies: int) -> None:
    fused = fuse(one * copies)
    np.testing.assert_array_equal(fused.label, one[0])
    assert fused.agreed.all()
    assert fused.divergence == 0


@quick
@given(labels())
def test_inputs_stay_as_they_are(given_labels: list[np.ndarray]) -> None:
    before = [label.copy() for label in given_labels]
    fuse(given_labels).label[:] = 9
    for label, copy in zip(given_labels, before, strict=True):
        np.testing.assert_array_equal(label, copy)


@quick
@given(labels(), st.tuples(*[st.floats(0.3, 8)] * 3))
def test_shapes_give_a_label_that_someone_gave_and_the_same_consensus(
    given_labels: list[np.ndarray], spacing: tuple[float, float, float]
) -> None:
    fused = fuse(given_labels, spacing=spacing)
    assert (np.stack(given_labels) == fused.label).any(axis=0).all()
    np.testing.assert_array_equal(fused.agreed, fuse(given_labels).agreed)
    np.testing.assert_array_equal(fused.label[fused.agreed], given_labels[0][fused.agreed])


def disc(radius: float, shape: tuple[int, int, int] = (1, 41, 41), centre: float = 20) -> np.ndarray:
    """Label 1 in a disc on every slice."""
    y, x = np.ogrid[: shape[1], : shape[2]]
    return np.broadcast_to(np.hypot(y - 20, x - centre) <= radius, shape).astype(np.int16)


@pytest.mark.parametrize("order", [(9, 11), (11, 9)])
def test_between_two_discs_lies_the_disc_of_their_mean_radius(order: tuple[int, int]) -> None:
    fused = fuse([disc(radius) for radius in order], spacing=(1, 1, 1)).label
    wrong = (fused != disc(10)).sum()
    assert wrong < 0.25 * min((disc(radius) != disc(10)).sum() for radius in order)


def test_weights_move_the_surface() -> None:
    inner, outer = disc(9), disc(11)
    sizes = [fuse([inner, outer], w, (1, 1, 1)).label.sum() for w in ([5.0, 1.0], [1.0, 1.0], [1.0, 5.0])]
    assert sizes[0] < sizes[1] < sizes[2]


def test_a_label_that_misses_the_structure_does_not_take_it_away() -> None:
    fused = fuse([disc(10), disc(10), np.zeros((1, 41, 41), np.int16)], spacing=(1, 1, 1)).label
    np.testing.assert_array_equal(fused, disc(10))


def test_far_slices_count_less_than_near_pixels() -> None:
    """Two of three labels end a slice earlier: across thick slices that is a majority, not a shape to average."""
    whole = disc(10, (6, 41, 41))
    short = whole.copy()
    short[4:] = 0
    fused = fuse([whole, short, short], spacing=(10, 1, 1)).label
    np.testing.assert_array_equal(fused, short)


def test_divergence_is_the_share_of_voxels() -> None:
    first, second = np.zeros((1, 2, 5), np.int16), np.zeros((1, 2, 5), np.int16)
    second[0, 0, :3] = 1
    fused = fuse([first, second])
    assert fused.divergence == pytest.approx(0.3)
    assert fused.label.dtype == np.int16


@pytest.mark.parametrize(
    ("given_labels", "weights", "words"),
    [
        ([], None, "at least one"),
        ([np.zeros((1, 2, 2)), np.zeros((1, 2, 3))], None, "one shape"),
        ([np.zeros((1, 1, 1))], [1.0, 1.0], "1 non-negative"),
        ([np.zeros((1, 1, 1))] * 2, [1.0, -1.0], "non-negative"),
        ([np.zeros((1, 1, 1))] * 2, [0.0, 0.0], "not all zero"),
    ],
)
def test_what_cannot_be_fused_is_said(given_labels: list[np.ndarray], weights: list[float] | None, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        fuse(given_labels, weights)
