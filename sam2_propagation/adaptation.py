"""One-shot adaptation: fine-tune SAM2 on random warps of the annotated cases themselves, before they are carried.

A step shows a few annotated slices twice, as two subjects of one anatomy: each with an affine and elastic warp and
another contrast of its own. The model is to segment the second from memories of the first, or from its own slices with
masks as a registration would have left them, which is what `retrieve` and `self` ask of it; for `self`, which looks at
a window around the label, half of the steps look through such a window. Only the supports' own labels are seen. What is
learnt and how it is charged for is shared with the pretraining of the built-in checkpoint.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from torch import Tensor

from sam2_propagation.architecture import SAM2Base
from sam2_propagation.errors import PropagationError
from sam2_propagation.interface import ChannelVolume, LabelVolume
from sam2_propagation.pretraining.corruption import corrupt, draw_corruption
from sam2_propagation.pretraining.losses import mask_loss
from sam2_propagation.pretraining.model import follow
from sam2_propagation.pretraining.pairing import Batch

LEAST_PIXELS = 16
"""An object is learnt from slices that show at least so many of its pixels, at the model's input size."""

_SLICES = 3
_ELEMENTS = 6
_LEARNING_RATE = 1e-4
_WARM_UP = 10
_LONGEST_GRADIENT = 1.0
_GRID = 5
_STRONG, _WEAK = 1.0, 0.3
_OWN_MEMORY = 0.5
_THROUGH_WINDOW = 0.5


@dataclass(frozen=True, eq=False)
class Example:
    """Annotated slices of one support in one view.

    Attributes:
        images: float32 (N, S, S) in [0, 1].
        labels: int64 (N, S, S).
        window: the same slices, cut to the part that `self` looks at; None where that is never asked for.
    """

    images: Tensor
    labels: Tensor
    window: Example | None = None

    def classes(self, index: int) -> list[int]:
        """Label values that slice `index` shows well enough."""
        values, counts = self.labels[index].unique(return_counts=True)
        return [int(v) for v, n in zip(values, counts, strict=True) if v > 0 and n >= LEAST_PIXELS]


Usable = tuple[Example, int, frozenset[int]]
"""An example, one of its slices, and the label values that this slice shows well enough."""


@dataclass(frozen=True)
class Warp:
    """Parameters of a warp of F slices as one body.

    Attributes:
        affine: float32 (2, 3), reading positions in [-1, 1].
        field: float32 (F, 2, G, G), displacement in the same units.
        gamma, gain, shift: of intensities.
        bias: float32 (G, G), logarithm of a smooth field.
        noise: standard deviation.
        noise_seed: of the noise itself.
    """

    affine: npt.NDArray[np.float32]
    field: npt.NDArray[np.float32]
    gamma: float
    gain: float
    shift: float
    bias: npt.NDArray[np.float32]
    noise: float
    noise_seed: int


def example(seen: ChannelVolume, label: LabelVolume, slices: Sequence[int], image_size: int) -> Example:
    """Annotated slices at the model's input size.

    Args:
        seen: float32 (C, N, Y, X) in [0, 1]; colour is averaged to grey.
        label: int16 (N, Y, X).
        slices: the annotated ones.
        image_size: S.
    """
    grey = torch.from_numpy(np.ascontiguousarray(seen[:, list(slices)].mean(axis=0), dtype=np.float32))
    size = (image_size, image_size)
    images = F.interpolate(grey[:, None], size=size, mode="bilinear", antialias=True)[:, 0]
    values = torch.from_numpy(label[list(slices)].astype(np.float32))
    return Example(images, F.interpolate(values[:, None], size=size, mode="nearest-exact")[:, 0].long())


def adapt(
    model: SAM2Base,
    examples: Sequence[Example],
    steps: int,
    seed: int = 0,
    report: Callable[[int, float], None] | None = None,
) -> None:
    """Fine-tune all weights in place; deterministic from the seed.

    Args:
        model: without an object score head, as the built-in one, on any device; it stays in evaluation mode.
        examples: every support in every view that will be asked for.
        steps: 100 to 300 are usual.
        seed: of everything that is drawn.
        report: called with each step's number and loss.

    Raises:
        PropagationError: as `usable_slices`.
    """
    usable = usable_slices(model, examples)
    optimiser = torch.optim.AdamW(model.parameters(), lr=_LEARNING_RATE, weight_decay=0.0)
    with torch.enable_grad():
        for step in range(steps):
            loss = _step(model, optimiser, usable, np.random.default_rng([seed, step]), _rate(step, steps))
            if report is not None:
                report(step, loss)
    model.eval()


def usable_slices(model: SAM2Base, examples: Sequence[Example]) -> list[Usable]:
    """Each example and slice that can be learnt from, whole slices counting; nothing is changed.

    Raises:
        PropagationError: too little foreground, or a model with an object score head.
    """
    if model.pred_obj_scores:
        raise PropagationError(
            "expected a checkpoint without object scores for -adapt, found one with them; use builtin, or no -adapt"
        )
    usable = [(e, i, frozenset(shown)) for e in examples for i in range(len(e.images)) if (shown := e.classes(i))]
    if not usable:
        raise PropagationError(
            f"expected annotated slices with at least {LEAST_PIXELS} pixels of a class for -adapt, found none; leave "
            "-adapt out"
        )
    return usable


def draw_warp(rng: np.random.Generator, frames: int, strength: float) -> Warp:
    """Parameters of a plausible other subject; `strength` 1 is as unlike as subjects are."""
    turn, scale = rng.normal(0, 0.15 * strength), np.exp(rng.normal(0, 0.12 * strength, 2))
    shear = rng.normal(0, 0.05 * strength)
    rotation = np.array([[np.cos(turn), -np.sin(turn)], [np.sin(turn), np.cos(turn)]])
    linear = rotation @ np.array([[scale[0], shear], [0, scale[1]]])
    moved = rng.normal(0, 0.08 * strength, (2, 1))
    common = rng.normal(0, 0.05 * strength, (1, 2, _GRID, _GRID))
    own = rng.normal(0, 0.01 * strength, (frames, 2, _GRID, _GRID))
    return Warp(
        affine=np.concatenate([linear, moved], axis=1).astype(np.float32),
        field=(common + own).astype(np.float32),
        gamma=float(np.exp(rng.normal(0, 0.25 * strength))),
        gain=float(np.exp(rng.normal(0, 0.15 * strength))),
        shift=float(rng.normal(0, 0.05 * strength)),
        bias=rng.normal(0, 0.15 * strength, (_GRID, _GRID)).astype(np.float32),
        noise=float(abs(rng.normal(0, 0.04 * strength))),
        noise_seed=int(rng.integers(2**31)),
    )


def apply_warp(images: Tensor, labels: Tensor, warp: Warp) -> tuple[Tensor, Tensor]:
    """Warp slices (F, S, S) and their labels alike; intensities change too."""
    size = images.shape[-2:]
    base = F.affine_grid(torch.from_numpy(warp.affine)[None], [1, 1, *size], align_corners=False)
    field = F.interpolate(torch.from_numpy(warp.field), size=size, mode="bicubic", align_corners=False)
    grid = base + field.permute(0, 2, 3, 1)
    moved = F.grid_sample(images[:, None], grid, padding_mode="border", align_corners=False)[:, 0]
    values = F.grid_sample(labels[:, None].float(), grid, mode="nearest", padding_mode="zeros", align_corners=False)
    return _recoloured(moved, warp), values[:, 0].long()


def _recoloured(images: Tensor, warp: Warp) -> Tensor:
    bias = F.interpolate(torch.from_numpy(warp.bias)[None, None], size=images.shape[-2:], mode="bicubic")[0].exp()
    noise = torch.randn(images.shape, generator=torch.Generator().manual_seed(warp.noise_seed)) * warp.noise
    # Air stays air: what nothing sends has no contrast to change.
    changed = (images.clamp(min=1e-6) ** warp.gamma * warp.gain * bias + warp.shift + noise).clamp(0, 1)
    return torch.where(images > 0, changed, images)


def _rate(step: int, steps: int) -> float:
    """Warm-up, then a straight fall over the last half."""
    return _LEARNING_RATE * min(1.0, (step + 1) / _WARM_UP, 2 * (steps - step) / steps)


def _step(
    model: SAM2Base,
    optimiser: torch.optim.Optimizer,
    usable: Sequence[Usable],
    rng: np.random.Generator,
    rate: float,
) -> float:
    batch = draw_batch(usable, rng, model.device)
    prediction = follow(model, batch)[0]
    loss = mask_loss(prediction, batch.target)
    optimiser.zero_grad()
    loss.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), _LONGEST_GRADIENT)
    for group in optimiser.param_groups:
        group["lr"] = rate
    optimiser.step()
    return float(loss.detach())


def draw_batch(usable: Sequence[Usable], rng: np.random.Generator, device: torch.device) -> Batch:
    """Two subjects of a few neighbouring slices, and tasks over them, whose memory masks and targets are never empty.

    Args:
        usable: of `usable_slices`.
        rng: source of everything that is drawn.
        device: of the batch.
    """
    chosen, index, asked = usable[int(rng.integers(len(usable)))]
    alike = [i for e, i, shown in usable if e is chosen and shown & asked]
    near = sorted(alike, key=lambda i: abs(i - index))[:_SLICES]
    seen, window = chosen, chosen.window
    # Where slices are thinned out to the input size, a thin object may fall between the pixels of one of the two.
    if rng.random() < _THROUGH_WINDOW and window is not None and asked.intersection(window.classes(index)):
        seen = window
    moved = _two_subjects(seen, near, rng)
    shows = [set(moved.classes(i)) for i in range(2 * len(near))]
    memories = int(rng.integers(1, len(near) + 1))
    tasks = [_draw_task(shows, memories, rng) for _ in range(_ELEMENTS)]
    images, labels = moved.images.to(device), moved.labels.to(device)
    values = torch.tensor([value for value, *_ in tasks], device=device)
    frames = torch.tensor([frames for _, frames, _ in tasks], device=device)
    amounts = np.stack([amount for *_, amount in tasks])
    query = torch.full_like(values, len(near))
    truth = (labels[frames] == values[:, None, None, None]).float()
    target = (labels[query] == values[:, None, None]).float()
    return Batch(
        images=images,
        memory_frame=frames,
        memory_mask=corrupt(truth, draw_corruption(rng, amounts)),
        true_memory_mask=truth,
        queries=query[:, None],
        targets=target[:, None],
    )


def _two_subjects(seen: Example, slices: Sequence[int], rng: np.random.Generator) -> Example:
    """Slices as one subject has them, then as another has them; their first slices show an object that both have.

    Args:
        seen: whose slices these are.
        slices: the first one shows an object well enough.
        rng: of the warps.
    """
    amount = 1.0
    while True:
        warps = [draw_warp(rng, len(slices), amount * strength) for strength in (_WEAK, _STRONG)]
        images, labels = zip(*(apply_warp(seen.images[slices], seen.labels[slices], w) for w in warps), strict=True)
        moved = Example(torch.cat(images), torch.cat(labels))
        if set(moved.classes(0)).intersection(moved.classes(len(slices))):
            return moved
        amount /= 2  # at last nothing is moved out of the picture any more


def _draw_task(
    shows: Sequence[set[int]], memories: int, rng: np.random.Generator
) -> tuple[int, list[int], npt.NDArray[np.float32]]:
    """A class, the frames that memory comes from, and how corrupted each mask is.

    Args:
        shows: label values on the frames of the one subject, then of the other, whose first frame is the query.
        memories: how many; frames that show the class are taken again where they are fewer.
        rng: source of all three.
    """
    slices = len(shows) // 2
    value = int(rng.choice(sorted(shows[0] & shows[slices])))
    own = rng.random() < _OWN_MEMORY
    frames = range(slices, 2 * slices) if own else rng.permutation(slices)
    seen = [int(i) for i in frames if value in shows[i]]
    amount = rng.uniform(0.15, 1) if own else 0.0
    return value, [seen[i % len(seen)] for i in range(memories)], np.full(memories, amount, np.float32)
