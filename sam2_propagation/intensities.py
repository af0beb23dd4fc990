"""From stored intensities to what SAM2 looks at: floats throughout, no 8-bit files in between."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from sam2_propagation.errors import PropagationError
from sam2_propagation.interface import ChannelVolume, Image

CT_WINDOWS: dict[str, tuple[float, float]] = {
    "abdomen": (-160.0, 240.0),
    "lung": (-1000.0, 400.0),
    "brain": (0.0, 80.0),
    "bone": (-500.0, 1300.0),
}
"""Usual CT windows in Hounsfield units, (low, high)."""

_MEAN = (0.485, 0.456, 0.406)
_DEVIATION = (0.229, 0.224, 0.225)
_PERCENTILES = (0.5, 99.5)


@dataclass(frozen=True)
class Intensities:
    """How intensities become three channels in [0, 1].

    Attributes:
        window: (low, high) in stored units (CT), a name of `CT_WINDOWS`, or None for the 0.5 and 99.5 percentiles over
            non-zero voxels (there zeros stay zero).
        channels: a channel's index, three indices for red, green and blue, "mean" of all channels, or None: three
            channels of a 2D image are colour, otherwise the first channel counts.
        positive: percentiles over voxels above zero, as SSL-MedSAM2 takes them, rather than over all but zeros.
    """

    window: tuple[float, float] | str | None = None
    channels: int | tuple[int, ...] | str | None = None
    positive: bool = False


class ImageSlices:
    """Normalised slices of one view of an image, ready for the encoder.

    Args:
        seen: float32 (C, N, Y, X) in [0, 1], one or three channels, as `scale` gives it and a view shows it.
        image_size: S, the model's input size.
    """

    def __init__(self, seen: ChannelVolume, image_size: int) -> None:
        self._seen = seen
        self._size = image_size
        self._mean = torch.tensor(_MEAN)[None, :, None, None]
        self._deviation = torch.tensor(_DEVIATION)[None, :, None, None]

    def __len__(self) -> int:
        return self._seen.shape[1]

    def batch(self, indices: Sequence[int]) -> Tensor:
        """(B, 3, S, S) float32: resized to the square input as sam2 does, grey as three equal channels."""
        chosen = np.ascontiguousarray(self._seen[:, list(indices)].swapaxes(0, 1), dtype=np.float32)
        size = (self._size, self._size)
        # Smoothing matters only where the slice is larger than the input.
        slices = F.interpolate(torch.from_numpy(chosen), size=size, mode="bilinear", antialias=True)
        return (slices.expand(-1, 3, -1, -1) - self._mean) / self._deviation


def scale(image: Image, intensities: Intensities | None = None) -> ChannelVolume:
    """Choose channels and bring intensities to [0, 1].

    Returns:
        float32 (C, Z, Y, X) with one channel (grey) or three (colour).

    Raises:
        PropagationError: a channel that the image lacks, or an unknown window.
    """
    how = intensities or Intensities()
    chosen = np.nan_to_num(_channels(image, how.channels), posinf=0, neginf=0)
    low, high = _limits(chosen, how)
    if high <= low:
        return np.zeros_like(chosen)
    scaled = np.clip((chosen - low) / (high - low), 0, 1).astype(np.float32)
    if how.window is None:
        scaled[chosen == 0] = 0
    return scaled


def _channels(image: Image, channels: int | tuple[int, ...] | str | None) -> ChannelVolume:
    count = image.data.shape[0]
    if channels == "mean":
        return image.data.mean(axis=0, keepdims=True)
    if channels is None:
        colour = count == 3 and image.shape[0] == 1
        channels = (0, 1, 2) if colour else 0
    wanted = (channels,) if isinstance(channels, int) else channels
    if isinstance(wanted, str) or len(wanted) not in (1, 3) or not all(0 <= c < count for c in wanted):
        raise PropagationError(
            f"expected a channel (counted from 0), three channels or mean of the {count} channels of {image.case}, "
            f"found {channels}; choose among those"
        )
    return image.data[list(wanted)]


def _limits(chosen: ChannelVolume, how: Intensities) -> tuple[float, float]:
    window = how.window
    if isinstance(window, str):
        if window not in CT_WINDOWS:
            raise PropagationError(
                f"expected a window out of {', '.join(CT_WINDOWS)}, or two numbers, found {window!r}; choose one"
            )
        return CT_WINDOWS[window]
    if window is not None:
        return window
    voxels = chosen[chosen > 0 if how.positive else chosen != 0]
    if voxels.size == 0:
        return 0.0, 0.0
    low, high = np.percentile(voxels, _PERCENTILES)
    return float(low), float(high)
