"""The one place that drives nnU-Net: planning, preprocessing, training and prediction, each in a process of its own.

Whatever nnU-Net prints goes to a log file; a failure raises NnunetFailureError with the log's last lines, or OSError
where the disk is full. Every function is resumable: what is whole already is not done again.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import shutil
import warnings
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Literal

from nnunetv2.utilities.dataset_name_id_conversion import find_candidate_datasets
from nnunetv2.utilities.find_objects import recursive_find_trainer_class_by_name

import _nnunet_oneshot_path
from nnunet_oneshot.errors import OneShotError
from nnunet_oneshot.model_checkpoints import check_trainer
from nnunet_oneshot.nnunet_process import STAGING, Epochs, Progress, run_job, training_environment
from nnunet_oneshot.parallel import default_processes
from nnunet_oneshot.settings import Preset, mirrors, schedule_of

ROOTS = ("nnUNet_raw", "nnUNet_preprocessed", "nnUNet_results")
FINAL = "checkpoint_final.pth"
RESUMED = (FINAL, "checkpoint_latest.pth", "checkpoint_best.pth")
"""What nnU-Net goes on from, the first of these that is there."""
DATA_OF = {"3d_cascade_fullres": ("3d_lowres", "3d_fullres")}
"""Configurations that train on the preprocessed data of others."""
PREPROCESSING_PROCESSES = {"2d": 8, "3d_fullres": 4, "3d_lowres": 8}
"""As in nnUNetv2_plan_and_preprocess, which takes 4 for other configurations."""
PREDICTION_BATCH = 32
"""Cases whose prediction shares nnU-Net's worker processes; the work that a kill can lose on a GPU."""

Fold = int | Literal["all"]


def root(variable: str) -> Path:
    """The folder that nnUNet_raw, nnUNet_preprocessed or nnUNet_results names; OneShotError where it is unset."""
    value = os.environ.get(variable)
    if not value:
        raise OneShotError(
            f"expected the environment variables {', '.join(ROOTS)} to name folders, found {variable} unset; "
            "set all three as nnU-Net's documentation says"
        )
    return Path(value)


def dataset_name(dataset: int | str) -> str:
    """`DatasetXXX_Name` of an id or name; OneShotError where nnU-Net knows none or several."""
    if isinstance(dataset, str) and dataset.startswith("Dataset"):
        return dataset
    try:
        number = int(dataset)
    except ValueError:
        raise OneShotError(f"expected a dataset id or a name DatasetXXX_Name, found '{dataset}'; correct it") from None
    names = [str(name) for name in find_candidate_datasets(number)]
    if len(names) != 1:
        raise OneShotError(
            f"expected one dataset with id {number} in {', '.join(ROOTS)}, found {names or 'none'}; correct the id"
        )
    return names[0]


def plans_file(dataset: int | str, plans: str) -> Path:
    """Where nnU-Net keeps the plans of a dataset."""
    return root("nnUNet_preprocessed") / dataset_name(dataset) / f"{plans}.json"


def read_plans(dataset: int | str, plans: str) -> dict[str, Any]:
    """The plans; OneShotError names those that there are where these do not exist."""
    path = plans_file(dataset, plans)
    if not path.is_file():
        found = sorted(p.stem for p in path.parent.glob("*Plans*.json"))
        raise OneShotError(
            f"expected plans '{plans}' of {path.parent.name}, found {', '.join(found) or 'none'}; "
            "run nnUNetv2_plan_and_preprocess or leave out -p"
        )
    content: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return content


def check_configuration(dataset: int | str, plans: str, configuration: str) -> None:
    """OneShotError where the plans lack the configuration."""
    found = list(read_plans(dataset, plans)["configurations"])
    if configuration not in found:
        raise OneShotError(
            f"expected configuration '{configuration}' in plans '{plans}' of {dataset_name(dataset)}, "
            f"found {', '.join(found)}; choose one of these with -c"
        )


def check_trainer_name(trainer: str) -> None:
    """OneShotError where nnU-Net's own search finds no trainer of that name."""
    _nnunet_oneshot_path.register()
    try:
        # The search prints what it looks at, and imports modules that warn of what they import.
        with contextlib.redirect_stdout(io.StringIO()), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            recursive_find_trainer_class_by_name(trainer)
    except (RuntimeError, TypeError, AssertionError, ImportError) as error:
        why = f" ({error})" if isinstance(error, ImportError) else ""
        raise OneShotError(
            f"expected a trainer that nnU-Net finds, its own, one of ours or one in a folder of nnUNet_extTrainer, "
            f"found none called '{trainer}'{why}; correct -tr or nnUNet_extTrainer"
        ) from error


def preprocessed_folder(dataset: int | str, plans: str, configuration: str) -> Path:
    """Where nnU-Net keeps the preprocessed cases of a configuration."""
    configurations = read_plans(dataset, plans)["configurations"]
    entry = configurations[configuration]
    while "data_identifier" not in entry:
        entry = configurations[entry["inherits_from"]]
    folder: Path = root("nnUNet_preprocessed") / dataset_name(dataset) / entry["data_identifier"]
    return folder


def is_preprocessed(dataset: int | str, plans: str, configuration: str) -> bool:
    """True where the plans exist and every case of the raw dataset is preprocessed for the configuration."""
    if not plans_file(dataset, plans).is_file():
        return False
    check_configuration(dataset, plans, configuration)
    folder = preprocessed_folder(dataset, plans, configuration)
    truth = folder.parent / "gt_segmentations"
    # nnU-Net writes a case's .pkl last and copies gt_segmentations after all cases.
    cases = _raw_cases(dataset)
    return all((folder / f"{case}.pkl").is_file() for case in cases) and len(list(truth.glob("*"))) >= len(cases)


def plan_and_preprocess(
    dataset: int | str,
    preset: Preset,
    configurations: Sequence[str],
    num_processes: int | None = None,
    overwrite: bool = False,
) -> None:
    """Fingerprint, plan and preprocess, as nnUNetv2_plan_and_preprocess does.

    What is there and whole is kept unless `overwrite`. nnU-Net needs the file splits_final.json of its preprocessed
    folder to equal that of the raw folder, where there is one.

    Raises:
        OneShotError: the dataset does not exist or a configuration is not among those that nnU-Net plans for it.
        NnunetFailureError: nnU-Net failed; the message ends with its log.
    """
    name = dataset_name(dataset)
    new_plans = overwrite or not plans_file(name, preset.plans).is_file()
    planning = {"small": preset.planner is not None, "new_fingerprint": overwrite or not _fingerprint_fits(name)}
    _prepare(name, preset.plans, configurations, num_processes, overwrite, planning if new_plans else None)


def preprocess(
    dataset: int | str,
    plans: str,
    configurations: Sequence[str],
    num_processes: int | None = None,
    overwrite: bool = False,
) -> None:
    """Preprocess with plans that exist; configurations that are whole are kept unless `overwrite`."""
    _prepare(dataset_name(dataset), plans, configurations, num_processes, overwrite, None)


def _prepare(
    name: str,
    plans: str,
    configurations: Sequence[str],
    num_processes: int | None,
    overwrite: bool,
    planning: Mapping[str, bool] | None,
) -> None:
    needed = list(dict.fromkeys(part for c in configurations for part in DATA_OF.get(c, (c,))))
    missing = [c for c in needed if overwrite or planning is not None or not is_preprocessed(name, plans, c)]
    job = {
        "job": "prepare",
        "dataset": int(name[len("Dataset") :][:3]),
        "plans": plans,
        "planning": planning,
        "configurations": missing,
        "num_processes": num_processes or _workers(missing),
    }
    if missing:
        done = partial(_count, root("nnUNet_preprocessed") / name, f"{plans}_*/*.pkl")
        with Progress("plan and preprocess", len(_raw_cases(name)) * len(missing), done) as bar:
            # nnU-Net's planner takes its threads from nnUNet_n_proc_DA and fails where that is 0.
            run_job(job, _log(name), bar.update, {"OMP_NUM_THREADS": "1", "nnUNet_n_proc_DA": "1"})
    for configuration in configurations:
        check_configuration(name, plans, configuration)


def _workers(configurations: Sequence[str]) -> int:
    """Processes of preprocessing: one a core, and no more than nnU-Net itself starts; each holds a case in memory."""
    return min([default_processes(), *(PREPROCESSING_PROCESSES.get(c, 4) for c in configurations)])


def results_folder(dataset: int | str, trainer: str, plans: str, configuration: str) -> Path:
    """Where nnU-Net keeps the folds of a model."""
    return root("nnUNet_results") / dataset_name(dataset) / f"{trainer}__{plans}__{configuration}"


def is_trained(dataset: int | str, configuration: str, fold: Fold, trainer: str, plans: str) -> bool:
    """True where the fold's training has ended (its final checkpoint exists)."""
    return (results_folder(dataset, trainer, plans, configuration) / f"fold_{fold}" / FINAL).is_file()


def check_trained(dataset: int | str, configuration: str, fold: Fold, trainer: str, plans: str) -> None:
    """OneShotError where a fold has a checkpoint of another trainer, to be taken for its model or to go on from."""
    folder = results_folder(dataset, trainer, plans, configuration) / f"fold_{fold}"
    if (there := _resumed(folder)) is not None:
        check_trainer(there, trainer, "move it away, and run again to train the fold")


def _resumed(folder: Path) -> Path | None:
    return next((folder / name for name in RESUMED if (folder / name).is_file()), None)


def train(
    dataset: int | str,
    configuration: str,
    fold: Fold,
    trainer: str,
    plans: str,
    device: str = "cuda",
    continue_training: bool = True,
    num_gpus: int = 1,
    pretrained_weights: Path | None = None,
) -> Path:
    """Train one fold by nnU-Net's own code, or resume it, or do nothing where its final checkpoint exists.

    Args:
        dataset: id or name of a preprocessed dataset.
        configuration: for example `2d` or `3d_fullres`.
        fold: 0 to 4 or `all`.
        trainer: the class's name, found among nnU-Net's, ours and those in nnUNet_extTrainer.
        plans: the plans identifier.
        device: `cuda`, `cpu` or `mps`.
        continue_training: go on from the latest checkpoint where there is one; False starts again.
        num_gpus: more than one trains by DDP (CUDA only).
        pretrained_weights: a checkpoint to start from, used by a training that has no checkpoint of its own yet.

    Returns:
        The fold's folder.

    Raises:
        OneShotError: plans or configuration do not exist, or the checkpoint there is another trainer's.
        NnunetFailureError: nnU-Net failed; the message ends with its log.
    """
    check_configuration(dataset, plans, configuration)
    folder = results_folder(dataset, trainer, plans, configuration) / f"fold_{fold}"
    # A kill amid writing a checkpoint leaves one; the best one is not written again where no later epoch is better.
    for unfinished in folder.glob("checkpoint_*.pth.part"):
        unfinished.unlink()
    if continue_training:
        check_trained(dataset, configuration, fold, trainer, plans)
        if (folder / FINAL).is_file():
            return folder
    resume = continue_training and _resumed(folder) is not None
    job = {
        "job": "train",
        "dataset": dataset_name(dataset),
        "configuration": configuration,
        "fold": str(fold),
        "trainer": trainer,
        "plans": plans,
        "device": device,
        "num_gpus": num_gpus,
        "continue_training": resume,
        "pretrained_weights": str(pretrained_weights) if pretrained_weights and not resume else None,
    }
    folder.mkdir(parents=True, exist_ok=True)
    log = folder / "nnunet.log"
    epochs = Epochs(log)
    schedule = schedule_of(trainer)
    with Progress(f"train fold {fold}", schedule.epochs if schedule else None, epochs.count) as bar:
        run_job(job, log, bar.update, training_environment(device))
    return folder


def predict(
    dataset: int | str,
    configuration: str,
    folds: Sequence[Fold],
    trainer: str,
    plans: str,
    images: Mapping[str, Sequence[Path]],
    output: Path,
    device: str = "cuda",
    save_probabilities: bool = False,
    previous_stage: Path | None = None,
    checkpoint: str = FINAL,
) -> None:
    """Predict cases with the ensemble of the folds given, by nnU-Net's own predictor.

    Args:
        dataset, configuration, trainer, plans: which model.
        folds: the folds whose networks are averaged.
        images: each case's channel files, wherever they are.
        output: folder for `<case><file ending>`, with `.npz` and `.pkl` beside it if `save_probabilities`. Cases that
            are there are kept, so it must not hold predictions of another model.
        device: `cuda`, `cpu` or `mps`.
        save_probabilities: also write the class probabilities.
        previous_stage: folder with the low-resolution stage's predictions, for the cascade.
        checkpoint: the checkpoint's file name.

    Raises:
        OneShotError: a fold is not trained, or its checkpoint is another trainer's.
        NnunetFailureError: nnU-Net failed; the message ends with its log.
    """
    model = results_folder(dataset, trainer, plans, configuration)
    untrained = [str(fold) for fold in folds if not (model / f"fold_{fold}" / checkpoint).is_file()]
    if untrained or not folds:
        where = f"fold {', '.join(untrained)}" if folds else "an empty list of folds"
        raise OneShotError(f"expected {checkpoint} in every fold of {model.name}, found none in {where}; train first")
    ending = json.loads((model / "dataset.json").read_text(encoding="utf-8"))["file_ending"]
    needed = [ending, ".npz"] if save_probabilities else [ending]
    missing = {c: files for c, files in images.items() if not all((output / f"{c}{e}").is_file() for e in needed)}
    if not missing:
        # There after a kill between the last case and this folder's removal.
        shutil.rmtree(output / STAGING, ignore_errors=True)
        return
    output.mkdir(parents=True, exist_ok=True)
    job = {
        "job": "predict",
        "model": str(model),
        "folds": [str(fold) for fold in folds],
        # Links are not followed: readers go by a file's ending and look for a TIFF's spacing beside it.
        "images": {case: [str(Path(file).absolute()) for file in files] for case, files in missing.items()},
        "output": str(output.resolve()),
        "device": device,
        "batch": PREDICTION_BATCH,
        "save_probabilities": save_probabilities,
        "previous_stage": str(previous_stage.resolve()) if previous_stage else None,
        "checkpoint": checkpoint,
        "trainer": trainer,
        "mirroring": mirrors(trainer),
    }
    with Progress("predict", len(images), partial(_count, output, f"*{ending}")) as bar:
        run_job(job, output / "nnunet.log", bar.update)


def _raw_cases(dataset: int | str) -> list[str]:
    folder = root("nnUNet_raw") / dataset_name(dataset)
    content = json.loads((folder / "dataset.json").read_text(encoding="utf-8"))
    if "dataset" in content:
        return list(content["dataset"])
    ending = content["file_ending"]
    return [file.name.removesuffix(ending) for file in (folder / "labelsTr").glob(f"*{ending}")]


def _fingerprint_fits(name: str) -> bool:
    path = root("nnUNet_preprocessed") / name / "dataset_fingerprint.json"
    return path.is_file() and len(json.loads(path.read_text(encoding="utf-8"))["spacings"]) == len(_raw_cases(name))


def _log(name: str) -> Path:
    folder = root("nnUNet_preprocessed") / name
    folder.mkdir(parents=True, exist_ok=True)
    return folder / "nnunet.log"


def _count(folder: Path, pattern: str) -> int:
    return sum(1 for _ in folder.glob(pattern))
