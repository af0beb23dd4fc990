"""Which parts of OneShotTrainer help, and by how much: one data set, the same labels, budget and seed for every row.

    python benchmarks/trainer_ablation.py --set hippocampus --cases 26 -c 2d --rows fused ignore near -o WORK

Labels are those of round 0 as `propagate` makes them by default; nothing but the test cases' scores sees true labels.
Each row trains in this process with augmentation in line, so that a seed fixes it. A row that is there already is not
trained again. The table at the end compares every row with the first one by paired differences over test cases, each
case's Dice being the mean over the seeds given; one seed tells little, since trainings differ by as much as most rows.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from common import DataSet, data_set, lay_out, markdown, read_row, use_folders, write_row
from in_process import make, predict
from nnunetv2.training.dataloading.nnunet_dataset import nnUNetDatasetBlosc2

from nnunet_oneshot import nnunet
from nnunet_oneshot.evaluate import FOREGROUND, Evaluation, evaluate
from nnunet_oneshot.metrics import METRICS
from nnunet_oneshot.propagate import propagate
from nnunet_oneshot.settings import PRESETS, LossSettings
from nnunet_oneshot.store import read_manifest
from nnunet_oneshot.training_data import oneshot_block

POOL, LABELLED, FUSED = 501, 601, 603
PRESET = PRESETS["small"]
OFF = LossSettings(end_weight=0.0, guess_share=0.0)


@dataclass(frozen=True)
class Recipe:
    """One row: which trainer on which labels.

    Attributes:
        what: in words.
        dataset: id of the labels.
        settings: of OneShotTrainer; None is nnU-Net's own trainer.
        weighted: whether cases are drawn as often as the estimated quality of their labels says.
        balanced: whether classes with few voxels in consensus weigh more in the cross entropy.
    """

    what: str
    dataset: int
    settings: LossSettings | None = None
    weighted: bool = False
    balanced: bool = False


NEAR = Recipe("divergence ignored, boxes near the image", LABELLED, OFF)
GUESS = Recipe("best guess in divergence in every draw (the default)", LABELLED, replace(OFF, guess_share=1.0))
"""Consistency and cross patches act in divergence that has no label, so they are added to NEAR or to half the draws."""
HALF = replace(OFF, guess_share=0.5)

ROWS: Mapping[str, Recipe] = {
    "fused": Recipe("nnUNetTrainer, best guess everywhere", FUSED),
    "ignore": Recipe("nnUNetTrainer, divergence ignored", LABELLED),
    "near": NEAR,
    "guess": GUESS,
    "consistency": Recipe("near + consistency", LABELLED, replace(OFF, end_weight=0.5)),
    "three_passes": Recipe(
        "near + consistency of three full passes", LABELLED, replace(OFF, end_weight=0.5, full_passes=3)
    ),
    "every_third": Recipe("near + consistency every third iteration", LABELLED, replace(OFF, end_weight=0.5, every=3)),
    "half": Recipe("best guess in half of the draws", LABELLED, HALF),
    "half_consistency": Recipe("half + consistency", LABELLED, replace(HALF, end_weight=0.5)),
    "mean_teacher": Recipe(
        "near + consistency with a mean teacher", LABELLED, replace(OFF, end_weight=0.5, teacher_decay=0.99)
    ),
    "cross_patch": Recipe("near + cross patches", LABELLED, replace(OFF, cross_patch=0.2)),
    "cross_patch_labels": Recipe(
        "near + cross patches with their labels", LABELLED, replace(OFF, cross_patch=0.2, cross_patch_labels=True)
    ),
    "case_weight": replace(GUESS, what="guess + cases drawn by estimated quality", weighted=True),
    "balanced": replace(GUESS, what="guess + classes weighed by what is confident of them", balanced=True),
    "annotated": Recipe(
        "guess + a fifth of draws annotated", LABELLED, replace(OFF, guess_share=1.0, annotated_share=0.2)
    ),
    "all": Recipe(
        "half + mean teacher, cross patches, estimated quality, a fifth annotated",
        LABELLED,
        replace(HALF, end_weight=0.5, teacher_decay=0.99, cross_patch=0.2, annotated_share=0.2),
        weighted=True,
    ),
}


class Ablation:
    """One data set, one annotated case, one budget."""

    prefix = "trainer_ablation"
    variant = ""

    def __init__(self, arguments: argparse.Namespace, seed: int = 0) -> None:
        self.data: DataSet = data_set(arguments.set)
        self.annotated: str = arguments.annotated or self.data.split["annotated_default"]
        self.configuration: str = arguments.c
        self.epochs: int = arguments.epochs
        self.seed = seed
        self.mirroring: bool = not arguments.no_mirroring
        self.work: Path = arguments.o
        pool = [case for case in self.data.split["pool"] if case != self.annotated]
        self.pool = pool[: (arguments.cases or len(pool) + 1) - 1]
        self.test: list[str] = self.data.split["test"][: arguments.test]
        self.label_settings: dict[str, Any] = {}
        self.dataset_json = Path()

    def key(self, row: str) -> str:
        """Name of the row's file."""
        pool, budget = len(self.pool) + 1, f"{self.epochs}x{PRESET.schedule.iterations if PRESET.schedule else 0}"
        what = f"{self.prefix}_{self.data.name}_{pool}{self.variant}"
        return f"{what}_{self.configuration}_{budget}_seed{self.seed}_{row}"

    def prepare(self) -> None:
        """Labels, their fused form as a dataset of its own, and nnU-Net's preprocessing of both."""
        self.dataset_json = lay_out(self.data, POOL, self.pool, [self.annotated]) / "dataset.json"
        raw = Path(os.environ["nnUNet_raw"])
        if not list(raw.glob(f"Dataset{LABELLED}_*/oneshot.json")):
            propagate(POOL, LABELLED, num_processes=1)
        labelled = next(raw.glob(f"Dataset{LABELLED}_*"))
        self.label_settings = json.loads((labelled / "oneshot.json").read_text(encoding="utf-8"))["settings"]
        self._write_fused(labelled)
        for number in (LABELLED, FUSED):
            nnunet.plan_and_preprocess(number, PRESET, [self.configuration], 1)

    def row(self, name: str) -> dict[str, Any]:
        """A finished row, made now where it is not there yet; SystemExit where one is there that is of other things."""
        if (done := read_row(self.key(name))) is None:
            return self.run(name)
        expected = {"labels": self.label_settings, "annotated": self.annotated, "mirroring": self.mirroring}
        expected["test_cases"] = len(self.test)
        return self.checked(name, done, expected)

    def checked(self, name: str, done: dict[str, Any], expected: Mapping[str, Any]) -> dict[str, Any]:
        """A row that is there; SystemExit where it is of other things than those expected."""
        if other := [key for key, value in expected.items() if done[key] != value]:
            raise SystemExit(f"{self.key(name)}.json is of other {', '.join(other)}: take it away to run it again")
        return done

    def run(self, row: str) -> dict[str, Any]:
        """Train, predict the test cases and score them."""
        begin = time.process_time()
        trainer = self._trained(ROWS[row])
        trained = time.process_time()
        images = {case: [self.data.folder / "images" / f"{case}{self.data.ending}"] for case in self.test}
        predictions = predict(trainer, images, self.work / "predictions" / self.key(row), self.mirroring)
        scored = evaluate(self.data.labels, predictions, self.dataset_json, cases=self.test)
        return write_row(self.key(row), self._content(row, scored, trainer, trained - begin))

    def _write_fused(self, labelled: Path) -> None:
        content = json.loads((labelled / "dataset.json").read_text(encoding="utf-8"))
        del content["labels"]["ignore"], content["oneshot"]
        for case, entry in content["dataset"].items():
            entry["label"] = f"../{labelled.name}/pseudoTr/rounds/00/{case}{self.data.ending}"
        folder = labelled.with_name(f"Dataset{FUSED}_{self.data.name}_fused")
        folder.mkdir(exist_ok=True)
        (folder / "dataset.json").write_text(json.dumps(content, indent=2), encoding="utf-8")

    def _trained(self, recipe: Recipe) -> Any:
        def before(trainer: Any) -> None:
            if recipe.settings is not None:
                trainer.loss_settings = recipe.settings
            if recipe.weighted:
                trainer.block = replace(trainer.block, case_weight=self._quality())

        base = "nnUNetTrainer" if recipe.settings is None else "OneShotTrainer"
        names = (PRESET.trainer(base), PRESET.plans)
        trainer = make(recipe.dataset, self.configuration, names, self.epochs, self.seed, before=before)
        if recipe.balanced:
            weigh_classes(trainer)
        trainer.run_training()
        return trainer

    def _quality(self) -> dict[str, float]:
        """Estimated Dice of the pseudo labels, as `refine --weight_by_quality` uses it."""
        path = next(Path(os.environ["nnUNet_raw"]).glob(f"Dataset{LABELLED}_*/oneshot.json"))
        manifest = read_manifest(path)
        manifest.weight_by_quality = True
        return dict(oneshot_block(manifest).case_weight)

    def _content(self, row: str, scored: Evaluation, trainer: Any, seconds: float) -> dict[str, Any]:
        dice, hd95 = (scored.summary[FOREGROUND][metric] for metric in ("Dice", "HD95"))
        return {
            "row": row,
            "what": ROWS[row].what,
            "set": self.data.name,
            "annotated": self.annotated,
            "labels": self.label_settings,
            "pool": len(self.pool) + 1,
            "configuration": self.configuration,
            "epochs": self.epochs,
            "iterations": trainer.num_iterations_per_epoch,
            "seed": self.seed,
            "mirroring": self.mirroring,
            "test_cases": len(self.test),
            "dice": round(dice.mean, 4),
            "dice_interval": [round(dice.low, 4), round(dice.high, 4)],
            "hd95": round(hd95.mean, 3),
            "classes": {c: round(r["Dice"].mean, 4) for c, r in scored.summary.items()},
            "case_dice": [round(float(value), 4) for value in scored.case_mean()[:, METRICS.index("Dice")]],
            "train_loss": [round(float(value), 3) for value in trainer.logger.get_value("train_losses", None)],
            "training_cpu_seconds": round(seconds),
        }


def weigh_classes(trainer: Any) -> None:
    """Weigh each class's cross entropy by the inverse root of its voxels in consensus, the mean weight being 1.

    Not in the trainer itself unless it pays: nnU-Net's Dice term and its drawing of boxes treat classes alike as it is.
    """
    cases = nnUNetDatasetBlosc2(trainer.preprocessed_dataset_folder)
    classes = len(trainer.label_manager.all_labels)
    counts = np.zeros(classes)
    for case in cases.identifiers:
        label = np.asarray(cases.load_case(case)[1][:])
        counts += np.bincount(label[(label >= 0) & (label < classes)].ravel(), minlength=classes)
    weights = 1 / np.sqrt(np.maximum(counts, 1))
    supervised = trainer.dual_loss.supervised
    loss = supervised.loss if trainer.enable_deep_supervision else supervised
    loss.ce.weight = torch.tensor(weights / weights.mean(), dtype=torch.float32, device=trainer.device)


def difference(rows: Sequence[Mapping[str, Any]], first: Sequence[Mapping[str, Any]]) -> str:
    """Mean paired difference of the cases' Dice, mean over seeds, and its 95 % bootstrap interval over cases."""
    values = np.mean([row["case_dice"] for row in rows], axis=0) - np.mean([row["case_dice"] for row in first], axis=0)
    drawn = np.random.default_rng(0).choice(values, (2000, len(values))).mean(1)
    low, high = np.quantile(drawn, [0.025, 0.975])
    return f"{values.mean():+.3f} [{low:+.3f}, {high:+.3f}]"


def line(rows: Sequence[Mapping[str, Any]], first: Sequence[Mapping[str, Any]]) -> list[Any]:
    """One line of the table, of one row's seeds."""
    dice = [row["dice"] for row in rows]
    hd95 = np.mean([row["hd95"] for row in rows])
    seconds = np.median([row["training_cpu_seconds"] for row in rows])
    figures = [f"{np.mean(dice):.3f}", " ".join(f"{d:.3f}" for d in dice), f"{hd95:.2f}", difference(rows, first)]
    return [rows[0]["row"], rows[0]["what"], *figures, f"{seconds:.0f}"]


def add_data_arguments(parser: argparse.ArgumentParser) -> None:
    """What names the data, the budget and the working folder."""
    parser.add_argument("--set", default="hippocampus")
    parser.add_argument("--annotated", help="annotated case (default: the split's own)")
    parser.add_argument("--cases", type=int, default=26, help="pool cases, the annotated one included")
    parser.add_argument("-c", default="3d_fullres")
    parser.add_argument("--epochs", type=int, default=PRESET.schedule.epochs if PRESET.schedule else 0)
    parser.add_argument("--test", type=int, help="the first N test cases only")
    parser.add_argument("--no_mirroring", action="store_true", help="predict without mirroring, for a screen")
    parser.add_argument("-o", type=Path, required=True, help="working folder, one for each data set")


def main() -> None:
    """Run what is missing and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_data_arguments(parser)
    parser.add_argument("--rows", nargs="+", default=list(ROWS), choices=list(ROWS))
    parser.add_argument("--seed", nargs="+", type=int, default=[0], help="one or more")
    arguments = parser.parse_args()
    use_folders(arguments.o)
    os.environ["nnUNet_n_proc_DA"] = "0"
    ablations = [Ablation(arguments, seed) for seed in arguments.seed]
    for ablation in ablations:
        ablation.prepare()
    rows = [[ablation.row(name) for ablation in ablations] for name in arguments.rows]
    header = ["row", "what", "Dice", "by seed", "HD95 mm", "difference to the first", "CPU s of training"]
    print(markdown(header, [line(of_seeds, rows[0]) for of_seeds in rows]))


if __name__ == "__main__":
    main()
