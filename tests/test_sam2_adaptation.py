"""Adaptation learns from the annotated case alone, and the same every time."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sam2_tiny import balls, tiny_model

from sam2_propagation.adaptation import Example, adapt, apply_warp, draw_warp, example
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


@settings(deadline=None, max_examples=20)
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


def test_too_little_foreground_is_said() -> None:
    label = np.zeros((3, 40, 40), np.int16)
    label[1, 5, 5] = 1
    tiny = example(np.ones((1, 3, 40, 40), np.float32), label, range(3), 64)
    with pytest.raises(PropagationError, match="at least 16 pixels"):
        adapt(_model(), [tiny], 1)


def test_object_scores_are_not_adapted(one: Example) -> None:
    with pytest.raises(PropagationError, match="without object scores"):
        adapt(tiny_model(), [one], 1)
