"""Which views of `registration` to fuse: every view alone, and every three that hold the most trusted one.

    python benchmarks/registration_views.py [--cases 8] [-np 2]

The first N pool cases of each set, its default annotated case. For each three: Dice of the fused label, accuracy
inside consensus and inside divergence, divergence. The default views were chosen from this table by the mean over sets,
looking for each set at the mean over the OTHERS (column "without"). Nothing is drawn at random.
"""

from __future__ import annotations

import argparse
import multiprocessing
from itertools import combinations
from typing import Any

import numpy as np
from common import markdown, write_row
from registration import SETS, dice, fused_figures, read_image, read_label, split_of, voxel_shares
from tqdm import tqdm

from sam2_propagation.interface import Support
from sam2_propagation.registration import RegistrationPropagator

VIEWS = RegistrationPropagator.views
TRUSTED = "local"
TRIPLES = [(TRUSTED, *two) for two in combinations([view for view in VIEWS if view != TRUSTED], 2)]


def score_case(task: tuple[str, str]) -> dict[str, Any]:
    """Dice of every view alone, and the fused figures of every three, of one case of one set."""
    name, case = task
    annotated = split_of(name)["annotated_default"]
    support = Support(read_image(name, annotated), read_label(name, annotated))
    query = read_image(name, case)
    results = list(RegistrationPropagator().propagate([support], [query], VIEWS))
    labels = {r.view: r.label for r in results if r.label is not None}
    truth = read_label(name, case)
    classes = [value for value in split_of(name)["labels"].values() if value]
    return {
        "set": name,
        "alone": {view: dice(labels[view], truth, classes) if view in labels else 0.0 for view in VIEWS},
        "fused": {
            "+".join(three): fused_figures([labels[v] for v in three if v in labels], truth, classes, query.spacing)
            for three in TRIPLES
        },
    }


def summary(entries: list[dict[str, Any]]) -> dict[str, Any]:
    """Means over the cases of one set; voxel shares are pooled."""
    fused = {}
    for three in map("+".join, TRIPLES):
        figures = [entry["fused"][three] for entry in entries]
        shares = voxel_shares([f["voxels"] for f in figures if f["voxels"]])
        fused[three] = {"dice": float(np.mean([f["fused"] for f in figures])), **shares}
    alone = {view: float(np.mean([entry["alone"][view] for entry in entries])) for view in VIEWS}
    return {"n": len(entries), "alone": alone, "fused": fused}


def table(found: dict[str, Any]) -> str:
    """Markdown: a row for each view and each three; Dice a set, and the mean without each set."""
    lines = []
    rows = {view: [found[s]["alone"][view] for s in found] for view in VIEWS}
    rows |= {three: [found[s]["fused"][three]["dice"] for s in found] for three in map("+".join, TRIPLES)}
    for key, figures in rows.items():
        others = [np.mean(figures[:k] + figures[k + 1 :]) for k in range(len(figures))] if len(figures) > 1 else figures
        lines.append([key, *(f"{figure:.3f}" for figure in [*figures, *others])])
    return markdown(["views", *found, *(f"without {name}" for name in found)], lines)


def main() -> None:
    parser = argparse.ArgumentParser(description="views of registration, alone and three by three")
    parser.add_argument("--sets", nargs="+", choices=SETS, default=list(SETS))
    parser.add_argument("--cases", type=int, default=8)
    parser.add_argument("-np", type=int, default=2)
    arguments = parser.parse_args()
    tasks = []
    for name in arguments.sets:
        split = split_of(name)
        tasks += [(name, c) for c in split["pool"] if c != split["annotated_default"]][: arguments.cases]
    with multiprocessing.get_context("spawn").Pool(arguments.np) as pool:
        entries = list(tqdm(pool.imap(score_case, tasks), "cases", len(tasks)))
    found = {name: summary([e for e in entries if e["set"] == name]) for name in arguments.sets}
    write_row("registration_views", {"sets": found, "cases": arguments.cases, "processes": arguments.np})
    print(table(found))


if __name__ == "__main__":
    main()
