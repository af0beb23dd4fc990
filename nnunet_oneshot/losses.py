"""The dual-component loss: nnU-Net's own loss where views agree, consistency between views where they diverge.

Divergence voxels carry nnU-Net's ignore label, so nnU-Net's loss leaves them out by itself; this module holds the other
component. After YoloSeg (Medical Image Analysis 2026), here for 2D and 3D, several classes and regions.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from itertools import combinations
from typing import overload

import torch
from nnunetv2.training.loss.deep_supervision import DeepSupervisionWrapper
from torch import Tensor, nn
from torch._dynamo import OptimizedModule
from torch.nn import functional

from nnunet_oneshot.settings import LossSettings
from nnunet_oneshot.training_views import TrainingView

Outputs = Tensor | Sequence[Tensor]
"""Logits (B, C, [Z,] Y, X): one tensor, or one a deep supervision level."""


def ramp(progress: float, settings: LossSettings) -> float:
    """Weight of the consistency term when `progress` (0 to 1) of the training is done.

    0 up to `ramp_start`, then linear up to `end_weight`.
    """
    if progress <= settings.ramp_start:
        return 0.0
    return settings.end_weight * min(1.0, (progress - settings.ramp_start) / (1.0 - settings.ramp_start))


def divergence(target: Tensor, ignore: int | None, regions: bool) -> Tensor:
    """Where a training target carries no label.

    Args:
        target: labels (B, 1, [Z,] Y, X), or with regions one-hot (B, R + 1, [Z,] Y, X) whose last channel is ignore.
        ignore: the ignore label, None where the data set has none.
        regions: True for region-based training.

    Returns:
        bool (B, 1, [Z,] Y, X).
    """
    if ignore is None:
        return torch.zeros_like(target[:, :1], dtype=torch.bool)
    return target[:, -1:].bool() if regions else target == ignore


def masked_mean(values: Tensor, mask: Tensor) -> Tensor:
    """Mean of `values` over `mask` (the same shape, bool); 0 with zero gradient where the mask is empty."""
    kept = torch.where(mask, values, torch.zeros_like(values))
    return kept.sum() / mask.sum().clamp(min=1)


class MaskedSymmetricKL(nn.Module):
    """Symmetric Kullback-Leibler divergence of two predictions over divergence voxels.

    Half the sum of both directions, each direction's target detached, averaged over channels and masked voxels.
    Channels are classes under a softmax, or independent regions under sigmoids. Computed in float32 whatever the
    logits' type and autocast say.
    """

    def __init__(self, ignore: int | None, regions: bool) -> None:
        super().__init__()
        self.ignore = ignore
        self.regions = regions

    def forward(self, first: Tensor, second: Tensor, target: Tensor) -> Tensor:
        """Scalar of two logits (B, C, [Z,] Y, X) and the target that says where the divergence is."""
        mask = divergence(target, self.ignore, self.regions)
        # nnU-Net uses autocast on CUDA alone, and torch has none to switch off on some other devices.
        with torch.autocast("cuda", enabled=False) if first.is_cuda else nullcontext():
            voxelwise = self._symmetric(first.float(), second.float())
            return masked_mean(voxelwise, mask[:, 0])

    def _symmetric(self, first: Tensor, second: Tensor) -> Tensor:
        """(B, [Z,] Y, X)."""
        divergence_of = _bernoulli_kl if self.regions else _categorical_kl
        return 0.5 * (divergence_of(first.detach(), second) + divergence_of(second.detach(), first)).mean(1)


def _categorical_kl(reference: Tensor, approximation: Tensor) -> Tensor:
    return functional.kl_div(approximation.log_softmax(1), reference.log_softmax(1), reduction="none", log_target=True)


def _bernoulli_kl(reference: Tensor, approximation: Tensor) -> Tensor:
    """KL of sigmoids, from logits: finite for any logit."""
    log_p, log_not_p = functional.logsigmoid(reference), functional.logsigmoid(-reference)
    log_q, log_not_q = functional.logsigmoid(approximation), functional.logsigmoid(-approximation)
    return log_p.exp() * (log_p - log_q) + log_not_p.exp() * (log_not_p - log_not_q)


class DualComponentLoss(nn.Module):
    """nnU-Net's loss, plus the consistency of views where some were announced for this call.

    A call that nothing was announced for is exactly nnU-Net's loss, so validation and batches without divergence cost
    and mean what they do in nnU-Net. The term has nnU-Net's deep supervision weights where its loss has any.

    `last_supervised` and `last_consistency` are both parts of the last call, detached, the second one without its
    weight; it is None where no views were compared.
    """

    def __init__(self, supervised: nn.Module, ignore: int, regions: bool) -> None:
        super().__init__()
        term = MaskedSymmetricKL(ignore, regions)
        deep = isinstance(supervised, DeepSupervisionWrapper)
        self.supervised = supervised
        self.consistency = DeepSupervisionWrapper(term, supervised.weight_factors) if deep else term
        self.last_supervised: Tensor | None = None
        self.last_consistency: Tensor | None = None
        self._announced: ShownViews | None = None

    def announce(self, shown: ShownViews) -> None:
        """Compare the next call's output with what `shown` says."""
        self._announced = shown

    def forward(self, output: Outputs, target: Outputs) -> Tensor:
        """Scalar loss of the network's output and nnU-Net's target."""
        loss: Tensor = self.supervised(output, target)
        shown, self._announced = self._announced, None
        if shown is not None and shown.supervised:
            loss = torch.stack([loss, *(self.supervised(view, target) for view in shown.outputs)]).mean()
        self.last_supervised, self.last_consistency = loss.detach(), None
        if shown is None:
            return loss
        outputs, where = [select(output, shown.samples), *shown.outputs], select(target, shown.samples)
        term = torch.stack([self.consistency(one, other, where) for one, other in combinations(outputs, 2)]).mean()
        self.last_consistency = term.detach()
        return loss + shown.weight * term


@dataclass(frozen=True, eq=False)
class ShownViews:
    """What a network says of views of some samples, turned back.

    Attributes:
        outputs: of each view, logits (S, C, [Z,] Y, X) of S samples: one tensor, or one a deep supervision level.
        samples: int64 (S,), their positions in the batch; all of them, in order, where `supervised`.
        weight: w(t) of the consistency term.
        supervised: whether each view learns from the labels too, the loss being the mean over batch and views.
    """

    outputs: Sequence[Outputs]
    samples: Tensor
    weight: float
    supervised: bool = False


def show_views(
    network: nn.Module,
    data: Tensor,
    views: Sequence[TrainingView],
    samples: Tensor,
    weight: float,
    learn: bool = False,
) -> ShownViews:
    """Ask a network about views of a batch.

    Args:
        network: in training mode; not DDP's wrapper, which expects a backward pass for each forward pass.
        data: the whole batch (B, C, [Z,] Y, X).
        views: how to present it.
        samples: int64 (S,), positions of the samples that have divergence. A compiled network is given all samples,
            because every new batch size compiles it again.
        weight: w(t).
        learn: full passes of all samples, with gradient (YoloSeg's), instead of passes without.
    """
    chosen = torch.arange(len(data)) if learn or isinstance(network, OptimizedModule) else samples
    with torch.set_grad_enabled(learn), torch.autocast("cuda") if data.is_cuda else nullcontext():
        outputs = [_turned_back(network(view.apply(select(data, chosen))), view) for view in views]
    return ShownViews(outputs, chosen, weight, learn)


def _turned_back(outputs: Outputs, view: TrainingView) -> Outputs:
    return view.invert(outputs) if isinstance(outputs, Tensor) else [view.invert(level) for level in outputs]


@overload
def select(levels: Tensor, samples: Tensor) -> Tensor: ...
@overload
def select(levels: Sequence[Tensor], samples: Tensor) -> list[Tensor]: ...
def select(levels: Outputs, samples: Tensor) -> Outputs:
    """The samples named of each level; the levels themselves where that is all of them, in order."""
    if isinstance(levels, Tensor):
        return levels if len(samples) == len(levels) else levels[samples.to(levels.device)]
    return [level if len(samples) == len(level) else level[samples.to(level.device)] for level in levels]
