"""A living project: what people changed since the labels in force were made.

A new or changed label in the source dataset, a pseudo label corrected by hand in `labelsTr` or `pseudoTr/fused`, and
images that were added are found by comparing what lies there with what the round in force wrote.

Looking changes nothing in force, but that a label of nothing is written again, where that of a case that is left out is
gone. New labels are staged below `.oneshot/taken` and, when every case was looked at, named
in `.oneshot/taken.json`; from then on they are published and the manifest is written, again after a kill. Published at
once, a correction would equal what the round wrote without the manifest knowing whose it is, and the next round would
overwrite it. What a person edited once more since the labels were staged is not published over: it is the next change.
"""

from __future__ import annotations

import filecmp
import json
import shutil
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import numpy as np

from nnunet_oneshot.checks import check_image, checked_label
from nnunet_oneshot.dataset import IGNORE, Case, RawDataset
from nnunet_oneshot.errors import OneShotError
from nnunet_oneshot.file_hash import hash_of_voxels
from nnunet_oneshot.parallel import over_cases
from nnunet_oneshot.prompting import carried_views
from nnunet_oneshot.rounds import copy_label, kept_manifest, kept_rounds, switching_to, target_path
from nnunet_oneshot.store import DRAWN, HUMAN_WORD, LEFT_OUT, CaseRecord, Store
from nnunet_oneshot.training_data import ignore_value, write_training_files
from sam2_propagation.consensus import fuse
from sam2_propagation.interface import BoolVolume, LabelVolume

ADDED = "the image was added after the labels were propagated"
What = Literal["labelled", "withdrawn", "corrected", "added", "decided"]
Found = dict[str, str | None]
KINDS = ("guess", "target")
"""Labels of a case: the best guess, and what is trained on."""


@dataclass(frozen=True)
class Taken:
    """One change that was taken up."""

    case: str
    what: What

    def __str__(self) -> str:
        said = {
            "labelled": "drawn by a person since",
            "withdrawn": "set back to ignore by a person since",
            "corrected": "corrected by hand",
            "added": "a new image",
            "decided": "decided on in the review",
        }
        return f"{self.case}: {said[self.what]}"


@dataclass(frozen=True)
class Change:
    """One change that was found, its labels staged.

    Attributes:
        record: the case's, once the change is taken up.
        found: hashes of the labels in force when they were looked at, by kind; None for one that was not there.
        rounds: kinds of labels that become those of the round in force too.
    """

    case: str
    what: What
    record: CaseRecord
    found: Found
    rounds: tuple[str, ...] = KINDS


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

    @property
    def written(self) -> int:
        """The round that holds what was last written of the case; no round rewrites what a person settled."""
        return self.record.round if self.record.status in HUMAN_WORD else self.number


def is_added(record: CaseRecord) -> bool:
    """True for an image that was added and has no label yet."""
    return record.status == "failed" and record.reason == ADDED


def take_up(dataset: RawDataset, store: Store, processes: int) -> list[Taken]:
    """Take over what people changed into the labels in force; returns what that was.

    Raises:
        OneShotError: a changed label is broken, not on its image's grid, or holds values that are not declared; or an
            image that was added cannot be used. Nothing is changed then.
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
    return sorted({*before, *publish_staged(dataset, store, found)}, key=lambda taken: (taken.case, taken.what))


def publish_staged(dataset: RawDataset, store: Store, changes: Sequence[Change]) -> list[Taken]:
    """Put changes whose labels are staged in force, all of them also after a kill; returns what they were."""
    if changes:
        named = {
            c.case: {"what": c.what, "record": c.record.model_dump(), "found": c.found, "rounds": c.rounds}
            for c in changes
        }
        store.write_json(named, _list_path(store))
    return finish_taking(dataset, store)


def finish_taking(dataset: RawDataset, store: Store) -> list[Taken]:
    """Publish the changes that are staged and named, if any; repeat it after an interruption."""
    path, taken = _list_path(store), []
    if path.is_file():
        manifest = store.read_manifest()
        for name, change in json.loads(path.read_text(encoding="utf-8")).items():
            found, kinds = change.get("found", {}), change.get("rounds", KINDS)
            record = CaseRecord.model_validate(change["record"])
            _publish(dataset, store, manifest.round, name, found, kinds, record.views)
            manifest.cases[name] = record
            taken.append(Taken(name, change["what"]))
        manifest.cases = dict(sorted(manifest.cases.items()))
        write_training_files(dataset, store, manifest)
        store.write_manifest(manifest)
        path.unlink()
    shutil.rmtree(store.state_folder / "taken", ignore_errors=True)
    return taken


def stage(look: Look, target: LabelVolume, guess: LabelVolume) -> Found:
    """Stage a case's new labels; hashes of those that are in force."""
    for kind, label in (("target", target), ("guess", guess)):
        path = _staged(look.store, kind, look.case.name)
        look.store.write_label(look.dataset, label.astype(np.int16), path, look.case)
    return {kind: _hash(look.dataset, path) for kind, path in _in_force(look.store, look.case.name).items()}


def check_no_edit_amid_switch(dataset: RawDataset, store: Store) -> None:
    """OneShotError where a label was edited while a round lay half in force, since finishing would overwrite it.

    Then some labels are of the one round and some of the other: an edit is what neither wrote.
    """
    if (number := switching_to(store)) is None:
        return
    now, then = store.read_manifest(), kept_manifest(store, number)
    for name, record in now.cases.items():
        if record.status in HUMAN_WORD or name not in then.cases:
            continue
        looks = [Look(dataset, store, dataset.case(name), record, now.round)]
        looks.append(replace(looks[0], record=then.cases[name], number=number))
        rewritten = {
            store.fused_path(name): store.round_path(number, name),
            store.label_path(name): target_path(store, number, name),
        }
        for path, source in rewritten.items():
            # One that is gone is written anew where the switch is finished.
            if path.is_file() and all(_edit_in(look, _read_human(look), path) is not None for look in looks):
                rounds = " or ".join(map(str, sorted({now.round, number})))
                raise OneShotError(
                    f"{path}: expected a label of round {rounds}, found one that was edited after a run was stopped "
                    f"amid putting round {number} in force; move your edit elsewhere, copy {source} there, run again, "
                    "and then put the edit back"
                )


def look_at(look: Look) -> Change | None:
    """What a person changed about a case, its new labels staged; None where nobody changed anything.

    Raises:
        OneShotError: what a person drew is gone, or a label in force or of its round; or it cannot be read.
    """
    store, name, human = look.store, look.case.name, _read_human(look)
    if human is None and look.record.status in ("annotated", "sparse"):
        raise OneShotError(
            f"case {name}: expected its label in {look.dataset.name}/labelsTr, which a person drew, found none; put it "
            "back, or make the labels again without it (propagate --overwrite)"
        )
    # A label that a person drew whole in the source dataset is the last word on its case.
    if human is None or look.dataset.is_sparse(human):
        label = _edited(look, human)
        if label is not None:
            return _correct(look, label)
    if human is None:
        return None
    _check_there(look, store.label_path(name), target_path(store, look.written, name))
    _check_there(look, store.fused_path(name), store.round_path(look.written, name))
    return _drawn(look, human, _checked(look, store.label_path(name)), look.dataset.read_label(store.fused_path(name)))


def _read_human(look: Look) -> LabelVolume | None:
    """What a person drew of the case in the source dataset, ignore where nothing; None where there is no label."""
    path = look.case.label
    return None if path is None else checked_label(look.dataset, path, look.case, drawn=True)


def _drawn(look: Look, human: LabelVolume, target: LabelVolume, guess: LabelVolume) -> Change | None:
    """The change of a case whose label in the source dataset is new or other than its labels in force."""
    by_hand, ignore = _by_hand(look, human), ignore_value(look.dataset)
    status: Literal["annotated", "sparse"] = "annotated" if by_hand.all() else "sparse"
    withdrawn = _withdrawn(look, by_hand)
    same = look.record.status in DRAWN and np.array_equal(target[by_hand], human[by_hand])
    if same and not withdrawn.any():
        if look.record.status == "sparse" and not look.store.drawn_path(look.case.name).is_file():
            # Older versions did not note it: what is set back to ignore from now on is seen.
            look.store.write_label(look.dataset, human, look.store.drawn_path(look.case.name), look.case)
        return None
    guess = np.where(by_hand, human, guess)
    if withdrawn.any():
        # Trainers that learn the best guess where a label is ignored would still learn what a person took back.
        word = _carried(look.dataset, look.store, look.case, look.record.views)
        guess = np.where(withdrawn, 0 if word is None else word, guess)
    target = np.where(withdrawn, ignore, np.where(by_hand, human, target))
    found = stage(look, target, guess)
    if status == "sparse":
        look.store.write_label(look.dataset, human, _staged(look.store, "drawn", look.case.name), look.case)
    changes = {"status": status, "round": look.number, "quality": None, "reason": None}
    return Change(look.case.name, "withdrawn" if same else "labelled", look.record.model_copy(update=changes), found)


def _carried(dataset: RawDataset, store: Store, case: Case, views: Sequence[str]) -> LabelVolume | None:
    """What programs carried to a case, all views of it fused; None where nothing was."""
    sources = dict.fromkeys(view.split("/")[0] for view in views)
    labels = [label for source in sources for label in carried_views(dataset, store, source, case.name)]
    return fuse(labels, spacing=dataset.image_geometry(case)[1]).label if labels else None


def _withdrawn(look: Look, by_hand: BoolVolume) -> BoolVolume:
    """Voxels that a person had drawn and set back to ignore since; none where an older version did not note them.

    Nor where a person corrected the whole label since, which says what is right there.
    """
    if look.record.status == "annotated":
        return ~by_hand
    path = look.store.drawn_path(look.case.name)
    if look.record.status != "sparse" or not path.is_file():
        return np.zeros_like(by_hand)
    return _by_hand(look, look.dataset.read_label(path)) & ~by_hand


def _edited(look: Look, human: LabelVolume | None) -> LabelVolume | None:
    """A label that a person changed in the pseudo-label dataset, ignore where nothing is said; None for none.

    What a person drew in the source dataset, `human`, stands in it whatever the edit says there.
    """
    if look.record.status == "annotated":
        # Its label is the source dataset's, and is changed there.
        return None
    name = look.case.name
    guess, target = (_edit_in(look, human, path(name)) for path in (look.store.fused_path, look.store.label_path))
    if guess is None or target is None:
        return target if guess is None else guess
    said = target != ignore_value(look.dataset)
    if np.array_equal(guess[said], target[said]) or _is_the_rounds(look, human, target):
        return guess
    if _is_the_rounds(look, human, guess):
        return target
    raise OneShotError(
        f"case {name}: expected one edited label, found {look.store.fused_path(name)} and "
        f"{look.store.label_path(name)} edited both and to different voxels; copy the one that holds over the other"
    )


def _is_the_rounds(look: Look, human: LabelVolume | None, label: LabelVolume) -> bool:
    """Whether a label is one of the two that its round wrote, as where a person copied the one over the other."""
    store, name = look.store, look.case.name
    paths = (store.round_path(look.written, name), target_path(store, look.written, name))
    return any(np.array_equal(label, _drawn_over(look, human, look.dataset.read_label(path))) for path in paths)


def _edit_in(look: Look, human: LabelVolume | None, path: Path) -> LabelVolume | None:
    """The label of one file in force where it is not what the look's round wrote, else None."""
    store, name = look.store, look.case.name
    guess, target = store.round_path(look.written, name), target_path(store, look.written, name)
    trained_on = path == store.label_path(name)
    # What was accepted or drawn in the review is the best guess and the label to train on at once.
    written = ([target, guess] if look.record.status in HUMAN_WORD else [target]) if trained_on else [guess]
    for known in written:
        _check_there(look, known, None)
    if trained_on and look.record.status in LEFT_OUT and not path.is_file():
        nothing = np.full(look.dataset.read_label(guess).shape, ignore_value(look.dataset), np.int16)
        store.write_label(look.dataset, nothing, path, look.case)
        return None
    _check_there(look, path, written[-1])
    # Compared as files first: reading every label of a large set would take minutes.
    if any(filecmp.cmp(path, known, shallow=False) for known in written):
        return None
    label = _drawn_over(look, human, _checked(look, path))
    if trained_on and _says_nothing(look, human, label):
        return None
    before = (_drawn_over(look, human, look.dataset.read_label(known)) for known in written)
    return None if any(np.array_equal(label, known) for known in before) else label


def _check_there(look: Look, path: Path, copy: Path | None) -> None:
    """OneShotError where a label file is gone; `copy` is one, unless it is gone too."""
    if not path.is_file():
        remedy = "put it back" if copy is None or not copy.is_file() else f"copy {copy} there"
        raise OneShotError(
            f"{path}: expected the label of round {look.written}, found no such file; {remedy}, or make the labels "
            "again (propagate --overwrite)"
        )


def _says_nothing(look: Look, human: LabelVolume | None, label: LabelVolume) -> bool:
    """Whether a label to train on is ignore but for what a person drew, as that of a case that is left out."""
    if look.record.status not in (*LEFT_OUT, "sparse"):
        return False
    silent = label == ignore_value(look.dataset)
    return bool((silent if human is None else silent | _by_hand(look, human)).all())


def _by_hand(look: Look, human: LabelVolume) -> BoolVolume:
    return np.ones(human.shape, bool) if look.dataset.ignore is None else human != look.dataset.ignore


def _drawn_over(look: Look, human: LabelVolume | None, label: LabelVolume) -> LabelVolume:
    return label if human is None else look.dataset.drawn_over(human, label)


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
    guess = look.dataset.read_label(look.store.round_path(look.written, look.case.name))
    found = stage(look, label, np.where(said, label, guess))
    changes = {"status": "corrected", "round": look.number, "quality": None, "reason": "corrected by hand"}
    if (review := look.record.review) is not None and review.get("decision") is not None:
        # A decision of before, for example to reject the case, no longer holds.
        changes["review"] = {**review, "decision": "corrected"}
    return Change(look.case.name, "corrected", look.record.model_copy(update=changes), found)


def _add(dataset: RawDataset, store: Store, case: Case, number: int) -> Change:
    """An image without a label is left out until a model labels it; one with a label is annotated."""
    shape = check_image(dataset, case).shape
    guess, target = np.zeros(shape, np.int16), np.full(shape, ignore_value(dataset), np.int16)
    look = Look(dataset, store, case, CaseRecord(status="failed", round=number, reason=ADDED), number)
    human = _read_human(look)
    if human is not None and (change := _drawn(look, human, target, guess)) is not None:
        return change
    return Change(case.name, "added", look.record, stage(look, target, guess))


def _list_path(store: Store) -> Path:
    return store.state_folder / "taken.json"


def _staged(store: Store, kind: str, name: str) -> Path:
    return store.state_folder / "taken" / kind / f"{name}{store.file_ending}"


def _in_force(store: Store, name: str) -> dict[str, Path]:
    return {"guess": store.fused_path(name), "target": store.label_path(name)}


def _hash(dataset: RawDataset, path: Path) -> str | None:
    return hash_of_voxels(dataset.read_label(path)) if path.is_file() else None


def _publish(
    dataset: RawDataset, store: Store, number: int, name: str, found: Found, kinds: Sequence[str], views: Sequence[str]
) -> None:
    """Copy a case's staged labels to its round and to where they are in force, but over no edit made since."""
    rounds = {"guess": store.round_path(number, name), "target": target_path(store, number, name)}
    drawn = _staged(store, "drawn", name)
    if drawn.is_file():
        _withdraw_from_rounds(dataset, store, number, name, drawn, views)
    for kind, path in _in_force(store, name).items():
        staged = _staged(store, kind, name)
        if kind in kinds:
            copy_label(store, staged, rounds[kind])
        now = _hash(dataset, path)
        # What was found is not noted by older versions; of what was published before a kill, nothing is to be done.
        if now is None or now in (found.get(kind, now), _hash(dataset, staged)):
            copy_label(store, staged, path)
    if drawn.is_file():
        # Last: after a kill the voxels that were withdrawn are told by what had been drawn before.
        copy_label(store, drawn, store.drawn_path(name))


def _withdraw_from_rounds(
    dataset: RawDataset, store: Store, number: int, name: str, drawn: Path, views: Sequence[str]
) -> None:
    """Take what a person no longer draws out of the rounds that are not in force: they may be once more."""
    if not store.drawn_path(name).is_file():
        return
    before, now = dataset.read_label(store.drawn_path(name)), dataset.read_label(drawn)
    withdrawn = (before != dataset.ignore) & (now == dataset.ignore)
    others = [other for other in kept_rounds(store) if other != number]
    if not others or not withdrawn.any():
        return
    word = _carried(dataset, store, dataset.case(name), views)
    for path, instead in (
        *((target_path(store, other, name), ignore_value(dataset)) for other in others),
        *((store.round_path(other, name), 0 if word is None else word) for other in others),
    ):
        if path.is_file():
            label = dataset.read_label(path)
            rest = np.where(withdrawn & (label == before), instead, label).astype(np.int16)
            store.write_label(dataset, rest, path, dataset.case(name))
