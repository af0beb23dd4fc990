"""One annotated slice a volume: how much should SAM2 weigh beside correspondence? Phantoms alone decide.

    python benchmarks/slice_fusion.py [--kinds thick_slices isotropic] [--cases 6]

Phantoms (nnunet_oneshot.phantom, seed 0), ten of a kind, on which correspondence is trained without labels; on so many
of them the slice with the largest foreground area is annotated. Mean Dice on the other slices, of the classes on it, of
SAM2 (mode slice, the built-in weights), of correspondence, and of both fused, each of SAM2's views weighing so much
where one of correspondence weighs 1. One thread. A finished row, benchmarks/results/slice_fusion_<kind>_<cases>.json,
is not computed again.
"""

from __future__ import annotations

import argparse
from typing import Any

import numpy as np
import torch
from common import markdown, phantom, read_row, write_row
from oneseg import carried, sparse_support
from registration import dice

from nnunet_oneshot.phantom import KINDS
from sam2_propagation.consensus import fuse
from sam2_propagation.correspondence import CorrespondencePropagator
from sam2_propagation.interface import LabelVolume, Propagator, Support
from sam2_propagation.sam2 import Sam2Propagator

WEIGHTS = (0.25, 0.5, 1.0, 2.0)
TAUGHT = 10


def run_case(whole: Support, sam2: Propagator, correspondence: Propagator) -> dict[str, float]:
    """Dice of each source and of every weight."""
    support, shown, index = sparse_support(whole.image, whole.label, suggested=False)
    truth, spacing = shown.forward(whole.label), whole.image.spacing
    classes = [int(value) for value in np.unique(truth[index]) if value]
    rest = np.arange(len(truth)) != index
    first, second = (list(carried(source, support).values()) for source in (sam2, correspondence))

    def score(labels: list[LabelVolume], weights: list[float]) -> float:
        return dice(shown.forward(fuse(labels, weights, spacing).label)[rest], truth[rest], classes)

    scores = {"sam2": score(first, [1.0] * len(first)), "correspondence": score(second, [1.0] * len(second))}
    for weight in WEIGHTS:
        scores[str(weight)] = score([*first, *second], [weight] * len(first) + [1.0] * len(second))
    return scores


def run(kind: str, cases: int) -> dict[str, Any]:
    """One row, from its file if it is there."""
    title = f"slice_fusion_{kind}_{cases}"
    if (row := read_row(title)) is not None:
        return row
    subjects = [phantom(KINDS[kind], number) for number in range(1, TAUGHT + 1)]
    sam2, correspondence = Sam2Propagator(mode="slice"), CorrespondencePropagator()
    correspondence.fit(support.image for support in subjects)
    found = [run_case(support, sam2, correspondence) for support in subjects[:cases]]
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
    head = ["sam2", "correspondence", *map(str, WEIGHTS)]
    print(markdown(["kind", "n", *head], [[r["kind"], r["n"], *(f"{r['dice'][k]:.3f}" for k in head)] for r in rows]))


if __name__ == "__main__":
    main()
