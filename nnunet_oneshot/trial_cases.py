"""Choose a few cases that stand for a whole set, by statistics of their images."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from sam2_propagation.interface import Image

LOOKED_AT = 100
"""Images that are read at most, evenly over the set."""
_PERCENTILES = (1, 10, 25, 50, 75, 90, 99)
_PASSES = 10

Features = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Chosen:
    """A case and the share of the set that it stands for."""

    case: str
    share: float


def statistics(image: Image) -> Features:
    """Extent, spacing and intensities of an image (C, Z, Y, X), as one vector; label-free."""
    values: list[Features] = [np.log(image.shape), np.log(image.spacing)]
    for channel in image.data:
        inside = channel[channel != 0]
        inside = inside if inside.size else np.zeros(1)
        low, middle, high = np.percentile(inside, (1, 50, 99))
        # Scanners scale intensities as they like: what counts is the distribution's form, and how it lies in space.
        form = np.percentile(inside, _PERCENTILES) - middle
        values += [form / max(high - low, 1e-6), np.atleast_1d((channel == 0).mean()), _profile(channel)]
    return np.concatenate([np.asarray(v, float).ravel() for v in values])


def choose(features: Mapping[str, Features], count: int) -> list[Chosen]:
    """The cases in the middle of `count` groups of like cases, those that stand for most first.

    Args:
        features: one vector a case, all of one length.
        count: how many; all cases where there are fewer.
    """
    names = sorted(features)
    distances = _distances(np.stack([features[name] for name in names]))
    medoids = _medoids(distances, min(count, len(names)))
    nearest = _nearest(distances, medoids)
    chosen = [Chosen(names[m], float((nearest == i).mean())) for i, m in enumerate(medoids)]
    return sorted(chosen, key=lambda c: (-c.share, c.case))


def evenly(names: Sequence[str], most: int = LOOKED_AT) -> list[str]:
    """At most `most` of the names, evenly over their order."""
    picked = np.unique(np.linspace(0, len(names) - 1, min(most, len(names))).round().astype(int))
    return [names[i] for i in picked]


def _profile(channel: npt.NDArray[np.float32], bins: int = 4) -> Features:
    """Mean intensity in coarse blocks of the in-plane field of view, relative to the whole."""
    rows = np.array_split(channel.mean(axis=0), min(bins, channel.shape[1]), axis=0)
    blocks = [[block.mean() for block in np.array_split(row, min(bins, row.shape[1]), axis=1)] for row in rows]
    padded = np.zeros((bins, bins))
    padded[: len(blocks), : len(blocks[0])] = blocks
    return (padded - padded.mean()).ravel() / max(float(padded.std()), 1e-6)


def _distances(vectors: Features) -> Features:
    """Distances between all cases, every feature scaled to unit spread; features that do not vary count nothing."""
    spread = vectors.std(axis=0)
    scaled = (vectors - vectors.mean(axis=0)) / np.where(spread > 1e-9, spread, np.inf)
    return np.sqrt(((scaled[:, None] - scaled[None]) ** 2).sum(axis=2))


def _medoids(distances: Features, count: int) -> list[int]:
    """K-medoids from a farthest-first start at the most central case; deterministic."""
    medoids = [int(distances.sum(axis=1).argmin())]
    while len(medoids) < count:
        far = distances[:, medoids].min(axis=1)
        # Where all that are left are like a chosen one, the farthest could be that one itself.
        far[medoids] = -1
        medoids.append(int(far.argmax()))
    for _ in range(_PASSES):
        nearest = _nearest(distances, medoids)
        moved = [_centre(distances, np.flatnonzero(nearest == i)) for i in range(count)]
        if moved == medoids:
            break
        medoids = moved
    return medoids


def _nearest(distances: Features, medoids: Sequence[int]) -> npt.NDArray[np.intp]:
    """Each case's medoid, as position in `medoids`; a medoid is its own, also where another one is just like it."""
    nearest = distances[:, medoids].argmin(axis=1)
    nearest[medoids] = np.arange(len(medoids))
    return nearest


def _centre(distances: Features, members: npt.NDArray[np.intp]) -> int:
    return int(members[distances[np.ix_(members, members)].sum(axis=1).argmin()])
