"""Labels carried from annotated slices of other images: matched slices, a common shift, attention in a wide window."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from torch import Tensor

from sam2_propagation.correspondence_attention import attend, correlate
from sam2_propagation.correspondence_chain import Carried, Window
from sam2_propagation.matching import Descriptors, rank_slices

WIDE = Window(radius=8)
"""In coarse cells: other people's organs are farther away than the next slice's."""
_GRID = 4
_SHIFT = 0.25


@dataclass(frozen=True, eq=False)
class Known:
    """A support's slices with labels.

    Attributes:
        coarse: (N, D, H, W) features on the coarse grid.
        shares: (N, K, H, W) of each class on that grid, background first.
        usable: indices of slices whose labels may be used.
    """

    coarse: Tensor
    shares: Tensor
    usable: npt.NDArray[np.intp]


def descriptors(coarse: Tensor) -> Descriptors:
    """(N, D) of slices: their features averaged over a 4x4 grid."""
    return F.adaptive_avg_pool2d(coarse.float(), _GRID).flatten(1).numpy()


def across(coarse: Tensor, supports: Sequence[Known], sources: int = 3) -> Carried:
    """Label every slice of a query from the support slices that match it.

    Args:
        coarse: (N, D, H, W), the query's features on the coarse grid.
        supports: whose grids may differ in size; they are laid on the query's, centre on centre.
        sources: support slices that each slice copies from.
    """
    laid = [_laid(known, coarse.shape[-2:]) for known in supports]
    matches = rank_slices(
        descriptors(coarse), [descriptors(k.coarse) for k in supports], [k.usable for k in supports], "line"
    )
    moved = [_moved(known, _shift(coarse, known, matches, s)) for s, known in enumerate(laid)]
    found = [_labelled(coarse[at].float(), moved, chosen[:sources]) for at, chosen in enumerate(matches)]
    shares, drift = (torch.stack(maps) for maps in zip(*found, strict=True))
    foreground = shares[:, 1:].sum(dim=1)
    wrong = (drift * foreground).sum(dim=(1, 2)) / foreground.sum(dim=(1, 2)).clamp(min=1e-6)
    return Carried(shares, drift, 1 - wrong)


def settled(features: Tensor, shares: Tensor, window: Window) -> Tensor:
    """Shares (N, K, H, W) told anew by attention among each slice and its neighbours, which follows edges."""
    count, out = len(features), torch.zeros_like(shares)
    for at in range(count):
        near = [i for i in (at - 1, at, at + 1) if 0 <= i < count]
        query = features[at][None].float()
        found = [correlate(query, features[i][None].float(), window.radius) for i in near]
        attention = attend(found, window.radius, window.best, window.temperature)
        out[at] = attention.copy(shares[near][None])[0]
    return out


def _labelled(query: Tensor, supports: Sequence[Known], chosen: Sequence[tuple[int, int]]) -> tuple[Tensor, Tensor]:
    """Shares (K, H, W) of one slice, and (H, W) how much of what each cell copied does not lead back."""
    features = [supports[s].coarse[i][None].float() for s, i in chosen]
    labels = torch.stack([supports[s].shares[i] for s, i in chosen])
    radius, best, temperature = WIDE.radius, WIDE.best, WIDE.temperature
    there = attend([correlate(query[None], f, radius) for f in features], radius, best, temperature)
    found = there.copy(labels[None])[0]
    backs = [attend([correlate(f, query[None], radius)], radius, best, temperature) for f in features]
    returned = torch.stack([back.copy(found[None, None])[0] for back in backs])
    wrong = (returned - labels).clamp(min=0)[:, 1:].sum(dim=1, keepdim=True)
    return found, there.copy(wrong[None])[0, 0]


def _laid(known: Known, size: Sequence[int]) -> Known:
    """Maps of a support cut or filled up to the query's grid, around their centre; what is filled up is background."""
    coarse, shares = _centred(known.coarse, size), _centred(known.shares, size)
    shares[:, 0] += 1 - shares.sum(dim=1)
    return Known(coarse, shares, known.usable)


def _centred(maps: Tensor, size: Sequence[int]) -> Tensor:
    before = [(size[axis] - maps.shape[2 + axis]) // 2 for axis in (0, 1)]
    after = [size[axis] - maps.shape[2 + axis] - before[axis] for axis in (0, 1)]
    return F.pad(maps.float(), (before[1], after[1], before[0], after[0]))


def _shift(coarse: Tensor, known: Known, matches: Sequence[Sequence[tuple[int, int]]], support: int) -> tuple[int, int]:
    """The shift (rows, columns) of a support under which matched slices are most alike, all slices together."""
    pairs = [(at, next((i for s, i in chosen if s == support), None)) for at, chosen in enumerate(matches)]
    found = [(at, i) for at, i in pairs if i is not None]
    query, source = coarse[[at for at, _ in found]].float(), known.coarse[[i for _, i in found]]
    radius = [int(_SHIFT * side) // 2 * 2 for side in coarse.shape[-2:]]
    alike = {
        (i, j): float((query * _rolled(source, i, j)).sum(dim=1).mean())
        for i in range(-radius[0], radius[0] + 1, 2)
        for j in range(-radius[1], radius[1] + 1, 2)
    }
    return max(alike, key=lambda shift: (alike[shift], -abs(shift[0]) - abs(shift[1])))


def _moved(known: Known, shift: tuple[int, int]) -> Known:
    shares = _rolled(known.shares, *shift)
    shares[:, 0] += 1 - shares.sum(dim=1)
    return Known(_rolled(known.coarse, *shift), shares, known.usable)


def _rolled(maps: Tensor, rows: int, columns: int) -> Tensor:
    """Maps moved down and right, 0 where nothing comes in."""
    height, width = maps.shape[-2:]
    padded = F.pad(maps, (max(columns, 0), max(-columns, 0), max(rows, 0), max(-rows, 0)))
    top, left = max(-rows, 0), max(-columns, 0)
    return padded[..., top : top + height, left : left + width]
