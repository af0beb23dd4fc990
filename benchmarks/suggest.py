"""Does `suggest` find a good case to annotate? Its choice's rank among candidates by the Dice that each gives others.

    python benchmarks/suggest.py [--sets chaos_mr_t2 acdc_mr hippocampus] [--candidates 24] [--queries 24]

Data: $ONESHOT_DATA, or ../shared/data beside the repository. The `registration` propagator takes seconds a pair, and
the hippocampus pool alone has 22,350 pairs. So labels are carried by a small registration instead: every volume upright
on a grid of 16x48x48, demons in two levels, scored on that grid; and where the pool is larger than asked for,
candidates and queries are subsets at even distances in its sorted names. Features, and the coverage that ranks the
candidates, are of ALL pool images. A candidate's worth is the mean foreground Dice of its label over the queries other
than itself. True labels are read to carry them from each candidate in turn and to score; no feature sees one. For each
set the feature that is best on the OTHER sets is named (leave one set out). Nothing is random. A finished row,
benchmarks/results/suggest_<set>.json, is not computed again.
"""

from __future__ import annotations

import argparse
import json
from typing import Any

import numpy as np
import numpy.typing as npt
import SimpleITK as sitk
import torch
import torch.nn.functional as F
from common import RESULTS, markdown, read_row, write_row
from registration import dice, read_image, read_label, split_of
from scipy.stats import spearmanr
from tqdm import tqdm

from nnunet_oneshot.suggest_features import FEATURES, alike, describe, normalised
from nnunet_oneshot.suggest_ranking import rank
from sam2_propagation.checkpoints import load_checkpoint
from sam2_propagation.embeddings import Encoder
from sam2_propagation.intensities import ImageSlices, scale
from sam2_propagation.interface import Image
from sam2_propagation.views import present

SETS = ("chaos_mr_t2", "acdc_mr", "hippocampus")
GRID = (16, 48, 48)
"""Slices, rows and columns of the volumes that are registered."""
SLICES = 8
"""Slices of each volume that SAM2 encodes, at even distances."""

Pairs = dict[str, dict[str, float]]
"""Dice of a query (inner key) labelled from a candidate (outer key)."""


def spread(pool: list[str], count: int) -> list[str]:
    """So many of the pool at even distances in its sorted names."""
    names = sorted(pool)
    return [names[i] for i in sorted({round(float(i)) for i in np.linspace(0, len(names) - 1, min(count, len(names)))})]


def small(name: str, case: str) -> tuple[sitk.Image, npt.NDArray[np.float32]]:
    """A case on the small grid: intensities, and shares of each class, background first, (K, Z, Y, X)."""
    image, truth = read_image(name, case), read_label(name, case)
    shown = present(image, "identity")
    seen, label = shown.forward(scale(image))[0], shown.forward(truth)
    masks = [label == value for value in sorted(split_of(name)["labels"].values())]
    shares = np.stack([_zoomed(mask.astype(np.float32)) for mask in masks])
    return sitk.GetImageFromArray(_zoomed(seen)), shares


def _zoomed(volume: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
    grid = torch.from_numpy(np.ascontiguousarray(volume))[None, None]
    return F.interpolate(grid, size=GRID, mode="trilinear")[0, 0].numpy()


def carried(fixed: sitk.Image, moving: sitk.Image, shares: npt.NDArray[np.float32]) -> npt.NDArray[np.intp]:
    """The moving volume's label on the fixed one, after two levels of demons."""
    matched = sitk.HistogramMatching(moving, fixed, 128, 7)
    field = sitk.Image(fixed.GetSize(), sitk.sitkVectorFloat64)
    for factor, steps in ((2, 40), (1, 20)):
        grid = sitk.Shrink(fixed, [factor] * 3)
        demons = sitk.FastSymmetricForcesDemonsRegistrationFilter()
        demons.SetNumberOfIterations(steps)
        demons.SetSmoothDisplacementField(True)
        demons.SetStandardDeviations(1.5 * factor)
        start = sitk.Resample(field, grid)
        field = sitk.Resample(demons.Execute(grid, sitk.Shrink(matched, [factor] * 3), start), fixed)
    move = sitk.DisplacementFieldTransform(field)
    maps = [sitk.Resample(sitk.GetImageFromArray(share), fixed, move) for share in shares[1:]]
    found = np.stack([sitk.GetArrayFromImage(m) for m in maps])
    return np.concatenate([1 - found.sum(axis=0, keepdims=True), found]).argmax(axis=0)


def carried_pairs(name: str, candidates: list[str], queries: list[str]) -> Pairs:
    """Dice of every pair of a candidate and another case; candidates of an interrupted run are not done again."""
    path = RESULTS / f"suggest_{name}.partial"
    pairs: Pairs = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    cases = {case: small(name, case) for case in dict.fromkeys([*candidates, *queries])}
    classes = [value for value in split_of(name)["labels"].values() if value]
    for candidate in tqdm([c for c in candidates if set(pairs.get(c, [])) < {*queries} - {c}], desc=name):
        moving, shares = cases[candidate]
        for query in queries:
            if query != candidate:
                label = carried(cases[query][0], moving, shares).astype(np.int16)
                score = dice(label, cases[query][1].argmax(axis=0).astype(np.int16), classes)
                pairs.setdefault(candidate, {})[query] = round(score, 4)
        path.write_text(json.dumps(pairs), encoding="utf-8")
    return {candidate: pairs[candidate] for candidate in candidates}


def case_vectors(name: str, pool: list[str]) -> dict[str, npt.NDArray[np.float32]]:
    """(N, D) of every pool image, for each kind of feature."""
    images = [read_image(name, case) for case in pool]
    vectors = {kind: np.stack([describe(image, kind).whole for image in images]) for kind in FEATURES}
    return {**vectors, "sam2": sam2_vectors(images)}


def sam2_vectors(images: list[Image]) -> npt.NDArray[np.float32]:
    """(N, D) of the built-in SAM2 encoder, a few slices of each volume."""
    loaded = load_checkpoint("builtin")
    encoder = Encoder(loaded.model)
    rows = []
    for image in images:
        seen = present(image, "identity").forward(scale(image))
        at = np.linspace(0, seen.shape[1] - 1, SLICES).round().astype(int)
        rows.append(encoder.encode(ImageSlices(seen[:, at], loaded.image_size)).descriptors().numpy().ravel())
    return normalised(np.stack(rows))


def figures(pairs: Pairs, pool: list[str], vectors: npt.NDArray[np.float32], queries: list[str]) -> dict[str, Any]:
    """Rank of the suggested candidate (1 is best), its gain over the median, and the correlation over candidates."""
    candidates = sorted(pairs)
    worth = {c: float(np.mean([pairs[c][q] for q in queries if q != c])) for c in candidates}
    ranking = rank(alike(vectors, vectors), [pool.index(c) for c in candidates], len(candidates))
    suggested = pool[ranking[0][0]]
    mean = alike(vectors, vectors).mean(axis=0)
    return {
        "suggested": suggested,
        "rank": 1 + sum(value > worth[suggested] for value in worth.values()),
        "candidates": len(candidates),
        "dice": round(worth[suggested], 4),
        "gain_over_median": round(worth[suggested] - float(np.median(list(worth.values()))), 4),
        "best": round(max(worth.values()), 4),
        "spearman": round(float(spearmanr([mean[pool.index(c)] for c in candidates], list(worth.values()))[0]), 3),
    }


def run_set(name: str, candidates: int, queries: int) -> dict[str, Any]:
    """One data set's row: figures by feature."""
    if (row := read_row(f"suggest_{name}")) is not None:
        return row
    pool = sorted(split_of(name)["pool"])
    chosen, asked = spread(pool, candidates), spread(pool, queries)
    pairs = carried_pairs(name, chosen, asked)
    vectors = case_vectors(name, pool)
    found = {kind: figures(pairs, pool, v, asked) for kind, v in vectors.items()}
    (RESULTS / f"suggest_{name}.partial").unlink()
    return write_row(f"suggest_{name}", {"set": name, "pool": len(pool), "queries": len(asked), "features": found})


def left_out(rows: dict[str, dict[str, Any]]) -> dict[str, str]:
    """For each set the feature of the best mean relative rank on the other sets (ties: of the larger gain)."""

    def merit(kind: str, without: str) -> tuple[float, float]:
        others = [row["features"][kind] for name, row in rows.items() if name != without]
        ranks = [(o["rank"] - 1) / max(o["candidates"] - 1, 1) for o in others]
        return -float(np.mean(ranks)), float(np.mean([o["gain_over_median"] for o in others]))

    kinds = next(iter(rows.values()))["features"]
    return {name: max(kinds, key=lambda kind: merit(kind, name)) for name in rows}


def main() -> None:
    """Fill in what is missing and print the table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--sets", nargs="+", default=list(SETS))
    parser.add_argument("--candidates", type=int, default=24)
    parser.add_argument("--queries", type=int, default=24)
    options = parser.parse_args()
    rows = {name: run_set(name, options.candidates, options.queries) for name in options.sets}
    header = ["set", "feature", "suggested", "rank", "Dice", "over median", "best", "Spearman"]
    keys = ("dice", "gain_over_median", "best", "spearman")
    cells = [
        [name, kind, f["suggested"], f"{f['rank']} of {f['candidates']}", *(f[key] for key in keys)]
        for name, row in rows.items()
        for kind, f in row["features"].items()
    ]
    print(markdown(header, cells))
    if len(rows) > 1:
        print("chosen by the other sets:", left_out(rows))


if __name__ == "__main__":
    main()
