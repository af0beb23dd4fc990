"""Correct and carry: one corrected slice goes through the volume, everything else stays."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from nnunet_oneshot.errors import OneShotError
from nnunet_oneshot.phantom import KINDS, draw_subject, render
from nnunet_oneshot.review.carry import Carrier, Correction, find_correction
from sam2_propagation.errors import PropagationError
from sam2_propagation.interface import Image, LabelVolume

SHAPE = (10, 64, 64)
MIDDLE = 5


@pytest.fixture(scope="module")
def patient() -> tuple[Image, LabelVolume]:
    """A phantom and its true label; thick slices along Y of the array, so that no axis is taken for granted."""
    torch.set_num_threads(1)
    kind = KINDS["thick_slices"]
    data, label = render(draw_subject(kind, np.random.default_rng(3)), kind, SHAPE)
    turned = np.ascontiguousarray(np.moveaxis(data, 1, 2))
    direction = (1.0, 0.0, 0.0, 0.0, 0.0, 1.0, 0.0, 1.0, 0.0)
    image = Image("phantom", turned, (1.2, 5.0, 1.2), (0.0, 0.0, 0.0), direction)
    return image, np.ascontiguousarray(np.moveaxis(label, 0, 1)).astype(np.int16)


@pytest.fixture(scope="module")
def carrier() -> Carrier:
    return Carrier()


def dice(first: np.ndarray, second: np.ndarray) -> float:
    return 2 * float((first & second).sum()) / float(first.sum() + second.sum())


def corrected(before: LabelVolume, truth: LabelVolume, *where: int) -> LabelVolume:
    edited = before.copy()
    edited[:, list(where)] = truth[:, list(where)]
    return edited


def test_a_corrected_slice_mends_its_neighbours(patient: tuple[Image, LabelVolume], carrier: Carrier) -> None:
    image, truth = patient
    liver = (truth == 1).astype(np.int16)
    before = np.roll(liver, 9, axis=2)
    edited = corrected(before, liver, MIDDLE)
    done = carrier.carry(image, before, edited)
    assert done.correction == Correction(1, (MIDDLE,), (1,))
    assert (done.label[:, MIDDLE] == liver[:, MIDDLE]).all(), "what was drawn stays"
    near = [MIDDLE - 1, MIDDLE + 1]
    assert dice(done.label[:, near] == 1, liver[:, near] == 1) > dice(before[:, near] == 1, liver[:, near] == 1) + 0.1


def test_reach_and_classes_that_were_not_corrected(patient: tuple[Image, LabelVolume], carrier: Carrier) -> None:
    image, truth = patient
    only = np.where(np.isin(truth, (1, 3)), truth, 0).astype(np.int16)
    before = np.roll(only, 5, axis=2)
    edited = corrected(before, np.where(before == 3, 3, np.where(only == 1, 1, 0)), MIDDLE)
    done = carrier.carry(image, before, edited, reach=2)
    far = [i for i in range(SHAPE[0]) if abs(i - MIDDLE) > 2]
    assert (done.label[:, far] == before[:, far]).all()
    assert done.correction.classes == (1,)
    near = [i for i in range(SHAPE[0]) if 0 < abs(i - MIDDLE) <= 2]
    kept = (before[:, near] == 3) & (done.label[:, near] != 1)
    assert (done.label[:, near][kept] == 3).all(), "a class that was not corrected stays"


def test_a_second_correction_remembers_the_first_and_encodes_nothing_again(
    patient: tuple[Image, LabelVolume], monkeypatch: pytest.MonkeyPatch
) -> None:
    image, truth = patient
    carrier, before = Carrier(), np.roll(truth, 5, axis=2)
    first = carrier.carry(image, before, corrected(before, truth, 3))
    encoder = carrier._ready()[1]
    monkeypatch.setattr(encoder, "encode", lambda *_: pytest.fail("encoded again"))
    second = carrier.carry(image, first.label, corrected(first.label, truth, 7), first.correction)
    assert (second.correction.axis, second.correction.indices) == (1, (3, 7))
    for index in (3, 7):
        assert (second.label[:, index] == truth[:, index]).all()


def test_what_cannot_be_carried(patient: tuple[Image, LabelVolume], carrier: Carrier) -> None:
    image, truth = patient
    with pytest.raises(OneShotError, match="expected a slice that was changed"):
        carrier.carry(image, truth, truth)
    with pytest.raises(OneShotError, match="expected something drawn"):
        carrier.carry(image, truth, corrected(truth, np.zeros_like(truth), MIDDLE))
    flat = Image("flat", image.data[:, :1])
    with pytest.raises(OneShotError, match="expected a volume"):
        carrier.carry(flat, np.zeros_like(truth[:1]), truth[:1])
    with pytest.raises(PropagationError, match="checkpoint"):
        Carrier("no_such_weights").carry(image, truth, corrected(truth, np.roll(truth, 1, axis=2), MIDDLE))


@settings(max_examples=40)
@given(axis=st.integers(0, 2), indices=st.sets(st.integers(0, 5), min_size=1, max_size=3), seed=st.integers(0, 99))
def test_corrected_slices_are_found_in_any_plane(axis: int, indices: set[int], seed: int) -> None:
    before = np.zeros((6, 6, 6), np.int16)
    edited = np.moveaxis(before.copy(), axis, 0)
    strokes = np.random.default_rng(seed).permutation(36)[:12]
    for index in indices:
        edited[index].flat[strokes] = 1
    changed = np.moveaxis(edited, 0, axis)
    found = find_correction(before, changed)
    assert found.classes == (1,)
    assert len(found.indices) <= len(indices)
    assert set(np.flatnonzero(changed.any(tuple(a for a in range(3) if a != found.axis)))) == set(found.indices)
    if len(np.unique(strokes % 6)) > len(indices) and len(np.unique(strokes // 6)) > len(indices):
        assert (found.axis, found.indices) == (axis, tuple(sorted(indices)))
