"""Annotated slices carried through a volume by registering neighbouring slices."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sam2_propagation.registration_slices import carried_through


def slanted(slices: int, size: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """A bright disk that moves and grows from slice to slice in noise, and its label."""
    z, y, x = np.meshgrid(np.arange(slices), np.arange(size), np.arange(size), indexing="ij")
    unit = size / 40
    radius = (7 + 0.3 * z) * unit
    inside = (y - (14 + 1.2 * z) * unit) ** 2 + (x - (16 + 0.6 * z) * unit) ** 2 < radius**2
    noise = np.random.default_rng(seed).normal(0, 0.02, inside.shape)
    return np.clip(0.3 + 0.5 * inside + noise, 0, 1).astype(np.float32), (2 * inside).astype(np.int16)


def dice(one: np.ndarray, other: np.ndarray) -> float:
    return 2 * float(((one > 0) & (other > 0)).sum()) / float((one > 0).sum() + (other > 0).sum())


@pytest.mark.parametrize("drawn", [0, 4, 9])
def test_a_slice_is_carried_to_both_ends(drawn: int) -> None:
    data, label = slanted(10, 40)
    found = carried_through(data, label, [drawn])
    assert found.dtype == np.int16
    assert set(np.unique(found)) == {0, 2}
    for at in (0, 9):
        assert dice(found[at], label[at]) > 0.85
        assert dice(found[at], label[at]) >= dice(label[drawn], label[at])


def test_a_large_slice_is_registered_on_a_coarser_grid_and_labelled_on_its_own() -> None:
    data, label = slanted(6, 320)
    found = carried_through(data, label, [0])
    assert found.shape == label.shape
    assert dice(found[5], label[5]) > 0.9


def test_a_slice_across_thick_slices_keeps_its_few_rows() -> None:
    """Ten rows, 256 columns: only the long axis may be registered on a coarser grid."""
    data, label = np.full((4, 10, 256), 0.3, np.float32), np.zeros((4, 10, 256), np.int16)
    label[:, 3:8] = 1
    data += np.where(label > 0, 0.4, 0) + np.random.default_rng(0).normal(0, 0.02, data.shape)
    assert dice(carried_through(data, label, [0])[3], label[3]) > 0.95


@settings(max_examples=6)
@given(drawn=st.sets(st.integers(0, 4), min_size=2, max_size=3), seed=st.integers(0, 99))
def test_drawn_slices_stay_and_others_follow_the_nearest(drawn: set[int], seed: int) -> None:
    """What is on slices that nobody drew is never looked at; a slice depends on its nearest drawn one alone."""
    data, label = slanted(5, 24, seed)
    silent = label.copy()
    silent[[at for at in range(5) if at not in drawn]] = 99
    found = carried_through(data, silent, sorted(drawn))
    np.testing.assert_array_equal(found[sorted(drawn)], label[sorted(drawn)])
    alone = {one: carried_through(data, silent, [one]) for one in sorted(drawn)}
    for at in range(5):
        np.testing.assert_array_equal(found[at], alone[min(alone, key=lambda one: abs(one - at))][at])


def test_an_empty_slice_carries_nothing_and_none_at_all_is_refused() -> None:
    data, label = slanted(4, 24)
    assert not carried_through(data, np.zeros_like(label), [1]).any()
    with pytest.raises(ValueError, match="at least one"):
        carried_through(data, label, [])
