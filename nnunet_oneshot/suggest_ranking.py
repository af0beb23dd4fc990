"""Which few stand best for all: greedy facility location.

A set S of chosen items covers item i as well as its most alike member does; the value of S is the weighted mean of
that over all items. Adding the best next item, again and again, comes within 1 - 1/e of the best set of each size
(Nemhauser, Wolsey and Fisher, Mathematical Programming 1978), and every prefix of the ranking is such a set.
"""

from __future__ import annotations

from collections.abc import Collection

import numpy as np
import numpy.typing as npt

Scores = npt.NDArray[np.floating]


def rank(
    alike: Scores, candidates: Collection[int], count: int, chosen: Collection[int] = (), weights: Scores | None = None
) -> list[tuple[int, float]]:
    """The candidates worth choosing next, the best first, each with the coverage that is reached with it.

    Args:
        alike: (N, N), how well item j (column) stands for item i (row), at most 1.
        candidates: columns that may be chosen.
        count: how many to choose, at most.
        chosen: columns that are chosen already; what they cover needs no more.
        weights: (N,) how much each item matters; all alike when None.

    Returns:
        (column, coverage in [-1, 1]); ties go to the lower column.
    """
    weight = np.ones(len(alike)) if weights is None else np.asarray(weights, float)
    weight = weight / max(weight.sum(), 1e-12)
    # Below any similarity, so that the first choice is the item most alike to all others.
    covered = alike[:, sorted(chosen)].max(axis=1) if chosen else np.full(len(alike), -1.0)
    left = sorted(set(candidates) - set(chosen))
    ranking: list[tuple[int, float]] = []
    while left and len(ranking) < count:
        gains = weight @ np.maximum(alike[:, left] - covered[:, None], 0)
        best = left.pop(int(gains.argmax()))
        covered = np.maximum(covered, alike[:, best])
        ranking.append((best, float(weight @ covered)))
    return ranking


def best_slice(alike: Scores, content: Scores, uncertainty: Scores | None = None, chosen: Collection[int] = ()) -> int:
    """The slice that stands best for its volume, beside those that are annotated already.

    Args:
        alike: (N, N) of the volume's slices.
        content: (N,) how much there is to see on each; a slice without content stands for nothing.
        uncertainty: (N,) how doubtful each slice's label is; none where there is no label yet.
        chosen: slices that are annotated.
    """
    weight = content if uncertainty is None or not uncertainty.any() else content * uncertainty
    columns = sorted(chosen)
    covered = alike[:, columns].max(axis=1).clip(min=0) if columns else np.zeros(len(alike))
    gains = weight @ np.maximum(alike - covered[:, None], 0) * content
    gains[columns] = -1
    return int(gains.argmax())
