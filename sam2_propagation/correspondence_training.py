"""Learn correspondence without labels: rebuild a slice from another one by attention over learnt features.

A slice and a neighbour in its volume (or, where a volume is one slice, a warp of it; or, for a share of the pairs, the
slice at the same level of another volume) are cut to the same place. Each cell of the first copies intensities from the
second, by attention over features in a window; the closer the copy, the better the features (OneSeg; MAST, Lai et al.,
CVPR 2020). What is copied is the intensities at three scales of smoothing, so that a match must agree in its
surroundings too.
"""

from __future__ import annotations

import math
import os
import pickle
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from sam2_propagation.correspondence_attention import correlate, reconstruct
from sam2_propagation.correspondence_network import CorrespondenceNetwork, Features
from sam2_propagation.errors import PropagationError

_UNREADABLE = (pickle.UnpicklingError, OSError, RuntimeError, EOFError, KeyError, TypeError, ValueError)
"""What torch raises for a damaged file, and for tensors of another network."""


@dataclass(frozen=True)
class Recipe:
    """How the network is trained.

    Attributes:
        steps: iterations.
        batch: pairs of slices at once.
        crop: working pixels along the side of what is cut out.
        reach: largest distance of the two slices.
        across: share of pairs whose source is another volume's slice at the same relative position. None by default:
            on phantoms it made neighbours worse and other cases not reliably better (correspondence_pairs.py).
        radius: of the window, in cells, on both grids.
        rate: learning rate, falling to 0 along a cosine.
        profile: edge profiles as input rather than remapped intensities.
        seed: of everything that is drawn.
    """

    steps: int = 300
    batch: int = 4
    crop: int = 64
    reach: int = 3
    across: float = 0.0
    radius: int = 4
    rate: float = 2e-3
    profile: bool = True
    seed: int = 0


_AS_IT_IS = ((1.0, 0.0, 0.0), (0.0, 1.0, 0.0))


@dataclass(frozen=True)
class Draw:
    """One training pair: which slices, where they are cut, how they are warped and their intensities remapped.

    Attributes:
        volumes, target, source: indices of both slices' volumes and theirs in these; the two slices are the same where
            there is no other.
        corner: (row, column) of the cut, as a share of what is possible.
        gammas, inverted: powers for target and source; only networks that look at intensities are shown them remapped.
        warp: affine (2, 3) of the source for `grid_sample`, the identity where the slices differ.
    """

    volumes: tuple[int, int]
    target: int
    source: int
    corner: tuple[float, float]
    gammas: tuple[float, float]
    inverted: bool
    warp: tuple[tuple[float, ...], tuple[float, ...]]


def draw_pair(rng: np.random.Generator, lengths: Sequence[int], reach: int, across: float = 0.0) -> Draw:
    """Draw a pair; every slice of the set is as likely as any other to be the target."""
    flat = int(rng.integers(sum(lengths)))
    volume = int(np.searchsorted(np.cumsum(lengths), flat, side="right"))
    target = flat - sum(lengths[:volume])
    others = [i for i in range(len(lengths)) if i != volume]
    if across and others and rng.random() < across:
        lender = int(rng.choice(others))
        # Relative positions are compared at the middle of slices.
        source = min(int((target + 0.5) / lengths[volume] * lengths[lender]), lengths[lender] - 1)
    else:
        lender = volume
        near = [i for i in range(target - reach, target + reach + 1) if 0 <= i < lengths[volume] and i != target]
        source = int(rng.choice(near)) if near else target
    same = (lender, source) == (volume, target)
    turn, stretch, shift = rng.uniform(-0.15, 0.15), rng.uniform(0.9, 1.1), rng.uniform(-0.06, 0.06, 2)
    cosine, sine = stretch * np.cos(turn), stretch * np.sin(turn)
    moved = ((float(cosine), float(-sine), float(shift[0])), (float(sine), float(cosine), float(shift[1])))
    # Two slices of one volume differ little in brightness, two volumes may differ much: most of it is common to both.
    gammas = np.exp(rng.uniform(-0.5, 0.5) + rng.uniform(-0.1, 0.1, 2))
    inverted = bool(rng.random() < 0.25)
    return Draw(
        (volume, lender),
        target,
        source,
        (float(rng.random()), float(rng.random())),
        (float(gammas[0]), float(gammas[1])),
        inverted,
        moved if same else _AS_IT_IS,
    )


def cut_pair(volumes: Sequence[Tensor], draw: Draw, crop: int) -> tuple[Tensor, Tensor]:
    """Target and source of a draw, float32 (C, crop, crop) each."""
    target, source = (
        _at_least(volumes[volume][index].float(), crop)
        for volume, index in zip(draw.volumes, (draw.target, draw.source), strict=True)
    )
    moved = source if draw.warp == _AS_IT_IS else _warped(source, draw.warp)
    return _cut(target, draw.corner, crop), _cut(moved, draw.corner, crop)


def _at_least(single: Tensor, side: int) -> Tensor:
    """(C, H, W), filled up with 0."""
    height, width = single.shape[-2:]
    return F.pad(single, (0, max(0, side - width), 0, max(0, side - height)))


def _warped(single: Tensor, warp: Sequence[Sequence[float]]) -> Tensor:
    grid = F.affine_grid(torch.tensor([warp]), [1, *single.shape], align_corners=False)
    return F.grid_sample(single[None], grid, align_corners=False)[0]


def _cut(single: Tensor, corner: tuple[float, float], crop: int) -> Tensor:
    top, left = (round(c * (side - crop)) for c, side in zip(corner, single.shape[-2:], strict=True))
    return single[:, top : top + crop, left : left + crop]


def remapped(slices: Tensor, gamma: float, invert: bool) -> Tensor:
    """Intensities in [0, 1] by a power and, perhaps, upside down."""
    powered = slices.clamp(0, 1) ** gamma
    return 1 - powered if invert else powered


def rebuilding_loss(target: Features, source: Features, targets: Tensor, sources: Tensor, radius: int) -> Tensor:
    """How far a target's intensities (B, C, H, W) are from what attention copies of the source's, on both grids."""
    losses = []
    for name, cell in (("fine", 2), ("coarse", 4)):
        similarity = correlate(getattr(target, name), getattr(source, name), radius)
        wanted, offered = scales(targets, cell), scales(sources, cell)
        losses.append(F.smooth_l1_loss(reconstruct(similarity, offered, radius), wanted, beta=0.05))
    return torch.stack(losses).sum()


def scales(slices: Tensor, cell: int) -> Tensor:
    """Intensities on a grid of cells at three scales of smoothing: (B, 3 C, H / cell, W / cell)."""
    cells = F.avg_pool2d(slices, cell)
    smooth = [F.avg_pool2d(cells, k, stride=1, padding=k // 2, count_include_pad=False) for k in (3, 7)]
    return torch.cat([cells, *smooth], dim=1)


class Learner:
    """A network in training, with what is needed to go on after a stop.

    Args:
        recipe: how to train.
        channels: of the images.
        device: where.
    """

    def __init__(self, recipe: Recipe, channels: int, device: torch.device) -> None:
        # The caller's random state is not ours to change.
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(recipe.seed)
            self.network = CorrespondenceNetwork(channels, recipe.profile).to(device)
        self.recipe = recipe
        self.step = 0
        self._device = device
        self._optimiser = torch.optim.AdamW(self.network.parameters(), lr=recipe.rate, weight_decay=1e-4)

    def train(
        self,
        volumes: Sequence[Tensor],
        save: Path | None = None,
        every: int = 50,
        tick: Callable[[float], object] = float,
    ) -> None:
        """Train to the end.

        Args:
            volumes: slices of each image, (N, C, H, W) in [0, 1].
            save: file to go on from after a stop.
            every: steps between two savings.
            tick: called with each step's loss.
        """
        self.network.train()
        while self.step < self.recipe.steps:
            tick(self._advance(volumes))
            if save is not None and (self.step % every == 0 or self.step == self.recipe.steps):
                self.save(save)
        self.network.eval()

    def save(self, path: Path) -> None:
        """Write the state; the file is whole or absent."""
        path.parent.mkdir(parents=True, exist_ok=True)
        new = path.with_name(f"{path.name}.{os.getpid()}.new")
        torch.save(self._state(), new)
        os.replace(new, path)

    def restore(self, path: Path) -> None:
        """Go on from a file of `save`.

        Raises:
            PropagationError: a damaged file, or one of another network; the learner must not be used any more then.
        """
        try:
            state = torch.load(path, map_location=self._device, weights_only=True)
            self.network.load_state_dict(state["network"])
            self._optimiser.load_state_dict(state["optimiser"])
            self.step = int(state["step"])
        except _UNREADABLE as error:
            raise PropagationError(
                f"expected a whole network of this version in {path}, found none ({type(error).__name__}); remove it, "
                "and another one is trained"
            ) from error
        self.network.eval()

    def _state(self) -> dict[str, Any]:
        return {
            "network": self.network.state_dict(),
            "optimiser": self._optimiser.state_dict(),
            "step": self.step,
            "recipe": asdict(self.recipe),
        }

    def _advance(self, volumes: Sequence[Tensor]) -> float:
        recipe = self.recipe
        # Drawn from the step's number: a resumed training sees the pairs that it would have seen.
        rng = np.random.default_rng([recipe.seed, self.step])
        draws = [draw_pair(rng, [len(v) for v in volumes], recipe.reach, recipe.across) for _ in range(recipe.batch)]
        pairs = [cut_pair(volumes, draw, recipe.crop) for draw in draws]
        targets, sources = (torch.stack(side).to(self._device) for side in zip(*pairs, strict=True))
        seen = torch.cat([self._shown(targets, draws, 0), self._shown(sources, draws, 1)])
        features = self.network(seen)
        one, other = (Features(f, c) for f, c in zip(features.fine.chunk(2), features.coarse.chunk(2), strict=True))
        loss = rebuilding_loss(one, other, targets, sources, recipe.radius)
        for group in self._optimiser.param_groups:
            group["lr"] = recipe.rate * 0.5 * (1 + math.cos(math.pi * self.step / recipe.steps))
        self._optimiser.zero_grad()
        loss.backward()
        self._optimiser.step()
        self.step += 1
        return float(loss.detach())

    def _shown(self, slices: Tensor, draws: Sequence[Draw], side: int) -> Tensor:
        if self.recipe.profile:
            return slices
        pairs = zip(slices, draws, strict=True)
        return torch.stack([remapped(s, d.gammas[side], d.inverted) for s, d in pairs])
