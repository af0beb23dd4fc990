"""One annotated case: what carries its label best to the others, correspondence, registration or SAM2?

    python benchmarks/oneseg_case.py [--sets chaos_mr_t2 acdc_mr hippocampus] [--cases 8] [--annotated CASE]

Data: $ONESHOT_DATA, or ../shared/data beside the repository. The annotated case (the split's default) is carried to so
many other pool cases at even distances in the sorted names. Correspondence is trained once a set on ALL its pool images
without labels. Methods, each with its default views fused:

    registration, correspondence
    across             SAM2's mode retrieve, which no other propagator helps
    sam2               SAM2's mode self, prompted with registration's labels
    fused              registration and sam2, all views weighing alike (`propagate` gives sam2's planes the say, and
                       prompts them by relays)
    all                registration, sam2 and correspondence

Mean foreground Dice over cases; other labels than the annotated case's are read to score alone. Seed 0, one thread. A
finished row, benchmarks/results/oneseg_case_<set>_<annotated>_<cases>.json, is not computed again.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from builtin_checkpoint import Recorded
from common import markdown, read_row, write_row
from registration import dice, read_image, read_label, split_of
from suggest import spread
from tqdm import tqdm

from sam2_propagation.consensus import fuse
from sam2_propagation.correspondence import CorrespondencePropagator
from sam2_propagation.interface import Image, LabelVolume, Propagator, Support
from sam2_propagation.registration import RegistrationPropagator
from sam2_propagation.sam2 import Sam2Propagator

SETS = ("chaos_mr_t2", "acdc_mr", "hippocampus")
METHODS: Mapping[str, tuple[str, ...]] = {
    "registration": ("registration",),
    "correspondence": ("correspondence",),
    "across": ("across",),
    "sam2": ("sam2",),
    "fused": ("sam2", "registration"),
    "all": ("sam2", "registration", "correspondence"),
}
"""Whose views are fused in each row."""


def propagators(name: str) -> dict[str, Propagator]:
    """Everything that carries labels; correspondence has learnt from the set's images."""
    correspondence = CorrespondencePropagator()
    correspondence.fit(read_image(name, case) for case in sorted(split_of(name)["pool"]))
    return {
        "registration": RegistrationPropagator(threads=1),
        "sam2": Sam2Propagator(mode="self", prompter=Recorded()),
        "across": Sam2Propagator(mode="retrieve"),
        "correspondence": correspondence,
    }


def run_case(made: Mapping[str, Propagator], support: Support, query: Image) -> dict[str, list[LabelVolume]]:
    """Every propagator's labels of a query."""
    found: dict[str, list[LabelVolume]] = {}
    for name, propagator in made.items():
        if isinstance(propagator, Sam2Propagator) and isinstance(propagator.prompter, Recorded):
            carried = found["registration"]
            propagator.prompter.label = fuse(carried).label if carried else None
        results = propagator.propagate([support], [query], _views(propagator, support))
        found[name] = [result.label for result in results if result.label is not None]
    return found


def _views(propagator: Propagator, support: Support) -> tuple[str, ...]:
    return propagator.fitting_views([support]) if isinstance(propagator, Sam2Propagator) else propagator.default_views


def scores(found: Mapping[str, list[LabelVolume]], query: Image, truth: LabelVolume) -> dict[str, float]:
    """Dice of every method; 0 where none of its views gave a label."""
    classes = [int(value) for value in np.unique(truth) if value]
    out = {}
    for method, sources in METHODS.items():
        labels = [label for source in sources for label in found[source]]
        out[method] = round(dice(fuse(labels, spacing=query.spacing).label, truth, classes), 4) if labels else 0.0
    return out


def run_set(name: str, annotated: str, count: int) -> dict[str, Any]:
    """One set's row, from its file if it is there."""
    title = f"oneseg_case_{name}_{annotated}_{count}"
    if (row := read_row(title)) is not None:
        return row
    made = propagators(name)
    support = Support(read_image(name, annotated), read_label(name, annotated))
    cases = spread([case for case in split_of(name)["pool"] if case != annotated], count)
    found = {}
    for case in tqdm(cases, desc=name):
        query = read_image(name, case)
        found[case] = scores(run_case(made, support, query), query, read_label(name, case))
    means = {method: round(float(np.mean([entry[method] for entry in found.values()])), 4) for method in METHODS}
    return write_row(title, {"set": name, "annotated": annotated, "n": len(cases), "dice": means, "cases": found})


def main() -> None:
    """Fill in what is missing and print the table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--sets", nargs="+", default=list(SETS))
    parser.add_argument("--cases", type=int, default=8)
    parser.add_argument("--annotated", help="case, of a single set; the split's default otherwise")
    options = parser.parse_args()
    torch.set_num_threads(1)
    rows = []
    for name in options.sets:
        annotated = options.annotated or split_of(name)["annotated_default"]
        rows.append(run_set(name, annotated, options.cases))
    cells = [[r["set"], r["annotated"], r["n"], *(f"{r['dice'][m]:.3f}" for m in METHODS)] for r in rows]
    print(markdown(["set", "annotated", "n", *METHODS], cells))


if __name__ == "__main__":
    main()
