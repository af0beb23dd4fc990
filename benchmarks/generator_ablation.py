"""What each part of the synthetic anatomy gives: short trainings of the built-in SAM2, each with one part left out.

    python benchmarks/generator_ablation.py -o WORK [--parts all no_other_subject ...] [--steps 600] [--seed 1]

Every training begins with the same random weights and ends after so many steps, long before it would be done; a part
that helps late is not seen here. Parts (`PARTS` says how each is left out):

    all                 the recipe as it is
    no_other_subject    all slices of a task are of one volume
    same_contrast       support and query always have the same protocol
    no_damaged_masks    the query is never its own, badly labelled, memory
    clean_images        tones and texture alone: no noise, blur, bias, streaks, ghosts, speckle, coarse pixels
    organs_only         one kind of anatomy in place of six
    no_clutter          nothing but the anatomy's own parts
    no_chains           no prediction becomes a memory of the slices after it

Mean Dice on held-out synthetic tasks of the whole generator, and mean foreground Dice of two modes on phantoms,
chaos_mr_t2 and hippocampus ($ONESHOT_DATA, or ../shared/data beside the repository): `across` (retrieve) and `self`,
prompted with registration's fused label, one view. The default annotated case is carried to --cases other pool cases,
whose labels score alone. One thread. A training can be resumed from WORK; finished rows, benchmarks/results/
generator<G>_<part>_<steps>_<seed>.json with G the generator of recipe.py, are not computed again; those of the
first generator are generator_<part>_<steps>_<seed>.json.
"""

from __future__ import annotations

import argparse
import contextlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch
from builtin_checkpoint import REGISTRATION, Recorded, Row, pool, read_case, registered
from common import markdown, read_row, write_row
from registration import dice
from suggest import spread
from tqdm import tqdm

from sam2_propagation.consensus import fuse
from sam2_propagation.interface import Support
from sam2_propagation.pretraining import appearance, pairing, training
from sam2_propagation.pretraining.__main__ import export
from sam2_propagation.pretraining.appearance import Look
from sam2_propagation.pretraining.model import CONFIGURATION
from sam2_propagation.pretraining.recipe import GENERATOR, Difficulty, Recipe, curriculum
from sam2_propagation.pretraining.templates import organs
from sam2_propagation.pretraining.training import Run, Schedule, Worker, train
from sam2_propagation.pretraining.validation import TASKS, validate
from sam2_propagation.sam2 import Sam2Propagator

SETS = ("phantom", "chaos_mr_t2", "hippocampus")
MODES = ("across", "self")
BATCHES = 8
"""Of held-out synthetic tasks, of each kind."""
DECAY_SHARE = 0.35
CHECKPOINT = "checkpoint.safetensors"


def _clean(look: Look) -> Look:
    plain = {"gamma": 1.0, "noise": 0.0, "grainy_noise": 0.0, "speckle": 0.0, "blur": 0.0, "bias": 0.0, "streak": 0.0}
    return replace(look, **plain, ghost=0.0, fan=(0.0, 2.0), window=(0.0, 0.0), coarse=1.0, clutter=(0.0,) * 3)


@dataclass(frozen=True)
class Part:
    """How one part is left out.

    Attributes:
        tasks: what becomes of the difficulty of a step.
        looks: what becomes of a drawn appearance.
        kinds: draws the parts of an anatomy; None for the generator's own kinds.
        recipe: fields of the recipe that differ.
    """

    tasks: Callable[[Difficulty], Difficulty] = lambda difficulty: difficulty
    looks: Callable[[Look], Look] = lambda look: look
    kinds: Callable[[np.random.Generator], Any] | None = None
    recipe: Mapping[str, Any] = field(default_factory=dict)


PARTS: Mapping[str, Part] = {
    "all": Part(),
    "no_other_subject": Part(tasks=lambda difficulty: replace(difficulty, one_volume=1.0)),
    "same_contrast": Part(tasks=lambda difficulty: replace(difficulty, other_contrast=0.0)),
    "no_damaged_masks": Part(tasks=lambda difficulty: replace(difficulty, own_memory=0.0)),
    "clean_images": Part(looks=_clean),
    "organs_only": Part(kinds=lambda rng: tuple(organs(rng))),
    "no_clutter": Part(looks=lambda look: replace(look, clutter=(0.0,) * 3)),
    "no_chains": Part(recipe={"hop_share": 0.0}),
}


@contextlib.contextmanager
def without(part: Part) -> Iterator[None]:
    """While this lasts, the generator lacks that part."""
    drawn = appearance.draw_look

    def look(rng: np.random.Generator) -> Look:
        return part.looks(drawn(rng))

    with contextlib.ExitStack() as stack:
        stack.enter_context(mock.patch.object(training, "curriculum", lambda step: part.tasks(curriculum(step))))
        for module in (appearance, pairing):
            stack.enter_context(mock.patch.object(module, "draw_look", look))
        if part.kinds is not None:
            stack.enter_context(mock.patch.object(pairing, "draw_parts", part.kinds))
        yield


def trained(folder: Path, recipe: Recipe, steps: int) -> Run:
    """A short training to its end on one thread, resumed where the folder holds one; its weights are exported there."""
    folder.mkdir(parents=True, exist_ok=True)
    schedule = Schedule(steps, validation_batches=0)
    run = train(folder, recipe, schedule, Worker(), torch.device("cpu"), report=lambda line: None)
    export(run, folder / CHECKPOINT)
    return run


def held_out(run: Run, size: int = Recipe.size) -> dict[str, float]:
    """Dice on held-out tasks of the whole generator, by kind."""
    scores = validate(run.average, Recipe(size=size), torch.device("cpu"), BATCHES)
    return {task: round(scores[task], 4) for task in TASKS}


def carried(checkpoint: Path, name: str, count: int, work: Path) -> dict[str, float]:
    """Mean foreground Dice of each mode on one set."""
    annotated, queries = pool(name, "default")[0]
    row = Row(name, annotated, REGISTRATION, "", None, "", work)
    image, label = read_case(name, annotated)
    support = Support(image, label())
    across = Sam2Propagator(checkpoint, CONFIGURATION, mode="retrieve")
    own = Sam2Propagator(checkpoint, CONFIGURATION, mode="self", prompter=Recorded())
    found: dict[str, list[float]] = {mode: [] for mode in MODES}
    for case in tqdm(spread(queries, count), desc=name):
        query, truth = read_case(name, case)
        assert isinstance(own.prompter, Recorded)
        labels = list(registered(row, query)["labels"].values())
        own.prompter.label = fuse(labels, spacing=query.spacing).label
        for mode, propagator in zip(MODES, (across, own), strict=True):
            result = next(iter(propagator.propagate([support], [query], ["identity"])))
            drawn = np.zeros_like(truth()) if result.label is None else result.label
            found[mode].append(dice(drawn, truth(), sorted(support.classes)))
    return {mode: round(float(np.mean(values)), 4) for mode, values in found.items()}


def run_part(name: str, steps: int, seed: int, cases: int, work: Path) -> dict[str, Any]:
    """One row, from its file if it is there."""
    title = f"generator{GENERATOR}_{name}_{steps}_{seed}"
    if (row := read_row(title)) is not None:
        return row
    folder = work / f"{GENERATOR}_{name}_{steps}_{seed}"
    with without(PARTS[name]):
        run = trained(folder, Recipe(seed=seed, decay_share=DECAY_SHARE, **PARTS[name].recipe), steps)
    synthetic = held_out(run)
    real = {data: carried(folder / CHECKPOINT, data, cases, work) for data in SETS}
    about = {"part": name, "steps": steps, "seed": seed, "n": cases}
    return write_row(title, {**about, "synthetic": synthetic, "dice": real})


def main() -> None:
    """Fill in what is missing and print the table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("-o", "--work", type=Path, required=True)
    parser.add_argument("--parts", nargs="+", default=list(PARTS), choices=list(PARTS))
    parser.add_argument("--steps", type=int, default=600)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--cases", type=int, default=6)
    options = parser.parse_args()
    torch.set_num_threads(1)
    rows = [run_part(part, options.steps, options.seed, options.cases, options.work) for part in options.parts]
    head = ["left out", *TASKS, *(f"{data} {mode}" for data in SETS for mode in MODES)]
    cells = [
        [
            row["part"],
            *(row["synthetic"][task] for task in TASKS),
            *(row["dice"][data][mode] for data in SETS for mode in MODES),
        ]
        for row in rows
    ]
    print(markdown(head, cells))


if __name__ == "__main__":
    main()
