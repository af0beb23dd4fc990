"""Time of a training step of OneShotTrainer against nnUNetTrainer: one process, interleaved steps, medians.

    python benchmarks/trainer_overhead.py --set hippocampus --cases 26 -c 3d_fullres -o WORK

All train on the same labels with ignore, preset small, at the end of training, where consistency has its full weight:
nnU-Net's own trainer, ours with its defaults (the best guess in divergence, so that no views are compared), and the
forms that can be chosen. The augmentation is timed apart: it runs beside the step in nnU-Net's workers. The ratio of
each pair of neighbouring steps is taken first, so that other work on the machine, which slows both, hardly moves its
median.
"""

from __future__ import annotations

import argparse
import os
import time
from typing import Any

import numpy as np
import torch
from common import markdown, use_folders, write_row
from nnunetv2.run.run_training import get_trainer_from_args
from trainer_ablation import LABELLED, PRESET, ROWS, Ablation, Recipe, add_data_arguments

from nnunet_oneshot.bfloat16 import VARIABLE
from nnunet_oneshot.settings import LossSettings

TIMED = {
    "nnunet": Recipe("nnUNetTrainer", LABELLED),
    "oneshot": Recipe("OneShotTrainer, its defaults", LABELLED, LossSettings()),
    **{name: ROWS[name] for name in ("consistency", "mean_teacher", "three_passes", "cross_patch")},
}


def ready(recipe: Recipe, configuration: str, device: torch.device) -> Any:
    """A trainer in its last epoch."""
    base = "nnUNetTrainer" if recipe.settings is None else "OneShotTrainer"
    arguments = (str(recipe.dataset), configuration, "all", PRESET.trainer(base), PRESET.plans)
    trainer = get_trainer_from_args(*arguments, device=device)
    trainer.disable_checkpointing = True
    if recipe.settings is not None:
        trainer.loss_settings = recipe.settings
    trainer.on_train_start()
    trainer.current_epoch = trainer.num_epochs - 1
    trainer.on_epoch_start()
    trainer.on_train_epoch_start()
    return trainer


def timed_step(trainer: Any) -> tuple[float, float]:
    """Seconds of drawing a batch and of training on it; on a CPU those of this process, whatever else is running."""
    clock = time.process_time if trainer.device.type == "cpu" else time.perf_counter
    begin = clock()
    batch = next(trainer.dataloader_train)
    drawn = clock()
    trainer.train_step(batch)
    if trainer.device.type == "cuda":
        torch.cuda.synchronize(trainer.device)
    return drawn - begin, clock() - drawn


def main() -> None:
    """Time all trainers and write one row for each."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_data_arguments(parser)
    parser.add_argument("--steps", type=int, default=30, help="timed steps of each trainer, after two that are not")
    parser.add_argument("-device", default="cpu")
    arguments = parser.parse_args()
    use_folders(arguments.o)
    os.environ["nnUNet_n_proc_DA"] = "0"
    os.environ[VARIABLE] = "0"
    ablation = Ablation(arguments)
    ablation.prepare()
    trainers = {name: ready(r, arguments.c, torch.device(arguments.device)) for name, r in TIMED.items()}
    times = np.array([[timed_step(trainer) for trainer in trainers.values()] for _ in range(arguments.steps + 2)])[2:]
    table = [_row(ablation, arguments, name, times, column) for column, name in enumerate(TIMED)]
    print(markdown(["trainer", "step s", "ratio", "batch s"], [list(row) for row in table]))


def _row(ablation: Ablation, arguments: argparse.Namespace, name: str, times: np.ndarray, column: int) -> list[Any]:
    drawing, step = np.median(times[:, column], axis=0)
    ratio = np.median(times[:, column, 1] / times[:, 0, 1])
    both = np.median(times[:, column].sum(1) / times[:, 0].sum(1))
    row = {
        "trainer": TIMED[name].what,
        "set": ablation.data.name,
        "configuration": arguments.c,
        "device": arguments.device,
        "threads": torch.get_num_threads(),
        "steps": len(times),
        "step_seconds": round(float(step), 4),
        "batch_seconds": round(float(drawing), 4),
        "ratio": round(float(ratio), 3),
        "ratio_with_batch": round(float(both), 3),
    }
    write_row(f"trainer_overhead_{ablation.data.name}_{arguments.c}_{arguments.device}_{name}", row)
    return [name, row["step_seconds"], row["ratio"], row["batch_seconds"]]


if __name__ == "__main__":
    main()
