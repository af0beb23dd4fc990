"""Pack a trained model for people who have a stock nnU-Net and nothing of ours.

The zip holds `DatasetXXX_name/nnUNetTrainer__PLANS__CONFIGURATION` with plans.json, dataset.json and each fold's
checkpoint_final.pth, and of these only what prediction needs: no optimizer, no curves, no case identifiers, no paths.
Our trainers keep nnU-Net's architecture, so the stock nnUNetTrainer loads their weights; that is tried before anything
is written.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import re
import shutil
import tempfile
import zipfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from importlib.resources import files
from pathlib import Path
from string import Template
from typing import Any

import torch
from nnunetv2.inference.predict_from_raw_data import nnUNetPredictor

from nnunet_oneshot.errors import OneShotError
from nnunet_oneshot.postprocessing import FILE as POSTPROCESSING
from nnunet_oneshot.refine_record import Plan, begun_plan

STOCK_TRAINER = "nnUNetTrainer"
CHECKPOINT = "checkpoint_final.pth"
DATASET_KEYS = (
    "channel_names",
    "labels",
    "regions_class_order",
    "file_ending",
    "overwrite_image_reader_writer",
    "name",
    "reference",
    "licence",
    "license",
    "release",
)
"""What of dataset.json goes with the model: what prediction reads, and whose data it was."""
CONTAINER_FILES = ("Dockerfile", "run.sh", "README.md", "predict.py", "selftest.py")
_PATH = re.compile(r"^(/[^/\s]+/|~/|[A-Za-z]:\\|\\\\)")


@dataclass(frozen=True)
class Exported:
    """What `export` wrote.

    Attributes:
        zip: the file.
        models: the folders inside of it (two for a cascade), `DatasetXXX_name/nnUNetTrainer__PLANS__CONFIGURATION`.
        folds: the folds that make up the model.
        trainer: the trainer that the weights come from.
        commands: how to install it and predict with a stock nnU-Net.
        container: folder with the Dockerfile, or None.
    """

    zip: Path
    models: tuple[str, ...]
    folds: tuple[str, ...]
    trainer: str
    commands: tuple[str, ...]
    container: Path | None


@dataclass(frozen=True)
class _Model:
    """A trained model in nnUNet_results."""

    folder: Path
    trainer: str
    plans: str
    configuration: str
    folds: tuple[str, ...]

    @property
    def stock_name(self) -> str:
        return f"{self.folder.parent.name}/{STOCK_TRAINER}__{self.plans}__{self.configuration}"


def export(
    dataset: int | str,
    configuration: str,
    output_zip: Path,
    *,
    trainer: str | None = None,
    plans: str | None = None,
    folds: Sequence[int | str] | None = None,
    container: Path | None = None,
) -> Exported:
    """Pack a trained model so that a stock nnU-Net installs it and predicts the same with it.

    Args:
        dataset: id or name of the dataset it was trained on.
        configuration: for example "3d_fullres"; a cascade takes its low-resolution model along.
        output_zip: file to write; must not exist.
        trainer, plans: of the model; may be None when there is only one model of that configuration, or one that a
            refinement made.
        folds: None takes those of the refinement that made it; of a model that none made `fold_all` where there is
            one and else all numbered folds that are trained.
        container: folder to write a Dockerfile, run script, README, self-test and model to; must be empty or absent.

    Raises:
        OneShotError: nothing is trained, several models fit, a fold is not finished, the network is not nnU-Net's own,
            or the target exists or cannot be written.
    """
    output_zip = Path(output_zip)
    _check_targets(output_zip, container)
    model = _find_model(_dataset_folder(dataset), configuration, trainer, plans, folds)
    chain = _with_previous_stage(model)
    if container is not None and len(chain) > 1:
        raise OneShotError(
            f"expected a configuration of one stage for a container, found {configuration}; choose another"
        )
    with tempfile.TemporaryDirectory() as temporary:
        staged = [_stage(m, Path(temporary) / m.stock_name) for m in chain]
        try:
            _write_zip(Path(temporary), output_zip)
            if container is not None:
                _write_container(model, staged[0], Path(container))
        except PermissionError as error:
            raise OneShotError(f"cannot write {error.filename}; choose a folder that you may write to") from error
    names = tuple(m.stock_name for m in chain)
    return Exported(output_zip, names, model.folds, model.trainer, _commands(model, output_zip), container)


def _check_targets(output_zip: Path, container: Path | None) -> None:
    if output_zip.suffix != ".zip":
        raise OneShotError(f"expected a file name that ends in .zip, found {output_zip}; choose one")
    if output_zip.exists():
        raise OneShotError(f"{output_zip} exists already; take it away or choose another name")
    if container is not None and Path(container).exists() and any(Path(container).iterdir()):
        raise OneShotError(f"expected an empty folder for the container, found files in {container}; choose another")


def _dataset_folder(dataset: int | str) -> Path:
    root = os.environ.get("nnUNet_results")
    if not root or not Path(root).is_dir():
        raise OneShotError(f"expected nnUNet_results to name a folder, found {root!r}; set it to where models lie")
    wanted = f"Dataset{int(dataset):03d}_*" if str(dataset).isdigit() else str(dataset)
    found = sorted(p for p in Path(root).glob(wanted) if p.is_dir())
    if len(found) != 1:
        names = ", ".join(p.name for p in found) or "none"
        raise OneShotError(
            f"expected one dataset {wanted} with models in {root}, found {names}; train first or check -d"
        )
    return found[0]


def _find_model(
    dataset: Path, configuration: str, trainer: str | None, plans: str | None, folds: Sequence[int | str] | None
) -> _Model:
    """The one model that fits; of several, the one that a refinement made."""
    parts = [(p, p.name.split("__")) for p in sorted(dataset.iterdir()) if p.name.count("__") == 2]
    fitting = [
        (folder, t, p)
        for folder, (t, p, c) in parts
        if c == configuration and trainer in (None, t) and plans in (None, p) and _finished_folds(folder)
    ]
    if not fitting:
        there = ", ".join(folder.name for folder, _ in parts) or "no model at all"
        wanted = f"{trainer or 'TRAINER'}__{plans or 'PLANS'}__{configuration}"
        raise OneShotError(f"expected a finished training {wanted} in {dataset}, found {there}; train first")
    plan = _refinement(dataset.name)
    refined = [
        entry
        for entry in fitting
        if plan and (*entry[1:], configuration) == (plan.trainer, plan.plans, plan.configuration)
    ]
    if len(fitting) > 1 and not refined:
        names = ", ".join(folder.name for folder, _, _ in fitting)
        raise OneShotError(f"expected one model of {configuration}, found {names}; choose by -tr and -p")
    folder, found_trainer, found_plans = (refined or fitting)[0]
    planned = plan.folds if plan and refined else None
    return _Model(
        folder, found_trainer, found_plans, configuration, _choose_folds(folder, planned if folds is None else folds)
    )


def _refinement(dataset: str) -> Plan | None:
    """What a refinement of that dataset trains; None where none was begun or the labels are not on this machine."""
    root = os.environ.get("nnUNet_raw")
    return begun_plan(Path(root) / dataset) if root else None


def _finished_folds(folder: Path) -> list[str]:
    return sorted(p.name[len("fold_") :] for p in folder.glob("fold_*") if (p / CHECKPOINT).is_file())


def _choose_folds(folder: Path, folds: Sequence[int | str] | None) -> tuple[str, ...]:
    finished = _finished_folds(folder)
    if folds is None:
        return ("all",) if "all" in finished else tuple(finished)
    wanted = tuple(str(f) for f in folds)
    if missing := sorted(set(wanted) - set(finished)):
        raise OneShotError(
            f"expected finished folds {', '.join(wanted)} in {folder}, found no {CHECKPOINT} of {', '.join(missing)}; "
            "train them first"
        )
    return wanted


def _with_previous_stage(model: _Model) -> list[_Model]:
    """The model, and before a cascade's second stage the first one."""
    plans = json.loads((model.folder / "plans.json").read_text(encoding="utf-8"))
    previous = plans["configurations"].get(model.configuration, {}).get("previous_stage")
    if previous is None:
        return [model]
    return [_find_model(model.folder.parent, previous, model.trainer, model.plans, model.folds), model]


def _stage(model: _Model, target: Path) -> Path:
    """Write the cleaned model folder and load it as a stock nnU-Net does."""
    plans = json.loads((model.folder / "plans.json").read_text(encoding="utf-8"))
    dataset = _clean_dataset_json(json.loads((model.folder / "dataset.json").read_text(encoding="utf-8")))
    _check_no_paths(plans, "plans.json")
    _check_no_paths(dataset, "dataset.json")
    target.mkdir(parents=True)
    (target / "plans.json").write_text(json.dumps(plans, indent=2), encoding="utf-8")
    (target / "dataset.json").write_text(json.dumps(dataset, indent=2), encoding="utf-8")
    if (steps := model.folder / POSTPROCESSING).is_file():
        shutil.copy(steps, target / POSTPROCESSING)
    for fold in model.folds:
        (target / f"fold_{fold}").mkdir()
        checkpoint = _clean_checkpoint(model, fold, plans, dataset)
        torch.save(checkpoint, target / f"fold_{fold}" / CHECKPOINT)
    _check_loads(model, target)
    return target


def _clean_dataset_json(content: Mapping[str, Any]) -> dict[str, Any]:
    return {key: content[key] for key in DATASET_KEYS if key in content}


def _clean_checkpoint(model: _Model, fold: str, plans: dict[str, Any], dataset: dict[str, Any]) -> dict[str, Any]:
    """What nnUNetPredictor reads of a checkpoint, of a trainer that every nnU-Net has."""
    # nnU-Net's own checkpoints hold NumPy scalars and devices, which the safe loader refuses.
    trained = torch.load(model.folder / f"fold_{fold}" / CHECKPOINT, map_location="cpu", weights_only=False)
    axes = trained.get("inference_allowed_mirroring_axes")
    return {
        "network_weights": trained["network_weights"],
        "trainer_name": STOCK_TRAINER,
        "inference_allowed_mirroring_axes": None if axes is None else tuple(int(a) for a in axes),
        "init_args": {
            "plans": plans,
            "configuration": model.configuration,
            "fold": fold if fold == "all" else int(fold),
            "dataset_json": dataset,
        },
    }


def _check_no_paths(content: Any, where: str) -> None:
    """A path would tell of the training machine, and would not work elsewhere."""
    if isinstance(content, str) and _PATH.match(content):
        raise OneShotError(f"expected no file paths in {where}, found {content}; take it out of the model's folder")
    if isinstance(content, Mapping):
        for key, value in content.items():
            _check_no_paths(value, f"{where}: {key}")
    elif isinstance(content, list | tuple):
        for value in content:
            _check_no_paths(value, where)


def _check_loads(model: _Model, folder: Path) -> None:
    try:
        # Off a GPU the predictor says, whatever it was told, that it does not work on the GPU alone.
        with contextlib.redirect_stdout(io.StringIO()):
            device = torch.device("cpu")
            predictor = nnUNetPredictor(device=device, perform_everything_on_device=False, allow_tqdm=False)
            predictor.initialize_from_trained_model_folder(str(folder), model.folds, CHECKPOINT)
    except (RuntimeError, KeyError, ImportError) as error:
        raise OneShotError(
            f"expected weights that the stock {STOCK_TRAINER} can load, found others in {model.folder.name} (does "
            f"{model.trainer} build a network of its own?); export it by nnUNetv2_export_model_to_zip instead"
        ) from error


def _write_zip(root: Path, output_zip: Path) -> None:
    """Pack whatever lies below a folder, with fixed dates, and let it appear only when whole."""
    output_zip.parent.mkdir(parents=True, exist_ok=True)
    partial = output_zip.with_name(output_zip.name + ".part")
    with zipfile.ZipFile(partial, "w", zipfile.ZIP_DEFLATED) as archive:
        for path in sorted(p for p in root.rglob("*") if p.is_file()):
            entry = zipfile.ZipInfo(path.relative_to(root).as_posix())
            entry.compress_type = zipfile.ZIP_DEFLATED
            entry.external_attr = 0o644 << 16
            with path.open("rb") as source, archive.open(entry, "w", force_zip64=True) as target:
                shutil.copyfileobj(source, target, 1 << 20)
    partial.replace(output_zip)


def _commands(model: _Model, output_zip: Path) -> tuple[str, ...]:
    which = f"-d {model.folder.parent.name} -c {model.configuration} -p {model.plans} -f {' '.join(model.folds)}"
    install = f"nnUNetv2_install_pretrained_model_from_zip {output_zip}"
    predict = f"nnUNetv2_predict {which} -i INPUT -o OUTPUT"
    if not (model.folder / POSTPROCESSING).is_file():
        return install, predict
    steps = f"$nnUNet_results/{model.stock_name}/{POSTPROCESSING}"
    return install, predict, f"nnUNetv2_apply_postprocessing -i OUTPUT -o LARGEST_PIECES -pp_pkl_file {steps}"


def _write_container(model: _Model, staged: Path, container: Path) -> None:
    """Dockerfile, run script, README, self-test and the model itself."""
    container.mkdir(parents=True, exist_ok=True)
    shutil.copytree(staged, container / "model")
    dataset = json.loads((staged / "dataset.json").read_text(encoding="utf-8"))
    words = _container_words(model, dataset)
    for name in CONTAINER_FILES:
        text = files("nnunet_oneshot.container").joinpath(name).read_text(encoding="utf-8")
        content = text if name.endswith(".py") else Template(text).substitute(words)
        # A script with Windows line ends does not run in the container.
        (container / name).write_text(content, encoding="utf-8", newline="\n")
    (container / "run.sh").chmod(0o755)


def _container_words(model: _Model, dataset: Mapping[str, Any]) -> dict[str, str]:
    names = [name for name in dataset["labels"] if name not in ("background", "ignore")]
    return {
        "dataset": model.folder.parent.name,
        "configuration": model.configuration,
        "classes": ", ".join(names),
        "channels": ", ".join(str(c) for c in dataset["channel_names"].values()),
        "ending": dataset["file_ending"],
        "image": re.sub(r"[^a-z0-9]+", "-", model.folder.parent.name.lower()).strip("-"),
        # Local builds such as +cpu are not in the public registry.
        "torch": version("torch").split("+")[0],
        "nnunetv2": version("nnunetv2"),
    }
