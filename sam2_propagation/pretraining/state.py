"""A run's state on disk: tensors in files of bounded size, the rest in one JSON file, swapped atomically."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from sam2_propagation.checkpoints import read_tensors
from sam2_propagation.errors import PropagationError
from sam2_propagation.pretraining.recipe import GENERATOR, Recipe

LARGEST_FILE = 15 * 2**20
"""Bytes of tensors in one file, so that no file passes 16 MiB."""

_ENTRIES = {"step": int, "recipe": dict, "configuration": str}
"""What state.json must hold whatever its generator."""


class RecipeMismatch(PropagationError):
    """The folder holds a run of another recipe, generator, model or number of workers."""


def save_state(
    folder: Path, step: int, recipe: Recipe, configuration: str, tensors: Mapping[str, torch.Tensor], workers: int = 1
) -> None:
    """Write the state of a finished step and remove the one before."""
    fresh = folder / "state.new"
    shutil.rmtree(fresh, ignore_errors=True)
    fresh.mkdir(parents=True)
    shards = _shards(tensors)
    for i, shard in enumerate(shards):
        save_file(shard, fresh / f"{i:03d}.safetensors")
    summary = {
        "step": step,
        "generator": GENERATOR,
        "recipe": asdict(recipe),
        "configuration": configuration,
        "workers": workers,
        "files": len(shards),
    }
    (fresh / "state.json").write_text(json.dumps(summary, indent=1), encoding="utf-8")
    _swap(folder, fresh)


def load_state(
    folder: Path, recipe: Recipe, configuration: str, workers: int = 1
) -> tuple[int, dict[str, torch.Tensor]]:
    """The step and the tensors of a folder's state.

    Raises:
        FileNotFoundError: there is no state.
        RecipeMismatch: it was made with another recipe, generator, model configuration or number of workers.
        PropagationError: one of its files is damaged or lost.
    """
    current = _current(folder)
    summary = _read_summary(current)
    _check(summary, recipe, configuration, workers, folder)
    return summary["step"], _read_shards(current, summary.get("files"))


def _read_summary(current: Path) -> dict[str, Any]:
    try:
        summary = json.loads((current / "state.json").read_text(encoding="utf-8"))
    except ValueError as error:
        raise _not_whole(current, "a damaged state.json") from error
    if not isinstance(summary, dict):
        raise _not_whole(current, "a damaged state.json")
    missing = [name for name, kind in _ENTRIES.items() if not isinstance(summary.get(name), kind)]
    if missing:
        raise _not_whole(current, f"a state.json without {', '.join(missing)}")
    return summary


def _read_shards(current: Path, number: int | None) -> dict[str, torch.Tensor]:
    """The tensors of so many files; None for a state from before their number was kept."""
    shards, tensors = sorted(current.glob("*.safetensors")), {}
    if number not in (None, len(shards)):
        raise _not_whole(current, f"{len(shards)} of {number} files of tensors")
    for shard in shards:
        try:
            tensors.update(read_tensors(shard))
        except PropagationError as error:
            raise _not_whole(current, f"a damaged {shard.name}") from error
    return tensors


def _not_whole(current: Path, found: str) -> PropagationError:
    return PropagationError(
        f"expected a whole state in {current}, found {found}; copy it anew, or begin again in another folder"
    )


def has_state(folder: Path) -> bool:
    """Whether there is a state to resume."""
    return any((folder / name / "state.json").is_file() for name in ("state", "state.old"))


def _current(folder: Path) -> Path:
    """The state, or the one before if a swap was interrupted."""
    for name in ("state", "state.old"):
        if (folder / name / "state.json").is_file():
            return folder / name
    raise FileNotFoundError(f"expected a state to resume in {folder}, found none; start without --resume")


def _swap(folder: Path, fresh: Path) -> None:
    current, old = folder / "state", folder / "state.old"
    if current.exists():
        shutil.rmtree(old, ignore_errors=True)
        current.rename(old)
    fresh.rename(current)
    shutil.rmtree(old, ignore_errors=True)


def _shards(tensors: Mapping[str, torch.Tensor]) -> list[dict[str, torch.Tensor]]:
    shards: list[dict[str, torch.Tensor]] = [{}]
    room = LARGEST_FILE
    for name, tensor in tensors.items():
        size = tensor.numel() * tensor.element_size()
        if size > room and shards[-1]:
            shards.append({})
            room = LARGEST_FILE
        shards[-1][name] = tensor.detach().cpu().contiguous().clone()
        room -= size
    return shards


def _check(summary: Mapping[str, Any], recipe: Recipe, configuration: str, workers: int, folder: Path) -> None:
    if summary.get("generator") != GENERATOR:
        raise RecipeMismatch(
            f"{folder} was begun with generator {summary.get('generator')} of synthetic anatomy, this is {GENERATOR}; "
            "use that version or another folder"
        )
    wanted, found = asdict(recipe), summary["recipe"]
    changed = sorted(k for k in wanted.keys() | found.keys() if wanted.get(k) != found.get(k))
    if changed:
        pairs = ", ".join(f"{k} = {found.get(k)} there, {wanted.get(k)} here" for k in changed)
        raise RecipeMismatch(f"{folder} was begun with another recipe ({pairs}); use that recipe or another folder")
    if summary["configuration"] != configuration:
        raise RecipeMismatch(f"{folder} was begun with another model configuration; use that one or another folder")
    if summary.get("workers") != workers:
        raise RecipeMismatch(
            f"{folder} was begun with {summary.get('workers')} workers, found {workers}; use as many or another folder"
        )
