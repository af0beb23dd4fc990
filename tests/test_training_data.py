"""What nnU-Net reads of dataset BBB: dataset.json and the splits."""

from __future__ import annotations

from pathlib import Path

import pytest
from nnunetv2.utilities.label_handling.label_handling import LabelManager
from nnunetv2.utilities.utils import get_filenames_of_train_images_and_targets
from raw_datasets import LABELS, Roots, edit_json, write_raw

from nnunet_oneshot.dataset import open_dataset
from nnunet_oneshot.settings import parse_block
from nnunet_oneshot.store import CaseRecord, Manifest, Status, Store
from nnunet_oneshot.training_data import dataset_json, ignore_value, preprocessed_folder, splits, write_training_files


def manifest_of(**statuses: Status) -> Manifest:
    return Manifest(source_dataset="x", cases={name: CaseRecord(status=s) for name, s in statuses.items()})


@pytest.fixture
def store(roots: Roots) -> Store:
    return Store(roots.raw / "Dataset601_toy_oneshot", ".nii.gz")


def test_nnunet_finds_images_and_labels(roots: Roots, store: Store) -> None:
    folder = write_raw(roots.raw, channels=2, apart=("far",))
    raw = open_dataset(501)
    write_training_files(raw, store, manifest_of(**{c.name: "pseudo" for c in raw.cases}))
    found = get_filenames_of_train_images_and_targets(str(store.folder))
    assert set(found) == {"case_0", "case_1", "case_2", "far"}
    assert found["case_2"]["images"] == [str(folder / f"imagesTr/case_2_000{c}.nii.gz") for c in (0, 1)]
    assert found["far"]["images"][0] == str(folder / "imagesUn/far_0000.nii.gz")
    assert found["far"]["label"] == str(store.folder / "labelsTr/far.nii.gz")


def test_the_folders_may_move_together(roots: Roots, store: Store, toy: Path) -> None:
    raw = open_dataset(501)
    content = dataset_json(raw, store, manifest_of())
    paths = [p for entry in content["dataset"].values() for p in (*entry["images"], entry["label"])]
    assert not [p for p in paths if Path(p).is_absolute()]


@pytest.mark.parametrize(
    ("labels", "order", "ignore"),
    [
        (LABELS, None, 3),
        ({**LABELS, "ignore": 3}, None, 3),
        ({"background": 0, "whole": [1, 2], "core": [2]}, [1, 2], 3),
    ],
)
def test_nnunet_takes_the_ignore_label(
    toy: Path, store: Store, labels: dict[str, object], order: list[int] | None, ignore: int
) -> None:
    edit_json(toy, labels=labels, regions_class_order=order)
    raw = open_dataset(501)
    content = dataset_json(raw, store, manifest_of())
    manager = LabelManager(content["labels"], content.get("regions_class_order"))
    assert manager.ignore_label == ignore == ignore_value(raw)
    assert manager.has_regions == (order is not None)


def test_all_else_of_the_source_is_kept(toy: Path, store: Store) -> None:
    edit_json(toy, licence="CC0", overwrite_image_reader_writer="SimpleITKIO")
    content = dataset_json(open_dataset(501), store, manifest_of())
    assert (content["licence"], content["overwrite_image_reader_writer"]) == ("CC0", "SimpleITKIO")
    assert (content["file_ending"], content["numTraining"]) == (".nii.gz", 3)


def test_block_says_what_the_trainer_needs(toy: Path, store: Store) -> None:
    manifest = manifest_of(a="annotated", b="sparse", c="pseudo", d="failed", e="gated", f="rejected", g="corrected")
    manifest.round, manifest.weight_by_quality = 2, True
    manifest.cases["c"].quality = {"mean": 0.8, "1": 0.9}
    manifest.cases["d"].quality = {"mean": 0.1}
    content = dataset_json(open_dataset(501), store, manifest)
    assert content["oneshot"] == {
        "schema": 1,
        "round": 2,
        "annotated": ["a", "b", "g"],
        "left_out": ["d", "e", "f"],
        "case_weight": {"c": 0.8},
    }
    block = parse_block(content, list(manifest.cases))
    assert block is not None
    assert block.to_json() == content["oneshot"]


def many(pseudo: int, annotated: int = 1) -> dict[str, Status]:
    return {f"a{i}": "annotated" for i in range(annotated)} | {f"p{i}": "pseudo" for i in range(pseudo)}


@pytest.mark.parametrize("pseudo", [1, 2, 4, 5, 13])
@pytest.mark.parametrize("annotated", [1, 2])
def test_annotated_cases_train_in_every_fold(pseudo: int, annotated: int) -> None:
    cases = many(pseudo, annotated)
    folds = splits(manifest_of(**cases, lost="failed"))
    assert len(folds) == 5
    for fold in folds:
        assert {f"a{i}" for i in range(annotated)} <= set(fold["train"])
        assert fold["val"], "nnU-Net needs a case to validate on"
        assert not set(fold["train"]) & set(fold["val"])
        assert {*fold["train"], *fold["val"]} == set(cases), "a failed case is in neither"
    assert {name for fold in folds for name in fold["val"]} == {c for c in cases if c[0] == "p"}


def test_enough_cases_validate_once_each() -> None:
    validated = [name for fold in splits(manifest_of(**many(13))) for name in fold["val"]]
    assert len(validated) == len(set(validated)) == 13


@pytest.mark.parametrize("statuses", [{"a": "annotated"}, {"a": "annotated", "b": "failed"}, {"a": "sparse"}])
def test_a_single_usable_case_trains_and_validates(statuses: dict[str, Status]) -> None:
    assert splits(manifest_of(**statuses)) == [{"train": ["a"], "val": ["a"]}] * 5


def test_splits_lie_where_nnunet_looks(toy: Path, store: Store, roots: Roots) -> None:
    write_training_files(open_dataset(501), store, manifest_of(**many(2)))
    assert (roots.preprocessed / "Dataset601_toy_oneshot" / "splits_final.json").is_file()
    assert preprocessed_folder(store).name == store.folder.name
