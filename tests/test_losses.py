"""The dual-component loss and the views it compares."""

from __future__ import annotations

from itertools import pairwise
from random import Random
from typing import Any

import pytest
import torch
from batchgeneratorsv2.transforms.utils.deep_supervision_downsampling import DownsampleSegForDSTransform
from batchgeneratorsv2.transforms.utils.seg_to_regions import ConvertSegmentationToRegionsTransform
from hypothesis import given, settings
from hypothesis import strategies as st
from nnunetv2.training.loss.compound_losses import DC_and_BCE_loss, DC_and_CE_loss
from nnunetv2.training.loss.deep_supervision import DeepSupervisionWrapper
from nnunetv2.training.loss.dice import MemoryEfficientSoftDiceLoss
from torch import Tensor, nn
from torch.nn import functional

from nnunet_oneshot.errors import OneShotError
from nnunet_oneshot.losses import (
    DualComponentLoss,
    MaskedSymmetricKL,
    ShownViews,
    divergence,
    masked_mean,
    ramp,
    show_views,
)
from nnunet_oneshot.settings import LossSettings
from nnunet_oneshot.training_views import TrainingView, ViewChoice, rotation_obstacle

IGNORE = 3
FEW = settings(max_examples=20)


class Equivariant(nn.Module):
    """A network that commutes with flips and rotations: a pointwise layer on averages, one a level."""

    def __init__(self, levels: int = 2) -> None:
        super().__init__()
        self.weights = nn.Parameter(torch.randn(3))
        self.levels = levels

    def forward(self, data: Tensor) -> list[Tensor]:
        pool = functional.avg_pool2d if data.ndim == 4 else functional.avg_pool3d
        levels = [data if level == 0 else pool(data, 2**level) for level in range(self.levels)]
        return [torch.cat([level * weight for weight in self.weights], 1) for level in levels]


class Positional(Equivariant):
    """A network that does not: it weighs voxels by where they are."""

    def forward(self, data: Tensor) -> list[Tensor]:
        return super().forward(data * torch.linspace(0, 1, data.shape[-1]))


def supervised(levels: int = 2, regions: bool = False) -> nn.Module:
    dice = {"batch_dice": False, "smooth": 1e-5, "do_bg": regions, "ddp": False}
    if regions:
        loss = DC_and_BCE_loss({}, dice, use_ignore_label=True, dice_class=MemoryEfficientSoftDiceLoss)
    else:
        loss = DC_and_CE_loss(dice, {}, ignore_label=IGNORE, dice_class=MemoryEfficientSoftDiceLoss)
    return DeepSupervisionWrapper(loss, [1 / 2**level for level in range(levels)]) if levels else loss


def batch(dimensions: int = 2, levels: int = 2, divergent: bool = True) -> tuple[Tensor, list[Tensor]]:
    generator = torch.Generator().manual_seed(dimensions)
    shape = (2, 1, *(8,) * dimensions)
    data = torch.randn(shape, generator=generator)
    label = torch.randint(0, IGNORE + 1 if divergent else IGNORE, shape, generator=generator)
    scales = [[1 / 2**level] * dimensions for level in range(levels)]
    targets = [DownsampleSegForDSTransform(scales)(segmentation=one)["segmentation"] for one in label]
    return data, [torch.stack(level) for level in zip(*targets, strict=True)]


def test_ramp_is_zero_at_first_and_reaches_the_end_weight() -> None:
    values = [ramp(step / 100, LossSettings(ramp_start=0.1, end_weight=0.5)) for step in range(101)]
    assert values[:11] == [0.0] * 11
    assert values[100] == 0.5
    assert all(first < second for first, second in pairwise(values[10:]))


def test_masked_mean_of_an_empty_mask_is_zero_with_finite_gradient() -> None:
    values = torch.full((2, 3), torch.inf, requires_grad=True)
    result = masked_mean(values, torch.zeros(2, 3, dtype=torch.bool))
    result.backward()
    assert result.item() == 0.0
    assert values.grad is not None
    assert values.grad.abs().sum().item() == 0.0


@pytest.mark.parametrize("regions", [False, True])
def test_divergence_outside_the_mask_costs_nothing_and_inside_it_does(regions: bool) -> None:
    torch.manual_seed(0)
    first = torch.randn(1, 3, 6, 6)
    target = torch.zeros(1, 4, 6, 6) if regions else torch.zeros(1, 1, 6, 6)
    target[:, -1, :, 3:] = 1 if regions else IGNORE
    loss = MaskedSymmetricKL(IGNORE, regions)
    outside, inside = first.clone(), first.clone()
    outside[..., :3] += torch.randn(1, 3, 6, 3)
    inside[..., 3:] += torch.randn(1, 3, 6, 3)
    assert loss(first, outside, target).item() == 0.0
    assert loss(first, inside, target).item() > 0.01
    assert torch.allclose(loss(first, inside, target), loss(inside, first, target))


def test_symmetric_kl_equals_torch_distributions() -> None:
    torch.manual_seed(0)
    first, second = torch.randn(2, 1, 3, 4, 4).double()
    everywhere = torch.full((1, 1, 4, 4), IGNORE)
    p, q = (torch.distributions.Categorical(logits=x.movedim(1, -1)) for x in (first, second))
    both = torch.distributions.kl_divergence(p, q) + torch.distributions.kl_divergence(q, p)
    expected = 0.5 * both.mean() / 3
    assert MaskedSymmetricKL(IGNORE, False)(first, second, everywhere).item() == pytest.approx(
        expected.item(), rel=1e-5
    )
    p, q = (torch.distributions.Bernoulli(logits=x) for x in (first, second))
    both = torch.distributions.kl_divergence(p, q) + torch.distributions.kl_divergence(q, p)
    everywhere = torch.ones(1, 4, 4, 4, dtype=torch.bool)
    assert MaskedSymmetricKL(IGNORE, True)(first, second, everywhere).item() == pytest.approx(0.5 * both.mean().item())


@pytest.mark.parametrize("regions", [False, True])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_extreme_logits_of_any_precision_stay_finite(regions: bool, dtype: torch.dtype) -> None:
    first = torch.tensor([6e4, -6e4, 0.0], dtype=dtype)[None, :, None, None].expand(1, 3, 2, 2).clone().requires_grad_()
    target = torch.ones(1, 4, 2, 2, dtype=torch.bool) if regions else torch.full((1, 1, 2, 2), IGNORE)
    result = MaskedSymmetricKL(IGNORE, regions)(first, -first.detach(), target)
    result.backward()
    assert result.dtype == torch.float32
    assert torch.isfinite(result)
    assert first.grad is not None
    assert torch.isfinite(first.grad).all()


def test_each_direction_treats_its_target_as_given() -> None:
    """The gradient of the symmetric term on one side is that of half its own direction alone."""
    torch.manual_seed(0)
    first = torch.randn(1, 3, 4, 4, requires_grad=True)
    second = torch.randn(1, 3, 4, 4, requires_grad=True)
    everywhere = torch.full((1, 1, 4, 4), IGNORE)
    gradient = torch.autograd.grad(MaskedSymmetricKL(IGNORE, False)(first, second, everywhere), first)[0]
    direction = functional.kl_div(first.log_softmax(1), second.detach().softmax(1), reduction="sum")
    expected = torch.autograd.grad(0.5 * direction / (3 * 16), first)[0]
    assert torch.allclose(gradient, expected, atol=1e-7)


@pytest.mark.parametrize("dimensions", [2, 3])
def test_divergence_of_a_coarse_level_is_the_divergence_of_the_voxels_it_samples(dimensions: int) -> None:
    _, targets = batch(dimensions, levels=3)
    full = divergence(targets[0], IGNORE, False)
    for level, target in enumerate(targets):
        scales = [[1 / 2**level] * dimensions]
        sampled = [DownsampleSegForDSTransform(scales)(segmentation=mask.int())["segmentation"][0] for mask in full]
        assert torch.equal(divergence(target, IGNORE, False), torch.stack(sampled).bool())


def test_divergence_of_region_targets_is_that_of_the_labels() -> None:
    _, targets = batch()
    transform = ConvertSegmentationToRegionsTransform([(1, 2), (2,), IGNORE], channel_in_seg=0)
    regions = torch.stack([transform(segmentation=one)["segmentation"] for one in targets[0]])
    assert torch.equal(divergence(regions, IGNORE, True), divergence(targets[0], IGNORE, False))
    assert not divergence(targets[0], None, False).any()


@pytest.mark.parametrize("levels", [0, 2])
def test_without_an_announced_view_it_is_nnunets_loss_exactly(levels: int) -> None:
    data, targets = batch(levels=max(levels, 1))
    outputs = Equivariant(max(levels, 1))(data)
    base = supervised(levels)
    output, target = (outputs, targets) if levels else (outputs[0], targets[0])
    assert torch.equal(DualComponentLoss(base, IGNORE, False)(output, target), base(output, target))


@pytest.mark.parametrize("levels", [0, 2])
def test_an_announced_view_adds_its_weighted_term_once(levels: int) -> None:
    data, targets = batch(levels=max(levels, 1))
    outputs = Equivariant(max(levels, 1))(data)
    output, target = (outputs, targets) if levels else (outputs[0], targets[0])
    shifted = [level.detach() + torch.randn_like(level) for level in outputs]
    loss = DualComponentLoss(supervised(levels), IGNORE, False)
    plain = loss(output, target)
    loss.announce(ShownViews([shifted if levels else shifted[0]], torch.arange(2), 0.25))
    dual = loss(output, target)
    assert loss.last_consistency is not None
    assert loss.last_consistency.item() > 0
    assert loss.last_supervised is not None
    assert torch.equal(loss.last_supervised, plain)
    assert dual.item() == pytest.approx(plain.item() + 0.25 * loss.last_consistency.item())
    assert torch.equal(loss(output, target), plain)


def test_only_the_samples_with_divergence_are_shown_to_the_network() -> None:
    data, targets = batch()
    for target in targets:
        target[0] = 0
    seen: list[int] = []
    network = Equivariant()
    network.register_forward_hook(lambda _, inputs, __: seen.append(len(inputs[0])))
    shown = show_views(network, data, [TrainingView((0,))], torch.tensor([1]), 0.5)
    loss = DualComponentLoss(supervised(), IGNORE, False)
    loss.announce(shown)
    loss(network(data), targets).backward()
    assert seen == [1, 2]
    assert loss.last_consistency is not None
    assert loss.last_consistency.item() == pytest.approx(0.0, abs=1e-6)


def test_a_compiled_network_is_always_shown_the_whole_batch() -> None:
    """A new batch size would compile it again; in `eager` nothing is compiled but the rule is the same."""
    data, _ = batch()
    compiled = torch.compile(Equivariant(), backend="eager")
    shown = show_views(compiled, data, [TrainingView((0,))], torch.tensor([1]), 0.5)
    assert shown.samples.tolist() == [0, 1]
    assert len(shown.outputs[0][0]) == 2


@pytest.mark.parametrize("dimensions", [2, 3])
def test_every_view_is_turned_back_at_every_level(dimensions: int) -> None:
    """An equivariant network agrees with itself under every view, another does not."""
    data, targets = batch(dimensions)
    random, choice = Random(0), ViewChoice(dimensions, tuple(range(dimensions)), True)
    loss = DualComponentLoss(supervised(), IGNORE, False)
    for _ in range(10):
        (view,) = choice.draw(random)
        terms = []
        for network in (Equivariant(), Positional()):
            loss.announce(show_views(network, data, [view], torch.arange(2), 1.0))
            loss(network(data), targets)
            assert loss.last_consistency is not None
            terms.append(loss.last_consistency.item())
        assert terms[0] == pytest.approx(0.0, abs=1e-6)
        moves_the_last_axis = view.quarter_turns > 0 or dimensions - 1 in view.flip
        assert (terms[1] > 1e-6) == moves_the_last_axis


@pytest.mark.parametrize("levels", [0, 2])
def test_three_full_passes_are_yolosegs_loss(levels: int) -> None:
    """Mean supervised loss of three passes, mean symmetric KL of their three pairs, gradient through all of them."""
    data, targets = batch(levels=max(levels, 1))
    network, base = Positional(max(levels, 1)), supervised(levels)
    views = [TrainingView((1,)), TrainingView(quarter_turns=1)]

    def passes() -> list[Any]:
        everything = [network(data), *([view.invert(x) for x in network(view.apply(data))] for view in views)]
        return everything if levels else [outputs[0] for outputs in everything]

    target = targets if levels else targets[0]
    one, two, three = passes()
    loss = DualComponentLoss(base, IGNORE, False)
    pairs = [loss.consistency(a, b, target) for a, b in ((one, two), (one, three), (two, three))]
    expected = sum(base(x, target) for x in (one, two, three)) / 3 + 0.5 * sum(pairs) / 3
    (wanted,) = torch.autograd.grad(expected, network.weights)
    network_or_finest = network if levels else Finest(network)
    loss.announce(show_views(network_or_finest, data, views, torch.tensor([1]), 0.5, learn=True))
    found = loss(network_or_finest(data), target)
    assert found.item() == pytest.approx(expected.item(), rel=1e-5)
    assert loss.last_supervised is not None
    assert loss.last_supervised.item() == pytest.approx(sum(base(x, target).item() for x in (one, two, three)) / 3)
    assert torch.allclose(torch.autograd.grad(found, network.weights)[0], wanted, atol=1e-6)


class Finest(nn.Module):
    """The finest output alone, as without deep supervision."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, data: Tensor) -> Tensor:
        return self.network(data)[0]


@FEW
@given(st.integers(0, 2), st.booleans(), st.floats(0, 1), st.integers(0, 1000))
def test_any_share_of_divergence_gives_a_finite_loss_and_none_gives_nnunets(
    levels: int, regions: bool, share: float, seed: int
) -> None:
    """Wherever divergence lies, nowhere and everywhere included, at every deep supervision level."""
    generator = torch.Generator().manual_seed(seed)
    label = torch.randint(0, IGNORE, (2, 1, 8, 8), generator=generator)
    label[torch.rand(label.shape, generator=generator) < share] = IGNORE
    logits = [torch.randn(2, 2 if regions else 3, 8 >> n, 8 >> n, generator=generator) for n in range(max(levels, 1))]
    targets = [label[..., :: 2**n, :: 2**n] for n in range(max(levels, 1))]
    if regions:
        turn = ConvertSegmentationToRegionsTransform([(1, 2), (2,), IGNORE], channel_in_seg=0)
        targets = [torch.stack([turn(segmentation=one)["segmentation"] for one in level]) for level in targets]
    outputs = [level.requires_grad_() for level in logits]
    output, target = (outputs, targets) if levels else (outputs[0], targets[0])
    other = [level.detach().flip(-1) for level in outputs]
    base = supervised(levels, regions)
    loss = DualComponentLoss(base, IGNORE, regions)
    loss.announce(ShownViews([other if levels else other[0]], torch.arange(2), 0.5))
    found = loss(output, target)
    gradients = torch.autograd.grad(found, outputs, allow_unused=True)
    assert torch.isfinite(found)
    assert all(torch.isfinite(gradient).all() for gradient in gradients if gradient is not None)
    if not divergence(targets[0], IGNORE, regions).any():
        assert torch.equal(found, base(output, target))


def test_several_views_are_different_and_never_more_than_there_are() -> None:
    choice = ViewChoice(2, (0, 1), False)
    for seed in range(20):
        views = choice.draw(Random(seed), 2)
        assert len(set(views)) == 2
    assert len(choice.draw(Random(0), 9)) == 3
    assert ViewChoice(2, (), False).draw(Random(0), 2) == []


@pytest.mark.parametrize(
    ("bad", "word"),
    [
        ({"full_passes": 0}, "full_passes"),
        ({"every": 0}, "every"),
        ({"teacher_decay": 1.0}, "teacher_decay"),
        ({"ramp_start": -0.1}, "found ramp_start -0.1;"),
        ({"guess_share": 2.0, "cross_patch": float("nan")}, "found guess_share 2.0, cross_patch nan;"),
        ({"annotated_share": 1.1}, "found annotated_share 1.1;"),
        ({"annotated_share": 1.0}, "annotated_share below 1, found 1;"),
        ({"end_weight": -1.0}, "end_weight of 0 or more, found -1.0"),
        ({"full_passes": 3, "teacher_decay": 0.9}, "a teacher does not learn"),
    ],
)
def test_settings_that_cannot_be_are_refused(bad: dict[str, Any], word: str) -> None:
    with pytest.raises(OneShotError, match=word):
        LossSettings(**bad)


@FEW
@given(st.integers(2, 3), st.sets(st.integers(0, 2)), st.booleans(), st.integers(0, 10_000))
def test_views_invert_and_never_show_the_batch_as_it_is(dims: int, axes: set[int], rotations: bool, seed: int) -> None:
    mirror = tuple(sorted(axis for axis in axes if axis < dims))
    views = ViewChoice(dims, mirror, rotations).draw(Random(seed))
    if not views:
        assert not mirror
        assert not rotations
        return
    (view,) = views
    data = torch.arange(2 * 4**dims).reshape(1, 2, *(4,) * dims)
    shown = view.apply(data)
    assert shown.shape == data.shape
    assert not torch.equal(shown, data)
    assert torch.equal(view.invert(shown), data)


def test_views_of_a_square_plane_are_all_seven() -> None:
    data = torch.arange(16).reshape(1, 1, 4, 4)
    random = Random(1)
    shown = set()
    for _ in range(200):
        (view,) = ViewChoice(2, (0, 1), True).draw(random)
        shown.add(tuple(view.apply(data).flatten().tolist()))
    assert len(shown) == 7


@pytest.mark.parametrize(
    ("patch", "spacing", "strides", "reach", "reason"),
    [
        ((32, 32), (1, 1), [[2, 2]], 3.14, None),
        ((8, 32, 32), (5, 1, 1), [[1, 2, 2]], 3.14, None),
        ((32, 40), (1, 1), [[2, 2]], 3.14, "patch is 32 x 40"),
        ((32, 32), (1, 1.5), [[2, 2]], 3.14, "spacing is 1 x 1.5"),
        ((32, 32), (1, 1), [[2, 2], [1, 2]], 3.14, "strides"),
        ((32, 32, 32), (1, 1, 1), [[2, 2, 2]], 0.52, "rotates by 30 degrees"),
    ],
)
def test_rotations_are_left_out_for_a_reason_that_is_said(patch, spacing, strides, reach, reason) -> None:
    found = rotation_obstacle(patch, spacing, strides, (-reach, reach))
    assert found is None if reason is None else reason in str(found)
