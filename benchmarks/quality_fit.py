"""Fitting the rules of estimated quality to rows of evidence and true Dice."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import combinations
from typing import Any

import numpy as np
from quality_rows import Row
from scipy.optimize import least_squares
from scipy.stats import spearmanr

from nnunet_oneshot.quality import KINDS, TOLD_BY, logit

LEAST_ROWS = 20


def kind_sets(rows: Sequence[Row]) -> list[tuple[str, ...]]:
    """Sets of kinds of evidence that occur together in enough rows."""
    sets = [kinds for n in range(1, len(KINDS) + 1) for kinds in combinations(KINDS, n)]
    return [kinds for kinds in sets if len(fitting(rows, kinds)) >= LEAST_ROWS]


def fitting(rows: Sequence[Row], kinds: Sequence[str]) -> list[Row]:
    """Rows that a rule for these kinds is for."""
    chosen = [row for row in rows if set(kinds) <= set(row["evidence"])]
    return [row for row in chosen if all((kind in kinds) == (kind in row["evidence"]) for kind in TOLD_BY)]


def fit(rows: Sequence[Row], kinds: Sequence[str]) -> tuple[float, ...]:
    """Bias and weights, none of them negative, by least squares of the Dice."""
    chosen = fitting(rows, kinds)
    inputs = np.array([[logit(row["evidence"][kind]) for kind in kinds] for row in chosen])
    dice = np.array([row["dice"] for row in chosen])

    def residuals(parameters: np.ndarray) -> np.ndarray:
        return 1 / (1 + np.exp(-(parameters[0] + inputs @ parameters[1:]))) - dice

    start = np.array([0.0, *[1 / len(kinds)] * len(kinds)])
    bounds = ([-10, *[0] * len(kinds)], [10, *[5] * len(kinds)])
    solved = least_squares(residuals, start, bounds=bounds, loss="soft_l1", f_scale=0.1)
    return tuple(round(float(p), 3) for p in solved.x)


def errors(rows: Sequence[Row], kinds: Sequence[str]) -> list[Any]:
    """Rows, mean absolute error of the rule on them, the same by rules learnt without the row's set, and rho."""
    chosen = fitting(rows, kinds)
    rule, without = fit(rows, kinds), {}
    for name in {row["set"] for row in chosen}:
        without[name] = fit([row for row in rows if row["set"] != name], kinds)
    inside = np.array([predicted(rule, kinds, row) for row in chosen])
    left_out = np.array([predicted(without[row["set"]], kinds, row) for row in chosen])
    true = np.array([row["dice"] for row in chosen])
    mae = [f"{np.abs(guess - true).mean():.3f}" for guess in (inside, left_out)]
    return [len(chosen), *mae, f"{spearmanr(left_out, true).statistic:.2f}"]


def predicted(parameters: Sequence[float], kinds: Sequence[str], row: Row) -> float:
    """What a rule says of a row."""
    total = parameters[0] + sum(w * logit(row["evidence"][k]) for w, k in zip(parameters[1:], kinds, strict=True))
    return float(1 / (1 + np.exp(-total)))
