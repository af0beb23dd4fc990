"""The steps that make labels by a round's models: those of the next round, and those of images that were added."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path

from nnunet_oneshot.checks import check_shapes
from nnunet_oneshot.dataset import Case
from nnunet_oneshot.parallel import processes_on
from nnunet_oneshot.refine_changes import is_added
from nnunet_oneshot.refine_training import go_to, train_lost
from nnunet_oneshot.refine_work import Work
from nnunet_oneshot.relabel import Change, Trust, cases_to_predict, label_by_model, relabel
from nnunet_oneshot.rounds import check_room, is_kept
from nnunet_oneshot.second_opinion import ask_sam2


def relabel_round(work: Work, number: int) -> Change:
    """Predict the un-annotated cases by the last model and make round `number`'s labels."""
    predictions = work.predictions(number)
    if (agreement := work.record.value(f"relabel-{number}")) is None:
        check_room(work.store, number - 1)
        # Labels that are made are but put in force, and nothing is asked of models, which may be gone since.
        trust = Trust() if is_kept(work.store, number) else _predict(work, number, predictions)
        quality = work.limits.min_quality
        change = relabel(work.raw, work.store, predictions, number, work.processes, quality, trust)
        work.said += [str(taken) for taken in change.taken_up]
        work.record.mark(f"relabel-{number}", agreement := change.agreement)
    # Probabilities are as large as all images together, and of no use once labels are made of them.
    for path in (*predictions.glob("*.npz"), *predictions.glob("*.pkl")):
        path.unlink()
    return Change(number, agreement)


def _predict(work: Work, number: int, predictions: Path) -> Trust:
    """Predict the cases whose labels round `number` makes; returns what a voxel of these needs to be trained on."""
    go_to(work, number - 1)
    train_lost(work, number - 1)
    cases = cases_to_predict(work.raw, work.store.read_manifest())
    # Before they are predicted: predictions that are there are kept, also when the image is put back.
    check_shapes(work.raw, {case.name: work.store.fused_path(case.name) for case in cases}, work.processes)
    folds, margins = work.folds_trained_on(number - 1), work.plan.min_margin > 0
    earlier = work.splits_known(number - 1)
    work.models.predict(cases, folds, predictions, probabilities=margins, earlier=earlier)
    return Trust(_second_opinion(work, cases, predictions, number), work.plan.min_margin)


def _second_opinion(work: Work, cases: Sequence[Case], predictions: Path, number: int) -> str | None:
    """The source of one more opinion, where one was asked for."""
    chosen = work.plan.self_opinion
    if chosen is None:
        return None
    processes = processes_on(work.device, work.processes_asked)
    return ask_sam2(work.raw, work.store, cases, predictions, number, chosen, work.device, processes)


def label_added(work: Work, number: int) -> None:
    """Images that were added get labels by the model of the round in force, where there is one."""
    cases = work.store.read_manifest().cases
    added = [case for case in work.raw.cases if is_added(cases[case.name])]
    if not added or not work.record.is_done(f"train-{number}"):
        return
    go_to(work, number)
    train_lost(work, number)
    predictions = work.store.state_folder / "predictions" / "added"
    shutil.rmtree(predictions, ignore_errors=True)
    work.models.predict(added, work.folds_trained_on(number), predictions)
    label_by_model(work.raw, work.store, added, predictions, number, work.processes)
