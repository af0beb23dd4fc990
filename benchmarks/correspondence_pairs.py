"""Should correspondence also learn by rebuilding a slice from another volume's? By what it then carries.

    python benchmarks/correspondence_pairs.py [--sets thick_slices isotropic hippocampus chaos_mr_t2] [--cases 6]
                                              [--across 0 0.3 0.6]

Data: phantoms (nnunet_oneshot.phantom, two kinds, ten of each), and of $ONESHOT_DATA, or ../shared/data beside the
repository, the pool; so many cases are scored. `--across` is the share of training pairs from two volumes, at the same
relative position. Mean Dice, views joint and coarse fused: `slice`, one annotated slice (the largest foreground area)
to the rest of its volume; `case`, one annotated case (the first phantom, or the split's default) to the others. Labels
of the scored cases are read for that slice and for scoring. Seed 0, one thread. A finished row,
benchmarks/results/correspondence_pairs_<set>_<cases>_<share>.json, is not computed again.
"""

from __future__ import annotations

import argparse
from typing import Any

import numpy as np
import torch
from common import markdown, phantom, read_row, write_row
from oneseg import sparse_support
from registration import dice, read_image, read_label, split_of
from suggest import spread

from nnunet_oneshot.phantom import KINDS
from sam2_propagation.consensus import fuse
from sam2_propagation.correspondence import CorrespondencePropagator
from sam2_propagation.correspondence_training import Recipe
from sam2_propagation.interface import Image, LabelVolume, Support

SETS = ("thick_slices", "isotropic", "hippocampus", "chaos_mr_t2")
VIEWS = ("joint", "coarse")
TAUGHT = 10


def data_of(name: str, count: int) -> tuple[list[Image], Support, list[Support]]:
    """All images, the annotated case, and the cases that are scored, with their true labels."""
    if name in KINDS:
        subjects = [phantom(KINDS[name], number) for number in range(1, TAUGHT + 1)]
        return [subject.image for subject in subjects], subjects[0], subjects[1 : count + 1]
    split = split_of(name)
    pool, annotated = sorted(split["pool"]), split["annotated_default"]
    chosen = [annotated, *spread([case for case in pool if case != annotated], count)]
    supports = [Support(read_image(name, case), read_label(name, case)) for case in chosen]
    return [read_image(name, case) for case in pool], supports[0], supports[1:]


def carried(propagator: CorrespondencePropagator, support: Support, query: Image) -> LabelVolume:
    """The two views' labels of a query, fused; background where there is none."""
    found = [r.label for r in propagator.propagate([support], [query], VIEWS) if r.label is not None]
    return fuse(found, spacing=query.spacing).label if found else np.zeros(query.shape, np.int16)


def scores(propagator: CorrespondencePropagator, annotated: Support, query: Support) -> dict[str, float]:
    """One case's Dice, from one of its slices and from the annotated case."""
    support, shown, index = sparse_support(query.image, query.label, suggested=False)
    truth = shown.forward(query.label)
    rest = np.arange(len(truth)) != index
    drawn = [int(value) for value in np.unique(truth[index]) if value]
    completed = shown.forward(carried(propagator, support, query.image))
    return {
        "slice": dice(completed[rest], truth[rest], drawn),
        "case": dice(carried(propagator, annotated, query.image), query.label, list(query.classes)),
    }


def run(name: str, count: int, across: float) -> dict[str, Any]:
    """One row, from its file if it is there."""
    title = f"correspondence_pairs_{name}_{count}_{across:g}"
    if (row := read_row(title)) is not None:
        return row
    images, annotated, queries = data_of(name, count)
    propagator = CorrespondencePropagator(recipe=Recipe(across=across))
    propagator.fit(images)
    found = [scores(propagator, annotated, query) for query in queries]
    means = {key: round(float(np.mean([case[key] for case in found])), 4) for key in found[0]}
    return write_row(title, {"set": name, "n": len(found), "across": across, "seed": 0, **means})


def main() -> None:
    """Fill in what is missing and print the table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--sets", nargs="+", default=list(SETS), choices=SETS)
    parser.add_argument("--cases", type=int, default=6)
    parser.add_argument("--across", type=float, nargs="+", default=[0.0, 0.3, 0.6])
    options = parser.parse_args()
    torch.set_num_threads(1)
    rows = [run(name, options.cases, share) for name in options.sets for share in options.across]
    cells = [[r["set"], r["n"], r["across"], f"{r['slice']:.3f}", f"{r['case']:.3f}"] for r in rows]
    print(markdown(["set", "n", "across", "slice", "case"], cells))


if __name__ == "__main__":
    main()
