"""The dual-component loss and the trainer's steps in two processes over gloo; nnU-Net's own DDP needs CUDA."""

from __future__ import annotations

import time
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from batchgeneratorsv2.transforms.utils.deep_supervision_downsampling import DownsampleSegForDSTransform
from nnunetv2.run.run_training import get_trainer_from_args
from nnunetv2.training.loss.compound_losses import DC_and_CE_loss
from nnunetv2.training.loss.dice import MemoryEfficientSoftDiceLoss
from tiny_dataset import LABELS, preprocess_in_process, write_dataset
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from nnunet_oneshot.losses import DualComponentLoss, show_views
from nnunet_oneshot.settings import SMALL_PLANS
from nnunet_oneshot.training_views import TrainingView

IGNORE = 2
SECONDS = 480
"""Processes that wait for each other for ever fail instead."""
KEYS = (["case_000", "case_001"], ["case_001", "case_002"])
"""Of each process's batch: one annotated and one pseudo-labelled sample in the first, pseudo labels in the second."""
VIEW = TrainingView(flip=(1,))


def one_gradient(network: nn.Module, bare: nn.Module, data: Tensor, target: Tensor, learn: bool) -> Tensor:
    """Gradient of the dual-component loss with a view of the samples that have divergence, or with full passes."""
    dice = {"batch_dice": False, "smooth": 1e-5, "do_bg": False, "ddp": False}
    supervised = DC_and_CE_loss(dice, {}, ignore_label=IGNORE, dice_class=MemoryEfficientSoftDiceLoss)
    loss = DualComponentLoss(supervised, IGNORE, regions=False)
    samples = (target == IGNORE).flatten(1).any(1).nonzero()[:, 0]
    if len(samples):
        loss.announce(show_views(bare, data, [VIEW], samples, 0.5, learn))
    loss(network(data), target).backward()
    weight = next(bare.parameters())
    assert weight.grad is not None
    return weight.grad


def problem() -> tuple[nn.Module, Tensor, Tensor]:
    """A network that is not equivariant and two samples with as much divergence each."""
    torch.manual_seed(0)
    network = nn.Conv2d(1, 2, 3, padding=1)
    data = torch.randn(2, 1, 8, 8)
    target = torch.randint(0, 2, (2, 1, 8, 8))
    target[:, :, :3] = IGNORE
    return network, data, target


def join(rank: int, store: str) -> None:
    """Join the other process; one that waits for it too long raises."""
    torch.set_num_threads(1)
    limit = timedelta(seconds=SECONDS // 4)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2, timeout=limit)


def in_two_processes(function: Callable[[int, str, str], None], folder: Path) -> None:
    """Call function(rank, store, folder) in two processes, for SECONDS at most."""
    context = mp.spawn(function, (str(folder / "store"), str(folder)), nprocs=2, join=False)
    end = time.monotonic() + SECONDS
    while not context.join(timeout=max(0.1, end - time.monotonic())):
        if time.monotonic() > end:
            for one in context.processes:
                one.kill()
            pytest.fail(f"expected both processes to end within {SECONDS} s, found one waiting for the other")


def process(rank: int, store: str, folder: str) -> None:
    join(rank, store)
    for learn in (False, True):
        network, data, target = problem()
        wrapped = DistributedDataParallel(network)
        gradient = one_gradient(wrapped, network, data[rank : rank + 1], target[rank : rank + 1], learn)
        torch.save(gradient, Path(folder) / f"{rank}_{learn}.pt")
    dist.destroy_process_group()


@pytest.mark.slow
def test_two_processes_learn_what_one_learns_from_the_joint_batch(tmp_path: Path) -> None:
    """Where processes have as many voxels of each kind: means are each process's own, as in nnU-Net."""
    in_two_processes(process, tmp_path)
    for learn in (False, True):
        first, second = (torch.load(tmp_path / f"{rank}_{learn}.pt") for rank in range(2))
        assert torch.equal(first, second)
        network, data, target = problem()
        assert torch.allclose(first, one_gradient(network, network, data, target, learn), atol=1e-6)


@pytest.fixture
def dataset(training_roots: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A tiny dataset, preprocessed; the folder for what processes write."""
    monkeypatch.setenv("nnUNet_n_proc_DA", "1")
    write_dataset(training_roots / "nnUNet_raw", "Dataset901_Tiny", cases=3)
    preprocess_in_process("Dataset901_Tiny", ["2d"])
    monkeypatch.setenv("nnUNet_n_proc_DA", "0")
    return training_roots


def joined_trainer(rank: int, store: str) -> Any:
    """One of two, half way through its training, its batch Dice summed over both processes.

    nnU-Net takes a GPU for each process, so the trainer joins after it was made.
    """
    trainer = get_trainer_from_args(
        "901", "2d", "all", "OneShotTrainerThreePasses", SMALL_PLANS, device=torch.device("cpu")
    )
    torch.manual_seed(0)
    trainer.initialize()
    trainer.current_epoch = trainer.num_epochs // 2
    join(rank, store)
    trainer.is_ddp, trainer.local_rank = True, rank
    trainer.configuration_manager.configuration["batch_dice"] = True
    trainer.loss = trainer._build_loss()
    trainer.network = DistributedDataParallel(trainer.network)
    trainer.on_train_start()
    return trainer


def one_batch(trainer: Any, rank: int, divergent: bool) -> dict[str, Any]:
    """Noise with labels of all classes; `divergent` where a part of them is ignored."""
    generator = torch.Generator().manual_seed(rank)
    shape = (2, 1, *trainer.configuration_manager.patch_size)
    label = torch.randint(0, LABELS["ignore"], shape, generator=generator)
    if divergent:
        label[..., :4] = LABELS["ignore"]
    downsample = DownsampleSegForDSTransform(trainer._get_deep_supervision_scales())
    levels = zip(*(downsample(segmentation=one)["segmentation"] for one in label), strict=True)
    return {
        "data": torch.randn(shape, generator=generator),
        "target": [torch.stack(level) for level in levels],
        "keys": KEYS[rank],
    }


def train_and_validate(rank: int, store: str, folder: str) -> None:
    """Three steps of three full passes: divergence in both processes, in the first one alone, in none; one validation.

    Each call of nnU-Net's loss gathers batch Dice from all processes, so one that calls it more often than the other
    waits for ever.
    """
    trainer = joined_trainer(rank, store)
    trainer.network.train()
    places = (True, True), (True, False), (False, False)
    steps = [trainer.train_step(one_batch(trainer, rank, divergent[rank])) for divergent in places]
    weights = torch.cat([weight.detach().flatten() for weight in trainer.network.parameters()])
    with torch.no_grad():
        trainer.on_validation_epoch_start()
        validated = trainer.validation_step(one_batch(trainer, rank, divergent=True))
        trainer.on_validation_epoch_end([validated])
    dice = trainer.logger.get_value("dice_per_class_or_region", step=-1)
    log = Path(trainer.log_file).read_text()
    found = {"steps": steps, "weights": weights, "validated": validated, "dice": dice, "log": log}
    torch.save(found, Path(folder) / f"{rank}.pt")
    dist.destroy_process_group()


@pytest.mark.slow
def test_processes_call_the_loss_equally_often_whatever_their_batches_hold(dataset: Path) -> None:
    in_two_processes(train_and_validate, dataset)
    first, second = (torch.load(dataset / f"{rank}.pt", weights_only=False) for rank in range(2))
    assert torch.equal(first["weights"], second["weights"])
    assert np.isfinite([step["loss"] for step in (*first["steps"], *second["steps"])]).all()
    assert [step["consistency"] > 0 for step in first["steps"]] == [True, True, False]
    assert [step["consistency"] > 0 for step in second["steps"]] == [True, False, False]
    tp, fp, fn = (first["validated"][key] + second["validated"][key] for key in ("tp_hard", "fp_hard", "fn_hard"))
    assert np.allclose(first["dice"], 2 * tp / (2 * tp + fp + fn))
    assert np.allclose(first["dice"], second["dice"])
    assert "not logged apart" in first["log"]
    assert "Pseudo dice against" not in first["log"]
