"""`python -m sam2_propagation.pretraining.pictures -o PNG`: a sheet of tasks as the training sees them.

A row is an anatomy: two support slices with their memory masks (red: as given to the memory; green: the truth), then
the query alone, then the query with the object that is asked for (green).
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from PIL import Image

from sam2_propagation.pretraining.pairing import Batch, NoObject, draw_group, make_batch
from sam2_propagation.pretraining.recipe import Recipe, curriculum

RED, GREEN = (255, 60, 60), (60, 230, 60)
Picture = npt.NDArray[np.uint8]


def sheet(rows: int, columns: int, step: int, seed: int = 0, size: int = 112) -> Picture:
    """A picture (H, W, 3) of rows x columns tasks at the difficulty of a training step."""
    recipe = Recipe(size=size, elements=1)
    tasks: list[Picture] = []
    rng = np.random.default_rng(seed)
    while len(tasks) < rows * columns:
        groups = [draw_group(rng, curriculum(step), recipe.frames)]
        try:
            batch = make_batch(groups, rng, curriculum(step), recipe, 2, torch.device("cpu"))
        except NoObject:
            continue
        tasks.append(_task(batch))
    return np.concatenate([np.concatenate(tasks[r * columns : (r + 1) * columns], 1) for r in range(rows)], 0)


def _task(batch: Batch) -> Picture:
    query = batch.images[batch.query[0]]
    memories = [
        _outlined(batch.images[frame], {GREEN: truth, RED: mask})
        for frame, truth, mask in zip(
            batch.memory_frame[0], batch.true_memory_mask[0], batch.memory_mask[0], strict=True
        )
    ]
    shown = [*memories, _outlined(query, {}), _outlined(query, {GREEN: batch.target[0]})]
    return np.pad(np.concatenate(shown, axis=1), ((0, 4), (0, 8), (0, 0)), constant_values=255)


def _outlined(image: torch.Tensor, outlines: dict[tuple[int, int, int], torch.Tensor]) -> Picture:
    picture = np.repeat((image * 255).byte().numpy()[..., None], 3, axis=-1)
    for colour, mask in outlines.items():
        inner = -F.max_pool2d(-mask[None, None], 3, 1, 1)[0, 0]
        picture[(mask > inner).numpy()] = colour
    return picture


def main(arguments: Sequence[str] | None = None) -> int:
    """Write the sheet."""
    parser = argparse.ArgumentParser(prog="python -m sam2_propagation.pretraining.pictures", description=main.__doc__)
    parser.add_argument("-o", type=Path, required=True, metavar="PNG")
    parser.add_argument("--rows", type=int, default=5)
    parser.add_argument("--columns", type=int, default=2)
    parser.add_argument("--step", type=int, default=2000, help="of the curriculum")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args(arguments)
    picture = sheet(options.rows, options.columns, options.step, options.seed)
    Image.fromarray(picture).convert("P", palette=Image.Palette.ADAPTIVE, colors=24).save(options.o, optimize=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
