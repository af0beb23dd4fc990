"""One annotated slice a volume: what should SAM2 do beside correspondence, and weigh? Phantoms alone decide.

    python benchmarks/slice_fusion.py [--kinds thick_slices isotropic] [--cases 6]

Phantoms (nnunet_oneshot.phantom, seed 0), ten of a kind, on which correspondence is trained without labels; on so many
of them the slice with the largest foreground area is annotated. Mean Dice on the other slices, of the classes on it, of

    correspondence   its views, `checked` voting like the others
    unchecked        the same, `checked` without a say
    slice            SAM2's mode slice, the built-in weights
    both             unchecked and slice, each of the latter's views weighing half
    registered       the slice deformed from slice to slice
    self             SAM2 looking at the volume along three planes, prompted by all three
    C:T:R            the same, correspondence, slice and registered weighing so much in the prompt
    1, 2, 4, 8       unchecked and self, each of SAM2's planes weighing so much where one of correspondence weighs 1

One thread. A finished row, benchmarks/results/slice_fusion_<kind>_<cases>.json, is not computed again.
"""

from __future__ import annotations

import argparse
from typing import Any
from unittest import mock

import numpy as np
import torch
from builtin_checkpoint import Recorded
from common import markdown, phantom, read_row, write_row
from oneseg import carried, sparse_support
from registration import dice

from nnunet_oneshot.phantom import KINDS
from sam2_propagation import sam2_engine
from sam2_propagation.consensus import fuse
from sam2_propagation.correspondence import CorrespondencePropagator
from sam2_propagation.intensities import scale
from sam2_propagation.interface import LabelVolume, Propagator, Support
from sam2_propagation.registration_slices import carried_through
from sam2_propagation.sam2 import Sam2Propagator

WEIGHTS = (1.0, 2.0, 4.0, 8.0)
PROMPTS = ((2, 1, 0), (1, 1, 1), (2, 1, 1), (3, 2, 2))
"""Beside the default, which is 2:2:1."""
TAUGHT = 10


def run_case(whole: Support, correspondence: Propagator) -> dict[str, float]:
    """Dice of each source and of every weight."""
    support, shown, index = sparse_support(whole.image, whole.label, suggested=False)
    truth, spacing = shown.forward(whole.label), whole.image.spacing
    classes = [int(value) for value in np.unique(truth[index]) if value]
    rest = np.arange(len(truth)) != index

    def score(*weighted: tuple[list[LabelVolume], float]) -> float:
        labels = [label for given, _ in weighted for label in given]
        weights = [weight for given, weight in weighted for _ in given]
        return dice(shown.forward(fuse(labels, weights, spacing).label)[rest], truth[rest], classes)

    views = carried(correspondence, support)
    every, unchecked = list(views.values()), [label for name, label in views.items() if name != "checked"]
    tracked = list(carried(Sam2Propagator(mode="slice"), support).values())
    prompter = Recorded()
    prompter.label = fuse(every).label
    itself = list(carried(Sam2Propagator(prompter=prompter), support).values())
    prompted = {}
    for weights in PROMPTS:
        named = dict(zip(("_CARRIED", "_TRACKED", "_REGISTERED"), map(float, weights), strict=True))
        with mock.patch.multiple(sam2_engine, **named):
            prompted[":".join(map(str, weights))] = list(carried(Sam2Propagator(prompter=prompter), support).values())
    registered = shown.inverse(carried_through(shown.forward(scale(whole.image)).mean(axis=0), truth, [index]))
    scores = {
        "correspondence": score((every, 1.0)),
        "unchecked": score((unchecked, 1.0)),
        "slice": score((tracked, 1.0)),
        "both": score((unchecked, 2.0), (tracked, 1.0)),
        "registered": score(([registered], 1.0)),
        "self": score((itself, 1.0)),
    }
    scores |= {name: score((labels, 1.0)) for name, labels in prompted.items()}
    return scores | {f"{weight:g}": score((itself, weight), (unchecked, 1.0)) for weight in WEIGHTS}


def run(kind: str, cases: int) -> dict[str, Any]:
    """One row, from its file if it is there."""
    title = f"slice_fusion_{kind}_{cases}"
    if (row := read_row(title)) is not None:
        return row
    subjects = [phantom(KINDS[kind], number) for number in range(1, TAUGHT + 1)]
    correspondence = CorrespondencePropagator()
    correspondence.fit(support.image for support in subjects)
    found = [run_case(support, correspondence) for support in subjects[:cases]]
    means = {key: round(float(np.mean([case[key] for case in found])), 4) for key in found[0]}
    return write_row(title, {"kind": kind, "n": cases, "seed": 0, "dice": means, "cases": found})


def main() -> None:
    """Fill in what is missing and print the table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--kinds", nargs="+", default=["thick_slices", "isotropic"], choices=list(KINDS))
    parser.add_argument("--cases", type=int, default=6)
    options = parser.parse_args()
    torch.set_num_threads(1)
    rows = [run(kind, options.cases) for kind in options.kinds]
    head = list(rows[0]["dice"])
    print(markdown(["kind", "n", *head], [[r["kind"], r["n"], *(f"{r['dice'][k]:.3f}" for k in head)] for r in rows]))


if __name__ == "__main__":
    main()
