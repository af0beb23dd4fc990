"""The steps before any training: whether this refinement may run here, and what people changed since the last run."""

from __future__ import annotations

from nnunet_oneshot import nnunet
from nnunet_oneshot.errors import OneShotError
from nnunet_oneshot.first_round import take_over
from nnunet_oneshot.refine_changes import check_no_edit_amid_switch, take_up
from nnunet_oneshot.refine_models import Models
from nnunet_oneshot.refine_relabelling import label_added
from nnunet_oneshot.refine_training import forget, training_again
from nnunet_oneshot.refine_work import Work
from nnunet_oneshot.rounds import bring_up_to_date, finish_switch, keep, kept_manifest, kept_rounds
from nnunet_oneshot.store import DRAWN
from nnunet_oneshot.training_data import write_training_files


def begin(work: Work) -> list[str]:
    """Check that this refinement may run here, record what it is, and bring the labels to a known state."""
    if work.plans_given or nnunet.plans_file(work.name, work.plan.plans).is_file():
        nnunet.check_configuration(work.name, work.plan.plans, work.plan.configuration)
    if {case.name for case in work.raw.cases} == {*work.store.read_manifest().cases}:
        # Before anything is moved or noted; of what people drew or added since it is said when that is taken up.
        _check_folds(work)
    begun = work.record.begun()
    if begun is not None and begun != work.plan and not work.record.is_trained():
        # A training that never ended leaves a folder, which the one that is asked for now must not go on from.
        Models(work.name, begun, work.device).set_aside_superseded(0, work.record.in_place())
        begun = None
    if begun is None:
        work.models.check_none()
    work.record.begin(work.plan)
    check_no_edit_amid_switch(work.raw, work.store)
    finish_switch(work.raw, work.store, work.processes)
    return [str(t) for t in take_over(work.raw, work.store, work.processes, work.limits.min_quality)]


def take_up_edits(work: Work) -> list[str]:
    """Take up what people changed; forgets what was made of labels that are no longer in force."""
    taken = take_up(work.raw, work.store, work.processes)
    # Only now it is known which cases a person drew on since.
    _check_folds(work)
    _adopt_plan(work)
    number = work.store.read_manifest().round
    said = [str(change) for change in taken]
    label_added(work, number)
    bring_up_to_date(work.store)
    if changed := work.changed_labels(number):
        said.append(training_again(changed, number))
    elif not work.record.is_done(f"train-{number}") and work.folds_trained_on(number) != work.folds_now():
        said.append(f"cases were dealt over the folds anew amid training on round {number}: training it again")
    else:
        return said
    forget(work, number)
    return said


def _check_folds(work: Work) -> None:
    """OneShotError where every fold would train on all cases, so that no new label would be out of fold."""
    statuses, folds = {record.status for record in work.store.read_manifest().cases.values()}, work.plan.num_folds
    # What trained already goes on: people may have drawn on the last un-annotated case since.
    trained = work.record.begun() is not None and work.record.is_trained()
    if folds == 1 or "sparse" not in statuses or not statuses <= set(DRAWN) or trained:
        return
    raise OneShotError(
        f"expected -num_folds {folds} to hold un-annotated cases out of training, found slices drawn in every "
        "case, and cases that a person drew on train in every fold, so that all models would see the same; "
        "leave -num_folds out"
    )


def _adopt_plan(work: Work) -> None:
    """What nnU-Net and the trainer must know of the plan goes into the manifest and into every round's.

    The one in force comes last: as long as it differs, a killed run does all of it again.
    """
    manifest = work.store.read_manifest()
    folds = work.plan.num_folds if work.plan.num_folds > 1 else manifest.num_folds
    if (manifest.num_folds, manifest.weight_by_quality) == (folds, work.plan.weight_by_quality):
        return
    adopted = {"num_folds": folds, "weight_by_quality": work.plan.weight_by_quality}
    for number in kept_rounds(work.store):
        keep(work.store, kept_manifest(work.store, number).model_copy(update=adopted), number)
    manifest = manifest.model_copy(update=adopted)
    write_training_files(work.raw, work.store, manifest)
    work.store.write_manifest(manifest)
