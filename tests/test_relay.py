"""Relays carry labels on to images that registration missed, and are chosen by what comes back."""

from __future__ import annotations

import pickle
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import SimpleITK as sitk
from conftest import Answer
from hypothesis import given
from hypothesis import strategies as st
from raw_datasets import Roots, write_raw
from test_propagate import Call, contents
from test_registration import body, deformed, dice, pair

from nnunet_oneshot import cli
from nnunet_oneshot.consensus import view_weights
from nnunet_oneshot.propagate import propagate
from nnunet_oneshot.quality import by_source
from sam2_propagation import relay as module
from sam2_propagation.interface import Image, LabelVolume, Propagation, Propagator, Support
from sam2_propagation.registration import RegistrationPropagator
from sam2_propagation.registration_carry import source_of
from sam2_propagation.relay import CANDIDATES, RelayPropagator, Vote, candidates

SHAPE = (16, 18, 20)


@dataclass
class Known:
    """What registration said, made up."""

    images: dict[str, Image]
    said: dict[str, list[Vote]] = field(default_factory=dict)

    def cases(self) -> Sequence[str]:
        return sorted(self.images)

    def image(self, case: str) -> Image:
        return self.images[case]

    def votes(self, case: str) -> list[Vote]:
        return self.said.get(case, [])


def moved(case: str, shift: float) -> tuple[Image, LabelVolume]:
    """The body of `pair`, warped and shifted along x, and its truth."""
    image, label = body(SHAPE)
    return Image(case, (100 * deformed(image, 1, shift) + 20)[None]), deformed(label, 0, shift)


def asked(known: Known, query: str, support: Support) -> Propagation:
    propagator = RelayPropagator(known)
    propagator.adapt([support], propagator.default_views)
    (said,) = propagator.propagate([support], [known.images[query]], propagator.default_views)
    return said


def test_it_is_a_propagator() -> None:
    assert isinstance(RelayPropagator(), Propagator)


@given(st.integers(0, 200))
def test_candidates_are_some_of_the_cases_each_once_in_their_order(count: int) -> None:
    cases = [f"case_{k:03d}" for k in range(count)]
    chosen = candidates(cases)
    assert len(chosen) == min(count, CANDIDATES)
    assert chosen == sorted(set(chosen))
    assert set(chosen) <= set(cases)
    assert chosen == candidates(cases)


def test_candidates_of_names_that_take_turns_are_of_both_kinds() -> None:
    cases = [f"patient{k:03d}_frame{frame:02d}" for k in range(12) for frame in (1, 12)]
    assert {name.rpartition("_")[2] for name in candidates(cases[1:])} == {"frame01", "frame12"}


@pytest.mark.slow
def test_relays_reach_an_image_that_registration_missed() -> None:
    support, _, _ = pair(SHAPE)
    near, near_truth = moved("near", 1)
    query, truth = moved("query", 2)
    wrong = np.roll(truth, 8, axis=2)
    known = Known({"near": near, "query": query}, {"near": [Vote(near_truth, 0.9)], "query": [Vote(wrong, 0.2)]})
    said = asked(known, "query", support)
    assert said.label is not None
    assert dice(wrong, truth) < 0.5
    assert dice(said.label, truth) > 0.85
    assert said.scores["relays"] == 1
    del known.said["query"]
    alone = asked(known, "query", support)
    assert alone.label is not None
    assert dice(alone.label, truth) > 0.85


@pytest.mark.slow
def test_a_label_that_does_not_come_back_is_not_carried_on(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "RELAYS", 1)
    support, _, _ = pair(SHAPE)
    good, good_truth = moved("z_good", 1)
    bad, bad_truth = moved("a_bad", 1)
    known = Known(
        {"z_good": good, "a_bad": bad},
        {"z_good": [Vote(good_truth, 0.5)], "a_bad": [Vote(np.roll(bad_truth, 5, axis=1), 0.9)]},
    )
    propagator = RelayPropagator(known)
    propagator.adapt([support], propagator.default_views)
    assert propagator.relays == ("z_good",)


@pytest.mark.slow
def test_an_image_is_not_its_own_relay_and_without_any_registration_has_the_word() -> None:
    support, _, _ = pair(SHAPE)
    query, truth = moved("query", 2)
    known = Known({"query": query}, {"query": [Vote(truth, 0.5)]})
    propagator = RelayPropagator(known)
    propagator.adapt([support], propagator.default_views)
    assert propagator.relays == ("query",)
    (said,) = propagator.propagate([support], [query], propagator.default_views)
    assert said.label is not None
    assert np.array_equal(said.label, truth)
    assert said.scores["relays"] == 0


@pytest.mark.slow
def test_relays_that_mislead_are_not_followed_and_the_way_back_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    support, _, _ = pair(SHAPE)
    near, near_truth = moved("near", 1)
    query, truth = moved("query", 2)
    known = Known({"near": near, "query": query}, {"near": [Vote(near_truth, 0.9)], "query": [Vote(truth, 0.3)]})
    carried_on = module.carried_on
    wrong = Vote(np.roll(truth, 4, axis=1), 0.9)
    monkeypatch.setattr(module, "carried_on", lambda relay, to: wrong if to.case == "query" else carried_on(relay, to))
    propagator = RelayPropagator(known)
    propagator.adapt([support], propagator.default_views)
    assert "near" in propagator.relays
    (said,) = propagator.propagate([support], [query], propagator.default_views)
    assert said.label is not None
    assert np.array_equal(said.label, truth)
    assert said.scores["relays"] == 0
    assert min(said.scores["reverse_dice_1"], said.scores["reverse_dice_2"]) > 0.7


@pytest.mark.slow
def test_a_label_that_does_not_come_back_itself_gives_way_to_relays(monkeypatch: pytest.MonkeyPatch) -> None:
    support, _, _ = pair(SHAPE)
    near, near_truth = moved("near", 1)
    query, truth = moved("query", 2)
    wrong = np.roll(truth, 8, axis=2)
    known = Known({"near": near, "query": query}, {"near": [Vote(near_truth, 0.9)], "query": [Vote(wrong, 0.3)]})
    propagator = RelayPropagator(known)
    propagator.adapt([support], propagator.default_views)
    ways_back = iter(({1: 0.0, 2: 0.0}, {1: 0.2, 2: 0.2}))
    monkeypatch.setattr(RelayPropagator, "_back", lambda self, label, image: next(ways_back))
    (said,) = propagator.propagate([support], [query], propagator.default_views)
    assert said.label is not None
    assert said.scores["relays"] == 1
    assert dice(said.label, truth) > 0.85


@pytest.mark.slow
def test_one_relay_of_several_does_not_speak_for_an_image_that_registration_missed(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    support, _, _ = pair(SHAPE)
    moves = {name: moved(name, shift) for name, shift in (("a", 0.5), ("b", 1.0), ("c", 1.5), ("query", 2.0))}
    known = Known(
        {name: image for name, (image, _) in moves.items()},
        {name: [Vote(truth, 0.9)] for name, (_, truth) in moves.items() if name != "query"},
    )
    assert asked(known, "query", support).label is not None
    only_a = module.carried_on
    monkeypatch.setattr(module, "carried_on", lambda relay, query: only_a(relay, query) if relay.case == "a" else None)
    propagator = RelayPropagator(known)
    monkeypatch.setattr(module, "comes_back", lambda relay, judge: {1: 0.9, 2: 0.9})
    propagator.adapt([support], propagator.default_views)
    assert propagator.relays == ("a", "b", "c")
    (said,) = propagator.propagate([support], [moves["query"][0]], propagator.default_views)
    assert said.label is None
    assert "of 3 images" in str(said.reason)


@pytest.mark.slow
def test_relays_are_pickled_to_workers_and_take_channels_and_2d_images() -> None:
    flat, _, _ = pair((40, 44))
    images: dict[str, Image] = {}
    truths: dict[str, LabelVolume] = {}
    for name, shift in (("near", 1.0), ("query", 2.0)):
        image, label = body((40, 44))
        data = (100 * deformed(image, 1, shift))[None]
        images[name] = Image(name, np.stack([data, 200 - data]))
        truths[name] = deformed(label, 0, shift)[None]
    support = Support(Image("s", np.concatenate([flat.image.data, -flat.image.data])), flat.label)
    propagator = RelayPropagator(Known(images, {"near": [Vote(truths["near"], 0.9)]}))
    propagator.adapt([support], propagator.default_views)
    assert propagator.relays == ("near",)
    copied = pickle.loads(pickle.dumps(propagator))
    (said,), (here,) = (p.propagate([], [images["query"]], ["relayed"]) for p in (copied, propagator))
    assert said.label is not None
    assert here.label is not None
    assert np.array_equal(said.label, here.label)
    assert dice(said.label, truths["query"]) > 0.8


@pytest.mark.slow
def test_where_nothing_gave_a_label_the_reason_is_said() -> None:
    support, query, _ = pair(SHAPE)
    said = asked(Known({"q": query}), "q", support)
    assert said.label is None
    assert said.reason is not None
    assert "of 0 images that pass labels on" in said.reason


def test_asking_before_choosing_is_a_mistake_of_the_caller() -> None:
    support, query, _ = pair(SHAPE)
    with pytest.raises(ValueError, match="adapt"):
        next(RelayPropagator(Known({})).propagate([support], [query], ["relayed"]))
    with pytest.raises(ValueError, match="unknown views"):
        next(RelayPropagator(Known({})).propagate([support], [query], ["local"]))
    with pytest.raises(ValueError, match="registration"):
        RelayPropagator().adapt([support], ["relayed"])


def test_a_large_relay_is_kept_coarser_with_its_label_in_place(monkeypatch: pytest.MonkeyPatch) -> None:
    support, _, _ = pair((20, 24, 30), (2.0, 1.0, 1.0))
    whole = source_of(support)
    monkeypatch.setattr(module, "_MOST_VOXELS", 4_000)
    small = module._small(whole)
    assert small.image.GetNumberOfPixels() < 5_000
    assert small.label.GetSize() == small.image.GetSize()
    for image in (small.label, small.image):
        assert np.allclose(image.GetSpacing(), small.channels.frame.spacing[::-1])
    for value in (1, 2):
        before, after = (_centre_and_volume(source.label, value) for source in (whole, small))
        assert np.allclose(before[0], after[0], atol=0.7)
        assert after[1] == pytest.approx(before[1], rel=0.15)


def test_a_structure_too_small_for_the_coarser_grid_keeps_the_fine_one(monkeypatch: pytest.MonkeyPatch) -> None:
    support, _, _ = pair((20, 24, 30))
    label = support.label.copy()
    label[3, 3, 3] = 3
    whole = source_of(Support(support.image, label))
    monkeypatch.setattr(module, "_MOST_VOXELS", 1_000)
    assert module._small(whole) is whole


def _centre_and_volume(label: sitk.Image, value: int) -> tuple[np.ndarray, float]:
    at = np.argwhere(sitk.GetArrayFromImage(label) == value)[:, ::-1]
    points = [label.TransformContinuousIndexToPhysicalPoint(p.astype(float).tolist()) for p in at]
    return np.mean(points, axis=0), len(at) * float(np.prod(label.GetSpacing()))


def test_relays_need_registration(toy: Path, call: Call) -> None:
    answer: Answer = call(cli.propagate, "-d", 501, "-o", 601, "-propagator", "relay", "sam2")
    assert answer.code == 2
    assert "registration" in answer.error


@pytest.mark.slow
def test_shards_make_the_same_labels(roots: Roots, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "CANDIDATES", 2)
    write_raw(roots.raw, cases=tuple(f"case_{k}" for k in range(6)), annotated=("case_0",))
    whole = propagate(501, 601, propagators=("registration", "relay"), num_processes=1)
    assert whole.manifest is not None
    assert set(whole.manifest.sources) == {"registration", "relay"}
    records = [whole.store.read_worker("relay", f"case_{k}") for k in range(1, 6)]
    assert any(record is not None and record.views["relayed"].scores["relays"] > 0 for record in records)
    # The second shard alone must not wait for the first.
    for part in (1, 0):
        shard = propagate(501, 602, propagators=("registration", "relay"), num_processes=1, num_parts=2, part_id=part)
    assert contents(shard.store) == contents(whole.store)


@pytest.mark.slow
def test_relays_label_what_registration_missed_and_that_counts(roots: Roots, monkeypatch: pytest.MonkeyPatch) -> None:
    write_raw(roots.raw, cases=tuple(f"case_{k}" for k in range(4)), annotated=("case_0",))
    carry = RegistrationPropagator.propagate

    def misses(self: RegistrationPropagator, supports: Any, queries: Iterable[Image], views: Sequence[str]) -> Any:
        for query in queries:
            if query.case == "case_3":
                yield from (Propagation(query.case, view, None, reason="missed") for view in views)
            else:
                yield from carry(self, supports, [query], views)

    monkeypatch.setattr(RegistrationPropagator, "propagate", misses)
    outcome = propagate(501, 601, propagators=("registration", "relay"), num_processes=1)
    assert outcome.manifest is not None
    record = outcome.manifest.cases["case_3"]
    assert record.status == "pseudo"
    assert record.views == ["relay/relayed"]
    assert "missed" in str(record.reason)


def test_relays_are_no_second_source_of_evidence() -> None:
    label = np.zeros((2, 2, 2), np.int16)
    assert set(by_source(["registration/local", "relay/relayed", "sam2/axial"], [label] * 3)) == {
        "registration",
        "sam2",
    }


def test_relays_have_the_say_over_registration_but_not_over_sam2_or_what_a_person_drew() -> None:
    registration = ["registration/local", "registration/information", "registration/edges"]
    *others, relay = view_weights([*registration, "relay/relayed"])
    assert relay > sum(others)
    planes = ["sam2/axial", "sam2/coronal", "sam2/sagittal"]
    *seen, relay = view_weights([*planes, "relay/relayed"])
    assert relay < min(seen)
    turns = ["sam2/identity", "sam2/rot90", "sam2/rot180"]
    assert set(view_weights([*turns, "relay/relayed", *registration])) == {1.0}
    assert view_weights(["correspondence/joint", "relay/relayed"], partly_drawn=True) == [2.0, 1.0]
