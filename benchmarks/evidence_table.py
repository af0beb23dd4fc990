"""The tables and the figure of `evidence.py`: rows that are there, paired differences, and what was not run."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from textwrap import fill
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
from common import REPOSITORY, RESULTS, markdown, patient
from evidence_methods import CHOICES, METHODS
from matplotlib.lines import Line2D

from nnunet_oneshot.evaluate import FOREGROUND

Row = Mapping[str, Any]
Interval = tuple[float, float, float]
"""A mean and its bootstrap 95 % interval over patients."""
REFERENCE, OURS = "full", "ours"
ONCE, AS_OFTEN = "ours_no_refinement", "full_again"
"""Ours trained once, as full supervision is, and full supervision trained once more, as ours is by its one round."""
OWN_PRESET = "small"
IN_PIXELS = ("hc18_us",)
"""Sets whose images tell no spacing."""
ELSEWHERE = "YoloSeg tells -3.08 and MedSMILE 90 to 95 %, of their own sets."
"""How far published systems say they are from full supervision."""
PAGE, README = REPOSITORY / "docs" / "results.md", REPOSITORY / "README.md"
PICTURE = REPOSITORY / "docs" / "pictures" / "evidence.png"


def read_rows() -> list[Row]:
    """Every finished row, in the order of METHODS."""
    rows = [json.loads(path.read_text(encoding="utf-8")) for path in sorted(RESULTS.glob("evidence_*.json"))]
    order = list(METHODS)
    return sorted(rows, key=lambda row: (row["set"], *budget(row), order.index(row["method"]), training(row)))


def budget(row: Row) -> tuple[str, int, str, str]:
    """What rows must share to be compared: annotated case, size of the pool, preset, and what is not the set's own."""
    return row["annotated"], row["pool"], row["preset"], variant(row)


def variant(row: Row) -> str:
    """What sets a row apart from one annotated case and the set's own way of training; empty where nothing does."""
    preset = "" if row["preset"] == OWN_PRESET else f"preset {row['preset']}"
    own = row.get("variant", "").replace("no_mirroring", "no mirrored images")
    many = len(row["annotated"].split("+"))
    several = f"{many} annotated cases" if many > 1 else ""
    return ", ".join(part for part in (own, preset, several) if part)


def training(row: Row) -> int:
    """Which repetition a row is of."""
    return int(row.get("training", 1))


def paired(row: Row, other: Row, seed: int = 0) -> Interval:
    """Mean difference of Dice over the cases of both, and its interval."""
    mine, theirs = row["dice_per_case"], other["dice_per_case"]
    return interval({case: mine[case] - theirs[case] for case in sorted(set(mine) & set(theirs))}, seed)


def interval(values: Mapping[str, float], seed: int = 0) -> Interval:
    """Mean over cases and its bootstrap 95 % interval; all images of a patient are drawn together."""
    by_patient: dict[str, list[float]] = {}
    for case, value in values.items():
        by_patient.setdefault(patient(case), []).append(value)
    sums, counts = (np.array([how(found) for found in by_patient.values()]) for how in (sum, len))
    drawn = np.random.default_rng(seed).integers(0, len(sums), (2000, len(sums)))
    low, high = np.percentile(sums[drawn].sum(1) / counts[drawn].sum(1), (2.5, 97.5))
    return float(sums.sum() / counts.sum()), float(low), float(high)


def by_budget(rows: Iterable[Row]) -> dict[tuple[str, int, str, str], dict[str, Row]]:
    """By budget and method, the first repetition of each row."""
    found: dict[tuple[str, int, str, str], dict[str, Row]] = {}
    for row in rows:
        found.setdefault(budget(row), {}).setdefault(row["method"], row)
    return found


# --- the headline ---------------------------------------------------------------------------------------------------


def headline(rows: Sequence[Row]) -> list[str]:
    """Ours against full supervision and against the best of what a user would pick instead, by set, and over sets."""
    sets = [_with_ours(row for row in rows if row["set"] == name) for name in dict.fromkeys(row["set"] for row in rows)]
    sets = [groups for groups in sets if groups]
    if not sets:
        return ["Ours with its defaults was run on no set yet.", ""]
    share = np.mean([np.mean([_dice(g[OURS])[0] / _dice(g[REFERENCE])[0] for g in groups]) for groups in sets])
    return [
        f"**Ours with its defaults, one annotated case, {len(sets)} data set(s): {_gap(sets, OURS, REFERENCE)} points "
        f"of test Dice against full supervision on the pool** ({100 * share:.1f} % of it). Ours is trained twice, full "
        f"supervision once. With one training each (ours without its round) it is {_gap(sets, ONCE, REFERENCE)}, with "
        f"two each {_gap(sets, OURS, AS_OFTEN)}. {ELSEWHERE}{_defaults_of_then(sets)}",
        "",
        *(line for groups in sets for line in _compared(groups)),
        "",
    ]


def _defaults_of_then(sets: Sequence[Sequence[Mapping[str, Row]]]) -> str:
    """Which rows of ours were made when refinement left out what it estimated to be bad, if any."""
    old = [groups[0][OURS]["set"] for groups in sets if any("min_quality" not in group[OURS] for group in groups)]
    of = "All" if len(old) == len(sets) else f"Those on {', '.join(old)}"
    return f" {of} were made while cases of an estimated Dice below 0.3 were left out by default." if old else ""


def _with_ours(rows: Iterable[Row]) -> list[Mapping[str, Row]]:
    """The budgets that have ours and full supervision."""
    return [group for group in by_budget(rows).values() if {OURS, REFERENCE} <= {*group}]


def _compared(groups: Sequence[Mapping[str, Row]]) -> list[str]:
    """Of one set, a line for every budget."""
    return [f"- {group[OURS]['set']}, {_pool(group, groups)}: {_against_others(group)}" for group in groups]


def _gap(sets: Sequence[Sequence[Mapping[str, Row]]], mine: str, reference: str) -> str:
    """Points of Dice between two methods, each set as the mean of its groups; says where it is not over all of them."""
    both = [[group for group in groups if {mine, reference} <= {*group}] for groups in sets]
    found = [np.mean([100 * paired(g[mine], g[reference])[0] for g in groups]) for groups in both if groups]
    many, of = (sum(len(groups) for groups in chosen) for chosen in (both, sets))
    over = "" if many == of else f" ({many} of {of} annotated cases)"
    return f"{np.mean(found):+.1f}{over}" if found else "not known"


def _pool(group: Mapping[str, Row], groups: Sequence[Mapping[str, Row]]) -> str:
    """The annotated case, and how large the pool is where it differs."""
    sizes = {other[OURS]["pool"] for other in groups}
    return group[OURS]["annotated"] + (f", {group[OURS]['pool']} pool cases" if len(sizes) > 1 else "")


def _against_others(group: Mapping[str, Row]) -> str:
    """One budget's ours in words."""
    ours, full = group[OURS], group[REFERENCE]
    said = [
        f"{_points(paired(ours, full))} against full supervision ({_dice(ours)[0] / _dice(full)[0]:.1%} of its Dice)"
    ]
    if AS_OFTEN in group:
        said.append(f"{_points(paired(ours, group[AS_OFTEN]))} against the same trained once more")
    for where, among in (
        ("from the same annotation", rivals(group, by_slices=False)),
        ("from one slice of every volume", rivals(group, by_slices=True)),
    ):
        if among:
            of = f"the best of {len(among)} others" if len(among) > 1 else "the one other that was run"
            said.append(f"{_points(paired(ours, among[0]))} against {of} {where}, {_what(among[0])}")
            if ONCE in group and _trainings(among[0]) == 1:
                said[-1] += f" ({_points(paired(group[ONCE], among[0]))} where ours is trained once, as that is)"
    return "; ".join(said)


def rivals(group: Mapping[str, Row], *, by_slices: bool) -> list[Row]:
    """Of one budget, what a user would pick in place of ours, from a case or from slices, best first."""
    found = [row for method, row in group.items() if METHODS[method].rival and METHODS[method].by_slices == by_slices]
    return sorted(found, key=lambda row: -_dice(row)[0])


# --- the tables -----------------------------------------------------------------------------------------------------


def scores_table(rows: Sequence[Row]) -> str:
    """Of one set, how good each model is on the test cases."""
    groups = by_budget(rows)
    head = ["method", "annotated", "trainings", "Dice", "95 %", "against full", "against ours", "against best other"]
    head += [f"{metric} {_unit(rows)} (95 %)" for metric in ("HD95", "ASSD")]
    return markdown(head, [_score_cells(row, groups[budget(row)]) for row in rows])


def _unit(rows: Sequence[Row]) -> str:
    return "px" if rows[0]["set"] in IN_PIXELS else "mm"


def _score_cells(row: Row, group: Mapping[str, Row]) -> list[Any]:
    dice, low, high = _dice(row)
    _, *surface = _metrics(row["scores"][FOREGROUND])
    differences = [
        _difference(row, other) for other in (group.get(REFERENCE), group.get(OURS), _best_other(row, group))
    ]
    return [
        _name(row),
        _annotation(row),
        _trainings(row),
        f"{dice:.3f}",
        f"{low:.3f} to {high:.3f}",
        *differences,
        *surface,
    ]


def _best_other(row: Row, group: Mapping[str, Row]) -> Row | None:
    """The best of what a user would pick in its place; None for true labels, and for that one itself."""
    method = METHODS[row["method"]]
    found = [] if method.labels == "truth" else rivals(group, by_slices=method.by_slices)
    return found[0] if found else None


def classes_table(rows: Sequence[Row]) -> str:
    """Of one set, Dice, HD95 and ASSD of every class with their intervals."""
    names = [name for name in rows[0]["scores"] if name != FOREGROUND]
    lines = [
        [name_of, *("; ".join(_metrics(row["scores"][name])) for name in names)]
        for name_of, row in zip(_names(rows), rows, strict=True)
    ]
    return markdown([f"Dice; HD95 {_unit(rows)}; ASSD {_unit(rows)} (95 %)", *names], lines)


def _metrics(scores: Mapping[str, Sequence[float]]) -> list[str]:
    digits = {"Dice": 3, "HD95": 1, "ASSD": 2}
    return [
        f"{scores[metric][0]:.{n}f} ({scores[metric][1]:.{n}f} to {scores[metric][2]:.{n}f})"
        for metric, n in digits.items()
    ]


def making_table(rows: Sequence[Row]) -> str:
    """Of one set, the labels that rows were trained on, what they took, and what made them."""
    head = ["method", "labels' Dice by round", "divergence", "right in consensus", "in divergence"]
    head += ["min labelling", "min training", "processor", "torch", "commit"]
    return markdown(head, [[name, *_making_cells(row)] for name, row in zip(_names(rows), rows, strict=True)])


def _making_cells(row: Row) -> list[Any]:
    labels = " / ".join(f"{value:.3f}" for value in row.get("label_dice", {}).values()) or "-"
    keys = ("divergence", "accuracy_in_consensus", "accuracy_in_divergence")
    shares = [f"{row[key]:.1%}" if row.get(key) is not None else "-" for key in keys]
    if row.get("divergence") == 0:
        shares[-1] = "-"
    processor = row["hardware"].split(",")[0].replace("(R)", "").replace(" Processor", "")
    # Rows of before there was a choice do not name it.
    computed = f"{processor}, bfloat16" if row.get("precision") == "bfloat16" else processor
    computed = row.get("gpu") or computed
    return [labels, *shares, *_minutes(row["minutes"]), computed, row["versions"]["torch"], row["commit"]]


def _minutes(minutes: Mapping[str, Any]) -> list[str]:
    """Of labelling and of training; rows of before stages were kept tell what their last run took, in brackets.

    Where that found a stage done, by another row or an earlier run, what it took is not known.
    """
    if "training" in minutes:
        return ["-" if minutes[key] is None else f"{minutes[key]:.0f}" for key in ("labelling", "training")]
    last = minutes["labelling"], minutes["all"] - minutes["labelling"]
    return [f"({value:.0f})" if round(value) > 0 else "-" for value in last]


def spread_table(rows: Sequence[Row]) -> str:
    """Of one set, how rows differ that differ in the annotated case or the repetition alone; empty where none do."""
    alike: dict[tuple[str, int, str], list[float]] = {}
    for row in rows:
        alike.setdefault((_what(row), row["pool"], row["preset"]), []).append(_dice(row)[0])
    lines = [
        [what, len(dice), f"{np.mean(dice):.3f}", f"{np.std(dice, ddof=1):.3f}"]
        for (what, _, _), dice in alike.items()
        if len(dice) > 1
    ]
    return markdown(["method", "rows", "mean Dice", "standard deviation"], lines) if lines else ""


def _dice(row: Row) -> Interval:
    """Mean Dice as it was scored; its interval is of patients, which a row's own is not."""
    _, low, high = interval(row["dice_per_case"])
    return row["scores"][FOREGROUND]["Dice"][0], low, high


def _what(row: Row) -> str:
    return METHODS[row["method"]].what


def _name(row: Row) -> str:
    return _what(row) + (f", repetition {training(row)}" if training(row) > 1 else "")


def _names(rows: Sequence[Row]) -> list[str]:
    """Of every row, with what it starts from where rows differ in that."""
    several = len({row["annotated"] for row in rows}) > 1, len({row["pool"] for row in rows}) > 1
    return [
        ", ".join([_name(row), *[row["annotated"]] * several[0], *[f"{row['pool']} pool cases"] * several[1]])
        for row in rows
    ]


def _annotation(row: Row) -> str:
    method = METHODS[row["method"]]
    if method.labels == "truth":
        return "every case"
    return "a slice of every case" if method.by_slices else row["annotated"]


def _trainings(row: Row) -> int:
    """Trainings that the model has been through; rows of before weights were taken over do not say it."""
    return int(row.get("trainings_of_the_model", METHODS[row["method"]].trainer is not None))


def _difference(row: Row, other: Row | None) -> str:
    if other is None or other is row:
        return "-"
    mean, low, high = paired(row, other)
    return f"{mean:+.3f} ({low:+.3f} to {high:+.3f})"


def _points(found: Interval) -> str:
    mean, low, high = (100 * value for value in found)
    return f"{mean:+.1f} points ({low:+.1f} to {high:+.1f})"


# --- the figure and the page ----------------------------------------------------------------------------------------


def draw(rows: Sequence[Row]) -> None:
    """Dice of every row with its interval, one panel a set."""
    many = Counter(row["set"] for row in rows)
    sets = [name for name, _ in many.most_common()]
    # Beside each other are sets of about as many rows.
    tall = [max(many[name] for name in sets[i : i + 2]) for i in range(0, len(sets), 2)]
    size = (15, 0.27 * sum(tall) + len(tall))
    figure, axes = plt.subplots(len(tall), 2, figsize=size, squeeze=False, height_ratios=[rows + 1 for rows in tall])
    for axis in axes.flat[len(sets) :]:
        axis.set_axis_off()
    for axis, name in zip(axes.flat, sets, strict=False):
        mine = sorted((row for row in rows if row["set"] == name), key=lambda row: _dice(row)[0])
        for place, row in enumerate(mine):
            dice, low, high = _dice(row)
            error = [[max(dice - low, 0)], [max(high - dice, 0)]]
            axis.errorbar(dice, place, xerr=error, fmt="o", capsize=2, color=_color(row["method"]))
        axis.set_yticks(range(len(mine)), [fill(text, 60) for text in _names(mine)], fontsize=8)
        axis.set_title(name)
        axis.set_xlabel("Dice on test cases, 95 % over patients")
    kinds = {"full supervision": REFERENCE, "ours": OURS, "parts of ours": "ours_stock", "others": "sam2_stock"}
    marks = [Line2D([], [], marker="o", color=_color(method), label=kind) for kind, method in kinds.items()]
    figure.legend(handles=marks, ncols=len(kinds), loc="upper center", bbox_to_anchor=(0.5, 0), fontsize=8)
    figure.tight_layout()
    figure.savefig(PICTURE, dpi=90, bbox_inches="tight")
    plt.close(figure)


def _color(method: str) -> str:
    if METHODS[method].labels == "truth":
        return "black"
    if METHODS[method].rival:
        return "tab:orange"
    return "tab:green" if method == OURS else "tab:blue"


def page(sets: Sequence[str], rows: Sequence[Row]) -> str:
    """The generated part of docs/results.md."""
    parts = headline([row for row in rows if not variant(row)])
    for name in sets:
        mine = [row for row in rows if row["set"] == name and not variant(row)]
        parts += [f"### {name}", "", *_of_set(mine)] if mine else []
        for other in sorted({variant(row) for row in rows if row["set"] == name and variant(row)}):
            theirs = [row for row in rows if row["set"] == name and variant(row) == other]
            said = _compared(_with_ours(theirs))
            parts += [f"### {name}: {other}", "", *said, *[""] * bool(said), *_of_set(theirs)]
            wanted = [
                METHODS[m].what for m in (REFERENCE, AS_OFTEN, ONCE, OURS) if m not in {r["method"] for r in theirs}
            ]
            parts += [f"Not run on {name}: {other}: {'; '.join(wanted)}.", ""] if wanted else []
    return "\n".join([*parts, "### Not run", "", *not_run(sets, rows), ""])


def not_run(sets: Sequence[str], rows: Sequence[Row]) -> list[str]:
    """What the protocol asks for and no row tells: methods by annotated case, presets, repetitions."""
    own = [row for row in rows if not variant(row)]
    lines = []
    for name in sets:
        for annotated in CHOICES.get(name, ()):
            there = {row["method"] for row in own if (row["set"], row["annotated"]) == (name, annotated)}
            possible = [method for method in METHODS if METHODS[method].fits(name)]
            missing = [METHODS[method].what for method in possible if method not in there]
            count = f"{len(possible) - len(missing)} of {len(possible)}"
            lines.append([name, annotated, count, "; ".join(missing) if there else "anything"])
    presets = sorted({"default", OWN_PRESET} - {row["preset"] for row in rows})
    said = [f"`--preset {preset}` (a GPU's length, say), with any method on any set." for preset in presets]
    if all(training(row) == 1 for row in rows):
        said.append("`--training 2`, which does a row once more: every row is of one run.")
    return [markdown(["set", "annotated", "run", "not run"], lines), "", *(f"- {line}" for line in said)]


def _of_set(rows: Sequence[Row]) -> list[str]:
    about = sorted({f"{r['pool']} pool cases, {_tested(r)}, preset {r['preset']}" for r in rows})
    tables = [scores_table(rows), spread_table(rows), making_table(rows), classes_table(rows)]
    return [f"{'; '.join(about)}.", "", *(part for table in tables if table for part in (table, ""))]


def _tested(row: Row) -> str:
    """How many test cases, and of how many patients where these are fewer."""
    patients = len({patient(case) for case in row["dice_per_case"]})
    of = f" of {patients} patients" if patients < row["test_cases"] else ""
    return f"{row['test_cases']} test cases{of}"


def write_results(sets: Sequence[str]) -> None:
    """Put the tables into docs/results.md and the headline into README.md, between their marks, and draw the figure."""
    rows = read_rows()
    _put(PAGE, "evidence", page(sets, rows))
    own = [row for row in rows if not variant(row)]
    _put(README, "headline", "\n".join(headline(own)))
    if own:
        draw(own)


def _put(path: Path, mark: str, content: str) -> None:
    """Replace what a page has between two marks."""
    begin, end = (f"<!-- {mark}: {word} -->" for word in ("begin", "end"))
    before, rest = path.read_text(encoding="utf-8").split(begin, 1)
    path.write_text(f"{before}{begin}\n{content}{end}{rest.split(end, 1)[1]}", encoding="utf-8")
