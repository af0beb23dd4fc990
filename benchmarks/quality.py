"""Estimated quality: learnt on phantoms, measured on real sets.

    python benchmarks/quality.py learn -o WORK             # writes nnunet_oneshot/quality_rules.py
    python benchmarks/quality.py measure -o WORK --set chaos_mr_t2 [--cases 9]
    python benchmarks/quality.py measure -o WORK --set hippocampus -d 601 --raw RAW [--preprocessed DIR]

`learn` makes phantom sets of three kinds, some of whose images are inverted, made noisy or strongly gamma-changed,
propagates the annotated case's label by registration, carries the result back to the annotated case, trains a tiny
model on it and predicts with it (minutes on two cores; --train names the sets that this is done for). Every class of
every label, with its evidence and true Dice, is a row; the rules are fitted to the rows. No real image takes part.
`measure` propagates a few cases of a real set, or takes a data set that was made before, and compares the estimates
with the true Dice: Spearman's rho over cases and over classes, and the mean absolute error. Nothing is chosen by what
it prints.
"""

from __future__ import annotations

import argparse
import json
import os
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import SimpleITK as sitk
from common import REPOSITORY, data_set, lay_out, markdown, use_folders, write_row
from scipy.optimize import least_squares
from scipy.stats import spearmanr
from skimage import io

from nnunet_oneshot import nnunet
from nnunet_oneshot.dataset import RawDataset
from nnunet_oneshot.phantom import write_phantom_dataset
from nnunet_oneshot.propagate import propagate
from nnunet_oneshot.propagators import PropagatorOptions
from nnunet_oneshot.quality import (
    CHANGE,
    KINDS,
    REVERSE,
    Opinions,
    by_source,
    dice_by_class,
    estimate,
    gather,
    logit,
    reverse_dice,
    rule_for,
)
from nnunet_oneshot.quality_opinions import view_scores
from nnunet_oneshot.refine import open_store
from nnunet_oneshot.settings import PRESETS
from nnunet_oneshot.store import Store
from sam2_propagation.registration import RegistrationPropagator

PHANTOMS = {
    "thick_slices": ((12, 72, 72), 0, "3d_fullres"),
    "isotropic": ((36, 44, 44), 1, "3d_fullres"),
    "rgb2d": ((1, 128, 128), 2, "2d"),
}
"""Shape, seed and configuration of each kind."""
RULES_FILE = REPOSITORY / "nnunet_oneshot" / "quality_rules.py"
TRAINER = PRESETS["tiny"].trainer()
Row = dict[str, Any]


def main() -> None:
    """Learn or measure."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("learn", "measure"))
    parser.add_argument("-o", type=Path, required=True, help="working folder")
    parser.add_argument("--cases", type=int, default=14, help="cases of a phantom set, or of a real set's pool")
    parser.add_argument(
        "--train",
        nargs="*",
        default=list(PHANTOMS),
        choices=list(PHANTOMS),
        help="phantom sets that a model is made of",
    )
    parser.add_argument("--set", help="real set to measure on")
    parser.add_argument("-d", help="id of a pseudo-label dataset of that set that exists")
    parser.add_argument("--raw", type=Path, help="its nnUNet_raw")
    arguments = parser.parse_args()
    use_folders(arguments.o)
    print(learn(arguments) if arguments.what == "learn" else measure(arguments))


# --- learning -----------------------------------------------------------------------------------------------------


def learn(arguments: argparse.Namespace) -> str:
    """Collect rows of every phantom set, fit the rules, write them; returns a table of their errors."""
    rows = [row for kind in PHANTOMS for row in phantom_rows(arguments, kind)]
    rules = {kinds: fit(rows, kinds) for kinds in kind_sets(rows)}
    write_rules(rules)
    table = [[" ".join(kinds), *errors(rows, kinds)] for kinds in rules]
    about = {"cases": arguments.cases, "seed": "0, 1, 2 by kind", "trained": arguments.train, "rows": len(rows)}
    write_row("quality_rules", {**about, "table": table})
    header = ["evidence", "rows", "mean absolute error", "the same, case left out", "rho, case left out"]
    return markdown(header, table)


def phantom_rows(arguments: argparse.Namespace, kind: str) -> list[Row]:
    """Evidence and true Dice of every label of one phantom set; kept in the working folder."""
    kept = arguments.o / f"rows_{kind}.json"
    if kept.is_file():
        return json.loads(kept.read_text(encoding="utf-8"))
    number = 920 + list(PHANTOMS).index(kind)
    shape, seed, configuration = PHANTOMS[kind]
    truth, folder = arguments.o / f"truth_{kind}", nnunet.root("nnUNet_raw") / f"Dataset{number}_{kind}"
    if not folder.is_dir():
        write_phantom_dataset(
            folder.parent, number, kind, truth=truth, cases=arguments.cases, shape=shape, seed=seed, kind=kind
        )
        spoil(folder, seed)
    output = number + 10
    if not list(folder.parent.glob(f"Dataset{output}_*/oneshot.json")):
        propagate(number, output, num_processes=1)
    store, raw = open_store(output)
    said = arguments.o / f"predictions_{kind}"
    predictions = train_and_predict(store, raw, configuration, said) if kind in arguments.train else None
    rows = list(case_rows(store, raw, truth, predictions, kind, reverse=True))
    kept.write_text(json.dumps(rows), encoding="utf-8")
    return rows


def spoil(folder: Path, seed: int) -> None:
    """Invert, gamma-change or add noise to three of every six un-annotated images."""
    rng = np.random.default_rng(seed)
    for index, path in enumerate(sorted((folder / "imagesTr").iterdir())[1:]):
        if index % 6 > 2:
            continue
        png = path.suffix == ".png"
        image = None if png else sitk.ReadImage(str(path))
        data = io.imread(path).astype(float) if png else sitk.GetArrayFromImage(image).astype(float)
        top = np.percentile(data, 99.5)
        inside = (data / top).clip(0, 1)
        data = (1 - inside, inside**2.5, inside + rng.normal(0, 0.12, data.shape))[index % 6].clip(0, 1) * top
        if png:
            io.imsave(path, data.astype(np.uint8), check_contrast=False)
            continue
        spoiled = sitk.GetImageFromArray(data.astype(np.int16))
        spoiled.CopyInformation(image)
        sitk.WriteImage(spoiled, str(path), True)


def train_and_predict(store: Store, raw: RawDataset, configuration: str, predictions: Path) -> Path:
    """A tiny model trained on round 0's labels, and what it says of the un-annotated cases."""
    name, plans = store.folder.name, PRESETS["tiny"].plans
    nnunet.plan_and_preprocess(name, PRESETS["tiny"], [configuration], 1)
    nnunet.train(name, configuration, "all", TRAINER, plans, "cpu")
    images = {case.name: case.images for case in raw.unannotated}
    nnunet.predict(name, configuration, ["all"], TRAINER, plans, images, predictions, "cpu")
    return predictions


def case_rows(
    store: Store, raw: RawDataset, truth: Path, predictions: Path | None, kind: str, reverse: bool
) -> Iterator[Row]:
    """Rows of all un-annotated cases: round 0, and round 1 where there are predictions."""
    manifest, propagator = store.read_manifest(), RegistrationPropagator()
    support = raw.support(raw.annotated[0])
    for case in raw.unannotated:
        record, true = manifest.cases[case.name], raw.read_label(truth / f"{case.name}{raw.file_ending}")
        views = views_of(store, raw, record.views, case.name)
        if not views:
            continue
        fused = raw.read_label(store.round_path(0, case.name))
        scores = view_scores(store, record.views, case.name)
        if reverse:
            view = propagator.default_views[0]
            scores = [reverse_dice(propagator, support, raw.read_image(case), fused, view)]
        yield from rows_of(fused, true, Opinions(views, None, scores), {"set": kind, "case": case.name, "round": 0})
        if predictions is not None:
            said = raw.read_label(predictions / f"{case.name}{raw.file_ending}")
            more = {"set": kind, "case": case.name, "round": 1}
            yield from rows_of(said, true, Opinions(views, fused, scores), more)


def views_of(store: Store, raw: RawDataset, names: Sequence[str], case: str) -> dict[str, list[np.ndarray]]:
    """Labels of all views of one case, by source."""
    paths = [store.view_path(*name.split("/", 1), case) for name in names]
    return by_source(names, [raw.read_label(path) for path in paths])


def rows_of(label: np.ndarray, true: np.ndarray, opinions: Opinions, common: Row) -> Iterator[Row]:
    """One row a class that either label shows."""
    evidence = gather(label, opinions)
    estimated = estimate(label, opinions) or {}
    for value, dice in dice_by_class(label, true, range(1, int(true.max(initial=0)) + 1)).items():
        known = {k: round(agreements[value], 4) for k, agreements in evidence.items() if value in agreements}
        if known:
            found = {"evidence": known, "dice": round(dice, 4), "estimate": estimated.get(str(value))}
            yield {**common, "class": value, **found}


def kind_sets(rows: Sequence[Row]) -> list[tuple[str, ...]]:
    """Sets of kinds of evidence that occur together in at least 20 rows."""
    sets = [kinds for n in range(1, len(KINDS) + 1) for kinds in combinations(KINDS, n)]
    return [kinds for kinds in sets if len(fitting(rows, kinds)) >= 20]


def fitting(rows: Sequence[Row], kinds: Sequence[str]) -> list[Row]:
    """Rows that a rule for these kinds is for: in round 0 nothing is known of a change."""
    chosen = [row for row in rows if set(kinds) <= set(row["evidence"])]
    return [row for row in chosen if (CHANGE in kinds) == (row["round"] > 0)]


def fit(rows: Sequence[Row], kinds: Sequence[str]) -> tuple[float, ...]:
    """Bias and weights, none of them negative, by least squares of the Dice."""
    chosen = fitting(rows, kinds)
    inputs = np.array([[logit(row["evidence"][kind]) for kind in kinds] for row in chosen])
    dice = np.array([row["dice"] for row in chosen])

    def residuals(parameters: np.ndarray) -> np.ndarray:
        return 1 / (1 + np.exp(-(parameters[0] + inputs @ parameters[1:]))) - dice

    start = np.array([0.0, *[1 / len(kinds)] * len(kinds)])
    bounds = ([-10, *[0] * len(kinds)], [10, *[5] * len(kinds)])
    solved = least_squares(residuals, start, bounds=bounds, loss="soft_l1", f_scale=0.1)
    return tuple(round(float(p), 3) for p in solved.x)


def errors(rows: Sequence[Row], kinds: Sequence[str]) -> list[Any]:
    """Rows, mean absolute error of the rule on them, the same by rules learnt without the row's case, and rho."""
    chosen = fitting(rows, kinds)
    rule, without = fit(rows, kinds), {}
    for case in {(row["set"], row["case"]) for row in chosen}:
        without[case] = fit([row for row in rows if (row["set"], row["case"]) != case], kinds)
    inside = np.array([predicted(rule, kinds, row) for row in chosen])
    left_out = np.array([predicted(without[row["set"], row["case"]], kinds, row) for row in chosen])
    true = np.array([row["dice"] for row in chosen])
    mae = [f"{np.abs(guess - true).mean():.3f}" for guess in (inside, left_out)]
    return [len(chosen), *mae, f"{spearmanr(left_out, true).statistic:.2f}"]


def predicted(parameters: Sequence[float], kinds: Sequence[str], row: Row) -> float:
    """What a rule says of a row."""
    total = parameters[0] + sum(w * logit(row["evidence"][k]) for w, k in zip(parameters[1:], kinds, strict=True))
    return float(1 / (1 + np.exp(-total)))


def key_of(kinds: Sequence[str]) -> str:
    """A tuple as the formatter writes it."""
    return f"({', '.join(json.dumps(kind) for kind in kinds)}{',' if len(kinds) == 1 else ''})"


def write_rules(rules: Mapping[tuple[str, ...], tuple[float, ...]]) -> None:
    """Write the constants as a module."""
    entries = "".join(f"    {key_of(kinds)}: {values},\n" for kinds, values in rules.items())
    head = RULES_FILE.read_text(encoding="utf-8").split("] = {\n")[0]
    tail = '}\n"""By kinds of evidence: the bias, then the weight of each kind."""\n'
    RULES_FILE.write_text(f"{head}] = {{\n{entries}{tail}", encoding="utf-8")


# --- measuring ----------------------------------------------------------------------------------------------------


def measure(arguments: argparse.Namespace) -> str:
    """Estimates against true Dice on a real set, as a table by round."""
    data = data_set(arguments.set)
    store, raw, key = existing(arguments) if arguments.d else propagated(arguments)
    predictions = store.round_path(1, "x").parent
    said = predictions if predictions.is_dir() else None
    rows = list(case_rows(store, raw, data.labels, said, data.name, reverse=False))
    without = [{**row, "estimate": without_reverse(row)} for row in rows]
    table = [
        [data.name, number, what, *agreement([r for r in chosen if r["round"] == number])]
        for number in (0, 1)
        for what, chosen in (("all", rows), ("no reverse check", without))
    ]
    table = [line for line in table if line[3]]
    write_row(f"quality_{key}", {"set": data.name, "table": table, "annotated": raw.annotated[0].name})
    header = [
        "set",
        "round",
        "cases",
        "true Dice",
        "estimated",
        "rho, cases",
        "rho, classes",
        "error, cases",
        "classes",
    ]
    return markdown(header, table)


def without_reverse(row: Row) -> float:
    """The estimate that there would be without a reverse check."""
    known = {kind: value for kind, value in row["evidence"].items() if kind != REVERSE}
    return rule_for(frozenset(known))(known)


def existing(arguments: argparse.Namespace) -> tuple[Store, RawDataset, str]:
    """A dataset that was made before."""
    os.environ["nnUNet_raw"] = str(arguments.raw)
    return *open_store(arguments.d), f"{arguments.set}_loop"


def propagated(arguments: argparse.Namespace) -> tuple[Store, RawDataset, str]:
    """The first cases of a set's pool, labelled by registration with its reverse check."""
    data = data_set(arguments.set)
    annotated = data.split["annotated_default"]
    pool = [case for case in data.split["pool"] if case != annotated][: arguments.cases]
    lay_out(data, 501, pool, [annotated])
    if not list((arguments.o / "nnUNet_raw").glob("Dataset601_*/oneshot.json")):
        propagate(501, 601, options=PropagatorOptions(reverse_check=True), num_processes=1)
    return *open_store(601), f"{data.name}_{annotated}"


def agreement(rows: Sequence[Row]) -> list[Any]:
    """Cases, mean true and estimated Dice, Spearman's rho and mean absolute error over cases and over classes."""
    if not rows:
        return [0]
    by_case = defaultdict(list)
    for row in rows:
        by_case[row["case"]].append((row["dice"], row["estimate"]))
    cases = np.array([np.mean(pairs, axis=0) for pairs in by_case.values()])
    classes = np.array([(row["dice"], row["estimate"]) for row in rows])
    rho = [f"{spearmanr(pairs[:, 0], pairs[:, 1]).statistic:.2f}" for pairs in (cases, classes)]
    mae = [f"{np.abs(pairs[:, 0] - pairs[:, 1]).mean():.3f}" for pairs in (cases, classes)]
    return [len(cases), *(f"{v:.3f}" for v in cases.mean(0)), *rho, *mae]


if __name__ == "__main__":
    main()
