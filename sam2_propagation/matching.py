"""Which support slices match a query slice: by position in the stack, along a line of alike slices, or one by one."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

Descriptors = npt.NDArray[np.float32]
"""(N, D), one row a slice."""

_STRETCHES = np.linspace(0.6, 1.6, 21)
_SHIFTS = np.linspace(-0.5, 0.5, 41)
_OVERLAP = 0.5
_NEAR = 0.1
"""Share of the stack within which `near` looks for the most alike slice."""


def rank_slices(
    query: Descriptors, supports: Sequence[Descriptors], usable: Sequence[npt.NDArray[np.intp]], how: str
) -> list[list[tuple[int, int]]]:
    """For each query slice, every usable support slice, the best match first.

    Args:
        query: descriptors of the query's slices.
        supports: those of each support's slices (all of them, annotated or not).
        usable: indices of each support's slices that may be used.
        how: "position", "line", "similarity", or "near": the most alike of those at about the same place.

    Returns:
        For each query slice a list of (support, slice).
    """
    keys = [(s, int(i)) for s, indices in enumerate(usable) for i in indices]
    scores = np.concatenate([_score(query, d, how)[:, u] for d, u in zip(supports, usable, strict=True)], axis=1)
    # A stable sort: ties go to the support given first.
    return [[keys[i] for i in order] for order in np.argsort(-scores, axis=1, kind="stable")]


def similarity(query: Descriptors, support: Descriptors) -> npt.NDArray[np.float32]:
    """(Q, M) cosine similarity of descriptors, both centred and scaled by the support's own mean and spread."""
    mean, spread = support.mean(axis=0), support.std(axis=0) + 1e-6
    a, b = (query - mean) / spread, (support - mean) / spread
    a /= np.linalg.norm(a, axis=1, keepdims=True) + 1e-6
    b /= np.linalg.norm(b, axis=1, keepdims=True) + 1e-6
    return np.asarray(a @ b.T, np.float32)


def matching_line(alike: npt.NDArray[np.float32]) -> npt.NDArray[np.float64]:
    """Positions (Q,) in the support's stack, on the rising straight line along which slices are most alike.

    At least half of the query must fall on the support. Dividing by the root of the overlap is a middle way: the plain
    sum holds lines inside the support, the plain mean lets them win by a few good slices.

    Args:
        alike: (Q, M), centred similarity.
    """
    queries, slices = alike.shape
    relative = (np.arange(queries) + 0.5) / queries - 0.5
    best, best_line = -np.inf, relative
    for stretch in _STRETCHES:
        lines = (relative * stretch)[None] + 0.5 + _SHIFTS[:, None]
        index = np.floor(lines * slices).astype(int)
        inside = (index >= 0) & (index < slices)
        values = alike[np.arange(queries)[None], index.clip(0, slices - 1)]
        overlap = inside.mean(axis=1)
        total = np.where(inside, values, 0).mean(axis=1)
        scores = np.where(overlap >= _OVERLAP, total / np.sqrt(overlap.clip(min=_OVERLAP)), -np.inf)
        if scores.max() > best:
            best, best_line = scores.max(), lines[scores.argmax()]
    return best_line * slices - 0.5


def _score(query: Descriptors, support: Descriptors, how: str) -> npt.NDArray[np.float64]:
    """(Q, M), higher is better; comparable between supports."""
    queries, slices = len(query), len(support)
    if how == "similarity":
        return similarity(query, support).astype(float)
    if how == "line":
        position = matching_line(similarity(query, support))
    else:
        position = (np.arange(queries) + 0.5) / queries * slices - 0.5
    away = np.abs(position[:, None] - np.arange(slices)[None]) / slices
    if how == "near":
        return np.where(away <= max(_NEAR, 0.5 / slices), similarity(query, support), -1 - away)
    return -away
