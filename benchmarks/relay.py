"""Which images should pass labels on, and how many: the `relay` propagator's choices, measured.

    python benchmarks/relay.py --work DIR [--sets phantom ...] [-np 2]

Dice of what relays and registration's views together say of the un-annotated pool cases, relays being the best N of
(at most) twelve candidates by what comes back to the annotated case (six by default), by how far registration's views
agree on them, or all. "judged" is the default, which keeps registration's own vote where it comes back half as well as
the best candidate, and that of all less than nine tenths as well as it ("strictly": less well). Beside it each
candidate's figures and its true Dice, which says how well the two tell a bad one.
`--work` may be that of `builtin_checkpoint.py`, which keeps what registration carried. Truth is read for scoring alone;
the choice was made on phantoms.
"""

from __future__ import annotations

import argparse
import itertools
import multiprocessing
from pathlib import Path
from typing import Any

import numpy as np
from builtin_checkpoint import REGISTRATION, SETS, Carried, Row, pool, read_case, registered
from common import markdown, read_row, write_row
from registration import dice
from scipy.stats import spearmanr
from tqdm import tqdm

from sam2_propagation.consensus import fuse
from sam2_propagation.interface import LabelVolume, Support
from sam2_propagation.registration import limited_threads
from sam2_propagation.registration_volume import channels_of
from sam2_propagation.relay import Vote, candidates, carried_on, comes_back, usable

NUMBERS = (4, 6, 9, 12)
DEFAULT = "back 6"


def agreement(labels: list[LabelVolume]) -> float:
    """Mean Dice between views."""
    classes = sorted({int(value) for label in labels for value in np.unique(label)} - {0})
    pairs = list(itertools.combinations(labels, 2))
    return float(np.mean([dice(a, b, classes) for a, b in pairs])) if classes and pairs else 0.0


def judge(task: tuple[Row, str]) -> dict[str, Any]:
    """One candidate: what comes back to the annotated case, how far views agree, and its true Dice."""
    row, case = task
    image, truth = read_case(row.name, case)
    labels = list(registered(row, image)["labels"].values())
    fused = fuse(labels, spacing=image.spacing).label if labels else np.zeros(image.shape, np.int16)
    annotated, label = read_case(row.name, row.annotated)
    sources, judges = list(usable([Support(image, fused)])), list(usable([Support(annotated, label())]))
    with limited_threads(1):
        back = float(np.mean(list(comes_back(sources[0], judges[0]).values()))) if sources else 0.0
    classes = [int(value) for value in np.unique(truth()) if value]
    return {"case": case, "back": back, "agree": agreement(labels), "true": dice(fused, truth(), classes)}


def score(task: tuple[Row, str, dict[str, list[str]], float]) -> dict[str, float]:
    """Dice of one query by choice of relays; each candidate is carried once. Last in the task: the best way back."""
    row, case, choices, best = task
    image, truth = read_case(row.name, case)
    known = registered(row, image)
    votes = [Vote(label, known["similar"][view]) for view, label in known["labels"].items()]
    passed: dict[str, Vote] = {}
    with limited_threads(1):
        channels = channels_of(image)
        for name in sorted({name for names in choices.values() for name in names} - {case}):
            vote = _relayed(row, name, channels)
            if vote is not None:
                passed[name] = vote
    classes = [int(value) for value in np.unique(truth()) if value]
    found = {"registration": _dice(votes, image, truth(), classes, weighed=False)}
    for choice, names in choices.items():
        on = [passed[name] for name in names if name in passed]
        found[choice] = _dice([*votes, *on], image, truth(), classes)
        if choice == DEFAULT:
            alone, together = (_back(row, image, each) if each else 0.0 for each in (votes, [*votes, *on]))
            for name, least in (("judged", 0.9), ("judged strictly", 1.0)):
                stays = alone >= 0.5 * best and together < least * alone
                found[name] = _dice(votes if stays else [*votes, *on], image, truth(), classes)
    return found


def _back(row: Row, image: Any, votes: list[Vote]) -> float:
    """How well the vote comes back to the annotated case."""
    label = fuse([vote.label for vote in votes], [vote.weight for vote in votes], image.spacing).label
    annotated, truth = read_case(row.name, row.annotated)
    sources, judges = list(usable([Support(image, label)])), list(usable([Support(annotated, truth())]))
    with limited_threads(1):
        return float(np.mean(list(comes_back(sources[0], judges[0]).values()))) if sources else 0.0


def _relayed(row: Row, name: str, channels: Any) -> Vote | None:
    image = read_case(row.name, name)[0]
    labels = list(registered(row, image)["labels"].values())
    if not labels:
        return None
    sources = list(usable([Support(image, fuse(labels, spacing=image.spacing).label)]))
    return carried_on(sources[0], channels) if sources else None


def _dice(votes: list[Vote], image: Any, truth: LabelVolume, classes: list[int], weighed: bool = True) -> float:
    if not votes:
        return 0.0
    votes = sorted(votes, key=lambda vote: -vote.weight) if weighed else votes
    weights = [vote.weight for vote in votes] if weighed else None
    return dice(fuse([vote.label for vote in votes], weights, image.spacing).label, truth, classes)


def run_set(name: str, work: Path, processes: int) -> dict[str, Any]:
    """One set's row, from its file if it is there."""
    done = read_row(f"relay_{name}")
    if done is not None:
        return done
    ((annotated, cases),) = pool(name, "default")
    row = Row(name, annotated, REGISTRATION, "builtin", None, "", work)
    with multiprocessing.get_context("spawn").Pool(processes) as workers:
        chosen = candidates(Carried(row, tuple(cases)).cases())
        judged = list(tqdm(workers.imap(judge, [(row, case) for case in chosen]), f"{name} judge", len(chosen)))
        choices = {
            f"{by} {number}": [j["case"] for j in sorted(judged, key=lambda j: -j[by])[:number]]
            for by in ("back", "agree")
            for number in NUMBERS
            if number < len(chosen)
        }
        choices["all"] = chosen
        best = max(each["back"] for each in judged)
        tasks = [(row, case, choices, best) for case in cases]
        scores = list(tqdm(workers.imap_unordered(score, tasks), name, len(tasks)))
    return write_row(
        f"relay_{name}",
        {
            "set": name,
            "annotated": annotated,
            "n": len(cases),
            "dice": {choice: float(np.mean([each[choice] for each in scores])) for choice in scores[0]},
            "candidates": judged,
            "spearman": {
                by: float(spearmanr([j[by] for j in judged], [j["true"] for j in judged]).statistic)
                for by in ("back", "agree")
            },
            "seed": 0,
        },
    )


def main() -> None:
    parser = argparse.ArgumentParser(description="which images should pass labels on")
    parser.add_argument("--work", type=Path, required=True, help="folder for what is kept between runs")
    parser.add_argument("--sets", nargs="+", choices=SETS, default=["phantom"])
    parser.add_argument("-np", type=int, default=2, help="processes, each of one thread")
    arguments = parser.parse_args()
    rows = [run_set(name, arguments.work, arguments.np) for name in arguments.sets]
    choices = [
        "registration",
        "judged",
        "judged strictly",
        *(f"{by} {number}" for by in ("back", "agree") for number in NUMBERS[:-1]),
        "all",
    ]
    lines = [
        [row["set"], row["n"], *(f"{row['dice'][c]:.3f}" if c in row["dice"] else "-" for c in choices)]
        + [f"{row['spearman'][by]:.2f}" for by in ("back", "agree")]
        for row in rows
    ]
    print(markdown(["set", "n", *choices, "rho, back", "rho, agree"], lines))


if __name__ == "__main__":
    main()
