"""Estimated quality: learnt on made-up sets, measured on real ones.

    python benchmarks/quality.py learn -o WORK             # writes nnunet_oneshot/quality_rules.py
    python benchmarks/quality.py measure -o WORK --set chaos_mr_t2 [--cases 9]
    python benchmarks/quality.py measure -o WORK --set hippocampus -d 601 --raw RAW [--name NAME]
                                         # also of what refinement_ablation.py --spoil has made

`learn` makes phantom sets of three kinds, some of whose images are inverted, made noisy or strongly gamma-changed, and
sets of synthetic anatomy (synthetic_sets.py), some of whose images have another contrast. `propagate` carries the
annotated case's label with its defaults, and a round of refinement with a tiny model follows in the sets of --train
(an hour on two cores). Every class of every label, with its evidence and true Dice, is a row; the rules are fitted to
the rows. No real image takes part. `measure` propagates a few cases of a real set, or takes a data set that was made
before, and compares the estimates with the true Dice of every round: Spearman's rho over cases and over classes, and
the mean absolute error. Nothing is chosen by what it prints.
"""

from __future__ import annotations

import argparse
import json
import os
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import SimpleITK as sitk
from common import REPOSITORY, data_set, lay_out, markdown, use_folders, write_row
from quality_fit import errors, fit, kind_sets
from quality_rows import DEFAULT, Row, dataset_rows
from scipy.stats import spearmanr
from skimage import io
from synthetic_sets import write_synthetic_dataset

from nnunet_oneshot import nnunet
from nnunet_oneshot.dataset import RawDataset
from nnunet_oneshot.phantom import write_phantom_dataset
from nnunet_oneshot.propagate import propagate
from nnunet_oneshot.quality import CHANGE, VIEWS
from nnunet_oneshot.refine import open_store, refine
from nnunet_oneshot.store import Store

PHANTOMS = {
    "thick_slices": ((12, 72, 72), 0, "3d_fullres"),
    "isotropic": ((36, 44, 44), 1, "3d_fullres"),
    "rgb2d": ((1, 128, 128), 2, "2d"),
}
"""Shape, seed and configuration of each kind."""
SYNTHETIC = "synthetic"
SETS = (*PHANTOMS, *(f"{SYNTHETIC}{seed}" for seed in range(10)))
TRAINED = ("thick_slices", "isotropic", *(f"{SYNTHETIC}{seed}" for seed in range(2)))
RULES_FILE = REPOSITORY / "nnunet_oneshot" / "quality_rules.py"
HEADER = ["set", "round", "cases", "true Dice", "estimated", "rho, cases", "rho, classes", "error, cases", "classes"]
HEADER += ["Dice with an earlier round"]
HALVES = {"spoiled images": True, "the other images": False}


def main() -> None:
    """Learn or measure."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("learn", "measure"))
    parser.add_argument("-o", type=Path, required=True, help="working folder")
    parser.add_argument("--cases", type=int, default=8, help="cases of a made-up set, or of a real set's pool")
    parser.add_argument("--sets", nargs="+", default=list(SETS), choices=SETS, help="made-up sets to learn from")
    parser.add_argument("--train", nargs="*", default=list(TRAINED), choices=SETS, help="those that have a round, too")
    parser.add_argument("--set", help="real set to measure on")
    parser.add_argument("-d", help="id of a pseudo-label dataset of that set that exists")
    parser.add_argument("--raw", type=Path, help="its nnUNet_raw")
    parser.add_argument("--name", default="loop", help="of its row")
    arguments = parser.parse_args()
    use_folders(arguments.o)
    print(learn(arguments) if arguments.what == "learn" else measure(arguments))


# --- learning -----------------------------------------------------------------------------------------------------


def learn(arguments: argparse.Namespace) -> str:
    """Collect rows of every made-up set, fit the rules, write them; returns a table of their errors."""
    rows = [row for kind in arguments.sets for row in set_rows(arguments, kind)]
    rules = {kinds: fit(rows, kinds) for kinds in kind_sets(rows)}
    write_rules(rules)
    table = [[" ".join(kinds), *errors(rows, kinds)] for kinds in rules]
    about = {"cases": arguments.cases, "sets": arguments.sets, "trained": arguments.train, "rows": len(rows)}
    write_row("quality_rules", {**about, "seed": "each set its own", "table": table, "sets_by_round": by_round(rows)})
    header = ["evidence", "rows", "mean absolute error", "the same, set left out", "rho, set left out"]
    return markdown(header, table)


def by_round(rows: Sequence[Row]) -> dict[str, dict[str, list[float]]]:
    """Of the labels by all propagators: by set and round, mean true Dice and mean Dice with the views, over classes."""
    found: dict[str, dict[str, list[float]]] = defaultdict(dict)
    for name, number in sorted({(row["set"], row["round"]) for row in rows}):
        those = [r for r in rows if (r["set"], r["round"], r["source"]) == (name, number, DEFAULT)]
        means = np.mean([(r["dice"], r["evidence"].get(VIEWS, np.nan)) for r in those], axis=0)
        found[name][str(number)] = [round(float(mean), 4) for mean in means]
    return found


def set_rows(arguments: argparse.Namespace, kind: str) -> list[Row]:
    """Evidence and true Dice of every label of one made-up set; kept in the working folder."""
    kept = arguments.o / f"rows_{kind}.json"
    if kept.is_file():
        return json.loads(kept.read_text(encoding="utf-8"))
    number, truth = 700 + SETS.index(kind), arguments.o / f"truth_{kind}"
    if not truth.is_dir():
        write_set(kind, number, truth, arguments.cases)
    if not list(nnunet.root("nnUNet_raw").glob(f"Dataset{number + 100}_*/oneshot.json")):
        propagate(number, number + 100, num_processes=1)
    if kind in arguments.train:
        refine(number + 100, configuration_of(kind), rounds=1, preset="tiny", num_processes=1)
    store, raw = open_store(number + 100)
    rows = list(dataset_rows(store, raw, truth, kind, registration=True))
    kept.write_text(json.dumps(rows), encoding="utf-8")
    return rows


def write_set(kind: str, number: int, truth: Path, cases: int) -> None:
    """Write a made-up set and the labels of all its cases."""
    raw = nnunet.root("nnUNet_raw")
    if kind not in PHANTOMS:
        write_synthetic_dataset(raw, number, kind, truth, int(kind.removeprefix(SYNTHETIC)), cases)
        return
    shape, seed, _ = PHANTOMS[kind]
    made = write_phantom_dataset(raw, number, kind, truth=truth, cases=cases, shape=shape, seed=seed, kind=kind)
    spoil(sorted((made.folder / "imagesTr").iterdir())[1:], seed)


def configuration_of(kind: str) -> str:
    """The nnU-Net configuration that a made-up set is trained in."""
    return PHANTOMS[kind][2] if kind in PHANTOMS else "3d_fullres"


def spoil(images: Sequence[Path], seed: int) -> list[Path]:
    """Invert, gamma-change or add noise to three of every six images, in place; those three."""
    rng = np.random.default_rng(seed)
    changed = [(index % 6, path) for index, path in enumerate(images) if index % 6 < 3]
    for way, path in changed:
        png = path.suffix == ".png"
        image = None if png else sitk.ReadImage(str(path))
        stored = io.imread(path) if png else sitk.GetArrayFromImage(image)
        top = np.percentile(stored, 99.5)
        inside = (stored.astype(float) / top).clip(0, 1)
        data = (1 - inside, inside**2.5, inside + rng.normal(0, 0.12, stored.shape))[way].clip(0, 1) * top
        if png:
            io.imsave(path, data.astype(np.uint8), check_contrast=False)
            continue
        spoiled = sitk.GetImageFromArray(data.astype(stored.dtype))
        spoiled.CopyInformation(image)
        sitk.WriteImage(spoiled, str(path), True)
    return [path for _, path in changed]


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
    rows = list(dataset_rows(store, raw, data.labels, data.name))
    table = [[name, *line] for name, some in groups(data.name, rows, arguments.raw) for line in by_rounds(some)]
    about = {"set": data.name, "annotated": raw.annotated[0].name, "settings": store.read_manifest().settings}
    write_row(f"quality_{key}", {**about, "columns": HEADER, "table": table, "rows": rows})
    return markdown(HEADER, table)


def groups(name: str, rows: list[Row], raw: Path | None) -> list[tuple[str, list[Row]]]:
    """All rows, and those of spoiled images and of the others apart where some were spoiled."""
    noted = raw.parent / "spoiled.json" if raw else None
    if noted is None or not noted.is_file():
        return [(name, rows)]
    files = json.loads(noted.read_text(encoding="utf-8"))
    spoiled = {file.rsplit("_", 1)[0] for file in files}
    parts = {f"{name}, {what}": [r for r in rows if (r["case"] in spoiled) == of] for what, of in HALVES.items()}
    return [(name, rows), *parts.items()]


def by_rounds(rows: Sequence[Row]) -> list[list[Any]]:
    """Figures of every round."""
    numbers = sorted({row["round"] for row in rows})
    return [[number, *agreement([row for row in rows if row["round"] == number])] for number in numbers]


def existing(arguments: argparse.Namespace) -> tuple[Store, RawDataset, str]:
    """A dataset that was made before."""
    os.environ["nnUNet_raw"] = str(arguments.raw)
    return *open_store(arguments.d), f"{arguments.set}_{arguments.name}"


def propagated(arguments: argparse.Namespace) -> tuple[Store, RawDataset, str]:
    """The first cases of a set's pool, labelled as `propagate` does by default."""
    data = data_set(arguments.set)
    annotated = data.split["annotated_default"]
    pool = [case for case in data.split["pool"] if case != annotated][: arguments.cases]
    lay_out(data, 501, pool, [annotated])
    if not list((arguments.o / "nnUNet_raw").glob("Dataset601_*/oneshot.json")):
        propagate(501, 601, num_processes=1)
    return *open_store(601), f"{data.name}_{annotated}"


def agreement(rows: Sequence[Row]) -> list[Any]:
    """Figures of one round.

    Cases, mean true and estimated Dice, Spearman's rho and mean absolute error over cases and over classes, and the
    mean Dice with the labels that the change is told from.
    """
    by_case = defaultdict(list)
    for row in rows:
        by_case[row["case"]].append((row["dice"], row["estimate"]))
    cases = np.array([np.mean(pairs, axis=0) for pairs in by_case.values()])
    classes = np.array([(row["dice"], row["estimate"]) for row in rows])
    rho = [f"{spearmanr(pairs[:, 0], pairs[:, 1]).statistic:.2f}" for pairs in (cases, classes)]
    mae = [f"{np.abs(pairs[:, 0] - pairs[:, 1]).mean():.3f}" for pairs in (cases, classes)]
    changes = [row["evidence"][CHANGE] for row in rows if CHANGE in row["evidence"]]
    change = f"{np.mean(changes):.3f}" if changes else "-"
    return [len(cases), *(f"{v:.3f}" for v in cases.mean(0)), *rho, *mae, change]


if __name__ == "__main__":
    main()
