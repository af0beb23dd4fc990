"""How far one label goes: every method on every set, one resumable command, one table.

    python benchmarks/evidence.py -o WORK [--sets hippocampus acdc_mr ...] [--methods full annotated ours ...]
                                  [--annotated default|all] [--cases 26] [--preset small] [-device cpu]
    python benchmarks/evidence.py --table

A row is one set, annotated case and method, scored on the set's test cases, whose images and labels no labelling or
training sees. All trained rows of a set share plans, trainer schedule and cases (`--preset`; `--cases` takes the first
so many of the pool, the annotated one included). Finished rows are small JSON files in benchmarks/results/ and are not
run again; an unfinished one goes on from what is in WORK. Rows that share labels share their labelling, and a row with
refinement goes on from the one without, so minutes are those that the row itself took. `--table` writes docs/results.md
of all rows that there are and names those that are not. Only "full" trains on labels of other cases; elsewhere they are
read by scoring alone.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from pathlib import Path
from typing import Any

from common import DataSet, data_set, lay_out, read_row, use_folders, write_row
from evidence_methods import LABELS, METHODS, Method
from evidence_table import write_results

from nnunet_oneshot import nnunet
from nnunet_oneshot.baseline import train_annotated_only
from nnunet_oneshot.evaluate import FOREGROUND, Evaluation, evaluate
from nnunet_oneshot.metrics import METRICS
from nnunet_oneshot.parallel import default_processes
from nnunet_oneshot.propagate import propagate
from nnunet_oneshot.refine import Plan, open_store, refine
from nnunet_oneshot.settings import PRESETS

SETS = {"hippocampus": "3d_fullres", "chaos_mr_t2": "3d_fullres", "acdc_mr": "2d", "hc18_us": "2d"}
"""The sets and the configuration that each is trained in."""
POOL, ALONE, FULL, TEST = 501, 502, 503, 504
STOCK, TESTED = 100, 200
"""Added to the number of a label dataset: its best guess everywhere, and the same labels for the test images."""


class Evidence:
    """One data set, one annotated case, one preset."""

    def __init__(self, name: str, annotated: str, cases: int, preset: str, device: str, work: Path) -> None:
        self.data: DataSet = data_set(name)
        self.annotated = annotated
        others = [case for case in self.data.split["pool"] if case != annotated]
        self.pool: list[str] = sorted([annotated, *others[: cases - 1]])
        self.test: list[str] = self.data.split["test"]
        self.configuration = SETS[name]
        self.preset, self.device = preset, device
        self.work = work / f"{name}_{annotated}_{len(self.pool)}_{preset}"

    def key(self, method: str) -> str:
        """Name of the row's file."""
        return f"evidence_{self.data.name}_{self.annotated}_{len(self.pool)}_{self.preset}_{method}"

    def row(self, method: str) -> dict[str, Any]:
        """A finished row, made now where it is not there yet."""
        if (done := read_row(self.key(method))) is not None:
            return done
        use_folders(self.work)
        recipe, begin = METHODS[method], time.monotonic()
        labelling = self._label(recipe)
        predictions = self._carried(recipe) if recipe.trainer is None else self._trained(method, recipe)
        minutes = {"labelling": labelling, "all": (time.monotonic() - begin) / 60}
        scored = evaluate(self.data.labels, predictions, self._pool() / "dataset.json", cases=self.test)
        return write_row(self.key(method), {**self._about(method, minutes), **figures(scored), **self._labels(recipe)})

    def _about(self, method: str, minutes: dict[str, float]) -> dict[str, Any]:
        return {
            "set": self.data.name,
            "annotated": self.annotated,
            "method": method,
            "what": METHODS[method].what,
            "pool": len(self.pool),
            "test_cases": len(self.test),
            "preset": self.preset,
            "configuration": self.configuration,
            "minutes": {key: round(value, 1) for key, value in minutes.items()},
            "seed": "propagation 0; nnU-Net's training is not seeded",
        }

    def _label(self, recipe: Method) -> float:
        """Label the pool; minutes."""
        begin = time.monotonic()
        if recipe.labels in LABELS:
            self._pool()
            self._propagate(recipe.labels, POOL, 0)
        return (time.monotonic() - begin) / 60

    def _propagate(self, labels: str, source: int, offset: int) -> int:
        chosen = LABELS[labels]
        number = chosen.number + offset
        if not list(Path(os.environ["nnUNet_raw"]).glob(f"Dataset{number}_*/oneshot.json")):
            propagate(source, number, propagators=chosen.propagators, options=chosen.options)
        return number

    def _carried(self, recipe: Method) -> Path:
        """Labels of the test images, carried like those of the pool."""
        lay_out(self.data, TEST, self.test, [self.annotated], name=f"{self.data.name}_test")
        assert recipe.labels is not None
        return open_store(self._propagate(recipe.labels, TEST, TESTED))[0].fused_path("x").parent

    def _trained(self, method: str, recipe: Method) -> Path:
        chosen = PRESETS[self.preset]
        plan = Plan(self.configuration, chosen.trainer(recipe.trainer or ""), chosen.plans, self.preset)
        number = self._train(recipe, plan)
        output = self.work / "predictions" / method
        images = {c: [self.data.folder / "images" / f"{c}{self.data.ending}"] for c in self.test}
        nnunet.predict(number, plan.configuration, ("all",), plan.trainer, plan.plans, images, output, self.device)
        return output

    def _train(self, recipe: Method, plan: Plan) -> int:
        """Train; the number of the dataset that was trained on."""
        if recipe.labels is None:
            self._pool()
            train_annotated_only(
                POOL, ALONE, plan.configuration, preset=self.preset, device=self.device, num_processes=_processes()
            )
            return ALONE
        if recipe.labels == "truth":
            lay_out(self.data, FULL, self.pool, self.pool, name=f"{self.data.name}_full")
            return self._train_stock(FULL, plan)
        number = LABELS[recipe.labels].number
        if (found := open_store(number)[0].read_manifest().round) > recipe.rounds:
            raise SystemExit(f"expected labels of round {recipe.rounds} at most, found {found}: use another -o")
        if recipe.trainer == "OneShotTrainer":
            refine(number, plan.configuration, rounds=recipe.rounds, preset=self.preset, device=self.device)
            return number
        return self._train_stock(number if recipe.ignore else self._best_guess(number), plan)

    def _train_stock(self, number: int, plan: Plan) -> int:
        nnunet.plan_and_preprocess(number, PRESETS[self.preset], [plan.configuration], _processes())
        nnunet.train(number, plan.configuration, "all", plan.trainer, plan.plans, self.device)
        return number

    def _best_guess(self, number: int) -> int:
        """A dataset of round 0's best guess everywhere; its number."""
        store, _ = open_store(number)
        folder = store.folder.with_name(f"Dataset{number + STOCK}_{self.data.name}_guess")
        content = json.loads((store.folder / "dataset.json").read_text())
        del content["labels"]["ignore"], content["oneshot"]
        for case, entry in content["dataset"].items():
            entry["label"] = f"../{store.folder.name}/pseudoTr/rounds/00/{case}{self.data.ending}"
        folder.mkdir(exist_ok=True)
        (folder / "dataset.json").write_text(json.dumps(content, indent=2))
        return number + STOCK

    def _pool(self) -> Path:
        return lay_out(self.data, POOL, self.pool, [self.annotated])

    def _labels(self, recipe: Method) -> dict[str, Any]:
        """Dice of the pool's labels, round by round; nothing where there are none."""
        if recipe.labels not in LABELS:
            return {}
        store, raw = open_store(LABELS[recipe.labels].number)
        manifest, rounds = store.read_manifest(), {}
        for number in range(recipe.rounds + 1):
            folder = store.round_path(number, "x").parent
            if folder.is_dir():
                cases = [case.name for case in raw.unannotated]
                scored = evaluate(self.data.labels, folder, raw.folder / "dataset.json", cases=cases)
                rounds[str(number)] = round(scored.summary[FOREGROUND]["Dice"].mean, 4)
        shares = [record.divergence for record in manifest.cases.values() if record.divergence is not None]
        return {"label_dice": rounds, "divergence": round(sum(shares) / max(1, len(shares)), 4)}


def figures(scored: Evaluation) -> dict[str, Any]:
    """What a row keeps of the scores."""
    dice = scored.case_mean()[:, list(METRICS).index("Dice")]
    mean = {
        name: {
            metric: [round(float(v), 4) for v in (entry[metric].mean, entry[metric].low, entry[metric].high)]
            for metric in METRICS
        }
        for name, entry in scored.summary.items()
    }
    return {"scores": mean, "dice_per_case": dict(zip(scored.cases, (round(float(v), 4) for v in dice), strict=True))}


def _processes() -> int:
    return default_processes()


def main() -> None:
    """Run what is missing, then write the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sets", nargs="+", default=list(SETS), choices=sorted(SETS))
    parser.add_argument("--methods", nargs="+", default=list(METHODS), choices=sorted(METHODS))
    parser.add_argument("--annotated", default="default", choices=("default", "all"))
    parser.add_argument("--cases", type=int, default=26, help="pool cases, the annotated one included")
    parser.add_argument("--preset", default="small", choices=sorted(PRESETS))
    parser.add_argument("-device", default="cpu")
    parser.add_argument("-o", type=Path, help="working folder")
    parser.add_argument("--table", action="store_true", help="only write docs/results.md of the rows that are there")
    arguments = parser.parse_args()
    if not arguments.table:
        if arguments.o is None:
            parser.error("-o is needed to run rows")
        for name in arguments.sets:
            split = data_set(name).split
            choices = split["annotated_choices"] if arguments.annotated == "all" else [split["annotated_default"]]
            for annotated in choices:
                made = Evidence(
                    name, annotated, arguments.cases, arguments.preset, arguments.device, arguments.o.resolve()
                )
                for method in sorted(arguments.methods, key=lambda method: METHODS[method].rounds):
                    made.row(method)
    write_results(list(SETS))


if __name__ == "__main__":
    main()
