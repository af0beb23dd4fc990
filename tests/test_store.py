"""The store: atomic writes, the manifest's schema, locks and leftovers."""

from __future__ import annotations

import errno
import json
import os
import socket
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from full_disk import files_end_at
from raw_datasets import SHAPE, Roots, write_raw

from nnunet_oneshot.dataset import RawDataset, open_dataset
from nnunet_oneshot.errors import OneShotError
from nnunet_oneshot.store import CaseRecord, Manifest, Source, Store, ViewRecord, WorkerRecord, read_manifest

LABEL = np.ones(SHAPE, np.int16)


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(tmp_path / "Dataset601_toy_oneshot", ".nii.gz")


@pytest.fixture
def manifest() -> Manifest:
    record = CaseRecord(status="pseudo", views=["fake/still"], divergence=0.25, quality={"mean": 0.8, "1": 0.7})
    return Manifest(source_dataset="Dataset501_toy", sources={"fake": Source(checkpoint="x")}, cases={"a": record})


def files(store: Store) -> set[str]:
    """Files below the store's folder but for its working state."""
    below = (p.relative_to(store.folder) for p in store.folder.rglob("*") if p.is_file())
    return {str(p) for p in below if p.parts[0] != ".oneshot"}


def test_paths_are_the_contracts(store: Store) -> None:
    paths = [
        store.label_path("a"),
        store.fused_path("a"),
        store.round_path(3, "a"),
        store.view_path("sam2", "rot90", "a"),
        store.worker_path("sam2", "a"),
        store.manifest_path,
    ]
    assert [str(p.relative_to(store.folder)) for p in paths] == [
        "labelsTr/a.nii.gz",
        "pseudoTr/fused/a.nii.gz",
        "pseudoTr/rounds/03/a.nii.gz",
        "pseudoTr/sam2/rot90/a.nii.gz",
        ".oneshot/cases/sam2/a.json",
        "oneshot.json",
    ]


def test_manifest_survives_the_disk(store: Store, manifest: Manifest) -> None:
    store.write_manifest(manifest)
    assert store.read_manifest() == manifest
    content = json.loads(store.manifest_path.read_text())
    assert content["schema"] == 1
    assert content["cases"]["a"]["quality"] == {"mean": 0.8, "1": 0.7}
    assert content["cases"]["a"]["reason"] is None


def test_every_field_is_documented() -> None:
    schemas = [model.model_json_schema() for model in (Manifest, WorkerRecord)]
    models = [model for schema in schemas for model in (schema, *schema["$defs"].values())]
    assert [name for m in models for name, field in m["properties"].items() if not field.get("description")] == []


def test_fields_of_a_later_release_are_kept(store: Store, manifest: Manifest) -> None:
    content = manifest.model_dump(by_alias=True)
    content["later"], content["cases"]["a"]["also_later"] = 1, [2]
    store.write_json(content, store.manifest_path)
    store.write_manifest(store.read_manifest())
    again = json.loads(store.manifest_path.read_text())
    assert (again["later"], again["cases"]["a"]["also_later"]) == (1, [2])


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ('{"schema": 2, "source_dataset": "x"}', ("schema 2", "newer")),
        ('{"schema": 1}', ("source_dataset",)),
        ('{"schema": 1, "source_dataset": "x", "cases": {"a": {"status": "perhaps"}}}', ("oneshot.json",)),
        ("{", ("oneshot.json",)),
        ("[]", ("oneshot.json",)),
        (None, ("no such file",)),
    ],
)
def test_unreadable_manifest_is_said(tmp_path: Path, content: str | None, words: tuple[str, ...]) -> None:
    path = tmp_path / "oneshot.json"
    if content is not None:
        path.write_text(content)
    with pytest.raises(OneShotError) as caught:
        read_manifest(path)
    assert all(word in str(caught.value) for word in (*words, "expected", "found"))


def test_worker_record_survives_the_disk(store: Store) -> None:
    record = WorkerRecord(case="a", source="fake", views={"still": ViewRecord(label=False, reason="why")}, seconds=1.5)
    assert store.read_worker("fake", "a") is None
    store.write_worker(record)
    assert store.read_worker("fake", "a") == record


@pytest.fixture
def dataset(roots: object, toy: Path) -> RawDataset:
    return open_dataset(501)


def test_a_failing_writer_leaves_nothing(store: Store, dataset: RawDataset, monkeypatch: pytest.MonkeyPatch) -> None:
    case, path = dataset.cases[1], store.label_path("case_1")
    store.write_label(dataset, LABEL, path, case)
    whole = path.read_bytes()

    def half(self: object, label: np.ndarray, target: Path, like: object) -> None:
        Path(target).write_bytes(b"half")
        raise OSError("disk full")

    monkeypatch.setattr(RawDataset, "write_label", half)
    for name in ("case_1", "case_2"):
        with pytest.raises(OSError, match="disk full"):
            store.write_label(dataset, LABEL, store.label_path(name), case)
    assert files(store) == {"labelsTr/case_1.nii.gz"}
    assert path.read_bytes() == whole
    assert list((store.state_folder / "tmp").iterdir()) == []


@pytest.mark.parametrize("ending", [".nii.gz", ".nrrd", ".mha"])
def test_a_label_that_a_full_disk_cuts_short_is_said_and_never_in_place(
    roots: Roots, store: Store, ending: str
) -> None:
    """SimpleITK says nothing of a NIfTI file that it could not write whole, and reads it as another label."""
    write_raw(roots.raw, ending=ending)
    dataset, of_kind = open_dataset(501), Store(store.folder, ending)
    noise = np.random.default_rng(0).integers(0, 3, SHAPE).astype(np.int16)
    path, case = of_kind.label_path("case_1"), dataset.case("case_1")
    of_kind.write_label(dataset, noise, path, case)
    size, whole = path.stat().st_size, path.read_bytes()
    for limit in (0, size // 2, size - 20):
        with files_end_at(limit), pytest.raises(OneShotError, match=r"expected .* whole, found it cut .*; free some"):
            of_kind.write_label(dataset, noise, path, case)
    assert path.read_bytes() == whole
    assert files(of_kind) == {f"labelsTr/case_1{ending}"}


def test_a_failing_json_leaves_the_old_one(store: Store) -> None:
    path = store.folder / "dataset.json"
    store.write_json({"a": 1}, path)
    with pytest.raises(TypeError):
        store.write_json({"a": object()}, path)
    assert json.loads(path.read_text()) == {"a": 1}
    assert files(store) == {"dataset.json"}


def test_json_reaches_another_folder(store: Store, tmp_path: Path) -> None:
    """splits_final.json stands in nnUNet_preprocessed, maybe on another file system."""
    target = tmp_path / "preprocessed" / "splits_final.json"
    store.write_json([1], target)
    assert json.loads(target.read_text()) == [1]
    assert [p.name for p in target.parent.iterdir()] == ["splits_final.json"]


def test_json_reaches_another_file_system(store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def replace(source: Path, path: Path) -> None:
        if Path(source).parent != Path(path).parent:
            raise OSError(errno.EXDEV, os.strerror(errno.EXDEV))
        put(source, path)

    put, target = os.replace, tmp_path / "preprocessed" / "splits_final.json"
    monkeypatch.setattr(os, "replace", replace)
    store.write_json([1], target)
    assert json.loads(target.read_text()) == [1]
    assert [p.name for p in target.parent.iterdir()] == ["splits_final.json"]


def test_shards_that_write_one_file_at_once_all_go_on(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    """As the jobs of a cluster's array that begin a dataset together."""
    path, put, inner = store.folder / "settings.json", os.replace, [True]

    def replace(source: Path, destination: Path) -> None:
        if inner and inner.pop():
            store.write_json({"shard": 2}, path)
        put(source, destination)

    monkeypatch.setattr(os, "replace", replace)
    store.write_json({"shard": 1}, path)
    assert json.loads(path.read_text()) == {"shard": 1}
    assert files(store) == {"settings.json"}


def test_side_files_come_with_the_label(roots: object, store: Store) -> None:
    folder = write_raw(roots.raw, ending=".tiff")  # type: ignore[attr-defined]
    (folder / "imagesTr/case_1.json").write_text('{"spacing": [3.0, 1.1, 0.8]}')
    dataset, of_tif = open_dataset(501), Store(store.folder, ".tiff")
    of_tif.write_label(dataset, LABEL, of_tif.label_path("case_1"), dataset.case("case_1"))
    assert files(of_tif) == {"labelsTr/case_1.tiff", "labelsTr/case_1.json"}
    assert dataset.label_geometry(of_tif.label_path("case_1")) == dataset.image_geometry(dataset.case("case_1"))


def test_second_holder_is_refused_with_the_firsts_name(store: Store) -> None:
    with store.lock("refine"):
        with pytest.raises(OneShotError, match=f"process {os.getpid()}"), Store(store.folder, "").lock("refine"):
            pytest.fail("held twice")
        with store.lock("propagate-0-of-2"), store.lock("propagate-1-of-2"):
            pass
    with store.lock("refine"):
        pass


def test_idle_means_no_lock_is_held(store: Store) -> None:
    store.check_idle()
    with store.lock("propagate-1-of-2"), pytest.raises(OneShotError, match="propagate-1-of-2"):
        store.check_idle()
    store.check_idle()


def test_a_lock_dies_with_its_process(store: Store) -> None:
    """A killed run must not lock its user out."""
    code = (
        "import sys; from filelock import FileLock; lock = FileLock(sys.argv[1]); lock.acquire(); "
        "print('held', flush=True); sys.stdin.read()"
    )
    path = store.state_folder / "locks" / "refine.lock"
    path.parent.mkdir(parents=True)
    with subprocess.Popen(
        [sys.executable, "-c", code, str(path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, encoding="utf-8"
    ) as holder:
        assert holder.stdout is not None
        assert holder.stdout.readline() == "held\n"
        with pytest.raises(OneShotError), store.lock("refine"):
            pytest.fail("held twice")
        holder.kill()
        holder.wait()
    with store.lock("refine"):
        pass


def test_leftovers_of_dead_processes_go_those_of_living_ones_and_other_machines_stay(store: Store) -> None:
    tmp = store.state_folder / "tmp"
    with subprocess.Popen([sys.executable, "-c", ""]) as gone:
        gone.wait()
    host = socket.gethostname()
    dead, other = tmp / f"{host}-{gone.pid}-abc", tmp / f"elsewhere-{gone.pid}-abc"
    for folder in (dead, other):
        folder.mkdir(parents=True)
        (folder / "half.nii.gz").write_text("half")
    with store.temporary_folder() as living:
        store.remove_leftovers()
        assert (living.exists(), other.exists(), dead.exists()) == (True, True, False)


def test_leftovers_of_another_machine_go_when_nothing_changed_in_them_for_long(store: Store) -> None:
    """A container has another name each time."""
    now, folders = time.time(), {}
    for name, ages in {"old": (40, 40), "folder of a living one": (40, 20), "new file": (20, 40)}.items():
        folder = folders[name] = store.state_folder / "tmp" / f"c0ffee-7-{name.replace(' ', '')}"
        folder.mkdir(parents=True)
        (folder / "half.nii.gz").write_text("half")
        for path, age in zip((folder / "half.nii.gz", folder), ages, strict=True):
            os.utime(path, (now - age * 86400,) * 2)
    store.remove_leftovers()
    assert [name for name, folder in folders.items() if folder.exists()] == ["folder of a living one", "new file"]


def test_on_windows_nobody_is_asked_by_a_signal(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    """`os.kill(process, 0)` would be Ctrl-C for whoever has that number."""

    def refuse(*_: object) -> None:
        pytest.fail("a signal was sent")

    monkeypatch.setattr(sys, "platform", "win32")
    monkeypatch.setattr(os, "kill", refuse)
    left = store.state_folder / "tmp" / f"{socket.gethostname()}-{os.getpid()}-abc"
    left.mkdir(parents=True)
    store.remove_leftovers()
    assert left.exists()
