"""Which test cases a row of the evidence shows."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
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


def test_a_page_shows_all_pictures_with_what_is_said_of_them(pictures: Any, tmp_path: Path) -> None:
    for name in ("ours", "full"):
        (tmp_path / f"{name}.png").touch()
    page = pictures.write_index(tmp_path, {"ours": "ours: Dice < 0.9", "annotated": "not drawn"}).read_text("utf-8")
    assert "<h2>full</h2>\n<img src='full.png'" in page
    assert "<h2>ours: Dice &lt; 0.9</h2>\n<img src='ours.png'" in page
    assert "not drawn" not in page


def test_few_cases_are_shown_once_each(pictures: Any) -> None:
    assert list(pictures.shown_cases(scored([0.5, 0.4]))) == ["1", "0"]
