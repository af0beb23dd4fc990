"""OneShotTrainer does what nnUNetTrainer does: regions, cascade, channels, architectures, sparse labels."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import blosc2
import numpy as np
import pytest
import torch
from nnunetv2.run.run_training import get_trainer_from_args, maybe_load_checkpoint, run_training
from tiny_dataset import SHAPE, preprocess_in_process, write_dataset

import _nnunet_oneshot_path
from nnunet_oneshot.next_stage import predict_for_next_stages
from nnunet_oneshot.settings import SMALL_PLANS, LossSettings

pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore:Detected call of `lr_scheduler.step:UserWarning"),
    pytest.mark.filterwarnings("ignore:`torch.jit:FutureWarning"),
    pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning"),
]

NAME = "Dataset901_Tiny"
QUICK = """
from nnunetv2.utilities.find_objects import recursive_find_trainer_class_by_name

class Quick(recursive_find_trainer_class_by_name("OneShotTrainer_tiny")):
    def initialize(self):
        self.num_epochs, self.num_iterations_per_epoch, self.num_val_iterations_per_epoch, self.save_every = 2, 1, 1, 1
        super().initialize()

    def plot_network_architecture(self):
        pass

    def perform_actual_validation(self, save_probabilities=False):
        if save_probabilities:
            super().perform_actual_validation(save_probabilities)
"""
REGIONS = {"background": 0, "whole": [1, 2], "core": 2, "ignore": 3}
EVERYTHING = LossSettings(ramp_start=0.0, end_weight=0.5, guess_share=0.3, annotated_share=0.3, cross_patch=0.5)
Write = Callable[..., Path]


@pytest.fixture
def write(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Write]:
    """Writes and preprocesses a tiny dataset; returns its preprocessed folder."""
    for root in ("nnUNet_raw", "nnUNet_preprocessed", "nnUNet_results"):
        (tmp_path / root).mkdir()
        monkeypatch.setenv(root, str(tmp_path / root))
    (tmp_path / "own").mkdir()
    (tmp_path / "own" / "quick.py").write_text(QUICK)
    monkeypatch.setenv("nnUNet_extTrainer", str(tmp_path / "own"))
    monkeypatch.setenv("nnUNet_def_n_proc", "1")
    _nnunet_oneshot_path.register()
    threads = torch.get_num_threads()
    torch.set_num_threads(1)

    def dataset(configuration: str = "2d", channels: int = 1, **content: Any) -> Path:
        folder = write_dataset(tmp_path / "nnUNet_raw", NAME, **content)
        add_channels(folder, channels)
        monkeypatch.setenv("nnUNet_n_proc_DA", "1")
        preprocess_in_process(NAME, [configuration])
        monkeypatch.setenv("nnUNet_n_proc_DA", "0")
        return tmp_path / "nnUNet_preprocessed" / NAME

    yield dataset
    torch.set_num_threads(threads)


def add_channels(folder: Path, channels: int) -> None:
    """Every image once more for each further channel."""
    path = folder / "dataset.json"
    content = json.loads(path.read_text())
    content["channel_names"] = {str(number): "MRI" for number in range(channels)}
    for entry in content["dataset"].values():
        first = entry["images"][0]
        entry["images"] = [first.replace("_0000", f"_{number:04d}") for number in range(channels)]
        for copy in entry["images"][1:]:
            shutil.copy(folder / first, folder / copy)
    path.write_text(json.dumps(content))


def trainer(configuration: str = "2d", fold: Any = "all") -> Any:
    """OneShotTrainer with every part of its loss and augmentation on, half way through its training."""
    arguments = ("901", configuration, fold, "OneShotTrainer_tiny", SMALL_PLANS)
    made = get_trainer_from_args(*arguments, device=torch.device("cpu"))
    made.loss_settings = EVERYTHING
    made.current_epoch = made.num_epochs // 2
    return made


def train(one: Any, steps: int = 6) -> list[dict[str, Any]]:
    """A few steps and one validation step."""
    one.on_train_start()
    one.on_epoch_start()
    one.on_train_epoch_start()
    outputs = [one.train_step(next(one.dataloader_train)) for _ in range(steps)]
    with torch.no_grad():
        one.on_validation_epoch_start()
        assert np.isfinite(one.validation_step(next(one.dataloader_val))["loss"])
    assert all(np.isfinite(output["loss"]) for output in outputs)
    return outputs


def change_plan(preprocessed: Path, change: Callable[[dict[str, Any]], None]) -> None:
    path = preprocessed / f"{SMALL_PLANS}.json"
    plans = json.loads(path.read_text())
    change(plans["configurations"])
    path.write_text(json.dumps(plans))


@pytest.mark.parametrize("configuration", ["2d", "3d_fullres"])
def test_regions_with_ignore(write: Write, configuration: str) -> None:
    write(configuration, labels=REGIONS, regions_class_order=[1, 2])
    outputs = train(trainer(configuration))
    assert max(output["divergence"] for output in outputs) > 0
    assert max(output["consistency"] for output in outputs) > 0


def test_several_channels(write: Write) -> None:
    write(channels=2)
    one = trainer()
    train(one)
    assert next(one.dataloader_train)["data"].shape[1] == 2


def test_without_deep_supervision(write: Write) -> None:
    write()
    one = trainer()
    one.enable_deep_supervision = False
    assert max(output["consistency"] for output in train(one)) > 0


def test_patches_that_are_not_square_are_flipped_and_not_turned(write: Write) -> None:
    write(shape=(8, 24, 40))
    one = trainer()
    assert max(output["consistency"] for output in train(one)) > 0
    assert not one.view_choice.rotations
    assert "without rotations" in Path(one.log_file).read_text()


def test_thick_slices_are_flipped_and_turned_in_plane_alone(write: Write) -> None:
    write("3d_fullres", shape=(10, 32, 32), spacing=(1.0, 1.0, 5.0))
    one = trainer("3d_fullres")
    assert max(output["consistency"] for output in train(one)) > 0
    patch = one.configuration_manager.patch_size
    assert patch[0] < patch[1] == patch[2]
    assert one.view_choice.rotations


def test_residual_encoder_plans(write: Write) -> None:
    def residual(configurations: dict[str, Any]) -> None:
        architecture = configurations["2d"]["architecture"]
        architecture["network_class_name"] = "dynamic_network_architectures.architectures.unet.ResidualEncoderUNet"
        blocks = architecture["arch_kwargs"].pop("n_conv_per_stage")
        architecture["arch_kwargs"]["n_blocks_per_stage"] = blocks

    change_plan(write(), residual)
    assert max(output["consistency"] for output in train(trainer())) > 0


def test_the_cascade_sees_the_stage_before(write: Write, tmp_path: Path) -> None:
    """Of folds 0 and 1, each of which validates on one pseudo label; the annotated case validates in none."""

    def cascade(configurations: dict[str, Any]) -> None:
        configurations["3d_lowres"] = {"inherits_from": "3d_fullres", "next_stage": "3d_cascade_fullres"}
        configurations["3d_cascade_fullres"] = {"inherits_from": "3d_fullres", "previous_stage": "3d_lowres"}

    change_plan(write("3d_fullres", cases=3), cascade)
    stage = f"OneShotTrainer_tiny__{SMALL_PLANS}__3d_lowres/predicted_next_stage/3d_cascade_fullres"
    predicted = tmp_path / "nnUNet_results" / NAME / stage
    for fold in (0, 1):
        one = trainer("3d_lowres", fold)
        assert max(output["consistency"] for output in train(one)) > 0
        one.perform_actual_validation()
    assert sorted(file.name for file in predicted.iterdir()) == [f"case_{number:03d}.b2nd" for number in range(3)]
    # Of a case that validates ours is what nnU-Net writes.
    nnunets = blosc2.open(urlpath=str(predicted / "case_002.b2nd"), mode="r")[:]
    assert nnunets.shape == SHAPE
    (predicted / "case_002.b2nd").unlink()
    predict_for_next_stages(one, ["case_002"])
    assert (blosc2.open(urlpath=str(predicted / "case_002.b2nd"), mode="r")[:] == nnunets).all()
    one = trainer("3d_cascade_fullres", 0)
    train(one)
    assert next(one.dataloader_train)["data"].shape[1] == 1 + 2


def test_a_sparse_label_trains(write: Write) -> None:
    preprocessed = write("3d_fullres", cases=2, annotated=["case_000", "case_001"]) / f"{SMALL_PLANS}_3d_fullres"
    for file in preprocessed.glob("*_seg.b2nd"):
        seg = blosc2.open(urlpath=str(file), mode="r")[:]
        seg[:, 1:] = np.where(np.arange(1, seg.shape[1]) == seg.shape[1] // 2, 1, 0)[:, None, None] * seg[:, 1:]
        seg[:, np.arange(seg.shape[1]) != seg.shape[1] // 2] = 3
        file.unlink()
        blosc2.asarray(seg, urlpath=str(file))
    outputs = train(trainer("3d_fullres"))
    assert min(output["divergence"] for output in outputs) > 0.5


def test_nnunets_flags_do_what_they_do_for_its_own_trainer(write: Write, tmp_path: Path) -> None:
    """--disable_checkpointing, a whole training, --val with --npz, -pretrained_weights and --c, in this order."""
    write(cases=3)
    arguments = ("901", "2d", "0", "Quick", SMALL_PLANS)
    fold = tmp_path / "nnUNet_results" / NAME / f"Quick__{SMALL_PLANS}__2d" / "fold_0"
    cpu = torch.device("cpu")
    run_training(*arguments, disable_checkpointing=True, device=cpu)
    assert not list(fold.glob("*.pth"))
    run_training(*arguments, device=cpu)
    assert (fold / "checkpoint_final.pth").is_file()
    assert "cases have pseudo labels" not in newest_log(fold)
    run_training(*arguments, only_run_validation=True, export_validation_probabilities=True, device=cpu)
    assert (fold / "validation" / "summary.json").is_file()
    assert [file.name for file in (fold / "validation").glob("*.npz")] == ["case_001.npz"]
    assert "1 of 1 validation cases have pseudo labels (not the truth)" in newest_log(fold)
    kept = torch.load(fold / "checkpoint_final.pth", weights_only=False)["network_weights"]
    one = get_trainer_from_args("901", "2d", 1, "Quick", SMALL_PLANS, device=cpu)
    maybe_load_checkpoint(one, False, False, str(fold / "checkpoint_final.pth"))
    loaded = one.network.state_dict()
    assert all(torch.equal(loaded[key], kept[key]) for key in kept if ".seg_layers." not in key)
    # A training that was stopped after its first epoch.
    one = get_trainer_from_args("901", "2d", 0, "Quick", SMALL_PLANS, device=cpu)
    one.load_checkpoint(str(fold / "checkpoint_final.pth"))
    one.current_epoch = 0
    one.save_checkpoint(str(fold / "checkpoint_latest.pth"))
    (fold / "checkpoint_final.pth").unlink()
    run_training(*arguments, continue_training=True, device=cpu)
    assert (fold / "checkpoint_final.pth").is_file()
    said = newest_log(fold)
    assert "Epoch 1" in said
    assert "Epoch 0" not in said


def newest_log(fold: Path) -> str:
    return max(fold.glob("training_log*.txt"), key=lambda file: file.stat().st_mtime_ns).read_text()


def core_from_elsewhere(batch: dict[str, Any]) -> bool:
    """Whether a sample of another case than the one that has a core has one."""
    samples = zip(batch["keys"], batch["target"][0], strict=True)
    return any((label == 2).any() for key, label in samples if key != "case_000")


def test_cross_patches_are_made_in_the_loaders_workers(write: Write, monkeypatch: pytest.MonkeyPatch) -> None:
    """Only the annotated case has a core, so that a core in another case's sample came in a cross patch."""
    preprocessed = write(cases=3) / f"{SMALL_PLANS}_2d"
    for case in ("case_001", "case_002"):
        file = preprocessed / f"{case}_seg.b2nd"
        seg = blosc2.open(urlpath=str(file), mode="r")[:]
        file.unlink()
        blosc2.asarray(np.where(seg == 2, 1, seg), urlpath=str(file))
    one = trainer()
    one.loss_settings = replace(EVERYTHING, guess_share=0.0, annotated_share=0.0, cross_patch=1.0)
    monkeypatch.setenv("nnUNet_n_proc_DA", "2")
    one.on_train_start()
    one.on_train_epoch_start()
    try:
        # What is drawn is not seeded: many batches have a core from elsewhere, a given few may have none.
        batches = (next(one.dataloader_train) for _ in range(100))
        batch = next((batch for batch in batches if core_from_elsewhere(batch)), None)
        assert batch is not None
        output = one.train_step(batch)
    finally:
        one.dataloader_train._finish()
        one.dataloader_val._finish()
    assert len(one.dataloader_train._processes) == 0
    assert np.isfinite(output["loss"])
