"""The whole loop on phantoms, for a first look: one annotated case of twelve, scores before and after."""

from __future__ import annotations

import shutil
import time
from dataclasses import dataclass
from pathlib import Path

from nnunet_oneshot import nnunet
from nnunet_oneshot.baseline import train_annotated_only
from nnunet_oneshot.dataset import RawDataset
from nnunet_oneshot.errors import OneShotError
from nnunet_oneshot.evaluate import FOREGROUND, evaluate
from nnunet_oneshot.output import nnunet_folders
from nnunet_oneshot.parallel import default_processes
from nnunet_oneshot.phantom import write_phantom_dataset
from nnunet_oneshot.propagators import PropagatorOptions
from nnunet_oneshot.refine import FOLDS, Plan, open_store
from nnunet_oneshot.report import report
from nnunet_oneshot.run import run

SOURCE, OUTPUT, ALONE = 501, 601, 602
"""Ids of the demo's datasets: the phantoms, the pseudo-label dataset, the annotated case alone."""
CONFIGURATION = "3d_fullres"


@dataclass(frozen=True)
class Row:
    """One line of the demo's table: mean foreground Dice and its 95 % interval over the un-annotated cases."""

    what: str
    dice: float
    low: float
    high: float


@dataclass(frozen=True)
class DemoResult:
    """What the demo found, and the report's page about it."""

    folder: Path
    page: Path
    rows: tuple[Row, ...]
    cases: int
    seconds: float


def demo(
    folder: Path,
    *,
    preset: str = "tiny",
    device: str = "cpu",
    num_processes: int | None = None,
    overwrite: bool = False,
) -> DemoResult:
    """Phantoms, one annotated; propagate, train, relabel, train; and a stock nnU-Net on the annotated case alone.

    Args:
        folder: where everything is written; a demo that was interrupted there goes on.
        preset: default, small or tiny.
        device: cpu, cuda or mps.
        num_processes: cases at once; the processor count when None.
        overwrite: start again.

    Raises:
        OneShotError: the folder holds something else.
    """
    begin, processes = time.monotonic(), num_processes or default_processes()
    _prepare_folder(folder, overwrite)
    with nnunet_folders(folder):
        truth = _phantoms(folder)
        result = run(
            SOURCE,
            OUTPUT,
            CONFIGURATION,
            options=PropagatorOptions(device=device),
            training={"preset": preset, "rounds": 1},
            num_processes=num_processes,
        )
        alone = train_annotated_only(
            SOURCE, ALONE, CONFIGURATION, preset=preset, device=device, num_processes=num_processes
        )
        store, raw = open_store(OUTPUT)
        rows = (
            _score(
                "stock nnU-Net on the annotated case alone", raw, _predict(raw, ALONE, alone, folder, device), truth
            ),
            _score("round 0: propagated labels", raw, store.round_path(0, "x").parent, truth),
            _score("round 1: labels refreshed by the model", raw, store.round_path(1, "x").parent, truth),
            _score(
                "the final model's predictions",
                raw,
                _predict(raw, OUTPUT, result.refinement.plan, folder, device),
                truth,
            ),
        )
        page = report(OUTPUT, folder / "report.html", truth=truth, num_processes=processes)
    return DemoResult(folder, page, rows, len(raw.unannotated), time.monotonic() - begin)


def _prepare_folder(folder: Path, overwrite: bool) -> None:
    mark = folder / "nnunet_oneshot_demo"
    if folder.exists() and any(folder.iterdir()) and not mark.is_file():
        raise OneShotError(
            f"expected an empty folder or an earlier demo, found other files in {folder}; choose another -o"
        )
    if overwrite and folder.exists():
        shutil.rmtree(folder)
    folder.mkdir(parents=True, exist_ok=True)
    mark.touch()


def _phantoms(folder: Path) -> Path:
    """Make the phantoms unless they are there; returns the folder of true labels."""
    truth, raw = folder / "truth", folder / "nnUNet_raw"
    if not (folder / "phantoms_done").is_file():
        shutil.rmtree(raw / f"Dataset{SOURCE:03d}_phantom", ignore_errors=True)
        shutil.rmtree(truth, ignore_errors=True)
        write_phantom_dataset(raw, SOURCE, truth=truth)
        (folder / "phantoms_done").touch()
    return truth


def _predict(raw: RawDataset, dataset: int, plan: Plan, folder: Path, device: str) -> Path:
    images, output = {case.name: case.images for case in raw.unannotated}, folder / "predictions" / str(dataset)
    nnunet.predict(dataset, plan.configuration, FOLDS, plan.trainer, plan.plans, images, output, device)
    return output


def _score(what: str, raw: RawDataset, labels: Path, truth: Path) -> Row:
    names = [case.name for case in raw.unannotated]
    scored = evaluate(truth, labels, raw.folder / "dataset.json", cases=names)
    interval = scored.summary[FOREGROUND]["Dice"]
    return Row(what, interval.mean, interval.low, interval.high)
