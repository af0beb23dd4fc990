"""Adaptation learns from the annotated case alone, and the same every time."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sam2_tiny import balls, tiny_model

from sam2_propagation.adaptation import Example, adapt, apply_warp, draw_batch, draw_warp, example, usable_slices
from sam2_propagation.errors import PropagationError


def _model(**options: Any) -> Any:
    return tiny_model(scores=False, multimask=False, **options)


@pytest.fixture(scope="module")
def one() -> Example:
    data, label = balls((5, 40, 48))
    return example((data / data.max())[None], label, range(5), 64)


@pytest.mark.slow
def test_the_loss_falls_on_the_annotated_case(one: Example) -> None:
    losses: list[float] = []
    model = _model()
    adapt(model, [one], 40, report=lambda _, loss: losses.append(loss))
    assert np.mean(losses[-10:]) < 0.8 * np.mean(losses[:5])
    assert not model.training


def test_it_is_the_same_every_time(one: Example) -> None:
    states = []
    for seed in (1, 1, 2):
        model = _model()
        adapt(model, [one], 2, seed)
        states.append(torch.cat([p.detach().flatten() for p in model.parameters()]))
    assert torch.equal(states[0], states[1])
    assert not torch.equal(states[0], states[2])


@settings(max_examples=20)
@given(seed=st.integers(0, 2**20), strength=st.floats(0, 1))
def test_image_and_label_are_warped_alike(seed: int, strength: float) -> None:
    label = torch.zeros(2, 64, 64, dtype=torch.long)
    label[:, 20:44, 16:40] = 1
    warp = draw_warp(np.random.default_rng(seed), 2, strength)
    images, labels = apply_warp(label.float() * 0.8 + 0.1, label, warp)
    assert set(labels.unique().tolist()) <= {0, 1}
    assert 0 <= float(images.min()) <= float(images.max()) <= 1
    if (labels == 1).sum() > 200:
        inside, outside = images[labels == 1].mean(), images[labels == 0].mean()
        assert inside > outside


def test_a_warp_of_no_strength_changes_nothing(one: Example) -> None:
    images, labels = apply_warp(one.images, one.labels, draw_warp(np.random.default_rng(0), 5, 0.0))
    torch.testing.assert_close(images, one.images, atol=1e-4, rtol=0)
    assert torch.equal(labels, one.labels)


def _objects_apart() -> Example:
    """Nine slices of four classes, each on some of them alone, one at the edge where a warp may move it out."""
    labels = torch.zeros(9, 64, 64, dtype=torch.long)
    labels[:4, 10:30, 10:30] = 1
    labels[4, 40:45, 40:45] = 2
    labels[5:, 30:60, 5:25] = 3
    labels[3:6, 28:36, 62:] = 4
    return Example(labels / 4, labels)


def test_every_memory_and_every_target_of_a_batch_shows_the_object_that_is_asked_for() -> None:
    usable = usable_slices(_model(), [_objects_apart()])
    sizes = set()
    for seed in range(60):
        batch = draw_batch(usable, np.random.default_rng(seed), torch.device("cpu"))
        assert (batch.true_memory_mask.sum((2, 3)) > 0).all(), seed
        assert (batch.memory_mask.sum((2, 3)) > 0).all(), seed
        assert (batch.target.sum((1, 2)) > 0).all(), seed
        sizes.add(batch.memory_mask.shape[1])
    assert sizes == {1, 2, 3}


def test_half_of_the_batches_are_seen_through_the_window() -> None:
    whole = _objects_apart()
    bright = replace(whole, window=Example(torch.ones_like(whole.images), whole.labels))
    dark = replace(whole, images=torch.zeros_like(whole.images), window=bright.window)
    usable = usable_slices(_model(), [dark])
    levels = [draw_batch(usable, np.random.default_rng(i), torch.device("cpu")).images.mean() for i in range(60)]
    assert 0.3 < np.mean([float(level > 0.2) for level in levels]) < 0.7


def test_a_slice_that_is_lost_in_the_window_is_seen_whole() -> None:
    whole = _objects_apart()
    usable = usable_slices(_model(), [replace(whole, window=Example(whole.images, torch.zeros_like(whole.labels)))])
    for seed in range(10):
        assert (draw_batch(usable, np.random.default_rng(seed), torch.device("cpu")).target.sum((1, 2)) > 0).all()


def test_too_little_foreground_is_said() -> None:
    label = np.zeros((3, 40, 40), np.int16)
    label[1, 5, 5] = 1
    tiny = example(np.ones((1, 3, 40, 40), np.float32), label, range(3), 64)
    with pytest.raises(PropagationError, match="at least 16 pixels"):
        adapt(_model(), [tiny], 1)


def test_object_scores_are_not_adapted(one: Example) -> None:
    with pytest.raises(PropagationError, match="without object scores"):
        adapt(tiny_model(), [one], 1)
