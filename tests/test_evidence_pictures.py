"""Which test cases a row of the evidence shows."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from nnunet_oneshot.metrics import METRICS as ALL_METRICS

METRICS = list(ALL_METRICS)


@pytest.fixture(scope="module")
def pictures(benchmark_module: Callable[[str], Any]) -> Any:
    return benchmark_module("evidence_pictures")


def scored(dice: list[float]) -> Any:
    """Scores of cases 0, 1, ... where Dice alone counts."""
    table = np.zeros((len(dice), len(METRICS)))
    table[:, METRICS.index("Dice")] = dice
    return SimpleNamespace(cases=[str(i) for i in range(len(dice))], case_mean=lambda: table)


def test_the_worst_the_median_and_the_best_are_shown_worst_first(pictures: Any) -> None:
    shown = pictures.shown_cases(scored([0.9, 0.2, 0.8, 0.1, 0.7, 0.3, 0.6]))
    assert list(shown.items()) == [("3", 0.1), ("1", 0.2), ("5", 0.3), ("6", 0.6), ("0", 0.9)]


def test_few_cases_are_shown_once_each(pictures: Any) -> None:
    assert list(pictures.shown_cases(scored([0.5, 0.4]))) == ["1", "0"]
