"""Encoded supports that several processes share: the first that needs one makes it, the others map its file."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Hashable
from pathlib import Path

import torch
from filelock import FileLock

from sam2_propagation.embeddings import EmbeddedStack
from sam2_propagation.sam2_memory import Bank

Encoded = tuple[EmbeddedStack, Bank]


class SharedSupports:
    """A folder of encoded supports, for one model and one run.

    The operating system keeps one copy of a mapped file in RAM for all processes.

    Args:
        folder: exists, and is removed by whoever made it.
        device: the model's.
    """

    def __init__(self, folder: Path, device: torch.device) -> None:
        self._folder = folder
        self._device = device

    def get(self, key: Hashable, make: Callable[[], Encoded]) -> Encoded:
        """What `make` gives for `key`, made once for all processes; the others wait for it."""
        name = hashlib.sha256(repr(key).encode()).hexdigest()[:32]
        path = self._folder / f"{name}.pt"
        with FileLock(self._folder / f"{name}.lock"):
            if not path.is_file():
                frames, bank = make()
                # Renamed when it is whole: a process that dies here leaves the work to the next one.
                unfinished = path.with_suffix(".new")
                torch.save({"frames": frames.state(), "bank": bank.state()}, unfinished)
                os.replace(unfinished, path)
        state = torch.load(path, mmap=True, weights_only=True)
        return EmbeddedStack.restored(state["frames"], self._device), Bank.restored(state["bank"], self._device)
