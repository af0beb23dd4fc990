"""The plain thing to beat: stock nnU-Net on the annotated cases alone."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from nnunet_oneshot import nnunet
from nnunet_oneshot.dataset import RawDataset, open_dataset, raw_root
from nnunet_oneshot.refine import Plan
from nnunet_oneshot.settings import PRESETS

STOCK = "nnUNetTrainer"


def write_annotated_only(dataset: int | str, output: int) -> Path:
    """Write a raw dataset that refers to the annotated cases of another one; returns its folder.

    Nothing is copied; an existing folder of that name is written again with the same content.
    """
    raw = open_dataset(dataset)
    folder = raw_root() / f"Dataset{output:03d}_{raw.name.split('_', 1)[1]}_annotated"
    folder.mkdir(exist_ok=True)
    (folder / "dataset.json").write_text(json.dumps(_content(raw, folder), indent=2) + "\n", encoding="utf-8")
    return folder


def train_annotated_only(
    dataset: int | str, output: int, configuration: str, *, preset: str, device: str, num_processes: int | None
) -> Plan:
    """Train the preset's stock trainer on the annotated cases alone; returns what was trained."""
    name = write_annotated_only(dataset, output).name
    chosen = PRESETS[preset]
    plan = Plan(configuration, chosen.trainer(STOCK), chosen.plans, preset)
    nnunet.plan_and_preprocess(name, chosen, [configuration], num_processes)
    nnunet.train(name, configuration, "all", plan.trainer, plan.plans, device)
    return plan


def _content(raw: RawDataset, folder: Path) -> dict[str, Any]:
    def relative(path: Path) -> str:
        return Path(os.path.relpath(path, folder)).as_posix()

    entries = {
        case.name: {"images": [relative(p) for p in case.images], "label": relative(case.label)}
        for case in raw.annotated
        if case.label is not None
    }
    kept = {key: value for key, value in raw.json.items() if key not in ("dataset", "oneshot")}
    return {**kept, "numTraining": len(entries), "dataset": entries}
