"""How much of a slice's own mask does SAM2 give back, where it is right and where it is wrong?

    python benchmarks/own_mask.py [--sets synthetic chaos_mr_t2 acdc_mr hippocampus] [--checkpoint SAFETENSORS]

`self` mode in small: a slice and its neighbour are memory with a mask of their own, and the slice is segmented. The
mask is the true one, or that one damaged as the training damages it (all of a task's masks alike). Real sets: slices of
the annotated case alone, with its own label, which is what a user has; cut to its objects with a margin of a quarter,
as `self` mode does. `synthetic`: held-out anatomies of the recipe. Mean Dice over at most 48 tasks of objects of at
least 0.3 % of the image: of the damaged masks, of what SAM2 makes of true and of damaged ones, and of the true masks at
the decoder's resolution, which is the most that it could. One thread, seed 0. A finished row,
benchmarks/results/own_mask_<set>_<sum>.json, is not computed again.
"""

from __future__ import annotations

import argparse
import hashlib
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from common import markdown, read_row, write_row
from registration import read_image, read_label, split_of
from sam2.modeling.sam2_base import SAM2Base

from sam2_propagation.checkpoints import builtin_file
from sam2_propagation.intensities import scale
from sam2_propagation.pretraining.corruption import corrupt, draw_corruption
from sam2_propagation.pretraining.losses import dice_score
from sam2_propagation.pretraining.model import build_model, follow, load_weights
from sam2_propagation.pretraining.pairing import Batch, draw_group, make_batch
from sam2_propagation.pretraining.recipe import Recipe
from sam2_propagation.pretraining.validation import HARD
from sam2_propagation.sam2_memory import window_around
from sam2_propagation.sam2_settings import Sam2Settings
from sam2_propagation.views import present

SETS = ("synthetic", "chaos_mr_t2", "acdc_mr", "hippocampus")
TASKS, AT_ONCE = 48, 12
LEAST = 0.003
FIGURES = ("damaged", "given_true", "given_damaged", "decoder_could")


def annotated_slices(name: str, size: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Images (N, size, size) in [0, 1] and labels (N, size, size) of a set's annotated case, cut to its objects."""
    case = split_of(name)["annotated_default"]
    image, label = read_image(name, case), read_label(name, case)
    shown = present(image, "identity")
    seen, drawn = shown.forward(scale(image, Sam2Settings().intensities))[0], shown.forward(label)
    window = window_around(drawn, [int(v) for v in np.unique(drawn) if v], 0.25)
    images, labels = (torch.from_numpy(np.ascontiguousarray(window.cut(a))).float()[:, None] for a in (seen, drawn))
    images = F.interpolate(images, size=(size, size), mode="bilinear", antialias=True, align_corners=False)
    return images[:, 0].clamp(0, 1), F.interpolate(labels, size=(size, size))[:, 0].long()


def tasks_of(name: str, recipe: Recipe) -> Batch:
    """Slices of the annotated case, each with a neighbour; its masks are the true ones."""
    images, labels = annotated_slices(name, recipe.size)
    rng = np.random.default_rng(0)
    pairs = []
    for value in np.unique(labels.numpy())[1:]:
        large = set(np.flatnonzero((labels == int(value)).flatten(1).float().mean(1).numpy() >= LEAST).tolist())
        pairs += [(i, j, int(value)) for i in sorted(large) for j in (i - 1, i + 1) if j in large]
    chosen = torch.tensor([pairs[i] for i in rng.permutation(len(pairs))[:TASKS]])
    memory, values = chosen[:, :2], chosen[:, 2].view(-1, 1, 1, 1)
    truth = (labels[memory] == values).float()
    return Batch(images, memory, truth, truth, memory[:, :1], truth[:, :1])


def synthetic_tasks(recipe: Recipe) -> Batch:
    """Held-out anatomies whose queries remember themselves."""
    rng = np.random.default_rng((2**31, 0))
    hard = replace(HARD, own_memory=1.0, damage=0.0, min_area=LEAST)
    groups = [draw_group(rng, hard, recipe.frames) for _ in range(4 * TASKS // recipe.elements)]
    batch = make_batch(groups, rng, hard, recipe, 2, torch.device("cpu"))
    itself, neighbour = batch.memory_frame.T
    own = torch.nonzero((itself == batch.query) & (neighbour == batch.queries[:, 1]))[:TASKS, 0]
    return _part(batch, own)


def _part(batch: Batch, index: torch.Tensor) -> Batch:
    parts = {k: v[index] for k, v in vars(batch).items() if k != "images"}
    return Batch(images=batch.images, **parts)


@torch.no_grad()
def given(model: SAM2Base, batch: Batch) -> float:
    """Mean Dice of what SAM2 makes of the batch's masks."""
    scores = []
    for index in torch.arange(len(batch.queries)).split(AT_ONCE):
        part = _part(batch, index)
        frames, where = torch.unique(torch.cat([part.memory_frame, part.queries], 1), return_inverse=True)
        memories = part.memory_frame.shape[1]
        part = replace(part, images=part.images[frames], memory_frame=where[:, :memories], queries=where[:, memories:])
        scores.append(dice_score(follow(model, part)[0].logits > 0, part.target))
    return float(torch.cat(scores).mean())


def decoded(masks: torch.Tensor, side: int) -> float:
    """Mean Dice of masks (N, H, W) brought to the decoder's resolution and back."""
    small = F.interpolate(masks[:, None], size=(side, side), mode="area")
    back = F.interpolate(small, size=masks.shape[-2:], mode="bilinear", align_corners=False)[:, 0]
    return float(dice_score(back > 0.5, masks).mean())


def run(name: str, checkpoint: Path) -> dict[str, Any]:
    """One row, from its file if it is there."""
    sha256 = hashlib.sha256(checkpoint.read_bytes()).hexdigest()
    title = f"own_mask_{name}_{sha256[:8]}"
    if (row := read_row(title)) is not None:
        return row
    recipe = Recipe()
    model = build_model().eval()
    load_weights(model, checkpoint)
    batch = synthetic_tasks(recipe) if name == "synthetic" else tasks_of(name, recipe)
    rng = np.random.default_rng(1)
    amount = np.repeat(rng.uniform(0.15, 1, (len(batch.queries), 1)), 2, 1).astype(np.float32)
    wrong = replace(batch, memory_mask=corrupt(batch.true_memory_mask, draw_corruption(rng, amount)))
    right = replace(batch, memory_mask=batch.true_memory_mask)
    figures = {
        "damaged": float(dice_score(wrong.memory_mask[:, 0], batch.target).mean()),
        "given_true": given(model, right),
        "given_damaged": given(model, wrong),
        "decoder_could": decoded(batch.target, recipe.size // 4),
    }
    rounded = {key: round(value, 4) for key, value in figures.items()}
    return write_row(title, {"set": name, "n": len(batch.queries), "checkpoint": sha256, "seed": 0, **rounded})


def main() -> None:
    """Fill in what is missing and print the table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--sets", nargs="+", default=list(SETS), choices=SETS)
    parser.add_argument("--checkpoint", type=Path, default=builtin_file(), metavar="SAFETENSORS")
    options = parser.parse_args()
    torch.set_num_threads(1)
    rows = [run(name, options.checkpoint) for name in options.sets]
    print(markdown(["set", "n", *FIGURES], [[r["set"], r["n"], *(f"{r[key]:.3f}" for key in FIGURES)] for r in rows]))


if __name__ == "__main__":
    main()
