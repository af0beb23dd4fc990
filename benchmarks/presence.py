"""When is an object not there? Where the decoder predicts how small a share of its highest IoU?

    python benchmarks/presence.py [--kinds thick_slices isotropic] [--modes slice retrieve insert self] [--cases 5]
    python benchmarks/presence.py --kinds chaos_mr_t2 acdc_mr hippocampus --modes slice --cases 8

Phantoms (nnunet_oneshot.phantom, seed 0), so many of a kind as queries. In mode `slice` the slice with the largest
foreground area of each is annotated and tracked through it; in the others another phantom is annotated, whose label
registration carries before mode `self`. Of real sets ($ONESHOT_DATA, or ../shared/data beside the repository), in mode
`slice` alone, so many pool cases at even distances in the sorted names; their other slices' labels only score. The
built-in checkpoint, which has no head for an object's presence, one view. Mean Dice (of the other slices and the
classes on the annotated one in mode `slice`) where masks are dropped whose predicted IoU is below each share of the
highest of that object in that image; 0 drops none. One thread. A finished row,
benchmarks/results/presence_<mode>_<kind>_<cases>.json, is not computed again.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from functools import cache
from typing import Any

import numpy as np
import torch
from builtin_checkpoint import Recorded
from common import markdown, phantom, read_row, write_row
from oneseg import SETS, sparse_support
from registration import dice, read_image, read_label, split_of
from suggest import spread

from nnunet_oneshot.phantom import KINDS
from sam2_propagation.consensus import fuse
from sam2_propagation.interface import Image, LabelVolume, Support
from sam2_propagation.registration import RegistrationPropagator
from sam2_propagation.sam2 import Sam2Propagator
from sam2_propagation.sam2_settings import Sam2Settings

MODES = ("slice", "retrieve", "insert", "self")
SHARES = (0.0, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8)
ANNOTATED = 1


def carried(propagator: Sam2Propagator, support: Support, query: Image) -> LabelVolume:
    """What one support's label gives a query, in its natural view."""
    found = next(iter(propagator.propagate([support], [query], ["identity"])))
    if found.label is None:
        raise ValueError(f"{query.case}: {found.reason}")
    return found.label


def volumes(kind: str, cases: int) -> Iterator[tuple[Image, LabelVolume]]:
    """Images with their true labels."""
    if kind in KINDS:
        made = (phantom(KINDS[kind], number) for number in range(1, cases + 1))
        return ((whole.image, whole.label) for whole in made)
    return ((read_image(kind, case), read_label(kind, case)) for case in spread(split_of(kind)["pool"], cases))


def through(propagator: Sam2Propagator, kind: str, cases: int) -> Iterator[float]:
    """Dice of each volume's other slices."""
    for image, label in volumes(kind, cases):
        support, shown, index = sparse_support(image, label, suggested=False)
        found, truth = shown.forward(carried(propagator, support, image)), shown.forward(label)
        rest = np.arange(len(truth)) != index
        yield dice(found[rest], truth[rest], [int(value) for value in np.unique(truth[index]) if value])


def across(propagator: Sam2Propagator, kind: str, cases: int) -> Iterator[float]:
    """Dice of each phantom, given the label of another."""
    support = phantom(KINDS[kind], ANNOTATED)
    for number in range(ANNOTATED + 1, ANNOTATED + cases + 1):
        query = phantom(KINDS[kind], number)
        if isinstance(propagator.prompter, Recorded):
            propagator.prompter.label = registered(kind, number)
        yield dice(carried(propagator, support, query.image), query.label, support.classes)


@cache
def registered(kind: str, number: int) -> LabelVolume:
    """What registration carries to a phantom from the annotated one, its views fused."""
    propagator = RegistrationPropagator()
    support, query = phantom(KINDS[kind], ANNOTATED), phantom(KINDS[kind], number).image
    views = list(propagator.propagate([support], [query], list(propagator.default_views)))
    return fuse([found.label for found in views if found.label is not None], spacing=query.spacing).label


def run(mode: str, kind: str, cases: int) -> dict[str, Any]:
    """One row, from its file if it is there."""
    title = f"presence_{mode}_{kind}_{cases}"
    if (row := read_row(title)) is not None:
        return row
    means = {}
    for share in SHARES:
        settings = Sam2Settings(mode=mode, least_share=share)
        propagator = Sam2Propagator(settings=settings, prompter=Recorded() if mode == "self" else None)
        scored = through if mode == "slice" else across
        means[f"{share:g}"] = round(float(np.mean(list(scored(propagator, kind, cases)))), 4)
    return write_row(title, {"mode": mode, "kind": kind, "n": cases, "seed": 0, "dice": means})


def main() -> None:
    """Fill in what is missing and print the table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--kinds", nargs="+", default=["thick_slices", "isotropic"], choices=[*KINDS, *SETS])
    parser.add_argument("--modes", nargs="+", default=list(MODES), choices=MODES)
    parser.add_argument("--cases", type=int, default=5)
    options = parser.parse_args()
    real = sorted(set(options.kinds) - set(KINDS))
    if real and options.modes != ["slice"]:
        parser.error(
            f"expected --modes slice alone for real sets, found {', '.join(options.modes)} for {', '.join(real)}"
        )
    torch.set_num_threads(1)
    rows = [run(mode, kind, options.cases) for mode in options.modes for kind in options.kinds]
    head = [f"{share:g}" for share in SHARES]
    cells = [[r["mode"], r["kind"], r["n"], *(f"{r['dice'][key]:.3f}" for key in head)] for r in rows]
    print(markdown(["mode", "kind", "n", *head], cells))


if __name__ == "__main__":
    main()
