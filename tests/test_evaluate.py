"""`evaluate` on folders: figures, regions, ignore label, formats, JSON, and what it says of bad input."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import SimpleITK as sitk
from nnunetv2.evaluation.evaluate_predictions import compute_metrics
from nnunetv2.imageio.simpleitk_reader_writer import SimpleITKIO
from skimage import io

from nnunet_oneshot.errors import OneShotError
from nnunet_oneshot.evaluate import FOREGROUND, Evaluation, evaluate, format_table

SPACING = (1.2, 1.0, 5.0)
LABELS = {"background": 0, "liver": 1, "kidney": 2}


def write(path: Path, label: np.ndarray, spacing: tuple[float, ...] = SPACING) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    image = sitk.GetImageFromArray(label.astype(np.uint8))
    image.SetSpacing(spacing)
    sitk.WriteImage(image, str(path))


def random_label(seed: int, values: int = 3, shape: tuple[int, ...] = (5, 12, 10)) -> np.ndarray:
    return np.random.default_rng(seed).integers(values, size=shape)


@pytest.fixture
def folders(tmp_path: Path) -> tuple[Path, Path, Path]:
    """Reference and prediction folder of six cases, and dataset.json."""
    for seed in range(6):
        reference = random_label(seed)
        prediction = np.where(random_label(seed + 50, 2) > 0, reference, random_label(seed + 100))
        write(tmp_path / "ref" / f"case_{seed}.nii.gz", reference)
        write(tmp_path / "pred" / f"case_{seed}.nii.gz", prediction)
    return tmp_path / "ref", tmp_path / "pred", dataset_json(tmp_path, LABELS)


def dataset_json(folder: Path, labels: dict, **more: object) -> Path:
    path = folder / "dataset.json"
    path.write_text(json.dumps({"labels": labels, "file_ending": ".nii.gz", **more}))
    return path


def nnunet_dice(reference: Path, prediction: Path, regions: list, ignore: int | None = None) -> list[float]:
    """nnU-Net's own evaluation of the same folders: the mean Dice of each region."""
    cases = [
        compute_metrics(str(file), str(prediction / file.name), SimpleITKIO(), regions, ignore)["metrics"]
        for file in sorted(reference.iterdir())
    ]
    return [np.nanmean([case[region]["Dice"] for case in cases]) for region in regions]


def test_same_dice_as_nnunet_with_an_absent_class(folders: tuple[Path, Path, Path]) -> None:
    reference, prediction, file = folders
    for folder in (reference, prediction):
        label = sitk.GetArrayFromImage(sitk.ReadImage(str(folder / "case_3.nii.gz")))
        write(folder / "case_3.nii.gz", np.where(label == 2, 0, label))
    result = evaluate(reference, prediction, file, n_bootstrap=50)
    theirs = nnunet_dice(reference, prediction, [1, 2])
    assert result.classes == ("liver", "kidney")
    assert [result.summary[name]["Dice"].mean for name in ("liver", "kidney")] == pytest.approx(theirs)
    assert result.summary["kidney"]["Dice"].n == 5
    assert result.summary[FOREGROUND]["Dice"].mean == pytest.approx(np.mean(theirs))
    interval = result.summary["liver"]["HD95"]
    assert interval.low <= interval.mean <= interval.high


def test_regions_and_ignore_label_are_honoured(folders: tuple[Path, Path, Path], tmp_path: Path) -> None:
    reference, prediction, _ = folders
    labels = {"background": 0, "whole": [1, 2], "core": 2, "ignore": 3}
    for seed in range(6):
        label = random_label(seed)
        label[:, 6:] = 3
        write(reference / f"case_{seed}.nii.gz", label)
    result = evaluate(reference, prediction, dataset_json(tmp_path, labels, regions_class_order=[1, 2]), n_bootstrap=20)
    theirs = nnunet_dice(reference, prediction, [(1, 2), 2], 3)
    assert result.classes == ("whole", "core")
    assert [result.summary[name]["Dice"].mean for name in ("whole", "core")] == pytest.approx(theirs)


def test_perfect_prediction_and_repeatable_json(folders: tuple[Path, Path, Path], tmp_path: Path) -> None:
    reference, _, file = folders
    first, second = (tmp_path / "out" / name for name in ("a.json", "b.json"))
    for output in (first, second):
        evaluate(reference, reference, file, output)
    assert first.read_bytes() == second.read_bytes()
    content = json.loads(first.read_text())
    assert content["schema"] == 1
    assert content["mean"]["foreground"] == {
        "Dice": {"mean": 1.0, "low": 1.0, "high": 1.0, "n": 6},
        **{m: {"mean": 0.0, "low": 0.0, "high": 0.0, "n": 6} for m in ("HD", "HD95", "ASSD")},
    }
    kidney = content["cases"]["case_0"]["kidney"]
    assert kidney["Dice"] == 1.0
    assert kidney["n_reference"] == kidney["n_prediction"] == (random_label(0) == 2).sum()


def test_absent_everywhere_is_null_not_nan(tmp_path: Path) -> None:
    write(tmp_path / "ref" / "a.nii.gz", np.zeros((3, 4, 4)))
    output = tmp_path / "scores.json"
    result = evaluate(tmp_path / "ref", tmp_path / "ref", dataset_json(tmp_path, LABELS), output)
    assert json.loads(output.read_text())["mean"]["foreground"]["Dice"] == {
        "mean": None,
        "low": None,
        "high": None,
        "n": 0,
    }
    assert "nan" in format_table(result)


@pytest.mark.slow
def test_two_processes_give_the_same(folders: tuple[Path, Path, Path]) -> None:
    one, two = (evaluate(*folders, n_bootstrap=10, num_processes=n) for n in (1, 2))
    np.testing.assert_array_equal(one.values, two.values)


def test_png_labels(tmp_path: Path) -> None:
    label = random_label(0, shape=(16, 16)).astype(np.uint8)
    for folder in ("ref", "pred"):
        (tmp_path / folder).mkdir()
        io.imsave(tmp_path / folder / "a.png", label, check_contrast=False)
    file = dataset_json(tmp_path, LABELS)
    file.write_text(json.dumps({"labels": LABELS, "file_ending": ".png"}))
    assert evaluate(tmp_path / "ref", tmp_path / "pred", file).summary["liver"]["Dice"].mean == 1.0


def test_subset_extra_predictions_and_table(folders: tuple[Path, Path, Path]) -> None:
    reference, prediction, file = folders
    write(prediction / "extra.nii.gz", random_label(9))
    result = evaluate(reference, prediction, file, cases=["case_1", "case_4"], n_bootstrap=10)
    assert result.cases == ("case_1", "case_4")
    assert result.not_scored == ("extra",)
    table = format_table(result, per_case=True)
    assert "HD95 (mm)" in table
    assert "case_4" in table
    assert "extra" in table


def fails(match: str, *arguments: Path, **options: object) -> None:
    with pytest.raises(OneShotError, match=match):
        evaluate(*arguments, **options)


def test_bad_folders(folders: tuple[Path, Path, Path], tmp_path: Path) -> None:
    reference, prediction, file = folders
    (prediction / "case_2.nii.gz").unlink()
    (prediction / "case_5.nii.gz").unlink()
    fails("2 of 6 cases have no prediction.*case_2, case_5", reference, prediction, file)
    fails("no reference in.*case_9", reference, prediction, file, cases=["case_9"])
    fails("expected a folder", tmp_path / "nowhere", prediction, file)
    (tmp_path / "empty").mkdir()
    fails("found none", tmp_path / "empty", prediction, file)
    fails("cannot read", reference, prediction, tmp_path / "absent.json")
    (tmp_path / "bad.json").write_text("{}")
    fails("not a valid nnU-Net dataset.json", reference, prediction, tmp_path / "bad.json")


def test_bad_label_files(folders: tuple[Path, Path, Path], tmp_path: Path) -> None:
    reference, prediction, file = folders
    bad = prediction / "case_1.nii.gz"
    write(bad, random_label(1, shape=(5, 12, 11)))
    fails(r"case_1: reference has shape \(5, 12, 10\)", reference, prediction, file)
    write(bad, random_label(1), spacing=(1.2, 1.0, 4.0))
    fails("case_1: reference has spacing", reference, prediction, file)
    image = sitk.GetImageFromArray(random_label(1).astype(np.uint8))
    image.SetSpacing(SPACING)
    image.SetDirection((-1, 0, 0, 0, 1, 0, 0, 0, 1))
    sitk.WriteImage(image, str(bad))
    fails("case_1: .* different directions", reference, prediction, file)
    write(bad, random_label(1) + 5)
    fails(r"expected label values \[0, 1, 2\], found 5, 6, 7", reference, prediction, file)
    write(bad, random_label(1))
    whole = bad.read_bytes()
    for share in (0.9, 0.5, 0.1):
        bad.write_bytes(whole[: int(len(whole) * share)])
        fails("case_1.nii.gz; it may be damaged", reference, prediction, file)
    assert not (tmp_path / "scores.json").exists()


def test_fractions_and_unwritable_output(folders: tuple[Path, Path, Path], tmp_path: Path) -> None:
    reference, prediction, file = folders
    (tmp_path / "file").write_text("")
    fails("cannot write", reference, prediction, file, tmp_path / "file" / "scores.json")
    sitk.WriteImage(sitk.GetImageFromArray(np.full((5, 12, 10), 0.5, np.float32)), str(prediction / "case_0.nii.gz"))
    fails("found fractions", reference, prediction, file)


def test_evaluation_case_mean_skips_absent_classes() -> None:
    values = np.array([[[1.0, 0, 0, 0], [np.nan] * 4]])
    result = Evaluation(("a",), ("x", "y"), values, np.zeros((1, 2, 2), np.int64), {}, (), 1, 0)
    assert result.case_mean().tolist() == [[1.0, 0.0, 0.0, 0.0]]
