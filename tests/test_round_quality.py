"""Whether a round went astray, told from how far labels moved."""

from __future__ import annotations

import pytest

from nnunet_oneshot.round_quality import compare_round, is_astray
from nnunet_oneshot.store import CaseRecord


def record(status: str, quality: float | None) -> CaseRecord:
    return CaseRecord(status=status, quality=None if quality is None else {"mean": quality})


def test_only_estimated_labels_of_programs_count() -> None:
    before = {
        "a": record("pseudo", 0.9),
        "b": record("gated", 0.2),
        "drawn": record("annotated", None),
        "corrected": record("corrected", 0.1),
        "unknown": record("pseudo", None),
        "added": record("pseudo", 0.1),
    }
    agreement = {"a": 0.8, "b": 0.4, "drawn": 0.0, "corrected": 0.0, "unknown": 0.0}
    assert compare_round(agreement, before) == {"moved": pytest.approx(0.4), "error": pytest.approx(0.45)}


def test_nothing_is_said_where_nothing_is_estimated() -> None:
    found = compare_round({"a": 0.1}, {"a": record("pseudo", None)})
    assert found == {}
    assert not is_astray(found, 0.95)


@pytest.mark.parametrize(
    ("moved", "error", "astray"),
    [(0.25, 0.1, True), (0.25, 0.4, False), (0.05, 0.01, False), (0.06, 0.01, True), (0.0, 0.0, False)],
    ids=["more than wrong", "less than wrong", "settled", "good labels that move", "nothing moved"],
)
def test_labels_that_move_by_more_than_they_were_wrong_are_astray(moved: float, error: float, astray: bool) -> None:
    assert is_astray({"moved": moved, "error": error}, 0.95) is astray
