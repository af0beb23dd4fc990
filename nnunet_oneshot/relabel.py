"""New labels from a model's predictions: one step of every round.

The model is one more opinion: where it agrees with the label of the round before, that is consensus; where it does not,
the voxel becomes ignore for the next training, and the model's word is the best guess.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from nnunet_oneshot.dataset import Case, RawDataset
from nnunet_oneshot.errors import OneShotError
from nnunet_oneshot.parallel import over_cases
from nnunet_oneshot.store import CaseRecord, Manifest, Status, Store
from nnunet_oneshot.training_data import LEFT_OUT, ignore_value, write_training_files
from sam2_propagation.interface import LabelVolume

HUMAN_WORD = ("annotated", "corrected", "accepted")
"""Statuses whose label no model changes."""


@dataclass(frozen=True)
class Task:
    """What a worker needs to relabel one case."""

    dataset: RawDataset
    store: Store
    case: Case
    record: CaseRecord
    prediction: Path
    number: int


@dataclass(frozen=True)
class Change:
    """How far labels moved in a round.

    Attributes:
        number: the round that made the new labels.
        agreement: mean foreground Dice between each case's new and old best guess, by case.
    """

    number: int
    agreement: dict[str, float]

    @property
    def mean(self) -> float:
        """Mean over cases; 1 where no case was relabelled."""
        return float(np.mean(list(self.agreement.values()))) if self.agreement else 1.0


def relabel(dataset: RawDataset, store: Store, predictions: Path, number: int, processes: int) -> Change:
    """Make round `number`'s labels of the model's predictions and those of the round before.

    Idempotent: it reads the predictions, `pseudoTr/rounds/<number - 1>` and the manifest of the round before, so an
    interrupted run is repeated; where the manifest already tells of this round, it only says how far labels moved.

    Args:
        dataset: the raw dataset with the images.
        store: the dataset to relabel.
        predictions: folder with one predicted label a case that is to be relabelled.
        number: the round that is made, from 1.
        processes: cases at once.

    Raises:
        OneShotError: a prediction is missing or does not fit its image.
    """
    manifest = store.read_manifest()
    if manifest.round == number:
        return _made(dataset, store, manifest)
    tasks = [
        Task(dataset, store, case, manifest.cases[case.name], predictions / f"{case.name}{dataset.file_ending}", number)
        for case in dataset.cases
    ]
    results = list(over_cases(relabel_case, tasks, processes=processes, title=f"relabel, round {number}"))
    manifest.cases = {name: record for name, record, _ in sorted(results, key=lambda result: result[0])}
    manifest.round = number
    write_training_files(dataset, store, manifest)
    store.write_manifest(manifest)
    return Change(number, {name: agreement for name, _, agreement in results if agreement is not None})


def _made(dataset: RawDataset, store: Store, manifest: Manifest) -> Change:
    """The change of the round in force, from its labels on disk."""
    now, agreement = manifest.round, {}
    for case in cases_to_predict(dataset, manifest):
        new, old = (dataset.read_label(store.round_path(n, case.name)) for n in (now, now - 1))
        agreement[case.name] = mean_dice(new, old)
    return Change(now, agreement)


def cases_to_predict(dataset: RawDataset, manifest: Manifest) -> list[Case]:
    """Cases whose label a model may refresh: all but those with a person's whole word."""
    return [case for case in dataset.cases if manifest.cases[case.name].status not in HUMAN_WORD]


def relabel_case(task: Task) -> tuple[str, CaseRecord, float | None]:
    """Write one case's labels of a round; returns its record and its agreement with the round before."""
    dataset, store, case = task.dataset, task.store, task.case
    before = dataset.read_label(store.round_path(task.number - 1, case.name))
    if task.record.status in HUMAN_WORD:
        store.write_label(dataset, before, store.round_path(task.number, case.name), case)
        return case.name, task.record, None
    predicted = _read_prediction(task, before.shape)
    agreed = _agreement(task.record.status, predicted, before)
    guess, target = predicted, np.where(agreed, predicted, ignore_value(dataset)).astype(np.int16)
    if case.label is not None:
        human = dataset.read_label(case.label)
        drawn = human != dataset.ignore
        guess, target = np.where(drawn, human, guess), np.where(drawn, human, target)
    for label, path in (
        (guess, store.round_path(task.number, case.name)),
        (guess, store.fused_path(case.name)),
        (target, store.label_path(case.name)),
    ):
        store.write_label(dataset, label, path, case)
    return case.name, _record(task, agreed), mean_dice(guess, before)


def _agreement(status: Status, predicted: LabelVolume, before: LabelVolume) -> np.ndarray:
    """Where the prediction may be trained on: nowhere in cases that are left out, everywhere without a label before."""
    if status == "failed":
        return np.ones(before.shape, bool)
    return (predicted == before) & (status not in LEFT_OUT)


def mean_dice(first: LabelVolume, second: LabelVolume) -> float:
    """Mean Dice over the foreground labels present in either; 1 where neither has any."""
    values = [v for v in np.union1d(np.unique(first), np.unique(second)) if v != 0]
    dice = [2 * np.sum((first == v) & (second == v)) / (np.sum(first == v) + np.sum(second == v)) for v in values]
    return float(np.mean(dice)) if dice else 1.0


def _record(task: Task, agreed: np.ndarray) -> CaseRecord:
    old = task.record
    new = old.model_copy(update={"round": task.number, "divergence": round(float(1 - agreed.mean()), 6)})
    if old.status == "failed":
        new.status, new.reason = "pseudo", f"labelled by the model alone, since propagation failed: {old.reason}"
    return new


def _read_prediction(task: Task, shape: tuple[int, ...]) -> LabelVolume:
    if not task.prediction.is_file():
        raise OneShotError(f"expected the prediction {task.prediction}, found none; predict every un-annotated case")
    predicted = task.dataset.read_label(task.prediction)
    if predicted.shape != shape:
        raise OneShotError(
            f"{task.prediction}: expected the shape {shape} of its image, found {predicted.shape}; predict it again"
        )
    return predicted
