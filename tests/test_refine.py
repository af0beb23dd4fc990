"""The rounds with a stand-in for nnU-Net: what is trained on what, when it ends, and what is done again."""

from __future__ import annotations

import errno
import json
import os
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import Answer
from fake_propagator import FakePropagator
from raw_datasets import Roots, image_array, label_array, make_sparse, read, write_image, write_raw

from nnunet_oneshot import cli, nnunet, refine_changes, refine_training, second_opinion
from nnunet_oneshot.dataset import open_dataset
from nnunet_oneshot.errors import OneShotError
from nnunet_oneshot.propagate import propagate
from nnunet_oneshot.propagators import PropagatorOptions
from nnunet_oneshot.refine import Refinement, open_store, refine
from nnunet_oneshot.refine_record import Record, begun_plan
from nnunet_oneshot.store import Store
from nnunet_oneshot.training_data import splits
from sam2_propagation.errors import PropagationError
from sam2_propagation.interface import Image, Propagation, Propagator, Support

IGNORE = 3
CASES = ("case_0", "case_1", "case_2", "case_3", "case_4")
Say = Callable[[str, int], np.ndarray]


class FakeNnunet:
    """Trains nothing and predicts what it is told; remembers what it was asked, in order."""

    def __init__(self, roots: Roots) -> None:
        self.roots = roots
        self.trained: list[tuple[Any, ...]] = []
        self.predicted: dict[tuple[Any, ...], list[str]] = {}
        self.labels: list[dict[str, bytes]] = []
        self.say: Say = lambda case, trainings: label_array(int(case[-1]))
        self.preprocessed = 0
        self.stop_at: int | None = None
        self._calls = 0

    def plan_and_preprocess(self, dataset: str, *_: object, **__: object) -> None:
        self._count()
        self.preprocessed += 1
        folder = self.roots.preprocessed / dataset
        (folder / "data").mkdir(parents=True, exist_ok=True)
        plans = {"configurations": {"2d": {"data_identifier": "data"}}}
        (folder / "nnUNetPlans.json").write_text(json.dumps(plans))

    def train(self, dataset: str, configuration: str, fold: Any, trainer: str, plans: str, *_: object, **more: Any):
        folder = self.folder(dataset) / f"fold_{fold}"
        if (folder / nnunet.FINAL).is_file():
            return folder
        self._count()
        start = more["pretrained_weights"]
        assert start is None or start.is_file(), "weights to start from were moved"
        self.trained.append((fold, start))
        self.labels.append({p.name: p.read_bytes() for p in (self.roots.raw / dataset / "labelsTr").iterdir()})
        folder.mkdir(parents=True, exist_ok=True)
        (folder / nnunet.FINAL).write_text(str(len(self.trained)))
        return folder

    def check_trained(self, *_: object) -> None:
        pass

    def predict(
        self,
        dataset: str,
        configuration: str,
        folds: Sequence[Any],
        trainer: str,
        plans: str,
        images: Mapping[str, object],
        output: Path,
        *_: object,
        save_probabilities: bool = False,
    ) -> None:
        model = self.folder(dataset) / f"fold_{folds[0]}" / nnunet.FINAL
        trainings = int(model.read_text())
        for case in images:
            if not (output / f"{case}.nii.gz").is_file():
                self._count()
                self.predicted.setdefault((trainings, *folds), []).append(case)
                write_image(output / f"{case}.nii.gz", self.say(case, trainings))
                if save_probabilities:
                    found = 0.4 + 0.6 * np.eye(3)[self.say(case, trainings)].transpose(3, 0, 1, 2)
                    np.savez(output / f"{case}.npz", probabilities=found)

    def folder(self, dataset: str) -> Path:
        return self.roots.results / dataset / "OneShotTrainer__nnUNetPlans__2d"

    def _count(self) -> None:
        self._calls += 1
        if self._calls == self.stop_at:
            raise KeyboardInterrupt


@pytest.fixture
def fake(roots: Roots, fakes: dict[str, FakePropagator], monkeypatch: pytest.MonkeyPatch) -> FakeNnunet:
    """Dataset601 with one annotated and four pseudo-labelled cases, and nnU-Net replaced."""
    write_raw(roots.raw, cases=CASES)
    propagate(501, 601, propagators=("fake",), views=("still", "shifted"), num_processes=1)
    return replace_nnunet(roots, monkeypatch)


def replace_nnunet(roots: Roots, monkeypatch: pytest.MonkeyPatch) -> FakeNnunet:
    made = FakeNnunet(roots)
    for name in ("plan_and_preprocess", "train", "check_trained", "predict"):
        monkeypatch.setattr(nnunet, name, getattr(made, name))
    monkeypatch.setattr(refine_training, "refresh", lambda *_: None)
    monkeypatch.setattr(refine_training, "note_preprocessed", lambda *_: None)
    return made


def run(**more: Any) -> Refinement:
    return refine(601, "2d", **{"num_processes": 1, "all_rounds": True, "min_quality": 0.0, **more})


def killed_at(stop: int, function: Callable[..., None]) -> Callable[..., None]:
    """A function whose call number `stop`, from 0, is a kill before it does anything."""
    calls: list[object] = []

    def killed(*arguments: object) -> None:
        if len(calls) == stop:
            raise KeyboardInterrupt
        calls.append(arguments)
        function(*arguments)

    return killed


def drifting(case: str, trainings: int) -> np.ndarray:
    """Another label from every model, so that rounds never settle."""
    return np.roll(label_array(int(case[-1])), trainings % 2, axis=2)


def store_files(store: Store) -> dict[str, bytes]:
    return {str(p): p.read_bytes() for p in store.folder.rglob("*") if p.is_file() and "locks" not in p.parts}


def test_rounds_alternate_and_nothing_is_repeated(fake: FakeNnunet) -> None:
    fake.say = drifting
    result = run(rounds=2)
    assert [fold for fold, _ in fake.trained] == ["all"] * 3
    assert fake.predicted == {(1, "all"): list(CASES[1:]), (2, "all"): list(CASES[1:])}
    assert [change.number for change in result.changes] == [1, 2]
    assert (result.round, result.folds) == (2, ("all",))
    assert "2 rounds" in result.ended
    store, _ = open_store(601)
    kept = [fake.folder(store.folder.name) / "oneshot_rounds" / f"{n:02d}" / "fold_all" for n in (0, 1)]
    assert [(folder / nnunet.FINAL).read_text() for folder in kept] == ["1", "2"]
    before = store_files(store)
    assert run(rounds=2).changes == result.changes
    assert len(fake.trained) == 3
    assert store_files(store) == before
    assert run(rounds=3).round == 3
    assert len(fake.trained) == 4


def test_settled_labels_end_the_rounds(fake: FakeNnunet) -> None:
    result = run(rounds=9, all_rounds=False)
    assert result.round == 2, "round 1 moves the propagated labels, round 2 repeats round 1"
    assert "settled" in result.ended
    assert len(fake.trained) == 3, "the last labels are trained on"
    assert run(rounds=9, all_rounds=False).ended == result.ended
    assert len(fake.trained) == 3


def test_a_fall_of_quality_puts_the_better_round_in_force_again(fake: FakeNnunet) -> None:
    def say(case: str, trainings: int) -> np.ndarray:
        return label_array(int(case[-1])) if trainings == 1 else np.roll(label_array(0), 4, axis=1)

    fake.say = say
    store, _ = open_store(601)
    result = run(rounds=5, all_rounds=False)
    assert result.round == store.read_manifest().round == 1
    assert "round 1 is in force again" in result.ended
    assert "train longer" in result.ended
    first, second = result.quality[1], result.quality[2]
    assert first is not None
    assert second is not None
    assert first > second
    model = fake.folder(store.folder.name) / "fold_all" / nnunet.FINAL
    assert model.read_text() == "3", "trained once more on round 1's labels"
    assert fake.labels[-1] == fake.labels[-2]
    for case in CASES[1:]:
        np.testing.assert_array_equal(read(store.fused_path(case)), label_array(int(case[-1])))
        assert store.round_path(2, case).is_file()
    labels = {p.name: p.read_bytes() for p in (store.folder / "labelsTr").iterdir()}
    assert labels == fake.labels[1]
    before = store_files(store)
    run(rounds=5, all_rounds=False)
    assert store_files(store) == before


def test_cases_below_the_threshold_are_left_out_and_listed(fake: FakeNnunet) -> None:
    fake.say = lambda case, _: label_array(int(case[-1])) if case != "case_3" else np.roll(label_array(3), 4, axis=1)
    result = run(rounds=1, min_quality=0.5)
    store, _ = open_store(601)
    assert store.read_manifest().cases["case_3"].status == "gated"
    assert result.doubts[0].case == "case_3"
    assert "left out of training" in result.doubts[0].reason
    assert (read(store.label_path("case_3")) == IGNORE).all()


def test_out_of_fold_labels_come_from_models_that_did_not_see_them(fake: FakeNnunet, roots: Roots) -> None:
    fake.say = drifting
    result = run(rounds=1, num_folds=2)
    assert result.folds == (0, 1)
    assert [fold for fold, _ in fake.trained] == [0, 1, 0, 1]
    store, _ = open_store(601)
    dealt = splits(store.read_manifest(), 2)
    assert json.loads((roots.preprocessed / store.folder.name / "splits_final.json").read_text()) == dealt
    for (_, fold), cases in fake.predicted.items():
        assert cases
        assert not set(cases) & set(dealt[fold]["train"])
    assert sorted(case for cases in fake.predicted.values() for case in cases) == list(CASES[1:])


def test_a_sparse_case_that_every_fold_trains_on_is_predicted_by_all(
    roots: Roots,
    fakes: dict[str, FakePropagator],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    make_sparse(folder := write_raw(roots.raw, cases=CASES))
    propagate(501, 601, propagators=("sam2",), views=("still",), num_processes=1)
    fake = replace_nnunet(roots, monkeypatch)
    run(rounds=1, num_folds=2)
    assert fake.predicted[(1, 0, 1)] == ["case_0"]
    assert "warning: 1 partly drawn cases (case_0) train in every fold" in capsys.readouterr().err
    for case in CASES[1:]:
        write_image(folder / "labelsTr" / f"{case}.nii.gz", label_array(int(case[-1])))
        make_sparse(folder, case)
    run(rounds=1, num_folds=2)
    assert "warning: 5 partly drawn cases" in capsys.readouterr().err, "what was begun so goes on"


def test_folds_that_would_all_train_on_the_same_are_refused(
    roots: Roots, fakes: dict[str, FakePropagator], monkeypatch: pytest.MonkeyPatch, call: Callable[..., Answer]
) -> None:
    folder = write_raw(roots.raw, cases=CASES, annotated=CASES)
    for case in CASES:
        make_sparse(folder, case)
    propagate(501, 601, propagators=("sam2",), views=("still",), num_processes=1)
    fake = replace_nnunet(roots, monkeypatch)
    store, _ = open_store(601)
    dealt = (roots.preprocessed / store.folder.name / "splits_final.json").read_bytes()
    answer = call(cli.refine, "-d", 601, "-c", "2d", "-device", "cpu", "-np", 1, "-num_folds", 2)
    assert store.read_manifest().num_folds == 5, "nnU-Net's own"
    assert (roots.preprocessed / store.folder.name / "splits_final.json").read_bytes() == dealt
    assert begun_plan(store.folder) is None, "refused before anything is noted"
    assert answer.code == 2
    assert "expected -num_folds 2 to hold un-annotated cases out" in answer.error
    assert "leave -num_folds out" in answer.error
    assert not fake.trained
    run(rounds=1)
    assert [fold for fold, _ in fake.trained] == ["all"] * 2


def test_warm_start_takes_the_weights_of_the_round_before(fake: FakeNnunet) -> None:
    fake.say = drifting
    run(rounds=2)
    starts = [start and start.relative_to(start.parents[3]).parts[:2] for _, start in fake.trained]
    assert starts == [None, ("oneshot_rounds", "00"), ("oneshot_rounds", "01")]


def test_a_fold_that_cases_were_dealt_to_anew_begins_with_new_weights(fake: FakeNnunet) -> None:
    """Else its weights would have seen the cases that it is to say something new of."""
    fake.say = drifting
    run(rounds=1, num_folds=2)
    assert [start is not None for _, start in fake.trained] == [False, False, True, True]
    store, _ = open_store(601)
    write_image(store.fused_path("case_1"), label_array(1))
    done = run(rounds=2, num_folds=2)
    assert any("dealt over the folds anew" in line for line in done.taken_up)
    assert all(start is None for _, start in fake.trained[4:6])


def test_weights_that_are_gone_are_told(fake: FakeNnunet) -> None:
    fake.say = drifting
    run(rounds=1)
    store, _ = open_store(601)
    shutil.rmtree(fake.folder(store.folder.name) / "oneshot_rounds" / "00")
    write_image(store.fused_path("case_1"), label_array(1))
    done = run(rounds=1)
    assert any("models of round 0 are gone: round 1 was trained from new weights" in line for line in done.taken_up)
    assert fake.trained[-1] == ("all", None)


def test_what_never_trained_may_begin_otherwise(fake: FakeNnunet) -> None:
    fake.say, fake.stop_at = drifting, 2
    with pytest.raises(KeyboardInterrupt):
        run(rounds=1, warm_start=False)
    run(rounds=1)
    assert fake.trained[-1][1] is not None


def test_from_scratch_takes_no_weights(fake: FakeNnunet) -> None:
    fake.say = drifting
    run(rounds=1, warm_start=False)
    assert [start for _, start in fake.trained] == [None, None]


class Doubter(FakePropagator):
    """Hands on what the model predicts, but for one slice, which it calls background."""

    default_views: tuple[str, ...] = ("still",)

    def fitting_views(self, supports: Sequence[Support]) -> tuple[str, ...]:
        return self.default_views

    def __init__(self, prompter: Propagator, options: PropagatorOptions) -> None:
        super().__init__()
        self.prompter = prompter
        self.options = options

    def propagate(
        self, supports: Sequence[Support], queries: Iterable[Image], views: Sequence[str]
    ) -> Iterator[Propagation]:
        for query in queries:
            self.asked.append(query.case)
            label = next(iter(self.prompter.propagate(supports, [query], ("fused",)))).label
            assert label is not None
            label[0] = 0
            yield Propagation(query.case, "still", label)


@pytest.fixture
def doubters(monkeypatch: pytest.MonkeyPatch) -> list[Doubter]:
    """SAM2 replaced; one doubter for each round."""
    made: list[Doubter] = []

    def make(options: PropagatorOptions, prompter: Propagator) -> Doubter:
        assert options.checkpoint == "builtin"
        made.append(Doubter(prompter, options))
        return made[-1]

    monkeypatch.setattr(second_opinion, "self_prompted", make)
    return made


def test_sam2_prompted_by_the_model_is_one_more_opinion(fake: FakeNnunet, doubters: list[Doubter]) -> None:
    store, _ = open_store(601)
    run(rounds=1, self_opinion="builtin")
    said = label_array(1)
    before = read(store.round_path(0, "case_1"))
    kept, target = read(store.view_path("self_01", "still", "case_1")), read(store.label_path("case_1"))
    np.testing.assert_array_equal(kept, np.concatenate([0 * said[:1], said[1:]]))
    np.testing.assert_array_equal(target, np.where((said == before) & (said == kept), said, IGNORE))
    assert (target[0][said[0] > 0] == IGNORE).all()
    assert [doubter.asked for doubter in doubters] == [list(CASES[1:])]
    run(rounds=1, self_opinion="builtin")
    assert len(doubters) == 1, "a round that is made is not made again"


@pytest.mark.parametrize(
    ("sam2", "settings", "asked", "chosen"),
    [
        (["axial", "coronal", "sagittal"], {}, "auto", "builtin"),
        (["axial", "coronal", "sagittal"], {"checkpoint": "mine.pt"}, "auto", "mine.pt"),
        (["axial", "coronal", "sagittal"], {"window": "abdomen"}, "auto", "builtin"),
        (["axial", "coronal", "sagittal"], {"config": "mine.yaml"}, "auto", None),
        (["axial", "coronal", "sagittal"], {"adapt": 150}, "auto", None),
        (["axial", "coronal", "sagittal"], {}, None, None),
        (["identity", "rot90", "rot180"], {}, "auto", None),
        ([], {}, "auto", None),
        ([], {}, "builtin", "builtin"),
    ],
)
def test_sam2_is_asked_again_where_it_looked_along_three_planes(
    fake: FakeNnunet, sam2: list[str], settings: dict[str, object], asked: str | None, chosen: str | None
) -> None:
    store, _ = open_store(601)
    manifest = store.read_manifest()
    manifest.settings = {"views": {"registration": ["local"], "sam2": sam2}, **settings}
    store.write_manifest(manifest)
    assert second_opinion.opinion_of(store, asked) == chosen


def test_sam2_sees_in_a_round_what_it_saw_before(fake: FakeNnunet, doubters: list[Doubter]) -> None:
    store, _ = open_store(601)
    manifest = store.read_manifest()
    manifest.settings |= {"views": {"sam2": ["axial", "coronal", "sagittal"]}, "window": "abdomen", "channels": "1"}
    store.write_manifest(manifest)
    result = run(rounds=1)
    assert (doubters[0].options.window, doubters[0].options.channels) == ("abdomen", "1")
    assert not result.taken_up


def test_that_sam2_is_not_asked_again_is_said_at_once(fake: FakeNnunet, capsys: pytest.CaptureFixture[str]) -> None:
    store, _ = open_store(601)
    manifest = store.read_manifest()
    manifest.settings |= {"views": {"sam2": ["axial", "coronal", "sagittal"]}, "adapt": 150}
    store.write_manifest(manifest)
    assert second_opinion.why_none(store, None) == []
    fake.stop_at = 1
    with pytest.raises(KeyboardInterrupt):
        run(rounds=0)
    assert "-adapt is not repeated; -self_opinion builtin asks it without" in capsys.readouterr().err
    run(rounds=0)
    assert "not repeated" not in capsys.readouterr().err, "it can no longer be asked"


def test_sam2_is_not_asked_where_the_model_sees_nothing(fake: FakeNnunet, doubters: list[Doubter]) -> None:
    """With nothing to prompt it, SAM2 would look for what the annotated image shows."""
    store, _ = open_store(601)
    fake.say = lambda case, _: label_array(int(case[-1])) * (case != "case_2")
    run(rounds=1, self_opinion="builtin")
    assert doubters[0].asked == ["case_1", "case_3", "case_4"]
    before = read(store.round_path(0, "case_2"))
    np.testing.assert_array_equal(read(store.label_path("case_2")), np.where(before > 0, IGNORE, 0))


def test_a_refinement_that_began_without_an_opinion_goes_on_without(fake: FakeNnunet) -> None:
    run(rounds=1)
    store, _ = open_store(601)
    manifest = store.read_manifest()
    manifest.settings = {"views": {"sam2": ["axial", "coronal", "sagittal"]}}
    store.write_manifest(manifest)
    assert second_opinion.opinion_of(store, "auto") is None


def test_an_opinion_that_was_declined_before_anything_was_trained_may_be_asked(
    fake: FakeNnunet, doubters: list[Doubter]
) -> None:
    """As all else of a plan that was begun and never trained."""
    store, _ = open_store(601)
    manifest = store.read_manifest()
    manifest.settings |= {"views": {"sam2": ["axial", "coronal", "sagittal"]}}
    store.write_manifest(manifest)
    fake.stop_at = 1
    with pytest.raises(KeyboardInterrupt):
        run(rounds=1, self_opinion=None)
    assert run(rounds=1).plan.self_opinion == "builtin"
    assert [doubter.asked for doubter in doubters] == [list(CASES[1:])]


def test_opinions_of_rounds_that_no_longer_count_are_removed(fake: FakeNnunet, doubters: list[Doubter]) -> None:
    """A label of round 1 is corrected after round 2 was predicted and before its labels were made."""
    fake.say, fake.stop_at = drifting, 11
    with pytest.raises(KeyboardInterrupt):
        run(rounds=2, self_opinion="builtin")
    store, _ = open_store(601)
    for folder in (store.folder / "pseudoTr" / "self_02", store.state_folder / "cases" / "self_02"):
        folder.mkdir()
    write_image(store.fused_path("case_3"), label_array(0))
    run(rounds=1, self_opinion="builtin")
    assert store.read_worker("self_01", "case_1") is not None
    assert store.view_path("self_01", "still", "case_1").is_file()
    assert not list(store.folder.rglob("self_02"))


def test_unknown_weights_are_refused_before_anything_is_trained(fake: FakeNnunet) -> None:
    with pytest.raises(PropagationError, match="nowhere"):
        run(rounds=1, self_opinion="nowhere")
    assert not fake.trained


@pytest.mark.parametrize("device", ["cuda", "mps"])
def test_a_device_that_is_not_there_is_said_before_anything_is_done(
    fake: FakeNnunet, roots: Roots, call: Callable[..., Answer], monkeypatch: pytest.MonkeyPatch, device: str
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    before = roots.snapshot()
    answer = call(cli.refine, "-d", 601, "-c", "2d", "-self_opinion", "none", "-device", device)
    assert answer.code == 2
    assert f"for '{device}', found none; use -device cpu" in answer.error
    assert roots.snapshot() == before


@pytest.mark.slow
def test_the_builtin_weights_give_an_opinion(fake: FakeNnunet) -> None:
    store, _ = open_store(601)
    run(rounds=1, self_opinion="builtin")
    record = store.read_worker("self_01", "case_1")
    assert record is not None
    assert record.views
    assert all(view.label for view in record.views.values())


def test_probabilities_for_the_margin_are_gone_when_labels_are_made(fake: FakeNnunet) -> None:
    store, _ = open_store(601)
    run(rounds=1, min_margin=0.7)
    assert (read(store.label_path("case_1")) == IGNORE).all(), "0.6 is the margin everywhere"
    np.testing.assert_array_equal(read(store.fused_path("case_1")), label_array(1))
    assert not list(store.state_folder.rglob("*.npz"))


def test_a_full_disk_is_said_before_anything_is_predicted(fake: FakeNnunet, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = shutil.disk_usage(".")
    with monkeypatch.context() as full:
        full.setattr(shutil, "disk_usage", lambda _: usage._replace(free=10))
        with pytest.raises(OneShotError, match=r"expected \d+\.\d MB of free disk space .* round 1, found 0.0 MB"):
            run(rounds=1)
    assert not fake.predicted
    assert run(rounds=1).round == 1
    assert len(fake.trained) == 2, "nothing was lost"


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT], ids=["no space", "quota"])
def test_a_disk_that_fills_up_ends_with_one_sentence(
    fake: FakeNnunet, monkeypatch: pytest.MonkeyPatch, call: Callable[..., Answer], number: int
) -> None:
    def full(*_: object) -> None:
        raise OSError(number, os.strerror(number), "label.nii.gz")

    monkeypatch.setattr(Store, "write_label", full)
    answer = call(cli.refine, "-d", 601, "-c", "2d", "-device", "cpu", "-np", 1)
    assert answer.code == 2
    assert "expected free disk space for label.nii.gz, found none left" in answer.error


def test_results_that_others_made_are_not_trained_on(fake: FakeNnunet, call: Callable[..., Answer]) -> None:
    (fake.folder(open_store(601)[0].folder.name) / "fold_all").mkdir(parents=True)
    answer = call(cli.refine, "-d", 601, "-c", "2d", "-device", "cpu", "-np", 1)
    assert answer.code == 2
    assert "expected no earlier results" in answer.error
    assert not fake.trained


@pytest.mark.parametrize(
    ("more", "word"), [(("-d", 601, "-p", "nnUNetMyPlans"), "nnUNetMyPlans"), (("-d", 501), "oneshot.json")]
)
def test_plans_and_manifests_that_are_not_there_are_bad_input(
    fake: FakeNnunet, call: Callable[..., Answer], more: tuple[object, ...], word: str
) -> None:
    answer = call(cli.refine, "-c", "2d", "-device", "cpu", "-np", 1, *more)
    assert answer.code == 2
    assert word in answer.error
    assert not fake.trained


def test_other_settings_are_refused(fake: FakeNnunet) -> None:
    run(rounds=0)
    with pytest.raises(OneShotError, match=r"begun there, -num_folds 1, found -num_folds 2; repeat those settings,"):
        run(rounds=0, num_folds=2)


@pytest.mark.parametrize(
    ("bad", "match"),
    [
        ({"rounds": -1}, "-rounds to be 0 or more"),
        ({"num_folds": 6}, "-num_folds from 1 to 5"),
        ({"min_quality": 1.5}, "-min_quality from 0 to 1"),
        ({"min_margin": 1.0}, "-min_margin from 0 to below 1"),
        ({"stop_dice": 95.0}, "-stop_dice above 0 and up to 1, found 95.0"),
        ({"stop_dice": float("nan")}, "-stop_dice above 0 and up to 1, found nan"),
        ({"stop_dice": 0.0}, "-stop_dice above 0 and up to 1, found 0.0"),
    ],
)
def test_bad_settings_are_named(fake: FakeNnunet, bad: dict[str, Any], match: str) -> None:
    with pytest.raises(OneShotError, match=match):
        run(**bad)


def test_a_second_refinement_is_refused_and_the_first_named(fake: FakeNnunet) -> None:
    store, _ = open_store(601)
    with store.lock("refine"), pytest.raises(OneShotError, match=r"refine to run once at a time.*process \d+"):
        run()
    assert not fake.trained


@pytest.mark.parametrize("stop", range(1, 12))
def test_an_interrupted_refinement_ends_as_an_undisturbed_one(fake: FakeNnunet, roots: Roots, stop: int) -> None:
    """Interrupted at every training and prediction in turn; labels are those of a run that was left alone."""
    fake.say, fake.stop_at = drifting, stop
    with pytest.raises(KeyboardInterrupt):
        run(rounds=2)
    run(rounds=2)
    store, _ = open_store(601)
    for number, shift in ((1, 1), (2, 0)):
        for case in CASES[1:]:
            expected = np.roll(label_array(int(case[-1])), shift, axis=2)
            np.testing.assert_array_equal(read(store.round_path(number, case)), expected)
    assert [fold for fold, _ in fake.trained] == ["all"] * 3
    assert [start is not None for _, start in fake.trained] == [False, True, True]
    assert not list((store.state_folder / "tmp").iterdir())


# --- a living project ---------------------------------------------------------------------------------------------


@pytest.fixture
def done(fake: FakeNnunet) -> FakeNnunet:
    """A refinement of one round that has ended."""
    fake.say = drifting
    run(rounds=1)
    return fake


def test_a_new_label_is_taken_up_and_only_the_last_training_repeated(done: FakeNnunet, roots: Roots) -> None:
    folder, drawn = roots.raw / "Dataset501_toy", label_array(2)
    write_image(folder / "labelsTr" / "case_2.nii.gz", drawn)
    result = run(rounds=1)
    store, _ = open_store(601)
    assert result.taken_up[0] == "case_2: drawn by a person since"
    assert "labels of 1 cases changed since round 1" in result.taken_up[1]
    assert store.read_manifest().cases["case_2"].status == "annotated"
    for path in (store.label_path("case_2"), store.fused_path("case_2"), store.round_path(1, "case_2")):
        np.testing.assert_array_equal(read(path), drawn)
    assert len(done.trained) == 3
    assert len(done.predicted) == 1, "round 1's labels of the others stand"
    aside = done.folder(store.folder.name) / "oneshot_rounds" / "01_superseded_1" / "fold_all" / nnunet.FINAL
    assert aside.read_text() == "2"
    assert "case_2" in json.loads((store.folder / "dataset.json").read_text())["oneshot"]["annotated"]
    assert run(rounds=1).taken_up == []
    assert len(done.trained) == 3
    done.predicted.clear()
    run(rounds=2)
    assert done.predicted == {(3, "all"): ["case_1", "case_3", "case_4"]}


@pytest.mark.parametrize("where", ["labelsTr", "pseudoTr/fused"])
def test_a_pseudo_label_corrected_by_hand_is_a_persons_word(done: FakeNnunet, where: str) -> None:
    store, _ = open_store(601)
    drawn = label_array(0)
    write_image(store.folder / where / "case_3.nii.gz", drawn)
    assert run(rounds=1).taken_up[0] == "case_3: corrected by hand"
    run(rounds=3)
    assert store.read_manifest().cases["case_3"].status == "corrected"
    for path in (store.label_path("case_3"), store.fused_path("case_3"), store.round_path(3, "case_3")):
        np.testing.assert_array_equal(read(path), drawn)


def test_a_correction_before_the_first_refinement_is_seen(fake: FakeNnunet) -> None:
    store, _ = open_store(601)
    drawn = np.roll(label_array(0), 2, axis=2)
    write_image(store.label_path("case_3"), drawn)
    assert run(rounds=1).taken_up == ["case_3: corrected by hand"]
    np.testing.assert_array_equal(read(store.label_path("case_3")), drawn)


def test_ignore_in_a_correction_leaves_the_best_guess(done: FakeNnunet) -> None:
    store, _ = open_store(601)
    guess, edited = read(store.fused_path("case_3")), read(store.label_path("case_3"))
    edited[:2], edited[2] = IGNORE, 1
    write_image(store.label_path("case_3"), edited)
    run(rounds=1)
    np.testing.assert_array_equal(read(store.label_path("case_3")), edited)
    expected = np.where(edited == IGNORE, guess, edited)
    np.testing.assert_array_equal(read(store.fused_path("case_3")), expected)


def test_a_new_image_is_labelled_by_the_model_that_there_is(done: FakeNnunet, roots: Roots) -> None:
    folder = roots.raw / "Dataset501_toy"
    write_image(folder / "imagesTr" / "case_5_0000.nii.gz", image_array(5))
    result = run(rounds=1)
    assert result.taken_up[0] == "case_5: a new image"
    assert done.predicted[(2, "all")] == ["case_5"]
    store, _ = open_store(601)
    record = store.read_manifest().cases["case_5"]
    assert (record.status, record.round) == ("pseudo", 1)
    np.testing.assert_array_equal(read(store.label_path("case_5")), drifting("case_5", 2))
    assert "case_5.nii.gz" in done.labels[-1], "and it is trained on"
    run(rounds=2)
    assert "case_5" in done.predicted[(3, "all")]


def test_a_new_image_with_a_label_is_annotated(done: FakeNnunet, roots: Roots) -> None:
    folder = roots.raw / "Dataset501_toy"
    write_image(folder / "imagesTr" / "case_5_0000.nii.gz", image_array(5))
    write_image(folder / "labelsTr" / "case_5.nii.gz", label_array(5))
    assert run(rounds=1).taken_up[0] == "case_5: drawn by a person since"
    assert (1, "all") in done.predicted
    assert (2, "all") not in done.predicted


def test_an_image_that_is_gone_is_said(done: FakeNnunet, roots: Roots) -> None:
    (roots.raw / "Dataset501_toy" / "imagesTr" / "case_4_0000.nii.gz").unlink()
    with pytest.raises(OneShotError, match="put back those that are gone"):
        run(rounds=1)
    with pytest.raises(OneShotError, match="found no images of case_4;"):
        run(rounds=1)
    (roots.raw / "Dataset501_toy" / "imagesTr" / "case_2_0000.nii.gz").unlink()
    with pytest.raises(OneShotError, match="found no images of case_2 and 1 more;"):
        run(rounds=1)


@pytest.mark.parametrize(
    ("command", "arguments"),
    [
        (cli.refine, ("-c", "2d", "-device", "cpu")),
        (cli.report, ()),
        (cli.convert_labels, ("-o", "for_slicer")),
    ],
)
def test_images_whose_dataset_was_renamed_are_missed_by_its_name(
    fake: FakeNnunet, roots: Roots, call: Callable[..., Answer], command: Callable, arguments: tuple[str, ...]
) -> None:
    (roots.raw / "Dataset501_toy").rename(roots.raw / "Dataset501_real")
    answer = call(command, "-d", 601, *arguments)
    assert answer.code == 2
    assert "Dataset601_toy_oneshot: expected Dataset501_toy, the dataset whose images it labels" in answer.error
    assert "found Dataset501_real; put it back there under that name" in answer.error


@pytest.mark.parametrize(
    ("label", "match"), [(label_array(0, (4, 9, 8)), "shape"), (label_array(0) * 3, r"expected label values.*found")]
)
def test_a_correction_that_does_not_fit_is_bad_input(done: FakeNnunet, label: np.ndarray, match: str) -> None:
    store, _ = open_store(601)
    write_image(store.fused_path("case_1"), label)
    with pytest.raises(OneShotError, match=match):
        run(rounds=1)


def test_labels_that_change_amid_a_training_begin_it_again(fake: FakeNnunet, roots: Roots) -> None:
    fake.say, fake.stop_at = drifting, 2
    with pytest.raises(KeyboardInterrupt):
        run(rounds=0)
    store, _ = open_store(601)
    (fake.folder(store.folder.name) / "fold_all").mkdir(parents=True)
    write_image(roots.raw / "Dataset501_toy" / "labelsTr" / "case_1.nii.gz", label_array(1))
    assert any("training it again" in line for line in run(rounds=0).taken_up)
    assert (fake.folder(store.folder.name) / "oneshot_rounds" / "00_superseded_1" / "fold_all").is_dir()


def test_preprocessed_data_that_are_gone_are_made_again(done: FakeNnunet, roots: Roots) -> None:
    shutil.rmtree(roots.preprocessed / "Dataset601_toy_oneshot" / "data")
    assert done.preprocessed == 1
    run(rounds=2)
    assert done.preprocessed == 2


def test_an_older_record_without_the_new_settings_goes_on(done: FakeNnunet) -> None:
    store, _ = open_store(601)
    path = Record(store).path
    content = json.loads(path.read_text())
    del content["labels"], content["plan"]["num_folds"], content["plan"]["warm_start"]
    path.write_text(json.dumps(content))
    run(rounds=2)
    assert len(done.trained) == 3
    assert done.trained[-1] == ("all", None)


def test_a_look_changes_nothing_where_nobody_did(done: FakeNnunet) -> None:
    store, _ = open_store(601)
    before = store_files(store)
    assert refine_changes.take_up(open_dataset(501), store, 1) == []
    assert store_files(store) == before
