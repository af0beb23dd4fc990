"""Masks as a registration would have left them: displaced, swollen or shrunk, smoothed, with parts missing."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F

FIELD_GRID = 5


@dataclass(frozen=True)
class Corruption:
    """Parameters for a batch of masks, all float32 with the masks' leading shape (..., ).

    Attributes:
        amount: 0 leaves the mask as it is, 1 is a bad registration.
        field: (..., 2, G, G) smooth displacement, unit variance.
        shift: (..., 2) displacement of the whole, unit variance.
        grow: log scale, unit variance.
        level: shift of the threshold after smoothing, in [-1, 1]: swelling or shrinking.
        cut: (..., 3) direction and place of the line beyond which the mask is lost; a place above 2 loses nothing.
    """

    amount: npt.NDArray[np.float32]
    field: npt.NDArray[np.float32]
    shift: npt.NDArray[np.float32]
    grow: npt.NDArray[np.float32]
    level: npt.NDArray[np.float32]
    cut: npt.NDArray[np.float32]


def draw_corruption(rng: np.random.Generator, amount: npt.NDArray[np.float32]) -> Corruption:
    """Parameters for masks (elements, memories) of the amounts given.

    The memories of one element share most of their displacement, as neighbouring slices of one registration do: errors
    that differ from slice to slice could be averaged away, those of a registration cannot.
    """
    n, k = amount.shape
    turn = rng.uniform(0, 2 * np.pi, (n, 1))
    place = np.where(rng.random((n, k)) < 0.3 * amount, rng.uniform(0, 0.9, (n, k)), 9.0)
    direction = np.broadcast_to(np.stack([np.cos(turn), np.sin(turn)], -1), (n, k, 2))
    return Corruption(
        amount=amount,
        field=_shared(rng, (n, k, 2, FIELD_GRID, FIELD_GRID)),
        shift=_shared(rng, (n, k, 2)),
        grow=_shared(rng, (n, k)),
        level=rng.uniform(-1, 1, (n, k)).astype(np.float32),
        cut=np.concatenate([direction, place[..., None]], -1).astype(np.float32),
    )


def _shared(rng: np.random.Generator, shape: tuple[int, ...]) -> npt.NDArray[np.float32]:
    common = rng.standard_normal((shape[0], 1, *shape[2:]))
    return (0.85 * common + 0.5 * rng.standard_normal(shape)).astype(np.float32)


def corrupt(masks: torch.Tensor, corruption: Corruption) -> torch.Tensor:
    """Corrupted masks; one that would vanish stays as it was.

    Args:
        masks: float32 (elements, memories, H, W), zeros and ones.
        corruption: its parameters, leading shape (elements, memories).

    Returns:
        float32 (elements, memories, H, W), zeros and ones.
    """
    flat = masks.flatten(0, 1)[:, None]
    par = {name: torch.from_numpy(v).to(masks).flatten(0, 1) for name, v in vars(corruption).items()}
    y, x = _grid(flat)
    area = flat.sum((1, 2, 3)).clamp(min=1)
    centre = torch.stack([(flat[:, 0] * x).sum((1, 2)), (flat[:, 0] * y).sum((1, 2))], -1) / area[:, None]
    radius = 2 * (area / flat.shape[-1] / flat.shape[-2] / torch.pi).sqrt()
    moved = F.grid_sample(flat, _sampling(par, centre, radius, x, y), padding_mode="zeros", align_corners=False)
    changed = _resize_and_cut(moved, par, centre, radius, x, y)
    spared = (par["amount"] == 0) | (changed.sum((1, 2, 3)) < 4)
    return torch.where(spared.view(-1, 1, 1, 1), flat, changed)[:, 0].view_as(masks)


def _grid(masks: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    h, w = masks.shape[-2:]
    y = (torch.arange(h, device=masks.device) * 2 + 1) / h - 1
    x = (torch.arange(w, device=masks.device) * 2 + 1) / w - 1
    return y.view(1, -1, 1), x.view(1, 1, -1)


def _sampling(
    par: dict[str, torch.Tensor], centre: torch.Tensor, radius: torch.Tensor, x: torch.Tensor, y: torch.Tensor
) -> torch.Tensor:
    """Where each output pixel is read from, (masks, H, W, 2)."""
    reach = par["amount"] * (0.01 + 0.16 * radius)
    size = (y.shape[1], x.shape[2])
    field = F.interpolate(par["field"], size=size, mode="bicubic", align_corners=False) * reach.view(-1, 1, 1, 1)
    shift = par["shift"] * (par["amount"] * (0.008 + 0.2 * radius))[:, None]
    scale = torch.exp(0.15 * par["amount"] * par["grow"]).view(-1, 1, 1)
    cx, cy = centre[:, 0].view(-1, 1, 1), centre[:, 1].view(-1, 1, 1)
    read_x = cx + (x - cx) * scale + field[:, 0] + shift[:, 0].view(-1, 1, 1)
    read_y = cy + (y - cy) * scale + field[:, 1] + shift[:, 1].view(-1, 1, 1)
    return torch.stack([read_x, read_y], -1)


def _resize_and_cut(
    moved: torch.Tensor,
    par: dict[str, torch.Tensor],
    centre: torch.Tensor,
    radius: torch.Tensor,
    x: torch.Tensor,
    y: torch.Tensor,
) -> torch.Tensor:
    smooth = F.avg_pool2d(moved, 5, 1, 2)
    threshold = 0.5 + 0.35 * par["amount"] * par["level"]
    kept = (smooth > threshold.view(-1, 1, 1, 1)).float()
    along = (x - centre[:, 0].view(-1, 1, 1)) * par["cut"][:, 0].view(-1, 1, 1)
    along = along + (y - centre[:, 1].view(-1, 1, 1)) * par["cut"][:, 1].view(-1, 1, 1)
    inside = along < (par["cut"][:, 2] * radius).view(-1, 1, 1)
    return kept * inside[:, None]
