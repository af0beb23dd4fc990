"""What people change while a refinement runs, or between two runs of which the first was killed amid a round."""

from __future__ import annotations

import numpy as np
import pytest
from fake_propagator import FakePropagator
from raw_datasets import Roots, image_array, label_array, make_sparse, read, write_image, write_raw
from test_refine import CASES, FakeNnunet, drifting, replace_nnunet, run

from nnunet_oneshot import refine as refine_module
from nnunet_oneshot import rounds as rounds_module
from nnunet_oneshot.errors import OneShotError
from nnunet_oneshot.propagate import propagate
from nnunet_oneshot.refine import open_store
from nnunet_oneshot.review.decisions import decide
from nnunet_oneshot.rounds import Placement, kept_manifest, switching_to, target_path
from nnunet_oneshot.store import Store

IGNORE = 3


@pytest.fixture
def fake(roots: Roots, fakes: dict[str, FakePropagator], monkeypatch: pytest.MonkeyPatch) -> FakeNnunet:
    """Dataset 601 with one annotated and four pseudo-labelled cases, and nnU-Net replaced."""
    write_raw(roots.raw, cases=CASES)
    propagate(501, 601, propagators=("fake",), views=("still", "shifted"), num_processes=1)
    made = replace_nnunet(roots, monkeypatch)
    made.say = drifting
    return made


def test_a_correction_made_during_a_training_is_a_persons_word(fake: FakeNnunet) -> None:
    """The round that the training leads to would be written over it."""
    store, _ = open_store(601)
    drawn = np.roll(label_array(3), 2, axis=1)

    def say(case: str, trainings: int) -> np.ndarray:
        if (case, trainings) == ("case_4", 1):
            write_image(store.label_path("case_3"), drawn)
        return drifting(case, trainings)

    fake.say = say
    result = run(rounds=1)
    assert result.taken_up == ["case_3: corrected by hand"]
    assert store.read_manifest().cases["case_3"].status == "corrected"
    for path in (store.label_path("case_3"), store.fused_path("case_3"), store.round_path(0, "case_3")):
        np.testing.assert_array_equal(read(path), drawn)
    assert fake.labels[-1]["case_3.nii.gz"] == store.label_path("case_3").read_bytes(), "the last model learns it"
    assert run(rounds=1).taken_up == []
    assert len(fake.trained) == 2


def test_a_correction_of_a_round_that_is_given_up_is_kept(fake: FakeNnunet, monkeypatch: pytest.MonkeyPatch) -> None:
    store, _ = open_store(601)
    drawn = np.roll(label_array(3), 2, axis=1)

    def compare(*_: object) -> dict[str, float]:
        write_image(store.fused_path("case_3"), drawn)
        return {"before": 0.9, "now": 0.1}

    monkeypatch.setattr(refine_module, "compare_rounds", compare)
    result = run(rounds=1, all_rounds=False)
    assert (result.round, result.taken_up) == (0, ["case_3: corrected by hand"])
    np.testing.assert_array_equal(read(store.label_path("case_3")), drawn)
    assert fake.labels[-1]["case_3.nii.gz"] == store.label_path("case_3").read_bytes(), "the model in force learns it"


@pytest.fixture
def halfway(fake: FakeNnunet, monkeypatch: pytest.MonkeyPatch) -> Store:
    """Killed when round 1 was put in force for two of four cases."""
    place, placed = rounds_module.place, list[str]()

    def killed(placement: Placement) -> None:
        if placement.number == 1 and len(placed) == 2:
            raise KeyboardInterrupt
        placed.append(placement.case.name)
        place(placement)

    store, _ = open_store(601)
    run(rounds=0)
    placed.clear()
    with monkeypatch.context() as patched:
        patched.setattr(rounds_module, "place", killed)
        with pytest.raises(KeyboardInterrupt):
            run(rounds=1)
    assert switching_to(store) == 1
    return store


@pytest.mark.parametrize("case", ["case_1", "case_4"], ids=["placed", "not placed"])
@pytest.mark.parametrize("where", ["labelsTr", "pseudoTr/fused"])
def test_an_edit_amid_a_killed_switch_is_not_written_over(halfway: Store, case: str, where: str) -> None:
    path = halfway.folder / where / f"{case}.nii.gz"
    drawn = np.roll(label_array(0), 3, axis=1)
    write_image(path, drawn)
    with pytest.raises(OneShotError, match=rf"{case}.nii.gz: expected a label of round 0 or 1, found one that was edi"):
        run(rounds=1)
    np.testing.assert_array_equal(read(path), drawn)
    wrote = target_path(halfway, 1, case) if where == "labelsTr" else halfway.round_path(1, case)
    write_image(path, read(wrote))
    assert run(rounds=1).round == 1


def test_a_killed_switch_without_edits_is_finished(halfway: Store) -> None:
    assert run(rounds=1).round == 1
    for case in CASES[1:]:
        np.testing.assert_array_equal(read(halfway.fused_path(case)), read(halfway.round_path(1, case)))


def test_an_image_added_after_a_kill_amid_a_round_is_labelled_by_the_next(halfway: Store, roots: Roots) -> None:
    write_image(roots.raw / "Dataset501_toy" / "imagesTr" / "case_5_0000.nii.gz", image_array(5))
    result = run(rounds=2)
    assert result.round == 2
    assert "case_5: a new image" in result.taken_up
    assert halfway.read_manifest().cases["case_5"].status == "pseudo"


@pytest.mark.parametrize("action", ["accept", "reject"])
def test_a_decision_that_was_undone_stays_so_in_an_earlier_round(fake: FakeNnunet, action: str) -> None:
    store, raw = open_store(601)
    decide(raw, store, "case_1", action)  # type: ignore[arg-type]
    run(rounds=1)
    time = (store.read_manifest().cases["case_1"].review or {})["time"]
    decide(raw, store, "case_1", "undo", seen=time)
    run(rounds=2)
    label = read(store.label_path("case_1"))
    assert kept_manifest(store, 1).cases["case_1"].status == {"accept": "accepted", "reject": "rejected"}[action]
    run(rounds=1)
    assert store.read_manifest().round == 1
    assert store.read_manifest().cases["case_1"].status == "pseudo"
    assert (label == IGNORE).any()
    np.testing.assert_array_equal(read(store.label_path("case_1")), label)


def test_drawn_slices_that_are_gone_are_said_before_anything_is_trained(
    roots: Roots, fakes: dict[str, FakePropagator], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = write_raw(roots.raw, cases=CASES)
    make_sparse(folder)
    write_image(folder / "labelsTr" / "case_1.nii.gz", label_array(1))
    propagate(501, 601, propagators=("sam2",), views=("still",), num_processes=1)
    fake = replace_nnunet(roots, monkeypatch)
    (folder / "labelsTr" / "case_0.nii.gz").unlink()
    with pytest.raises(OneShotError, match="case_0: expected its label in Dataset501_toy/labelsTr, which a person"):
        run(rounds=1)
    assert not fake.trained


def test_another_threshold_holds_for_the_labels_in_force(fake: FakeNnunet) -> None:
    fake.say = lambda case, _: label_array(int(case[-1])) if case != "case_3" else np.roll(label_array(3), 4, axis=1)
    store, _ = open_store(601)
    run(rounds=1, min_quality=0.5)
    assert store.read_manifest().cases["case_3"].status == "gated"
    result = run(rounds=1, min_quality=0.0)
    assert store.read_manifest().cases["case_3"].status == "pseudo"
    assert (read(store.label_path("case_3")) != IGNORE).any()
    assert any("labels of 1 cases changed since round 1 was trained on" in line for line in result.taken_up)
    assert len(fake.trained) == 3
    run(rounds=1, min_quality=0.5)
    assert (read(store.label_path("case_3")) == IGNORE).all()
