"""A living project: what people changed since the labels in force were made.

A new or changed label in the source dataset, a pseudo label corrected by hand in `labelsTr` or `pseudoTr/fused`, and
images that were added are found by comparing what lies there with what the round in force wrote.

Looking changes nothing in force. New labels are staged below `.oneshot/taken` and, when every case was looked at, named
in `.oneshot/taken.json`; from then on they are published and the manifest is written, again after a kill. Published at
once, a correction would equal what the round wrote without the manifest knowing whose it is, and the next round would
overwrite it.
"""

from __future__ import annotations

import filecmp
import json
import shutil
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import numpy as np

from nnunet_oneshot.checks import checked_label
from nnunet_oneshot.dataset import IGNORE, Case, RawDataset
from nnunet_oneshot.errors import OneShotError
from nnunet_oneshot.parallel import over_cases
from nnunet_oneshot.rounds import copy_label, target_path
from nnunet_oneshot.store import DRAWN, FINAL_WORD, LEFT_OUT, CaseRecord, Store
from nnunet_oneshot.training_data import ignore_value, write_training_files
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
class Change:
    """One change that was found, its labels staged, and the case's record once it is taken up."""

    case: str
    what: What
    record: CaseRecord


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
        OneShotError: a changed label is broken, not on its image's grid, or holds values that are not declared;
            nothing is changed then.
    """
    before = finish_taking(dataset, store)
    manifest = store.read_manifest()
    looks = [
        Look(dataset, store, case, manifest.cases[case.name], manifest.round)
        for case in dataset.cases
        if case.name in manifest.cases
    ]
    seen = list(over_cases(look_at, looks, processes=processes, title="look for changes"))
    found = [change for change in seen if change is not None]
    found += [_add(dataset, store, case, manifest.round) for case in dataset.cases if case.name not in manifest.cases]
    if found:
        changes = {change.case: {"what": change.what, "record": change.record.model_dump()} for change in found}
        store.write_json(changes, _list_path(store))
    return sorted([*before, *finish_taking(dataset, store)], key=lambda taken: taken.case)


def finish_taking(dataset: RawDataset, store: Store) -> list[Taken]:
    """Publish the changes that are staged and named, if any; repeat it after an interruption."""
    path, taken = _list_path(store), []
    if path.is_file():
        manifest = store.read_manifest()
        for name, change in json.loads(path.read_text(encoding="utf-8")).items():
            _publish(store, manifest.round, name)
            manifest.cases[name] = CaseRecord.model_validate(change["record"])
            taken.append(Taken(name, change["what"]))
        manifest.cases = dict(sorted(manifest.cases.items()))
        write_training_files(dataset, store, manifest)
        store.write_manifest(manifest)
        path.unlink()
    shutil.rmtree(store.state_folder / "taken", ignore_errors=True)
    return taken


def look_at(look: Look) -> Change | None:
    """What a person changed about a case, its new labels staged; None where nobody changed anything."""
    if look.case.label is not None:
        target, guess = (look.store.label_path(look.case.name), look.store.fused_path(look.case.name))
        if change := _drawn(look, look.case.label, look.dataset.read_label(target), look.dataset.read_label(guess)):
            return change
    label = _edited(look)
    return None if label is None else _correct(look, label)


def _drawn(look: Look, path: Path, target: LabelVolume, guess: LabelVolume) -> Change | None:
    """The change of a case whose label in the source dataset is new or other than its labels in force."""
    human = checked_label(look.dataset, path, look.case, drawn=True)
    by_hand = np.ones(human.shape, bool) if look.dataset.ignore is None else human != look.dataset.ignore
    status: Literal["annotated", "sparse"] = "annotated" if by_hand.all() else "sparse"
    if look.record.status in DRAWN and np.array_equal(target[by_hand], human[by_hand]):
        return None
    _stage(look, np.where(by_hand, human, target), np.where(by_hand, human, guess))
    changes = {"status": status, "round": look.number, "quality": None, "reason": None}
    return Change(look.case.name, "labelled", look.record.model_copy(update=changes))


def _edited(look: Look) -> LabelVolume | None:
    """A label that a person changed in the pseudo-label dataset, ignore where nothing is said; None for none."""
    store, name = look.store, look.case.name
    if look.record.status in (*FINAL_WORD, "sparse"):
        # The manifest says already whose word it is.
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


def _correct(look: Look, label: LabelVolume) -> Change:
    """The change of a case that was corrected by hand; where the correction says ignore, the best guess stays."""
    said = label != ignore_value(look.dataset)
    if not said.any():
        raise OneShotError(
            f"case {look.case.name}: expected a corrected label, found the ignore label alone; correct it or restore it"
        )
    guess = look.dataset.read_label(look.store.round_path(look.number, look.case.name))
    _stage(look, label, np.where(said, label, guess))
    changes = {"status": "corrected", "round": look.number, "quality": None, "reason": "corrected by hand"}
    return Change(look.case.name, "corrected", look.record.model_copy(update=changes))


def _add(dataset: RawDataset, store: Store, case: Case, number: int) -> Change:
    """An image without a label is left out until a model labels it; one with a label is annotated."""
    shape = dataset.read_image(case).shape
    guess, target = np.zeros(shape, np.int16), np.full(shape, ignore_value(dataset), np.int16)
    look = Look(dataset, store, case, CaseRecord(status="failed", round=number, reason=ADDED), number)
    if case.label is not None and (change := _drawn(look, case.label, target, guess)) is not None:
        return change
    _stage(look, target, guess)
    return Change(case.name, "added", look.record)


def _list_path(store: Store) -> Path:
    return store.state_folder / "taken.json"


def _staged(store: Store, kind: str, name: str) -> Path:
    return store.state_folder / "taken" / kind / f"{name}{store.file_ending}"


def _stage(look: Look, target: LabelVolume, guess: LabelVolume) -> None:
    for kind, label in (("target", target), ("guess", guess)):
        path = _staged(look.store, kind, look.case.name)
        look.store.write_label(look.dataset, label.astype(np.int16), path, look.case)


def _publish(store: Store, number: int, name: str) -> None:
    """Copy a case's staged labels to where they are in force."""
    for path in (store.round_path(number, name), store.fused_path(name)):
        copy_label(store, _staged(store, "guess", name), path)
    for path in (target_path(store, number, name), store.label_path(name)):
        copy_label(store, _staged(store, "target", name), path)
