"""Whose training a checkpoint is of."""

from __future__ import annotations

from pathlib import Path

import torch

from nnunet_oneshot.errors import OneShotError


def check_trainer(checkpoint: str | Path, trainer: str) -> None:
    """OneShotError where the checkpoint was written by another trainer than the one named."""
    # Mapped, so that no weights are read for a look at the name.
    found = torch.load(checkpoint, map_location="cpu", weights_only=False, mmap=True)["trainer_name"]
    if found != trainer:
        raise OneShotError(
            f"{checkpoint}: expected a checkpoint of {trainer}, found one of {found}; "
            "move it away, or give it as -pretrained_weights"
        )
