"""What runs inside nnU-Net's own process: one job, read as a line of JSON from standard input.

A process of its own, because nnU-Net changes thread counts and other global state, prints, and keeps its memory. The
parent holds standard input open: when the parent is killed the whole process group ends, so that a training never
goes on beside the one that resumes it.
"""

from __future__ import annotations

import io
import json
import os
import shutil
import signal
import sys
import threading
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from nnunetv2.experiment_planning.experiment_planners.default_experiment_planner import ExperimentPlanner
from nnunetv2.experiment_planning.plan_and_preprocess_api import (
    extract_fingerprint_dataset,
    plan_experiment_dataset,
    preprocess_dataset,
)
from nnunetv2.inference.predict_from_raw_data import nnUNetPredictor
from nnunetv2.run.run_training import run_training

from nnunet_oneshot.bfloat16 import compute_in_bfloat16, pays
from nnunet_oneshot.errors import USER_ERRORS
from nnunet_oneshot.model_checkpoints import check_trainer
from nnunet_oneshot.nnunet_process import STAGING, USER_ERROR
from nnunet_oneshot.planner import OneShotSmallPlanner, PseudoLabelFingerprintExtractor, SmallFingerprintExtractor


def prepare(
    dataset: int, plans: str, planning: Mapping[str, bool] | None, configurations: list[str], num_processes: int
) -> None:
    """Plan (unless `planning` is None) and preprocess the configurations named."""
    if planning is not None:
        _plan(dataset, planning["small"], planning["new_fingerprint"])
    preprocess_dataset(dataset, plans, configurations, [num_processes])


def _plan(dataset: int, small: bool, new_fingerprint: bool) -> None:
    extractor = SmallFingerprintExtractor if small else PseudoLabelFingerprintExtractor
    planner = OneShotSmallPlanner if small else ExperimentPlanner
    extract_fingerprint_dataset(dataset, extractor, _workers(), clean=new_fingerprint)
    plan_experiment_dataset(dataset, planner)


def train(
    dataset: str,
    configuration: str,
    fold: str,
    trainer: str,
    plans: str,
    device: str,
    pretrained_weights: str | None = None,
    **options: Any,
) -> None:
    """nnU-Net's training with its final validation; options are those of nnU-Net's run_training."""
    if device == "cuda":
        torch.set_num_threads(1)
    # Each process of a distributed training loads the file on its own device.
    alone = options.get("num_gpus", 1) == 1
    weights = _loadable(pretrained_weights) if pretrained_weights and alone else pretrained_weights
    run_training(
        dataset, configuration, fold, trainer, plans, pretrained_weights=weights, device=torch.device(device), **options
    )


def _loadable(checkpoint: str) -> io.BytesIO:
    """A checkpoint's weights as nnU-Net can load them here: by itself it loads them on the device that trained them.

    In memory, since a kill would leave a file for ever.
    """
    content = torch.load(checkpoint, map_location="cpu", weights_only=False)
    weights = io.BytesIO()
    torch.save({"network_weights": content["network_weights"]}, weights)
    weights.seek(0)
    return weights


def predict(
    model: str, folds: list[str], images: Mapping[str, list[str]], output: str, device: str, **options: Any
) -> None:
    """Predict each case into a staging folder and move it to `output` when it is whole."""
    for fold in folds:
        # nnU-Net builds the network of whatever trainer the first fold's checkpoint names.
        remedy = "move it away and train the fold"
        check_trainer(Path(model) / f"fold_{fold}" / options["checkpoint"], options["trainer"], remedy)
    predictor = nnUNetPredictor(use_mirroring=options["mirroring"], device=torch.device(device), allow_tqdm=False)
    chosen = tuple(fold if fold == "all" else int(fold) for fold in folds)
    predictor.initialize_from_trained_model_folder(model, chosen, options["checkpoint"])
    if pays(predictor.device):
        compute_in_bfloat16(predictor.network)
    staging = Path(output) / STAGING
    staging.mkdir(parents=True, exist_ok=True)
    size = 1 if device == "cpu" else options["batch"]
    cases = list(images)
    for start in range(0, len(cases), size):
        chunk = cases[start : start + size]
        _predict_chunk(predictor, {case: images[case] for case in chunk}, staging, options)
        _move_whole(predictor.dataset_json["file_ending"], chunk, staging)
    shutil.rmtree(staging)


def _predict_chunk(
    predictor: nnUNetPredictor, images: Mapping[str, list[str]], staging: Path, options: Mapping[str, Any]
) -> None:
    arguments = [list(images.values()), [str(staging / case) for case in images]]
    common = {
        "save_probabilities": options["save_probabilities"],
        "overwrite": True,
        "folder_with_segs_from_prev_stage": options["previous_stage"],
    }
    # Worker processes pay for themselves only beside a GPU: each takes seconds to start and a core to run.
    if len(images) == 1:
        predictor.predict_from_files_sequential(*arguments, **common)
    else:
        workers = {"num_processes_preprocessing": _workers(), "num_processes_segmentation_export": _workers()}
        predictor.predict_from_files(*arguments, **common, **workers)


def _move_whole(ending: str, cases: list[str], staging: Path) -> None:
    """Move the finished cases out of the staging folder, the label last: where it is, all of the case is."""
    for case in cases:
        for suffix in (".npz", ".pkl", ending):
            source = staging / f"{case}{suffix}"
            if source.exists():
                os.replace(source, staging.parent / source.name)


def _workers() -> int:
    return int(os.environ["nnUNet_def_n_proc"])


JOBS: Mapping[str, Callable[..., None]] = {"prepare": prepare, "train": train, "predict": predict}


def _end_with_parent(pipe: int) -> None:
    """Kill this process group once the parent's end of the pipe closes."""
    while os.read(pipe, 1024):
        pass
    if hasattr(os, "killpg"):
        os.killpg(0, signal.SIGKILL)
    os._exit(1)


def _read_job() -> tuple[str, dict[str, Any]]:
    """The job, and a watch on the pipe that it came through."""
    pipe = os.dup(0)
    line = bytearray()
    while not line.endswith(b"\n"):
        part = os.read(pipe, 65536)
        if not part:
            raise SystemExit(
                "expected a job as one line of JSON on standard input, found none; use nnunet_oneshot.nnunet"
            )
        line += part
    # nnU-Net's forked workers close sys.stdin; away from the pipe, they cannot block on the watching thread.
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    threading.Thread(target=_end_with_parent, args=(pipe,), daemon=True).start()
    job = json.loads(line)
    return job.pop("job"), job


def main() -> None:
    """Run the job that standard input names."""
    name, arguments = _read_job()
    try:
        JOBS[name](**arguments)
    except USER_ERRORS as error:
        print(f"{USER_ERROR}{' '.join(str(error).split())}")
        sys.exit(2)
    finally:
        sys.stdout.flush()


if __name__ == "__main__":
    main()
