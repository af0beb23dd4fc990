"""The whole loop on tiny phantoms, by the commands a user types.

The first test trains as preset `tiny` does; the others ask nothing of what a model learns, and train for an instant.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import SimpleITK as sitk
from file_watch import opened_files

from nnunet_oneshot import cli, propagators
from nnunet_oneshot.evaluate import FOREGROUND, evaluate
from nnunet_oneshot.nnunet import results_folder
from nnunet_oneshot.phantom import PhantomDataset, write_phantom_dataset
from nnunet_oneshot.refine import open_store
from sam2_propagation.correspondence_training import Recipe

pytestmark = pytest.mark.slow


@pytest.fixture
def folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    for name in ("nnUNet_raw", "nnUNet_preprocessed", "nnUNet_results"):
        (tmp_path / name).mkdir()
        monkeypatch.setenv(name, str(tmp_path / name))
    monkeypatch.setenv("nnUNet_extTrainer", str(Path(__file__).parents[1] / "trainers"))
    return tmp_path


@pytest.fixture
def quickly(folders: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Trainings take an instant."""
    quick, own = Path(__file__).parent / "quick_trainers", os.environ["nnUNet_extTrainer"]
    monkeypatch.setenv("nnUNet_extTrainer", os.pathsep.join([str(quick), own]))
    return folders


def _phantom(folders: Path, kind: str, shape: tuple[int, int, int], cases: int, test_cases: int = 0) -> PhantomDataset:
    raw, truth = folders / "nnUNet_raw", folders / "truth"
    return write_phantom_dataset(raw, 501, truth=truth, cases=cases, test_cases=test_cases, shape=shape, kind=kind)


def _dice(phantom: PhantomDataset, labels: Path) -> float:
    cases = [case for case in phantom.cases if case != phantom.annotated]
    return (
        evaluate(phantom.truth, labels, phantom.folder / "dataset.json", cases=cases).summary[FOREGROUND]["Dice"].mean
    )


def _hashes(folder: Path) -> dict[str, str]:
    files = sorted(p for p in folder.rglob("*") if p.is_file())
    return {str(p.relative_to(folder)): hashlib.sha256(p.read_bytes()).hexdigest() for p in files}


def _labels_beside(phantom: PhantomDataset) -> Path:
    """The test cases' labels where nnU-Net's users keep them."""
    labels = phantom.folder / "labelsTs"
    labels.mkdir()
    for case in phantom.test_cases:
        shutil.copy(phantom.truth / f"{case}.nii.gz", labels)
    return labels


def _predict(images: Path, output: Path) -> None:
    command = Path(sys.executable).with_name("nnUNetv2_predict")
    words = ["-d", "601", "-i", images, "-o", output, "-c", "3d_fullres", "-f", "all", "-tr", "OneShotTrainer_tiny"]
    words += ["-p", "nnUNetOneShotSmallPlans", "-device", "cpu", "-npp", "1", "-nps", "1"]
    done = subprocess.run([command, *words], capture_output=True, encoding="utf-8", check=False)
    assert done.returncode == 0, done.stdout + done.stderr


def test_run_labels_trains_relabels_and_repeats_nothing(folders: Path, capsys: pytest.CaptureFixture[str]) -> None:
    phantom = _phantom(folders, "thick_slices", (10, 64, 64), 5, test_cases=2)
    command = ["-d", "501", "-o", "601", "-c", "3d_fullres", "-preset", "tiny", "-device", "cpu"]
    command += ["-json", "--all_rounds"]
    with opened_files(phantom.truth, _labels_beside(phantom)) as opened:
        # By workers too, which one processor would not start by itself.
        cli.run([*command, "-np", "2"])
        _predict(phantom.folder / "imagesTs", folders / "predicted")
    assert not opened, "hidden labels were read while labels were made, a model trained and test images predicted"
    assert len(list((folders / "predicted").glob("*.nii.gz"))) == 2
    capsys.readouterr()
    cli.run([*command, "-ref", str(phantom.truth)])
    summary = json.loads(capsys.readouterr().out)
    store, raw = open_store(601)
    assert summary["labels"]["round"] == 1
    assert summary["scores"]["n_cases"] == 4
    assert _dice(phantom, store.round_path(0, "x").parent) > 0.5
    model = results_folder(601, "OneShotTrainer_tiny", "nnUNetOneShotSmallPlans", "3d_fullres")
    assert (model / "fold_all" / "checkpoint_final.pth").is_file()
    assert (model / "oneshot_rounds" / "00" / "fold_all" / "checkpoint_final.pth").is_file()
    annotated = raw.read_label(store.label_path(phantom.annotated))
    assert np.array_equal(annotated, raw.read_label(phantom.truth / f"{phantom.annotated}.nii.gz"))

    before = _hashes(folders)
    cli.run(command)
    assert _hashes(folders) == before, "a second run repeated finished work"


def test_rgb_images_go_through_and_a_stock_trainer_takes_the_dataset(quickly: Path) -> None:
    phantom = _phantom(quickly, "rgb2d", (1, 64, 64), 5)
    cli.run(["-d", "501", "-o", "601", "-c", "2d", "-preset", "tiny", "-rounds", "0", "-device", "cpu"])
    store, _ = open_store(601)
    assert _dice(phantom, store.fused_path("x").parent) > 0.4
    train = Path(sys.executable).with_name("nnUNetv2_train")
    stock = ["601", "2d", "0", "-tr", "nnUNetTrainer_1epoch", "-p", "nnUNetOneShotSmallPlans", "-device", "cpu"]
    done = subprocess.run([train, *stock], capture_output=True, encoding="utf-8", check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    model = results_folder(601, "nnUNetTrainer_1epoch", "nnUNetOneShotSmallPlans", "2d")
    assert (model / "fold_0" / "checkpoint_final.pth").is_file()


def test_one_slice_in_every_volume_ends_in_a_model(
    quickly: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """`make_sparse`, then `run` as it is: its default propagators would need a whole label."""
    monkeypatch.setenv("nnUNet_oneshot_checkpoints", str(quickly / "checkpoints"))
    monkeypatch.setattr(propagators, "RECIPE", Recipe(steps=60))
    phantom = _phantom(quickly, "thick_slices", (10, 64, 64), 3)
    (phantom.folder / "labelsTr" / f"{phantom.annotated}.nii.gz").unlink()
    for case in phantom.cases:
        _draw_one_slice(phantom.truth / f"{case}.nii.gz", quickly / "drawn" / f"{case}.nii.gz")
    cli.make_sparse(["-d", "501", "-i", str(quickly / "drawn")])
    cli.run(["-d", "501", "-o", "601", "-c", "3d_fullres", "-preset", "tiny", "-rounds", "0", "-device", "cpu"])
    assert "no annotated image is labelled in every slice" in "".join(capsys.readouterr())
    store, raw = open_store(601)
    records = store.read_manifest().cases
    assert {record.status for record in records.values()} == {"sparse"}
    assert {view.split("/")[0] for record in records.values() for view in record.views} == {"correspondence", "sam2"}
    scored = evaluate(phantom.truth, store.fused_path("x").parent, raw.folder / "dataset.json", cases=phantom.cases)
    assert scored.summary[FOREGROUND]["Dice"].mean > 0.6
    model = results_folder(601, "OneShotTrainer_tiny", "nnUNetOneShotSmallPlans", "3d_fullres")
    assert (model / "fold_all" / "checkpoint_final.pth").is_file()


def _draw_one_slice(truth: Path, path: Path) -> None:
    """Keep the slice with the largest foreground, as a person who draws one leaves a label."""
    image = sitk.ReadImage(str(truth))
    label = sitk.GetArrayFromImage(image)
    drawn = np.zeros_like(label)
    at = int((label > 0).sum(axis=(1, 2)).argmax())
    drawn[at] = label[at]
    written = sitk.GetImageFromArray(drawn)
    written.CopyInformation(image)
    path.parent.mkdir(exist_ok=True)
    sitk.WriteImage(written, str(path))
