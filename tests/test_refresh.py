"""New labels in nnU-Net's preprocessed data: equal to a full preprocessing, and no more work than needed."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import blosc2
import numpy as np
import pytest
from batchgenerators.utilities.file_and_folder_operations import load_pickle
from cropped_dataset import (
    CASES,
    NAME,
    REGIONS,
    SPACINGS,
    THICK,
    add_lowres,
    image_of,
    label_of,
    prepare,
    preprocess_fully,
    write,
    write_image,
    write_label,
)
from full_disk import files_end_at
from nnunetv2.training.dataloading.nnunet_dataset import nnUNetDatasetBlosc2
from raw_datasets import Roots
from tiny_dataset import LABELS

from nnunet_oneshot import refresh as refresh_module
from nnunet_oneshot import refresh_case
from nnunet_oneshot.errors import OneShotError
from nnunet_oneshot.refresh import Refreshed, note_preprocessed, preprocessed_targets, raw_label_hashes, refresh
from nnunet_oneshot.refresh_ledger import Ledger
from nnunet_oneshot.settings import SMALL_PLANS

CUT_SHORT = r".b2nd: expected the file to be written whole, found it cut short .*; free some space"


def content(base: Path) -> dict[str, Any]:
    """nnU-Net's arrays with their layout, bytes of true labels, what the pickled properties hold.

    Not the bytes of the arrays' files: several threads write them, and blocks come in any order.
    """
    files = [p for p in base.rglob("*") if p.is_file() and not p.name.startswith(("oneshot", ".oneshot"))]
    files = [p for p in files if refresh_case.MASKS not in p.parts]
    return {str(p.relative_to(base)): loaded(p) for p in files}


def loaded(path: Path) -> Any:
    if path.suffix == ".pkl":
        return plain(load_pickle(str(path)))
    if path.suffix != ".b2nd":
        return path.read_bytes()
    array = blosc2.open(urlpath=str(path), mode="r")
    return array.chunks, array.blocks, str(array.cparams.filters), str(array.cparams.codec), plain(array[:])


def plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: plain(v) for key, v in value.items()}
    if isinstance(value, np.ndarray):
        return (str(value.dtype), value.tolist())
    return [plain(v) for v in value] if isinstance(value, list | tuple) else value


def relabel_all(folder: Path, shape: tuple[int, int, int], spacings: tuple[tuple[float, ...], ...], top: int) -> None:
    for index, case in enumerate(CASES):
        label = label_of(index + 5, shape, seed=1)
        write_label(folder, case, np.where(label > top, 0, label).astype(np.int16), spacings[index])


@pytest.mark.parametrize(
    ("shape", "spacings", "labels", "more", "configurations"),
    [
        ((12, 26, 22), SPACINGS, LABELS, {}, ("3d_fullres", "2d")),
        ((9, 26, 22), THICK, LABELS, {}, ("3d_fullres",)),
        ((12, 26, 22), SPACINGS, REGIONS, {"regions_class_order": [1, 2]}, ("3d_fullres",)),
        ((12, 26, 22), SPACINGS, {"background": 0, "a": 1, "b": 2, "c": 3}, {}, ("3d_fullres",)),
        ((1, 40, 36), ((1.0, 1.0, 1.0),) * 3, LABELS, {}, ("2d",)),
    ],
    ids=["cropped and resampled", "anisotropic", "regions with ignore", "no ignore", "2D"],
)
def test_equals_a_full_preprocessing(
    roots: Roots,
    shape: tuple[int, int, int],
    spacings: tuple[tuple[float, ...], ...],
    labels: Mapping[str, Any],
    more: Mapping[str, Any],
    configurations: tuple[str, ...],
) -> None:
    folder = write(roots, shape, spacings, labels, **more)
    base = prepare(roots, configurations)
    if configurations == ("3d_fullres",):
        add_lowres(base)
        preprocess_fully(base)
    old = content(base)
    relabel_all(folder, shape, spacings, top=3)
    assert refresh(NAME, 1).labels == CASES
    refreshed = content(base)
    preprocess_fully(base)
    full = content(base)
    assert refreshed.keys() == full.keys()
    assert [name for name in full if full[name] != refreshed[name]] == []
    changed = {name for name in full if full[name] != old[name]}
    assert len(changed) == len(CASES) * (1 + 2 * len(preprocessed_targets(base)))
    assert not [name for name in changed if name.endswith(".b2nd") and not name.endswith("_seg.b2nd")]


def test_a_label_that_lost_a_class_keeps_no_locations_of_it(roots: Roots) -> None:
    folder = write(roots)
    base = prepare(roots, ("3d_fullres",))
    relabel_all(folder, (12, 26, 22), SPACINGS, top=1)
    refresh(NAME, 1)
    target = preprocessed_targets(base)[0]
    assert len(load_pickle(str(target.files("case_a")[2]))["class_locations"][2]) == 0


@pytest.fixture
def ready(roots: Roots) -> tuple[Path, Path]:
    """A raw dataset, preprocessed for 3d_fullres and known to the ledger; its two folders."""
    folder = write(roots)
    base = prepare(roots, ("3d_fullres",))
    note_preprocessed(NAME, SMALL_PLANS, ["3d_fullres"], raw_label_hashes(NAME))
    return folder, base


def whole_files(base: Path) -> dict[str, int]:
    return {str(p): p.stat().st_mtime_ns for p in base.rglob("*") if p.suffix in (".b2nd", ".pkl")}


def test_only_changed_cases_are_touched(ready: tuple[Path, Path]) -> None:
    folder, base = ready
    before = whole_files(base)
    assert refresh(NAME, 1) == Refreshed(kept=3)
    assert whole_files(base) == before
    write_label(folder, "case_b", label_of(9, (12, 26, 22)), SPACINGS[1])
    assert refresh(NAME, 1) == Refreshed(labels=("case_b",), kept=2)
    touched = {name for name, time in whole_files(base).items() if before[name] != time}
    assert {Path(name).name for name in touched} == {"case_b_seg.b2nd", "case_b.pkl"}
    assert refresh(NAME, 1) == Refreshed(kept=3)


def test_what_nnunet_made_for_one_configuration_says_nothing_of_another(roots: Roots) -> None:
    """Labels changed, and nnU-Net's own command brought one configuration up to date: the other one is behind."""
    folder = write(roots)
    base = prepare(roots, ("3d_fullres", "2d"))
    refresh(NAME, 1)
    relabel_all(folder, (12, 26, 22), SPACINGS, top=3)
    flat = next(target for target in preprocessed_targets(base) if target.folder.name.endswith("2d"))
    kept = base / "kept"
    shutil.copytree(flat.folder, kept)
    preprocess_fully(base)
    full = content(base)
    shutil.rmtree(flat.folder)
    kept.rename(flat.folder)
    note_preprocessed(NAME, SMALL_PLANS, ["3d_fullres"], raw_label_hashes(NAME))
    assert refresh(NAME, 1).labels == CASES
    assert content(base) == {name: value for name, value in full.items() if not name.startswith("kept")}


def test_a_label_edited_during_a_full_preprocessing_is_brought_in(roots: Roots) -> None:
    """nnU-Net read the old one."""
    folder = write(roots)
    labels = raw_label_hashes(NAME)
    prepare(roots, ("3d_fullres",))
    write_label(folder, "case_b", label_of(9, (12, 26, 22)), SPACINGS[1])
    note_preprocessed(NAME, SMALL_PLANS, ["3d_fullres"], labels)
    assert refresh(NAME, 1) == Refreshed(labels=("case_b",), kept=2)


def test_the_image_is_read_once(ready: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    folder, _ = ready
    relabel_all(folder, (12, 26, 22), SPACINGS, top=3)
    refresh(NAME, 1)

    def forbid(*_: object) -> None:
        raise AssertionError("an image was read again")

    monkeypatch.setattr(refresh_case, "_made", forbid)
    relabel_all(folder, (12, 26, 22), SPACINGS, top=2)
    assert refresh(NAME, 1).labels == CASES


def test_new_changed_and_removed_images(ready: tuple[Path, Path]) -> None:
    folder, base = ready
    target = preprocessed_targets(base)[0]
    path, later = folder / "imagesTr" / "case_a_0000.nii.gz", 10**9
    write_image(folder, "case_a", image_of(7, (12, 26, 22)), SPACINGS[0])
    os.utime(path, ns=(path.stat().st_atime_ns, path.stat().st_mtime_ns + later))
    write_image(folder, "case_d", image_of(3, (10, 26, 22)), SPACINGS[2])
    write_label(folder, "case_d", label_of(3, (10, 26, 22)), SPACINGS[2])
    dataset_json = json.loads((folder / "dataset.json").read_text())
    listed = dataset_json["dataset"]
    del listed["case_b"]
    listed["case_d"] = {"images": ["imagesTr/case_d_0000.nii.gz"], "label": "labelsTr/case_d.nii.gz"}
    (folder / "dataset.json").write_text(json.dumps(dataset_json))
    assert refresh(NAME, 1) == Refreshed(whole=("case_a", "case_d"), kept=1, removed=("case_b",))
    known = {p.name for p in target.folder.iterdir()}
    assert known == {f"case_{c}{e}" for c in "acd" for e in refresh_case.DATA_FILES}
    refreshed = content(base)
    preprocess_fully(base)
    assert content(base) == refreshed


def test_other_plans_make_every_case_anew(ready: tuple[Path, Path]) -> None:
    _, base = ready
    path = next(base.glob("*Plans.json"))
    plans = json.loads(path.read_text())
    plans["configurations"]["3d_fullres"]["spacing"] = [2.0, 2.0, 2.0]
    path.write_text(json.dumps(plans))
    assert refresh(NAME, 1).whole == CASES
    refreshed = content(base)
    preprocess_fully(base)
    assert content(base) == refreshed


@pytest.mark.parametrize("stop", [1, 2, 3, 4, 5, 6])
def test_an_interrupted_refresh_is_repaired_by_the_next(
    ready: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch, stop: int
) -> None:
    """Stopped before each of its replacements in turn; what is in place is always whole."""
    folder, base = ready
    relabel_all(folder, (12, 26, 22), SPACINGS, top=3)
    calls = []

    def counted(source: str, destination: str) -> None:
        calls.append(destination)
        if len(calls) == stop:
            raise KeyboardInterrupt
        os.rename(source, destination)

    with monkeypatch.context() as patched:
        patched.setattr(refresh_case.os, "replace", counted)
        with pytest.raises(KeyboardInterrupt):
            refresh(NAME, 1)
    refresh(NAME, 1)
    refreshed = content(base)
    preprocess_fully(base)
    assert content(base) == refreshed
    assert not list(base.glob(f"{refresh_case.TEMPORARY}*"))


@pytest.mark.parametrize("whole", [False, True], ids=["label", "whole case"])
def test_what_a_full_disk_cuts_short_is_said_and_never_in_place(
    ready: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch, whole: bool
) -> None:
    """Blosc2 says nothing of what is still in a buffer when a file is closed."""
    folder, base = ready
    relabel_all(folder, (12, 26, 22), SPACINGS, top=3)
    monkeypatch.setattr(refresh_case.Tools, "takes_labels_alone", not whole)
    before, save = content(base), nnUNetDatasetBlosc2.save_case

    def cut(data: np.ndarray, seg: np.ndarray, properties: object, name: str, **more: Any) -> None:
        save(data, seg, properties, name, **more)
        os.truncate(f"{name}_seg.b2nd", os.path.getsize(f"{name}_seg.b2nd") - 1)

    with monkeypatch.context() as patched:
        patched.setattr(nnUNetDatasetBlosc2, "save_case", cut)
        with pytest.raises(OneShotError, match=CUT_SHORT):
            refresh(NAME, 1)
        patched.setattr(Ledger, "write", lambda _: None)
        with files_end_at(0), pytest.raises(OneShotError, match=CUT_SHORT):
            refresh(NAME, 1)
    assert content(base) == before
    assert not list(base.glob(f"{refresh_case.TEMPORARY}*"))
    refresh(NAME, 1)
    refreshed = content(base)
    preprocess_fully(base)
    assert content(base) == refreshed


def test_what_a_killed_run_left_is_removed(ready: tuple[Path, Path]) -> None:
    _, base = ready
    (base / f"{refresh_case.TEMPORARY}abc").mkdir()
    refresh(NAME, 1)
    assert not list(base.glob(f"{refresh_case.TEMPORARY}*"))


@pytest.mark.slow
def test_in_workers_the_same(ready: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    folder, base = ready
    relabel_all(folder, (12, 26, 22), SPACINGS, top=3)
    monkeypatch.setattr(refresh_module, "WORTH_WORKERS", 0.0)
    assert refresh(NAME, 2).labels == CASES
    refreshed = content(base)
    preprocess_fully(base)
    assert content(base) == refreshed


def test_a_preprocessor_of_its_own_gets_whole_cases(ready: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    folder, _ = ready
    relabel_all(folder, (12, 26, 22), SPACINGS, top=3)
    monkeypatch.setattr(refresh_case.Tools, "takes_labels_alone", False)
    assert refresh(NAME, 1).whole == CASES


def test_a_label_of_another_shape_is_bad_input(ready: tuple[Path, Path]) -> None:
    folder, _ = ready
    write_label(folder, "case_b", label_of(1, (11, 26, 22)), SPACINGS[1])
    with pytest.raises(OneShotError, match=r"case_b: expected a label of its image's shape \(12, 26, 22\)"):
        refresh(NAME, 1)


def test_a_replaced_image_of_another_shape_is_bad_input(ready: tuple[Path, Path]) -> None:
    folder, base = ready
    before = whole_files(base)
    write_image(folder, "case_b", image_of(1, (11, 26, 22)), SPACINGS[1])
    with pytest.raises(
        OneShotError, match=r"case_b: .* shape \(11, 26, 22\), found \(12, 26, 22\); put back the image"
    ):
        refresh(NAME, 1)
    assert whole_files(base) == before


def test_nothing_preprocessed_is_nothing_to_do(roots: Roots) -> None:
    write(roots)
    (roots.preprocessed / NAME).mkdir()
    assert refresh(NAME, 1) == Refreshed()
