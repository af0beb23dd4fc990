"""Does `suggest --slices` find a good slice to annotate? Its rank among a volume's slices by the Dice each gives.

    python benchmarks/suggest_slices.py [--sets phantom chaos_mr_t2 acdc_mr hippocampus] [--cases 8]
                                        [--again] [--learn]

Data: $ONESHOT_DATA, or ../shared/data beside the repository; of each set so many pool cases at even distances in the
sorted names, and thick phantoms. Every slice of a volume that shows foreground is annotated in turn and carried from
slice to slice by 2D demons on a grid of 64x64 pixels; its worth is the mean Dice over the volume's classes, on all
slices but itself. The suggested slice sees no label; where it shows no foreground it is worth 0 and ranked last.
Beside it: the slice with the largest foreground area, which reads the truth. True labels are read to carry and to
score. Nothing is random. A finished row, benchmarks/results/suggest_slices_<set>_<cases>.json, is not computed again;
`--again` ranks anew by the worths in it. `--learn` ranks by what a network predicts that learns from the set's pool (or
the phantoms) without labels; its rows take their worths from the others and end in _learn.
"""

from __future__ import annotations

import argparse
from typing import Any

import numpy as np
import SimpleITK as sitk
import torch
import torch.nn.functional as F
from common import markdown, phantom, read_row, write_row
from few_slices import thick
from registration import dice, read_image, read_label, split_of
from suggest import spread
from tqdm import tqdm

from nnunet_oneshot.suggest_features import along, describe
from nnunet_oneshot.suggest_ranking import best_slice
from sam2_propagation.correspondence import CorrespondencePropagator
from sam2_propagation.intensities import scale
from sam2_propagation.interface import Image, LabelVolume
from sam2_propagation.views import present

PHANTOM = "phantom"
SETS = (PHANTOM, "chaos_mr_t2", "acdc_mr", "hippocampus")
PIXELS = 64


def registered(data: np.ndarray, label: LabelVolume, index: int) -> LabelVolume:
    """Carry one slice's label through (N, Y, X) intensities by deforming it from slice to slice.

    The rows are of this. The package's own `carried_through` came later and is better: to be made anew with it.
    """
    out = np.zeros(data.shape, np.int16)
    out[index] = label
    for order in (range(index + 1, len(data)), range(index - 1, -1, -1)):
        for at in order:
            before = at - 1 if order.step > 0 else at + 1
            out[at] = _deformed(data[at], data[before], out[before])
    return out


def _deformed(fixed: np.ndarray, moving: np.ndarray, label: np.ndarray) -> np.ndarray:
    one, other = (sitk.GetImageFromArray(a.astype(np.float32)) for a in (fixed, moving))
    demons = sitk.FastSymmetricForcesDemonsRegistrationFilter()
    demons.SetNumberOfIterations(40)
    demons.SetSmoothDisplacementField(True)
    demons.SetStandardDeviations(2.0)
    field = sitk.Cast(demons.Execute(one, other), sitk.sitkVectorFloat64)
    moved = sitk.Resample(
        sitk.GetImageFromArray(label), one, sitk.DisplacementFieldTransform(field), sitk.sitkNearestNeighbor
    )
    return sitk.GetArrayFromImage(moved)


def read_case(name: str, case: str) -> tuple[Image, LabelVolume]:
    """An image and its true label."""
    if name == PHANTOM:
        made = phantom(thick(16), int(case))
        return made.image, made.label
    return read_image(name, case), read_label(name, case)


def cases_of(name: str, count: int) -> list[str]:
    """So many cases of a set."""
    if name == PHANTOM:
        return [str(number) for number in range(1, count + 1)]
    return spread(split_of(name)["pool"], count)


def small(name: str, case: str, network: CorrespondencePropagator | None) -> tuple[np.ndarray, LabelVolume, int]:
    """Intensities and labels (N, 64, 64) of a volume's slices, and the suggested one."""
    image, truth = read_case(name, case)
    shown = present(image, "identity")
    found = describe(image)
    steps = found.steps if network is None else network.survival(image)
    stored = best_slice(along(steps), found.content)
    seen = torch.from_numpy(np.ascontiguousarray(shown.forward(scale(image))[0], dtype=np.float32))
    label = torch.from_numpy(np.ascontiguousarray(shown.forward(truth), dtype=np.float32))
    pixels = F.interpolate(seen[None], size=(PIXELS, PIXELS), mode="area")[0].numpy()
    labels = F.interpolate(label[None], size=(PIXELS, PIXELS), mode="nearest")[0].numpy().astype(np.int16)
    return pixels, labels, len(labels) - 1 - stored if shown.flips[0] else stored


def taught(name: str, count: int) -> CorrespondencePropagator:
    """A network that has learnt from a set's images."""
    network = CorrespondencePropagator()
    names = cases_of(name, count) if name == PHANTOM else sorted(split_of(name)["pool"])
    network.fit(read_case(name, case)[0] if name == PHANTOM else read_image(name, case) for case in names)
    return network


def run_case(name: str, case: str, worth: dict[int, float], network: CorrespondencePropagator | None) -> dict[str, Any]:
    """Worth of every slice with foreground, found now where it is not given, and where the suggested one stands."""
    pixels, labels, suggested = small(name, case, network)
    classes = [int(value) for value in np.unique(labels) if value]
    shown = np.flatnonzero(labels.any(axis=(1, 2)))
    for index in map(int, () if worth else shown):
        rest = np.arange(len(labels)) != index
        worth[index] = dice(registered(pixels, labels[index], index)[rest], labels[rest], classes)
    largest = max(worth, key=lambda i: int((labels[i] > 0).sum()))
    own = worth.get(suggested, 0.0)
    return {
        "case": case,
        "suggested": suggested,
        "slices": len(labels),
        "with_foreground": len(worth),
        "rank": 1 + sum(value > own for value in worth.values()),
        "dice": round(own, 4),
        "median": round(float(np.median(list(worth.values()))), 4),
        "best": round(max(worth.values()), 4),
        "largest_area": round(worth[largest], 4),
        "worth": {index: round(value, 4) for index, value in worth.items()},
    }


def run_set(name: str, count: int, again: bool, learn: bool) -> dict[str, Any]:
    """One set's row, from its file if it is there; with `again` slices are ranked anew, their worth is kept."""
    plain = f"suggest_slices_{name}_{count}"
    title = f"{plain}_learn" if learn else plain
    row = read_row(title)
    if row is not None and not again:
        return row
    row, network = row or read_row(plain), taught(name, count) if learn else None
    kept = {c["case"]: {int(at): w for at, w in c["worth"].items()} for c in row["cases"]} if row else {}
    cases = [run_case(name, case, kept.get(case, {}), network) for case in tqdm(cases_of(name, count), desc=name)]
    means = {
        key: round(float(np.mean([c[key] for c in cases])), 4) for key in ("dice", "median", "best", "largest_area")
    }
    # 0 is the best slice, 1 the worst; chance is .5.
    place = [(c["rank"] - 1) / max(c["with_foreground"] - 1, 1) for c in cases]
    third = float(np.mean([value <= 1 / 3 for value in place]))
    return write_row(
        title,
        {"set": name, "n": len(cases), **means, "relative_rank": round(float(np.mean(place)), 4)}
        | {"in_best_third": round(third, 4), "cases": cases},
    )


def main() -> None:
    """Fill in what is missing and print the table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--sets", nargs="+", default=list(SETS))
    parser.add_argument("--cases", type=int, default=8)
    parser.add_argument("--again", action="store_true", help="rank anew, from the worth of slices in finished rows")
    parser.add_argument("--learn", action="store_true")
    options = parser.parse_args()
    torch.set_num_threads(1)
    keys = ("n", "dice", "median", "best", "largest_area", "relative_rank", "in_best_third")
    rows = [run_set(name, options.cases, options.again, options.learn) for name in options.sets]
    print(markdown(["set", *keys], [[row["set"], *(row[key] for key in keys)] for row in rows]))


if __name__ == "__main__":
    main()
