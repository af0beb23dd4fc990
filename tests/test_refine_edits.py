"""What people change while a refinement runs, or between two runs of which the first was killed amid a round."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import SimpleITK as sitk
from conftest import Answer
from fake_propagator import FakePropagator
from raw_datasets import Roots, edit_json, image_array, label_array, make_sparse, read, write_image, write_raw
from test_bad_input import change_voxel, refused, truncate
from test_refine import CASES, FakeNnunet, drifting, killed_at, replace_nnunet, run, store_files

from nnunet_oneshot import cli, nnunet, refine_changes, refine_training
from nnunet_oneshot import refine as refine_module
from nnunet_oneshot import rounds as rounds_module
from nnunet_oneshot.errors import OneShotError
from nnunet_oneshot.propagate import propagate
from nnunet_oneshot.refine import open_store
from nnunet_oneshot.refine_work import Work
from nnunet_oneshot.refresh import raw_label_hashes
from nnunet_oneshot.relabel import Change
from nnunet_oneshot.review.decisions import Action, ConflictError, correct, decide
from nnunet_oneshot.review.session import open_desk
from nnunet_oneshot.rounds import Placement, kept_manifest, switching_to, target_path
from nnunet_oneshot.store import Store
from sam2_propagation.consensus import fuse

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


def test_what_is_edited_while_labels_are_refreshed_is_trained_on(
    fake: FakeNnunet, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The refresh had read the old label, or not: that the new one was trained on is not to be relied on."""
    store, raw = open_store(601)
    drawn, found = np.roll(label_array(3), 2, axis=1), list[np.ndarray]()

    def refresh(*_: object) -> None:
        found.append(read(store.label_path("case_3")))
        store.write_label(raw, drawn, store.label_path("case_3"), raw.case("case_3"))

    monkeypatch.setattr(refine_training, "refresh", refresh)
    run(rounds=0)
    assert [np.array_equal(label, drawn) for label in found] == [False, True]
    assert len(fake.trained) == 2, "once on the old label, then on the new one"


def amid_training(monkeypatch: pytest.MonkeyPatch, number: int, what: Callable[[], object]) -> None:
    """Does something while training `number`, from 1, is at work."""
    train, trainings = nnunet.train, list[object]()

    def trained(*arguments: Any, **more: Any) -> Any:
        folder = train(*arguments, **more)
        trainings.append(folder)
        if len(trainings) == number:
            what()
        return folder

    monkeypatch.setattr(nnunet, "train", trained)


def superseded(fake: FakeNnunet) -> list[str]:
    return sorted(p.name for p in (fake.folder("Dataset601_toy_oneshot") / "oneshot_rounds").glob("*superseded*"))


def test_a_label_saved_during_the_last_training_waits_for_the_next_refine(
    fake: FakeNnunet, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Hours of training are not thrown away for it, and it is said that the model does not know it."""
    store, _ = open_store(601)
    drawn = np.roll(label_array(3), 2, axis=1)
    amid_training(monkeypatch, 2, lambda: write_image(store.label_path("case_3"), drawn))
    (said,) = run(rounds=1).taken_up
    assert said.startswith("labels of 1 cases (case_3) changed while round 1 was trained on")
    assert "refine again" in said
    assert (len(fake.trained), superseded(fake)) == (2, [])
    assert run(rounds=1).taken_up == [
        "case_3: corrected by hand",
        "labels of 1 cases changed since round 1 was trained on: training it again",
    ]
    np.testing.assert_array_equal(read(store.label_path("case_3")), drawn)
    assert (len(fake.trained), superseded(fake)) == (3, ["01_superseded_1"])
    settles(fake, rounds=1)


BAD_LABELS = {
    "shape": lambda path: write_image(path, label_array(0, (4, 9, 8))),
    "values": lambda path: write_image(path, label_array(0) * 4),
    "cut short": truncate,
    "gone": lambda path: path.unlink(),
}


@pytest.mark.parametrize("spoil", BAD_LABELS.values(), ids=BAD_LABELS.keys())
def test_a_label_that_does_not_fit_leaves_the_model_that_was_in_training(
    fake: FakeNnunet, monkeypatch: pytest.MonkeyPatch, spoil: Callable[[Path], object]
) -> None:
    path = open_store(601)[0].label_path("case_3")
    kept = list[bytes]()
    amid_training(monkeypatch, 2, lambda: (kept.append(path.read_bytes()), spoil(path)))
    assert "(case_3) changed while round 1 was trained on" in run(rounds=1).taken_up[0]
    with pytest.raises(OneShotError, match="case_3"):
        run(rounds=1)
    assert (len(fake.trained), superseded(fake)) == (2, [])
    path.write_bytes(kept[0])
    settles(fake, rounds=1)


def test_a_label_that_does_not_fit_is_refused_before_its_model_is_moved(
    fake: FakeNnunet, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Saved while labels were refreshed, so that the training that follows is to be done again."""
    path = open_store(601)[0].label_path("case_3")
    kept = path.read_bytes()
    with monkeypatch.context() as patched:
        patched.setattr(refine_training, "refresh", lambda *_: write_image(path, label_array(0, (4, 9, 8))))
        with pytest.raises(OneShotError, match=r"case_3\.nii\.gz: expected the shape"):
            run(rounds=0)
    assert (len(fake.trained), superseded(fake)) == (1, [])
    path.write_bytes(kept)
    settles(fake, rounds=0)


def test_what_is_edited_during_the_full_preprocessing_is_left_to_the_refresh(
    fake: FakeNnunet, monkeypatch: pytest.MonkeyPatch
) -> None:
    store, raw = open_store(601)
    before, preprocess, noted = raw_label_hashes(601), nnunet.plan_and_preprocess, list[object]()

    def plan_and_preprocess(*arguments: Any, **more: Any) -> None:
        preprocess(*arguments, **more)
        store.write_label(raw, np.roll(label_array(3), 2, axis=1), store.label_path("case_3"), raw.case("case_3"))

    monkeypatch.setattr(nnunet, "plan_and_preprocess", plan_and_preprocess)
    monkeypatch.setattr(refine_training, "note_preprocessed", lambda *arguments: noted.append(arguments[-1]))
    run(rounds=0)
    assert noted == [before]
    assert raw_label_hashes(601) != before


def test_a_correction_of_a_round_that_is_given_up_is_kept(fake: FakeNnunet, monkeypatch: pytest.MonkeyPatch) -> None:
    store, _ = open_store(601)
    drawn = np.roll(label_array(3), 2, axis=1)

    def compare(*_: object) -> dict[str, float]:
        write_image(store.fused_path("case_3"), drawn)
        return {"moved": 0.5, "error": 0.1}

    monkeypatch.setattr(refine_module, "compare_round", compare)
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


def worse_from(monkeypatch: pytest.MonkeyPatch, first: int) -> None:
    """Rounds from `first` on are found to be astray."""

    def worse(_: Work, change: Change) -> str | None:
        return "worse" if change.number >= first else None

    monkeypatch.setattr(refine_module, "_worse", worse)


def settles(fake: FakeNnunet, **more: Any) -> None:
    """The same command once more trains nothing and leaves every file."""
    store, _ = open_store(601)
    before, trained = store_files(store), len(fake.trained)
    run(**more)
    assert len(fake.trained) == trained
    assert store_files(store) == before


@pytest.mark.parametrize("action", ["accept", "reject"])
def test_an_undone_decision_stays_so_in_a_round_that_is_put_in_force_again(
    fake: FakeNnunet, monkeypatch: pytest.MonkeyPatch, action: Action
) -> None:
    """The case has its label of that round there, not the one of the round that was given up."""
    worse_from(monkeypatch, 2)
    store, raw = open_store(601)
    decide(raw, store, "case_1", action)
    run(rounds=1, all_rounds=False)
    assert kept_manifest(store, 1).cases["case_1"].status == {"accept": "accepted", "reject": "rejected"}[action]
    time = (store.read_manifest().cases["case_1"].review or {})["time"]
    decide(raw, store, "case_1", "undo", seen=time)
    undone = read(store.label_path("case_1"))
    assert (undone == IGNORE).any()
    result = run(rounds=2, all_rounds=False)
    assert result.round == 1
    assert store.read_manifest().cases["case_1"].status == "pseudo"
    np.testing.assert_array_equal(read(store.label_path("case_1")), undone)
    settles(fake, rounds=2, all_rounds=False)


def test_an_undone_decision_stays_so_in_the_round_that_it_was_made_in(fake: FakeNnunet) -> None:
    store, raw = open_store(601)
    decide(raw, store, "case_1", "accept")
    run(rounds=1)
    time = (store.read_manifest().cases["case_1"].review or {})["time"]
    decide(raw, store, "case_1", "undo", seen=time)
    run(rounds=0)
    assert kept_manifest(store, 0).cases["case_1"].status == store.read_manifest().cases["case_1"].status == "pseudo"
    assert (read(store.label_path("case_1")) == IGNORE).any()
    settles(fake, rounds=0)


def test_an_added_image_stays_labelled_in_a_round_that_is_put_in_force_again(
    fake: FakeNnunet, roots: Roots, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where it came before the first training, so that the round was kept without a label of it."""
    worse_from(monkeypatch, 1)
    write_image(roots.raw / "Dataset501_toy" / "imagesTr" / "case_5_0000.nii.gz", image_array(5))
    store, _ = open_store(601, grown=True)
    run(rounds=1, all_rounds=False)
    again = run(rounds=1, all_rounds=False)
    assert again.round == 0
    assert "model alone" in {doubt.case: doubt.reason for doubt in again.doubts}["case_5"]
    assert store.read_manifest().cases["case_5"].status == "pseudo"
    assert read(store.label_path("case_5")).any()
    settles(fake, rounds=1, all_rounds=False)


def test_of_a_case_that_was_left_out_what_a_person_drew_alone_is_trained_on(
    fake: FakeNnunet, roots: Roots, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = roots.raw / "Dataset501_toy" / "dataset.json"
    content = json.loads(path.read_text())
    content["labels"]["ignore"] = IGNORE
    path.write_text(json.dumps(content))
    worse_from(monkeypatch, 1)
    more = {"rounds": 1, "all_rounds": False, "min_quality": 1.0}
    run(**more)
    store, _ = open_store(601)
    case = next(name for name, record in store.read_manifest().cases.items() if record.status == "gated")
    drawn = np.full_like(label_array(0), IGNORE)
    drawn[1] = 2
    write_image(roots.raw / "Dataset501_toy" / "labelsTr" / f"{case}.nii.gz", drawn)
    for _ in range(2):
        run(**more)
        label = read(store.label_path(case))
        assert (label[1] == 2).all()
        assert (np.delete(label, 1, axis=0) == IGNORE).all()
    settles(fake, **more)


@pytest.mark.parametrize("case", ["case_0", "case_1", "case_2"], ids=["annotated", "pseudo", "accepted"])
@pytest.mark.parametrize("where", ["labelsTr", "pseudoTr/fused"])
def test_a_label_in_force_that_is_gone_is_said_with_a_file_to_copy(fake: FakeNnunet, case: str, where: str) -> None:
    store, raw = open_store(601)
    decide(raw, store, "case_2", "accept")
    run(rounds=1)
    path = store.folder / where / f"{case}.nii.gz"
    path.unlink()
    with pytest.raises(
        OneShotError, match=rf"{re.escape(where)}/{case}.nii.gz: expected .* found no such file; copy "
    ) as caught:
        run(rounds=1)
    (copy,) = re.findall("copy (.*) there", str(caught.value))
    shutil.copyfile(copy, path)
    assert run(rounds=1).taken_up == []
    assert len(fake.trained) == 2


def test_a_label_of_the_round_in_force_that_is_gone_is_said(fake: FakeNnunet) -> None:
    """What was edited since is told by it."""
    run(rounds=1)
    store, _ = open_store(601)
    for path in (store.round_path(1, "case_1"), target_path(store, 1, "case_1")):
        (kept := path.with_name("kept")).write_bytes(path.read_bytes())
        path.unlink()
        with pytest.raises(OneShotError, match=rf"{path}: expected the label of round 1, found no such file; put it"):
            run(rounds=1)
        kept.rename(path)
    settles(fake, rounds=1)


def test_the_label_of_a_case_that_is_left_out_is_made_again(fake: FakeNnunet) -> None:
    """It says nothing but ignore."""
    store, raw = open_store(601)
    decide(raw, store, "case_1", "reject")
    run(rounds=1)
    before = read(store.label_path("case_1"))
    store.label_path("case_1").unlink()
    assert run(rounds=1).taken_up == []
    np.testing.assert_array_equal(read(store.label_path("case_1")), before)
    assert (before == IGNORE).all()
    settles(fake, rounds=1)
    assert len(fake.trained) == 2


@pytest.mark.parametrize("where", ["labelsTr", "pseudoTr/fused"])
def test_a_label_that_is_gone_amid_a_killed_switch_is_written_by_it(halfway: Store, where: str) -> None:
    (halfway.folder / where / "case_1.nii.gz").unlink()
    assert run(rounds=1).round == 1
    np.testing.assert_array_equal(read(halfway.fused_path("case_1")), read(halfway.round_path(1, "case_1")))


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


REFINE = ("-d", 601, "-c", "2d", "-device", "cpu", "-np", 1)


@pytest.mark.parametrize(
    ("spoil", "word"),
    [
        (lambda path: change_voxel(path, np.nan), "NaN"),
        (truncate, "expected a whole file"),
        (lambda path: write_image(path.with_name("case_5_0001.nii.gz"), image_array(5)), "expected 1 channels"),
    ],
    ids=["NaN", "cut short", "another number of channels"],
)
def test_a_new_image_that_cannot_be_used_is_bad_input(
    fake: FakeNnunet, roots: Roots, call: Callable[..., Answer], spoil: Callable[[Path], object], word: str
) -> None:
    run(rounds=0)
    store, _ = open_store(601)
    path = roots.raw / "Dataset501_toy" / "imagesTr" / "case_5_0000.nii.gz"
    write_image(path, image_array(5))
    spoil(path)
    refused(call(cli.refine, *REFINE, "-rounds", 0), path.name, word)
    assert "case_5" not in store.read_manifest().cases
    assert len(fake.trained) == 1


@pytest.mark.parametrize("rounds", [None, 1], ids=["before the first training", "after a round"])
def test_a_replaced_image_of_another_shape_is_said_before_anything_is_made_of_it(
    fake: FakeNnunet, roots: Roots, call: Callable[..., Answer], rounds: int | None
) -> None:
    if rounds is not None:
        run(rounds=rounds)
    path = roots.raw / "Dataset501_toy" / "imagesTr" / "case_3_0000.nii.gz"
    kept, trained, predicted = path.read_bytes(), len(fake.trained), dict(fake.predicted)
    write_image(path, image_array(3, shape=(4, 9, 8)))
    refused(call(cli.refine, *REFINE, "-rounds", 2, "--all_rounds"), "case_3", "(4, 9, 8)", "(5, 9, 8)", "put back")
    assert (len(fake.trained), fake.predicted) == (trained, predicted)
    path.write_bytes(kept)
    assert run(rounds=2).round == 2


@pytest.mark.parametrize(
    "labels",
    [{"background": 0, "organ": 1, "spot": 2, "other": 3}, {"background": 0, "organ": 2, "spot": 1}],
    ids=["one more", "other values"],
)
def test_other_classes_than_the_labels_were_made_of_are_refused(
    fake: FakeNnunet, roots: Roots, call: Callable[..., Answer], labels: dict[str, int]
) -> None:
    """Divergence of labels that are there would be read as a new class."""
    run(rounds=1)
    folder, trained = roots.raw / "Dataset501_toy", len(fake.trained)
    edit_json(folder, labels=labels)
    before = store_files(Store(roots.raw / "Dataset601_toy_oneshot", ".nii.gz"))
    refused(call(cli.refine, *REFINE, "-rounds", 2), "Dataset501_toy", f"found {labels}", "--overwrite")
    with pytest.raises(OneShotError, match="restore them in its dataset"):
        open_desk(601)
    assert len(fake.trained) == trained
    assert store_files(Store(roots.raw / "Dataset601_toy_oneshot", ".nii.gz")) == before


def test_a_class_may_get_another_name(fake: FakeNnunet, roots: Roots) -> None:
    run(rounds=0)
    edit_json(roots.raw / "Dataset501_toy", labels={"background": 0, "liver": 1, "spot": 2, "ignore": IGNORE})
    assert run(rounds=1).round == 1


def save_again(path: Path) -> None:
    """As another program does: the same voxels in other bytes."""
    before, image = path.read_bytes(), sitk.ReadImage(str(path))
    sitk.WriteImage(sitk.Cast(image, sitk.sitkInt32), str(path))
    assert path.read_bytes() != before


@pytest.mark.parametrize("case", ["case_0", "case_1", "case_2"], ids=["annotated", "pseudo", "rejected"])
def test_a_label_saved_again_unchanged_is_not_trained_on_again(fake: FakeNnunet, case: str) -> None:
    store, raw = open_store(601)
    decide(raw, store, "case_2", "reject")
    run(rounds=1)
    save_again(store.label_path(case))
    assert run(rounds=1).taken_up == []
    assert len(fake.trained) == 2
    write_image(store.label_path("case_3"), np.roll(label_array(3), 2, axis=1))
    assert "labels of 1 cases changed" in run(rounds=1).taken_up[1], "an edit still is one"
    assert len(fake.trained) == 3


def test_a_label_saved_again_unchanged_amid_a_training_does_not_begin_it_again(fake: FakeNnunet) -> None:
    store, _ = open_store(601)
    fake.stop_at = 2
    with pytest.raises(KeyboardInterrupt):
        run(rounds=0)
    save_again(store.label_path("case_1"))
    assert run(rounds=0).taken_up == []


@pytest.mark.parametrize("stop", range(5))
@pytest.mark.parametrize("where", ["labelsTr", "pseudoTr/fused"])
def test_a_second_edit_after_a_kill_amid_taking_up_the_first_is_kept(
    fake: FakeNnunet, monkeypatch: pytest.MonkeyPatch, where: str, stop: int
) -> None:
    """Killed before each of the four labels of the first edit is published, and before the manifest is written."""
    run(rounds=1)
    store, _ = open_store(601)
    path, killed = store.folder / where / "case_3.nii.gz", killed_at(stop, refine_changes.copy_label)
    write_image(path, np.roll(label_array(0), 2, axis=1))
    with monkeypatch.context() as patched:
        patched.setattr(refine_changes, "copy_label", killed)
        if stop == 4:
            patched.setattr(Store, "write_manifest", lambda *_: killed())
        with pytest.raises(KeyboardInterrupt):
            run(rounds=1)
    second = np.roll(label_array(0), 3, axis=1)
    write_image(path, second)
    assert run(rounds=1).taken_up[:1] == ["case_3: corrected by hand"]
    for label in (path, store.label_path("case_3"), store.fused_path("case_3"), store.round_path(1, "case_3")):
        np.testing.assert_array_equal(read(label), second)
    assert store.read_manifest().cases["case_3"].status == "corrected"
    settles(fake, rounds=1)


@pytest.mark.parametrize("stop", range(5))
def test_an_added_image_whose_labelling_is_killed_is_the_models(
    fake: FakeNnunet, roots: Roots, monkeypatch: pytest.MonkeyPatch, stop: int
) -> None:
    """Killed before each of its four labels is written, and before the manifest is: no person drew any of them."""
    run(rounds=1)
    store, _ = open_store(601)
    written, replace = list[object](), rounds_module.os.replace
    watched = [store.label_path, store.fused_path, lambda case: store.round_path(1, case)]
    paths = {str(path("case_5")) for path in watched} | {str(target_path(store, 1, "case_5"))}

    def killed(source: object, destination: object) -> None:
        # Only once the model was asked: what stood in for its label before is a change of its own.
        if any("case_5" in cases for cases in fake.predicted.values()) and (
            str(destination) in paths or (stop == 4 and str(destination) == str(store.manifest_path))
        ):
            if len(written) == stop:
                raise KeyboardInterrupt
            written.append(destination)
        replace(source, destination)

    write_image(roots.raw / "Dataset501_toy" / "imagesTr" / "case_5_0000.nii.gz", image_array(5))
    with monkeypatch.context() as patched:
        patched.setattr(rounds_module.os, "replace", killed)
        with pytest.raises(KeyboardInterrupt):
            run(rounds=1)
    assert run(rounds=1).round == 1
    assert store.read_manifest().cases["case_5"].status == "pseudo"
    for path in sorted(paths):
        assert read(Path(path)).any(), path
        np.testing.assert_array_equal(read(Path(path)), read(store.label_path("case_5")))
    run(rounds=2)
    assert "case_5" in fake.predicted[(len(fake.trained) - 1, "all")]
    settles(fake, rounds=2)


def test_added_images_edits_and_rounds_are_worked_on_in_processes(fake: FakeNnunet, roots: Roots) -> None:
    """What each worker is given and gives back is sent to it and from it."""
    run(rounds=1, num_processes=2)
    store, _ = open_store(601)
    for index in (5, 6):
        write_image(roots.raw / "Dataset501_toy" / "imagesTr" / f"case_{index}_0000.nii.gz", image_array(index))
    drawn = np.roll(label_array(3), 2, axis=1)
    write_image(store.label_path("case_3"), drawn)
    result = run(rounds=2, num_processes=2)
    assert "case_3: corrected by hand" in result.taken_up
    records = store.read_manifest().cases
    assert [records[case].status for case in ("case_3", "case_5", "case_6")] == ["corrected", "pseudo", "pseudo"]
    np.testing.assert_array_equal(read(store.label_path("case_3")), drawn)
    assert all(read(store.fused_path(case)).any() for case in ("case_5", "case_6"))
    settles(fake, rounds=2)


def test_two_edits_of_one_case_that_differ_are_refused(fake: FakeNnunet, call: Callable[..., Answer]) -> None:
    """One of them would be overwritten, whichever was taken."""
    run(rounds=1)
    store, _ = open_store(601)
    paths = [store.fused_path("case_3"), store.label_path("case_3")]
    edits = [np.roll(label_array(0), by, axis=1) for by in (2, 3)]
    for path, edited in zip(paths, edits, strict=True):
        write_image(path, edited)
    refused(call(cli.refine, *REFINE, "-rounds", 1, "--all_rounds"), "case_3", *map(str, paths), "copy the one that")
    for path, edited in zip(paths, edits, strict=True):
        np.testing.assert_array_equal(read(path), edited)
    shutil.copyfile(*paths)
    assert run(rounds=1).taken_up[0] == "case_3: corrected by hand"
    for path in paths:
        np.testing.assert_array_equal(read(path), edits[0])


def test_the_label_of_a_round_copied_beside_an_edit_is_none(fake: FakeNnunet) -> None:
    run(rounds=1)
    store, _ = open_store(601)
    shutil.copyfile(store.fused_path("case_3"), store.label_path("case_3"))
    edited = np.roll(label_array(0), 2, axis=1)
    write_image(store.fused_path("case_3"), edited)
    assert run(rounds=1).taken_up[0] == "case_3: corrected by hand"
    np.testing.assert_array_equal(read(store.label_path("case_3")), edited)


# --- what people set back to ignore -------------------------------------------------------------------------------


def draw_slices(roots: Roots, case: str, *slices: int) -> None:
    """A sparse label in the source dataset: class 2 all over the slices, which no program says."""
    folder = roots.raw / "Dataset501_toy"
    edit_json(folder, labels={"background": 0, "organ": 1, "spot": 2, "ignore": IGNORE})
    label = np.full_like(label_array(0), IGNORE)
    label[list(slices)] = 2
    write_image(folder / "labelsTr" / f"{case}.nii.gz", label)


def only_drawn(label: np.ndarray, *slices: int) -> bool:
    return [n for n, plane in enumerate(label) if (plane == 2).all()] == list(slices)


@pytest.mark.parametrize("older", [False, True], ids=["as noted", "noted later"])
def test_a_drawn_slice_that_is_taken_back_is_trained_on_no_longer(fake: FakeNnunet, roots: Roots, older: bool) -> None:
    """Nor in the rounds before; the next round fills it. Datasets of older versions have no note of what was drawn."""
    run(rounds=1)
    draw_slices(roots, "case_3", 1, 3)
    run(rounds=1)
    store, _ = open_store(601)
    if older:
        shutil.rmtree(store.state_folder / "drawn")
        assert run(rounds=1).taken_up == []
    for number in (0, 1):
        run(rounds=number)
        assert only_drawn(read(store.label_path("case_3")), 1, 3)
    draw_slices(roots, "case_3", 1)
    assert run(rounds=1).taken_up[0] == "case_3: set back to ignore by a person since"
    assert (read(store.label_path("case_3"))[3] == IGNORE).all()
    carried = fuse([read(store.view_path("fake", view, "case_3")) for view in ("still", "shifted")]).label
    np.testing.assert_array_equal(read(store.fused_path("case_3"))[3], carried[3])
    settles(fake, rounds=1)
    run(rounds=0)
    assert only_drawn(read(store.label_path("case_3")), 1)
    assert not (read(store.fused_path("case_3"))[3] == 2).all(), "OneShotTrainer would learn it as the best guess"
    run(rounds=2)
    assert only_drawn(read(store.label_path("case_3")), 1)
    assert (read(store.label_path("case_3"))[3] != IGNORE).any(), "a model's word"
    assert store.read_manifest().cases["case_3"].status == "sparse"


def test_another_slice_drawn_instead_takes_the_place_of_the_first(fake: FakeNnunet, roots: Roots) -> None:
    run(rounds=0)
    draw_slices(roots, "case_3", 1)
    run(rounds=0)
    draw_slices(roots, "case_3", 3)
    assert run(rounds=0).taken_up[0] == "case_3: drawn by a person since"
    store, _ = open_store(601)
    label = read(store.label_path("case_3"))
    assert only_drawn(label, 3)
    assert (label[1] == IGNORE).all()


@pytest.mark.parametrize("when", ["propagated", "drawn since"])
def test_a_part_of_a_whole_label_that_is_taken_back_is_filled_by_a_model(
    fake: FakeNnunet, roots: Roots, when: str
) -> None:
    case = {"propagated": "case_0", "drawn since": "case_3"}[when]
    run(rounds=1)
    draw_slices(roots, case, *range(5))
    run(rounds=1)
    store, _ = open_store(601)
    assert store.read_manifest().cases[case].status == "annotated"
    draw_slices(roots, case, 0, 1)
    assert run(rounds=1).taken_up[0] == f"{case}: set back to ignore by a person since"
    assert store.read_manifest().cases[case].status == "sparse"
    assert (read(store.label_path(case))[2:] == IGNORE).all()
    settles(fake, rounds=1)
    for number in (0, 2):
        run(rounds=number)
        assert only_drawn(read(store.label_path(case)), 0, 1)
    said = drifting(case, len(fake.trained) - 1)[2:]
    np.testing.assert_array_equal(read(store.fused_path(case))[2:], said)


def test_a_slice_taken_back_before_the_first_refinement_is_seen(
    roots: Roots, fakes: dict[str, FakePropagator], monkeypatch: pytest.MonkeyPatch
) -> None:
    write_raw(roots.raw, cases=CASES)
    draw_slices(roots, "case_3", 1, 3)
    propagate(501, 601, propagators=("sam2",), views=("still", "shifted"), num_processes=1)
    fake = replace_nnunet(roots, monkeypatch)
    draw_slices(roots, "case_3", 1)
    assert run(rounds=0).taken_up == ["case_3: set back to ignore by a person since"]
    store, _ = open_store(601)
    assert only_drawn(read(store.label_path("case_3")), 1)
    assert fake.labels[-1]["case_3.nii.gz"] == store.label_path("case_3").read_bytes()


@pytest.mark.parametrize("stop", range(5))
def test_a_slice_taken_back_stays_so_after_a_kill(
    fake: FakeNnunet, roots: Roots, monkeypatch: pytest.MonkeyPatch, stop: int
) -> None:
    """Killed before each of four labels is published, and before it is noted what is drawn now."""
    run(rounds=1)
    draw_slices(roots, "case_3", 1, 3)
    run(rounds=1)
    draw_slices(roots, "case_3", 1)
    with monkeypatch.context() as patched:
        patched.setattr(refine_changes, "copy_label", killed_at(stop, refine_changes.copy_label))
        with pytest.raises(KeyboardInterrupt):
            run(rounds=1)
    assert run(rounds=1).taken_up[0] == "case_3: set back to ignore by a person since"
    store, _ = open_store(601)
    assert (read(store.label_path("case_3"))[3] == IGNORE).all()
    settles(fake, rounds=1)
    run(rounds=0)
    assert only_drawn(read(store.label_path("case_3")), 1)


# --- decisions that are stopped -----------------------------------------------------------------------------------


@pytest.mark.parametrize("first", [True, False], ids=["before the first refinement", "after a round"])
@pytest.mark.parametrize("stop", range(4))
def test_a_label_drawn_in_the_review_is_a_persons_word_wherever_that_stops(
    fake: FakeNnunet, monkeypatch: pytest.MonkeyPatch, first: bool, stop: int
) -> None:
    """Stopped after each of the three labels that it writes, and after the manifest."""
    if not first:
        run(rounds=1)
    store, raw = open_store(601)
    number, drawn = store.read_manifest().round, np.roll(label_array(0), 2, axis=1).astype(np.int16)
    paths = [store.label_path("case_3"), store.fused_path("case_3"), store.round_path(number, "case_3")]
    watched, written, replace = (
        {str(p) for p in (*paths, store.manifest_path)},
        list[object](),
        rounds_module.os.replace,
    )

    def killed(source: object, destination: object) -> None:
        replace(source, destination)
        if str(destination) in watched:
            written.append(destination)
            if len(written) == stop + 1:
                raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(rounds_module.os, "replace", killed)
        with pytest.raises(KeyboardInterrupt):
            correct(raw, store, "case_3", drawn)
    run(rounds=1)
    run(rounds=2)
    assert store.read_manifest().cases["case_3"].status == "corrected"
    for path in (*paths, store.round_path(2, "case_3")):
        np.testing.assert_array_equal(read(path), drawn)
    settles(fake, rounds=2)


@pytest.mark.parametrize("case", ["case_1", "case_3"], ids=["another case", "the edited case"])
def test_a_decision_after_a_refine_that_was_stopped_amid_taking_up_an_edit_stands(
    fake: FakeNnunet, monkeypatch: pytest.MonkeyPatch, case: str
) -> None:
    run(rounds=1)
    store, raw = open_store(601)
    edited, drawn = (np.roll(label_array(0), by, axis=1).astype(np.int16) for by in (2, 3))
    write_image(store.label_path("case_3"), edited)
    with monkeypatch.context() as patched:
        patched.setattr(refine_changes, "copy_label", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            run(rounds=1)
    if case == "case_3":
        with pytest.raises(ConflictError, match=r"stopped refine.*look at it again"):
            correct(raw, store, case, drawn)
        np.testing.assert_array_equal(read(store.fused_path(case)), edited)
    correct(raw, store, case, drawn)
    run(rounds=1)
    np.testing.assert_array_equal(read(store.label_path(case)), drawn)
    assert store.read_manifest().cases[case].review is not None
    assert store.read_manifest().cases["case_3"].status == "corrected"


@pytest.mark.parametrize("first", [True, False], ids=["before the first refinement", "after a round"])
@pytest.mark.parametrize("action", ["reject", "undo"])
def test_a_decision_that_is_stopped_is_made_whole_or_not_at_all(
    fake: FakeNnunet, monkeypatch: pytest.MonkeyPatch, action: Action, first: bool
) -> None:
    """Stopped before every file that it writes, one after the other; a refinement goes on after each."""
    store, raw = open_store(601)
    if not first:
        run(rounds=1)
    replace, stops, cases = rounds_module.os.replace, list[int](), dict(store.read_manifest().cases)

    def review() -> dict[str, Any]:
        return store.read_manifest().cases["case_3"].review or {}

    def stopped(at: int) -> bool:
        written = list[object]()

        def killed(source: object, destination: object) -> None:
            if len(written) == at:
                raise KeyboardInterrupt
            written.append(destination)
            replace(source, destination)

        with monkeypatch.context() as patched:
            patched.setattr(rounds_module.os, "replace", killed)
            try:
                decide(raw, store, "case_3", action, seen=review().get("time"))
            except KeyboardInterrupt:
                return True
        return False

    shutil.copytree(store.folder, kept := store.folder.with_name("kept"))
    while True:
        shutil.rmtree(store.folder)
        shutil.copytree(kept, store.folder)
        if action == "undo":
            decide(raw, store, "case_3", "reject")
        if not stopped(len(stops)):
            break
        stops.append(len(stops))
        refine_changes.finish_taking(raw, store)
        label = read(store.label_path("case_3"))
        record = store.read_manifest().cases["case_3"]
        assert (record.status == "rejected") == bool((label == IGNORE).all()), f"stopped before file {stops[-1]}"
        assert (review().get("decision") == "rejected") == (record.status == "rejected")
        assert cases["case_3"].status == "pseudo"
        if not first:
            look = refine_changes.Look(raw, store, raw.case("case_3"), record, store.read_manifest().round)
            assert refine_changes.look_at(look) is None, "no edit"
        if record.status == "rejected":
            decide(raw, store, "case_3", "undo", seen=review()["time"])
        decide(raw, store, "case_3", "reject", seen=review().get("time"))
        decide(raw, store, "case_3", "undo", seen=review()["time"])
        np.testing.assert_array_equal(read(store.label_path("case_3")), read(kept / "labelsTr" / "case_3.nii.gz"))
    assert len(stops) > 8
