"""Which optimizer learns in the few iterations of the presets: trainings of `tiny` length on registered phantom labels.

    python benchmarks/short_training.py -o WORK [--rows sgd:0.01 adamw:0.001 adamw:0.003 adamw:0.01 adamw:0.03]

Twelve phantoms, one annotated, registered labels of round 0, nnU-Net's own trainer on `nnUNetOneShotSmallPlans` for
10 epochs of 20 iterations; Dice against truth on five of the un-annotated cases, predicted without mirroring. Phantoms
alone decide here, so that no real set takes part in the choice. nnU-Net's augmentation is not seeded: repeat for the
spread. Finished rows are small JSON files in benchmarks/results/.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import torch
from common import markdown, read_row, use_folders, write_row
from nnunetv2.inference.predict_from_raw_data import nnUNetPredictor
from nnunetv2.run.run_training import get_trainer_from_args
from nnunetv2.training.lr_scheduler.polylr import PolyLRScheduler
from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer

from nnunet_oneshot import nnunet
from nnunet_oneshot.dataset import open_dataset
from nnunet_oneshot.evaluate import FOREGROUND, evaluate
from nnunet_oneshot.phantom import write_phantom_dataset
from nnunet_oneshot.propagate import propagate
from nnunet_oneshot.settings import PRESETS

SOURCE, LABELLED = 501, 601
CONFIGURATION = "3d_fullres"
TINY = PRESETS["tiny"]
SCORED = 5


def prepare(work: Path) -> None:
    """Phantoms, their labels of round 0, and nnU-Net's preprocessed data."""
    if not (work / "truth").is_dir():
        write_phantom_dataset(work / "nnUNet_raw", SOURCE, truth=work / "truth")
    if not any((work / "nnUNet_raw").glob(f"Dataset{LABELLED}_*")):
        propagate(SOURCE, LABELLED, propagators=["registration"])
    nnunet.plan_and_preprocess(LABELLED, TINY, [CONFIGURATION], 2)


def train(optimizer: str, rate: float) -> nnUNetTrainer:
    """nnU-Net's trainer, shortened, with the optimizer and learning rate given."""
    name = nnunet.dataset_name(LABELLED)
    trainer = get_trainer_from_args(name, CONFIGURATION, "all", "nnUNetTrainer", TINY.plans, torch.device("cpu"))
    schedule = TINY.schedule
    assert schedule is not None
    trainer.num_epochs, trainer.num_iterations_per_epoch = schedule.epochs, schedule.iterations
    trainer.num_val_iterations_per_epoch, trainer.initial_lr = 1, rate
    if optimizer == "adamw":
        trainer.configure_optimizers = lambda: _adamw(trainer)
    trainer.run_training()
    return trainer


def _adamw(trainer: nnUNetTrainer) -> tuple[torch.optim.Optimizer, Any]:
    made = torch.optim.AdamW(trainer.network.parameters(), trainer.initial_lr, weight_decay=trainer.weight_decay)
    return made, PolyLRScheduler(made, trainer.initial_lr, trainer.num_epochs)


def dice(trainer: nnUNetTrainer, work: Path, row: str) -> dict[str, float]:
    """Mean Dice over the scored cases, by class and all."""
    cases = open_dataset(SOURCE).unannotated[:SCORED]
    predictor = nnUNetPredictor(use_mirroring=False, device=torch.device("cpu"), allow_tqdm=False)
    predictor.initialize_from_trained_model_folder(trainer.output_folder_base, ("all",), "checkpoint_final.pth")
    output = work / "predictions" / row
    output.mkdir(parents=True, exist_ok=True)
    images = [[str(path) for path in case.images] for case in cases]
    predictor.predict_from_files_sequential(images, [str(output / case.name) for case in cases])
    source = nnunet.root("nnUNet_raw") / nnunet.dataset_name(SOURCE) / "dataset.json"
    scored = evaluate(work / "truth", output, source, cases=[case.name for case in cases])
    return {label: float(entry["Dice"].mean) for label, entry in scored.summary.items()}


def run_row(row: str, work: Path) -> dict[str, Any]:
    """One row, from its file if it is there."""
    name = f"short_training_{row.replace(':', '_')}"
    done = read_row(name)
    if done is not None:
        return done
    optimizer, rate = row.split(":")
    scores = dice(train(optimizer, float(rate)), work, row.replace(":", "_"))
    return write_row(
        name, {"optimizer": optimizer, "rate": float(rate), "iterations": 200, "n": SCORED, "dice": scores}
    )


def main() -> None:
    parser = argparse.ArgumentParser(description="optimizers in short trainings, on phantoms")
    parser.add_argument("-o", "--work", type=Path, required=True)
    parser.add_argument("--rows", nargs="+", default=["sgd:0.01", "adamw:0.001", "adamw:0.003", "adamw:0.01"])
    arguments = parser.parse_args()
    use_folders(arguments.work)
    prepare(arguments.work)
    rows = [run_row(row, arguments.work) for row in arguments.rows]
    figures = [[row["optimizer"], row["rate"], f"{row['dice'][FOREGROUND]:.3f}"] for row in rows]
    print(markdown(["optimizer", "learning rate", f"Dice, n = {SCORED}"], figures))


if __name__ == "__main__":
    main()
