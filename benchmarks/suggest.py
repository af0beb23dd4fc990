"""Does `suggest` find a good case to annotate? Its choice's rank among all cases by the Dice that each gives others.

    python benchmarks/suggest.py [--sets thick_slices isotropic chaos_mr_t2 acdc_mr hippocampus] [--queries 24]

Data: 24 phantoms a kind, and $ONESHOT_DATA, or ../shared/data beside the repository. Every pool case in turn is the
annotated one. The `registration` propagator takes seconds a pair, and the hippocampus pool alone has 22,350 pairs. So
labels are carried by a small registration instead: every volume upright on a grid of 16x48x48, demons in two levels,
scored on that grid; and where the pool is larger than asked for, queries are a subset at even distances in its sorted
names. A case's worth is the mean foreground Dice of its label over the queries other than itself.

Features are vectors of how an image looks; "edges" are the default. "registered" is how alike images are after that
same registration, for up to 24 cases that stand for the set and are chosen by "both"; it tells a case's worth best,
takes far longer, and suggested no better cases. True labels are read to carry them from each case in turn
and to score; no feature sees one. For each set the feature that is best on the OTHER sets is named (leave one set out),
by the correlation with worth over cases and by the suggested case's rank. Nothing is random. A finished row,
benchmarks/results/suggest_<set>.json, is not computed again.
"""

from __future__ import annotations

import argparse
import json
from itertools import combinations
from typing import Any

import numpy as np
import numpy.typing as npt
import SimpleITK as sitk
from common import RESULTS, markdown, phantom, read_row, write_row
from registration import dice, read_image, read_label, split_of
from scipy.stats import spearmanr
from suggest_registered import both_ways, reached, registered, small_grid, standing, zoomed
from tqdm import tqdm

from nnunet_oneshot.phantom import KINDS, LABELS
from nnunet_oneshot.suggest_features import FEATURES, alike, describe, normalised
from nnunet_oneshot.suggest_ranking import Scores, rank
from sam2_propagation.checkpoints import load_checkpoint
from sam2_propagation.embeddings import Encoder
from sam2_propagation.intensities import ImageSlices, scale
from sam2_propagation.interface import Image, LabelVolume
from sam2_propagation.views import present

SETS = ("thick_slices", "isotropic", "chaos_mr_t2", "acdc_mr", "hippocampus")
REGISTERED = "registered"
SLICES = 8
"""Slices of each volume that SAM2 encodes, at even distances."""

PHANTOMS = [f"phantom_{number:03d}" for number in range(1, 25)]

Pairs = dict[str, dict[str, float]]
"""Dice of a query (inner key) labelled from a candidate (outer key)."""


def spread(pool: list[str], count: int) -> list[str]:
    """So many of the pool at even distances in its sorted names."""
    names = sorted(pool)
    return [names[i] for i in sorted({round(float(i)) for i in np.linspace(0, len(names) - 1, min(count, len(names)))})]


def _image(name: str, case: str) -> Image:
    return phantom(KINDS[name], int(case[-3:])).image if name in KINDS else read_image(name, case)


def _label(name: str, case: str) -> LabelVolume:
    return phantom(KINDS[name], int(case[-3:])).label if name in KINDS else read_label(name, case)


def _values(name: str) -> list[int]:
    """Of all labels, background first."""
    return sorted((LABELS if name in KINDS else split_of(name)["labels"]).values())


def small(name: str, case: str) -> tuple[sitk.Image, npt.NDArray[np.float32]]:
    """A case on the small grid: its image, and shares of each class, background first, (K, Z, Y, X)."""
    image, truth = _image(name, case), _label(name, case)
    label = present(image, "identity").forward(truth)
    masks = [label == value for value in _values(name)]
    return small_grid(image), np.stack([zoomed(mask.astype(np.float32)) for mask in masks])


def carried(fixed: sitk.Image, moving: sitk.Image, shares: npt.NDArray[np.float32]) -> npt.NDArray[np.intp]:
    """The moving volume's label on the fixed one."""
    move, _ = registered(fixed, moving)
    maps = [sitk.Resample(sitk.GetImageFromArray(share), fixed, move) for share in shares[1:]]
    found = np.stack([sitk.GetArrayFromImage(m) for m in maps])
    return np.concatenate([1 - found.sum(axis=0, keepdims=True), found]).argmax(axis=0)


def carried_pairs(name: str, candidates: list[str], queries: list[str]) -> Pairs:
    """Dice of every pair of a candidate and another case; candidates of an interrupted run are not done again."""
    path = RESULTS / f"suggest_{name}.partial"
    pairs: Pairs = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    cases = {case: small(name, case) for case in dict.fromkeys([*candidates, *queries])}
    classes = [value for value in _values(name) if value]
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
    images = [_image(name, case) for case in pool]
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


def foretold(name: str, pool: list[str], vectors: npt.NDArray[np.float32]) -> tuple[str, dict[str, float]]:
    """The suggested case, and how well each of those that stand for the set is foretold to do, by registration."""
    few = standing(alike(vectors, vectors))
    images = [small_grid(_image(name, pool[at])) for at in few.cases]
    likeness: Scores = np.zeros((len(images), len(images)))
    for i, j in tqdm([*combinations(range(len(images)), 2)], desc=f"{name} likeness"):
        likeness[i, j] = likeness[j, i] = both_ways(images, (i, j))
    merit = reached(likeness, few)
    ((best, _),) = rank(merit, range(len(images)), 1, weights=few.weight)
    expected = few.weight @ merit / few.weight.sum()
    return pool[few.cases[best]], {pool[at]: float(value) for at, value in zip(few.cases, expected, strict=True)}


def figures(worth: dict[str, float], suggested: str, expected: dict[str, float]) -> dict[str, Any]:
    """Rank of the suggested case (1 is best), its gain over the median, and the correlation over cases."""
    return {
        "suggested": suggested,
        "rank": 1 + sum(value > worth[suggested] for value in worth.values()),
        "candidates": len(worth),
        "dice": round(worth[suggested], 4),
        "gain_over_median": round(worth[suggested] - float(np.median(list(worth.values()))), 4),
        "best": round(max(worth.values()), 4),
        "spearman": round(float(spearmanr(list(expected.values()), [worth[case] for case in expected])[0]), 3),
        "spearman_over": len(expected),
    }


def run_set(name: str, queries: int) -> dict[str, Any]:
    """One data set's row: figures by feature."""
    if (row := read_row(f"suggest_{name}")) is not None:
        return row
    pool = PHANTOMS if name in KINDS else sorted(split_of(name)["pool"])
    asked = spread(pool, queries)
    pairs = carried_pairs(name, pool, asked)
    worth = {c: float(np.mean([pairs[c][q] for q in asked if q != c])) for c in pool}
    vectors, found = case_vectors(name, pool), {}
    for kind, own in vectors.items():
        likeness = alike(own, own)
        best = rank(likeness, range(len(pool)), 1)[0][0]
        found[kind] = figures(worth, pool[best], dict(zip(pool, likeness.mean(axis=0).tolist(), strict=True)))
    found[REGISTERED] = figures(worth, *foretold(name, pool, vectors["both"]))
    row = write_row(f"suggest_{name}", {"set": name, "pool": len(pool), "queries": len(asked), "features": found})
    (RESULTS / f"suggest_{name}.partial").unlink()
    return row


def left_out(rows: dict[str, dict[str, Any]], by: str) -> dict[str, str]:
    """For each set the feature of the best mean correlation, or mean relative rank, on the other sets."""

    def merit(kind: str, without: str) -> float:
        others = [row["features"][kind] for name, row in rows.items() if name != without]
        if by == "spearman":
            return float(np.mean([o["spearman"] for o in others]))
        return -float(np.mean([(o["rank"] - 1) / max(o["candidates"] - 1, 1) for o in others]))

    kinds = next(iter(rows.values()))["features"]
    return {name: max(kinds, key=lambda kind: merit(kind, name)) for name in rows}


def main() -> None:
    """Fill in what is missing and print the table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--sets", nargs="+", default=list(SETS))
    parser.add_argument("--queries", type=int, default=24)
    options = parser.parse_args()
    rows = {name: run_set(name, options.queries) for name in options.sets}
    header = ["set", "feature", "suggested", "rank", "Dice", "over median", "best", "Spearman"]
    keys = ("dice", "gain_over_median", "best", "spearman")
    cells = [
        [name, kind, f["suggested"], f"{f['rank']} of {f['candidates']}", *(f[key] for key in keys)]
        for name, row in rows.items()
        for kind, f in row["features"].items()
    ]
    print(markdown(header, cells))
    if len(rows) > 1:
        for by in ("spearman", "rank"):
            print(f"chosen by the other sets, {by}:", left_out(rows, by))


if __name__ == "__main__":
    main()
