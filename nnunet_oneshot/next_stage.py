"""What the first stage of nnU-Net's cascade says of cases that never validate, for the second stage to train on.

nnU-Net writes a case's prediction for the next stage when the case validates; every one of its cases does so in one
fold. Cases with a person's label train in every fold instead, and the next stage needs them too. So what it gets of
them is by a model that was trained on them, of all other cases by one that was not.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from nnunetv2.configuration import default_num_processes
from nnunetv2.inference.export_prediction import resample_and_save
from nnunetv2.inference.predict_from_raw_data import nnUNetPredictor
from nnunetv2.training.dataloading.nnunet_dataset import infer_dataset_class


def predict_for_next_stages(trainer: Any, cases: Sequence[str]) -> None:
    """Write `predicted_next_stage/<configuration>/<case>.b2nd` in the trainer's folder, as its validation does.

    Args:
        trainer: a trained nnUNetTrainer whose configuration has next stages and no stage before.
        cases: identifiers; each is preprocessed for both stages.
    """
    predictor = predictor_of(trainer)
    dataset = trainer.dataset_class(trainer.preprocessed_dataset_folder, cases)
    for case in dataset.identifiers:
        data, _, _, properties = dataset.load_case(case)
        logits = predictor.predict_sliding_window_return_logits(torch.from_numpy(data[:])).cpu()
        for stage in trainer.configuration_manager.next_stage_names:
            _save(trainer, stage, case, logits, properties)
    trainer.set_deep_supervision_enabled(trainer.enable_deep_supervision)


def predictor_of(trainer: Any, mirroring: bool = True) -> nnUNetPredictor:
    """nnU-Net's predictor by the network that a trainer holds, which is switched to inference."""
    predictor = nnUNetPredictor(
        use_mirroring=mirroring,
        perform_everything_on_device=trainer.device.type == "cuda",
        device=trainer.device,
        allow_tqdm=False,
    )
    predictor.manual_initialization(
        trainer.network.module if trainer.is_ddp else trainer.network,
        trainer.plans_manager,
        trainer.configuration_manager,
        None,
        trainer.dataset_json,
        type(trainer).__name__,
        trainer.inference_allowed_mirroring_axes,
    )
    trainer.set_deep_supervision_enabled(False)
    trainer.network.eval()
    return predictor


def _save(trainer: Any, stage: str, case: str, logits: torch.Tensor, properties: dict[str, Any]) -> None:
    plans = trainer.plans_manager
    preprocessed = Path(trainer.preprocessed_dataset_folder_base) / plans.get_configuration(stage).data_identifier
    kind = infer_dataset_class(str(preprocessed))
    data, _, _, _ = kind(str(preprocessed), [case]).load_case(case)
    output = Path(trainer.output_folder_base) / "predicted_next_stage" / stage
    output.mkdir(parents=True, exist_ok=True)
    # Other folds may write the same case at the same time.
    part = f".part_{trainer.fold}"
    resample_and_save(
        logits,
        data.shape[1:],
        str(output / f"{case}{part}"),
        plans,
        trainer.configuration_manager,
        properties,
        trainer.dataset_json,
        default_num_processes,
        kind,
    )
    for path in output.glob(f"{case}{part}.*"):
        os.replace(path, path.with_name(path.name.replace(part, "")))
