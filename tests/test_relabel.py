"""New labels from predictions: agreement, a person's voxels, failed cases, and being run twice."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from fake_propagator import FakePropagator
from raw_datasets import Roots, geometry, label_array, make_sparse, read, write_image, write_raw

from nnunet_oneshot import rounds
from nnunet_oneshot.dataset import Case, RawDataset, open_dataset
from nnunet_oneshot.errors import OneShotError
from nnunet_oneshot.propagate import propagate
from nnunet_oneshot.quality import estimate
from nnunet_oneshot.quality_gate import needs_review
from nnunet_oneshot.quality_opinions import opinions
from nnunet_oneshot.relabel import Change, Trust, cases_to_predict, margin, mean_dice, relabel
from nnunet_oneshot.rounds import finish_switch, put_in_force
from nnunet_oneshot.store import Status, Store, ViewRecord, WorkerRecord
from sam2_propagation.consensus import fuse

IGNORE = 3
CASES = ("case_0", "bad_1", "case_2")
Made = tuple[RawDataset, Store]


def prepare(annotated: tuple[str, ...] = ("case_0",)) -> Made:
    store = propagate(501, 601, propagators=("fake",), views=("still",), num_processes=1).store
    return open_dataset(501), store


def predict(tmp_path: Path, number: int, **labels: np.ndarray) -> Path:
    folder = tmp_path / f"predictions_{number}"
    for name, label in labels.items():
        write_image(folder / f"{name}.nii.gz", label)
    return folder


@pytest.fixture
def made(roots: Roots, fakes: dict[str, FakePropagator]) -> Made:
    """An annotated, a failed and a pseudo-labelled case."""
    write_raw(roots.raw, cases=CASES)
    return prepare()


@pytest.fixture
def predictions(tmp_path: Path) -> Path:
    """What a model says: all but the propagated label, which lies a voxel beside it."""
    return predict(tmp_path, 1, bad_1=label_array(1), case_2=np.roll(label_array(2), 1, axis=1))


def files(store: Store) -> dict[str, bytes]:
    below = {str(p.relative_to(store.folder)): p for p in store.folder.rglob("*") if p.is_file()}
    return {name: path.read_bytes() for name, path in below.items() if not name.startswith(".oneshot")}


def between(dataset: RawDataset, case: Case, *labels: np.ndarray) -> np.ndarray:
    return fuse(labels, spacing=dataset.image_geometry(case)[1]).label


def test_agreement_is_trained_on_and_disagreement_ignored(made: Made, predictions: Path) -> None:
    dataset, store = made
    before, said = read(store.fused_path("case_2")), read(predictions / "case_2.nii.gz")
    relabel(dataset, store, predictions, 1, 1)
    np.testing.assert_array_equal(read(store.label_path("case_2")), np.where(before == said, said, IGNORE))
    for path in (store.fused_path("case_2"), store.round_path(1, "case_2")):
        np.testing.assert_array_equal(read(path), said)
    np.testing.assert_array_equal(read(store.round_path(0, "case_2")), before)
    record = store.read_manifest().cases["case_2"]
    assert (record.status, record.round) == ("pseudo", 1)
    assert record.divergence == pytest.approx((before != said).mean(), abs=1e-6)
    assert record.views == ["fake/still"]


def test_annotated_case_is_neither_predicted_nor_changed(made: Made, predictions: Path) -> None:
    dataset, store = made
    assert [c.name for c in cases_to_predict(dataset, store.read_manifest())] == ["bad_1", "case_2"]
    whole = store.label_path("case_0").read_bytes()
    relabel(dataset, store, predictions, 1, 1)
    assert store.label_path("case_0").read_bytes() == whole
    np.testing.assert_array_equal(read(store.round_path(1, "case_0")), label_array(0))
    assert store.read_manifest().cases["case_0"].status == "annotated"


def test_a_failed_case_takes_the_models_word(made: Made, predictions: Path, roots: Roots) -> None:
    dataset, store = made
    relabel(dataset, store, predictions, 1, 1)
    np.testing.assert_array_equal(read(store.label_path("bad_1")), label_array(1))
    record = store.read_manifest().cases["bad_1"]
    assert (record.status, record.divergence) == ("pseudo", 0)
    assert "model alone" in str(record.reason)
    assert json.loads((store.folder / "dataset.json").read_text())["oneshot"]["left_out"] == []
    splits = json.loads((roots.preprocessed / store.folder.name / "splits_final.json").read_text())
    assert all("bad_1" in (*fold["train"], *fold["val"]) for fold in splits)


def test_a_label_of_the_model_alone_stays_listed_for_a_person(made: Made, predictions: Path) -> None:
    """In the second round the model repeats what it was taught, which is no better a reason to believe it."""
    dataset, store = made
    for number in (1, 2):
        relabel(dataset, store, predictions, number, 1, min_quality=0)
        doubts = [d for d in needs_review(store.read_manifest(), dataset.class_names) if d.case == "bad_1"]
        assert [doubt.quality for doubt in doubts] == [None], f"round {number}"
        assert "model alone" in doubts[0].reason
        assert "similarity no better than identity" in doubts[0].reason, "why nothing else labelled it"
    manifest = store.read_manifest()
    manifest.cases["bad_1"].status = "accepted"
    assert "bad_1" not in [d.case for d in needs_review(manifest, dataset.class_names)], "a person has looked at it"


def test_round_and_geometry(made: Made, predictions: Path) -> None:
    dataset, store = made
    relabel(dataset, store, predictions, 1, 1)
    assert store.read_manifest().round == 1
    assert json.loads((store.folder / "dataset.json").read_text())["oneshot"]["round"] == 1
    for case in dataset.cases:
        for path in (store.label_path(case.name), store.fused_path(case.name), store.round_path(1, case.name)):
            assert geometry(path) == geometry(case.images[0])


def test_twice_is_once(made: Made, predictions: Path) -> None:
    """A run killed after the labels, but before it was noted that they are made, makes them again."""
    dataset, store = made
    first = relabel(dataset, store, predictions, 1, 1)
    whole = files(store)
    assert relabel(dataset, store, predictions, 1, 1) == first
    assert files(store) == whole


def test_a_run_killed_before_the_manifest_is_repeated(
    made: Made, predictions: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    dataset, store = made

    def killed(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(Store, "write_manifest", killed)
        with pytest.raises(KeyboardInterrupt):
            relabel(dataset, store, predictions, 1, 1)
    half = files(store)
    change = relabel(dataset, store, predictions, 1, 1)
    assert change.number == 1
    assert {n for n, content in files(store).items() if half.get(n) != content} == {"oneshot.json"}


def test_rounds_build_on_each_other(made: Made, predictions: Path, tmp_path: Path) -> None:
    dataset, store = made
    relabel(dataset, store, predictions, 1, 1)
    said = read(predictions / "case_2.nii.gz")
    change = relabel(dataset, store, predict(tmp_path, 2, bad_1=label_array(1), case_2=said), 2, 1)
    assert change.agreement == {"bad_1": 1, "case_2": 1}
    assert change.mean == 1
    np.testing.assert_array_equal(read(store.label_path("case_2")), said)


def test_a_model_that_repeats_itself_is_not_estimated_better(made: Made, predictions: Path, tmp_path: Path) -> None:
    dataset, store = made
    relabel(dataset, store, predictions, 1, 1)
    first = store.read_manifest().cases["case_2"].quality
    assert first is not None
    said = read(predictions / "case_2.nii.gz")
    relabel(dataset, store, predict(tmp_path, 2, bad_1=label_array(1), case_2=said), 2, 1)
    assert store.read_manifest().cases["case_2"].quality == first


def test_change_is_the_dice_to_the_round_before(made: Made, predictions: Path) -> None:
    dataset, store = made
    before, said = read(store.fused_path("case_2")), read(predictions / "case_2.nii.gz")
    change = relabel(dataset, store, predictions, 1, 1)
    assert change.agreement == {"bad_1": 0, "case_2": pytest.approx(mean_dice(said, before))}
    assert change.mean == pytest.approx(mean_dice(said, before) / 2)


def test_drawn_voxels_of_a_sparse_label_never_change(
    roots: Roots, fakes: dict[str, FakePropagator], tmp_path: Path
) -> None:
    drawn = make_sparse(write_raw(roots.raw))
    dataset, store = prepare()
    assert "case_0" in [c.name for c in cases_to_predict(dataset, store.read_manifest())]
    said = np.full_like(drawn, 2)
    relabel(dataset, store, predict(tmp_path, 1, case_0=said, case_1=said, case_2=said), 1, 1)
    by_hand = drawn != IGNORE
    for path in (store.label_path("case_0"), store.fused_path("case_0"), store.round_path(1, "case_0")):
        np.testing.assert_array_equal(read(path)[by_hand], drawn[by_hand])
    assert (read(store.fused_path("case_0"))[~by_hand] == 2).all()
    assert store.read_manifest().cases["case_0"].status == "sparse"


def with_status(store: Store, status: Status) -> None:
    manifest = store.read_manifest()
    manifest.cases["case_2"].status = status
    store.write_manifest(manifest)


def left_out(store: Store) -> list[str]:
    return json.loads((store.folder / "dataset.json").read_text())["oneshot"]["left_out"]


def test_a_rejected_case_stays_all_ignore(made: Made, predictions: Path) -> None:
    dataset, store = made
    with_status(store, "rejected")
    relabel(dataset, store, predictions, 1, 1)
    assert (read(store.label_path("case_2")) == IGNORE).all()
    np.testing.assert_array_equal(read(store.fused_path("case_2")), read(predictions / "case_2.nii.gz"))
    assert left_out(store) == ["case_2"]


def test_a_low_estimate_leaves_a_case_out_until_a_round_lifts_it(made: Made, predictions: Path, tmp_path: Path) -> None:
    dataset, store = made
    relabel(dataset, store, predictions, 1, 1, min_quality=0.99)
    record = store.read_manifest().cases["case_2"]
    assert record.status == "gated"
    assert record.quality is not None
    assert f"estimated Dice {record.quality['mean']:.2f} is below 0.99" in str(record.reason)
    assert left_out(store) == ["case_2"]
    assert (read(store.label_path("case_2")) == IGNORE).all()
    np.testing.assert_array_equal(read(store.fused_path("case_2")), read(predictions / "case_2.nii.gz"))
    said = read(predictions / "case_2.nii.gz")
    relabel(dataset, store, predict(tmp_path, 2, bad_1=label_array(1), case_2=said), 2, 1, min_quality=0.8)
    assert store.read_manifest().cases["case_2"].status == "pseudo"
    assert store.read_manifest().cases["case_2"].reason is None
    assert left_out(store) == []
    np.testing.assert_array_equal(read(store.label_path("case_2")), said)


def test_views_judge_the_models_word(roots: Roots, fakes: dict[str, FakePropagator], tmp_path: Path) -> None:
    """A prediction far from both views is estimated lower than one that repeats them."""
    write_raw(roots.raw)
    store = propagate(501, 601, propagators=("fake",), views=("still", "shifted"), num_processes=1).store
    far, near = np.roll(label_array(1), 3, axis=1), read(store.fused_path("case_2"))
    relabel(open_dataset(501), store, predict(tmp_path, 1, case_1=far, case_2=near), 1, 1)
    qualities = {name: record.quality for name, record in store.read_manifest().cases.items()}
    assert qualities["case_0"] is None
    low, high = qualities["case_1"], qualities["case_2"]
    assert low is not None
    assert high is not None
    assert set(high) == {"mean", "1", "2"}
    assert all(low[key] < high[key] for key in high)


def test_an_earlier_round_is_put_in_force_again_but_for_a_persons_word(
    roots: Roots, fakes: dict[str, FakePropagator], tmp_path: Path
) -> None:
    write_raw(roots.raw)
    dataset, store = prepare()
    shifted = {f"case_{i}": np.roll(label_array(i), i, axis=1) for i in (1, 2)}
    relabel(dataset, store, predict(tmp_path, 1, **shifted), 1, 1)
    first = files(store)
    relabel(dataset, store, predict(tmp_path, 2, case_1=label_array(0), case_2=label_array(0)), 2, 1)
    assert files(store) != first
    put_in_force(dataset, store, 1, 1)
    again = files(store)
    assert {name: again[name] for name in first} == first
    relabel(dataset, store, tmp_path, 2, 1)
    with_status(store, "accepted")
    drawn = store.label_path("case_2").read_bytes()
    put_in_force(dataset, store, 1, 1)
    manifest = store.read_manifest()
    assert (manifest.round, manifest.cases["case_2"].status) == (1, "accepted")
    assert store.label_path("case_2").read_bytes() == drawn
    assert store.label_path("case_1").read_bytes() == first["labelsTr/case_1.nii.gz"]


def test_a_switch_that_was_killed_is_finished(made: Made, predictions: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    dataset, store = made

    def killed(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(rounds, "write_training_files", killed)
        with pytest.raises(KeyboardInterrupt):
            relabel(dataset, store, predictions, 1, 1)
    assert store.read_manifest().round == 0
    finish_switch(dataset, store, 1)
    assert store.read_manifest().round == 1
    whole = files(store)
    finish_switch(dataset, store, 1)
    relabel(dataset, store, predictions, 1, 1)
    assert files(store) == whole


@pytest.mark.parametrize("status", ["accepted", "corrected"])
def test_a_persons_word_outranks_the_models(made: Made, predictions: Path, status: Status) -> None:
    dataset, store = made
    manifest = store.read_manifest()
    manifest.cases["case_2"].status = status
    store.write_manifest(manifest)
    whole = store.label_path("case_2").read_bytes()
    relabel(dataset, store, predictions, 1, 1)
    assert store.label_path("case_2").read_bytes() == whole


def third_opinion(made: Made, case: str, label: np.ndarray | None) -> Trust:
    dataset, store = made
    if label is not None:
        store.write_label(dataset, label, store.view_path("self_01", "axial", case), dataset.case(case))
    views = {"axial": ViewRecord(label=label is not None, reason=None if label is not None else "nothing found")}
    store.write_worker(WorkerRecord(case=case, source="self_01", views=views, seconds=0))
    return Trust(opinion="self_01")


def relabel_with_a_third(made: Made, predictions: Path) -> tuple[np.ndarray, np.ndarray]:
    """Round 1 where SAM2 says something else of case_2 than the model; what the model said of it, and SAM2."""
    said = read(predictions / "case_2.nii.gz")
    third = np.roll(said, 2, axis=2)
    relabel(*made, predictions, 1, 1, min_quality=0, trust=third_opinion(made, "case_2", third))
    return said, third


def test_with_a_third_opinion_all_must_agree_and_the_guess_lies_between_them(made: Made, predictions: Path) -> None:
    dataset, store = made
    case, before = dataset.case("case_2"), read(store.fused_path("case_2"))
    said, third = relabel_with_a_third(made, predictions)
    agreed = (before == said) & (said == third)
    assert 0 < agreed.mean() < 1
    guess = read(store.fused_path(case.name))
    np.testing.assert_array_equal(guess, between(dataset, case, said, third, before))
    assert (guess != said).any()
    np.testing.assert_array_equal(read(store.label_path(case.name)), np.where(agreed, guess, IGNORE))


def test_the_label_before_is_no_evidence_on_the_one_that_it_has_a_voice_in(made: Made, predictions: Path) -> None:
    dataset, store = made
    case, before = dataset.case("case_2"), read(store.fused_path("case_2"))
    said, third = relabel_with_a_third(made, predictions)
    record = store.read_manifest().cases[case.name]
    known = opinions(dataset, store, case.name, record, before)
    assert record.quality == estimate(between(dataset, case, said, third), known)
    assert record.quality != estimate(read(store.fused_path(case.name)), known)


def test_what_nothing_was_carried_to_has_no_voice_beyond_what_was_drawn(
    roots: Roots, fakes: dict[str, FakePropagator], tmp_path: Path
) -> None:
    drawn = make_sparse(write_raw(roots.raw))
    dataset, store = prepare()
    case, said = dataset.case("case_0"), label_array(0)
    third = np.roll(said, 1, axis=1)
    manifest = store.read_manifest()
    manifest.cases[case.name].views = []
    store.write_manifest(manifest)
    assert not read(store.fused_path(case.name))[drawn == IGNORE].any()
    predictions = predict(tmp_path, 1, case_0=said, case_1=said, case_2=said)
    relabel(dataset, store, predictions, 1, 1, min_quality=0, trust=third_opinion((dataset, store), case.name, third))
    expected = dataset.drawn_over(drawn, between(dataset, case, said, third))
    np.testing.assert_array_equal(read(store.fused_path(case.name)), expected)


def test_a_rejected_label_has_no_voice(made: Made, predictions: Path) -> None:
    dataset, store = made
    case = dataset.case("case_2")
    with_status(store, "rejected")
    said, third = relabel_with_a_third(made, predictions)
    np.testing.assert_array_equal(read(store.fused_path(case.name)), between(dataset, case, said, third))


def test_a_third_opinion_that_failed_changes_nothing(made: Made, predictions: Path) -> None:
    dataset, store = made
    said = read(predictions / "case_2.nii.gz")
    relabel(dataset, store, predictions, 1, 1, trust=third_opinion(made, "case_2", None))
    np.testing.assert_array_equal(read(store.fused_path("case_2")), said)


def write_probabilities(predictions: Path, case: str, unsure: tuple[slice, ...]) -> None:
    label = read(predictions / f"{case}.nii.gz")
    sure = np.eye(3, dtype=np.float32)[label].transpose(3, 0, 1, 2)
    found = np.where(sure > 0, 0.9, 0.05)
    found[(slice(None), *unsure)] = np.where(sure > 0, 0.5, 0.25)[(slice(None), *unsure)]
    np.savez(predictions / f"{case}.npz", probabilities=found)


def test_a_low_margin_is_ignored_and_stays_the_best_guess(made: Made, predictions: Path) -> None:
    dataset, store = made
    unsure = (slice(1, 3), slice(None), slice(0, 4))
    for case in ("bad_1", "case_2"):
        write_probabilities(predictions, case, unsure)
    before, said = read(store.fused_path("case_2")), read(predictions / "case_2.nii.gz")
    relabel(dataset, store, predictions, 1, 1, trust=Trust(min_margin=0.5))
    expected = np.where(before == said, said, IGNORE)
    expected[unsure] = IGNORE
    np.testing.assert_array_equal(read(store.label_path("case_2")), expected)
    np.testing.assert_array_equal(read(store.fused_path("case_2")), said)
    alone = label_array(1).copy()
    alone[unsure] = IGNORE
    np.testing.assert_array_equal(read(store.label_path("bad_1")), alone)


def test_a_margin_needs_probabilities(made: Made, predictions: Path) -> None:
    dataset, store = made
    with pytest.raises(OneShotError, match=r"expected the probabilities .*\.npz"):
        relabel(dataset, store, predictions, 1, 1, trust=Trust(min_margin=0.5))


def test_margin_of_classes_and_of_regions() -> None:
    probabilities = np.array([0.5, 0.3, 0.2], np.float32).reshape(3, 1, 1, 1)
    assert margin(probabilities, regions=False).item() == pytest.approx(0.2)
    assert margin(probabilities, regions=True).item() == pytest.approx(0.0)
    assert margin(np.array([0.9, 0.2]).reshape(2, 1, 1, 1), regions=True).item() == pytest.approx(0.6)


def test_a_missing_prediction_is_said(made: Made, predictions: Path) -> None:
    (predictions / "case_2.nii.gz").unlink()
    with pytest.raises(OneShotError, match=r"case_2\.nii\.gz, found none"):
        relabel(*made, predictions, 1, 1)
    assert made[1].read_manifest().round == 0


def test_a_prediction_of_another_shape_is_said(made: Made, predictions: Path) -> None:
    write_image(predictions / "case_2.nii.gz", label_array(0, (4, 9, 8)))
    with pytest.raises(OneShotError, match="shape"):
        relabel(*made, predictions, 1, 1)


def test_mean_dice() -> None:
    first, second = np.array([[[0, 1, 1, 2]]], np.int16), np.array([[[0, 1, 2, 2]]], np.int16)
    assert mean_dice(first, second) == pytest.approx((2 / 3 + 2 / 3) / 2)
    assert mean_dice(first, 0 * first) == 0
    assert mean_dice(0 * first, 0 * first) == 1
    assert Change(1, {}).mean == 1
