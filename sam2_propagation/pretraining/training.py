"""The loop: draw, follow, charge, step; everything that a step needs follows from the seed and the step's number."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from sam2.modeling.sam2_base import SAM2Base
from torch import nn

from sam2_propagation.pretraining.losses import mask_loss
from sam2_propagation.pretraining.model import CONFIGURATION, MOST_HOPS, build_model, follow, load_weights
from sam2_propagation.pretraining.pairing import Batch, NoObject, draw_group, make_batch
from sam2_propagation.pretraining.recipe import Recipe, curriculum, learning_rate, memory_shares
from sam2_propagation.pretraining.state import has_state, load_state, save_state
from sam2_propagation.pretraining.validation import validate

LONGEST_GRADIENT = 1.0


@dataclass(frozen=True)
class Worker:
    """This process's place among those that share the groups of a step."""

    rank: int = 0
    world: int = 1

    @property
    def leads(self) -> bool:
        """Whether this one writes the log and the state."""
        return self.rank == 0


@dataclass(frozen=True)
class Schedule:
    """How long, and how often what is written.

    Attributes:
        steps: in all, including those of a resumed run.
        save_every, validate_every, log_every: in steps.
        validation_batches: of each kind of task; 0 for no validation.
    """

    steps: int
    save_every: int = 100
    validate_every: int = 250
    log_every: int = 10
    validation_batches: int = 4


@dataclass
class Run:
    """All that changes while training."""

    model: SAM2Base
    average: SAM2Base
    optimiser: torch.optim.AdamW
    step: int = 0
    recent: list[float] = field(default_factory=list)


def begin(recipe: Recipe, device: torch.device, weights: Path | None = None) -> Run:
    """A run before its first step, from random weights or from those of a file."""
    torch.manual_seed(recipe.seed)
    model, average = build_model().to(device), build_model().to(device).eval()
    if weights is not None:
        load_weights(model, weights)
    average.load_state_dict(model.state_dict())
    average.requires_grad_(False)
    return Run(model.train(), average, _optimiser(model, recipe))


def resume(run: Run, folder: Path, recipe: Recipe, workers: int) -> None:
    """Put a saved state into a run of the same recipe and as many workers."""
    run.step, tensors = load_state(folder, recipe, CONFIGURATION.read_text(encoding="utf-8"), workers)
    run.model.load_state_dict(_prefixed(tensors, "model."))
    run.average.load_state_dict(_prefixed(tensors, "average."))
    for name, parameter in run.model.named_parameters():
        moments = _prefixed(tensors, f"optimiser.{name}:")
        if moments:  # a parameter that nothing uses has none
            run.optimiser.state[parameter] = {key: value.to(parameter.device) for key, value in moments.items()}
            run.optimiser.state[parameter]["step"] = moments["step"].cpu()


def save(run: Run, folder: Path, recipe: Recipe, workers: int) -> None:
    """Write the run's state."""
    tensors = {f"model.{k}": v for k, v in run.model.state_dict().items()}
    tensors |= {f"average.{k}": v for k, v in run.average.state_dict().items()}
    for name, parameter in run.model.named_parameters():
        tensors |= {f"optimiser.{name}:{k}": v for k, v in run.optimiser.state[parameter].items()}
    save_state(folder, run.step, recipe, CONFIGURATION.read_text(encoding="utf-8"), tensors, workers)


def train(
    folder: Path,
    recipe: Recipe,
    schedule: Schedule,
    worker: Worker,
    device: torch.device,
    report: Callable[[str], None] = print,
    weights: Path | None = None,
) -> Run:
    """Train to `schedule.steps`, resuming from `folder` where it holds a state of the same recipe.

    Raises:
        RecipeMismatch: the folder's state is of another recipe, model configuration or number of workers.
        PropagationError: the state or the weights to begin with are damaged, or weights of another configuration.
    """
    if device.type == "cuda":
        torch.set_float32_matmul_precision("high")
    run = begin(recipe, device, weights)
    if has_state(folder):
        resume(run, folder, recipe, worker.world)
    folder.mkdir(parents=True, exist_ok=True)
    since = time.perf_counter()
    while run.step < schedule.steps:
        run.recent.append(_step(run, recipe, schedule.steps, worker, device))
        run.step += 1
        if worker.leads:
            since = _write(run, folder, recipe, schedule, worker, since, report)
    return run


def step_batch(recipe: Recipe, step: int, worker: Worker, device: torch.device) -> tuple[Batch, int, bool]:
    """This worker's share of a step, by how many frames its hop goes (0 for none), and if its memories are soft.

    Groups are drawn from (seed, step, group), so that they do not depend on how many workers share them. Noise and
    tasks do: all those of a worker follow from its first group, which is why a run goes on with as many workers.

    Args:
        recipe: with a group for each worker at least, and `elements` of 1 or more.
        step: from 0.
        worker: which one.
        device: where it is rendered.
    """
    difficulty = curriculum(step + recipe.practised)
    # No group has this number; without any, the stream would be that of group 0: numpy fills seeds up with zeros.
    common = np.random.default_rng((recipe.seed, step, recipe.groups))
    shares = memory_shares(step + recipe.practised)
    memories = int(common.choice(list(shares), p=list(shares.values())))
    hop = int(common.integers(1, MOST_HOPS + 1)) if common.random() < recipe.hop_share else 0
    soft = bool(common.random() < recipe.soft_share)
    mine = range(worker.rank, recipe.groups, worker.world)
    rngs = [np.random.default_rng((recipe.seed, step, g)) for g in mine]
    while True:
        groups = [draw_group(rng, difficulty, recipe.frames) for rng in rngs]
        with suppress(NoObject):
            return make_batch(groups, rngs[0], difficulty, recipe, memories, device), hop, soft


def _step(run: Run, recipe: Recipe, steps: int, worker: Worker, device: torch.device) -> float:
    batch, hop, soft = step_batch(recipe, run.step, worker, device)
    predictions = follow(run.model, batch, hop, soft)
    losses = [mask_loss(p, batch.targets[:, i]) for i, p in enumerate(predictions)]
    loss = torch.stack(losses).mean()
    run.optimiser.zero_grad(set_to_none=False)
    loss.backward()
    _share_gradients(run.model, worker)
    nn.utils.clip_grad_norm_(run.model.parameters(), LONGEST_GRADIENT)
    for group in run.optimiser.param_groups:
        group["lr"] = learning_rate(recipe, run.step, steps)
    run.optimiser.step()
    _follow_average(run, recipe)
    return float(loss.detach())


def _share_gradients(model: SAM2Base, worker: Worker) -> None:
    if worker.world == 1:
        return
    gradients = [p.grad if p.grad is not None else torch.zeros_like(p) for p in model.parameters()]
    flat = torch.cat([g.flatten() for g in gradients]).cpu()  # workers may share one GPU, where NCCL refuses
    dist.all_reduce(flat)
    flat = flat.to(gradients[0].device) / worker.world
    pieces = flat.split([g.numel() for g in gradients])
    for parameter, piece in zip(model.parameters(), pieces, strict=True):
        parameter.grad = piece.view_as(parameter)


@torch.no_grad()
def _follow_average(run: Run, recipe: Recipe) -> None:
    """Exponential average of the weights; short at first, so that the random start is forgotten."""
    keep = min(recipe.ema, (1 + run.step) / (10 + run.step))
    averaged, current = list(run.average.parameters()), [p.detach() for p in run.model.parameters()]
    torch._foreach_lerp_(averaged, current, 1 - keep)


def _optimiser(model: SAM2Base, recipe: Recipe) -> torch.optim.AdamW:
    """AdamW; weight decay on matrices and kernels alone."""
    matrices = [p for p in model.parameters() if p.ndim > 1]
    others = [p for p in model.parameters() if p.ndim <= 1]
    groups = [{"params": matrices, "weight_decay": recipe.weight_decay}, {"params": others, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=recipe.learning_rate, betas=(0.9, 0.98))


def _write(
    run: Run,
    folder: Path,
    recipe: Recipe,
    schedule: Schedule,
    worker: Worker,
    since: float,
    report: Callable[[str], None],
) -> float:
    """Log, validate and save as often as the schedule says; returns the time from which the next log counts."""
    entry: dict[str, float] = {}
    if run.step % schedule.log_every == 0:
        seconds = (time.perf_counter() - since) / len(run.recent)
        entry = {"step": run.step, "loss": float(np.mean(run.recent)), "seconds": seconds}
        run.recent.clear()
    if schedule.validation_batches and (run.step % schedule.validate_every == 0 or run.step == schedule.steps):
        device = next(run.model.parameters()).device
        entry |= {"step": run.step, **validate(run.average, recipe, device, schedule.validation_batches)}
    if entry:
        _append(folder, entry, report)
    if run.step % schedule.save_every == 0 or run.step == schedule.steps:
        save(run, folder, recipe, worker.world)
    return time.perf_counter() if not run.recent else since


def _append(folder: Path, entry: dict[str, float], report: Callable[[str], None]) -> None:
    rounded = {k: round(v, 4) for k, v in entry.items()}
    with (folder / "log.jsonl").open("a", encoding="utf-8") as log:
        log.write(json.dumps(rounded) + "\n")
    report(json.dumps(rounded))


def _prefixed(tensors: dict[str, torch.Tensor], prefix: str) -> dict[str, torch.Tensor]:
    return {k[len(prefix) :]: v for k, v in tensors.items() if k.startswith(prefix)}
