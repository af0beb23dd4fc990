"""Labels carried through a volume, slice by slice, out of its annotated slices in both directions."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from sam2_propagation.correspondence_attention import Attention, attend, correlate


@dataclass(frozen=True)
class Window:
    """How attention is restricted.

    Attributes:
        radius: cells that a structure may move from one slice to the next.
        best: how many matches count.
        recent: slices before the target that it copies from. The annotated slice is not among them unless it is near:
            measured, a look back over many slices carries structures on beyond their end.
        margin: cells around the annotated structures beyond which nothing is looked for.
        temperature: of the softmax.
        clear: a cell of which no class holds so much has drifted.
        astray: a class has drifted where the way back to the annotated slice misses by so much of its radius. Both were
            chosen on phantoms (benchmarks/drift.py).
    """

    radius: int = 6
    best: int = 10
    recent: int = 1
    margin: int = 24
    temperature: float = 0.05
    clear: float = 0.65
    astray: float = 0.6


@dataclass(frozen=True, eq=False)
class Carried:
    """Labels of all slices of a volume, on a grid of cells.

    Attributes:
        shares: float32 (N, K, H, W), of each class, background first; sum 1.
        drift: float32 (N, H, W) in [0, 1]: 1 where what a cell says should not be believed.
        precision: (N,) how much of each slice's foreground leads back to the annotated slice's, class by class.
    """

    shares: Tensor
    drift: Tensor
    precision: Tensor


def chain(features: Tensor, anchors: Mapping[int, Tensor], window: Window) -> Carried:
    """Carry the annotated slices' labels to all other slices.

    A slice between two annotated ones hears both, the nearer one more.

    Args:
        features: (N, D, H, W), vectors of length 1; converted to float32 slice by slice.
        anchors: shares (K, H, W) of each annotated slice, by its index.
        window: how attention is restricted.
    """
    count, (height, width) = len(features), features.shape[-2:]
    kinds = len(next(iter(anchors.values())))
    shares, drift = torch.zeros(count, kinds, height, width), torch.zeros(count, height, width)
    precision, weights = torch.zeros(count), torch.zeros(count)
    for index, label in anchors.items():
        shares[index], precision[index], weights[index] = label, 1.0, 1.0
    for start in sorted(anchors):
        for order in _ways(start, anchors, count):
            for at, step in zip(order, _walk(features, anchors[start], start, order, window), strict=True):
                weight = 1 / abs(at - start)
                weights[at] += weight
                shares[at] += weight * step.shares
                drift[at] += weight * step.drift
                precision[at] += weight * step.precision
    total = weights.clamp(min=1e-6)
    return Carried(shares / total[:, None, None, None], drift / total[:, None, None], precision / total)


def survival(features: Tensor, content: Tensor, window: Window) -> Tensor:
    """How well neighbours can be rebuilt from each other: predicts, without labels, what a step takes from a label.

    Args:
        features: (N, D, H, W), vectors of length 1.
        content: (N, H, W), how much there is to see in each cell; what shows nothing does not count.
        window: how attention is restricted.

    Returns:
        (N - 1,) of slices i and i + 1, the mean over both directions of how alike cells are to what they would copy, at
        most 1.
    """
    found = []
    for first in range(len(features) - 1):
        both = [_likeness(features, content, *pair, window) for pair in ((first, first + 1), (first + 1, first))]
        found.append(sum(both) / 2)
    return torch.tensor(found)


def _likeness(features: Tensor, content: Tensor, target: int, source: int, window: Window) -> float:
    similarity = correlate(features[target][None].float(), features[source][None].float(), window.radius)
    best = similarity.topk(min(window.best, similarity.shape[1]), dim=1).values
    alike = (best * (best / window.temperature).softmax(dim=1)).sum(dim=1)[0]
    return float((alike * content[target]).sum() / content[target].sum().clamp(min=1e-6))


@dataclass(frozen=True, eq=False)
class _Step:
    shares: Tensor
    drift: Tensor
    precision: float


def _ways(start: int, anchors: Mapping[int, Tensor], count: int) -> list[range]:
    """From an annotated slice up and down, each up to the next annotated one."""
    above = min((i for i in anchors if i > start), default=count)
    below = max((i for i in anchors if i < start), default=-1)
    return [range(start + 1, above), range(start - 1, below, -1)]


def _walk(features: Tensor, anchor: Tensor, start: int, order: range, window: Window) -> list[_Step]:
    """Labels of the slices of `order`, one after the other."""
    rows, columns = _box(anchor, window.margin)
    cut = features[:, :, rows, columns]
    label = anchor[:, rows, columns]
    places = torch.cat([label, _coordinates(label)])
    memory, back, steps = [(start, places)], [], []
    for at in order:
        sources = memory[-window.recent :]
        forward = _attention(cut, at, [index for index, _ in sources], window)
        found = forward.copy(torch.stack([maps for _, maps in sources])[None])[0]
        back.append(_attention(cut, memory[-1][0], [at], window))
        memory.append((at, found))
        step = _checked(found, label, back, window)
        whole = _filled(step.shares, anchor, rows, columns)
        steps.append(_Step(whole, _padded(step.drift, anchor, rows, columns), step.precision))
    return steps


def _attention(features: Tensor, target: int, sources: Sequence[int], window: Window) -> Attention:
    query = features[target][None].float()
    found = [correlate(query, features[s][None].float(), window.radius) for s in sources]
    return attend(found, window.radius, window.best, window.temperature)


def _checked(found: Tensor, label: Tensor, back: Sequence[Attention], window: Window) -> _Step:
    """Lead what was found back to the annotated slice, and say where it has drifted.

    Args:
        found: (K + 2, H, W), shares of each class and the coordinates that they came from.
        label: (K, H, W), the annotated slice's shares.
        back: attentions that lead back to it, the first step's first.
        window: when that counts as drift.
    """
    kinds = len(label)
    returned = found
    for attention in reversed(back):
        returned = attention.copy(returned[None, None])[0]
    wrong = (returned[:kinds] - label).clamp(min=0)[1:]
    precision = 1 - float(wrong.sum() / returned[1:kinds].sum().clamp(min=1e-6))
    astray = _astray(returned[kinds:], found[kinds:])
    return _Step(found[:kinds], _drifted(found[:kinds], astray, window), precision)


def _astray(returned: Tensor, places: Tensor) -> Tensor:
    """(H, W): by how many cells the way back misses the place that each cell came from.

    Args:
        returned: (2, H, W), where each cell of the annotated slice ends after the way there and back.
        places: (2, H, W), where each cell of the target came from.
    """
    height, width = returned.shape[-2:]
    cells = torch.tensor([width - 1, height - 1]) / 2
    missed = ((returned - _coordinates(returned)) * cells[:, None, None]).norm(dim=0)
    return F.grid_sample(missed[None, None], places[None].permute(0, 2, 3, 1), align_corners=True)[0, 0]


def _drifted(shares: Tensor, astray: Tensor, window: Window) -> Tensor:
    """Where a label is no longer to be believed, 0 or 1, (H, W).

    That is where no class clearly holds a cell, since shares blur with every step that goes wrong, and all of a class
    whose cells come from elsewhere than the way back leads.
    """
    best = shares.argmax(dim=0)
    drifted = shares.amax(dim=0) < window.clear
    for kind in range(1, len(shares)):
        cells = best == kind
        radius = (cells.sum() / torch.pi).sqrt()
        if cells.any() and astray[cells].mean() > window.astray * radius:
            drifted = drifted | cells
    return drifted.float()


def _box(anchor: Tensor, margin: int) -> tuple[slice, slice]:
    """Rows and columns of the foreground with a margin."""
    foreground = anchor[1:].sum(dim=0) > 0.01
    found = []
    for axis in (1, 0):
        at = foreground.any(dim=axis).nonzero()
        low, high = (int(at.min()), int(at.max())) if len(at) else (0, foreground.shape[1 - axis] - 1)
        found.append(slice(max(0, low - margin), high + margin + 1))
    return found[0], found[1]


def _coordinates(label: Tensor) -> Tensor:
    """(2, H, W): column and row from -1 to 1, as `grid_sample` counts them."""
    rows, columns = (torch.linspace(-1, 1, side) for side in label.shape[-2:])
    return torch.stack([columns.expand(len(rows), -1), rows[:, None].expand(-1, len(columns))])


def _filled(cells: Tensor, like: Tensor, rows: slice, columns: slice) -> Tensor:
    """Shares of a box in a whole slice; around it is background."""
    whole = torch.zeros_like(like)
    whole[0] = 1
    whole[:, rows, columns] = cells
    return whole


def _padded(cells: Tensor, like: Tensor, rows: slice, columns: slice) -> Tensor:
    whole = torch.zeros(like.shape[-2:])
    whole[rows, columns] = cells
    return whole
