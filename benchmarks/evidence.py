"""How far one label goes: every method on every set, one resumable command, one table.

    python benchmarks/evidence.py -o WORK [--sets hippocampus acdc_mr ...] [--methods full annotated ours ...]
                                  [--annotated default|all|CASE[+CASE]] [--cases 26] [--preset small]
                                  [--training 1] [--configuration 3d_fullres] [--no_mirroring] [-device cpu]
    python benchmarks/evidence.py --table

A row is one set, annotated case and method, scored on the set's test cases, whose images and labels no labelling or
training sees. Every training of a set has as many iterations, by the same planner, on the same cases (`--preset`;
`--cases` takes the first so many of the pool, the annotated one included); how many trainings made the model that is
scored is in the row. `--no_mirroring` trains and predicts without nnU-Net's mirrored images: rows and tables of their
own, of methods that train nnU-Net's trainer or ours. nnU-Net's trainings are not seeded: `--training 2` does all of it
once more, as a row of its own. Finished rows are small JSON files in benchmarks/results/ and are not run again; an
unfinished one goes on from what is in WORK, where WORK/.../pictures/index.html shows the worst, the median and the best
test cases of every row that was made there. Rows that share labels share their labelling, and a row with refinement
goes on from the one without; the minutes of each stage are kept and added up. `--table` writes docs/results.md, the
README's headline and the figure of all rows that there are and names those that are not. Only "full" and "full_again"
train on labels of other cases, and methods from one slice a volume on that slice; elsewhere they are read by scoring
alone. YoloSeg labels 2D images, and its network is one of slices: of a set of volumes it gets all slices as one set of
images (yoloseg_volumes.py), and nnU-Net's 2d configuration is trained.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import SimpleITK as sitk
import torch
from common import NOT_MIRRORED, DataSet, data_set, lay_out, read_row, use_folders, write_row
from evidence_methods import FLAT, LABELS, METHODS, Labels, Method
from evidence_pictures import draw_cases, write_index
from evidence_table import write_results
from oneseg import sparse_support
from registration import read_image, read_label, voxel_shares
from yoloseg_volumes import label_by_slices

from nnunet_oneshot import nnunet
from nnunet_oneshot.baseline import write_annotated_only
from nnunet_oneshot.dataset import RawDataset, open_dataset
from nnunet_oneshot.evaluate import FOREGROUND, Evaluation, evaluate
from nnunet_oneshot.make_sparse import make_sparse
from nnunet_oneshot.metrics import METRICS
from nnunet_oneshot.parallel import default_processes
from nnunet_oneshot.propagate import propagate
from nnunet_oneshot.quality_gate import MIN_QUALITY
from nnunet_oneshot.refine import Plan, open_store, refine
from nnunet_oneshot.refine_record import Record
from nnunet_oneshot.rounds import target_path
from nnunet_oneshot.settings import PRESETS
from nnunet_oneshot.store import Store
from nnunet_oneshot.training_data import ignore_value

SETS = {"hippocampus": "3d_fullres", "chaos_mr_t2": "2d", "acdc_mr": "2d", "hc18_us": "2d"}
"""The sets and the configuration that each is trained in unless told otherwise: chaos_mr_t2 in 2D, since within the
budget of `small` nnU-Net learns little there in 3D from all true labels (its rows say how little)."""
POOL, ALONE, FULL, TEST, SLICES = 501, 502, 503, 504, 505
STOCK, TESTED, REPLACED, AGAIN = 100, 200, 300, 30
"""Added to the number of a label dataset: its best guess everywhere, the same labels for the test images, and what a
model that learnt from the best guess says in its place (once more for every time that it is replaced); to that of what
is trained on, for every time that a network is trained on it once more."""


class Evidence:
    """One data set, one annotated case (or several, joined by +), one preset, one repetition."""

    prefix = "evidence"

    def __init__(self, name: str, annotated: str, arguments: argparse.Namespace) -> None:
        self.data: DataSet = data_set(name)
        self.annotated = annotated
        self.supports = annotated.split("+")
        others = [case for case in self.data.split["pool"] if case not in self.supports]
        self.pool: list[str] = sorted([*self.supports, *others[: arguments.cases - len(self.supports)]])
        self.test: list[str] = self.data.split["test"]
        own = SETS.get(name, "3d_fullres")
        self.configuration: str = arguments.configuration or own
        self.mirroring: bool = not arguments.no_mirroring
        unlike = [self.configuration] * (self.configuration != own) + ["no_mirroring"] * (not self.mirroring)
        self.variant = ", ".join(unlike)
        self.preset: str = arguments.preset
        self.device: str = arguments.device
        self.training: int = arguments.training
        self.again = f"_training{self.training}" if self.training > 1 else ""
        self.work: Path = arguments.o.resolve() / f"{self._about_all()}{self.again}"

    def key(self, method: str) -> str:
        """Name of the row's file."""
        return f"{self.prefix}_{self._about_all()}_{method}{self.again}"

    def _about_all(self) -> str:
        """What all rows of it share."""
        parts = (self.data.name, self.annotated, str(len(self.pool)), self.preset, self.variant.replace(", ", "_"))
        return "_".join(part for part in parts if part)

    def row(self, method: str) -> dict[str, Any]:
        """A finished row, made now where it is not there yet."""
        if (done := read_row(self.key(method))) is not None:
            return done
        use_folders(self.work)
        recipe = METHODS[method]
        labelling, stages = self._label(recipe), list[float | None]()
        if recipe.trainer is None:
            # What a user would wait for: the test images, not the pool.
            there = self._is_there(LABELS[recipe.labels or ""].number + TESTED)
            labelling = self._timed(f"carry {recipe.labels}", lambda: self._carried(recipe), there)
            predictions, precision = self._carried(recipe), None
        else:
            number = self._train(recipe, self._plan(recipe), stages)
            predictions, precision = self._predicted(method, recipe, number), self._precision(number)
        minutes = {"labelling": labelling, "training": added(stages)}
        scored = evaluate(self.data.labels, predictions, self._pool() / "dataset.json", cases=self.test)
        about = self._about(method, minutes, precision)
        row = write_row(self.key(method), {**about, **figures(scored), **self._labels(recipe)})
        draw_cases(self.data, open_dataset(POOL), scored, predictions, self.work / "pictures" / f"{method}.png")
        self._write_report()
        return row

    def too_late(self, method: str) -> str | None:
        """Why a row can no longer be made in this working folder, if so: its labels are of a later round by now."""
        use_folders(self.work)
        recipe = METHODS[method]
        in_force = recipe.labels in LABELS and (recipe.ignore or recipe.trainer == "OneShotTrainer")
        if not in_force or read_row(self.key(method)) is not None or not self._is_there(LABELS[recipe.labels].number):
            return None
        found = open_store(LABELS[recipe.labels].number)[0].read_manifest().round
        if found <= recipe.rounds:
            return None
        return f"{self.key(method)}: expected labels of round {recipe.rounds} at most, found {found}; use another -o"

    def _write_report(self) -> None:
        """A page of what the rows that were made here look like."""
        rows = {method: read_row(self.key(method)) for method in METHODS}
        said = {
            method: f"{METHODS[method].what}: Dice {row['scores'][FOREGROUND]['Dice'][0]:.3f}"
            for method, row in rows.items()
            if row is not None
        }
        write_index(self.work / "pictures", said)

    def _about(self, method: str, minutes: Mapping[str, float | None], precision: str | None) -> dict[str, Any]:
        return {
            "set": self.data.name,
            "annotated": self.annotated,
            "method": method,
            "what": METHODS[method].what,
            "pool": len(self.pool),
            "pool_cases": self.pool,
            "test_cases": len(self.test),
            "preset": self.preset,
            "configuration": METHODS[method].configuration or self.configuration,
            "variant": self.variant,
            "trainer": self._trainer(METHODS[method]),
            "precision": precision,
            "gpu": torch.cuda.get_device_name(self.device) if self.device.startswith("cuda") else None,
            "min_quality": MIN_QUALITY,
            "training": self.training,
            "trainings_of_the_model": self._trainings(METHODS[method]),
            "minutes": {key: None if value is None else round(value, 1) for key, value in minutes.items()},
            "seed": "propagation 0; nnU-Net's training is not seeded",
        }

    def _plan(self, recipe: Method) -> Plan:
        configuration = recipe.configuration or self.configuration
        return Plan(configuration, self._trainer(recipe) or "", PRESETS[self.preset].plans, self.preset)

    def _trainer(self, recipe: Method) -> str | None:
        if (base := recipe.trainer) is None:
            return None
        return PRESETS[self.preset].trainer(base if self.mirroring else NOT_MIRRORED[base])

    def _precision(self, number: int) -> str:
        """What the trainings on a dataset computed in, as their logs tell."""
        logs = nnunet.root("nnUNet_results").glob(f"Dataset{number}_*/**/training_log*.txt")
        said = {"bfloat16" in log.read_text(encoding="utf-8") for log in logs}
        return "bfloat16" if said == {True} else "nnU-Net's own" if said == {False} else "mixed"

    def _trainings(self, recipe: Method) -> int:
        """Through how many trainings the model has been: each begins with the weights of the one before."""
        if recipe.trainer is None:
            return 0
        if recipe.trainer != "OneShotTrainer" or recipe.labels not in LABELS:
            return 1 + recipe.again
        store, _ = open_store(LABELS[recipe.labels].number)
        number = store.read_manifest().round
        return 1 + number + Record(store).is_done(f"further-{number}")

    def _label(self, recipe: Method) -> float | None:
        """Label the pool; minutes."""
        if recipe.labels not in LABELS:
            return 0.0
        labels, chosen = recipe.labels, LABELS[recipe.labels]
        (self._sliced if chosen.slices else self._pool)()
        source = SLICES if chosen.slices else POOL
        return self._timed(f"label {labels}", lambda: self._propagate(labels, source, 0), self._is_there(chosen.number))

    def _timed(self, stage: str, work: Callable[[], object], there: bool = False) -> float | None:
        """Do a stage, or nothing where it is done; minutes that it took.

        None where it was stopped meanwhile, or was `there` before anybody timed it.
        """
        begun = self._minutes()
        if stage not in begun:
            self._note({**begun, stage: None})
        begin = time.monotonic()
        work()
        if stage not in begun and not there:
            self._note({**self._minutes(), stage: (time.monotonic() - begin) / 60})
        return self._minutes()[stage]

    def _minutes(self) -> dict[str, float | None]:
        path = self.work / "minutes.json"
        return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}

    def _note(self, minutes: Mapping[str, float | None]) -> None:
        (self.work / "minutes.json").write_text(json.dumps(minutes, indent=1), encoding="utf-8")

    def _propagate(self, labels: str, source: int, offset: int) -> int:
        chosen = self._on_device(LABELS[labels])
        number = chosen.number + offset
        if not self._is_there(number):
            if chosen.flat and self.data.name not in FLAT:
                label_by_slices(source, number, chosen, self.work)
            else:
                propagate(source, number, propagators=chosen.propagators, options=chosen.options)
        return number

    def _on_device(self, labels: Labels) -> Labels:
        return replace(labels, options=replace(labels.options, device=self.device))

    def _is_there(self, number: int) -> bool:
        """Whether a dataset of pseudo labels is."""
        return any(nnunet.root("nnUNet_raw").glob(f"Dataset{number}_*/oneshot.json"))

    def _carried(self, recipe: Method) -> Path:
        """Labels of the test images, carried like those of the pool."""
        lay_out(self.data, TEST, self.test, self.supports, name=f"{self.data.name}_test")
        assert recipe.labels is not None
        return open_store(self._propagate(recipe.labels, TEST, TESTED))[0].fused_path("x").parent

    def _predicted(self, method: str, recipe: Method, number: int) -> Path:
        """Predictions of the test cases by the model that was trained on a dataset."""
        plan = self._plan(recipe)
        # Named after the labels too: predictions that are there are kept, and must not be another model's.
        output = self.work / "predictions" / f"{method}_{number}"
        images = {c: [self.data.folder / "images" / f"{c}{self.data.ending}"] for c in self.test}
        nnunet.predict(number, plan.configuration, ("all",), plan.trainer, plan.plans, images, output, self.device)
        return output

    def _train(self, recipe: Method, plan: Plan, stages: list[float | None]) -> int:
        """Train; the number of the dataset that was trained on. Each training's minutes are added to `stages`."""
        if recipe.labels is None:
            self._pool()
            write_annotated_only(POOL, ALONE)
            return self._train_stock(ALONE, plan, stages)
        if recipe.labels == "truth":
            every = partial(lay_out, self.data, cases=self.pool, annotated=self.pool, name=f"{self.data.name}_full")
            return self._train_often(FULL, recipe.again, every, plan, stages)
        number = LABELS[recipe.labels].number
        if recipe.trainer == "OneShotTrainer":
            for rounds in range(recipe.rounds + 1):
                go_on = partial(self._refine, number, rounds, plan)
                there = self._has_model(number, plan) and open_store(number)[0].read_manifest().round >= rounds
                stages.append(self._timed(f"refine {number} {rounds}", go_on, there))
            return number
        if recipe.ignore:
            trained = self._train_stock(number, plan, stages)
        else:
            guess = partial(self._best_guess, number)
            trained = self._train_often(number + STOCK, recipe.again, guess, plan, stages)
        for again in range(1, recipe.replaced + 1):
            replacing = partial(self._replaced, number, trained, again, plan)
            stages.append(self._timed(f"replace {number} {again}", replacing))
            trained = self._train_stock(replacing(), plan, stages)
        return trained

    def _refine(self, number: int, rounds: int, plan: Plan) -> None:
        """All rounds up to so many; those that are done are not done again."""
        if open_store(number)[0].read_manifest().round <= rounds:
            how = {"trainer": plan.trainer, "preset": self.preset, "device": self.device}
            refine(number, plan.configuration, rounds=rounds, **how)

    def _train_often(
        self, first: int, again: int, lay_out_as: Callable[[int], object], plan: Plan, stages: list[float | None]
    ) -> int:
        """Train, and once more from these weights, on the same labels in a dataset of its own each time; its number."""
        before = None
        for number in range(first, first + again * AGAIN + 1, AGAIN):
            lay_out_as(number)
            self._train_stock(number, plan, stages, before)
            model = nnunet.results_folder(number, plan.trainer, plan.plans, plan.configuration)
            before = model / "fold_all" / "checkpoint_final.pth"
        return number

    def _train_stock(self, number: int, plan: Plan, stages: list[float | None], before: Path | None = None) -> int:
        def train() -> None:
            nnunet.plan_and_preprocess(number, PRESETS[self.preset], [plan.configuration], default_processes())
            chosen = (plan.configuration, "all", plan.trainer, plan.plans, self.device)
            nnunet.train(number, *chosen, pretrained_weights=before)

        stage = f"train {number} {plan.trainer} {plan.configuration}"
        stages.append(self._timed(stage, train, self._has_model(number, plan)))
        return number

    def _has_model(self, number: int, plan: Plan) -> bool:
        """Whether a training on a dataset has begun."""
        model = f"{plan.trainer}__{plan.plans}__{plan.configuration}"
        return any(nnunet.root("nnUNet_results").glob(f"Dataset{number}_*/{model}"))

    def _best_guess(self, number: int, new: int) -> int:
        """Dataset `new` of round 0's best guess everywhere, of those of dataset `number`."""
        store, _ = open_store(number)
        guesses = store.round_path(0, "x").parent
        return self._whole(number, new, "guess", dict.fromkeys(self.pool, guesses))

    def _replaced(self, number: int, trained: int, again: int, plan: Plan) -> int:
        """A dataset of what a model says of the un-annotated cases in place of their pseudo labels; its number."""
        store, raw = open_store(number)
        said = self.work / "predictions" / f"{number}_pool_{again}"
        images = {case.name: list(case.images) for case in raw.unannotated}
        nnunet.predict(trained, plan.configuration, ("all",), plan.trainer, plan.plans, images, said, self.device)
        drawn = store.round_path(0, "x").parent
        labels = {case.name: said if case.name in images else drawn for case in raw.cases}
        return self._whole(number, number + REPLACED + again - 1, f"replaced{again}", labels)

    def _whole(self, number: int, new: int, name: str, labels: dict[str, Path]) -> int:
        """A stock dataset, nothing ignored, of the folders that hold each case's label; its number."""
        store, _ = open_store(number)
        folder = store.folder.with_name(f"Dataset{new}_{self.data.name}_{name}")
        content = json.loads((store.folder / "dataset.json").read_text(encoding="utf-8"))
        del content["labels"]["ignore"], content["oneshot"]
        for case, entry in content["dataset"].items():
            entry["label"] = os.path.relpath(labels[case] / f"{case}{self.data.ending}", folder)
        folder.mkdir(exist_ok=True)
        (folder / "dataset.json").write_text(json.dumps(content, indent=2), encoding="utf-8")
        return new

    def _pool(self) -> Path:
        return lay_out(self.data, POOL, self.pool, self.supports)

    def _sliced(self) -> Path:
        """The pool with one annotated slice a volume, everything else of its label ignored."""
        folder = lay_out(self.data, SLICES, self.pool, [], name=f"{self.data.name}_slices")
        if not (folder / "labelsTr" / f"{self.pool[-1]}{self.data.ending}").is_file():
            drawn = self.work / "drawn_slices"
            for case in self.pool:
                draw_slice(self.data, case, drawn)
            make_sparse(SLICES, drawn, overwrite=True)
        return folder

    def _labels(self, recipe: Method) -> dict[str, Any]:
        """Dice of the pool's labels, round by round, and those in force inside consensus and divergence."""
        if recipe.labels not in LABELS:
            return {}
        store, raw = open_store(LABELS[recipe.labels].number)
        cases = [name for name, record in store.read_manifest().cases.items() if record.status != "annotated"]
        rounds = {}
        for number in range(recipe.rounds + 1):
            folder = store.round_path(number, "x").parent
            if folder.is_dir():
                scored = evaluate(self.data.labels, folder, raw.folder / "dataset.json", cases=cases)
                rounds[str(number)] = round(scored.summary[FOREGROUND]["Dice"].mean, 4)
        record = Record(store)
        made = [str(n) for n in range(1, recipe.rounds + 1) if record.is_done(f"quality-{n}")]
        changes = {n: list((record.value(f"relabel-{n}") or {}).values()) for n in made}
        shares = voxel_shares([self._right_voxels(store, raw, case, recipe.rounds > 0) for case in cases])
        return {
            "label_dice": rounds,
            "agreement_with_round_before": {n: round(float(np.mean(values)), 4) for n, values in changes.items()},
            "moved_and_estimated_error": {n: record.value(f"quality-{n}") for n in made},
            **{key: round(value, 4) for key, value in shares.items()},
        }

    def _right_voxels(self, store: Store, raw: RawDataset, case: str, refined: bool) -> dict[str, int]:
        """How many voxels of a pseudo label are right, in consensus and in divergence."""
        labels = store.fused_path(case), store.label_path(case)
        if not refined and target_path(store, 0, case).is_file():
            # Another row may have refined them since.
            labels = store.round_path(0, case), target_path(store, 0, case)
        paths = (*labels, self.data.labels / f"{case}{self.data.ending}")
        guess, target, truth = (raw.read_label(path) for path in paths)
        agreed, right = target != ignore_value(raw), guess == truth
        found = {"consensus": agreed, "consensus_right": agreed & right}
        found |= {"divergence": ~agreed, "divergence_right": ~agreed & right}
        return {key: int(where.sum()) for key, where in found.items()}


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


def added(minutes: Sequence[float | None]) -> float | None:
    """Their sum; None where one is not known."""
    known = [value for value in minutes if value is not None]
    return sum(known) if len(known) == len(minutes) else None


def draw_slice(data: DataSet, case: str, folder: Path) -> None:
    """Write a case's label with 0 off the slice of the largest foreground area, as a person who draws one leaves it."""
    image, truth = read_image(data.name, case), sitk.ReadImage(str(data.labels / f"{case}{data.ending}"))
    support, shown, index = sparse_support(image, read_label(data.name, case), suggested=False)
    seen = shown.forward(support.label)
    kept = np.zeros_like(seen)
    kept[index] = seen[index]
    label = sitk.GetImageFromArray(shown.inverse(kept).astype(np.uint8))
    label.CopyInformation(truth)
    folder.mkdir(parents=True, exist_ok=True)
    sitk.WriteImage(label, str(folder / f"{case}{data.ending}"))


def run(arguments: argparse.Namespace, methods: Sequence[str]) -> list[str]:
    """Make the rows that are missing; why some were left out."""
    skipped = []
    for name in arguments.sets:
        split = data_set(name).split
        named = {"all": split["annotated_choices"], "default": [split["annotated_default"]]}
        for annotated in named.get(arguments.annotated, [arguments.annotated]):
            made = Evidence(name, annotated, arguments)
            for method in sorted(methods, key=lambda method: METHODS[method].rounds):
                if not METHODS[method].fits(name):
                    continue
                if (why := made.too_late(method)) is None:
                    made.row(method)
                else:
                    skipped.append(why)
    return skipped


def main() -> None:
    """Run what is missing, then write the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sets", nargs="+", default=list(SETS), choices=sorted(SETS))
    parser.add_argument("--methods", nargs="+", default=list(METHODS), choices=sorted(METHODS))
    parser.add_argument("--annotated", default="default", help="default, all (one after another) or CASE[+CASE ...]")
    parser.add_argument("--cases", type=int, default=26, help="pool cases, annotated ones included")
    parser.add_argument("--preset", default="small", choices=sorted(PRESETS))
    parser.add_argument("--training", type=int, default=1, help="2 and more: once more, since trainings are not seeded")
    parser.add_argument("--configuration", help="another than the set's own: rows and tables of their own")
    parser.add_argument("--no_mirroring", action="store_true", help="rows and tables of their own")
    parser.add_argument("-device", default="cpu")
    parser.add_argument("-o", type=Path, help="working folder")
    parser.add_argument("--table", action="store_true", help="only write the tables of the rows that are there")
    arguments = parser.parse_args()
    if not arguments.table:
        if arguments.o is None:
            parser.error("-o is needed to run rows")
        methods = [m for m in arguments.methods if not arguments.no_mirroring or METHODS[m].trainer in NOT_MIRRORED]
        if left := sorted({*arguments.methods} - {*methods}):
            print(f"not run, since no trainer of theirs leaves mirrored images out: {', '.join(left)}")
        for why in run(arguments, methods):
            print(why)
    write_results(list(SETS))


if __name__ == "__main__":
    main()
