"""The table of `evidence.py`: rows that are there, paired differences, and what was not run."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from common import REPOSITORY, RESULTS, markdown
from evidence_methods import METHODS

from nnunet_oneshot.evaluate import FOREGROUND

Row = Mapping[str, Any]
REFERENCE = "full"
BEGIN, END = "<!-- evidence: begin -->", "<!-- evidence: end -->"
PAGE = REPOSITORY / "docs" / "results.md"


def read_rows() -> list[Row]:
    """Every finished row, in the order of METHODS."""
    rows = [json.loads(path.read_text(encoding="utf-8")) for path in sorted(RESULTS.glob("evidence_*.json"))]
    return sorted(rows, key=lambda row: (row["set"], row["annotated"], list(METHODS).index(row["method"])))


def paired(row: Row, other: Row, seed: int = 0) -> tuple[float, float, float]:
    """Mean difference of Dice over the cases of both, and its bootstrap 95 % interval."""
    cases = sorted(set(row["dice_per_case"]) & set(other["dice_per_case"]))
    difference = np.array([row["dice_per_case"][c] - other["dice_per_case"][c] for c in cases])
    drawn = np.random.default_rng(seed).integers(0, len(cases), (2000, len(cases)))
    low, high = np.percentile(difference[drawn].mean(1), (2.5, 97.5))
    return float(difference.mean()), float(low), float(high)


def table(rows: Sequence[Row]) -> str:
    """One set's rows."""
    reference = {(row["annotated"], row["pool"], row["preset"]): row for row in rows if row["method"] == REFERENCE}
    head = ["method", "annotated", "Dice", "95 %", "against full", "HD95 mm", "ASSD mm", "labels' Dice by round"]
    head += ["divergence", "min labelling / all"]
    return markdown(head, [_cells(row, reference.get((row["annotated"], row["pool"], row["preset"]))) for row in rows])


def _cells(row: Row, full: Row | None) -> list[Any]:
    scores = row["scores"][FOREGROUND]
    dice, low, high = scores["Dice"]
    against = "-"
    if full is not None and full is not row:
        mean, first, last = paired(row, full)
        against = f"{mean:+.3f} ({first:+.3f} to {last:+.3f})"
    labels = " / ".join(f"{value:.3f}" for value in row.get("label_dice", {}).values()) or "-"
    share = f"{row['divergence']:.1%}" if "divergence" in row else "-"
    minutes = " / ".join(f"{row['minutes'][key]:.0f}" for key in ("labelling", "all"))
    spread = f"{low:.3f} to {high:.3f}"
    figures = [f"{dice:.3f}", spread, against, f"{scores['HD95'][0]:.2f}", f"{scores['ASSD'][0]:.2f}"]
    return [row["what"], row["annotated"], *figures, labels, share, minutes]


def page(sets: Sequence[str]) -> str:
    """The generated part of docs/results.md."""
    rows, parts = read_rows(), []
    for name in sets:
        mine = [row for row in rows if row["set"] == name]
        if mine:
            about = sorted({f"{r['pool']} pool cases, {r['test_cases']} test cases, {r['preset']}" for r in mine})
            where = sorted({f"{r['configuration']}; {r['hardware']}" for r in mine})
            parts += [f"### {name}", "", f"{'; '.join(about)}; {'; '.join(where)}", "", table(mine), ""]
        missing = [METHODS[m].what for m in METHODS if m not in {row["method"] for row in mine}]
        if missing:
            parts += [f"Not run on {name}: {'; '.join(missing)}.", ""]
    return "\n".join(parts)


def write_results(sets: Sequence[str]) -> None:
    """Put the tables between the marks of docs/results.md."""
    text = PAGE.read_text(encoding="utf-8")
    before, rest = text.split(BEGIN, 1)
    after = rest.split(END, 1)[1]
    PAGE.write_text(f"{before}{BEGIN}\n{page(sets)}{END}{after}", encoding="utf-8")
