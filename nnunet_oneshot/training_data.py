"""What nnU-Net reads of dataset BBB: dataset.json with the "oneshot" block, and splits_final.json."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from nnunet_oneshot.dataset import IGNORE, RawDataset
from nnunet_oneshot.errors import OneShotError
from nnunet_oneshot.settings import BLOCK_KEY, OneShotBlock
from nnunet_oneshot.store import DRAWN, LEFT_OUT, Manifest, Store

FOLDS = 5
"""nnU-Net's number of folds."""


def ignore_value(dataset: RawDataset) -> int:
    """The ignore label's value in BBB: the dataset's own, else one above the highest label."""
    return dataset.ignore if dataset.ignore is not None else len(dataset.label_values)


def check_labels(dataset: RawDataset, folder: Path) -> None:
    """OneShotError where a value means something else in the source dataset than in BBB's labels; names may change.

    A class more moves the ignore label, and divergence of labels that are there would read as that class.

    Args:
        dataset: the source dataset.
        folder: BBB's.
    """
    path = folder / "dataset.json"
    if not path.is_file():
        return
    before = json.loads(path.read_text(encoding="utf-8"))["labels"]
    now = {**dataset.json["labels"], IGNORE: ignore_value(dataset)}
    moved = any(before[name] != now[name] for name in before.keys() & now.keys())
    if moved or sorted(map(str, before.values())) != sorted(map(str, now.values())):
        raise OneShotError(
            f"{folder.name}: expected {dataset.name} to have the labels that it had when the labels were made, "
            f"{_without_ignore(before)}, found {_without_ignore(now)}; restore them in its dataset.json, or make the "
            "labels again (propagate --overwrite, or -o another dataset)"
        )


def _without_ignore(labels: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in labels.items() if name != IGNORE}


def write_training_files(dataset: RawDataset, store: Store, manifest: Manifest) -> None:
    """Write dataset.json and splits_final.json for the labels in force."""
    content, preprocessed = dataset_json(dataset, store, manifest), preprocessed_folder(store)
    store.write_json(content, store.folder / "dataset.json")
    # nnU-Net's planning copies dataset.json and its trainer reads that copy; a later round does not plan again.
    store.write_json(content, preprocessed / "dataset.json")
    store.write_json(splits(manifest, manifest.num_folds), preprocessed / "splits_final.json")


def dataset_json(dataset: RawDataset, store: Store, manifest: Manifest) -> dict[str, Any]:
    """BBB's dataset.json: A's, with the ignore label, references to A's images and the "oneshot" block."""
    content = {key: value for key, value in dataset.json.items() if key != "dataset"}
    content["labels"] = {**dataset.json["labels"], IGNORE: ignore_value(dataset)}
    content["numTraining"] = len(dataset.cases)
    content["dataset"] = {
        case.name: {
            "images": [_relative(path, store.folder) for path in case.images],
            "label": _relative(store.label_path(case.name), store.folder),
        }
        for case in dataset.cases
    }
    content[BLOCK_KEY] = oneshot_block(manifest).to_json()
    return content


def oneshot_block(manifest: Manifest) -> OneShotBlock:
    """All that the trainer reads of ours."""
    cases = manifest.cases
    in_training = {name: record for name, record in cases.items() if record.status not in LEFT_OUT}
    weighed = in_training if manifest.weight_by_quality else {}
    return OneShotBlock(
        round=manifest.round,
        annotated=tuple(name for name, record in cases.items() if record.status in DRAWN),
        left_out=tuple(name for name in cases if name not in in_training),
        case_weight={name: record.quality["mean"] for name, record in weighed.items() if record.quality},
    )


def splits(manifest: Manifest, folds: int = FOLDS) -> list[dict[str, list[str]]]:
    """nnU-Net's splits: human-labelled cases train in every fold, pseudo-labelled ones are dealt out to validation.

    With fewer pseudo-labelled cases than folds some cases validate twice; with a single case it trains and validates,
    since nnU-Net needs one of each.
    """
    human = [name for name, record in manifest.cases.items() if record.status in DRAWN]
    others = [name for name, record in manifest.cases.items() if record.status not in DRAWN]
    # Dealt before any are left out, so that a case stays in its fold when a round gates or lifts another one.
    dealt = [[n for n in others[f::folds] if manifest.cases[n].status not in LEFT_OUT] for f in range(folds)]
    pseudo = [name for name in others if manifest.cases[name].status not in LEFT_OUT]
    return [_split(human, pseudo, held_out, fold) for fold, held_out in enumerate(dealt)]


def _split(human: Sequence[str], pseudo: Sequence[str], held_out: list[str], fold: int) -> dict[str, list[str]]:
    held_out = held_out or list(pseudo[fold % len(pseudo) :][:1] if pseudo else human)
    train = [*human, *(name for name in pseudo if name not in held_out)]
    return {"train": sorted(train), "val": sorted(held_out)}


def preprocessed_folder(store: Store) -> Path:
    """BBB's folder in nnUNet_preprocessed; OneShotError where that variable is unset."""
    root = os.environ.get("nnUNet_preprocessed")
    if not root:
        raise OneShotError(
            "expected the environment variable nnUNet_preprocessed to name a folder, found it unset; "
            "set nnUNet_raw, nnUNet_preprocessed and nnUNet_results as nnU-Net's documentation says"
        )
    return Path(root) / store.folder.name


def _relative(path: Path, folder: Path) -> str:
    return Path(os.path.relpath(path, folder)).as_posix()
