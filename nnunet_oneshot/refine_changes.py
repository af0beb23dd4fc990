"""A living project: what people changed since the labels in force were made.

A new or changed label in the source dataset, a pseudo label corrected by hand in `labelsTr` or `pseudoTr/fused`, and
images that were added are found by comparing what lies there with what the round in force wrote.
"""

from __future__ import annotations

import filecmp
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import numpy as np

from nnunet_oneshot.checks import checked_label
from nnunet_oneshot.dataset import IGNORE, Case, RawDataset
from nnunet_oneshot.errors import OneShotError
from nnunet_oneshot.parallel import over_cases
from nnunet_oneshot.rounds import HUMAN_WORD, target_path
from nnunet_oneshot.store import CaseRecord, Manifest, Store
from nnunet_oneshot.training_data import LEFT_OUT, ignore_value, write_training_files
from sam2_propagation.interface import LabelVolume

ADDED = "the image was added after the labels were propagated"
What = Literal["labelled", "corrected", "added"]


@dataclass(frozen=True)
class Taken:
    """One change that was taken up."""

    case: str
    what: What

    def __str__(self) -> str:
        said = {"labelled": "drawn by a person since", "corrected": "corrected by hand", "added": "a new image"}
        return f"{self.case}: {said[self.what]}"


@dataclass(frozen=True)
class Look:
    """One case to look at.

    Attributes:
        dataset: the raw dataset.
        store: the pseudo-label dataset.
        case: the case.
        record: what is known of it.
        number: the round in force.
    """

    dataset: RawDataset
    store: Store
    case: Case
    record: CaseRecord
    number: int


def is_added(record: CaseRecord) -> bool:
    """True for an image that was added and has no label yet."""
    return record.status == "failed" and record.reason == ADDED


def take_up(dataset: RawDataset, store: Store, processes: int) -> list[Taken]:
    """Take over what people changed into the labels in force; returns what that was.

    Raises:
        OneShotError: a changed label is broken, not on its image's grid, or holds values that are not declared.
    """
    manifest = store.read_manifest()
    added = [case for case in dataset.cases if case.name not in manifest.cases]
    looks = [
        Look(dataset, store, case, manifest.cases[case.name], manifest.round)
        for case in dataset.cases
        if case.name in manifest.cases
    ]
    seen = list(over_cases(look_at, looks, processes=processes, title="look for changes"))
    found = [taken for _, taken in seen if taken is not None]
    manifest.cases.update({name: record for (name, record), _ in seen})
    for case in added:
        manifest.cases[case.name], taken = _add(dataset, store, case, manifest.round)
        found.append(taken)
    if found:
        _write(dataset, store, manifest)
    return sorted(found, key=lambda taken: taken.case)


def _write(dataset: RawDataset, store: Store, manifest: Manifest) -> None:
    manifest.cases = dict(sorted(manifest.cases.items()))
    write_training_files(dataset, store, manifest)
    store.write_manifest(manifest)


def look_at(look: Look) -> tuple[tuple[str, CaseRecord], Taken | None]:
    """A case's record, and what a person changed about it, which is written then to all its labels in force."""
    if look.case.label is not None and (record := _drawn(look, look.case.label)) is not None:
        return (look.case.name, record), Taken(look.case.name, "labelled")
    if (label := _edited(look)) is not None:
        return (look.case.name, _correct(look, label)), Taken(look.case.name, "corrected")
    return (look.case.name, look.record), None


def _drawn(look: Look, path: Path) -> CaseRecord | None:
    """The record of a case whose label in the source dataset is new or changed; its labels are written."""
    store, name = look.store, look.case.name
    human = checked_label(look.dataset, path, look.case, drawn=True)
    by_hand = np.ones(human.shape, bool) if look.dataset.ignore is None else human != look.dataset.ignore
    target, guess = (look.dataset.read_label(p) for p in (store.label_path(name), store.fused_path(name)))
    status: Literal["annotated", "sparse"] = "annotated" if by_hand.all() else "sparse"
    known = look.record.status in ("annotated", "sparse", "corrected")
    if known and np.array_equal(target[by_hand], human[by_hand]):
        return None
    _publish(look, np.where(by_hand, human, target), np.where(by_hand, human, guess))
    return look.record.model_copy(update={"status": status, "round": look.number, "quality": None, "reason": None})


def _edited(look: Look) -> LabelVolume | None:
    """A label that a person changed in the pseudo-label dataset, ignore where nothing is said; None for none."""
    store, name = look.store, look.case.name
    reviewed = look.record.review is not None
    if look.record.status in (*HUMAN_WORD, "rejected", "sparse") or reviewed:
        # Decisions of the review are in the manifest already, and an undone one may bring an earlier round's label.
        return None
    # Compared as files first: reading every label of a large set would take minutes.
    for path, written in (
        (store.fused_path(name), store.round_path(look.number, name)),
        (store.label_path(name), target_path(store, look.number, name)),
    ):
        if filecmp.cmp(path, written, shallow=False):
            continue
        label = _checked(look, path)
        left_out = path == store.label_path(name) and look.record.status in LEFT_OUT
        nothing_said = left_out and bool((label == ignore_value(look.dataset)).all())
        if not nothing_said and not np.array_equal(label, look.dataset.read_label(written)):
            return label
    return None


def _checked(look: Look, path: Path) -> LabelVolume:
    labels = {**look.dataset.json["labels"], IGNORE: ignore_value(look.dataset)}
    with_ignore = replace(look.dataset, json={**look.dataset.json, "labels": labels})
    return checked_label(with_ignore, path, look.case, drawn=True)


def _correct(look: Look, label: LabelVolume) -> CaseRecord:
    """The record of a case that was corrected by hand; where the correction says ignore, the best guess stays."""
    said = label != ignore_value(look.dataset)
    if not said.any():
        raise OneShotError(
            f"case {look.case.name}: expected a corrected label, found the ignore label alone; correct it or restore it"
        )
    guess = look.dataset.read_label(look.store.round_path(look.number, look.case.name))
    _publish(look, label, np.where(said, label, guess).astype(np.int16))
    changes = {"status": "corrected", "round": look.number, "quality": None, "reason": "corrected by hand"}
    return look.record.model_copy(update=changes)


def _publish(look: Look, target: LabelVolume, guess: LabelVolume) -> None:
    store, name = look.store, look.case.name
    for label, path in (
        (guess, store.round_path(look.number, name)),
        (guess, store.fused_path(name)),
        (target, target_path(store, look.number, name)),
        (target, store.label_path(name)),
    ):
        store.write_label(look.dataset, label.astype(np.int16), path, look.case)


def _add(dataset: RawDataset, store: Store, case: Case, number: int) -> tuple[CaseRecord, Taken]:
    """An image without a label is left out until a model labels it; one with a label is annotated."""
    shape = dataset.read_image(case).shape
    guess, target = np.zeros(shape, np.int16), np.full(shape, ignore_value(dataset), np.int16)
    look = Look(dataset, store, case, CaseRecord(status="failed", round=number, reason=ADDED), number)
    _publish(look, target, guess)
    if case.label is not None and (record := _drawn(look, case.label)) is not None:
        return record, Taken(case.name, "labelled")
    return look.record, Taken(case.name, "added")
