"""New labels from a model's predictions: one step of every round.

The model is one more opinion: where it agrees with the label of the round before, that is consensus; where it does not,
the voxel becomes ignore for the next training, and the model's word is the best guess, since two have no majority. With
a third opinion all three must agree, and the best guess lies between them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from nnunet_oneshot.dataset import Case, RawDataset
from nnunet_oneshot.errors import OneShotError
from nnunet_oneshot.parallel import over_cases
from nnunet_oneshot.prompting import carried_views
from nnunet_oneshot.quality import dice_by_class, estimate, foreground
from nnunet_oneshot.quality_gate import MIN_QUALITY, gate
from nnunet_oneshot.quality_opinions import opinions, round_compared
from nnunet_oneshot.refine_changes import Change as StagedChange
from nnunet_oneshot.refine_changes import Look, Taken, publish_staged, stage, take_up
from nnunet_oneshot.rounds import is_kept, keep, kept_manifest, put_in_force, write_round
from nnunet_oneshot.store import HUMAN_WORD, CaseRecord, Manifest, Store
from nnunet_oneshot.training_data import ignore_value
from sam2_propagation.consensus import fuse
from sam2_propagation.interface import BoolVolume, FloatVolume, LabelVolume

_VOICELESS = ("failed", "rejected")
"""Whose label of the round before has no voice: an empty one stands in for what is missing, or a person refused it."""


@dataclass(frozen=True)
class Task:
    """What a worker needs to relabel one case."""

    dataset: RawDataset
    store: Store
    case: Case
    record: CaseRecord
    prediction: Path
    number: int
    trust: Trust


@dataclass(frozen=True)
class Trust:
    """What a voxel needs to be trained on, besides agreement of model and label before.

    Attributes:
        opinion: the source that must agree too (see `second_opinion`), None for none.
        min_margin: how far the model's first class must be more probable than its second; 0 asks no probabilities.
    """

    opinion: str | None = None
    min_margin: float = 0.0


@dataclass(frozen=True)
class Change:
    """How far labels moved in a round.

    Attributes:
        number: the round that made the new labels.
        agreement: mean foreground Dice between each case's new and old best guess, by case.
        taken_up: what people changed in the labels of the round before since it was trained on.
    """

    number: int
    agreement: dict[str, float]
    taken_up: tuple[Taken, ...] = ()

    @property
    def mean(self) -> float:
        """Mean over cases; 1 where no case was relabelled."""
        return float(np.mean(list(self.agreement.values()))) if self.agreement else 1.0


def relabel(
    dataset: RawDataset,
    store: Store,
    predictions: Path,
    number: int,
    processes: int,
    min_quality: float = MIN_QUALITY,
    trust: Trust = Trust(),
) -> Change:
    """Make round `number`'s labels of the model's predictions and those of the round before, and put it in force.

    What people changed meanwhile is taken up before it is put in force. Idempotent: it reads the predictions,
    `pseudoTr/rounds/<number - 1>` and the manifest of the round before, so an interrupted run is repeated; where the
    round is kept already, it is only put in force.

    Args:
        dataset: the raw dataset with the images.
        store: the dataset to relabel.
        predictions: folder with one predicted label a case that is to be relabelled.
        number: the round that is made, from 1.
        processes: cases at once.
        min_quality: estimated mean Dice below which a case is left out until a later round lifts it.
        trust: what a voxel needs to be trained on.

    Raises:
        OneShotError: a prediction is missing or does not fit its image.
    """
    if not is_kept(store, number):
        manifest = store.read_manifest()
        tasks = _tasks(dataset, store, dataset.cases, manifest, predictions, number, trust)
        _make(store, manifest, tasks, number, processes, min_quality)
    taken: list[Taken] = []
    if (before := store.read_manifest().round) != number:
        if is_kept(store, before):
            # Training takes hours, in which people correct labels: those are theirs now, whatever the new round says.
            taken = take_up(dataset, store, processes)
        put_in_force(dataset, store, number, processes)
    return replace(_change(dataset, store, kept_manifest(store, number)), taken_up=tuple(taken))


def _tasks(
    dataset: RawDataset,
    store: Store,
    cases: Sequence[Case],
    manifest: Manifest,
    predictions: Path,
    number: int,
    trust: Trust,
) -> list[Task]:
    ending = dataset.file_ending
    return [
        Task(dataset, store, case, manifest.cases[case.name], predictions / f"{case.name}{ending}", number, trust)
        for case in cases
    ]


def _make(
    store: Store, manifest: Manifest, tasks: Sequence[Task], number: int, processes: int, min_quality: float
) -> None:
    results = dict(over_cases(relabel_case, tasks, processes=processes, title=f"relabel, round {number}"))
    manifest.cases = gate(dict(sorted(results.items())), min_quality)
    manifest.round = number
    keep(store, manifest, number)


def label_by_model(
    dataset: RawDataset, store: Store, cases: Sequence[Case], predictions: Path, number: int, processes: int
) -> None:
    """Labels of the round in force for images that were added: the model's word alone.

    Staged until all are made: one that was half written where it is in force would read as a person's edit.
    """
    manifest = store.read_manifest()
    tasks = _tasks(dataset, store, cases, manifest, predictions, number, Trust())
    made = dict(over_cases(label_added_case, tasks, processes=processes, title="label new images"))
    publish_staged(dataset, store, list(made.values()))


def label_added_case(task: Task) -> tuple[str, StagedChange]:
    """Stage the labels of an image that was added; returns its name and what is to be published."""
    said = _read_prediction(task, task.dataset.read_label(task.store.label_path(task.case.name)).shape)
    record = _record(task, np.ones(said.shape, bool), said, said)
    look = Look(task.dataset, task.store, task.case, task.record, task.number)
    return task.case.name, StagedChange(task.case.name, "added", record, stage(look, said, said))


def _change(dataset: RawDataset, store: Store, manifest: Manifest) -> Change:
    """How far the labels of a round lie from those of the round before, from both on disk."""
    now, agreement = manifest.round, {}
    for case in cases_to_predict(dataset, manifest):
        new, old = (store.round_path(n, case.name) for n in (now, now - 1))
        # An image that was added since has no label of the round before.
        if old.is_file():
            agreement[case.name] = mean_dice(dataset.read_label(new), dataset.read_label(old))
    return Change(now, agreement)


def cases_to_predict(dataset: RawDataset, manifest: Manifest) -> list[Case]:
    """Cases whose label a model may refresh: all but those with a person's whole word, and images added since."""
    known = manifest.cases
    return [case for case in dataset.cases if case.name in known and known[case.name].status not in HUMAN_WORD]


def relabel_case(task: Task) -> tuple[str, CaseRecord]:
    """Write one case's labels of a round; returns its record."""
    dataset, store, case = task.dataset, task.store, task.case
    if task.record.status in HUMAN_WORD:
        drawn = dataset.read_label(store.label_path(case.name))
        write_round(dataset, store, case, task.number, dataset.read_label(store.fused_path(case.name)), drawn)
        return case.name, task.record
    before = dataset.read_label(store.round_path(task.number - 1, case.name))
    predicted = _read_prediction(task, before.shape)
    human = None if case.label is None else dataset.read_label(case.label)
    new = [predicted, *_third_opinion(task)]
    voices = [*new, before] if _has_a_voice(task, before, human) else new
    agreed = fuse(voices).agreed & _confident(task, before.shape)
    # A label that has a voice in the new one is no evidence on it: judged is what was said without it.
    judged = _between(task, new)
    guess = _between(task, voices) if len(new) > 1 and voices is not new else judged
    target = np.where(agreed, guess, ignore_value(dataset)).astype(np.int16)
    if human is not None:
        guess, target, judged = (dataset.drawn_over(human, label) for label in (guess, target, judged))
    write_round(dataset, store, case, task.number, guess, target)
    return case.name, _record(task, agreed, judged, before)


def _has_a_voice(task: Task, before: LabelVolume, human: LabelVolume | None) -> bool:
    """Whether the label of the round before is anybody's: not where an empty one stands in for one that is missing."""
    record = task.record
    if record.status == "sparse" and not record.views:
        # Nothing was carried to it, so that there is but what a person drew until a model labels it.
        return human is not None and bool((before[human == task.dataset.ignore] > 0).any())
    return record.status not in _VOICELESS


def _between(task: Task, labels: Sequence[LabelVolume]) -> LabelVolume:
    return fuse(labels, spacing=task.dataset.image_geometry(task.case)[1]).label


def _third_opinion(task: Task) -> list[LabelVolume]:
    """The views of the source that must agree too; none where none was asked for or most of its views failed."""
    source = task.trust.opinion
    return [] if source is None else carried_views(task.dataset, task.store, source, task.case.name)


def _confident(task: Task, shape: tuple[int, ...]) -> BoolVolume:
    """Where the model's margin is large enough; everywhere where none is asked for."""
    if task.trust.min_margin == 0:
        return np.ones(shape, bool)
    stem = task.prediction.name.removesuffix(task.dataset.file_ending)
    path = task.prediction.with_name(f"{stem}.npz")
    if not path.is_file():
        raise OneShotError(f"expected the probabilities {path} for a margin, found none; predict the case again")
    with np.load(path) as file:
        found = margin(file["probabilities"], task.dataset.has_regions)
    if found.shape != shape:
        raise OneShotError(f"{path}: expected the shape {shape} of its image, found {found.shape}; predict it again")
    return found >= task.trust.min_margin


def margin(probabilities: np.ndarray, regions: bool) -> FloatVolume:
    """How sure a model is, float32 (Z, Y, X) in [0, 1], of its probabilities (C, Z, Y, X).

    The first class's probability less the second's; of regions, which are decided one by one, the least sure one's
    probability of its decision less that of the contrary.
    """
    if regions:
        return np.asarray(np.abs(2 * probabilities - 1).min(0), np.float32)
    second, first = np.partition(probabilities, -2, axis=0)[-2:]
    return np.asarray(first - second, np.float32)


def mean_dice(first: LabelVolume, second: LabelVolume) -> float:
    """Mean Dice over the foreground labels present in either; 1 where neither has any."""
    dice = dice_by_class(first, second, foreground([first, second]))
    return float(np.mean(list(dice.values()))) if dice else 1.0


def _record(task: Task, agreed: BoolVolume, judged: LabelVolume, before: LabelVolume) -> CaseRecord:
    old = task.record
    new = old.model_copy(update={"round": task.number, "divergence": round(float(1 - agreed.mean()), 6)})
    if old.status == "failed":
        # There was no label before, so there is nothing to compare with.
        new.status, new.quality = "pseudo", None
        new.reason = f"labelled by the model alone, since there was no label before: {old.reason}"
        return new
    compared = round_compared(old, task.number)
    if compared != task.number - 1:
        before = task.dataset.read_label(task.store.round_path(compared, task.case.name))
    new.quality = estimate(judged, opinions(task.dataset, task.store, task.case.name, old, before))
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
