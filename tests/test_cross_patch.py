"""Cross-patch augmentation: what moves where, and whose labels count afterwards."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from nnunet_oneshot.cross_patch import CrossPatch, Exchange, apply_exchange, cell_size, cells, draw_exchange

IGNORE = 3
FEW = settings(max_examples=20)
shapes = st.one_of(st.tuples(*[st.integers(4, 16)] * 2), st.tuples(*[st.integers(4, 16)] * 3))


def sample(shape: tuple[int, ...], value: int) -> dict[str, Tensor]:
    """An image and a label that hold `value` everywhere."""
    return {
        "image": torch.full((2, *shape), float(value)),
        "segmentation": torch.full((1, *shape), value, dtype=torch.int16),
    }


@FEW
@given(shapes, st.data())
def test_cells_are_whole_and_do_not_overlap(shape: tuple[int, ...], data: st.DataObject) -> None:
    size = tuple(data.draw(st.integers(1, extent)) for extent in shape)
    count = torch.zeros(shape, dtype=torch.int)
    for cell in cells(shape, size):
        assert count[cell].shape == size
        count[cell] += 1
    assert count.max() == 1
    assert len(cells(shape, size)) == np.prod([extent // edge for extent, edge in zip(shape, size, strict=True)])


def test_cells_are_as_large_in_mm_along_every_axis() -> None:
    assert cell_size((256, 256), (1.0, 1.0)) == (64, 64)
    assert cell_size((16, 256, 320), (8.0, 1.0, 1.0)) == (8, 64, 64)
    assert cell_size((2, 64, 64), (10.0, 0.5, 0.5)) == (1, 16, 16)


@FEW
@given(shapes, st.integers(0, 1000))
def test_only_cells_of_the_right_kind_are_drawn(shape: tuple[int, ...], seed: int) -> None:
    label = torch.from_numpy(np.random.RandomState(seed).choice([0, 0, 0, 1, IGNORE], shape))
    size = (2,) * len(shape)
    exchange = draw_exchange(label, IGNORE, size, np.random.RandomState(seed))
    if exchange is None:
        return
    for cell in exchange.cells:
        assert bool((label[cell] == IGNORE).any()) is not exchange.into_reference
        assert bool((label[cell] > 0).any())
    assert 0 < len(exchange.cells) <= (5 if exchange.into_reference else 2)


def test_a_sample_without_divergence_is_left_alone() -> None:
    label = torch.ones(8, 8, dtype=torch.int16)
    assert all(draw_exchange(label, IGNORE, (2, 2), np.random.RandomState(seed)) is None for seed in range(10))


@pytest.mark.parametrize("shape", [(8, 8), (4, 8, 8)])
@pytest.mark.parametrize("use_labels", [False, True])
def test_a_reference_cell_brings_its_label_with_it(shape: tuple[int, ...], use_labels: bool) -> None:
    divergent, reference = sample(shape, IGNORE), sample(shape, 1)
    cell = tuple(slice(0, 2) for _ in shape)
    made = apply_exchange(divergent, reference, Exchange(False, (cell,)), IGNORE, use_labels)
    inside = torch.zeros(shape, dtype=torch.bool)
    inside[cell] = True
    for name in ("image", "segmentation"):
        assert (made[name][:, inside] == 1).all()
        assert (made[name][:, ~inside] == IGNORE).all()
    assert (divergent["segmentation"] == IGNORE).all()


@pytest.mark.parametrize(("use_labels", "label"), [(False, IGNORE), (True, 2)])
def test_consensus_in_the_reference_counts_only_where_asked(use_labels: bool, label: int) -> None:
    pseudo, reference = sample((8, 8), 2), sample((8, 8), 1)
    cell = (slice(2, 4), slice(4, 6))
    made = apply_exchange(pseudo, reference, Exchange(True, (cell,)), IGNORE, use_labels)
    assert (made["segmentation"][0][cell] == label).all()
    assert (made["image"][0][cell] == 2).all()
    assert (made["segmentation"] == 1).sum() == 60
    assert (reference["segmentation"] == 1).all()


def references() -> Iterator[Mapping[str, Any]]:
    while True:
        one = sample((8, 8), 1)
        yield {"data": one["image"][None], "target": one["segmentation"][None]}


@pytest.mark.parametrize(("probability", "low", "high"), [(0.0, 0, 0), (0.5, 20, 80), (1.0, 100, 100)])
def test_it_happens_as_often_as_asked_and_repeats_from_a_seed(probability: float, low: int, high: int) -> None:
    step = CrossPatch(references(), IGNORE, (2, 2), probability, True)
    divergent = sample((8, 8), 2)
    divergent["segmentation"][0, :2, :2] = IGNORE

    def run() -> list[Tensor]:
        np.random.seed(0)
        return [step(**divergent)["segmentation"] for _ in range(100)]

    first, again = run(), run()
    assert low <= sum(not torch.equal(made, divergent["segmentation"]) for made in first) <= high
    assert all(torch.equal(one, other) for one, other in zip(first, again, strict=True))


def test_a_drawn_exchange_applies_again_to_the_same_sample() -> None:
    """Drawing is apart from applying: nothing is drawn, and no reference taken, while an exchange is applied."""
    step = CrossPatch(references(), IGNORE, (2, 2), 1.0, True)
    np.random.seed(0)
    divergent = sample((8, 8), IGNORE)
    drawn = step.get_parameters(**divergent)
    while drawn["exchange"] is None:
        drawn = step.get_parameters(**divergent)
    step.references = iter([])
    before = np.random.get_state(legacy=False)["state"]["pos"]
    first, second = (step.apply(divergent, **drawn)["segmentation"] for _ in range(2))
    assert torch.equal(first, second)
    assert not torch.equal(first, divergent["segmentation"])
    assert np.random.get_state(legacy=False)["state"]["pos"] == before
