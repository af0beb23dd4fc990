"""From how many slices on is it worth while for SAM2 to look along three planes? Phantoms of 6 to 24 thick slices.

    python benchmarks/few_slices.py [--slices 6 8 10 12 16 24] [--cases 6]

The same phantom subjects (nnunet_oneshot.phantom, seed 0) are imaged with more or fewer slices (give or take one) over
the same 80 mm. One is annotated; mode self, prompted with registration's fused label, looks at each of the others in
three turns of the axial plane and along three planes. Mean foreground Dice of registration, of each way, and of each
way fused with registration as `propagate` weighs it (in the rows of November 2026 planes weighed 2, not 8). The
built-in weights, one thread. A finished row, benchmarks/results/few_slices_<slices>.json, is not computed again. No
real set is read: this is what the limit in sam2_propagation.sam2 is chosen on.
"""

from __future__ import annotations

import argparse
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from builtin_checkpoint import Recorded
from common import markdown, phantom, read_row, write_row
from registration import dice
from tqdm import tqdm

from nnunet_oneshot.consensus import view_weights
from nnunet_oneshot.phantom import KINDS, Kind
from sam2_propagation.consensus import fuse
from sam2_propagation.interface import LabelVolume, Support
from sam2_propagation.registration import RegistrationPropagator
from sam2_propagation.sam2 import Sam2Propagator
from sam2_propagation.sam2_settings import TURNED
from sam2_propagation.views import EVERY_PLANE

WAYS = {"turns": TURNED, "planes": EVERY_PLANE}
FIELDS = ("registration", "turns", "planes", "fused_turns", "fused_planes")


def thick(slices: int) -> Kind:
    """Thick-slice phantoms with so many slices over the same field of view."""
    kind = KINDS["thick_slices"]
    depth = kind.shape[0] * kind.spacing[0]
    planes = kind.shape[0] * kind.substeps
    shape, spacing = (slices, *kind.shape[1:]), (depth / slices, *kind.spacing[1:])
    return replace(kind, shape=shape, spacing=spacing, substeps=max(1, round(planes / slices)))


def run_case(support: Support, query: Support, sam2: Sam2Propagator) -> dict[str, float]:
    """Dice of every way to label one phantom."""
    registration = RegistrationPropagator(threads=1)
    image, classes = query.image, sorted(query.classes)
    found = registration.propagate([support], [image], registration.default_views)
    carried: list[LabelVolume] = [result.label for result in found if result.label is not None]
    before = fuse(carried, spacing=image.spacing).label
    assert isinstance(sam2.prompter, Recorded)
    sam2.prompter.label = before
    scores = {"registration": dice(before, query.label, classes)}
    for way, views in WAYS.items():
        seen = {r.view: r.label for r in sam2.propagate([support], [image], views) if r.label is not None}
        labels = list(seen.values())
        weights = view_weights([*(f"sam2/{view}" for view in seen), *("registration/any" for _ in carried)])
        scores[way] = dice(fuse(labels, spacing=image.spacing).label, query.label, classes)
        scores[f"fused_{way}"] = dice(
            fuse([*labels, *carried], weights, spacing=image.spacing).label, query.label, classes
        )
    return scores


def run(slices: int, cases: int) -> dict[str, Any]:
    """One row, from its file if it is there."""
    title = f"few_slices_{slices}"
    if (row := read_row(title)) is not None:
        return row
    kind = thick(slices)
    support, sam2 = phantom(kind, 1), Sam2Propagator(mode="self", prompter=Recorded())
    found = [run_case(support, phantom(kind, 2 + n), sam2) for n in tqdm(range(cases), desc=f"{slices} slices")]
    means = {key: round(float(np.mean([case[key] for case in found])), 4) for key in FIELDS}
    rounded = [{key: round(value, 4) for key, value in case.items()} for case in found]
    return write_row(title, {"slices": slices, "n": cases, "seed": 0, "dice": means, "cases": rounded})


def main() -> None:
    """Fill in what is missing and print the table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--slices", nargs="+", type=int, default=[6, 8, 10, 12, 16, 24])
    parser.add_argument("--cases", type=int, default=6)
    options = parser.parse_args()
    torch.set_num_threads(1)
    rows = [run(slices, options.cases) for slices in options.slices]
    print(markdown(["slices", *FIELDS], [[r["slices"], *(f"{r['dice'][k]:.3f}" for k in FIELDS)] for r in rows]))


if __name__ == "__main__":
    main()
