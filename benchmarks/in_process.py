"""Short trainings in this process: no worker processes and no checkpoints, so that a seed fixes them."""

from __future__ import annotations

import os
import random
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from nnunetv2.run.run_training import get_trainer_from_args

from nnunet_oneshot.bfloat16 import VARIABLE
from nnunet_oneshot.next_stage import predictor_of
from nnunet_oneshot.nnunet import Fold

Weights = dict[str, torch.Tensor]


def nothing(trainer: Any) -> None:
    """Leave a trainer as it is."""


def make(
    dataset: int,
    configuration: str,
    trainer_and_plans: tuple[str, str],
    epochs: int,
    seed: int,
    *,
    fold: Fold = "all",
    before: Callable[[Any], None] = nothing,
    bfloat16: bool = False,
) -> Any:
    """A trainer with its network and loss, of which `run_training` is seeded where `nnUNet_n_proc_DA` is 0.

    Args:
        dataset: id of a preprocessed dataset.
        trainer_and_plans: names.
        epochs: how long it is to train; the learning rate depends on it.
        before: what is to be changed in the trainer before it makes network and loss.
        bfloat16: whether the network computes in it; float32, as in all rows but precision.py's, where it does not.
    """
    os.environ[VARIABLE] = "1" if bfloat16 else "0"
    name, plans = trainer_and_plans
    trainer = get_trainer_from_args(str(dataset), configuration, fold, name, plans, device=torch.device("cpu"))
    trainer.num_epochs, trainer.disable_checkpointing = epochs, True
    before(trainer)
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)
    trainer.initialize()
    return trainer


def predict(
    trainer: Any,
    images: Mapping[str, Sequence[Path]],
    output: Path,
    mirroring: bool,
    weights: Sequence[Weights] | None = None,
) -> Path:
    """Write a trained network's label of every case to a folder; the folder.

    Args:
        images: one file a channel, by case.
        weights: of the models whose mean it is; the trainer's own where None.
    """
    if mirroring and trainer.inference_allowed_mirroring_axes is None:
        # Known to a trainer only once it has made its loaders.
        trainer.configure_rotation_dummyDA_mirroring_and_inital_patch_size()
    predictor = predictor_of(trainer, mirroring)
    predictor.list_of_parameters = list(weights) if weights else [trainer.network.state_dict()]
    output.mkdir(parents=True, exist_ok=True)
    files = [[str(path) for path in paths] for paths in images.values()]
    predictor.predict_from_files_sequential(files, [str(output / case) for case in images])
    return output
