"""Where to start: the neighbourhood of the support's label is looked for everywhere in the query.

A template (a box around the label) is turned and scaled a little, and its overlap-normalised correlation with the
query is computed for all translations at once (masked normalised correlation by FFT: Padfield, IEEE TIP 2012).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product

import numpy as np
import numpy.typing as npt
import SimpleITK as sitk
from scipy import fft, ndimage

from sam2_propagation.registration_similarity import edges, finest, locally_normalised
from sam2_propagation.registration_volume import Array, Index, coarser, like, working_spacing

SCALES = (0.85, 1.0, 1.18)
ANGLES = (0.0, -20.0, 20.0, -40.0, 40.0, -60.0, 60.0, -80.0, 80.0)
"""Degrees, in the plane of the two finest axes: how a heart lies in its slices varies by a right angle."""
_SCALED_UP_TO = 20.0
"""Degrees; larger turns are tried at scale 1 only."""
_VOXELS = 12_000
_OVERLAP = 0.8
_WINDOW = 6.0
_PEAKS = 5
_DISTANCE_WEIGHT = 1.0
_SCALE_WEIGHT = 0.3


@dataclass(frozen=True, eq=False)
class Start:
    """A first guess: the affine from points of the support to points of the query, and how well it matches."""

    transform: sitk.AffineTransform
    score: float


def starts(support: sitk.Image, middle: Array, half: Array, query: sitk.Image, keep: int) -> list[Start]:
    """The best `keep` starts, best first; the centres of both images put together is always one more, the last.

    Args:
        support, query: float32, centred.
        middle, half: (x, y, z) mm, centre and half size of the box around the support's label.
    """
    spacing = working_spacing(query, _VOXELS)
    small, field = coarser(support, spacing), coarser(query, spacing)
    templates = [
        _template(small, middle, half, _turn(np.asarray(support.GetSpacing()), scale, angle), np.asarray(spacing))
        for scale, angle in product(SCALES, ANGLES)
        if scale == 1 or abs(angle) <= _SCALED_UP_TO
    ]
    found: list[Start] = []
    search = _Search(field, np.max([t.mask.shape for t in templates], axis=0))
    for template in templates:
        found += [
            _penalised(score, template, corner, support, field, middle) for score, corner in search.peaks(template)
        ]
    found.sort(key=lambda start: -start.score)
    return [*found[:keep], Start(sitk.AffineTransform(query.GetDimension()), 0.0)]


@dataclass(frozen=True, eq=False)
class _Template:
    """Feature arrays of the turned box, where they come from the support, and the matrix support -> query."""

    features: tuple[Array, ...]
    mask: Array
    matrix: Array


def _turn(spacing: Array, scale: float, angle: float) -> Array:
    """Turned within slices: in the plane of the two axes of finest spacing, x and y where all are alike."""
    first, second = sorted(np.argsort(np.round(spacing, 3), kind="stable")[:2])
    cosine, sine = np.cos(np.deg2rad(angle)), np.sin(np.deg2rad(angle))
    matrix = np.eye(len(spacing))
    matrix[first, [first, second]] = cosine, -sine
    matrix[second, [first, second]] = sine, cosine
    return matrix * scale


def _features(image: sitk.Image) -> tuple[Array, Array]:
    """Intensities and edges, compressed and locally normalised: a full stomach or a surface coil must not decide."""
    array, unit = sitk.GetArrayFromImage(image), finest(image)
    mean = max(float(array.mean()), 1e-6)
    compressed = array * (1 + mean) / (array + mean)
    smooth, sharp = ndimage.gaussian_filter(compressed, 0.7 * unit), edges(compressed, unit)
    return locally_normalised(smooth, unit, _WINDOW), locally_normalised(sharp, unit, _WINDOW)


def _template(support: sitk.Image, middle: Array, half: Array, matrix: Array, spacing: Array) -> _Template:
    scale = np.abs(np.linalg.det(matrix)) ** (1 / len(matrix))
    size = (2 * np.ceil(half * scale / spacing) + 1).astype(int)
    grid = sitk.Image([int(n) for n in size], sitk.sitkUInt8)
    grid.SetSpacing(spacing.tolist())
    grid.SetOrigin((-(size - 1) / 2 * spacing).tolist())
    back = sitk.AffineTransform(len(matrix))
    back.SetMatrix(np.linalg.inv(matrix).astype(float).ravel().tolist())
    back.SetTranslation(np.asarray(middle, float).tolist())

    def turned(array: Array) -> Array:
        return sitk.GetArrayFromImage(sitk.Resample(like(array, support), grid, back, sitk.sitkLinear, 0.0))

    features = _features(support)
    mask = (turned(np.ones_like(features[0])) > 0.99).astype(np.float32)
    return _Template(tuple(turned(feature) for feature in features), mask, matrix)


class _Search:
    """Correlation of templates with one query at all translations; the query's transforms are computed once."""

    def __init__(self, query: sitk.Image, largest: Index) -> None:
        features = _features(query)
        self.padded = [fft.next_fast_len(int(a + b - 1), True) for a, b in zip(features[0].shape, largest, strict=True)]
        self.shape = features[0].shape
        self.one = self._forward(np.ones_like(features[0]))
        zero_mean = [feature - feature.mean() for feature in features]
        self.queries = [(self._forward(f), self._forward(f * f)) for f in zero_mean]

    def _forward(self, array: Array) -> npt.NDArray[np.complexfloating]:
        return fft.rfftn(array, self.padded)

    def peaks(self, template: _Template) -> list[tuple[float, Index]]:
        """(correlation, query voxel of the template's first voxel) of the highest local maxima."""
        scores = self._scores(template)
        at = np.argwhere((scores == ndimage.maximum_filter(scores, 3)) & (scores > -1))
        values = scores[tuple(at.T)]
        best = np.argsort(-values, kind="stable")[:_PEAKS]
        corner = np.asarray(template.mask.shape) - 1
        return [(float(values[k]), at[k] - corner) for k in best]

    def _scores(self, template: _Template) -> Array:
        """Mean correlation of all features at each shift; -2 where too little of the template is inside the query."""
        out = tuple(slice(0, a + b - 1) for a, b in zip(self.shape, template.mask.shape, strict=True))

        def back(spectrum: npt.NDArray[np.complexfloating]) -> Array:
            return fft.irfftn(spectrum, self.padded)[out]

        inside = template.mask > 0
        mask = self._forward(np.flip(template.mask))
        count = np.maximum(back(mask * self.one), 1e-3)
        total = np.zeros_like(count)
        for feature, (query, query_squared) in zip(template.features, self.queries, strict=True):
            own = np.flip(np.where(inside, feature - feature[inside].mean() if inside.any() else 0, 0))
            first, squared = self._forward(own), self._forward(own * own)
            sum_query, sum_own = back(mask * query), back(first * self.one)
            covariance = back(first * query) - sum_query * sum_own / count
            spread_query = back(mask * query_squared) - sum_query**2 / count
            spread_own = back(squared * self.one) - sum_own**2 / count
            total += covariance / np.sqrt(_positive(spread_query) * _positive(spread_own))
        return np.where(count < _OVERLAP * max(inside.sum(), 1), -2, total / len(self.queries))


def _positive(spread: Array) -> Array:
    """Rounding of the FFT leaves small negative variances in flat regions: a floor keeps them from being divided by."""
    return np.maximum(spread, max(1e-6 * float(spread.max()), 1e-9))


def _penalised(
    score: float,
    template: _Template,
    corner: Sequence[int] | Index,
    support: sitk.Image,
    query: sitk.Image,
    middle: Array,
) -> Start:
    """A start whose score is lowered by how far it moves and scales: fields of view are centred on the organ."""
    dimension = query.GetDimension()
    spacing = np.asarray(query.GetSpacing())
    half = (np.asarray(template.mask.shape[::-1]) - 1) / 2
    centre = np.asarray(query.GetOrigin()) + (np.asarray(corner)[::-1] + half) * spacing
    transform = sitk.AffineTransform(dimension)
    transform.SetCenter(np.asarray(middle, float).tolist())
    transform.SetMatrix(template.matrix.astype(float).ravel().tolist())
    transform.SetTranslation((centre - middle).tolist())
    stretch = np.log(abs(np.linalg.det(template.matrix))) / dimension
    moved = displacement(support, query, middle, transform)
    return Start(transform, score - _DISTANCE_WEIGHT * moved - _SCALE_WEIGHT * float(stretch**2))


def displacement(support: sitk.Image, query: sitk.Image, middle: Array, transform: sitk.Transform) -> float:
    """Squared move of the label's centre, each position taken relative to its own image's extent."""
    there = np.asarray(transform.TransformPoint(np.asarray(middle, float).tolist()))
    relative = [np.asarray(i.GetSize()) * i.GetSpacing() for i in (support, query)]
    return float(((there / relative[1] - middle / relative[0]) ** 2).sum())
