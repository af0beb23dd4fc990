"""How good the labels are that `registration` carries: Dice per view and fused, consensus against divergence, time.

    python benchmarks/registration.py [--sets hippocampus chaos_mr_t2 acdc_mr hc18_us] [--annotated default|all]
                                      [--cases N] [-np 2]

Data: $ONESHOT_DATA, or ../shared/data beside the repository; a folder per set with images/, labels/ and split.json.
Each pair of set and annotated case is one row, one small JSON in benchmarks/results/; a finished row is not computed
again (delete its file to repeat it), a row that was interrupted goes on from its last case.

Protocol. One label per row is given to the propagator, that of the annotated case; the labels of the other pool cases
are read for scoring only, after the propagator has returned. Test cases are never read. One set of parameters serves
all data sets; nothing was tuned towards a set by that set's own labels. What was chosen, and how:
- On 6 to 12 pool cases a set, kept because for every set in turn the mean over the OTHER sets asks for the same: demons
  on locally normalised intensities rather than matched ones or gradients, smoothing 1.0 (of 1.0, 1.5, 2.0), penalties
  for moving and stretching, template search on compressed and locally normalised features, the view `information`.
- Without any label: what slides out of the field of view scores less, and unrefined starts compete (registrations
  that the propagator itself called failed were looked into); turns of up to 80 degrees (pictures of hearts, ACDC's
  among them, show that they lie turned in their slices: that is knowledge of the kind of image, from this very set).
- The third view, `edges`, for being unlike the others: `inverse` fused as well on two sets, but folds now and then.
Nothing is drawn at random, so there is no seed.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import time
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import SimpleITK as sitk
from common import RESULTS, data_set, markdown, read_row, write_row
from tqdm import tqdm

from sam2_propagation.consensus import enough_views, fuse
from sam2_propagation.interface import Image, LabelVolume, Support
from sam2_propagation.registration import RegistrationPropagator

SETS = ("hippocampus", "chaos_mr_t2", "acdc_mr", "hc18_us")
VIEWS = RegistrationPropagator.default_views


def split_of(name: str) -> dict[str, Any]:
    """split.json of a set."""
    return data_set(name).split


def _file(name: str, kind: str, case: str) -> Path:
    return next((data_set(name).folder / kind).glob(f"{case}.*"))


def read_image(name: str, case: str) -> Image:
    """The image of a case; a 2D one gets Z = 1 and spacing 1."""
    image = sitk.ReadImage(str(_file(name, "images", case)))
    array = sitk.GetArrayFromImage(image).astype(np.float32)
    if image.GetDimension() == 2:
        return Image(case, array[None, None])
    return Image(case, array[None], image.GetSpacing()[::-1], image.GetOrigin(), image.GetDirection())


def read_label(name: str, case: str) -> LabelVolume:
    """int16 (Z, Y, X); where there is one class its value in the file (255 in PNG) becomes 1."""
    array = sitk.GetArrayFromImage(sitk.ReadImage(str(_file(name, "labels", case)))).astype(np.int16)
    array = array[None] if array.ndim == 2 else array
    return (array > 0).astype(np.int16) if len(split_of(name)["labels"]) == 2 else array


def dice(label: LabelVolume, truth: LabelVolume, classes: Sequence[int]) -> float:
    """Mean over the classes that are in either; one that is in only one of them counts 0."""
    found = [(label == value, truth == value) for value in classes]
    return float(np.mean([2 * (a & b).sum() / (a.sum() + b.sum()) for a, b in found if a.any() or b.any()]))


def score_case(task: tuple[str, str, str]) -> dict[str, Any]:
    """Propagate to one case, then read its truth and score.

    Args:
        task: data set, annotated case, query case.
    """
    name, annotated, case = task
    support, query = _support(name, annotated), read_image(name, case)
    wall, cpu = time.perf_counter(), time.process_time()
    results = list(RegistrationPropagator(threads=1).propagate([support], [query], VIEWS))
    seconds = {"wall": time.perf_counter() - wall, "cpu": time.process_time() - cpu}
    truth = read_label(name, case)
    classes = [value for value in split_of(name)["labels"].values() if value]
    labels = {r.view: r.label for r in results if r.label is not None}
    return {
        "case": case,
        "seconds": seconds,
        "reasons": {r.view: r.reason for r in results if r.reason},
        "dice": {view: dice(labels[view], truth, classes) if view in labels else 0.0 for view in VIEWS},
        **fused_figures(list(labels.values()), truth, classes, query.spacing),
    }


@cache
def _support(name: str, annotated: str) -> Support:
    return Support(read_image(name, annotated), read_label(name, annotated))


def fused_figures(
    labels: list[LabelVolume], truth: LabelVolume, classes: Sequence[int], spacing: tuple[float, float, float]
) -> dict[str, Any]:
    """Dice of the fused label and how many voxels are right inside consensus and divergence; 0 without labels."""
    if not enough_views(len(labels), len(VIEWS)):  # as the consensus stage leaves such a case out
        return {"fused": 0.0, "per_class": {str(c): 0.0 for c in classes}, "voxels": None}
    fused = fuse(labels, spacing=spacing)
    right, agreed = fused.label == truth, fused.agreed
    counts = {"consensus": agreed.sum(), "consensus_right": right[agreed].sum()}
    counts |= {"divergence": (~agreed).sum(), "divergence_right": right[~agreed].sum()}
    return {
        "fused": dice(fused.label, truth, classes),
        "per_class": {
            str(c): dice(fused.label, truth, [c]) for c in classes if ((fused.label == c) | (truth == c)).any()
        },
        "voxels": {key: int(value) for key, value in counts.items()},
    }


def run_row(name: str, annotated: str, limit: int | None, processes: int) -> dict[str, Any]:
    """One row of the table, from its file if it is there."""
    row = f"registration_{name}_{annotated}{f'_first{limit}' if limit else ''}"
    done = read_row(row)
    if done is not None:
        return done
    RESULTS.mkdir(exist_ok=True)
    partial = RESULTS / f"{row}.partial"
    cases = [case for case in split_of(name)["pool"] if case != annotated][:limit]
    done = write_row(row, summary(name, annotated, _scored(partial, name, annotated, cases, processes), processes))
    partial.unlink()
    return done


def _scored(partial: Path, name: str, annotated: str, cases: list[str], processes: int) -> list[dict[str, Any]]:
    """Every case's figures, in the order of `cases`; each is appended to `partial` as soon as it is there."""
    lines = partial.read_text(encoding="utf-8").splitlines() if partial.exists() else []
    done = {entry["case"]: entry for entry in map(json.loads, lines)}
    tasks = [(name, annotated, case) for case in cases if case not in done]
    context = multiprocessing.get_context("spawn")
    with context.Pool(processes) as pool, partial.open("a", encoding="utf-8") as file:
        for entry in tqdm(pool.imap_unordered(score_case, tasks), f"{name} {annotated}", len(tasks)):
            file.write(json.dumps(entry) + "\n")
            file.flush()
            done[entry["case"]] = entry
    return [done[case] for case in cases]


def summary(name: str, annotated: str, entries: list[dict[str, Any]], processes: int) -> dict[str, Any]:
    """Means over cases (a failed view counts 0); voxel shares are pooled over the cases."""
    classes = sorted({value for entry in entries for value in entry["per_class"]})
    return {
        "set": name,
        "annotated": annotated,
        "n": len(entries),
        "views": {view: float(np.mean([e["dice"][view] for e in entries])) for view in VIEWS},
        "fused": float(np.mean([e["fused"] for e in entries])),
        "per_class": {c: float(np.mean([e["per_class"][c] for e in entries if c in e["per_class"]])) for c in classes},
        **voxel_shares([entry["voxels"] for entry in entries if entry["voxels"]]),
        "wholly_missed": sum(e["fused"] < 0.1 for e in entries),
        "failed": {e["case"]: e["reasons"] for e in entries if e["reasons"]},
        "median_seconds": {kind: float(np.median([e["seconds"][kind] for e in entries])) for kind in ("wall", "cpu")},
        "processes": processes,
        "seed": None,
        "fused_per_case": {e["case"]: round(e["fused"], 4) for e in entries},
    }


def voxel_shares(voxels: list[dict[str, int]]) -> dict[str, float]:
    """Accuracy inside consensus and inside divergence and divergence's share, pooled; nothing without cases."""
    if not voxels:
        return {}
    total = {key: sum(v[key] for v in voxels) for key in voxels[0]}
    return {
        "accuracy_in_consensus": total["consensus_right"] / max(total["consensus"], 1),
        "accuracy_in_divergence": total["divergence_right"] / max(total["divergence"], 1),
        "divergence": total["divergence"] / (total["divergence"] + total["consensus"]),
    }


def table(rows: list[dict[str, Any]]) -> str:
    """Markdown."""
    shares = ("accuracy_in_consensus", "accuracy_in_divergence", "divergence")
    head = ["set", "annotated", "n", *VIEWS, "fused", "accuracy in consensus", "in divergence", "divergence"]
    head += ["views failed", "wholly missed", "median s a case (CPU / wall)"]
    lines = []
    for row in rows:
        figures = [*(row["views"][view] for view in VIEWS), row["fused"]]
        figures += [row.get(key, float("nan")) for key in shares]
        seconds = " / ".join(f"{row['median_seconds'][kind]:.1f}" for kind in ("cpu", "wall"))
        failed = sum(map(len, row["failed"].values()))
        cells = [row["set"], row["annotated"], row["n"], *(f"{figure:.3f}" for figure in figures)]
        lines.append([*cells, failed, row["wholly_missed"], seconds])
    return markdown(head, lines)


def main() -> None:
    parser = argparse.ArgumentParser(description="labels carried by registration, measured on real data")
    parser.add_argument("--sets", nargs="+", choices=SETS, default=list(SETS))
    parser.add_argument("--annotated", choices=("default", "all"), default="default", help="one choice a set, or all")
    parser.add_argument("--cases", type=int, help="only the first N pool cases of each set")
    parser.add_argument("-np", type=int, default=2, help="processes, each of one thread")
    arguments = parser.parse_args()
    rows = []
    for name in arguments.sets:
        split = split_of(name)
        choices = [split["annotated_default"]] if arguments.annotated == "default" else split["annotated_choices"]
        rows += [run_row(name, annotated, arguments.cases, arguments.np) for annotated in choices]
    print(table(rows))
    print("\n" + "; ".join(sorted({row["hardware"] for row in rows})), "; nothing random;", rows[-1]["versions"])


if __name__ == "__main__":
    main()
