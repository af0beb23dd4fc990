"""From subjects to label maps: implicit functions of all parts on a grid of all slices, in one batch on one device."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F

from sam2_propagation.pretraining.parts import SHAPE_FIELDS, FloatArray, Subject

COARSE = 2
"""Implicit functions are computed on a grid this much coarser than the labels and interpolated."""
NOWHERE = 99.0


@dataclass(frozen=True)
class Slices:
    """Which slice of which subject each frame shows.

    Attributes:
        subjects: the distinct individuals.
        owner: for each frame, the index of its subject.
        z: for each frame, its height in the stack, in [-1, 1].
    """

    subjects: Sequence[Subject]
    owner: Sequence[int]
    z: Sequence[float]


def implicit_functions(slices: Slices, size: int, device: torch.device) -> torch.Tensor:
    """Positive inside each part, negative outside, in units of the part's half axes.

    Returns:
        float32 (frames, parts, size, size); subjects with fewer parts are padded with parts that are nowhere.
    """
    shape = _shape_tensor(slices, device)
    z = _anatomy_z(slices, device)
    points = _anatomy_points(slices, size // COARSE, device)
    values = _solid(shape, points, z) + shape["rough"] * _lumps(slices, shape["x"].shape[1], size // COARSE, device)
    return F.interpolate(values, size=(size, size), mode="bilinear", align_corners=False)


def paint(values: torch.Tensor) -> torch.Tensor:
    """Label map of implicit functions, later parts over earlier ones: int64 (frames, H, W), part index + 1."""
    order = torch.arange(1, values.shape[1] + 1, device=values.device).view(1, -1, 1, 1)
    return (order * (values > 0)).amax(dim=1)


def clutter(slices: Slices, size: int, device: torch.device) -> torch.Tensor:
    """The subjects' clutter fields as each frame cuts them, (frames, 3, size, size)."""
    return _through_stack([s.clutter for s in slices.subjects], slices, size, device)


def part_radius(slices: Slices, device: torch.device) -> torch.Tensor:
    """The smaller in-plane half axis of each part, float32 (frames, parts), in half fields of view."""
    shape = _shape_tensor(slices, device)
    return torch.minimum(shape["rx"], shape["ry"])[..., 0, 0]


def _shape_tensor(slices: Slices, device: torch.device) -> dict[str, torch.Tensor]:
    """Each shape field as (frames, parts, 1, 1)."""
    n_parts = max(len(s.parts) for s in slices.subjects)
    table = np.zeros((len(slices.subjects), n_parts, len(SHAPE_FIELDS)), np.float32)
    table[:, :, SHAPE_FIELDS.index("x")] = NOWHERE
    for name in ("rx", "ry", "rz"):
        table[:, :, SHAPE_FIELDS.index(name)] = 1e-2
    for row, subject in zip(table, slices.subjects, strict=True):
        row[: len(subject.parts)] = [[getattr(p, f) for f in SHAPE_FIELDS] for p in subject.parts]
    frames = torch.from_numpy(table[list(slices.owner)]).to(device)
    return {f: frames[:, :, i, None, None] for i, f in enumerate(SHAPE_FIELDS)}


def _anatomy_z(slices: Slices, device: torch.device) -> torch.Tensor:
    owners = [slices.subjects[o] for o in slices.owner]
    z = [s.stretch_z * z + s.shift_z for s, z in zip(owners, slices.z, strict=True)]
    return torch.tensor(z, dtype=torch.float32, device=device).view(-1, 1, 1, 1)


def _anatomy_points(slices: Slices, size: int, device: torch.device) -> torch.Tensor:
    """Where each pixel of each frame lies in its subject's anatomy: (frames, 2, size, size), x then y."""
    affine = torch.from_numpy(np.stack([slices.subjects[o].affine for o in slices.owner])).to(device)
    grid = F.affine_grid(affine, [len(slices.owner), 1, size, size], align_corners=False).permute(0, 3, 1, 2)
    return grid + _through_stack([s.elastic for s in slices.subjects], slices, size, device)


def _lumps(slices: Slices, n_parts: int, size: int, device: torch.device) -> torch.Tensor:
    padded = [np.pad(s.lumps, ((0, n_parts - len(s.lumps)), (0, 0), (0, 0), (0, 0))) for s in slices.subjects]
    return _through_stack(padded, slices, size, device)


def _through_stack(fields: Sequence[FloatArray], slices: Slices, size: int, device: torch.device) -> torch.Tensor:
    """Smooth fields (C, D, G, G) of the subjects, cut at each frame's z: (frames, C, size, size)."""
    frames = torch.from_numpy(np.stack(fields)[list(slices.owner)]).to(device)
    depth = frames.shape[2]
    place = (torch.tensor(slices.z, dtype=torch.float32, device=device).clamp(-1, 1) + 1) / 2 * (depth - 1)
    below = place.floor().clamp(max=depth - 2).long()
    share = (place - below).view(-1, 1, 1, 1)
    index = torch.arange(len(slices.owner), device=device)
    cut = (1 - share) * frames[index, :, below] + share * frames[index, :, below + 1]
    return F.interpolate(cut, size=(size, size), mode="bicubic", align_corners=False)


def _solid(shape: dict[str, torch.Tensor], points: torch.Tensor, z: torch.Tensor) -> torch.Tensor:
    """The smooth solids without their lumps, (frames, parts, H, W)."""
    dx = points[:, :1] - (shape["x"] + shape["lean_x"] * z)
    dy = points[:, 1:] - (shape["y"] + shape["lean_y"] * z)
    cos, sin = torch.cos(shape["angle"]), torch.sin(shape["angle"])
    a = (cos * dx + sin * dy) / shape["rx"]
    b = (cos * dy - sin * dx) / shape["ry"] + shape["bend"] * (a.square().clamp(max=4) - 0.3)
    squares = torch.stack([a.square(), b.square(), ((z - shape["z"]) / shape["rz"]).square().expand_as(a)])
    round_norm = squares.sum(0).sqrt()
    boxy_norm = squares.square().sum(0).sqrt().sqrt()
    boxiness = (shape["exponent"] - 2) / 2
    solid = 1 - (1 - boxiness) * round_norm - boxiness * boxy_norm
    beyond = torch.cos(shape["cut_angle"]) * a + torch.sin(shape["cut_angle"]) * b
    return torch.minimum(solid, shape["cut_offset"] - beyond)
