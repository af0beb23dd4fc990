"""The network whose features say what corresponds to what: a small pyramid over edge profiles or intensities."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

DEPTH = 32
"""Channels of a feature map."""
_OFFSETS = ((0, 1), (1, 0), (1, 1), (1, -1), (0, 3), (3, 0), (3, 3), (3, -3))
"""Neighbours that an edge profile compares a pixel with, (rows, columns) of working pixels."""
_LOCAL = 15
FORMAT = 1
"""Of kept networks: raised when layers, or what trained weights mean, change, so that older files are left alone."""


@dataclass(frozen=True, eq=False)
class Features:
    """Feature vectors of length 1.

    Attributes:
        fine: (N, 32, H / 2, W / 2).
        coarse: (N, 32, H / 4, W / 4).
    """

    fine: Tensor
    coarse: Tensor


class CorrespondenceNetwork(nn.Module):
    """From slices (N, C, H, W) in [0, 1] to features on a fine and a coarse grid.

    Args:
        channels: C.
        profile: look at edge profiles, which no change of brightness, contrast or sign alters much (after Sli2Vol);
            otherwise at intensities, which training then remaps at random (after MAST's bottleneck).
        width: channels of the first stage.
    """

    def __init__(self, channels: int, profile: bool = True, width: int = 24) -> None:
        super().__init__()
        self.profile = profile
        first = channels * (len(_OFFSETS) if profile else 1)
        self.stem = nn.Sequential(_unit(first, width, 2), _Residual(width))
        self.middle = nn.Sequential(_unit(width, 2 * width, 2), _Residual(2 * width), _Residual(2 * width))
        self.deep = nn.Sequential(_unit(2 * width, 3 * width, 2), _Residual(3 * width))
        self.deep_to_middle = nn.Conv2d(3 * width, 2 * width, 1)
        self.middle_to_stem = nn.Conv2d(2 * width, width, 1)
        self.coarse = nn.Conv2d(2 * width, DEPTH, 1)
        self.fine = nn.Conv2d(width, DEPTH, 3, padding=1)

    def forward(self, slices: Tensor) -> Features:
        """Features; H and W must be multiples of 8."""
        stem = self.stem(edge_profile(slices) if self.profile else slices - 0.5)
        middle = self.middle(stem)
        middle = middle + _doubled(self.deep_to_middle(self.deep(middle)))
        stem = stem + _doubled(self.middle_to_stem(middle))
        return Features(F.normalize(self.fine(stem), dim=1), F.normalize(self.coarse(middle), dim=1))


def edge_profile(slices: Tensor) -> Tensor:
    """Absolute differences to eight neighbours near and far over their own local mean: (N, C, H, W) -> (N, 8 C, H, W).

    The same for a slice and its inverse. After Sli2Vol (Yeung et al., MICCAI 2021), with a local scale of our own.
    """
    steps = [(slices - torch.roll(slices, offset, dims=(-2, -1))).abs() for offset in _OFFSETS]
    profile = torch.cat(steps, dim=1)
    mean = profile.mean(dim=1, keepdim=True)
    local = F.avg_pool2d(mean, _LOCAL, stride=1, padding=_LOCAL // 2, count_include_pad=False)
    return profile / (local + 0.02)


class _Residual(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.body = nn.Sequential(_unit(width, width), nn.Conv2d(width, width, 3, padding=1, bias=False))
        self.norm = nn.BatchNorm2d(width)

    def forward(self, maps: Tensor) -> Tensor:
        return F.relu(maps + self.norm(self.body(maps)))


def _unit(first: int, width: int, stride: int = 1) -> nn.Sequential:
    convolution = nn.Conv2d(first, width, 3, stride, 1, bias=False)
    return nn.Sequential(convolution, nn.BatchNorm2d(width), nn.ReLU())


def _doubled(maps: Tensor) -> Tensor:
    return F.interpolate(maps, scale_factor=2, mode="bilinear")
