"""Estimated quality: what is taken as evidence, that more agreement never means less quality, and what follows."""

from __future__ import annotations

from argparse import ArgumentParser

import numpy as np
import pytest
from fake_propagator import FakePropagator
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from raw_datasets import label_array

from nnunet_oneshot.arguments import add_training
from nnunet_oneshot.quality import (
    CHANGE,
    CONFIDENCE,
    KINDS,
    REVERSE,
    RULES,
    SOURCES,
    VIEWS,
    Opinions,
    dice_by_class,
    estimate,
    gather,
    reverse_dice,
    reverse_scores,
    rule_for,
)
from nnunet_oneshot.quality_gate import MIN_QUALITY, gate, mean_quality, needs_review
from nnunet_oneshot.store import CaseRecord, Manifest, Status
from sam2_propagation.interface import Image, LabelVolume, Support

LABEL = label_array(0).astype(np.int16)
LABELS = arrays(np.int16, (2, 4, 5), elements=st.integers(0, 3))


def moved(by: int) -> LabelVolume:
    return np.roll(LABEL, by, axis=1)


@settings(max_examples=30)
@given(LABELS, LABELS)
def test_dice_is_the_textbook_one(first: LabelVolume, second: LabelVolume) -> None:
    found = dice_by_class(first, second, [1, 2, 3])
    for value in (1, 2, 3):
        a, b = first == value, second == value
        if not a.any() and not b.any():
            assert value not in found
        else:
            assert found[value] == pytest.approx(2 * (a & b).sum() / (a.sum() + b.sum()))


@pytest.mark.parametrize("kinds", RULES, ids=lambda kinds: " ".join(sorted(kinds)))
def test_more_agreement_never_means_less_quality(kinds: frozenset[str]) -> None:
    rule = RULES[kinds]
    assert all(weight >= 0 for weight in rule.weights.values())
    low = [rule(dict.fromkeys(kinds, x)) for x in np.linspace(0, 1, 21)]
    assert low == sorted(low)
    assert 0 <= low[0] < low[-1] <= 1


def test_there_is_a_rule_for_whatever_is_at_hand() -> None:
    for kind in (VIEWS, CHANGE, REVERSE):
        rule = rule_for(frozenset({kind}))
        assert rule is not None
        assert set(rule.weights) == {kind}
    for kinds in ({VIEWS, SOURCES}, {VIEWS, CHANGE}, {VIEWS, CONFIDENCE}, set(KINDS)):
        rule = rule_for(frozenset(kinds))
        assert rule is not None
        assert set(rule.weights) <= kinds


def test_a_label_of_a_later_round_is_judged_by_a_rule_for_such_labels() -> None:
    for more in ({VIEWS, REVERSE}, {VIEWS, SOURCES, REVERSE, CONFIDENCE}):
        rule = rule_for(frozenset({CHANGE, *more}))
        assert rule is not None
        assert CHANGE in rule.weights


def test_confidence_alone_is_no_estimate_and_no_crash() -> None:
    scores = [{"predicted_iou/1": 0.8, "predicted_iou/2": 0.7}]
    assert rule_for(frozenset({CONFIDENCE})) is None
    assert estimate(LABEL, Opinions({"sam2": [LABEL]}, scores=scores)) is None


def test_what_sam2_is_unsure_of_is_estimated_lower() -> None:
    views = {"sam2": [LABEL, moved(1)], "registration": [moved(1), moved(2)]}
    sure, unsure = (
        estimate(LABEL, Opinions(views, scores=[{"predicted_iou/1": iou, "predicted_iou/2": 0.7}]))
        for iou in (0.9, 0.4)
    )
    assert sure is not None
    assert unsure is not None
    assert sure["1"] > unsure["1"]
    assert sure["2"] == unsure["2"]


def test_nothing_at_hand_is_no_estimate() -> None:
    assert estimate(LABEL, Opinions({"a": [LABEL]})) is None


def test_views_that_agree_are_better_than_views_that_do_not() -> None:
    same = estimate(LABEL, Opinions({"a": [LABEL, LABEL]}))
    apart = estimate(LABEL, Opinions({"a": [LABEL, moved(2)]}))
    assert same is not None
    assert apart is not None
    assert set(same) == {"mean", "1", "2"}
    assert same["mean"] > apart["mean"]
    assert same["mean"] == pytest.approx((same["1"] + same["2"]) / 2, abs=1e-3)


def test_evidence_is_by_kind_and_class() -> None:
    opinions = Opinions({"a": [LABEL, LABEL], "b": [moved(1)]}, before=moved(2), scores=[{"reverse_dice_1": 0.5}])
    found = gather(LABEL, opinions)
    assert set(found) == {VIEWS, SOURCES, CHANGE, REVERSE}
    assert set(found[VIEWS]) == {1, 2}
    one = dice_by_class(LABEL, moved(1), [1])[1]
    assert found[SOURCES][1] == pytest.approx(one)
    assert found[VIEWS][1] == pytest.approx((2 + one) / 3)
    assert found[CHANGE] == pytest.approx(dice_by_class(LABEL, moved(2), [1, 2]))
    assert found[REVERSE] == {1: 0.5}


def test_a_class_that_only_a_view_shows_counts_against_the_label() -> None:
    without = np.where(LABEL == 2, 1, LABEL).astype(np.int16)
    found = estimate(without, Opinions({"a": [LABEL, without]}))
    assert found is not None
    assert found["2"] < found["1"]


def test_no_foreground_anywhere_is_worth_a_look() -> None:
    assert estimate(0 * LABEL, Opinions({"a": [0 * LABEL, 0 * LABEL]})) == {"mean": 0.0}


def test_a_label_is_carried_back_and_held_against_the_drawn_one() -> None:
    image = Image("s", np.zeros((1, *LABEL.shape), np.float32))
    support, query = Support(image, LABEL), Image("q", image.data)
    back = reverse_dice(FakePropagator(), support, query, moved(1), "still")
    assert back == {f"reverse_dice_{v}": d for v, d in dice_by_class(LABEL, moved(1), [1, 2]).items()}
    assert reverse_dice(FakePropagator(), support, query, 0 * LABEL, "still") == dict.fromkeys(back, 0.0)
    lost = Support(Image("bad_s", image.data), LABEL)
    assert reverse_dice(FakePropagator(), lost, query, LABEL, "still") == dict.fromkeys(back, 0.0)


# --- what is done about it ----------------------------------------------------------------------------------------


def records(**means: float) -> dict[str, CaseRecord]:
    quality = {name: {"mean": mean, "1": mean} for name, mean in means.items()}
    return {name: CaseRecord(status="pseudo", views=["fake/still"], quality=found) for name, found in quality.items()}


def test_low_cases_are_gated_and_come_back() -> None:
    gated = gate(records(a=0.2, b=0.8, c=0.9), 0.5)
    assert [gated[name].status for name in "abc"] == ["gated", "pseudo", "pseudo"]
    assert "0.20 is below 0.50" in str(gated["a"].reason)
    gated["a"].quality = {"mean": 0.7}
    again = gate(gated, 0.5)
    assert (again["a"].status, again["a"].reason) == ("pseudo", None)


def test_unless_told_no_label_is_left_out_for_its_quality() -> None:
    assert {record.status for record in gate(records(a=0.0, b=0.05, c=0.9), MIN_QUALITY).values()} == {"pseudo"}
    parser = ArgumentParser()
    add_training(parser)
    assert parser.get_default("min_quality") == MIN_QUALITY


def test_never_more_than_half_are_gated() -> None:
    gated = gate(records(a=0.1, b=0.2, c=0.3, d=0.4, e=0.45), 0.5)
    assert [name for name, record in gated.items() if record.status == "gated"] == ["a", "b"]


@pytest.mark.parametrize("status", ["annotated", "sparse", "failed", "accepted", "corrected", "rejected"])
def test_a_persons_word_is_not_gated(status: Status) -> None:
    cases = {"x": CaseRecord(status=status, quality={"mean": 0.0}), **records(a=0.9, b=0.9)}
    assert gate(cases, 0.5)["x"].status == status


def test_what_needs_a_person_is_listed_worst_first() -> None:
    cases = records(fair=0.9, low=0.6, lower=0.4)
    cases["lower"].quality = {"mean": 0.4, "1": 0.7, "2": 0.1}
    cases["gone"] = CaseRecord(status="failed", reason="no likeness")
    cases["out"] = CaseRecord(status="gated", quality={"mean": 0.2}, reason="estimated Dice 0.20 is below 0.30")
    cases["mine"] = CaseRecord(status="accepted", quality={"mean": 0.1})
    found = needs_review(Manifest(source_dataset="x", cases=cases), {1: "liver", 2: "kidney"})
    assert [doubt.case for doubt in found] == ["gone", "out", "lower", "low"]
    assert found[0].reason == "no label: no likeness"
    assert "left out of training" in found[1].reason
    assert found[2].reason == "estimated Dice 0.40, lowest for kidney: 0.10"


def test_mean_quality_is_that_of_program_made_labels() -> None:
    cases = {**records(a=0.6, b=0.8), "x": CaseRecord(status="accepted", quality={"mean": 0.0})}
    assert mean_quality(Manifest(source_dataset="x", cases=cases)) == pytest.approx(0.7)
    assert mean_quality(Manifest(source_dataset="x")) is None


def test_what_all_views_said_is_carried_back_by_the_first() -> None:
    image = Image("s", np.zeros((1, *LABEL.shape), np.float32))
    support, query, fake = Support(image, LABEL), Image("q", image.data), FakePropagator()
    results = list(fake.propagate([support], [query], ["still", "shifted"]))
    scores = reverse_scores(fake, [support], query, results)
    assert scores == {"reverse_dice_1": 1.0, "reverse_dice_2": 1.0}
    sparse = Support(image, LABEL, ignore=3)
    assert reverse_scores(fake, [sparse], query, results) == {}
    nothing = list(fake.propagate([support], [Image("bad", image.data)], ["still"]))
    assert reverse_scores(fake, [support], query, nothing) == {}
