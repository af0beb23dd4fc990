"""Images in a common frame for registration: axes along the body's, centred, one channel, intensities in [0, 1].

Origins of different subjects say nothing about each other, so every volume is centred at 0 mm. Voxel axes are
permuted and flipped to the nearest of SimpleITK's x, y, z; the oblique remainder of a direction is left out, because
protocols plan oblique slices on the anatomy (short-axis hearts), and the affine finds what is left.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import SimpleITK as sitk
from scipy.optimize import linear_sum_assignment

from sam2_propagation.interface import Image

Array = npt.NDArray[np.floating[Any]]
Index = npt.NDArray[np.int_]

_PERCENTILES = (0.5, 99.5)
_FEWEST_VOXELS = 4
"""Along an axis that is not flat: the demons' finite differences mean nothing on fewer."""


class RegistrationFailed(Exception):
    """One pair could not be registered; its text is the one-sentence reason."""


@dataclass(frozen=True)
class Frame:
    """How an image's voxel grid becomes the common one, and back.

    Attributes:
        order: the voxel axis (of Z, Y, X) that becomes each axis of the frame.
        flips: axes of the frame along which the grid is reversed.
        flat: axes of the frame with one voxel, left out (a 2D image has one).
        spacing: mm along the axes that remain, (z, y, x) or (y, x).
    """

    order: tuple[int, ...]
    flips: tuple[int, ...]
    flat: tuple[int, ...]
    spacing: tuple[float, ...]

    @property
    def dimension(self) -> int:
        """2 or 3."""
        return 3 - len(self.flat)

    def enter(self, array: np.ndarray) -> np.ndarray:
        """(Z, Y, X) on the image's grid -> the frame's axes, two or three of them."""
        turned = np.flip(array.transpose(self.order), self.flips)
        return np.ascontiguousarray(turned.squeeze(self.flat))

    def leave(self, array: np.ndarray) -> np.ndarray:
        """The inverse of `enter`."""
        turned = np.flip(np.expand_dims(array, self.flat), self.flips)
        return np.ascontiguousarray(turned.transpose(np.argsort(self.order)))


@dataclass(frozen=True, eq=False)
class Channels:
    """An image in its frame, float32 (C, ...) scaled to [0, 1] channel by channel."""

    case: str
    frame: Frame
    data: Array


def frame_of(image: Image) -> Frame:
    """The frame of an image.

    Raises:
        RegistrationFailed: too few voxels to register.
    """
    cosines = np.asarray(image.direction, float).reshape(3, 3)[
        ::-1, ::-1
    ]  # rows: z, y, x of the body; columns: Z, Y, X
    order = linear_sum_assignment(-np.abs(cosines))[1]
    shape = np.asarray(image.shape)[order]
    flat = np.flatnonzero(shape == 1)
    if len(flat) > 1 or min(shape[shape > 1], default=0) < _FEWEST_VOXELS:
        raise RegistrationFailed(
            f"{image.case} has shape {image.shape}: registration needs two or three axes "
            f"of {_FEWEST_VOXELS} voxels or more"
        )
    return Frame(
        order=tuple(int(axis) for axis in order),
        flips=tuple(k for k in range(3) if cosines[k, order[k]] < 0),
        flat=tuple(int(k) for k in flat),
        spacing=tuple(float(image.spacing[order[k]]) for k in range(3) if shape[k] > 1),
    )


def channels_of(image: Image) -> Channels:
    """Every channel in the frame, clipped at percentiles and scaled to [0, 1]; a constant channel becomes 0.

    Raises:
        RegistrationFailed: all channels are constant, intensities are not finite, or too few voxels.
    """
    frame = frame_of(image)
    if not np.isfinite(image.data).all():
        raise RegistrationFailed(f"{image.case} has intensities that are not finite")
    data = np.stack([_scaled(frame.enter(channel)) for channel in image.data])
    if not data.any():
        raise RegistrationFailed(f"{image.case} is constant: there is nothing to register")
    return Channels(image.case, frame, data)


def _scaled(channel: Array) -> Array:
    low, high = np.percentile(channel, _PERCENTILES)
    if high <= low:
        low, high = float(channel.min()), float(channel.max())
    if high <= low:
        return np.zeros_like(channel)
    return ((np.clip(channel, low, high) - low) / (high - low)).astype(np.float32)


def joint_weights(data: Array) -> Array:
    """(C,) weights that join channels into one: the first principal component, positive where it is largest.

    The support's weights are used for the query as well, so both are the same mixture of contrasts.
    """
    if len(data) == 1:
        return np.ones(1, np.float32)
    weights = np.linalg.eigh(np.cov(data.reshape(len(data), -1)))[1][:, -1]
    return (weights * np.sign(weights[np.abs(weights).argmax()])).astype(np.float32)


def centred(array: np.ndarray, spacing: tuple[float, ...]) -> sitk.Image:
    """A SimpleITK image of (Z, Y, X) or (Y, X) whose middle is at 0 mm; spacing in the array's axis order."""
    image = sitk.GetImageFromArray(array)
    image.SetSpacing(spacing[::-1])
    image.SetOrigin([-(n - 1) / 2 * s for n, s in zip(image.GetSize(), spacing[::-1], strict=True)])
    return image


def joined(channels: Channels, weights: Array) -> sitk.Image:
    """The weighted sum of channels, float32 in [0, 1], centred."""
    return centred(_scaled(np.tensordot(weights, channels.data, 1)), channels.frame.spacing)


def working_spacing(image: sitk.Image, voxels: int) -> tuple[float, ...]:
    """(x, y, z) spacing of at most about `voxels` voxels: the finest axes are coarsened first."""
    spacing = np.asarray(image.GetSpacing())
    extent = spacing * image.GetSize()
    low, high = float(spacing.min()), float(extent.max())
    if np.prod(extent / spacing) <= voxels:
        return tuple(spacing)
    for _ in range(40):
        middle = (low + high) / 2
        fits = np.prod(np.maximum(extent / np.maximum(spacing, middle), 1)) <= voxels
        low, high = (low, middle) if fits else (middle, high)
    return tuple(np.maximum(spacing, high))


def coarser(image: sitk.Image, spacing: tuple[float, ...]) -> sitk.Image:
    """The image on a grid of that (x, y, z) spacing in the same place; an axis already coarser stays as it is."""
    size = np.asarray(image.GetSize())
    target = np.maximum(spacing, image.GetSpacing())
    factors = np.maximum(np.minimum((target / image.GetSpacing() + 0.01).astype(int), size // 2), 1)
    middle = np.asarray(image.TransformContinuousIndexToPhysicalPoint(((size - 1) / 2).tolist()))
    new_size = np.maximum(np.round(size * image.GetSpacing() / target), 2).astype(int)
    # Block means are the cheapest filter against aliasing; what is left of the factor is below 2.
    binned = sitk.BinShrink(image, [int(f) for f in factors]) if factors.max() > 1 else image
    grid = sitk.Image([int(n) for n in new_size], sitk.sitkUInt8)
    grid.SetSpacing(target.tolist())
    grid.SetOrigin((middle - (new_size - 1) / 2 * target).tolist())
    identity = sitk.Transform(image.GetDimension(), sitk.sitkIdentity)
    # The rim of the new grid may lie half a voxel outside the binned one: nearest value there, not 0.
    return sitk.Resample(binned, grid, identity, sitk.sitkLinear, 0.0, binned.GetPixelID(), True)


def like(array: np.ndarray, grid: sitk.Image) -> sitk.Image:
    """An array as a SimpleITK image on that grid."""
    image = sitk.GetImageFromArray(array)
    image.CopyInformation(grid)
    return image


def cropped(image: sitk.Image, low: Index, high: Index) -> sitk.Image:
    """The part between two (x, y, z) voxel corners, both included."""
    return image[tuple(slice(int(a), int(b) + 1) for a, b in zip(low, high, strict=True))]
