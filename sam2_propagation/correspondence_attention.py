"""Attention in a window: every cell of one slice looks for its like near the same place in other slices."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

TEMPERATURE = 0.05
_NOWHERE = -1e4


@dataclass(frozen=True, eq=False)
class Attention:
    """Where each cell of a target copies from.

    Attributes:
        weights: (B, T, H, W), of the T best matches, sum 1 over T.
        places: int64 (B, T, H, W), index into sources laid end to end, each flattened (S * H * W).
    """

    weights: Tensor
    places: Tensor

    def copy(self, sources: Tensor) -> Tensor:
        """What sources (B, S, K, H, W) give the target: (B, K, H, W)."""
        batch, _, kinds, height, width = sources.shape
        flat = sources.transpose(1, 2).reshape(batch, kinds, -1)
        index = self.places.reshape(batch, 1, -1).expand(-1, kinds, -1)
        taken = flat.gather(2, index).reshape(batch, kinds, -1, height, width)
        return (taken * self.weights[:, None]).sum(dim=2)


def correlate(target: Tensor, source: Tensor, radius: int) -> Tensor:
    """Similarities of a target's cells to all source cells in the window around the same place.

    Args:
        target: (B, D, H, W), vectors of length 1.
        source: the same shape.
        radius: R, in cells.

    Returns:
        (B, (2 R + 1)^2, H, W), row by row of the window; cells outside of the source are far below -1.
    """
    height, width = target.shape[-2:]
    padded = F.pad(source, (radius,) * 4)
    inside = F.pad(torch.zeros(1, height, width, device=target.device), (radius,) * 4, value=_NOWHERE)
    steps = range(2 * radius + 1)
    found = [
        (target * padded[..., i : i + height, j : j + width]).sum(dim=1) + inside[:, i : i + height, j : j + width]
        for i in steps
        for j in steps
    ]
    return torch.stack(found, dim=1)


def reconstruct(similarity: Tensor, values: Tensor, radius: int, temperature: float = TEMPERATURE) -> Tensor:
    """Copy a source's values (B, K, H, W) to the target by softmax over all of the window; what training needs."""
    height, width = values.shape[-2:]
    padded = F.pad(values, (radius,) * 4)
    weights = (similarity / temperature).softmax(dim=1)
    out = torch.zeros_like(values)
    for k in range(weights.shape[1]):
        i, j = divmod(k, 2 * radius + 1)
        out = out + weights[:, k : k + 1] * padded[..., i : i + height, j : j + width]
    return out


def attend(similarities: Sequence[Tensor], radius: int, best: int, temperature: float = TEMPERATURE) -> Attention:
    """The best matches over several sources together.

    Args:
        similarities: one (B, (2 R + 1)^2, H, W) a source, as `correlate` gives it.
        radius: R.
        best: T, how many matches count.
        temperature: of the softmax over them.
    """
    joined = torch.cat(list(similarities), dim=1)
    values, index = joined.topk(min(best, joined.shape[1]), dim=1)
    weights = (values / temperature).softmax(dim=1)
    window, (height, width) = (2 * radius + 1) ** 2, joined.shape[-2:]
    source, k = index // window, index % window
    rows = torch.arange(height, device=joined.device)[:, None] + k // (2 * radius + 1) - radius
    columns = torch.arange(width, device=joined.device) + k % (2 * radius + 1) - radius
    # A match outside of the source has no weight; its place only has to exist.
    places = source * height * width + rows.clamp(0, height - 1) * width + columns.clamp(0, width - 1)
    return Attention(weights, places)
