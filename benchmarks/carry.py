"""Correct one slice and carry it: seconds, and whether the slices around it get better.

    python benchmarks/carry.py --cases 6

Phantoms of seed 1 (the fields of view of the demo), labels moved by 6 voxels along x as if a propagation had failed. A
person who corrects the fullest slice is simulated by the true label of that one slice. Dice is over the three slices
each way around it, which the correction did not touch, mean over classes and cases: as it was, with the corrected slice
simply copied to its neighbours, and carried by the built-in SAM2. Seconds are CPU seconds: of the first correction of a
case, which encodes its slices, and of a second one.
"""

from __future__ import annotations

import argparse
import time
from statistics import mean
from typing import Any

import numpy as np
import torch
from common import write_row

from nnunet_oneshot.phantom import KINDS, draw_subject, render
from nnunet_oneshot.review.carry import Carrier
from sam2_propagation.interface import Image, LabelVolume

REACH, MOVED = 3, 6


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", type=int, default=6)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    rows = [measure(Carrier(), number) for number in range(arguments.cases)]
    row: dict[str, Any] = {key: round(mean(r[key] for r in rows), 3) for key in rows[0]}
    print(write_row("carry_phantoms", {"n": len(rows), "seed": 1, "reach": REACH, "moved": MOVED, **row}))


def measure(carrier: Carrier, number: int) -> dict[str, float]:
    """Dice and seconds of one phantom."""
    kind, rng = KINDS["thick_slices"], np.random.default_rng([1, number])
    data, label = render(draw_subject(kind, rng), kind, kind.shape)
    image, truth = Image(f"phantom_{number}", data, kind.spacing), label.astype(np.int16)
    before, at = np.roll(truth, MOVED, axis=2), int((truth > 0).sum((1, 2)).argmax())
    edited = before.copy()
    edited[at] = truth[at]
    near = [i for i in range(at - REACH, at + REACH + 1) if i != at and 0 <= i < len(truth)]
    copied = edited.copy()
    copied[near] = truth[at]
    begin = time.process_time()
    first = carrier.carry(image, before, edited, reach=REACH)
    middle = time.process_time()
    again = first.label.copy()
    again[at - 2] = truth[at - 2]
    carrier.carry(image, first.label, again, first.correction, REACH)
    return {
        "dice_before": dice(before[near], truth[near]),
        "dice_copied": dice(copied[near], truth[near]),
        "dice_carried": dice(first.label[near], truth[near]),
        "slices": float(len(truth)),
        "cpu_seconds_first": middle - begin,
        "cpu_seconds_second": time.process_time() - middle,
    }


def dice(found: LabelVolume, truth: LabelVolume) -> float:
    """Mean over the classes that are there."""
    values = [v for v in np.unique(truth) if v]
    return mean(2 * ((found == v) & (truth == v)).sum() / ((found == v).sum() + (truth == v).sum()) for v in values)


if __name__ == "__main__":
    main()
