"""Whose training a checkpoint is of."""

from __future__ import annotations

from pathlib import Path

import torch

from nnunet_oneshot.errors import OneShotError


def check_trainer(checkpoint: str | Path, trainer: str, remedy: str) -> None:
    """Refuse a checkpoint that another trainer wrote.

    Args:
        checkpoint: a file of nnU-Net's.
        trainer: name of the class that should have written it.
        remedy: what the user may do about it.

    Raises:
        OneShotError: it is another trainer's.
    """
    # Mapped, so that no weights are read for a look at the name; nnU-Net's checkpoints hold more than tensors.
    found = torch.load(checkpoint, map_location="cpu", weights_only=False, mmap=True)["trainer_name"]
    if found != trainer:
        raise OneShotError(f"{checkpoint}: expected a checkpoint of {trainer}, found one of {found}; {remedy}")
