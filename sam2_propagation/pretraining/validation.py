"""Held-out synthetic anatomy: the same tasks for every checkpoint of every run, from seeds that training never uses.

`python -m sam2_propagation.pretraining.validation` scores the built-in checkpoint, or another of its configuration.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from sam2.modeling.sam2_base import SAM2Base

from sam2_propagation.checkpoints import check_device
from sam2_propagation.errors import PropagationError
from sam2_propagation.pretraining.losses import dice_score
from sam2_propagation.pretraining.model import CONFIGURATION, build_model, follow, load_weights
from sam2_propagation.pretraining.pairing import draw_group, make_batch
from sam2_propagation.pretraining.recipe import Difficulty, Recipe

VALIDATION_SEED = 2**31
HARD = Difficulty(
    unlike=1, other_contrast=0, min_area=0.003, damage=1, absent=0, one_volume=0, own_memory=0, gap=0.22, crop=0.3
)


@dataclass(frozen=True)
class Task:
    """A kind of task: how it is drawn, how many slices each anatomy is seen in, and how far apart predictions hop."""

    difficulty: Difficulty
    frames: int = 4
    hop: int = 0


TASKS: dict[str, Task] = {
    "slice": Task(replace(HARD, one_volume=1)),
    "subject": Task(HARD),
    "contrast": Task(replace(HARD, other_contrast=1)),
    "self": Task(replace(HARD, own_memory=1)),
    "chain": Task(replace(HARD, one_volume=1, gap=0.12), frames=12, hop=1),
}
"""One kind each: another slice of the volume, another subject, another contrast, the query's own bad mask, and the last
of six slices of which each prediction becomes memory of the next (where an object is rightly not found it counts 1)."""


@torch.no_grad()
def validate(model: SAM2Base, recipe: Recipe, device: torch.device, batches: int = 4) -> dict[str, float]:
    """Mean Dice of each kind of task, and of using the first memory's mask as it is (`<task>_copied`)."""
    was_training = model.training
    model.eval()
    scores: dict[str, float] = {}
    for number, (name, task) in enumerate(TASKS.items()):
        pairs = [_score(model, recipe, task, (VALIDATION_SEED, number, i), device) for i in range(batches)]
        found, copied = (torch.cat(values) for values in zip(*pairs, strict=True))
        scores[name] = float(found.mean())
        scores[f"{name}_copied"] = float(copied.mean())
    model.train(was_training)
    return scores


def _score(
    model: SAM2Base, recipe: Recipe, task: Task, seed: tuple[int, ...], device: torch.device
) -> tuple[torch.Tensor, torch.Tensor]:
    rng = np.random.default_rng(seed)
    groups = [draw_group(rng, task.difficulty, task.frames) for _ in range(4)]
    batch = make_batch(groups, rng, task.difficulty, replace(recipe, frames=task.frames), 2, device)
    predictions = follow(model, batch, task.hop)
    target = batch.targets[:, len(predictions) - 1]
    return dice_score(predictions[-1].logits > 0, target), dice_score(batch.memory_mask[:, 0], target)


def main(arguments: Sequence[str] | None = None) -> int:
    """Print a checkpoint's scores as JSON."""
    parser = argparse.ArgumentParser(prog="python -m sam2_propagation.pretraining.validation", description=main.__doc__)
    built_in = CONFIGURATION.with_suffix(".safetensors")
    parser.add_argument("--checkpoint", type=Path, default=built_in, metavar="SAFETENSORS")
    parser.add_argument("--batches", type=int, default=4, help="of four anatomies, for each kind of task")
    parser.add_argument("-device", default="cpu")
    options = parser.parse_args(arguments)
    if options.batches < 1:
        print(f"error: expected --batches of at least 1, found {options.batches}; choose more", file=sys.stderr)
        return 2
    if not options.checkpoint.is_file():
        print(f"error: expected a checkpoint at {options.checkpoint}, found none; correct the path", file=sys.stderr)
        return 2
    try:
        device = check_device(options.device)
        model = build_model().to(device)
        load_weights(model, options.checkpoint)
    except PropagationError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    scores = validate(model, Recipe(), device, options.batches)
    print(json.dumps({name: round(score, 4) for name, score in scores.items()}, indent=1))
    return 0


if __name__ == "__main__":
    sys.exit(main())
