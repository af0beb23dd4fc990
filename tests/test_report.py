"""The report: whole, self-contained, honest about its figures, and with pictures the right way up."""

from __future__ import annotations

import html
import json
import os
import re
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import SimpleITK as sitk
from hypothesis import given, settings
from hypothesis import strategies as st

from nnunet_oneshot import report as report_module
from nnunet_oneshot.consensus import consensus
from nnunet_oneshot.errors import OneShotError
from nnunet_oneshot.evaluate import evaluate
from nnunet_oneshot.phantom import PhantomDataset, write_phantom_dataset
from nnunet_oneshot.report import CaseFacts, report, volume_outliers
from nnunet_oneshot.report_charts import histogram, line_chart, scatter_chart
from nnunet_oneshot.report_pictures import (
    DIVERGENCE_COLOR,
    Overlay,
    class_color,
    contact_sheet,
    draw_slice,
    shown_divergence,
    slice_axis,
    thumbnail,
)
from sam2_propagation.interface import Image

IDENTITY = np.eye(3)


@pytest.fixture
def labelled(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> PhantomDataset:
    """Dataset501 of five phantoms, and dataset 601: two label folders that differ more and more from case to case."""
    for name in ("raw", "preprocessed", "results"):
        (tmp_path / name).mkdir()
        monkeypatch.setenv(f"nnUNet_{name}", str(tmp_path / name))
    made = write_phantom_dataset(tmp_path / "raw", 501, truth=tmp_path / "truth", cases=5, shape=(8, 40, 40))
    for tool, step in (("tool_a", -1), ("tool_b", 1)):
        (tmp_path / tool).mkdir()
        for i, case in enumerate(made.cases[1:]):
            image = sitk.ReadImage(str(made.truth / f"{case}.nii.gz"))
            moved = sitk.GetImageFromArray(np.roll(sitk.GetArrayFromImage(image), step * i, axis=2))
            moved.CopyInformation(image)
            sitk.WriteImage(moved, str(tmp_path / tool / f"{case}.nii.gz"))
    consensus(501, 601, [tmp_path / "tool_a", tmp_path / "tool_b"], num_processes=1)
    return made


def snapshot(folder: Path) -> dict[str, bytes]:
    return {str(p): p.read_bytes() for p in folder.rglob("*") if p.is_file() and p.name != "report.html"}


def rows_of(page: str) -> list[str]:
    """Names of the cases, in the order of the table."""
    return re.findall(r'<tr><td data-sort="([^"]+)"><img', page)


def test_page_is_whole_self_contained_and_changes_nothing(labelled: PhantomDataset, tmp_path: Path) -> None:
    before = snapshot(tmp_path)
    path = report(601, num_processes=1)
    assert path == tmp_path / "raw" / "Dataset601_phantom_oneshot" / "report.html"
    page = path.read_text(encoding="utf-8")
    assert snapshot(tmp_path) == before
    assert set(rows_of(page)) == set(labelled.cases)
    sources = re.findall(r'(?:src|href)="([^"]{0,12})', page)
    assert sources
    assert all(s.startswith("data:image/") for s in sources)
    assert "http" not in page
    assert "tool_a" in page
    assert "pseudo: made by programs" in page, "the table's words are explained"
    assert "rejected: " not in page, "those that are not in it are not"
    assert str(tmp_path) not in page
    assert page == report(601, tmp_path / "again.html", num_processes=1).read_text(encoding="utf-8")


def test_worst_cases_come_first_and_get_pictures(labelled: PhantomDataset) -> None:
    page = report(601, sheets=1, num_processes=1).read_text(encoding="utf-8")
    # The two folders are the same for the second case and farthest apart for the last one.
    assert rows_of(page)[:4] == list(labelled.cases[:0:-1])
    assert rows_of(page)[4] == labelled.annotated
    captions = re.findall(r"<figcaption>(\w+): (\w+),", page)
    assert captions[0] == ("best", labelled.cases[1])
    assert captions[-1] == ("worst", labelled.cases[-1])
    assert captions[1][0] == "median"


def test_true_dice_is_shown_only_when_truth_is_given(labelled: PhantomDataset, tmp_path: Path) -> None:
    plain = report(601, num_processes=1).read_text(encoding="utf-8")
    assert "true Dice" not in plain
    assert "divergence: programs disagree; ignored by stock trainers, OneShotTrainer learns the best guess" in plain
    page = report(601, truth=labelled.truth, num_processes=1).read_text(encoding="utf-8")
    fused = tmp_path / "raw" / "Dataset601_phantom_oneshot" / "pseudoTr" / "fused"
    worst = labelled.cases[-1]
    scores = evaluate(labelled.truth, fused, labelled.folder / "dataset.json", cases=[worst], n_bootstrap=2)
    assert f'data-sort="{scores.case_mean()[0, 0]}"' in page
    assert "n = 4" in page
    (tmp_path / "nothing").mkdir()
    with pytest.raises(OneShotError, match="expected true labels"):
        report(601, truth=tmp_path / "nothing", num_processes=1)


def test_a_mistake_is_told_before_minutes_of_looking(
    labelled: PhantomDataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(report_module, "look_at_case", lambda task: pytest.fail("looked at an image first"))
    (tmp_path / "nothing").mkdir()
    with pytest.raises(OneShotError, match="expected true labels"):
        report(601, truth=tmp_path / "nothing", num_processes=1)
    with pytest.raises(OneShotError, match=r"found no folder .*absent; make it first"):
        report(601, tmp_path / "absent" / "page.html", num_processes=1)


def test_before_any_round_and_with_a_label_missing(labelled: PhantomDataset, tmp_path: Path) -> None:
    with pytest.raises(OneShotError, match="nnUNetv2_oneshot_propagate"):
        report(501, num_processes=1)
    folder = tmp_path / "raw" / "Dataset601_phantom_oneshot"
    os.remove(folder / "pseudoTr" / "fused" / f"{labelled.cases[2]}.nii.gz")
    with pytest.raises(OneShotError, match=f"{labelled.cases[2]}.*found none"):
        report(601, num_processes=1)
    assert not (folder / "report.html").exists()


def test_images_added_since_are_counted_and_have_no_row(labelled: PhantomDataset) -> None:
    first, ending = labelled.cases[1], ".nii.gz"
    for folder, name in ((labelled.folder / "imagesTr", "added_0000"), (labelled.truth, "added")):
        old = f"{first}_0000" if name == "added_0000" else first
        shutil.copy(folder / f"{old}{ending}", folder / f"{name}{ending}")
    page = report(601, truth=labelled.truth, num_processes=1).read_text(encoding="utf-8")
    assert "Images added since: 1; nnUNetv2_oneshot_refine takes them up." in page
    assert set(rows_of(page)) == set(labelled.cases)
    assert "n = 4" in page, "true labels of what has a label"
    (labelled.folder / "imagesTr" / f"added_0000{ending}").unlink()
    assert "added since" not in report(601, num_processes=1).read_text(encoding="utf-8")


def test_many_classes_have_colours_of_their_own() -> None:
    colors = [class_color(value) for value in range(1, 19)]
    assert len({*colors, DIVERGENCE_COLOR}) == 19
    apart = [sum(abs(a - b) for a, b in zip(x, y, strict=True)) for x, y in zip(colors, colors[6:], strict=False)]
    assert min(apart) > 60, "the same hue in another shade is seen to be another"


def test_a_case_that_is_left_out_is_not_hidden_by_a_tint() -> None:
    target = np.full((2, 3, 3), 5, np.int16)
    assert not shown_divergence(target, 5).any()
    target[0] = 1
    assert shown_divergence(target, 5).sum() == 9


def test_notes_name_the_worst_class(labelled: PhantomDataset, tmp_path: Path) -> None:
    path = tmp_path / "raw" / "Dataset601_phantom_oneshot" / "oneshot.json"
    manifest = json.loads(path.read_text(encoding="utf-8"))
    manifest["cases"][labelled.cases[1]]["quality"] = {"mean": 0.5, "1": 0.9, "2": 0.1}
    path.write_text(json.dumps(manifest), encoding="utf-8")
    page = report(601, num_processes=1).read_text(encoding="utf-8")
    assert "<td>estimated Dice 0.50, lowest for kidney: 0.10</td>" in page


def test_texts_cannot_become_markup(labelled: PhantomDataset, tmp_path: Path) -> None:
    manifest = tmp_path / "raw" / "Dataset601_phantom_oneshot" / "oneshot.json"
    text = manifest.read_text().replace('"reason": null', '"reason": "<script>alert(1)</script>"')
    manifest.write_text(text)
    page = report(601, num_processes=1).read_text(encoding="utf-8")
    assert "<script>alert" not in page
    assert html.escape("<script>alert(1)</script>") in page


def facts(volumes: list[float]) -> dict[str, CaseFacts]:
    return {f"case_{i}": CaseFacts(f"case_{i}", {1: v}, {}, "") for i, v in enumerate(volumes)}


def test_volume_outliers_are_robust() -> None:
    ordinary = [100.0, 104.0, 97.0, 101.0, 99.0, 103.0, 98.0]
    assert volume_outliers(facts(ordinary)) == {}
    found = volume_outliers(facts([*ordinary, 0.0, 1000.0]))
    assert set(found) == {"case_7", "case_8"}
    assert found["case_7"][1] < 0 < found["case_8"][1]
    assert volume_outliers(facts([5.0] * 6)) == {}


def overlay(direction: np.ndarray, spacing: tuple[float, float, float] = (1.0, 1.0, 1.0)) -> Overlay:
    """A volume of 12 x 16 x 20 voxels with one bright block, whose label and divergence lie elsewhere."""
    data = np.random.default_rng(0).uniform(0, 20, size=(1, 12, 16, 20)).astype(np.float32)
    data[0, 7:10, 2:5, 13:18] = 200
    label = np.zeros((12, 16, 20), np.int16)
    label[3:9, 8:14, 2:8] = 1
    divergence = np.zeros(label.shape, bool)
    divergence[2:9, 2:6, 2:6] = True
    image = Image("case", data, spacing=spacing, direction=tuple(direction.ravel()))
    return Overlay(image, label, divergence)


@settings(max_examples=15)
@given(flips=st.tuples(*[st.booleans()] * 3), axis=st.integers(0, 2))
def test_the_same_patient_is_drawn_the_same_however_it_is_stored(flips: tuple[bool, ...], axis: int) -> None:
    """Stored backwards along any axis, with the direction that says so, the picture does not change."""
    usual = overlay(IDENTITY)
    turned = [a for a, flip in enumerate(flips) if flip]
    direction = IDENTITY * np.array([-1 if flips[2 - k] else 1 for k in range(3)])
    data = np.flip(usual.image.data, [a + 1 for a in turned])
    image = replace(usual.image, data=np.ascontiguousarray(data), direction=tuple(direction.ravel()))
    stored = Overlay(image, np.flip(usual.label, turned), np.flip(usual.divergence, turned))
    index = 8
    other = usual.image.shape[axis] - 1 - index if flips[axis] else index
    first, second = draw_slice(usual, axis, index, 96, marks=False), draw_slice(stored, axis, other, 96, marks=False)
    np.testing.assert_array_equal(np.asarray(first), np.asarray(second))


def test_head_is_above_and_left_is_on_the_right() -> None:
    """SimpleITK's z grows towards the head, x towards the patient's left, y towards the back."""
    coronal = np.asarray(draw_slice(overlay(IDENTITY), 1, 3, 200, marks=False)).astype(int)
    bright = np.argwhere((coronal > 180).all(2))
    assert bright[:, 0].mean() < coronal.shape[0] / 2
    assert bright[:, 1].mean() > coronal.shape[1] / 2
    axial = np.asarray(draw_slice(overlay(IDENTITY), 0, 8, 200, marks=False)).astype(int)
    assert np.argwhere((axial > 180).all(2))[:, 0].mean() < axial.shape[0] / 2


def test_thick_slices_keep_their_proportions() -> None:
    thick = overlay(IDENTITY, spacing=(5.0, 1.0, 1.0))
    assert slice_axis(thick.image) == 0
    width, height = draw_slice(thick, 1, 8, 120).size
    assert height / width == pytest.approx(12 * 5 / 20, rel=0.05)
    assert slice_axis(overlay(IDENTITY, spacing=(1.0, 1.0, 6.0)).image) == 2


def test_label_and_divergence_are_seen_in_their_colours() -> None:
    pixels = np.asarray(draw_slice(overlay(IDENTITY), 0, 5, 200, marks=False)).reshape(-1, 3).astype(int)
    assert (np.abs(pixels - class_color(1)).sum(1) == 0).any()
    tint = pixels[(pixels[:, 0] - pixels[:, 1]) > 30]
    assert (np.abs(tint - 0.55 * np.array(DIVERGENCE_COLOR)).max(1) < 30).any()
    assert class_color(19) == class_color(1)


def test_sizes_are_bounded() -> None:
    shown = overlay(IDENTITY)
    assert max(thumbnail(shown).size) <= 112
    assert contact_sheet(shown).size[0] <= 4 * 240
    flat = Image("case", np.zeros((3, 1, 700, 900), np.float32))
    empty = Overlay(flat, np.zeros((1, 700, 900), np.int16), np.zeros((1, 700, 900), bool), oriented=False)
    assert contact_sheet(empty).size == (234, 183)


def test_charts_of_one_value_and_of_many() -> None:
    for chart in (
        line_chart("t", [(1, 0.5)], "x"),
        histogram("t", [0.4, 0.4], "x"),
        scatter_chart("<t>", [(0.1, 0.2)], "x"),
    ):
        assert chart.startswith("<svg")
        assert "nan" not in chart
    assert "&lt;t&gt;" in scatter_chart("<t>", [(0.1, 0.2), (0.4, 0.4)], "x")
    counts = re.findall(r'height="([\d.]+)" fill', histogram("t", [0.0] * 3 + [1.0], "x"))
    assert float(counts[0]) == pytest.approx(3 * float(counts[-1]), abs=0.2)


def test_what_people_decided_is_told(labelled: PhantomDataset, tmp_path: Path) -> None:
    path = tmp_path / "raw" / "Dataset601_phantom_oneshot" / "oneshot.json"
    manifest = json.loads(path.read_text())
    review = {"decision": "accepted", "flag": True, "comment": "a <b>fine</b> one", "time": "2026-01-01"}
    manifest["cases"][labelled.cases[1]] |= {"status": "accepted", "review": review}
    path.write_text(json.dumps(manifest))
    page = report(601, num_processes=1).read_text(encoding="utf-8")
    assert "<td>accepted; flagged; a &lt;b&gt;fine&lt;/b&gt; one</td>" in page


def test_estimates_of_each_round_are_told(labelled: PhantomDataset, tmp_path: Path) -> None:
    folder = tmp_path / "raw" / "Dataset601_phantom_oneshot"
    manifest = json.loads((folder / "oneshot.json").read_text())
    (folder / ".oneshot" / "rounds").mkdir(parents=True, exist_ok=True)
    for number, estimate in ((0, 0.61), (1, 0.72)):
        for record in manifest["cases"].values():
            record["quality"] = {"mean": estimate}
        (folder / ".oneshot" / "rounds" / f"{number:02d}.json").write_text(json.dumps(manifest))
    page = report(601, num_processes=1).read_text(encoding="utf-8")
    assert "<td>0.610</td>" in page
    assert "<td>0.720</td>" in page
    assert 'aria-label="Mean estimated Dice"' in page
