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
REFERENCE, OURS = "full", "ours"
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


def headline(rows: Sequence[Row]) -> list[str]:
    """Ours against full supervision and against the best row of others, set by set, and the mean over sets."""
    lines, gaps = [], []
    for name in dict.fromkeys(row["set"] for row in rows):
        mine = [row for row in rows if row["set"] == name]
        ours, full = ([row for row in mine if row["method"] == method] for method in (OURS, REFERENCE))
        others = [row for row in mine if row["method"] != REFERENCE and not row["method"].startswith(OURS)]
        if not ours or not full:
            continue
        gap, low, high = paired(ours[0], full[0])
        gaps.append(100 * gap)
        best = max(others, key=lambda row: row["scores"][FOREGROUND]["Dice"][0])
        mean, first, last = paired(ours[0], best)
        to_full = f"{100 * gap:+.1f} points against full supervision ({100 * low:+.1f} to {100 * high:+.1f})"
        to_best = f"{100 * mean:+.1f} ({100 * first:+.1f} to {100 * last:+.1f}) against {best['what']}"
        lines.append(f"- {name}: {to_full}; {to_best}, the best of the others")
    if not lines:
        return ["Ours with its defaults was run on no set yet.", ""]
    mean = (
        f"Ours with its defaults, mean over {len(gaps)} set(s): {np.mean(gaps):+.1f} points against full supervision."
    )
    return [mean, "", *lines, ""]


def page(sets: Sequence[str]) -> str:
    """The generated part of docs/results.md."""
    rows = read_rows()
    parts = headline(rows)
    for name in sets:
        mine = [row for row in rows if row["set"] == name]
        if mine:
            about = sorted({f"{r['pool']} pool cases, {r['test_cases']} test cases, {r['preset']}" for r in mine})
            where = sorted({f"{r['configuration']}; {r['hardware']}" for r in mine})
            parts += [f"### {name}", "", f"{'; '.join(about)}; {'; '.join(where)}", "", table(mine), ""]
        missing = [METHODS[m].what for m in METHODS if m not in {row["method"] for row in mine}]
        if missing:
            parts += [f"Not run on {name}: {'; '.join(missing) if mine else 'any of these'}.", ""]
    return "\n".join(parts)


def write_results(sets: Sequence[str]) -> None:
    """Put the tables between the marks of docs/results.md."""
    text = PAGE.read_text(encoding="utf-8")
    before, rest = text.split(BEGIN, 1)
    after = rest.split(END, 1)[1]
    PAGE.write_text(f"{before}{BEGIN}\n{page(sets)}{END}{after}", encoding="utf-8")
