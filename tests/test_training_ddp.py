"""The dual-component loss in two processes. nnU-Net's own DDP needs CUDA; here its loss part alone runs over gloo."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from nnunetv2.training.loss.compound_losses import DC_and_CE_loss
from nnunetv2.training.loss.dice import MemoryEfficientSoftDiceLoss
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from nnunet_oneshot.losses import DualComponentLoss, show_views
from nnunet_oneshot.training_views import TrainingView

IGNORE = 2
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


def process(rank: int, store: str, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
    for learn in (False, True):
        network, data, target = problem()
        wrapped = DistributedDataParallel(network)
        gradient = one_gradient(wrapped, network, data[rank : rank + 1], target[rank : rank + 1], learn)
        torch.save(gradient, Path(folder) / f"{rank}_{learn}.pt")
    dist.destroy_process_group()


@pytest.mark.slow
def test_two_processes_learn_what_one_learns_from_the_joint_batch(tmp_path: Path) -> None:
    """Where processes have as many voxels of each kind: means are each process's own, as in nnU-Net."""
    mp.spawn(process, (str(tmp_path / "store"), str(tmp_path)), nprocs=2)
    for learn in (False, True):
        first, second = (torch.load(tmp_path / f"{rank}_{learn}.pt") for rank in range(2))
        assert torch.equal(first, second)
        network, data, target = problem()
        assert torch.allclose(first, one_gradient(network, network, data, target, learn), atol=1e-6)
