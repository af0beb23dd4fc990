"""Does correspondence know where it has drifted? What it marks, beside what is truly wrong.

    python benchmarks/drift.py [--sets thick_slices isotropic chaos_mr_t2 acdc_mr hippocampus] [--cases 6]
                               [--clear 0.65] [--astray 0.6]

Data: phantoms (nnunet_oneshot.phantom, two kinds, ten of each), and of $ONESHOT_DATA, or ../shared/data beside the
repository, so many pool cases at even distances in the sorted names. The slice with the largest foreground area is
annotated and carried through its volume by correspondence, trained on all the set's images without labels. Of the
foreground that it finds on the other slices: the share that it marks as drifted, how much of that is wrong (`precise`),
how much of the rest is wrong (`missed`), and which part of all that is wrong is marked (`recall`). Labels of other
slices are read for scoring only. `--clear` and `--astray` (see correspondence_chain.Window) were chosen on phantoms.
Seed 0, one thread. A finished row, benchmarks/results/drift_<set>_<cases>_<clear>_<astray>.json, is not computed again.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from common import markdown, phantom, read_row, write_row
from oneseg import sparse_support
from registration import read_image, read_label, split_of
from suggest import spread

from nnunet_oneshot.phantom import KINDS
from sam2_propagation.correspondence import CorrespondencePropagator
from sam2_propagation.correspondence_chain import Window
from sam2_propagation.interface import Image, LabelVolume

SETS = ("thick_slices", "isotropic", "chaos_mr_t2", "acdc_mr", "hippocampus")
FIGURES = ("marked", "precise", "missed", "recall")
TAUGHT = 10


def images_of(name: str) -> Iterator[Image]:
    """Everything that the network learns from."""
    if name in KINDS:
        return (phantom(KINDS[name], number).image for number in range(1, TAUGHT + 1))
    return (read_image(name, case) for case in sorted(split_of(name)["pool"]))


def cases_of(name: str, count: int) -> Iterator[tuple[Image, LabelVolume]]:
    """Images with their true labels."""
    if name in KINDS:
        subjects = (phantom(KINDS[name], number) for number in range(1, count + 1))
        return ((subject.image, subject.label) for subject in subjects)
    return ((read_image(name, case), read_label(name, case)) for case in spread(split_of(name)["pool"], count))


def figures(propagator: CorrespondencePropagator, image: Image, truth: LabelVolume) -> dict[str, float]:
    """One case's shares."""
    support, shown, index = sparse_support(image, truth, suggested=False)
    found = next(iter(propagator.propagate([support], [image], ["joint"])))
    if found.label is None or found.confidence is None:
        raise ValueError(f"{image.case}: {found.reason}")
    label, drifted, real = (shown.forward(a) for a in (found.label, found.confidence == 0, truth))
    rest = (np.arange(len(label)) != index)[:, None, None] & (label > 0)
    # Classes that are on other slices alone cannot be carried; they are not what drifted.
    wrong = rest & (label != real)
    marked = rest & drifted
    return {
        "marked": float(marked.sum() / max(rest.sum(), 1)),
        "precise": float((wrong & marked).sum() / max(marked.sum(), 1)),
        "missed": float((wrong & ~marked).sum() / max((rest & ~marked).sum(), 1)),
        "recall": float((wrong & marked).sum() / max(wrong.sum(), 1)),
    }


def run(name: str, count: int, clear: float, astray: float) -> dict[str, Any]:
    """One row, from its file if it is there."""
    title = f"drift_{name}_{count}_{clear:g}_{astray:g}"
    if (row := read_row(title)) is not None:
        return row
    propagator = CorrespondencePropagator(window=Window(clear=clear, astray=astray))
    propagator.fit(images_of(name))
    found = [figures(propagator, image, truth) for image, truth in cases_of(name, count)]
    means = {key: round(float(np.mean([case[key] for case in found])), 4) for key in FIGURES}
    return write_row(title, {"set": name, "n": count, "clear": clear, "astray": astray, "seed": 0, **means})


def main() -> None:
    """Fill in what is missing and print the table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--sets", nargs="+", default=list(SETS), choices=SETS)
    parser.add_argument("--cases", type=int, default=6)
    parser.add_argument("--clear", type=float, nargs="+", default=[Window.clear])
    parser.add_argument("--astray", type=float, nargs="+", default=[Window.astray])
    options = parser.parse_args()
    torch.set_num_threads(1)
    grid = [(clear, astray) for clear in options.clear for astray in options.astray]
    rows = [run(name, options.cases, *pair) for name in options.sets for pair in grid]
    cells = [[r["set"], r["clear"], r["astray"], *(f"{r[key]:.2f}" for key in FIGURES)] for r in rows]
    print(markdown(["set", "clear", "astray", *FIGURES], cells))


if __name__ == "__main__":
    main()
