"""Whose training a checkpoint is of."""

from __future__ import annotations

import pickle
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
        OneShotError: it is another trainer's, or cut short.
    """
    try:
        # Mapped, so that no weights are read for a look at the name; nnU-Net's checkpoints hold more than tensors.
        found = torch.load(checkpoint, map_location="cpu", weights_only=False, mmap=True)["trainer_name"]
    except (RuntimeError, EOFError, pickle.UnpicklingError) as error:
        # nnU-Net's own trainers write into place, and leave half of it where they are killed amid that.
        raise OneShotError(
            f"{checkpoint}: expected a checkpoint of {trainer}, found a file that cannot be read; {remedy}"
        ) from error
    if found != trainer:
        raise OneShotError(f"{checkpoint}: expected a checkpoint of {trainer}, found one of {found}; {remedy}")
