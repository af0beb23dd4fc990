"""A small registration, and how well a label of one image would reach another, foretold by it without any label.

Two images are registered on a small grid, and how alike they are afterwards is measured in small windows (the local
correlation coefficient, squared), in both directions. A large set is stood for by a few of its cases, each with the
weight of those that it looks most like. `suggest` does without: see benchmarks/suggest.py.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import SimpleITK as sitk
import torch
import torch.nn.functional as F
from scipy import ndimage

from nnunet_oneshot.suggest_ranking import Scores, rank
from sam2_propagation.intensities import Intensities, scale
from sam2_propagation.interface import Image
from sam2_propagation.views import present

GRID = (16, 48, 48)
"""Slices, rows and columns of the volumes that are registered."""
MOST = 24
"""Cases that stand for the set; more would take more than minutes."""
_LEVELS = ((2, 40), (1, 20))
"""Shrink factor and iterations of demons."""
_SMOOTHING = 1.5
"""Standard deviation of the displacement field's, in voxels of the level."""
_WINDOW = (3, 7, 7)
_FLAT = 0.1
"""Share of the mean local variance below which there is nothing to compare."""


def small_grid(image: Image) -> sitk.Image:
    """The mean of an image's scaled channels, upright on the small grid."""
    data = np.concatenate([scale(image, Intensities(channels=channel)) for channel in range(len(image.data))])
    return sitk.GetImageFromArray(zoomed(present(image, "identity").forward(data).mean(axis=0)))


def zoomed(volume: npt.NDArray[np.floating]) -> npt.NDArray[np.float32]:
    """(N, Y, X) on the small grid."""
    grid = torch.from_numpy(np.ascontiguousarray(volume, np.float32))[None, None]
    return F.interpolate(grid, size=GRID, mode="trilinear")[0, 0].numpy()


def registered(fixed: sitk.Image, moving: sitk.Image) -> tuple[sitk.Transform, sitk.Image]:
    """From points of `fixed` to points of `moving`, by demons; and `moving` with the histogram of `fixed`."""
    matched = sitk.HistogramMatching(moving, fixed, 128, 7)
    field = sitk.Image(fixed.GetSize(), sitk.sitkVectorFloat64, fixed.GetDimension())
    for factor, iterations in _LEVELS:
        shrink = [factor] * fixed.GetDimension()
        demons = sitk.FastSymmetricForcesDemonsRegistrationFilter()
        demons.SetNumberOfIterations(iterations)
        demons.SetSmoothDisplacementField(True)
        demons.SetStandardDeviations(_SMOOTHING * factor)
        grid = sitk.Shrink(fixed, shrink)
        step = demons.Execute(grid, sitk.Shrink(matched, shrink), sitk.Resample(field, grid))
        field = sitk.Resample(step, fixed)
    return sitk.DisplacementFieldTransform(field), matched


def likeness(fixed: sitk.Image, moving: sitk.Image) -> float:
    """Mean local correlation coefficient, squared, of two registered images where `fixed` shows something; in [0, 1].

    0 where it shows nothing, or nothing that registration can hold on to.
    """
    if not all(sitk.GetArrayViewFromImage(image).std() > 0 for image in (fixed, moving)):
        return 0.0
    transform, matched = registered(fixed, moving)
    there = sitk.GetArrayFromImage(fixed).astype(np.float64)
    here = sitk.GetArrayFromImage(sitk.Resample(matched, fixed, transform)).astype(np.float64)
    window = _WINDOW
    means = [ndimage.uniform_filter(array, window) for array in (there, here)]
    squares = [ndimage.uniform_filter(a * a, window) - m * m for a, m in zip((there, here), means, strict=True)]
    product = ndimage.uniform_filter(there * here, window) - means[0] * means[1]
    shows = squares[0] > _FLAT * squares[0].mean()
    found = product[shows] ** 2 / np.maximum(squares[0][shows] * squares[1][shows], 1e-6)
    return float(np.clip(found, 0, 1).mean()) if shows.any() else 0.0


def both_ways(images: Sequence[sitk.Image], pair: tuple[int, int]) -> float:
    """Mean likeness of two of the images, each registered to the other."""
    first, second = (images[at] for at in pair)
    return (likeness(first, second) + likeness(second, first)) / 2


@dataclass(frozen=True, eq=False)
class Few:
    """Cases that stand for the set.

    Attributes:
        cases: their indices, ascending.
        weight: (M,) of all cases that each stands for: those that look most like it, itself among them.
        own: (M,) its own share of that weight.
    """

    cases: list[int]
    weight: Scores
    own: Scores


def standing(alike: Scores) -> Few:
    """The few cases that stand for the set; `alike` (N, N) is how alike two cases look."""
    few = sorted(at for at, _ in rank(alike, range(len(alike)), MOST))
    nearest = alike[:, few].argmax(axis=1)
    nearest[few] = np.arange(len(few))
    weight = np.bincount(nearest, minlength=len(few)).astype(float)
    return Few(few, weight, 1 / weight)


def reached(likeness: Scores, few: Few) -> Scores:
    """(M, M) how well a label of one case (column) would reach what another (row) stands for.

    An annotated case itself needs no label; what it stands for is reached as well as the case most like it would be.
    """
    found = likeness.copy()
    np.fill_diagonal(found, few.own + (1 - few.own) * likeness.max(axis=1, initial=0))
    return found
