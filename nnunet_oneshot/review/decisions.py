"""A person's decisions on cases: what they do to labels, the manifest and the training files.

Accepted: the label as shown is right; it is trained on everywhere, and no model changes it. Rejected: left out of
training until a person decides otherwise. Corrected: the label that a person drew is the case's label; the case counts
as annotated. Every decision is written at once, with its time; the state before the first one is kept for `undo`.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import datetime, timezone
from pathlib import Path
from typing import Any, Literal

import numpy as np

from nnunet_oneshot.dataset import Case, RawDataset
from nnunet_oneshot.errors import OneShotError
from nnunet_oneshot.refine_changes import KINDS, Change, Look, finish_taking, publish_staged, stage
from nnunet_oneshot.store import LEFT_OUT, CaseRecord, Manifest, Status, Store
from nnunet_oneshot.training_data import ignore_value, write_training_files
from sam2_propagation.interface import LabelVolume

Action = Literal["accept", "reject", "flag", "unflag", "comment", "undo"]


class UnknownCaseError(OneShotError):
    """There is no case of that name."""


class ConflictError(OneShotError):
    """Somebody decided on the case after the one who asks last looked at it."""


def decide(
    raw: RawDataset, store: Store, name: str, action: Action, comment: str | None = None, seen: str | None = None
) -> CaseRecord:
    """Carry out a decision on a case; returns its new record.

    Args:
        raw: the raw dataset with the images.
        store: the pseudo-label dataset.
        name: the case.
        action: what was decided.
        comment: replaces the case's comment; None keeps it.
        seen: time of the decision that the person saw when deciding (None for none).

    Raises:
        ConflictError: there is a newer decision than `seen`.
        OneShotError: an unknown case, a decision that its status does not allow, or a refinement at work.
    """
    with _at_work(raw, store, name):
        manifest = store.read_manifest()
        record, case = _record(manifest, name), raw.case(name)
        _check_seen(name, record, seen)
        _check_allowed(raw, name, record, action)
        review = _review(record, action, comment)
        look = Look(raw, store, case, record, manifest.round)
        if action == "reject":
            return _reject(look, review)
        if action == "undo":
            return _restore(look, review)
        with _manifest(raw, store) as manifest:
            if action == "accept":
                record = _accept(raw, store, case, record)
            manifest.cases[name] = record
            record.review = review
    return record


def correct(
    raw: RawDataset, store: Store, name: str, label: LabelVolume, comment: str | None = None, seen: str | None = None
) -> CaseRecord:
    """Make a label that a person drew the case's label; returns its new record.

    Args:
        label: int16 (Z, Y, X) without ignore, checked (see `corrections`).

    Raises:
        ConflictError, OneShotError: as `decide`; also for a label without any foreground.
    """
    if not label.any():
        raise OneShotError(f"{name}: expected foreground in the corrected label, found none; reject the case instead")
    with _at_work(raw, store, name):
        with _manifest(raw, store) as manifest:
            record, case = _record(manifest, name), raw.case(name)
            _check_seen(name, record, seen)
            _check_not_annotated(raw, name, record)
            _keep(raw, store, case, record)
            label = _with_drawn_voxels(raw, case, label)
            # The best guess first and its round last, so that all that a crash leaves reads as a person's edit.
            for path in (store.fused_path(name), store.label_path(name)):
                store.write_label(raw, label, path, case)
            # An estimate of the machine's label says nothing of a person's.
            changes = {"status": "corrected", "divergence": 0.0, "round": manifest.round}
            record = record.model_copy(update={**changes, "quality": None, "reason": None})
            manifest.cases[name] = record
            record.review = _review(record, "correct", comment)
        store.write_label(raw, label, store.round_path(manifest.round, name), case)
    return record


@contextmanager
def _at_work(raw: RawDataset, store: Store, name: str) -> Iterator[None]:
    """No other decision and no refinement meanwhile, and none that was stopped with changes that it had yet to write.

    These would be written over the decision by the next one.
    """
    with store.lock("review", wait=True), _no_refinement(store):
        if name in {taken.case for taken in finish_taking(raw, store)}:
            raise ConflictError(
                f"{name}: expected its label as you saw it, found a change of it that a stopped refine or review had "
                "not put in force, which is done now; look at it again"
            )
        yield


@contextmanager
def _manifest(raw: RawDataset, store: Store) -> Iterator[Manifest]:
    """The manifest to change; what nnU-Net reads and the manifest itself are written at the end, in that order."""
    manifest = store.read_manifest()
    yield manifest
    write_training_files(raw, store, manifest)
    store.write_manifest(manifest)


@contextmanager
def _no_refinement(store: Store) -> Iterator[None]:
    # A round rewrites all labels from the manifest it began with: a decision in between would be lost.
    with store.lock("refine"):
        yield


def _record(manifest: Manifest, name: str) -> CaseRecord:
    if name not in manifest.cases:
        raise UnknownCaseError(f"expected a case of the dataset, found {name!r}; reload the page")
    return manifest.cases[name].model_copy()


def _check_seen(name: str, record: CaseRecord, seen: str | None) -> None:
    last = (record.review or {}).get("time")
    if last != seen:
        raise ConflictError(
            f"{name}: expected no decision since you looked at it, found one of {last}, made elsewhere; look at it "
            "again"
        )


def _check_allowed(raw: RawDataset, name: str, record: CaseRecord, action: Action) -> None:
    if action in ("flag", "unflag", "comment"):
        return
    _check_not_annotated(raw, name, record)
    if action == "accept" and record.status == "failed":
        raise OneShotError(
            f"{name}: expected a label to accept, found none ({record.reason}); correct it or leave it out"
        )
    if action == "reject" and record.status == "sparse":
        raise OneShotError(
            f"{name}: expected a case without a person's annotation to reject, found annotated slices; correct it"
        )


def _check_not_annotated(raw: RawDataset, name: str, record: CaseRecord) -> None:
    if record.status == "annotated":
        raise OneShotError(
            f"{name}: expected a label made by a program, found one drawn by a person; change it in "
            f"{raw.name}/labelsTr and propagate again"
        )


def _accept(raw: RawDataset, store: Store, case: Case, record: CaseRecord) -> CaseRecord:
    _keep(raw, store, case, record)
    store.write_label(raw, raw.read_label(store.fused_path(case.name)), store.label_path(case.name), case)
    # With slices that a person drew, and the rest approved, the case stays what it was for training: annotated.
    status: Status = "corrected" if case.label is not None or record.status == "corrected" else "accepted"
    return record.model_copy(update={"status": status})


def _reject(look: Look, review: dict[str, Any]) -> CaseRecord:
    """Staged and named first: a label of nothing whose record does not say why would be no label to `refine`."""
    raw, store, case = look.dataset, look.store, look.case
    _keep(raw, store, case, look.record)
    guess = raw.read_label(store.fused_path(case.name))
    nothing = np.full(guess.shape, ignore_value(raw), np.int16)
    record = look.record.model_copy(update={"status": "rejected", "review": review})
    publish_staged(raw, store, [Change(case.name, "decided", record, stage(look, nothing, guess), rounds=())])
    return record


def _keep(raw: RawDataset, store: Store, case: Case, record: CaseRecord) -> None:
    """Put the machine's state aside, once; the record comes last, as a sign that all is there."""
    folder = _kept_folder(store, case.name)
    if (path := folder / "record.json").is_file():
        kept = CaseRecord.model_validate_json(path.read_text(encoding="utf-8"))
        # Else it is what an undoing that was stopped left.
        if kept == record or (record.review or {}).get("decision") is not None:
            return
        path.unlink()
    for kind, path in _kept_labels(store, case.name).items():
        store.write_label(raw, raw.read_label(path), folder / f"{kind}{store.file_ending}", case)
    store.write_json(record.model_dump(), folder / "record.json")


def _restore(look: Look, review: dict[str, Any]) -> CaseRecord:
    raw, store, name = look.dataset, look.store, look.case.name
    folder = _kept_folder(store, name)
    if not (folder / "record.json").is_file() or (look.record.review or {}).get("decision") is None:
        raise OneShotError(f"{name}: expected a decision to undo, found none; there is nothing to do")
    target, guess = (raw.read_label(folder / f"{kind}{store.file_ending}") for kind in ("target", "fused"))
    before = CaseRecord.model_validate_json((folder / "record.json").read_text(encoding="utf-8"))
    record = before.model_copy(update={"review": review})
    # What the round in force would train on is what lies there again: `refine` takes a difference for an edit.
    rounds = ("guess",) if before.status in LEFT_OUT else KINDS
    publish_staged(raw, store, [Change(name, "decided", record, stage(look, target, guess), rounds)])
    shutil.rmtree(folder)
    return record


def _kept_folder(store: Store, name: str) -> Path:
    return store.state_folder / "review" / name


def _kept_labels(store: Store, name: str) -> dict[str, Path]:
    return {"target": store.label_path(name), "fused": store.fused_path(name)}


def _with_drawn_voxels(raw: RawDataset, case: Case, label: LabelVolume) -> LabelVolume:
    """Voxels of a sparse annotation never change."""
    if case.label is None:
        return label
    drawn = raw.read_label(case.label)
    return np.where(drawn != raw.ignore, drawn, label).astype(np.int16)


def _review(record: CaseRecord, action: str, comment: str | None) -> dict[str, Any]:
    """What the manifest tells of the decision: `decision`, `flag`, `comment` and `time` (UTC)."""
    before = record.review or {}
    decided = {"accept": "accepted", "reject": "rejected", "correct": "corrected", "undo": None}
    return {
        "decision": decided.get(action, before.get("decision")),
        "flag": {"flag": True, "unflag": False}.get(action, before.get("flag", False)),
        "comment": before.get("comment", "") if comment is None else comment,
        "time": datetime.now(timezone.utc).isoformat(),
    }
