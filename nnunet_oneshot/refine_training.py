"""The steps that train: which round's models lie in place, what a training starts from, and when it is done again."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path

from nnunet_oneshot import nnunet
from nnunet_oneshot.checks import check_shapes
from nnunet_oneshot.postprocessing import FILE as POSTPROCESSING
from nnunet_oneshot.refine_changes import take_up
from nnunet_oneshot.refine_models import knows_held_out
from nnunet_oneshot.refine_record import label_hashes, voxel_hashes
from nnunet_oneshot.refine_work import Work
from nnunet_oneshot.refresh import note_preprocessed, raw_label_hashes, refresh
from nnunet_oneshot.rounds import kept_rounds, put_in_force, record_path
from nnunet_oneshot.second_opinion import forget_opinions
from nnunet_oneshot.settings import PRESETS
from nnunet_oneshot.training_data import write_training_files


def train(work: Work, number: int) -> bool:
    """Train on the labels of round `number`; the models of other rounds are kept aside.

    Returns:
        Whether its models may know other labels than lay there when this was called: they were trained before, or
        labels changed while they were preprocessed.
    """
    if work.record.is_done(f"train-{number}"):
        return True
    go_to(work, number)
    # It is written anew when the final model is there.
    (work.models.folder / POSTPROCESSING).unlink(missing_ok=True)
    # What nnU-Net derived may have been removed, and with it how cases are dealt over the folds.
    write_training_files(work.raw, work.store, work.store.read_manifest())
    _preprocess(work)
    # Before they are read: what a person edits meanwhile must not count as trained on.
    cases = list(work.store.read_manifest().cases)
    labels = label_hashes(work.store, cases)
    voxels = voxel_hashes(work.raw, work.store, cases, work.processes)
    refresh(work.name, work.processes)
    work.record.note_labels(number, labels, work.folds_now(), voxels)
    changed = bool(work.changed_labels(number))
    if work.record.is_done(f"further-{number}"):
        work.models.set_aside_first(number)
    work.models.train(_start(work, number))
    work.record.mark(f"train-{number}")
    return changed


def _preprocess(work: Work) -> None:
    """Full preprocessing where there is none; a refresh then sees to what changed since."""
    plan, arguments = work.plan, ([work.plan.configuration], work.processes_asked)
    there = nnunet.plans_file(work.name, plan.plans).is_file()
    there = there and nnunet.preprocessed_folder(work.name, plan.plans, plan.configuration).is_dir()
    if not (work.record.is_done("preprocess") and there):
        if not nnunet.is_preprocessed(work.name, plan.plans, plan.configuration):
            labels = raw_label_hashes(work.name)
            cases = work.store.read_manifest().cases
            check_shapes(work.raw, {name: work.store.label_path(name) for name in cases}, work.processes)
            if work.plans_given:
                nnunet.preprocess(work.name, plan.plans, *arguments, overwrite=True)
            else:
                nnunet.plan_and_preprocess(work.name, PRESETS[plan.preset], *arguments, overwrite=True)
            note_preprocessed(work.name, plan.plans, [plan.configuration], labels)
        work.record.mark("preprocess")


def _start(work: Work, number: int) -> Path | None:
    """Folder of the models that the training on round `number` starts from; what keeps it from that is said."""
    if work.record.is_done(f"further-{number}"):
        if work.models.are_in(work.models.first(number)):
            return work.models.first(number)
        work.said.append(f"models of round {number}'s first training are gone: it was trained from new weights")
        return None
    if not work.plan.warm_start or number == 0:
        return None
    known, now = work.splits_known(number - 1), work.folds_now()
    if now is not None and (not known or any(knows_held_out(before, now) for before in known)):
        # A fold's weights have seen cases that are its own to relabel now, and would say what they were taught.
        work.said.append(f"cases were dealt over the folds anew: round {number} was trained from new weights")
        return None
    if not work.models.are_in(work.models.kept(number - 1)):
        work.said.append(f"models of round {number - 1} are gone: round {number} was trained from new weights")
        return None
    return work.models.kept(number - 1)


def train_further(work: Work, number: int) -> None:
    """Have the models of round `number` trained once more on its labels, from their own weights; once.

    In place of the training on the round after it, whose labels went astray. Networks that learnt too little gain
    more by it than they would lose by worse labels.
    """
    if work.record.is_done(f"further-{number}"):
        return
    go_to(work, number)
    if work.knows_other_labels(number):
        # `end` sees to labels that changed.
        return
    work.record.begin_further(number)


def end(work: Work, number: int) -> None:
    """Leave the labels of round `number` in force, and the models that were trained on them in place."""
    may_know_others = train(work, number)
    go_to(work, number)
    if may_know_others and work.changed_labels(number):
        # Before the models are moved: labels that do not fit are refused while these stand.
        work.said += (taken := [str(change) for change in take_up(work.raw, work.store, work.processes)])
        # What a person decided while another round was in force holds in this one too.
        if changed := work.changed_labels(number):
            work.said += [training_again(changed, number)] if taken else []
            forget(work, number)
            train(work, number)
    train_lost(work, number)
    work.models.check_trained()
    if changed := work.changed_labels(number):
        # Trained again at once, whoever edits one label after the other would get no model at all.
        named = f"{', '.join(changed[:3])}{', ...' if len(changed) > 3 else ''}"
        work.said.append(
            f"labels of {len(changed)} cases ({named}) changed while round {number} was trained on, so that its "
            "models do not know them: refine again to take them up"
        )


def train_lost(work: Work, number: int) -> None:
    """Train round `number` again where models of it, which are to be in place, were removed or moved since."""
    if work.models.are_in(work.models.folder):
        return
    work.said.append(f"models of round {number} are gone: they were trained again")
    if not work.record.is_done(f"relabel-{number + 1}"):
        # Other models say something else; labels that were made of what these said stand.
        shutil.rmtree(work.predictions(number + 1), ignore_errors=True)
        forget_opinions(work.store, number)
    if work.knows_other_labels(number):
        forget(work, number)
    work.record.forget_training(number)
    train(work, number)


def go_to(work: Work, number: int) -> None:
    """Put the labels of round `number` in force and its models, if there are any yet, in place.

    An earlier run may have ended at another round, by other limits.
    """
    if work.store.read_manifest().round != number:
        work.said += [str(taken) for taken in take_up(work.raw, work.store, work.processes)]
        put_in_force(work.raw, work.store, number, work.processes)
    if (before := work.record.in_place()) == number:
        # A kill amid setting them aside for another round leaves some there.
        work.models.bring_back(number)
        return
    if before is not None:
        work.models.keep_aside(before)
        # Noted before others come: after a kill these would be taken for those of the round before.
        work.record.note_in_place(None)
    work.models.bring_back(number)
    work.record.note_in_place(number)


def forget(work: Work, number: int) -> None:
    """Round `number` is to be trained on again, and nothing that came of its models counts any longer."""
    work.models.set_aside_superseded(number, before := work.record.in_place())
    if before is not None and before >= number:
        work.record.note_in_place(None)
    for folder in sorted((work.store.state_folder / "predictions").glob("[0-9][0-9]")):
        if int(folder.name) > number:
            shutil.rmtree(folder)
    forget_opinions(work.store, number)
    for later in kept_rounds(work.store):
        if later > number:
            record_path(work.store, later).unlink()
    work.record.forget_from(number)


def training_again(changed: Sequence[str], number: int) -> str:
    """In words, that labels changed since a round was trained on, and what follows from it."""
    return f"labels of {len(changed)} cases changed since round {number} was trained on: training it again"
