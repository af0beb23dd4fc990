"""Whose training a checkpoint is of, and whether on mirrored images."""

from __future__ import annotations

from pathlib import Path
from typing import Any

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
    found = _read(checkpoint)["trainer_name"]
    if found != trainer:
        raise OneShotError(f"{checkpoint}: expected a checkpoint of {trainer}, found one of {found}; {remedy}")


def check_not_mirrored(checkpoint: str | Path, remedy: str) -> None:
    """Refuse a checkpoint of a training with mirrored images; OneShotError with what the user may do about it."""
    if axes := _read(checkpoint)["inference_allowed_mirroring_axes"]:
        found = ", ".join(map(str, axes))
        raise OneShotError(
            f"{checkpoint}: expected a training without mirrored images, found one that mirrors along axes {found}; "
            f"{remedy}"
        )


def _read(checkpoint: str | Path) -> dict[str, Any]:
    # Mapped, so that no weights are read for a look at the rest; nnU-Net's checkpoints hold more than tensors.
    content: dict[str, Any] = torch.load(checkpoint, map_location="cpu", weights_only=False, mmap=True)
    return content
