"""Labels carried to images of the same patient by their place in space."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import SimpleITK as sitk
from conftest import Answer
from fake_propagator import FakePropagator
from raw_datasets import FLIPPED_OBLIQUE, LABELS, SPACING, Roots, edit_json, label_array, make_sparse, read, write_raw
from test_refine import replace_nnunet, run

from nnunet_oneshot import cli
from nnunet_oneshot.dataset import open_dataset
from nnunet_oneshot.errors import OneShotError
from nnunet_oneshot.propagate import propagate
from nnunet_oneshot.quality_gate import mean_quality
from nnunet_oneshot.rounds import kept_manifest
from nnunet_oneshot.same_patient import read_same_patient
from nnunet_oneshot.store import Store

IGNORE = 3
Fakes = dict[str, FakePropagator]


def other_grid(folder: Path, case: str, size: tuple[int, int, int], step: float, first: tuple[float, ...]) -> None:
    """Another acquisition of the annotated image's patient: its own size (x, y, z), spacing and first voxel.

    `first` is where the first voxel lies, in voxels (x, y, z) of the annotated image.
    """
    annotated = sitk.ReadImage(str(folder / "imagesTr/case_0_0000.nii.gz"))
    image = sitk.Image(size, sitk.sitkFloat32)
    image.SetSpacing([mm * step for mm in SPACING])
    image.SetDirection(FLIPPED_OBLIQUE)
    image.SetOrigin(annotated.TransformContinuousIndexToPhysicalPoint(first))
    sitk.WriteImage(image, str(folder / f"imagesTr/{case}_0000.nii.gz"))


def at_each_voxel(folder: Path, case: str) -> np.ndarray:
    """The annotated label at the place of every voxel of a case, -1 outside the annotated image."""
    label = sitk.ReadImage(str(folder / "labelsTr/case_0.nii.gz"))
    image = sitk.ReadImage(str(folder / f"imagesTr/{case}_0000.nii.gz"))
    found = np.full(image.GetSize()[::-1], -1)
    for z, y, x in np.ndindex(found.shape):
        index = label.TransformPhysicalPointToIndex(image.TransformIndexToPhysicalPoint((x, y, z)))
        if all(0 <= i < n for i, n in zip(index, label.GetSize(), strict=True)):
            found[z, y, x] = label[index]
    return found


def pairs(tmp_path: Path, content: object) -> Path:
    path = tmp_path / "patients.json"
    path.write_text(json.dumps(content))
    return path


def carried(tmp_path: Path, **content: str) -> Store:
    given = pairs(tmp_path, content)
    return propagate(501, 601, propagators=("fake",), num_processes=1, same_patient=given).store


def test_the_label_lies_where_it_lies_in_the_annotated_image(toy: Path, fakes: Fakes, tmp_path: Path) -> None:
    other_grid(toy, "case_1", (9, 11, 6), 0.7, (0.4, 0.6, 0.4))
    expected = at_each_voxel(toy, "case_1")
    assert set(np.unique(expected)) == {0, 1, 2}, "wholly inside, all labels there"
    store = carried(tmp_path, case_1="case_0")
    for path in (store.label_path("case_1"), store.fused_path("case_1")):
        np.testing.assert_array_equal(read(path), expected)
    manifest = store.read_manifest()
    assert manifest.cases["case_1"].views == ["same_patient/inside", "same_patient/extended"]
    assert manifest.cases["case_1"].reason is None
    assert manifest.cases["case_2"].views == ["fake/still", "fake/shifted"]
    assert manifest.settings["same_patient"] == {"case_1": "case_0"}
    assert set(manifest.sources) == {"fake", "same_patient"}
    assert fakes["fake"].asked == ["case_2"]


def test_what_the_annotated_image_does_not_show_is_ignored(toy: Path, fakes: Fakes, tmp_path: Path) -> None:
    """The organ reaches the first and last slice of the annotated image: beyond them nobody knows where it ends."""
    other_grid(toy, "case_1", (8, 9, 9), 1.0, (0.0, 0.0, -2.0))
    expected = at_each_voxel(toy, "case_1")
    store = carried(tmp_path, case_1="case_0")
    label = read(store.label_path("case_1"))
    np.testing.assert_array_equal(label[2:7], expected[2:7])
    for outside in (0, 1, 7, 8):
        np.testing.assert_array_equal(label[outside] == IGNORE, expected[2] > 0)
    assert store.read_worker("same_patient", "case_1").views["inside"].scores["covered"] == pytest.approx(5 / 9)  # type: ignore[union-attr]


def test_views_by_place_tell_nothing_of_a_label(
    toy: Path, roots: Roots, fakes: Fakes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They agree by construction, so that even a patient who moved would be estimated to be right.

    And the guard would take every round that moves such labels to be astray.
    """
    store = carried(tmp_path, case_1="case_0", case_2="case_0")
    assert [store.read_manifest().cases[case].quality for case in ("case_1", "case_2")] == [None, None]
    replace_nnunet(roots, monkeypatch).say = lambda case, _: np.roll(label_array(int(case[-1])), 2, axis=2)
    result = run(rounds=1, all_rounds=False)
    assert mean_quality(kept_manifest(store, 0)) is None
    assert result.round == 1, "nothing says that the labels before were better"
    quality = store.read_manifest().cases["case_1"].quality
    assert quality is not None, "a model that learnt of all cases is another opinion"
    assert quality["mean"] < 0.9
    assert [doubt.case for doubt in result.doubts] == ["case_1", "case_2"]


def test_an_image_of_another_place_fails_with_a_reason(toy: Path, fakes: Fakes, tmp_path: Path) -> None:
    other_grid(toy, "case_1", (8, 9, 5), 1.0, (500.0, 0.0, 0.0))
    record = carried(tmp_path, case_1="case_0").read_manifest().cases["case_1"]
    assert record.status == "failed"
    assert "outside case_0" in str(record.reason)


def test_shards_share_the_patients_too(toy: Path, fakes: Fakes, tmp_path: Path) -> None:
    given = pairs(tmp_path, {"case_1": "case_0", "case_2": "case_0"})
    parts = [
        propagate(501, 601, propagators=("fake",), num_processes=1, same_patient=given, num_parts=2, part_id=part)
        for part in (0, 1)
    ]
    assert [outcome.manifest is not None for outcome in parts] == [False, True]
    assert fakes["fake"].asked == []
    assert {r.status for r in parts[0].store.read_manifest().cases.values()} == {"annotated", "pseudo"}


def test_pairs_by_the_converters_file_and_by_a_csv(roots: Roots, tmp_path: Path) -> None:
    write_raw(roots.raw, cases=("A_1", "A_1_GED4", "A_2", "A_3"), annotated=("A_1_GED4",))
    origin = {name: {"patient": name[:3], "folder": "x", "file": "y"} for name in ("A_1", "A_1_GED4", "A_2")}
    raw = open_dataset(501)
    assert read_same_patient(pairs(tmp_path, {"modality": "T1", "cases": origin}), raw) == {"A_1": "A_1_GED4"}
    table = tmp_path / "patients.csv"
    table.write_text("case,annotated\nA_3, A_1_GED4\n\nA_2,A_1_GED4\n")
    assert read_same_patient(table, raw) == {"A_2": "A_1_GED4", "A_3": "A_1_GED4"}


def test_a_table_as_excel_writes_it(toy: Path, tmp_path: Path) -> None:
    table = tmp_path / "patients.csv"
    table.write_bytes("case,annotated\r\ncase_1,case_0\r\n".encode("utf-8-sig"))
    assert read_same_patient(table, open_dataset(501)) == {"case_1": "case_0"}
    table.write_bytes("häl_1,case_0\n".encode("latin-1"))
    with pytest.raises(OneShotError, match="save the table as UTF-8"):
        read_same_patient(table, open_dataset(501))


BAD: dict[str, tuple[str, str, str]] = {
    "no such file": ("nowhere.json", "", "nowhere.json"),
    "another kind of file": ("x.txt", "case_1 case_0", "x.txt"),
    "broken": ("x.json", "{", "JSON"),
    "a list": ("x.json", '["case_1"]', "annotated case"),
    "no pairs": ("x.json", "{}", "found none"),
    "unknown case": ("x.json", '{"ghost": "case_0"}', "ghost"),
    "the wrong way round": ("x.json", '{"case_0": "case_1"}', "un-annotated case and an annotated one"),
    "three columns": ("x.csv", "case_1,case_0,why", "two columns"),
}


@pytest.mark.parametrize("name", BAD)
def test_a_file_that_does_not_fit_is_bad_input(
    toy: Path, roots: Roots, fakes: Fakes, call: Callable[..., Answer], tmp_path: Path, name: str
) -> None:
    file, content, word = BAD[name]
    path = tmp_path / file
    if content:
        path.write_text(content)
    before = roots.snapshot()
    answer = call(cli.propagate, "-d", 501, "-o", 601, "-propagator", "fake", "-device", "cpu", "-same_patient", path)
    assert answer.code == 2, answer
    assert word in answer.error
    assert "found" in answer.error
    assert roots.snapshot() == before


def test_a_sparse_label_is_not_carried(toy: Path, fakes: Fakes, call: Callable[..., Answer], tmp_path: Path) -> None:
    make_sparse(toy)
    edit_json(toy, labels={**LABELS, "ignore": IGNORE})
    given = pairs(tmp_path, {"case_1": "case_0"})
    answer = call(cli.propagate, "-d", 501, "-o", 601, "-propagator", "fake", "-device", "cpu", "-same_patient", given)
    assert answer.code == 2
    assert "sparse label of case_0" in answer.error


def test_a_trial_has_no_patients(toy: Path, fakes: Fakes, call: Callable[..., Answer], tmp_path: Path) -> None:
    given = pairs(tmp_path, {"case_1": "case_0"})
    answer = call(cli.propagate, "-d", 501, "-o", 601, "--trial", "-device", "cpu", "-same_patient", given)
    assert answer.code == 2
    assert "--trial" in answer.error
