"""Round 0 by a propagator that costs nothing: what dataset BBB holds, resuming, shards, workers."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path

import numpy as np
import pytest
from conftest import Answer
from fake_propagator import FAILURE, FakePropagator
from raw_datasets import Roots, geometry, label_array, make_sparse, read, write_image, write_raw

from nnunet_oneshot import cli
from nnunet_oneshot.dataset import open_dataset
from nnunet_oneshot.errors import OneShotError
from nnunet_oneshot.output import find_output
from nnunet_oneshot.propagate import Outcome, propagate
from nnunet_oneshot.propagators import PropagatorOptions
from nnunet_oneshot.store import Manifest, Store
from sam2_propagation.interface import Image, Propagation, Propagator, Support

Fakes = dict[str, FakePropagator]
Call = Callable[..., Answer]
IGNORE = 3


def run(output: int = 601, **more: object) -> Outcome:
    return propagate(501, output, **{"propagators": ("fake",), "num_processes": 1, **more})  # type: ignore[arg-type]


def contents(store: Store) -> dict[str, bytes]:
    """All that the contract shows of a dataset: every file but for the working state, which holds seconds."""
    below = {p.relative_to(store.folder): p for p in sorted(store.folder.rglob("*")) if p.is_file()}
    return {str(name): p.read_bytes() for name, p in below.items() if name.parts[0] != ".oneshot"}


def test_the_fake_is_a_propagator() -> None:
    assert isinstance(FakePropagator(), Propagator)


def test_divergence_is_ignore_and_the_best_guess_is_whole(toy: Path, fakes: Fakes) -> None:
    store = run().store
    still = label_array(0)
    agreed = still == np.roll(still, 1, axis=2)
    assert not agreed.all()
    for case in ("case_1", "case_2"):
        np.testing.assert_array_equal(read(store.label_path(case)), np.where(agreed, still, IGNORE))
        for path in (store.fused_path(case), store.round_path(0, case), store.view_path("fake", "still", case)):
            np.testing.assert_array_equal(read(path), still)
        np.testing.assert_array_equal(read(store.view_path("fake", "shifted", case)), np.roll(still, 1, axis=2))


@pytest.mark.parametrize(("recipe", "name"), [("oneseg", "correspondence"), ("ssl_medsam2", "sam2")])
def test_a_recipe_says_which_propagator_carries(toy: Path, fakes: Fakes, call: Call, recipe: str, name: str) -> None:
    assert call(cli.propagate, "-d", 501, "-o", 601, "-recipe", recipe, "-np", 1).code == 0
    assert list(fakes) == [name]


def test_annotated_case_keeps_its_label(toy: Path, fakes: Fakes) -> None:
    store = run().store
    for path in (store.label_path("case_0"), store.fused_path("case_0"), store.round_path(0, "case_0")):
        np.testing.assert_array_equal(read(path), label_array(0))
    assert not store.view_path("fake", "still", "case_0").exists()


def test_files_are_the_contracts(toy: Path, fakes: Fakes) -> None:
    folders = ["labelsTr", "pseudoTr/fused", "pseudoTr/rounds/00"]
    expected = {f"{folder}/case_{i}.nii.gz" for folder in folders for i in range(3)}
    expected |= {f"pseudoTr/fake/{view}/case_{i}.nii.gz" for view in ("still", "shifted") for i in (1, 2)}
    assert set(contents(run().store)) == expected | {"dataset.json", "oneshot.json"}


@pytest.mark.parametrize("ending", [".nii.gz", ".nrrd", ".mha"])
def test_every_label_lies_where_its_image_does(roots: Roots, fakes: Fakes, ending: str) -> None:
    folder = write_raw(roots.raw, ending=ending, apart=("far",))
    store = run().store
    labels = [p for p in store.folder.rglob(f"*{ending}") if ".oneshot" not in p.parts]
    assert len(labels) == 3 * 4 + 2 * 3
    for path in labels:
        case = path.name.removesuffix(ending)
        sub = "imagesUn" if case == "far" else "imagesTr"
        assert geometry(path) == geometry(folder / sub / f"{case}_0000{ending}")


def test_manifest(toy: Path, fakes: Fakes) -> None:
    outcome = run()
    manifest = outcome.store.read_manifest()
    assert manifest == outcome.manifest
    assert (manifest.source_dataset, manifest.round) == ("Dataset501_toy", 0)
    assert {name: record.status for name, record in manifest.cases.items()} == {
        "case_0": "annotated",
        "case_1": "pseudo",
        "case_2": "pseudo",
    }
    record, still = manifest.cases["case_1"], label_array(0)
    assert record.views == ["fake/still", "fake/shifted"]
    assert record.divergence == pytest.approx((still != np.roll(still, 1, axis=2)).mean(), abs=1e-6)
    assert manifest.sources.keys() == {"fake"}
    assert {"nnunetv2", "nnunet-oneshot"} <= manifest.versions.keys()
    assert manifest.settings["views"] == {"fake": ["still", "shifted"]}


def test_a_failed_case_is_said_and_left_out(roots: Roots, fakes: Fakes) -> None:
    write_raw(roots.raw, cases=("case_0", "bad_1", "case_2"))
    outcome = run()
    assert outcome.manifest is not None
    record = outcome.manifest.cases["bad_1"]
    assert (record.status, record.views) == ("failed", [])
    assert record.reason == f"fake: {FAILURE}", "the reason of both views, once"
    assert (read(outcome.store.label_path("bad_1")) == IGNORE).all()
    assert (read(outcome.store.fused_path("bad_1")) == 0).all()
    content = json.loads((outcome.store.folder / "dataset.json").read_text())
    assert content["oneshot"]["left_out"] == ["bad_1"]
    assert "bad_1" in content["dataset"], "every case keeps its entry"
    splits = json.loads((roots.preprocessed / outcome.store.folder.name / "splits_final.json").read_text())
    assert not [fold for fold in splits if "bad_1" in (*fold["train"], *fold["val"])]


def test_a_view_that_failed_is_said_and_not_fused(roots: Roots, fakes: Fakes) -> None:
    write_raw(roots.raw, cases=("case_0", "half_1"))
    outcome = run(views=("still", "shifted", "spare"))
    assert outcome.manifest is not None
    record = outcome.manifest.cases["half_1"]
    assert (record.status, record.reason) == ("pseudo", f"fake: {FAILURE}")
    assert record.views == ["fake/still", "fake/spare"]
    np.testing.assert_array_equal(read(outcome.store.fused_path("half_1")), label_array(0))
    assert not outcome.store.view_path("fake", "shifted", "half_1").exists()


def test_a_view_left_alone_is_no_consensus(roots: Roots, fakes: Fakes) -> None:
    write_raw(roots.raw, cases=("case_0", "half_1"))
    outcome = run()
    assert outcome.manifest is not None
    record = outcome.manifest.cases["half_1"]
    assert (record.status, record.views) == ("failed", [])
    assert record.reason == f"fake: {FAILURE}; only 1 of 2 views gave a label"
    assert (read(outcome.store.label_path("half_1")) == IGNORE).all()


def test_drawn_voxels_of_a_sparse_label_stay_and_the_others_are_filled(toy: Path, fakes: Fakes) -> None:
    drawn = make_sparse(toy)
    outcome = run()
    assert outcome.manifest is not None
    assert outcome.manifest.cases["case_0"].status == "sparse"
    target, guess = read(outcome.store.label_path("case_0")), read(outcome.store.fused_path("case_0"))
    by_hand = drawn != IGNORE
    np.testing.assert_array_equal(target[by_hand], drawn[by_hand])
    np.testing.assert_array_equal(guess[by_hand], drawn[by_hand])
    assert (guess != IGNORE).all()
    # The fake's two views agree on background wherever the support was not annotated.
    assert (target[~by_hand] == 0).all()
    content = json.loads((outcome.store.folder / "dataset.json").read_text())
    assert (content["labels"]["ignore"], content["oneshot"]["annotated"]) == (IGNORE, ["case_0"])


def test_classes_that_are_not_drawn_are_said(toy: Path, fakes: Fakes) -> None:
    drawn = np.where(label_array(0) == 2, 1, label_array(0))
    write_image(toy / "labelsTr/case_0.nii.gz", drawn)
    found = run().warnings
    assert [text for text in found if "no annotated case shows spot" in text], found
    assert "organ" not in "".join(found)
    write_image(toy / "labelsTr/case_1.nii.gz", label_array(1))
    assert run(overwrite=True).warnings == [], "a whole label without a structure is no mistake"
    drawn = make_sparse(toy)
    found = run(overwrite=True).warnings
    assert found == ["1 of 1 partly drawn cases do not show spot (case_0); draw a slice that shows it too"]


def test_one_sparse_case_alone_is_work_enough(roots: Roots, fakes: Fakes) -> None:
    make_sparse(write_raw(roots.raw, cases=("case_0",)))
    outcome = run()
    assert outcome.manifest is not None
    assert outcome.manifest.cases["case_0"].views == ["fake/still", "fake/shifted"]


def test_two_propagators_are_fused(toy: Path, fakes: Fakes) -> None:
    outcome = run(propagators=("fake", "twin"), views=("still", "spare"))
    assert outcome.manifest is not None
    assert outcome.manifest.cases["case_1"].views == ["fake/still", "fake/spare", "twin/still", "twin/spare"]
    assert outcome.manifest.cases["case_1"].divergence == 0


def test_rgb_images_go_all_the_way(roots: Roots, fakes: Fakes) -> None:
    write_raw(roots.raw, ending=".png", channels=3)
    outcome = run()
    label = open_dataset(501).read_label(outcome.store.label_path("case_1"))
    still = label_array(0)[0]
    np.testing.assert_array_equal(label[0], np.where(still == np.roll(still, 1, axis=1), still, IGNORE))


def test_fit_sees_every_image_once_before(toy: Path, fakes: Fakes) -> None:
    run()
    assert fakes["fake"].fitted == ["case_0", "case_1", "case_2"]
    assert fakes["fake"].adapted == ["case_0"], "once, before any case, not once a worker"


def test_learning_is_timed_and_is_not_done_again_for_nothing(toy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Slow(FakePropagator):
        def fit(self, images: Iterable[Image]) -> None:
            time.sleep(0.2)

        def adapt(self, supports: Sequence[Support], views: Sequence[str]) -> None:
            time.sleep(0.2)

    monkeypatch.setattr("nnunet_oneshot.propagators.make_propagator", lambda name, options: Slow(name))
    outcome = run(num_parts=2, part_id=0)
    assert 0.4 <= outcome.preparation < outcome.seconds
    assert run(num_parts=2, part_id=0).preparation == 0


class Interrupted(FakePropagator):
    """Ctrl-C while the second case is labelled, after its first view."""

    def propagate(
        self, supports: Sequence[Support], queries: Iterable[Image], views: Sequence[str]
    ) -> Iterator[Propagation]:
        for result in super().propagate(supports, queries, views):
            yield result
            if len(self.asked) == 2:
                raise KeyboardInterrupt


def test_how_many_cases_each_labels_at_once_is_told(
    roots: Roots, fakes: Fakes, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_raw(roots.raw, cases=("case_0", "case_1"))
    monkeypatch.setattr("nnunet_oneshot.parallel.default_processes", lambda: 16)
    monkeypatch.setattr("nnunet_oneshot.propagate.default_processes", lambda: 1)
    names, options = ("registration", "sam2", "fake_set"), PropagatorOptions(device="cuda")
    outcome = run(propagators=names, views=("still",), options=options, num_processes=None)
    assert outcome.workers == {"registration": 16, "sam2": 2, "fake_set": 1}


def test_an_interrupted_run_goes_on_from_whole_cases(toy: Path, fakes: Fakes, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patched:
        patched.setattr("nnunet_oneshot.propagators.make_propagator", lambda name, options: Interrupted(name))
        with pytest.raises(KeyboardInterrupt):
            run()
    store = find_output(501, 601)
    assert not store.manifest_path.exists(), "nothing tells of a dataset that is not whole"
    first = store.view_path("fake", "still", "case_1").stat()
    outcome = run()
    assert fakes["fake"].asked == ["case_2"]
    assert store.view_path("fake", "still", "case_1").stat().st_mtime_ns == first.st_mtime_ns
    assert contents(outcome.store) == contents(run(602).store)


def _stop_after_the_first_case(monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patched:
        patched.setattr("nnunet_oneshot.propagators.make_propagator", lambda name, options: Interrupted(name))
        with pytest.raises(KeyboardInterrupt):
            run()


@pytest.mark.parametrize("change", ["another label of case_0", "a new label of case_2", "no label of case_0"])
def test_labels_of_two_annotations_are_not_mixed(
    roots: Roots, fakes: Fakes, monkeypatch: pytest.MonkeyPatch, change: str
) -> None:
    names = ("case_0", "case_1", "case_2", "case_3")
    folder = write_raw(roots.raw, cases=names, annotated=("case_0", "case_3"))
    _stop_after_the_first_case(monkeypatch)
    what, _, case = change.rpartition(" label of ")
    if what == "no":
        (folder / "labelsTr" / f"{case}.nii.gz").unlink()
    else:
        write_image(folder / "labelsTr" / f"{case}.nii.gz", np.roll(label_array(0), 1, axis=1))
    before = roots.snapshot()
    with pytest.raises(OneShotError, match=f"found {change}; .*--overwrite"):
        run()
    assert roots.snapshot() == before
    asked = run(overwrite=True).store.read_manifest()
    assert [asked.cases[c].status for c in ("case_1", "case_2")] == [
        "pseudo",
        "annotated" if what == "a new" else "pseudo",
    ]


KILLED = """
import os, signal
from conftest import Answer
from fake_propagator import FakePropagator
from nnunet_oneshot import cli
from nnunet_oneshot import propagators
from nnunet_oneshot.dataset import RawDataset
from nnunet_oneshot.propagate import propagate

def write(self, label, path, like, whole=RawDataset.write_label):
    whole(self, label, path, like)
    if like.name == "case_2":
        os.kill(os.getpid(), signal.SIGKILL)

RawDataset.write_label = write
propagators.make_propagator = lambda name, options: FakePropagator(name)
propagate(501, 601, propagators=("fake",), num_processes=1)
"""


@pytest.mark.slow
def test_a_killed_run_leaves_nothing_half_written(toy: Path, fakes: Fakes) -> None:
    path = os.pathsep.join([str(Path(__file__).parent), *filter(None, sys.path)])
    ended = subprocess.run(
        [sys.executable, "-c", KILLED], env={**os.environ, "PYTHONPATH": path}, capture_output=True, check=False
    )
    assert ended.returncode == -signal.SIGKILL, ended.stderr.decode()
    outcome = run()
    assert fakes["fake"].asked == ["case_2"]
    assert contents(outcome.store) == contents(run(602).store)
    assert list((outcome.store.state_folder / "tmp").iterdir()) == []


@pytest.mark.parametrize("order", [(0, 1), (1, 0)])
def test_shards_in_any_order_make_the_same_dataset(toy: Path, fakes: Fakes, order: tuple[int, int]) -> None:
    first = run(num_parts=2, part_id=order[0])
    assert first.manifest is None
    assert not (first.store.folder / "dataset.json").exists()
    assert fakes["fake"].asked == [f"case_{order[0] + 1}"]
    second = run(num_parts=2, part_id=order[1])
    assert second.manifest is not None
    assert contents(second.store) == contents(run(602).store)


class BesideAnother(FakePropagator):
    """While this shard labels its last case, another one ends and fuses."""

    def propagate(
        self, supports: Sequence[Support], queries: Iterable[Image], views: Sequence[str]
    ) -> Iterator[Propagation]:
        yield from super().propagate(supports, queries, views)
        store = Store(Path(os.environ["nnUNet_raw"]) / "Dataset601_toy_oneshot", ".nii.gz")
        store.write_manifest(Manifest(source_dataset="by the other shard"))


def test_shards_that_end_at_once_fuse_once(toy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("nnunet_oneshot.propagators.make_propagator", lambda name, options: BesideAnother(name))
    outcome = run()
    assert outcome.manifest is not None
    assert outcome.manifest.source_dataset == "by the other shard"


def test_one_that_must_see_all_sees_all_at_once_and_again(
    roots: Roots, fakes: Fakes, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_raw(roots.raw)

    class Once(Interrupted):
        pass

    with monkeypatch.context() as patched:
        patched.setattr("nnunet_oneshot.propagators.make_propagator", lambda name, options: Once(name, whole_set=True))
        with pytest.raises(KeyboardInterrupt):
            run(propagators=("fake_set",))
    run(propagators=("fake_set",))
    assert fakes["fake_set"].asked == ["case_1", "case_2"]


@pytest.mark.slow
def test_workers_make_the_same_dataset(toy: Path, fakes: Fakes) -> None:
    assert contents(run(602, num_processes=2).store) == contents(run().store)
