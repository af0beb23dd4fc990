"""`python -m sam2_propagation.pretraining -o DIR`: train the built-in SAM2 on synthetic anatomy."""

from __future__ import annotations

import argparse
import hashlib
import os
import sys
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path

import torch
import torch.distributed as dist
from omegaconf import OmegaConf
from safetensors.torch import save_file

from sam2_propagation.checkpoints import check_device
from sam2_propagation.errors import PropagationError
from sam2_propagation.pretraining.model import CONFIGURATION
from sam2_propagation.pretraining.recipe import Recipe
from sam2_propagation.pretraining.state import has_state
from sam2_propagation.pretraining.training import Run, Schedule, Worker, train

BAD_INPUT = 2
_LEAST = {
    "steps": 1,
    "save_every": 1,
    "validate_every": 1,
    "validation_batches": 0,
    "threads": 1,
    "seed": 0,
    "elements": 1,
}
"""Options that are numbers, and the least of each that something can be done with."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; returns its exit code: 0 done, 2 bad input."""
    options = _parser().parse_args(arguments)
    worker = Worker(int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1")))
    problem = _bad_number(options, worker) or _problem(options, worker)
    if problem:
        print(f"error: {problem}", file=sys.stderr)
        return BAD_INPUT
    torch.set_num_threads(options.threads)
    try:
        device = check_device(options.device)
        if worker.world > 1:
            dist.init_process_group("gloo")
        run = train(options.o, _recipe(options), _schedule(options), worker, device, weights=options.begin_with)
    except PropagationError as error:
        print(f"error: {error}", file=sys.stderr)
        return BAD_INPUT
    if worker.leads:
        export(run, options.o / "checkpoint.safetensors")
    return 0


def export(run: Run, path: Path) -> None:
    """Write the averaged weights as float16 safetensors."""
    weights = {name: tensor.half().cpu().contiguous() for name, tensor in run.average.state_dict().items()}
    save_file(weights, path, metadata={"steps": str(run.step)})


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m sam2_propagation.pretraining",
        description="Train the built-in SAM2 on synthetic anatomy. Several workers: start it with torchrun.",
    )
    parser.add_argument("-o", type=Path, required=True, metavar="DIR", help="folder of the run: state, log, checkpoint")
    parser.add_argument("--steps", type=int, default=3000, help="steps in all; may be changed when resuming")
    parser.add_argument("--resume", action="store_true", help="go on from the state in DIR")
    parser.add_argument("--save-every", type=int, default=100, help="steps from state to state")
    parser.add_argument("--validate-every", type=int, default=250, help="steps from validation to validation")
    parser.add_argument("--validation-batches", type=int, default=4, help="of each kind of task; 0 for no validation")
    parser.add_argument("--threads", type=int, default=1, help="threads of each worker")
    parser.add_argument("-device", default="cpu", help="cpu, cuda, ...")
    parser.add_argument(
        "--begin-with",
        type=Path,
        metavar="SAFETENSORS",
        help="weights to begin with (see --practised), not random ones",
    )
    for f in fields(Recipe):
        if f.name == "weights":
            continue
        parser.add_argument(f"--{f.name.replace('_', '-')}", type=type(f.default), default=f.default)
    return parser


def _bad_number(options: argparse.Namespace, worker: Worker) -> str | None:
    """Which number nothing can be trained with, or None."""
    for name, least in _LEAST.items():
        found = getattr(options, name)
        if found < least:
            return f"expected --{name.replace('_', '-')} of at least {least}, found {found}; choose more"
    if options.groups < worker.world:
        return (
            f"expected --groups of at least {worker.world}, one for each worker, found {options.groups}; choose more "
            "groups or fewer workers"
        )
    if options.frames < 4 or options.frames % 2:
        # One half is support, the other query; a query has a neighbour.
        return f"expected an even number of --frames, at least 4, found {options.frames}; choose another"
    size = OmegaConf.load(CONFIGURATION).model.image_size
    if options.size != size:
        return f"expected --size {size}, as the model takes it, found {options.size}; leave it out"
    return None


def _problem(options: argparse.Namespace, worker: Worker) -> str | None:
    """What is wrong with the folder or the file to begin with, or None."""
    if has_state(options.o) and not options.resume and worker.leads:
        return f"{options.o} already holds a run; expected a new folder, or --resume to go on with it"
    if options.resume and not has_state(options.o):
        return f"--resume expects a run in {options.o}, found none; start without --resume"
    if options.begin_with is not None and not options.begin_with.is_file():
        return f"--begin-with expects a file of weights, found none at {options.begin_with}; correct the path"
    return None


def _recipe(options: argparse.Namespace) -> Recipe:
    chosen = {f.name: getattr(options, f.name) for f in fields(Recipe) if f.name != "weights"}
    weights = hashlib.sha256(options.begin_with.read_bytes()).hexdigest() if options.begin_with else ""
    return Recipe(**chosen, weights=weights)


def _schedule(options: argparse.Namespace) -> Schedule:
    return Schedule(
        options.steps, options.save_every, options.validate_every, validation_batches=options.validation_batches
    )


if __name__ == "__main__":
    sys.exit(main())
