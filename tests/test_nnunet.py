"""Driving nnU-Net: bad input before anything starts, and whole runs that are resumed rather than repeated."""

from __future__ import annotations

import errno
import io
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import SimpleITK as sitk
import torch
from nnunetv2.experiment_planning.dataset_fingerprint import fingerprint_extractor
from nnunetv2.experiment_planning.dataset_fingerprint.fingerprint_extractor import DatasetFingerprintExtractor
from nnunetv2.run.load_pretrained_weights import load_pretrained_weights
from tiny_dataset import LABELS, preprocess_in_process, write_dataset

from nnunet_oneshot import nnunet, nnunet_jobs
from nnunet_oneshot.bfloat16 import VARIABLE
from nnunet_oneshot.errors import NnunetFailureError, OneShotError
from nnunet_oneshot.nnunet_process import STAGING, run_job
from nnunet_oneshot.planner import PseudoLabelFingerprintExtractor
from nnunet_oneshot.settings import PRESETS, SMALL_PLANS

NAME = "Dataset901_Tiny"
TINY = PRESETS["tiny"]
LABELS_WITHOUT_IGNORE = {name: value for name, value in LABELS.items() if name != "ignore"}
QUICK = """
from nnunetv2.utilities.find_objects import recursive_find_trainer_class_by_name

class Quick(recursive_find_trainer_class_by_name("OneShotTrainer")):
    def initialize(self):
        self.num_epochs, self.num_iterations_per_epoch, self.num_val_iterations_per_epoch, self.save_every = 4, 2, 1, 1
        super().initialize()

    def plot_network_architecture(self):
        pass

    def perform_actual_validation(self, save_probabilities=False):
        pass
"""


@pytest.fixture
def roots(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    for root in nnunet.ROOTS:
        (tmp_path / root).mkdir()
        monkeypatch.setenv(root, str(tmp_path / root))
    (tmp_path / "own").mkdir()
    (tmp_path / "own" / "quick.py").write_text(QUICK)
    monkeypatch.setenv("nnUNet_extTrainer", str(tmp_path / "own"))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    return tmp_path


@pytest.fixture
def no_jobs(monkeypatch: pytest.MonkeyPatch) -> Callable[[], None]:
    """Call it to make any further job of nnU-Net a failure of the test."""

    def forbid(*_: object) -> None:
        raise AssertionError("nnU-Net was started again")

    return lambda: monkeypatch.setattr(nnunet, "run_job", forbid)


@pytest.mark.parametrize("variable", nnunet.ROOTS)
def test_an_unset_folder_is_named_with_all_three(roots: Path, monkeypatch: pytest.MonkeyPatch, variable: str) -> None:
    monkeypatch.delenv(variable)
    with pytest.raises(OneShotError, match=f"nnUNet_raw, nnUNet_preprocessed, nnUNet_results.*{variable} unset"):
        nnunet.root(variable)


@pytest.mark.parametrize("dataset", ["901", 901, "nine", "Set901"])
def test_an_unknown_dataset_is_bad_input(roots: Path, dataset: int | str) -> None:
    with pytest.raises(OneShotError, match="found"):
        nnunet.dataset_name(dataset)


def test_two_datasets_with_one_id_are_bad_input(roots: Path) -> None:
    for name in ("Dataset901_Tiny", "Dataset901_Other"):
        (roots / "nnUNet_raw" / name).mkdir()
    with pytest.raises(OneShotError, match="Dataset901_Other"):
        nnunet.dataset_name("901")


def test_plans_configurations_and_folds_that_do_not_exist_are_named(roots: Path) -> None:
    write_dataset(roots / "nnUNet_raw", NAME, cases=1)
    folder = roots / "nnUNet_preprocessed" / NAME
    folder.mkdir()
    (folder / "nnUNetPlans.json").write_text(json.dumps({"configurations": {"2d": {"data_identifier": "x"}}}))
    with pytest.raises(OneShotError, match="found nnUNetPlans"):
        nnunet.train(901, "2d", 0, "OneShotTrainer", SMALL_PLANS, "cpu")
    with pytest.raises(OneShotError, match="found 2d"):
        nnunet.train(901, "3d_fullres", 0, "OneShotTrainer", "nnUNetPlans", "cpu")
    with pytest.raises(OneShotError, match="fold 0, 1"):
        nnunet.predict(901, "2d", [0, 1], "OneShotTrainer", "nnUNetPlans", {}, roots / "out", "cpu")
    assert not nnunet.is_trained(901, "2d", 0, "OneShotTrainer", "nnUNetPlans")
    assert not (roots / "nnUNet_results" / NAME).exists()


def make_trained(roots: Path) -> Path:
    """What nnU-Net leaves of one trained fold, as far as it is looked at; returns the model's folder."""
    write_dataset(roots / "nnUNet_raw", NAME, cases=1)
    folder = roots / "nnUNet_preprocessed" / NAME
    folder.mkdir()
    (folder / "nnUNetPlans.json").write_text(json.dumps({"configurations": {"2d": {"data_identifier": "x"}}}))
    model = nnunet.results_folder(901, "OneShotTrainer", "nnUNetPlans", "2d")
    (model / "fold_0").mkdir(parents=True)
    torch.save({"trainer_name": "OneShotTrainer"}, model / "fold_0" / nnunet.FINAL)
    (model / "dataset.json").write_text(json.dumps({"file_ending": ".nii.gz"}))
    return model


@pytest.mark.parametrize("trained", [True, False])
def test_a_checkpoint_that_a_kill_left_half_written_is_removed(
    roots: Path, monkeypatch: pytest.MonkeyPatch, trained: bool
) -> None:
    monkeypatch.setattr(nnunet, "run_job", lambda *_: None)
    fold = make_trained(roots) / "fold_0"
    if not trained:
        (fold / nnunet.FINAL).unlink()
    torch.save({"trainer_name": "OneShotTrainer"}, fold / "checkpoint_best.pth")
    (fold / "checkpoint_best.pth.part").write_bytes(b"ha")
    nnunet.train(901, "2d", 0, "OneShotTrainer", "nnUNetPlans", "cpu")
    assert not list(fold.glob("*.part"))
    assert (fold / "checkpoint_best.pth").is_file()


@pytest.mark.parametrize("name", nnunet.RESUMED)
@pytest.mark.parametrize("trainer", ["OneShotTrainer", "nnUNetTrainer"])
def test_a_checkpoint_of_another_trainer_is_neither_a_model_nor_gone_on_from(
    roots: Path, no_jobs: Callable[[], None], name: str, trainer: str
) -> None:
    fold = make_trained(roots) / "fold_0"
    torch.save({"trainer_name": "nnUNetTrainer_5epochs"}, fold / nnunet.FINAL)
    (fold / nnunet.FINAL).rename(fold / name)
    fold.parent.rename(nnunet.results_folder(901, trainer, "nnUNetPlans", "2d"))
    no_jobs()
    with pytest.raises(OneShotError, match=f"{name}: expected a checkpoint of {trainer}, found one of .*_5epochs; mov"):
        nnunet.train(901, "2d", 0, trainer, "nnUNetPlans", "cpu")


@pytest.mark.parametrize("kept", [0, 100])
def test_a_checkpoint_that_was_cut_short_is_named(roots: Path, no_jobs: Callable[[], None], kept: int) -> None:
    """As nnU-Net's own trainers leave it where they are killed amid writing it."""
    fold = make_trained(roots) / "fold_0"
    (fold / "checkpoint_latest.pth").write_bytes((fold / nnunet.FINAL).read_bytes()[:kept])
    (fold / nnunet.FINAL).unlink()
    no_jobs()
    with pytest.raises(OneShotError, match=r"checkpoint_latest.pth: expected .* found a file that cannot be read; mov"):
        nnunet.train(901, "2d", 0, "OneShotTrainer", "nnUNetPlans", "cpu")


def test_half_written_predictions_are_removed_where_all_are_whole(roots: Path, no_jobs: Callable[[], None]) -> None:
    """A kill may hit the moment between the last case and the staging folder's removal."""
    make_trained(roots)
    out = roots / "out"
    (out / STAGING).mkdir(parents=True)
    (out / STAGING / "case_000.nii.gz").write_bytes(b"ha")
    (out / "case_000.nii.gz").write_bytes(b"whole")
    no_jobs()
    nnunet.predict(901, "2d", [0], "OneShotTrainer", "nnUNetPlans", {"case_000": [roots / "image"]}, out, "cpu")
    assert [path.name for path in out.iterdir()] == ["case_000.nii.gz"]


def test_images_that_are_links_are_predicted_by_the_names_of_the_links(
    roots: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its readers go by a file's ending, and find a TIFF's spacing beside it; a store's files have neither."""
    make_trained(roots)
    (roots / "store").mkdir()
    (roots / "store" / "5f1a").write_bytes(b"content")
    link = roots / "case_000_0000.nii.gz"
    link.symlink_to(roots / "store" / "5f1a")
    jobs: list[dict[str, Any]] = []
    monkeypatch.setattr(nnunet, "run_job", lambda job, *_: jobs.append(job))
    monkeypatch.chdir(roots)
    images = {"case_000": [Path(link.name)]}
    nnunet.predict(901, "2d", [0], "OneShotTrainer", "nnUNetPlans", images, roots / "out", "cpu")
    assert jobs[0]["images"] == {"case_000": [str(link)]}


def prepare(roots: Path, cases: int) -> None:
    """A dataset that is preprocessed for 2D, without a process of nnU-Net's."""
    write_dataset(roots / "nnUNet_raw", NAME, cases=cases)
    preprocess_in_process(NAME, ["2d"])


@pytest.mark.slow
def test_a_whole_run_is_not_repeated(roots: Path, no_jobs: Callable[[], None]) -> None:
    write_dataset(roots / "nnUNet_raw", NAME, cases=2)
    configurations = ["2d", "3d_fullres"]
    nnunet.plan_and_preprocess(901, TINY, configurations, 1)
    for configuration in configurations:
        folder = nnunet.train(901, configuration, 0, "Quick", SMALL_PLANS, "cpu")
        assert (folder / nnunet.FINAL).is_file()
    out = roots / "out"
    images = {
        f"case_{n:03d}": [roots / "nnUNet_raw" / NAME / "imagesTr" / f"case_{n:03d}_0000.nii.gz"] for n in range(2)
    }
    arguments = (901, "3d_fullres", [0], "Quick", SMALL_PLANS, images, out, "cpu")
    nnunet.predict(*arguments, save_probabilities=True)
    label = sitk.ReadImage(str(out / "case_001.nii.gz"))
    assert label.GetSize() == sitk.ReadImage(str(images["case_001"][0])).GetSize()
    assert np.load(out / "case_001.npz")["probabilities"].shape[0] == 3
    kept = (out / "case_000.nii.gz").stat().st_mtime_ns
    (out / "case_001.npz").unlink()
    nnunet.predict(*arguments, save_probabilities=True)
    assert (out / "case_001.npz").is_file()
    assert (out / "case_000.nii.gz").stat().st_mtime_ns == kept
    assert not any(path.is_dir() for path in out.iterdir())
    no_jobs()
    nnunet.plan_and_preprocess(901, TINY, configurations)
    nnunet.train(901, "2d", 0, "Quick", SMALL_PLANS, "cpu")
    nnunet.predict(*arguments, save_probabilities=True)


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_a_killed_run_leaves_no_process_and_is_resumed(roots: Path) -> None:
    prepare(roots, cases=2)
    call = f"from nnunet_oneshot import nnunet; nnunet.train(901, '2d', 'all', 'Quick', '{SMALL_PLANS}', 'cpu')"
    driver = subprocess.Popen([sys.executable, "-c", call], stderr=subprocess.DEVNULL)
    fold = nnunet.results_folder(901, "Quick", SMALL_PLANS, "2d") / "fold_all"
    _wait(lambda: (fold / "checkpoint_latest.pth").is_file() or driver.poll() is not None)
    driver.send_signal(signal.SIGKILL)
    driver.wait()
    _wait(lambda: not _processes_with(str(roots)))
    assert not (fold / nnunet.FINAL).is_file()
    nnunet.train(901, "2d", "all", "Quick", SMALL_PLANS, "cpu")
    assert (fold / nnunet.FINAL).is_file()
    assert "Epoch 0" not in (fold / "nnunet.log").read_text().split("Using device")[-1]


@pytest.mark.slow
def test_a_failure_of_nnunet_ends_with_its_log(roots: Path) -> None:
    folder = write_dataset(roots / "nnUNet_raw", NAME, cases=1)
    (folder / "imagesTr" / "case_000_0000.nii.gz").write_bytes(b"not an image")
    with pytest.raises(NnunetFailureError, match=r"nnU-Net failed to prepare(.|\n)*case_000_0000.nii.gz"):
        nnunet.plan_and_preprocess(901, TINY, ["2d"], 1)


@pytest.mark.slow
@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs a device that is always full")
def test_a_disk_that_fills_up_inside_nnunet_is_said(roots: Path) -> None:
    write_dataset(roots / "nnUNet_raw", NAME, cases=1)
    preprocessed = roots / "nnUNet_preprocessed" / NAME
    preprocessed.mkdir()
    (preprocessed / "dataset_fingerprint.json").symlink_to("/dev/full")
    with pytest.raises(OneShotError, match=r"found none left \('.*No space left on device'.*nnunet.log\); free some"):
        nnunet.plan_and_preprocess(901, TINY, ["2d"], 1)


def _closed(dir: Path) -> None:
    raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(dir))


@pytest.mark.slow
@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs a device that is always full")
def test_a_disk_too_full_for_the_log_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    broken = {"job": "nothing of that name"}
    monkeypatch.setattr(tempfile, "TemporaryFile", _closed)
    with pytest.raises(NnunetFailureError, match="KeyError"):
        run_job(broken, tmp_path / "log")
    monkeypatch.setattr(tempfile, "TemporaryFile", lambda dir: io.FileIO("/dev/full", "w"))
    with pytest.raises(OSError, match=os.strerror(errno.ENOSPC)) as caught:
        run_job(broken, tmp_path / "log")
    assert caught.value.filename == str(tmp_path)


@pytest.mark.slow
def test_it_trains_goes_on_and_predicts_in_bfloat16(roots: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    prepare(roots, cases=2)
    monkeypatch.setenv(VARIABLE, "1")
    arguments = (901, "2d", "all", "OneShotTrainer_tiny", SMALL_PLANS, "cpu")
    fold = nnunet.train(*arguments)
    trained = torch.load(fold / "checkpoint_final.pth", weights_only=False)["network_weights"]
    assert all(weight.dtype == torch.float32 for weight in trained.values())
    os.replace(fold / "checkpoint_final.pth", fold / "checkpoint_latest.pth")
    nnunet.train(*arguments)
    again = torch.load(fold / "checkpoint_final.pth", weights_only=False)["network_weights"]
    assert all(torch.equal(weight, again[name]) for name, weight in trained.items())
    image = roots / "nnUNet_raw" / NAME / "imagesTr" / "case_001_0000.nii.gz"
    labels = []
    for asked in ("1", "0"):
        monkeypatch.setenv(VARIABLE, asked)
        output = roots / asked
        nnunet.predict(901, "2d", ("all",), "OneShotTrainer_tiny", SMALL_PLANS, {"case_001": [image]}, output, "cpu")
        labels.append(sitk.GetArrayFromImage(sitk.ReadImage(str(output / "case_001.nii.gz"))))
    assert (labels[1] > 0).any()
    assert (labels[0] == labels[1]).mean() > 0.99


def test_weights_trained_on_a_gpu_start_a_training_where_there_is_none(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    weights, checkpoint = {"layer": torch.arange(3.0)}, tmp_path / "checkpoint_final.pth"
    with monkeypatch.context() as trained_on_a_gpu:
        trained_on_a_gpu.setattr(torch.serialization, "location_tag", lambda _: "cuda:0")
        torch.save({"network_weights": weights}, checkpoint)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(RuntimeError, match="CUDA"):
        torch.load(checkpoint, weights_only=False)
    (temporary := tmp_path / "temporary").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(temporary))
    network, written = torch.nn.ParameterDict({"layer": torch.zeros(3)}), []

    def run_training(*_: object, pretrained_weights: Any, **__: object) -> None:
        load_pretrained_weights(network, pretrained_weights)
        written.extend(temporary.iterdir())

    monkeypatch.setattr(nnunet_jobs, "run_training", run_training)
    nnunet_jobs.train("Dataset901_Tiny", "2d", "all", "OneShotTrainer", "nnUNetPlans", "cpu", str(checkpoint))
    assert torch.equal(network["layer"], weights["layer"])
    assert not written, "a kill amid the training would leave it for ever"


def test_processes_of_a_distributed_training_load_weights_themselves(monkeypatch: pytest.MonkeyPatch) -> None:
    """What they get is sent to each of them."""
    given: list[object] = []
    monkeypatch.setattr(nnunet_jobs, "run_training", lambda *_, **options: given.append(options["pretrained_weights"]))
    arguments = ("Dataset901_Tiny", "2d", "all", "OneShotTrainer", "nnUNetPlans", "cpu")
    nnunet_jobs.train(*arguments, "checkpoint_final.pth", num_gpus=2)
    nnunet_jobs.train(*arguments, num_gpus=2)
    assert given == ["checkpoint_final.pth", None]


@pytest.mark.slow
def test_intensities_are_of_foreground_alone_where_labels_are_ignored(
    roots: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of CT they decide how images are normalised; a case that is left out is ignore throughout, air included."""
    for variable in ("nnUNet_raw", "nnUNet_preprocessed"):
        monkeypatch.setattr(fingerprint_extractor, variable, str(roots / variable))
    write_dataset(roots / "nnUNet_raw", "Dataset902_True", labels=LABELS_WITHOUT_IGNORE)
    folder = write_dataset(roots / "nnUNet_raw", NAME, left_out=["case_001", "case_002"])
    shutil.copytree(folder.with_name("Dataset902_True") / "labelsTr", folder / "pseudoTr" / "fused")
    found = {
        extractor: {
            name: extractor(name, 1).run(True)["foreground_intensity_properties_per_channel"]
            for name in ("Dataset902_True", NAME)
        }
        for extractor in (PseudoLabelFingerprintExtractor, DatasetFingerprintExtractor)
    }
    ours, stock = found.values()
    assert ours[NAME] == ours["Dataset902_True"] == stock["Dataset902_True"]
    assert stock[NAME][0]["mean"] < ours[NAME][0]["mean"] - 10, "what nnU-Net would make of what is ignored"


@pytest.mark.slow
def test_predictions_by_another_trainers_network_are_refused(roots: Path) -> None:
    prepare(roots, cases=1)
    fold = nnunet.train(901, "2d", "all", "Quick", SMALL_PLANS, "cpu")
    other = nnunet.results_folder(901, "OneShotTrainer_tiny", SMALL_PLANS, "2d")
    shutil.copytree(fold.parent, other)
    image = roots / "nnUNet_raw" / NAME / "imagesTr" / "case_000_0000.nii.gz"
    output = roots / "predicted"
    arguments = (901, "2d", ("all",), "OneShotTrainer_tiny", SMALL_PLANS, {"case_000": [image]}, output, "cpu")
    with pytest.raises(OneShotError, match="expected a checkpoint of OneShotTrainer_tiny, found one of Quick"):
        nnunet.predict(*arguments)
    assert not list(output.glob("*.nii.gz"))


@pytest.mark.slow
def test_a_users_mistake_that_the_trainer_finds_is_bad_input(roots: Path) -> None:
    prepare(roots, cases=2)
    path = roots / "nnUNet_preprocessed" / NAME / "dataset.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "oneshot": {"schema": 2}}))
    with pytest.raises(OneShotError, match="schema 2, this version reads up to 1"):
        nnunet.train(901, "2d", "all", "Quick", SMALL_PLANS, "cpu")


def _wait(condition: Callable[[], bool], seconds: float = 180) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.05)


def _processes_with(text: str) -> list[int]:
    """Living processes whose environment names `text`."""
    found = []
    for folder in Path("/proc").iterdir():
        if folder.name.isdigit() and int(folder.name) != os.getpid():
            try:
                alive = b"\nState:\tZ" not in (folder / "status").read_bytes()
                found += [int(folder.name)] if alive and text.encode() in (folder / "environ").read_bytes() else []
            except (FileNotFoundError, ProcessLookupError, PermissionError):
                continue
    return found
