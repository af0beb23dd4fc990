"""Refinements that stop, end at an earlier round or are taken up with other limits: nothing of anybody is lost."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import Answer
from fake_propagator import FakePropagator
from raw_datasets import LABELS, Roots, edit_json, image_array, label_array, make_sparse, read, write_image, write_raw
from test_refine import CASES, FakeNnunet, drifting, killed_at, replace_nnunet, run

from nnunet_oneshot import cli, first_round, nnunet, refine_changes
from nnunet_oneshot import refine as refine_module
from nnunet_oneshot import run as run_module
from nnunet_oneshot.errors import OneShotError
from nnunet_oneshot.propagate import propagate
from nnunet_oneshot.refine import open_store
from nnunet_oneshot.refine_record import Record
from nnunet_oneshot.review.decisions import correct, decide
from nnunet_oneshot.rounds import kept_manifest
from nnunet_oneshot.settings import Preset
from nnunet_oneshot.store import Store
from nnunet_oneshot.training_data import splits

IGNORE = 3
CHECK_TRAINED = nnunet.check_trained
"""Replaced with all else of nnU-Net, whose checkpoints hold no more than a number here."""


@pytest.fixture
def fake(roots: Roots, fakes: dict[str, FakePropagator], monkeypatch: pytest.MonkeyPatch) -> FakeNnunet:
    """Dataset601 with one annotated and four pseudo-labelled cases, an ignore label, and nnU-Net replaced."""
    edit_json(write_raw(roots.raw, cases=CASES), labels={**LABELS, "ignore": IGNORE})
    propagate(501, 601, propagators=("fake",), views=("still", "shifted"), num_processes=1)
    made = replace_nnunet(roots, monkeypatch)
    made.say = drifting
    return made


@pytest.fixture
def worse(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every round is found to be astray."""
    monkeypatch.setattr(refine_module, "compare_round", lambda *_: {"moved": 0.5, "error": 0.1})


def training_in_place(fake: FakeNnunet) -> str:
    return (fake.folder(open_store(601)[0].folder.name) / "fold_all" / nnunet.FINAL).read_text()


def labels_in_force(store: Store) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in (store.folder / "labelsTr").iterdir()}


# --- a plan that was never trained --------------------------------------------------------------------------------


def test_a_mistyped_configuration_is_said_each_time_and_blocks_nothing(
    fake: FakeNnunet, call: Callable[..., Answer], monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = nnunet.plan_and_preprocess

    def planned(dataset: str, preset: Preset, configurations: list[str], *_: object, **__: object) -> None:
        plan(dataset, preset, configurations)
        nnunet.check_configuration(dataset, preset.plans, configurations[0])

    monkeypatch.setattr(nnunet, "plan_and_preprocess", planned)
    more = ("-d", 601, "-device", "cpu", "-np", 1, "-rounds", 0)
    for _ in range(2):
        answer = call(cli.refine, "-c", "3d_fullres", *more)
        assert answer.code == 2
        assert "expected configuration '3d_fullres' in plans 'nnUNetPlans'" in answer.error
    assert call(cli.refine, "-c", "2d", *more).code == 0


def test_a_plan_that_was_not_trained_to_an_end_gives_way(fake: FakeNnunet) -> None:
    """The first fold of two was trained, on other cases than one model is trained on."""
    fake.stop_at = 3
    with pytest.raises(KeyboardInterrupt):
        run(rounds=0, num_folds=2)
    result = run(rounds=0, num_folds=3)
    store, _ = open_store(601)
    assert [fold for fold, _ in fake.trained] == [0, 0, 1, 2], "fold 0 of another split is not gone on from"
    assert result.folds == (0, 1, 2)
    preprocessed = fake.roots.preprocessed / store.folder.name / "splits_final.json"
    assert json.loads(preprocessed.read_text()) == splits(store.read_manifest(), 3)
    with pytest.raises(OneShotError, match="expected the refinement that was begun there"):
        run(rounds=0)


def test_run_refuses_bad_arguments_before_anything_is_labelled(roots: Roots, monkeypatch: pytest.MonkeyPatch) -> None:
    write_raw(roots.raw)
    monkeypatch.setattr(run_module, "propagate", lambda *_, **__: pytest.fail("labelled first"))
    for bad in ({"rounds": -1}, {"num_folds": 9}, {"min_margin": 1.0}, {"min_quality": -0.1}, {"stop_dice": 95.0}):
        with pytest.raises(OneShotError, match=f"-{next(iter(bad))}"):
            run_module.run(501, 601, "2d", training={"trainer": None, **bad})
    with pytest.raises(OneShotError, match="expected a configuration of one stage"):
        run_module.run(501, 601, "3d_cascade_fullres")


@pytest.mark.parametrize("stale", ["fold_all", "oneshot_rounds/00/fold_0", "oneshot_rounds/01_first/fold_all"])
def test_folds_of_any_number_are_in_the_way(fake: FakeNnunet, stale: str) -> None:
    (fake.folder(open_store(601)[0].folder.name) / stale).mkdir(parents=True)
    with pytest.raises(OneShotError, match=f"expected no earlier results in .*, found {stale},"):
        run(rounds=0, num_folds=5)


def test_a_run_with_overwrite_that_was_stopped_goes_on_as_its_sentence_says(
    fake: FakeNnunet, fakes: dict[str, FakePropagator], call: Callable[..., Answer], monkeypatch: pytest.MonkeyPatch
) -> None:
    command = (cli.run, "-d", 501, "-o", 601, "-c", "2d", "-propagator", "fake", "-np", 1, "-device", "cpu")
    folder = fake.folder(open_store(601)[0].folder.name)

    def killed(*_: object, **__: object) -> None:
        (folder / "fold_all").mkdir(parents=True)
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(nnunet, "train", killed)
        assert "run the same command again without --overwrite to go on" in call(*command, "--overwrite").err
    labelled = len(fakes["fake"].asked)
    refused = call(*command, "--overwrite")
    assert refused.code == 2
    assert "found fold_all," in refused.error
    assert "or run without --overwrite to go on with that training" in refused.error
    assert call(*command).code == 0
    assert len(fakes["fake"].asked) == labelled
    assert fake.trained[0] == ("all", None)


# --- a kill before the first training -----------------------------------------------------------------------------


def files_of(store: Store) -> dict[str, bytes]:
    there = {p.relative_to(store.folder): p for p in store.folder.rglob("*") if p.is_file()}
    return {str(name): path.read_bytes() for name, path in there.items() if "locks" not in name.parts}


@pytest.mark.parametrize("after", [False, True])
def test_a_kill_around_keeping_the_first_round_changes_no_byte(
    fake: FakeNnunet, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, after: bool
) -> None:
    """Kept and not in force yet, its estimates would be known to no training, and what it leaves out would be in it."""
    store, _ = open_store(601)
    shutil.copytree(store.folder, tmp_path / "propagated")
    run(rounds=0, min_quality=0.99)
    assert "gated" in {record.status for record in store.read_manifest().cases.values()}
    undisturbed = files_of(store)
    for folder in (store.folder, fake.folder(store.folder.name).parent):
        shutil.rmtree(folder)
    shutil.copytree(tmp_path / "propagated", store.folder)
    keep = first_round.keep

    def killed(*arguments: Any) -> None:
        if after:
            keep(*arguments)
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(first_round, "keep", killed)
        with pytest.raises(KeyboardInterrupt):
            run(rounds=0, min_quality=0.99)
    run(rounds=0, min_quality=0.99)
    assert files_of(store) == undisturbed


# --- what people changed ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rounds", [None, 1], ids=["before the first refinement", "after a round"])
def test_a_mistake_in_one_correction_loses_no_other(fake: FakeNnunet, rounds: int | None) -> None:
    if rounds is not None:
        run(rounds=rounds)
    store, _ = open_store(601)
    drawn = np.roll(label_array(0), 2, axis=1)
    write_image(store.label_path("case_1"), drawn)
    write_image(store.label_path("case_2"), label_array(0, (4, 9, 8)))
    with pytest.raises(OneShotError, match="case_2"):
        run(rounds=1)
    write_image(store.label_path("case_2"), drawn)
    assert run(rounds=1).taken_up[:2] == ["case_1: corrected by hand", "case_2: corrected by hand"]
    run(rounds=2)
    for case in ("case_1", "case_2"):
        assert store.read_manifest().cases[case].status == "corrected"
        np.testing.assert_array_equal(read(store.label_path(case)), drawn)


@pytest.mark.parametrize("stop", range(5))
def test_a_correction_survives_a_kill_amid_taking_it_up(
    fake: FakeNnunet, monkeypatch: pytest.MonkeyPatch, stop: int
) -> None:
    """Killed before each of the four labels is published, and before the manifest is written."""
    run(rounds=1)
    store, _ = open_store(601)
    edited = read(store.label_path("case_3"))
    edited[:2], edited[2] = IGNORE, 1
    write_image(store.label_path("case_3"), edited)
    killed = killed_at(stop, refine_changes.copy_label)
    with monkeypatch.context() as patched:
        patched.setattr("nnunet_oneshot.refine_changes.copy_label", killed)
        if stop == 4:
            patched.setattr(Store, "write_manifest", lambda *_: killed())
        with pytest.raises(KeyboardInterrupt):
            run(rounds=1)
    assert run(rounds=1).taken_up[0] == "case_3: corrected by hand"
    assert store.read_manifest().cases["case_3"].status == "corrected"
    np.testing.assert_array_equal(read(store.label_path("case_3")), edited)
    assert (read(store.fused_path("case_3"))[2] == 1).all()
    assert not list(store.state_folder.glob("taken*"))


def settle(roots: Roots, status: str) -> None:
    """Give case_3 a status, as people do: by a decision, or by slices drawn in the source dataset."""
    store, raw = open_store(601)
    if status == "sparse":
        drawn = np.full_like(label_array(3), IGNORE)
        drawn[1] = label_array(3)[1]
        write_image(roots.raw / "Dataset501_toy" / "labelsTr" / "case_3.nii.gz", drawn)
        run(rounds=1)
    elif status == "corrected":
        correct(raw, store, "case_3", label_array(1).astype(np.int16))
    elif status == "corrected by file":
        drawn = label_array(1)
        drawn[3] = IGNORE
        write_image(store.label_path("case_3"), drawn)
        run(rounds=1)
    else:
        decide(raw, store, "case_3", {"accepted": "accept", "rejected": "reject"}[status])  # type: ignore[arg-type]


DECIDED = ("accepted", "rejected", "corrected")


@pytest.mark.parametrize("where", ["labelsTr", "pseudoTr/fused"])
@pytest.mark.parametrize(
    ("status", "rounds"),
    [*((status, 1) for status in (*DECIDED, "corrected by file", "sparse")), *((status, None) for status in DECIDED)],
)
def test_a_correction_is_a_persons_word_whatever_was_said_before(
    fake: FakeNnunet, roots: Roots, status: str, rounds: int | None, where: str
) -> None:
    """After a round, and before the first refinement."""
    if rounds is not None:
        run(rounds=rounds)
    settle(roots, status)
    store, _ = open_store(601)
    edited = np.roll(label_array(0), 2, axis=1)
    write_image(store.folder / where / "case_3.nii.gz", edited)
    assert "case_3: corrected by hand" in run(rounds=1).taken_up
    if status == "sparse":
        # The source dataset says what a person drew there.
        edited[1] = label_array(3)[1]
    run(rounds=3)
    assert store.read_manifest().cases["case_3"].status == "corrected"
    for path in (store.label_path("case_3"), store.fused_path("case_3"), store.round_path(3, "case_3")):
        np.testing.assert_array_equal(read(path), edited)
    assert run(rounds=3).taken_up == []


@pytest.mark.parametrize("rounds", [1, None])
def test_what_was_carried_put_back_into_a_rejected_case_is_a_correction(
    fake: FakeNnunet, roots: Roots, rounds: int | None
) -> None:
    if rounds is not None:
        run(rounds=rounds)
    settle(roots, "rejected")
    store, _ = open_store(601)
    shutil.copy(store.fused_path("case_3"), store.label_path("case_3"))
    carried = read(store.fused_path("case_3"))
    assert "case_3: corrected by hand" in run(rounds=1).taken_up
    np.testing.assert_array_equal(read(store.label_path("case_3")), carried)


@pytest.mark.parametrize("status", [*DECIDED, "corrected by file", "sparse"])
def test_what_was_said_of_a_case_is_no_edit_of_it(fake: FakeNnunet, roots: Roots, status: str) -> None:
    """In the round in which it was said, and in every other one."""
    run(rounds=2)
    settle(roots, status)
    for limits in ({"rounds": 2}, {"rounds": 3}, {"rounds": 1}):
        assert not [line for line in run(**limits).taken_up if "corrected by hand" in line]
    assert open_store(601)[0].read_manifest().cases["case_3"].status == status.split()[0]


@pytest.mark.usefixtures("worse")
@pytest.mark.parametrize("where", ["labelsTr", "pseudoTr/fused"])
@pytest.mark.parametrize("status", ["accepted", "corrected"])
def test_a_second_correction_is_seen_after_a_fall_back(fake: FakeNnunet, roots: Roots, status: str, where: str) -> None:
    """The round in force then holds a program's label of the case."""
    run(rounds=2)
    settle(roots, status)
    assert run(rounds=2, all_rounds=False).round == 0
    store, _ = open_store(601)
    assert not (read(store.round_path(0, "case_3")) == read(store.fused_path("case_3"))).all()
    assert run(rounds=0).taken_up == []
    edited = np.roll(label_array(0), 2, axis=1)
    write_image(store.folder / where / "case_3.nii.gz", edited)
    assert run(rounds=0).taken_up[0] == "case_3: corrected by hand"
    for path in (store.label_path("case_3"), store.fused_path("case_3")):
        np.testing.assert_array_equal(read(path), edited)


@pytest.mark.parametrize("where", ["labelsTr", "pseudoTr/fused"])
@pytest.mark.parametrize("status", [*DECIDED, "sparse"])
@pytest.mark.parametrize(
    ("label", "match"), [(label_array(0, (4, 9, 8)), "shape"), (label_array(0) * 4, r"expected label values.*found")]
)
def test_a_correction_that_does_not_fit_is_bad_input_whatever_was_said_before(
    fake: FakeNnunet, roots: Roots, status: str, where: str, label: np.ndarray, match: str
) -> None:
    run(rounds=1)
    settle(roots, status)
    path = open_store(601)[0].folder / where / "case_3.nii.gz"
    write_image(path, label)
    with pytest.raises(OneShotError, match=f"{where}.*{match}"):
        run(rounds=1)


def test_a_second_correction_that_says_ignore_leaves_the_guess_of_the_first(fake: FakeNnunet, roots: Roots) -> None:
    run(rounds=1)
    settle(roots, "corrected")
    store, _ = open_store(601)
    edited = read(store.label_path("case_3"))
    edited[:2], edited[2] = IGNORE, 1
    write_image(store.label_path("case_3"), edited)
    run(rounds=1)
    np.testing.assert_array_equal(read(store.label_path("case_3")), edited)
    expected = np.where(edited == IGNORE, label_array(1), edited)
    np.testing.assert_array_equal(read(store.fused_path("case_3")), expected)


def test_a_rejected_case_that_is_corrected_is_no_longer_called_rejected(fake: FakeNnunet, roots: Roots) -> None:
    run(rounds=1)
    settle(roots, "rejected")
    store, _ = open_store(601)
    write_image(store.label_path("case_3"), np.roll(label_array(0), 2, axis=1))
    run(rounds=1)
    assert (store.read_manifest().cases["case_3"].review or {})["decision"] == "corrected"


@pytest.mark.parametrize("case", ["case_0", "bad_3"])
def test_a_correction_before_the_first_refinement_is_seen_where_little_was_said(
    roots: Roots, fakes: dict[str, FakePropagator], monkeypatch: pytest.MonkeyPatch, case: str
) -> None:
    """Of a case with one drawn slice, and of one without a label."""
    human = make_sparse(write_raw(roots.raw, cases=("case_0", "case_1", "case_2", "bad_3")))
    propagate(501, 601, propagators=("sam2",), views=("still", "shifted"), num_processes=1)
    replace_nnunet(roots, monkeypatch)
    store, _ = open_store(601)
    edited = np.roll(label_array(0), 2, axis=1)
    write_image(store.label_path(case), edited)
    assert run(rounds=1).taken_up == [f"{case}: corrected by hand"]
    expected = np.where(human != IGNORE, human, edited) if case == "case_0" else edited
    np.testing.assert_array_equal(read(store.label_path(case)), expected)


def test_an_edit_of_drawn_slices_alone_is_undone(fake: FakeNnunet, roots: Roots) -> None:
    """They are changed where they were drawn; the rest does not become a person's word by it."""
    run(rounds=1)
    settle(roots, "sparse")
    store, _ = open_store(601)
    before = read(store.label_path("case_3"))
    edited = before.copy()
    edited[1] = 0
    write_image(store.label_path("case_3"), edited)
    run(rounds=1)
    assert store.read_manifest().cases["case_3"].status == "sparse"
    np.testing.assert_array_equal(read(store.label_path("case_3")), before)


@pytest.mark.parametrize("action", ["flag", "comment"])
def test_an_edit_of_a_flagged_case_is_taken_up(fake: FakeNnunet, action: str) -> None:
    run(rounds=1)
    store, raw = open_store(601)
    decide(raw, store, "case_1", action, comment="look at the edge")  # type: ignore[arg-type]
    assert run(rounds=1).taken_up == [], "a flag is no edit"
    drawn = np.roll(label_array(0), 2, axis=1)
    write_image(store.label_path("case_1"), drawn)
    assert run(rounds=1).taken_up[0] == "case_1: corrected by hand"
    run(rounds=2)
    np.testing.assert_array_equal(read(store.label_path("case_1")), drawn)


def test_an_undone_decision_is_no_edit(fake: FakeNnunet) -> None:
    store, raw = open_store(601)
    decide(raw, store, "case_1", "accept")
    run(rounds=1)
    decide(raw, store, "case_1", "undo", seen=(store.read_manifest().cases["case_1"].review or {})["time"])
    assert not [line for line in run(rounds=1).taken_up if "by hand" in line]
    assert store.read_manifest().cases["case_1"].status == "pseudo"


@pytest.mark.usefixtures("worse")
@pytest.mark.parametrize("gated", [False, True])
def test_slices_drawn_since_survive_a_fall_back(fake: FakeNnunet, roots: Roots, gated: bool) -> None:
    run(rounds=1, min_quality=1.0 if gated else 0.0)
    store, _ = open_store(601)
    case = next(n for n, r in store.read_manifest().cases.items() if r.status == ("gated" if gated else "pseudo"))
    drawn = np.full_like(label_array(0), IGNORE)
    drawn[1] = 2
    write_image(roots.raw / "Dataset501_toy" / "labelsTr" / f"{case}.nii.gz", drawn)
    result = run(rounds=1, all_rounds=False)
    assert result.round == 0
    assert store.read_manifest().cases[case].status == "sparse"
    for path in (store.label_path(case), store.fused_path(case), store.round_path(0, case)):
        assert (read(path)[1] == 2).all()
    assert fake.labels[-1] == labels_in_force(store), "the model in force was trained on them"
    assert run(rounds=0).taken_up == []


@pytest.mark.usefixtures("worse")
def test_an_image_added_in_a_later_round_survives_a_fall_back(fake: FakeNnunet, roots: Roots) -> None:
    run(rounds=1)
    write_image(roots.raw / "Dataset501_toy" / "imagesTr" / "case_5_0000.nii.gz", image_array(5))
    assert run(rounds=1, all_rounds=False).round == 0
    store, _ = open_store(601)
    said = read(store.label_path("case_5"))
    assert said.any()
    assert run(rounds=0).taken_up == []
    np.testing.assert_array_equal(read(store.round_path(0, "case_5")), said)
    assert run(rounds=1).round == 1, "the next round begins with it"


# --- other limits from one run to the next ------------------------------------------------------------------------


@pytest.mark.usefixtures("worse")
def test_rounds_asked_for_after_a_fall_back_train_on_their_own_labels(fake: FakeNnunet) -> None:
    assert run(rounds=2, all_rounds=False).round == 0
    result = run(rounds=2)
    assert result.round == 2
    store, _ = open_store(601)
    assert len(fake.trained) == 4
    for number in (1, 2):
        # After the first training and after the third.
        np.testing.assert_array_equal(read(store.round_path(number, "case_1")), np.roll(label_array(1), 1, axis=2))
    assert fake.labels[0] == fake.labels[1], "round 0 was trained once more"
    assert fake.labels[1] != fake.labels[2], "round 1 was trained on round 1's labels"
    assert fake.labels[3] == labels_in_force(store)


@pytest.mark.usefixtures("worse")
def test_a_fall_back_by_two_rounds_takes_the_model_along(fake: FakeNnunet) -> None:
    run(rounds=2)
    assert training_in_place(fake) == "3"
    store, _ = open_store(601)
    for _ in range(2):
        assert run(rounds=2, all_rounds=False).round == 0
        assert (training_in_place(fake), labels_in_force(store)) == ("4", fake.labels[0])
    assert run(rounds=2).round == 2
    assert (training_in_place(fake), labels_in_force(store)) == ("3", fake.labels[2])
    assert run(rounds=3).round == 3
    assert training_in_place(fake) == "5"
    assert len(fake.trained) == 5, "of these one is round 0's second"
    aside = fake.folder(store.folder.name) / "oneshot_rounds"
    assert [(aside / f"{n:02d}" / "fold_all" / nnunet.FINAL).read_text() for n in range(3)] == ["4", "2", "3"]


def run_killed_at_move(monkeypatch: pytest.MonkeyPatch, stop: int) -> None:
    """One round by two folds, killed before move `stop` of a model's folder, from 0."""
    calls: list[object] = []
    rename = nnunet.os.rename

    def killed(*arguments: str) -> None:
        if len(calls) == stop:
            raise KeyboardInterrupt
        calls.append(arguments)
        rename(*arguments)

    with monkeypatch.context() as patched:
        patched.setattr("nnunet_oneshot.refine_models.os.rename", killed)
        with pytest.raises(KeyboardInterrupt):
            run(rounds=1, num_folds=2, all_rounds=False)


@pytest.mark.usefixtures("worse")
@pytest.mark.parametrize("stop", range(6))
def test_models_reach_their_place_whenever_their_move_is_killed(
    fake: FakeNnunet, monkeypatch: pytest.MonkeyPatch, stop: int
) -> None:
    """Killed before each move of two folds out and two folds in, and of these to where their second training begins."""
    run(rounds=1, num_folds=2)
    run_killed_at_move(monkeypatch, stop)
    assert run(rounds=1, num_folds=2, all_rounds=False).round == 0
    folder = fake.folder(open_store(601)[0].folder.name)
    assert [(folder / f"fold_{fold}" / nnunet.FINAL).read_text() for fold in (0, 1)] == ["5", "6"]
    for kept, trainings in (("00_first", ["1", "2"]), ("01", ["3", "4"])):
        there = [folder / "oneshot_rounds" / kept / f"fold_{fold}" / nnunet.FINAL for fold in (0, 1)]
        assert [path.read_text() for path in there] == trainings


def test_a_model_that_lies_where_another_is_to_be_kept_is_said(fake: FakeNnunet) -> None:
    run(rounds=0)
    folder = fake.folder(open_store(601)[0].folder.name)
    (folder / "oneshot_rounds" / "00" / "fold_all").mkdir(parents=True)
    with pytest.raises(OneShotError, match="move away the one that is not of this refinement"):
        run(rounds=1)


def test_models_of_labels_that_no_longer_count_are_never_brought_back(fake: FakeNnunet, roots: Roots) -> None:
    """After two rounds the first is in force again, and a label of it is corrected: round 2's model is of no use."""
    run(rounds=2)
    assert run(rounds=1).round == 1
    store, _ = open_store(601)
    write_image(store.label_path("case_1"), label_array(0))
    run(rounds=2)
    assert [fold for fold, _ in fake.trained] == ["all"] * 5
    assert training_in_place(fake) == "5"
    names = {p.name for p in (fake.folder(store.folder.name) / "oneshot_rounds").iterdir() if any(p.iterdir())}
    assert names == {"00", "01", "01_superseded_1", "02_superseded_1"}


def test_models_that_a_kill_left_aside_come_back_and_are_not_trained_again(
    fake: FakeNnunet, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Round 2's model was moved for round 1's to come, and nothing more, when the run was killed."""
    run(rounds=2)
    note = Record.note_in_place

    def killed(self: Record, number: int | None) -> None:
        if number is None:
            raise SystemExit("killed")
        note(self, number)

    monkeypatch.setattr(Record, "note_in_place", killed)
    with pytest.raises(SystemExit):
        run(rounds=1)
    monkeypatch.setattr(Record, "note_in_place", note)
    result = run(rounds=2)
    assert result.taken_up == []
    assert training_in_place(fake) == "3"
    assert len(fake.trained) == 3


# --- folds --------------------------------------------------------------------------------------------------------


def correct_to_what_it_is(case: str) -> None:
    """The label stays byte by byte, and yet its case counts as annotated: others are dealt over the folds anew."""
    store, raw = open_store(601)
    before = store.label_path(case).read_bytes()
    correct(raw, store, case, read(store.fused_path(case)).astype(np.int16))
    assert store.label_path(case).read_bytes() == before


def test_a_correction_that_changes_nothing_leaves_new_labels_out_of_fold(fake: FakeNnunet) -> None:
    fake.say = lambda case, _: label_array(int(case[-1]))
    run(rounds=2, num_folds=2)
    store, trained = open_store(601)[0], len(fake.trained)
    dealt = splits(store.read_manifest(), 2)
    correct_to_what_it_is("case_1")
    assert splits(store.read_manifest(), 2) != dealt
    run(rounds=3, num_folds=2)
    asked = {key: cases for key, cases in fake.predicted.items() if key[0] > trained - 2}
    assert sorted(case for cases in asked.values() for case in cases) == ["case_2", "case_3", "case_4"]
    for (trainings, fold), cases in asked.items():
        assert trainings <= trained, "nothing was trained again"
        assert not set(cases) & set(dealt[fold]["train"])


def test_folds_that_are_dealt_anew_amid_a_training_are_all_trained_again(fake: FakeNnunet) -> None:
    """Else two of them would belong to no deal of the cases, and nobody knew which did not see a case."""
    fake.say, fake.stop_at = (lambda case, _: label_array(int(case[-1]))), 15
    with pytest.raises(KeyboardInterrupt):
        run(rounds=2, num_folds=2)
    assert [fold for fold, _ in fake.trained] == [0, 1, 0, 1, 0]
    correct_to_what_it_is("case_1")
    said = run(rounds=2, num_folds=2).taken_up
    assert said == [
        "cases were dealt over the folds anew amid training on round 2: training it again",
        "cases were dealt over the folds anew: round 2 was trained from new weights",
    ]
    assert fake.trained[5:] == [(0, None), (1, None)]


def test_a_case_that_a_round_leaves_out_or_takes_back_costs_no_weights(fake: FakeNnunet) -> None:
    """Its new label comes from the fold that never saw it, also of those that start from weights of before."""
    fake.say = lambda case, trainings: (
        np.roll(label_array(3), 4, axis=1) if case == "case_3" and trainings <= 2 else label_array(int(case[-1]))
    )
    said = run(rounds=3, num_folds=2, min_quality=0.5).taken_up
    store, _ = open_store(601)
    status = [kept_manifest(store, number).cases["case_3"].status for number in range(4)]
    assert status[:2] == ["pseudo", "gated"]
    assert "pseudo" in status[2:], "taken back"
    assert said == []
    assert [start is not None for _, start in fake.trained] == [False] * 2 + [True] * 6
    before = Record(store).splits(0)
    assert before is not None
    own = next(fold for fold, split in enumerate(before) if "case_3" in split["val"])
    assert {key[1:] for key, cases in fake.predicted.items() if "case_3" in cases} == {(own,)}


def test_folds_stay_where_preprocessed_data_are_gone_amid_a_training(fake: FakeNnunet) -> None:
    """nnU-Net would deal the cases out by itself, over five."""
    fake.stop_at = 3
    with pytest.raises(KeyboardInterrupt):
        run(rounds=0, num_folds=2)
    store, _ = open_store(601)
    preprocessed = fake.roots.preprocessed / store.folder.name
    shutil.rmtree(preprocessed)
    run(rounds=0, num_folds=2)
    assert fake.preprocessed == 2
    assert json.loads((preprocessed / "splits_final.json").read_text()) == splits(store.read_manifest(), 2)


# --- models that are gone -----------------------------------------------------------------------------------------


def test_a_final_model_that_was_moved_away_is_trained_again(fake: FakeNnunet, call: Callable[..., Answer]) -> None:
    run(rounds=1)
    store, _ = open_store(601)
    labels, folder = labels_in_force(store), fake.folder(store.folder.name)
    shutil.rmtree(folder.parent)
    more = ("-c", "2d", "-device", "cpu", "-np", 1, "-rounds", 1, "--all_rounds", "-min_quality", 0)
    answer = call(cli.refine, "-d", 601, *more)
    assert answer.code == 0, answer.err
    assert "models of round 1 are gone: they were trained again" in answer.out
    assert training_in_place(fake) == "3"
    assert fake.labels[2] == fake.labels[1]
    assert labels_in_force(store) == labels
    assert run(rounds=1).taken_up == []
    assert len(fake.trained) == 3, "that of round 0 is not needed"


def test_a_final_model_of_another_trainer_is_bad_input(
    fake: FakeNnunet, call: Callable[..., Answer], monkeypatch: pytest.MonkeyPatch
) -> None:
    run(rounds=0)
    folder = fake.folder(open_store(601)[0].folder.name) / "fold_all"
    torch.save({"trainer_name": "nnUNetTrainer_5epochs"}, folder / nnunet.FINAL)
    monkeypatch.setattr(nnunet, "check_trained", CHECK_TRAINED)
    answer = call(cli.refine, "-d", 601, "-c", "2d", "-device", "cpu", "-np", 1, "-rounds", 0)
    assert answer.code == 2
    assert "expected a checkpoint of OneShotTrainer, found one of nnUNetTrainer_5epochs; move it away" in answer.error


def test_more_rounds_train_the_model_that_they_need_again(fake: FakeNnunet) -> None:
    """What its folder holds of another one's predictions does not count."""
    fake.stop_at = 10
    with pytest.raises(KeyboardInterrupt):
        run(rounds=2)
    store, _ = open_store(601)
    half_done = store.state_folder / "predictions" / "02"
    assert list(half_done.glob("*.nii.gz"))
    shutil.rmtree(fake.folder(store.folder.name).parent)
    result = run(rounds=2)
    assert result.round == 2
    assert result.taken_up == [
        "models of round 1 are gone: they were trained again",
        "models of round 0 are gone: round 1 was trained from new weights",
    ]
    assert fake.predicted[(3, "all")] == list(CASES[1:])
    assert fake.trained[2] == ("all", None)
    assert fake.trained[3][1] is not None


def test_labels_that_were_made_need_no_model_any_longer(fake: FakeNnunet, monkeypatch: pytest.MonkeyPatch) -> None:
    """Killed between the new labels and the note of it."""
    mark = Record.mark

    def killed(record: Record, step: str, *value: dict[str, float]) -> None:
        if step == "relabel-1":
            raise KeyboardInterrupt
        mark(record, step, *value)

    with monkeypatch.context() as patched:
        patched.setattr(Record, "mark", killed)
        with pytest.raises(KeyboardInterrupt):
            run(rounds=1)
    shutil.rmtree(fake.folder(open_store(601)[0].folder.name).parent)
    assert run(rounds=1).round == 1
    assert len(fake.trained) == 2


def test_a_fold_that_is_gone_is_trained_again_alone(fake: FakeNnunet) -> None:
    run(rounds=0, num_folds=2)
    shutil.rmtree(fake.folder(open_store(601)[0].folder.name) / "fold_1")
    run(rounds=1, num_folds=2)
    assert [fold for fold, _ in fake.trained] == [0, 1, 1, 0, 1]


def test_a_fold_that_is_gone_since_cases_were_dealt_anew_takes_the_others_along(fake: FakeNnunet) -> None:
    """Else there were models of two deals, and nobody knew which did not see a case."""
    fake.say = lambda case, _: label_array(int(case[-1]))
    run(rounds=2, num_folds=2)
    store, _ = open_store(601)
    correct_to_what_it_is("case_1")
    shutil.rmtree(fake.folder(store.folder.name) / "fold_1")
    run(rounds=2, num_folds=2)
    assert [fold for fold, _ in fake.trained] == [0, 1] * 4
    assert Record(store).splits(2) == splits(store.read_manifest(), 2)


def test_an_added_image_is_labelled_where_the_model_is_gone(fake: FakeNnunet, roots: Roots) -> None:
    run(rounds=1)
    shutil.rmtree(fake.folder(open_store(601)[0].folder.name).parent)
    write_image(roots.raw / "Dataset501_toy" / "imagesTr" / "case_5_0000.nii.gz", image_array(5))
    said = run(rounds=1).taken_up
    assert {"case_5: a new image", "models of round 1 are gone: they were trained again"} <= set(said)
    store, _ = open_store(601)
    assert store.read_manifest().cases["case_5"].status == "pseudo"
    assert fake.labels[-1] == labels_in_force(store), "the model was trained on it too"


@pytest.mark.usefixtures("worse")
def test_a_second_training_whose_first_is_gone_goes_on_after_a_kill(
    fake: FakeNnunet, monkeypatch: pytest.MonkeyPatch
) -> None:
    run(rounds=1, all_rounds=False)
    folder = fake.folder(open_store(601)[0].folder.name)
    shutil.rmtree(folder.parent)

    def killed(*_: object, **__: object) -> None:
        (folder / "fold_all").mkdir(parents=True)
        (folder / "fold_all" / "checkpoint_latest.pth").write_text("amid it")
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(nnunet, "train", killed)
        with pytest.raises(KeyboardInterrupt):
            run(rounds=1, all_rounds=False)
    assert run(rounds=1, all_rounds=False).round == 0
    assert (folder / "fold_all" / "checkpoint_latest.pth").is_file()
    assert training_in_place(fake) == "3"


# --- one rule for two rounds --------------------------------------------------------------------------------------


def test_a_round_that_moves_labels_by_more_than_they_can_be_wrong_is_not_taken(fake: FakeNnunet) -> None:
    fake.say = lambda case, _: np.roll(label_array(int(case[-1])), 2, axis=1)
    result = run(rounds=1, all_rounds=False)
    assert result.round == 0
    found = Record(open_store(601)[0]).value("quality-1")
    assert found is not None
    assert found["moved"] > found["error"] > 0
    assert f"labels moved by {found['moved']:.3f} in round 1" in result.ended
    assert f"estimated to be wrong by {found['error']:.3f}" in result.ended
    assert "its model trained once more on those labels" in result.ended
    again = run(rounds=1, all_rounds=False)
    assert (again.round, again.ended) == (0, result.ended)


@pytest.mark.usefixtures("worse")
def test_in_place_of_a_round_that_went_astray_its_model_learns_on_from_what_it_was(fake: FakeNnunet) -> None:
    fake.stop_at = 7
    with pytest.raises(KeyboardInterrupt):
        run(rounds=1, all_rounds=False)
    assert len(fake.trained) == 1, "killed where the second training begins"
    for _ in range(2):
        assert run(rounds=1, all_rounds=False).round == 0
    starts = [start and start.parts[-4:-1] for _, start in fake.trained]
    assert starts == [None, ("oneshot_rounds", "00_first", "fold_all")]
    assert fake.labels[0] == fake.labels[1]


@pytest.mark.usefixtures("worse")
@pytest.mark.parametrize("moves", [0, 1])
def test_an_image_that_is_added_after_a_kill_before_the_second_training_stops_nothing(
    fake: FakeNnunet, monkeypatch: pytest.MonkeyPatch, roots: Roots, moves: int
) -> None:
    run_killed_at_move(monkeypatch, moves)
    write_image(roots.raw / "Dataset501_toy" / "imagesTr" / "case_5_0000.nii.gz", image_array(5))
    result = run(rounds=1, num_folds=2, all_rounds=False)
    assert "case_5: a new image" in result.taken_up
    run(rounds=1, num_folds=2, all_rounds=False)
    assert open_store(601)[0].read_manifest().cases["case_5"].status == "pseudo"


@pytest.mark.usefixtures("worse")
def test_a_correction_amid_the_first_training_is_learnt_from_new_weights_and_judged_anew(fake: FakeNnunet) -> None:
    store, _ = open_store(601)
    drawn = np.roll(label_array(3), 2, axis=1)

    def say(case: str, trainings: int) -> np.ndarray:
        if trainings == 1:
            write_image(store.label_path("case_3"), drawn)
        return drifting(case, trainings)

    fake.say = say
    assert run(rounds=1, all_rounds=False).round == 0
    assert [start for _, start in fake.trained] == [None, None]
    assert Record(store).value("relabel-1") is None, "its model had learnt another label"
    run(rounds=1, all_rounds=False)
    assert [start and start.parts[-3] for _, start in fake.trained] == [None, None, "00_first"]
    np.testing.assert_array_equal(read(store.label_path("case_3")), drawn)


@pytest.mark.usefixtures("worse")
def test_a_label_that_is_corrected_after_a_round_went_astray_is_learnt_from_new_weights(fake: FakeNnunet) -> None:
    run(rounds=1, all_rounds=False)
    store, _ = open_store(601)
    write_image(store.label_path("case_1"), label_array(0))
    result = run(rounds=1, all_rounds=False)
    assert result.round == 0
    assert [start and start.parts[-3] for _, start in fake.trained] == [None, "00_first"] * 2
    names = {p.name for p in (fake.folder(store.folder.name) / "oneshot_rounds").iterdir() if any(p.iterdir())}
    assert names == {"00_first", "00_superseded_1", "00_superseded_2"}
    assert fake.labels[-1]["case_1.nii.gz"] == store.label_path("case_1").read_bytes()


def test_a_round_that_moves_boundaries_a_little_is_taken(fake: FakeNnunet) -> None:
    def grown(case: str, _: object) -> np.ndarray:
        label = label_array(int(case[-1]))
        return np.where((label == 0) & (np.roll(label, 1, axis=-1) == 1), 1, label)

    fake.say = grown
    result = run(rounds=1, all_rounds=False)
    assert result.round == 1
    found = Record(open_store(601)[0]).value("quality-1")
    assert found is not None
    assert 0 < found["moved"] < found["error"]


def test_labels_that_stay_as_they_are_have_settled(fake: FakeNnunet) -> None:
    store, _ = open_store(601)
    propagated = {case: read(store.fused_path(case)) for case in CASES}
    fake.say = lambda case, _: propagated[case]
    assert "settled" in run(rounds=1, all_rounds=False).ended
    found = Record(store).value("quality-1")
    assert found is not None
    assert found["moved"] == 0
