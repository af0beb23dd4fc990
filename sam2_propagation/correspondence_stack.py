"""Slices as the correspondence network sees them: one plane, square pixels of one size for the whole data set."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from torch import Tensor

from sam2_propagation.errors import PropagationError
from sam2_propagation.intensities import Intensities, scale
from sam2_propagation.interface import BoolVolume, ChannelVolume, Image, LabelVolume, Support
from sam2_propagation.views import PLANES, Presentation, natural_plane, present

FINE = 2
"""Working pixels along the side of a cell of the fine grid; labels live on that grid."""
_SIDES = (96, 192)
"""Working pixels along a slice's long side, at least and at most."""
_MULTIPLE = 8
_WHOLE = 0.5


@dataclass(frozen=True, eq=False)
class Stack:
    """One image's slices at working size.

    Attributes:
        slices: float32 (N, C, H, W) in [0, 1]; H and W are multiples of 8, filled up with 0.
        shown: how the image is presented.
        size: (rows, columns) of a slice as seen.
        used: (rows, columns) of working pixels that the slice fills, of H and W.
    """

    slices: Tensor
    shown: Presentation
    size: tuple[int, int]
    used: tuple[int, int]

    def __len__(self) -> int:
        return len(self.slices)

    def content(self) -> Tensor:
        """How much there is to see in each cell of the fine grid, (N, rows, columns): the strength of edges."""
        cells = F.avg_pool2d(self.slices.mean(dim=1, keepdim=True), FINE)[:, 0]
        down, right = cells.diff(dim=1, append=cells[:, -1:]), cells.diff(dim=2, append=cells[:, :, -1:])
        return (down**2 + right**2).sqrt()

    def enter(self, label: LabelVolume, index: int, classes: tuple[int, ...]) -> Tensor:
        """Shares of each class, background first, in the cells of one slice: float32 (1 + K, rows, columns)."""
        seen = self.shown.forward(label)[index]
        masks = torch.from_numpy(np.stack([seen == value for value in classes]).astype(np.float32))
        shares = torch.zeros(len(classes), *self.slices.shape[-2:])
        shares[:, : self.used[0], : self.used[1]] = resized(masks, self.used)
        cells = F.avg_pool2d(shares, FINE)
        return torch.cat([(1 - cells.sum(dim=0, keepdim=True)).clamp(min=0), cells])

    def leave(self, cells: Tensor) -> Tensor:
        """Maps on the fine grid, (..., rows, columns), at the size of a slice as seen."""
        rows, columns = self.slices.shape[-2:]
        flat = cells.reshape(1, -1, *cells.shape[-2:])
        fine = F.interpolate(flat, size=(rows, columns), mode="bilinear")[0, :, : self.used[0], : self.used[1]]
        return resized(fine, self.size).reshape(*cells.shape[:-2], *self.size)


def stack_of(image: Image, pitch: float, view: str = "identity", natural: str | None = None) -> Stack:
    """Cut an image into slices of square pixels.

    Args:
        image: 2D or 3D, any number of channels; each is scaled by its own percentiles.
        pitch: mm along the side of a working pixel.
        view: a name of `views.VIEWS`.
        natural: the plane of views that name none; the image's own when None.
    """
    shown = present(image, view, natural)
    seen = np.ascontiguousarray(shown.forward(scaled(image)).swapaxes(0, 1))
    extent = [seen.shape[2] * image.spacing[shown.axes[1]], seen.shape[3] * image.spacing[shown.axes[2]]]
    used = (max(_MULTIPLE, round(extent[0] / pitch)), max(_MULTIPLE, round(extent[1] / pitch)))
    return Stack(at_size(torch.from_numpy(seen), used), shown, (seen.shape[2], seen.shape[3]), used)


def at_size(slices: Tensor, used: tuple[int, int]) -> Tensor:
    """Slices (N, C, H, W) of `used` working pixels, filled up with 0 to multiples of 8."""
    return F.pad(resized(slices, used), (0, -used[1] % _MULTIPLE, 0, -used[0] % _MULTIPLE))


def fitting_pitch(image: Image) -> float:
    """The side of a working pixel, in mm, at which an image's long side has 96 to 192 of them."""
    axes = present(image, "identity").axes[1:]
    extents = [(image.shape[axis] * image.spacing[axis], image.shape[axis]) for axis in axes]
    extent, pixels = max(extents)
    return extent / float(np.clip(pixels, *_SIDES))


def scaled(image: Image) -> ChannelVolume:
    """All channels, each in [0, 1]: float32 (C, Z, Y, X)."""
    return np.concatenate([scale(image, Intensities(channels=c)) for c in range(len(image.data))])


def resized(maps: Tensor, size: tuple[int, int]) -> Tensor:
    """(..., H, W) at another size: averaged when it gets smaller, interpolated when it gets larger."""
    flat = maps.reshape(1, -1, *maps.shape[-2:]) if maps.ndim == 3 else maps
    out = F.interpolate(flat, size=size, mode="bilinear", antialias=True)
    return out.reshape(*maps.shape[:-2], *size)


def spoken(support: Support) -> BoolVolume:
    """Where a label says something, (Z, Y, X)."""
    return np.ones(support.label.shape, bool) if support.ignore is None else support.label != support.ignore


def annotated_slices(support: Support, shown: Presentation) -> npt.NDArray[np.intp]:
    """Indices of the slices, as shown, of which at least half is annotated."""
    return np.flatnonzero(shown.forward(spoken(support)).mean(axis=(1, 2)) >= _WHOLE)


def plane_of_label(support: Support) -> str:
    """The plane whose whole slices are annotated: the natural one if it can be.

    Raises:
        PropagationError: none is.
    """
    natural = natural_plane(support.image)
    planes = [natural, *(plane for plane in PLANES if plane != natural)]
    for plane in planes if support.image.shape[0] > 1 else planes[:1]:
        if annotated_slices(support, present(support.image, plane)).size:
            return plane
    raise PropagationError(
        f"expected a whole annotated slice in the label of {support.image.case}, found only parts of slices; complete "
        "one, or use another propagator"
    )
