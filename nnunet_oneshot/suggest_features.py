"""What an image looks like, as short vectors that need no training: how alike are two cases, or two slices?

Every image is shown upright, slice by slice across its thickest axis, intensities scaled to [0, 1] channel by channel,
and averaged over a coarse grid, so that small differences of place and noise hardly count. Vectors have mean 0 and
length 1: their product is a correlation, which brightness and contrast do not change.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F

from sam2_propagation.intensities import Intensities, scale
from sam2_propagation.interface import Image
from sam2_propagation.views import can_show, present

Vectors = npt.NDArray[np.float32]
"""(N, D), one row a case or slice, each of mean 0 and length 1."""

_GRID = 16
_SLICES = 8
_FINE = 64


@dataclass(frozen=True, eq=False)
class Described:
    """One image's vectors.

    Attributes:
        case: the case's name.
        whole: (D,) of the whole image.
        slices: (N, D) of its slices.
        steps: (N - 1,) what a label keeps from each slice to the next, in [0, 1]: their correlation, or what a trained
            network predicts.
        content: (N,) how much there is to see on each slice, in [0, 1]: its share of the busiest slice's edges.
        axis: the array axis (0 = Z, 1 = Y, 2 = X) that slices are counted along.
    """

    case: str
    whole: Vectors
    slices: Vectors
    steps: npt.NDArray[np.float32]
    content: npt.NDArray[np.float32]
    axis: int


def describe(
    image: Image, whole: str = "edges", slices: str = "both", view: str = "identity", plane: str | None = None
) -> Described:
    """Vectors of an image and of its slices, slices in the order of the array.

    Args:
        image: 2D or 3D, any number of channels.
        whole, slices: names of `FEATURES`, for the whole image and for its slices.
        view: a name of `views.VIEWS`; slices are those of its plane.
        plane: the natural plane of the set, in which the whole image is seen, so that how an image is stored does not
            tell it from others; the image's own where None, or where it has no slices there.
    """
    shown = present(image, view)
    data = np.concatenate([scale(image, Intensities(channels=c)) for c in range(len(image.data))])
    seen = torch.from_numpy(np.ascontiguousarray(shown.forward(data)))
    together = present(image, view, plane if can_show(image, view, plane) else None)
    same = together == shown
    of_whole = FEATURES[whole](seen if same else torch.from_numpy(np.ascontiguousarray(together.forward(data))))
    maps = FEATURES[slices](seen).transpose(0, 1)
    content = _edges(seen).mean(dim=(0, 2, 3)).numpy()
    order = slice(None, None, -1) if shown.flips[0] else slice(None)
    each = np.ascontiguousarray(normalised(maps.flatten(1).numpy())[order])
    volume = F.adaptive_avg_pool3d(of_whole, (_SLICES, _GRID, _GRID))
    vector = normalised(volume.flatten()[None].numpy())[0]
    share = (content / max(float(content.max()), 1e-6)).astype(np.float32)
    steps = (each[:-1] * each[1:]).sum(axis=1)
    return Described(image.case, vector, each, steps, share[order], shown.axes[0])


def alike(first: Vectors, second: Vectors) -> npt.NDArray[np.float32]:
    """(N, M) correlations in [-1, 1]."""
    return np.clip(first @ second.T, -1, 1).astype(np.float32)


def along(steps: npt.NDArray[np.floating]) -> npt.NDArray[np.float32]:
    """How much of a slice's label is left at another when it is carried there from slice to slice.

    A label loses at every step what two neighbours differ by, so this is the product of what is left of all steps on
    the way; two slices that look alike far from each other are of no use to each other.

    Args:
        steps: (N - 1,) as in `Described`.

    Returns:
        float32 (N, N) in (0, 1].
    """
    lost = np.concatenate([[0], np.cumsum(-np.log(np.clip(steps, 1e-3, 1)))])
    return np.exp(-np.abs(lost[:, None] - lost[None])).astype(np.float32)


def normalised(vectors: npt.NDArray[np.floating]) -> Vectors:
    """(N, D) rows of mean 0 and length 1; a constant row becomes 0."""
    centred = vectors - vectors.mean(axis=1, keepdims=True)
    return (centred / np.maximum(np.linalg.norm(centred, axis=1, keepdims=True), 1e-6)).astype(np.float32)


def _intensities(seen: torch.Tensor) -> torch.Tensor:
    """(C, N, Y, X) -> (C, N, G, G)."""
    return F.adaptive_avg_pool2d(seen, _GRID)


def _edges(seen: torch.Tensor) -> torch.Tensor:
    """(C, N, Y, X) -> (C, N, G, G): in-plane gradient magnitude, averaged; no contrast inversion changes it."""
    fine = F.adaptive_avg_pool2d(seen, _FINE)
    down = F.pad(fine.diff(dim=2), (0, 0, 0, 1))
    right = F.pad(fine.diff(dim=3), (0, 1))
    return F.adaptive_avg_pool2d((down**2 + right**2).sqrt(), _GRID)


def _both(seen: torch.Tensor) -> torch.Tensor:
    """Intensities and edges, of equal weight."""
    maps = [_intensities(seen), _edges(seen)]
    return torch.cat([m / m.std().clamp(min=1e-6) for m in maps])


FEATURES: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "intensities": _intensities,
    "edges": _edges,
    "both": _both,
}
"""From scaled channels as seen, (C, N, Y, X), to maps on a coarse grid, (C', N, G, G).

Of whole images `edges` are the default: the cases that they suggested were the best on the other sets for four of five
sets, phantoms among them (benchmarks/suggest.py). How slices are ranked was measured with `both`
(benchmarks/suggest_slices.py).
"""
