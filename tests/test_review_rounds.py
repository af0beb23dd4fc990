"""Decisions and rounds: what people decide between two runs of `refine` holds in every round that follows."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from fake_propagator import FakePropagator
from raw_datasets import Roots, label_array, read, write_raw
from test_refine import CASES, FakeNnunet, drifting, replace_nnunet, run

from nnunet_oneshot.propagate import propagate
from nnunet_oneshot.refine import open_store
from nnunet_oneshot.report import report
from nnunet_oneshot.review.decisions import correct, decide
from nnunet_oneshot.rounds import kept_manifest

IGNORE = 3


@pytest.fixture
def fake(roots: Roots, fakes: dict[str, FakePropagator], monkeypatch: pytest.MonkeyPatch) -> FakeNnunet:
    """Dataset 601 with one annotated and four pseudo-labelled cases, and nnU-Net replaced."""
    write_raw(roots.raw, cases=CASES)
    propagate(501, 601, propagators=("fake",), views=("still", "shifted"), num_processes=1)
    return replace_nnunet(roots, monkeypatch)


def test_refine_obeys_what_was_decided_after_a_round(fake: FakeNnunet, tmp_path: Path) -> None:
    fake.say = drifting
    run(rounds=1)
    store, raw = open_store(601)
    accepted = read(store.fused_path("case_1"))
    drawn = np.roll(label_array(3), 2, axis=1).astype(np.int16)
    decide(raw, store, "case_1", "accept")
    decide(raw, store, "case_2", "reject")
    correct(raw, store, "case_3", drawn)
    trained = len(fake.trained)
    result = run(rounds=2)
    assert len(fake.trained) > trained, "the model of labels that are no longer in force is trained again"
    assert any("3 cases changed" in text for text in result.taken_up)
    predicted = {case for (training, _), cases in fake.predicted.items() if training > trained for case in cases}
    assert predicted == {"case_2", "case_4"}, "nobody asks a model about what a person has settled"
    store, _ = open_store(601)
    assert (read(store.label_path("case_1")) == accepted).all()
    assert (read(store.label_path("case_2")) == IGNORE).all()
    assert (read(store.label_path("case_3")) == drawn).all()
    manifest = store.read_manifest()
    statuses = {name: record.status for name, record in manifest.cases.items()}
    assert [statuses[case] for case in CASES[1:4]] == ["accepted", "rejected", "corrected"]
    assert all((manifest.cases[case].review or {}).get("time") for case in CASES[1:4]), "decisions and times are kept"
    estimated = kept_manifest(store, 2).cases["case_2"].quality
    assert manifest.cases["case_2"].round == 2
    assert manifest.cases["case_2"].quality == estimated, (
        "what is shown of a rejected case is of the label that is shown"
    )


def test_the_report_counts_only_what_a_round_relabelled(fake: FakeNnunet) -> None:
    """As `refine` does: a label that a person settled would lift the figure, since it never moves."""
    fake.say = drifting
    store, raw = open_store(601)
    decide(raw, store, "case_1", "accept")
    change = run(rounds=1).changes[0]
    page = report(601, num_processes=1).read_text(encoding="utf-8")
    assert 0 < change.mean < 1
    assert f"<td>{len(change.agreement)}</td><td>{change.mean:.3f}</td>" in page
    assert "Mean Dice to the round before" not in page, "one point is no curve"


def test_an_undone_decision_is_the_models_again(fake: FakeNnunet) -> None:
    fake.say = drifting
    store, raw = open_store(601)
    decide(raw, store, "case_1", "accept")
    run(rounds=1)
    assert "case_1" not in fake.predicted[1, "all"]
    time = (store.read_manifest().cases["case_1"].review or {})["time"]
    decide(raw, store, "case_1", "undo", seen=time)
    before = len(fake.trained)
    run(rounds=2)
    predicted = {case for (training, _), cases in fake.predicted.items() if training > before for case in cases}
    assert "case_1" in predicted
    assert (read(store.label_path("case_1")) == IGNORE).any(), "its divergence is ignored again"
