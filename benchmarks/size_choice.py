"""What a larger or smaller built-in SAM2 would learn and cost: short trainings of the recipe, one for each size.

    python benchmarks/size_choice.py -o WORK [--sizes narrow builtin wide fine] [--steps 400] [--seed 1]

    narrow     Hiera begins with 16 channels
    builtin    with 32: the size that the package ships
    wide       with 48
    fine       32, but 256 x 256 pixels in place of 192 x 192, so a memory of 16 x 16 in place of 12 x 12

Each begins with random weights and sees the same tasks, and ends long before it would be done; what a large network
gains late is not seen here. No real image takes part: size is chosen by Dice on held-out synthetic tasks and by cost,
in processor seconds on one thread: a training step, and finding up to 24 objects of four anatomies from two memories
each. A training can be resumed from WORK (a step's cost is then unknown); finished rows, benchmarks/results/
size<G>_<size>_<steps>_<seed>.json with G the generator of recipe.py, are not computed again.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch
from common import markdown, read_row, write_row
from generator_ablation import CHECKPOINT, DECAY_SHARE, held_out, trained
from omegaconf import OmegaConf
from sam2.modeling.sam2_base import SAM2Base

from sam2_propagation.pretraining import training
from sam2_propagation.pretraining.model import CONFIGURATION, build_model, follow
from sam2_propagation.pretraining.pairing import draw_group, make_batch
from sam2_propagation.pretraining.recipe import GENERATOR, Recipe
from sam2_propagation.pretraining.state import has_state
from sam2_propagation.pretraining.validation import TASKS

REPEATS = 5
STRIDE = 16
"""Pixels of the input that one place of the memory stands for."""


@dataclass(frozen=True)
class Size:
    """What differs from the built-in configuration.

    Attributes:
        channels: of Hiera's first stage; each later one has twice as many as the one before.
        pixels: side of the input.
    """

    channels: int = 32
    pixels: int = Recipe.size


SIZES: Mapping[str, Size] = {
    "narrow": Size(channels=16),
    "builtin": Size(),
    "wide": Size(channels=48),
    "fine": Size(pixels=256),
}


def configured(size: Size, path: Path) -> Path:
    """Write the configuration of a size, in SAM2's own form."""
    content = OmegaConf.load(CONFIGURATION)
    encoder, attention = content.model.image_encoder, content.model.memory_attention.layer
    encoder.trunk.embed_dim = size.channels
    encoder.neck.backbone_channel_list = [size.channels * factor for factor in (8, 4, 2, 1)]
    content.model.image_size = size.pixels
    for part in (attention.self_attention, attention.cross_attention):
        part.feat_sizes = [size.pixels // STRIDE] * 2
    path.parent.mkdir(parents=True, exist_ok=True)
    OmegaConf.save(content, path)
    return path


def seconds_to_follow(model: SAM2Base, recipe: Recipe) -> float:
    """Processor seconds of one forward pass over one held-out batch, median."""
    task = TASKS["slice"]
    rng = np.random.default_rng(0)
    groups = [draw_group(rng, task.difficulty, task.frames) for _ in range(4)]
    frames = replace(recipe, frames=task.frames)
    batch = make_batch(groups, rng, task.difficulty, frames, 2, torch.device("cpu"))
    seconds = []
    with torch.no_grad():
        for _ in range(REPEATS):
            begin = time.process_time()
            follow(model, batch)
            seconds.append(time.process_time() - begin)
    return statistics.median(seconds)


def run_size(name: str, steps: int, seed: int, work: Path) -> dict[str, Any]:
    """One row, from its file if it is there."""
    title = f"size{GENERATOR}_{name}_{steps}_{seed}"
    if (row := read_row(title)) is not None:
        return row
    folder = work / f"size{GENERATOR}_{name}_{steps}_{seed}"
    path = configured(SIZES[name], folder / "model.yaml")
    recipe = Recipe(seed=seed, size=SIZES[name].pixels, decay_share=DECAY_SHARE)
    resumed, begin = has_state(folder), time.process_time()
    with mock.patch.multiple(training, CONFIGURATION=path, build_model=partial(build_model, path)):
        run = trained(folder, recipe, steps)
    row = {
        "size": name,
        "channels": SIZES[name].channels,
        "pixels": SIZES[name].pixels,
        "steps": steps,
        "seed": seed,
        "parameters": sum(p.numel() for p in run.average.parameters()),
        "megabytes": round((folder / CHECKPOINT).stat().st_size / 1e6, 1),
        "cpu_seconds_a_step": None if resumed else round((time.process_time() - begin) / steps, 3),
        "cpu_seconds_to_follow": round(seconds_to_follow(run.average, recipe), 3),
        "synthetic": held_out(run, recipe.size),
    }
    return write_row(title, row)


def main() -> None:
    """Fill in what is missing and print the table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("-o", "--work", type=Path, required=True)
    parser.add_argument("--sizes", nargs="+", default=list(SIZES), choices=list(SIZES))
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--seed", type=int, default=1)
    options = parser.parse_args()
    torch.set_num_threads(1)
    rows = [run_size(size, options.steps, options.seed, options.work) for size in options.sizes]
    head = ["size", "M parameters", "MB", *TASKS, "CPU s a step", "CPU s a batch"]
    cells = [
        [
            row["size"],
            round(row["parameters"] / 1e6, 1),
            row["megabytes"],
            *(row["synthetic"][task] for task in TASKS),
            row["cpu_seconds_a_step"],
            row["cpu_seconds_to_follow"],
        ]
        for row in rows
    ]
    print(markdown(head, cells))


if __name__ == "__main__":
    main()
