"""The output dataset's folder: made, gone on with, emptied for --overwrite, and left alone while others work in it."""

from __future__ import annotations

from pathlib import Path

import pytest
from raw_datasets import Roots

from nnunet_oneshot.dataset import RawDataset, open_dataset
from nnunet_oneshot.errors import OneShotError
from nnunet_oneshot.output import create_output, differences, find_output
from nnunet_oneshot.store import Manifest, Store

SETTINGS = {"views": {"fake": ["still"]}}


@pytest.fixture
def dataset(toy: Path) -> RawDataset:
    return open_dataset(501)


@pytest.fixture
def complete(dataset: RawDataset) -> Store:
    """A finished output dataset with something in it."""
    store = create_output(dataset, 601, SETTINGS, overwrite=False)
    store.write_json({}, store.folder / "labelsTr" / "old.json")
    store.write_manifest(Manifest(source_dataset=dataset.name))
    return store


def test_name_is_the_contracts(dataset: RawDataset, roots: Roots) -> None:
    store = create_output(dataset, 601, SETTINGS, overwrite=False)
    assert store.folder == roots.raw / "Dataset601_toy_oneshot"
    assert (roots.preprocessed / "Dataset601_toy_oneshot").is_dir()


def test_finding_touches_nothing(dataset: RawDataset, roots: Roots) -> None:
    before = roots.snapshot()
    assert find_output(501, 601).folder.name == "Dataset601_toy_oneshot"
    assert roots.snapshot() == before


def test_an_interrupted_run_is_gone_on_with(dataset: RawDataset) -> None:
    first = create_output(dataset, 601, SETTINGS, overwrite=False)
    first.write_json({}, first.worker_path("fake", "case_1"))
    again = create_output(dataset, 601, SETTINGS, overwrite=False)
    assert again.worker_path("fake", "case_1").is_file()


def test_other_settings_do_not_go_on(dataset: RawDataset, roots: Roots) -> None:
    create_output(dataset, 601, SETTINGS, overwrite=False)
    before = roots.snapshot()
    with pytest.raises(OneShotError, match=r"spare.*--overwrite"):
        create_output(dataset, 601, {"views": {"fake": ["spare"]}}, overwrite=False)
    assert roots.snapshot() == before


def test_what_is_other_is_said_and_nothing_else() -> None:
    before = {"views": {"fake": ["still"]}, "mode": "self", "adapt": 9, "annotated": {"a": "1", "b": "1", "c": "1"}}
    now = {"views": {"fake": ["still"]}, "mode": "slice", "annotated": {"a": "1", "b": "2", "d": "1"}}
    assert differences(before, now) == [
        "adapt none instead of 9",
        'mode "slice" instead of "self"',
        "another label of b",
        "no label of c",
        "a new label of d",
    ]


def test_overwrite_removes_old_labels_and_what_nnunet_made_of_them(
    complete: Store, dataset: RawDataset, roots: Roots
) -> None:
    stale = roots.preprocessed / complete.folder.name / "nnUNetPlans.json"
    stale.write_text("{}")
    create_output(dataset, 601, {"views": {"fake": ["spare"]}}, overwrite=True)
    assert not stale.exists()
    assert {p.name for p in complete.folder.iterdir()} == {".oneshot"}


def test_overwrite_waits_for_nobody(complete: Store, dataset: RawDataset, roots: Roots) -> None:
    """A stage at work there keeps its files."""
    with complete.lock("refine"):
        before = roots.snapshot()
        with pytest.raises(OneShotError, match="refine"):
            create_output(dataset, 601, SETTINGS, overwrite=True)
        assert roots.snapshot() == before


@pytest.mark.parametrize("left", [".oneshot", ".oneshot/tmp/half"])
def test_a_run_killed_at_its_very_beginning_is_no_strangers_dataset(
    dataset: RawDataset, roots: Roots, left: str
) -> None:
    (roots.raw / "Dataset601_toy_oneshot" / left).mkdir(parents=True)
    assert create_output(dataset, 601, SETTINGS, overwrite=False).folder.is_dir()


def test_an_interrupted_removal_is_taken_up_again(
    complete: Store, dataset: RawDataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    def killed(path: Path, **_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr("nnunet_oneshot.output.shutil.rmtree", killed)
        with pytest.raises(KeyboardInterrupt):
            create_output(dataset, 601, SETTINGS, overwrite=True)
    assert create_output(dataset, 601, SETTINGS, overwrite=True).folder.is_dir()
    assert not (complete.folder / "labelsTr").exists()
