"""The labels of every round, and which round is in force.

A round is whole once its record `.oneshot/rounds/NN.json` is there: `pseudoTr/rounds/NN` holds its best guesses,
`.oneshot/targets/NN` what it would train on. Putting a round in force copies these to `pseudoTr/fused` and `labelsTr`,
where cases that are left out get an all-ignore label. What a person labelled stays as it is, whatever round comes.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from nnunet_oneshot.dataset import Case, RawDataset
from nnunet_oneshot.errors import OneShotError
from nnunet_oneshot.parallel import over_cases
from nnunet_oneshot.store import HUMAN_WORD, LEFT_OUT, CaseRecord, Manifest, Store, read_manifest
from nnunet_oneshot.training_data import ignore_value, write_training_files
from sam2_propagation.interface import LabelVolume

_SWITCH = "switch.json"
_DECIDED = (*HUMAN_WORD, "rejected")


@dataclass(frozen=True)
class Placement:
    """One case whose labels of a round are put in force.

    Attributes:
        left_out: the label to train on is ignore but for what a person drew.
        drawn: a person drew a part of its label, maybe after that round was made.
        withdrawn: that round has a person's word, which was taken back since.
    """

    dataset: RawDataset
    store: Store
    case: Case
    number: int
    left_out: bool
    drawn: bool = False
    withdrawn: bool = False


def target_path(store: Store, number: int, case: str) -> Path:
    """What a case would train on in a round, were it not left out; divergence is ignore."""
    return store.state_folder / "targets" / f"{number:02d}" / f"{case}{store.file_ending}"


def record_path(store: Store, number: int) -> Path:
    """The manifest as it was when a round was made."""
    return store.state_folder / "rounds" / f"{number:02d}.json"


def is_kept(store: Store, number: int) -> bool:
    """True where a round's labels and record are whole."""
    return record_path(store, number).is_file()


def kept_rounds(store: Store) -> list[int]:
    """The rounds that are whole, ascending."""
    return sorted(int(path.stem) for path in record_path(store, 0).parent.glob("[0-9][0-9].json"))


def keep(store: Store, manifest: Manifest, number: int) -> None:
    """Record a round whose labels are written."""
    store.write_json(manifest.model_dump(by_alias=True), record_path(store, number))


def kept_manifest(store: Store, number: int) -> Manifest:
    """The manifest of a round that was kept."""
    return read_manifest(record_path(store, number))


def check_room(store: Store, number: int) -> None:
    """OneShotError where the disk has no room for the labels of the round after `number`.

    Each of a round's labels is written five times: predicted, as best guess, as target, and both again in force.
    """
    folder = store.round_path(number, "x").parent
    needed = 5 * sum(path.stat().st_size for path in folder.iterdir() if path.is_file())
    free = shutil.disk_usage(store.folder).free
    if free < needed:
        raise OneShotError(
            f"{store.folder}: expected {needed / 1e6:.1f} MB of free disk space for the labels of round {number + 1}, "
            f"found {free / 1e6:.1f} MB; free some and run the same command again: nothing is lost"
        )


def write_round(
    dataset: RawDataset, store: Store, case: Case, number: int, guess: LabelVolume, target: LabelVolume
) -> None:
    """Write one case's labels of a round, in force or not."""
    store.write_label(dataset, target, target_path(store, number, case.name), case)
    store.write_label(dataset, guess, store.round_path(number, case.name), case)


def put_in_force(dataset: RawDataset, store: Store, number: int, processes: int) -> Manifest:
    """Make a kept round's labels those that are trained on; repeat it after an interruption.

    Cases on which a person decided since keep their labels and records.

    Returns:
        The manifest, as it now stands in `oneshot.json`.
    """
    announce_switch(store, number)
    manifest = kept_manifest(store, number)
    then, now = manifest.cases, store.read_manifest().cases
    manifest.cases = _persons_word_kept(now, then)
    placements = [
        _placement(dataset, store, dataset.case(name), number, record, then.get(name), now.get(name))
        for name, record in manifest.cases.items()
        if record.status not in HUMAN_WORD
    ]
    for _ in over_cases(place, placements, processes=processes, title=f"labels of round {number}"):
        pass
    write_training_files(dataset, store, manifest)
    store.write_manifest(manifest)
    bring_up_to_date(store)
    (store.state_folder / _SWITCH).unlink()
    return manifest


def bring_up_to_date(store: Store) -> None:
    """Note with the round in force which cases are a model's in it since: labelled later, or a person's no longer.

    Else a fall back to the round would undo that again.
    """
    manifest = store.read_manifest()
    if not is_kept(store, manifest.round):
        return
    kept = kept_manifest(store, manifest.round)
    late = {n: now for n, now in manifest.cases.items() if _is_the_models_since(kept.cases.get(n), now)}
    if late:
        kept.cases = dict(sorted({**kept.cases, **late}.items()))
        keep(store, kept, manifest.round)


def announce_switch(store: Store, number: int) -> None:
    """Have a round that is put in force next, once it is kept, put in force after a kill too.

    Before it is kept, where its number is that of the round in force already: nothing else tells that it is not yet.
    """
    store.write_json({"to": number}, store.state_folder / _SWITCH)


def finish_switch(dataset: RawDataset, store: Store, processes: int) -> None:
    """Finish putting a round in force where a run was killed amid it."""
    if (number := switching_to(store)) is not None:
        put_in_force(dataset, store, number, processes)


def switching_to(store: Store) -> int | None:
    """The round that a run was putting in force when it was killed; None where none was, or where it is not kept."""
    path = store.state_folder / _SWITCH
    if not path.is_file():
        return None
    number: int = json.loads(path.read_text(encoding="utf-8"))["to"]
    return number if is_kept(store, number) else None


def place(placement: Placement) -> None:
    """Copy one case's labels of a round to where they are in force."""
    store, name = placement.store, placement.case.name
    guess, target = store.round_path(placement.number, name), target_path(store, placement.number, name)
    if placement.withdrawn or not target.is_file():
        # An image that was added since has no label of that round, and one whose decision was undone a person's: the
        # one that it has becomes its label there.
        copy_label(store, store.fused_path(name), guess)
        copy_label(store, store.label_path(name), target)
        return
    if placement.drawn:
        _draw_over(placement, (guess, target))
    copy_label(store, guess, store.fused_path(name))
    if not placement.left_out:
        copy_label(store, target, store.label_path(name))
        return
    shape = placement.dataset.read_label(target).shape
    nothing = np.full(shape, ignore_value(placement.dataset), np.int16)
    if placement.drawn:
        # What the round would train on is no more than that from now on, whatever it says of the case.
        store.write_label(placement.dataset, nothing := _drawn_over(placement, nothing), target, placement.case)
    store.write_label(placement.dataset, nothing, store.label_path(name), placement.case)


def _draw_over(placement: Placement, paths: tuple[Path, ...]) -> None:
    """Write the voxels that a person drew since a round was made into that round's labels."""
    for path in paths:
        label = placement.dataset.read_label(path)
        if not np.array_equal(label, drawn := _drawn_over(placement, label)):
            placement.store.write_label(placement.dataset, drawn, path, placement.case)


def _drawn_over(placement: Placement, label: LabelVolume) -> LabelVolume:
    assert placement.case.label is not None
    return placement.dataset.drawn_over(placement.dataset.read_label(placement.case.label), label)


def copy_label(store: Store, source: Path, destination: Path) -> None:
    """Copy a label atomically, with the side file that some formats have."""
    destination.parent.mkdir(parents=True, exist_ok=True)
    stem = source.name.removesuffix(store.file_ending)
    side = source.with_name(f"{stem}.json")
    with store.temporary_folder() as folder:
        for path in (side, source):
            if path.is_file():
                shutil.copyfile(path, folder / path.name)
                os.replace(folder / path.name, destination.with_name(path.name))


def _persons_word_kept(now: Mapping[str, CaseRecord], then: Mapping[str, CaseRecord]) -> dict[str, CaseRecord]:
    merged = {name: _decided(record, now.get(name, record)) for name, record in then.items()}
    return dict(sorted({**now, **merged}.items()))


def _decided(then: CaseRecord, now: CaseRecord) -> CaseRecord:
    if now.status in HUMAN_WORD or _is_withdrawn(then, now):
        return now
    if now.status == "rejected":
        # Its best guess is that round's, and so is what is known of it: a person may look again.
        return then.model_copy(update={"status": "rejected", "review": now.review})
    if now.status == "sparse" and then.status != "sparse":
        # Drawn since that round was made, whose estimate is of a label without it.
        return then.model_copy(update={"status": "sparse", "quality": None, "reason": None, "review": now.review})
    return then.model_copy(update={"review": now.review})


def _is_the_models_since(then: CaseRecord | None, now: CaseRecord) -> bool:
    if now.status in (*_DECIDED, "failed"):
        return False
    return then is None or then.status == "failed" or _is_withdrawn(then, now)


def _is_withdrawn(then: CaseRecord, now: CaseRecord) -> bool:
    """Whether a person decided on the case when a round was made, and took that back since."""
    return then.status in _DECIDED and now.status not in _DECIDED


def _placement(
    dataset: RawDataset,
    store: Store,
    case: Case,
    number: int,
    record: CaseRecord,
    then: CaseRecord | None,
    now: CaseRecord | None,
) -> Placement:
    """How a case of that record is placed, which was `then` when the round was made and is `now` in force."""
    drawn = record.status == "sparse"
    # A label that was left out is no better for what a person drew.
    left_out = record.status in LEFT_OUT or (drawn and then is not None and then.status in LEFT_OUT)
    withdrawn = then is not None and now is not None and _is_withdrawn(then, now)
    return Placement(dataset, store, case, number, left_out, drawn, withdrawn)
