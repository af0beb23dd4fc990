"""The rounds: train on the labels in force, predict the un-annotated cases, make new labels of that, train again.

Training and prediction are nnU-Net's own. Every finished step is recorded, so that an interrupted run goes on with the
first step that is not done; each step by itself can be repeated without harm. Rounds end when labels settle, when
they go astray, or at the number asked for.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from nnunet_oneshot import nnunet
from nnunet_oneshot.errors import OneShotError
from nnunet_oneshot.nnunet import Fold
from nnunet_oneshot.opening import open_store
from nnunet_oneshot.output import check_writable
from nnunet_oneshot.postprocessing import write_postprocessing
from nnunet_oneshot.quality_gate import MIN_QUALITY, Doubt, mean_quality, needs_review
from nnunet_oneshot.refine_begin import begin, take_up_edits
from nnunet_oneshot.refine_models import Models
from nnunet_oneshot.refine_record import Plan, Record, begun_plan, make_plan
from nnunet_oneshot.refine_relabelling import relabel_round
from nnunet_oneshot.refine_training import end, train, train_further
from nnunet_oneshot.refine_work import STOP_DICE, Limits, Work
from nnunet_oneshot.relabel import Change
from nnunet_oneshot.round_quality import compare_round, is_astray
from nnunet_oneshot.rounds import kept_manifest, record_path
from nnunet_oneshot.second_opinion import AS_BEFORE, check_sam2, opinion_of, why_none
from nnunet_oneshot.store import Store
from nnunet_oneshot.training_data import preprocessed_folder
from sam2_propagation.checkpoints import check_device

__all__ = [
    "FOLDS",
    "Limits",
    "Plan",
    "Refinement",
    "check_arguments",
    "check_no_results",
    "make_plan",
    "open_store",
    "refine",
]

FOLDS: tuple[Fold, ...] = ("all",)
"""What is trained unless cases are dealt over folds: one model on all of them."""
_LEARNT_LITTLE = (
    "Mostly its model had learnt too little: train longer (another -preset) or in another configuration, on a dataset "
    "of its own (propagate -o)"
)


@dataclass
class Refinement:
    """What `refine` did.

    Attributes:
        plan: what was trained.
        model_folder: nnU-Net's folder of the final model.
        folds: the folds that make up the final model.
        changes: one entry a round, how far the labels moved.
        quality: mean estimated Dice of each round's labels, by round; None where nothing is known.
        round: the round in force.
        ended: why no more rounds were made.
        taken_up: what people changed since the last run, and what follows from it, in words.
        doubts: labels that a person should look at, worst first.
        one_piece: structures that postprocessing.pkl in the model's folder keeps the largest piece of.
    """

    plan: Plan
    model_folder: Path
    folds: tuple[Fold, ...] = FOLDS
    changes: list[Change] = field(default_factory=list)
    quality: dict[int, float | None] = field(default_factory=dict)
    round: int = 0
    ended: str = ""
    taken_up: list[str] = field(default_factory=list)
    doubts: list[Doubt] = field(default_factory=list)
    one_piece: list[str] = field(default_factory=list)


def refine(
    dataset: int | str,
    configuration: str,
    *,
    trainer: str | None = None,
    plans: str | None = None,
    rounds: int = 1,
    preset: str = "default",
    num_folds: int = 1,
    warm_start: bool | None = None,
    stop_dice: float = STOP_DICE,
    min_quality: float = MIN_QUALITY,
    all_rounds: bool = False,
    weight_by_quality: bool = False,
    self_opinion: str | None = AS_BEFORE,
    min_margin: float = 0.0,
    device: str = "cpu",
    num_processes: int | None = None,
) -> Refinement:
    """Train, predict and relabel up to `rounds` times, and train the final model on the labels then in force.

    What people changed since the last run (labels drawn or corrected, images added) is taken up first, and what
    depends on it is done again.

    Args:
        dataset: id or name of a dataset that `propagate` or `consensus` made.
        configuration: nnU-Net configuration, for example `3d_fullres`.
        trainer: trainer class; the preset's OneShotTrainer when None.
        plans: plans identifier that exists; the preset's own, made when absent, when None.
        rounds: how often labels are refreshed at most; 0 trains on the labels as they are.
        preset: default, small or tiny.
        num_folds: 1 trains one model on all cases; 2 to 5 deal the cases over as many models, and a case's new label
            comes from the one that did not train on its old label; partly drawn cases train in all of them.
        warm_start: start each round's training from the weights of the round before, by nnU-Net's
            `-pretrained_weights`: its last layers are new. Yes when None, but where it began otherwise.
        stop_dice: mean Dice between two rounds' labels from which on they have settled.
        min_quality: estimated mean Dice below which a case is left out until a round lifts it.
        all_rounds: make all rounds, whether labels settle or get worse.
        weight_by_quality: draw cases in training as often as their estimated quality says.
        self_opinion: SAM2 weights (`builtin`, ...) that give one more opinion in relabelling, prompted by the model's
            prediction; None for none, "auto" for those that labelled the images along three planes, if they did.
        min_margin: margin between the model's first two classes, 0 to 1, below which a voxel becomes ignore.
        device: cpu, cuda or mps.
        num_processes: cases preprocessed and relabelled at once; the processor count when None.

    Raises:
        OneShotError: no manifest, unknown plans, earlier results in the way, a refinement of other settings begun, a
            label changed to something that does not fit, folds that would all train on the same, no permission to
            write.
        PropagationError: a device or SAM2 weights that cannot be had.
    """
    limits = Limits(rounds, stop_dice, min_quality, all_rounds)
    check_arguments(
        configuration,
        trainer=trainer,
        rounds=rounds,
        min_quality=min_quality,
        num_folds=num_folds,
        min_margin=min_margin,
        stop_dice=stop_dice,
    )
    check_device(device)
    store, raw = open_store(dataset, grown=True)
    check_writable(store.folder, preprocessed_folder(store), nnunet.root("nnUNet_results") / store.folder.name)
    more = {
        "num_folds": num_folds,
        "warm_start": _starts_warm(store, warm_start),
        "weight_by_quality": weight_by_quality,
    }
    trust = {"self_opinion": opinion_of(store, self_opinion), "min_margin": min_margin}
    plan = make_plan(configuration, trainer, plans, preset, **more, **trust)
    if plan.self_opinion is not None:
        check_sam2(plan.self_opinion, device)
    for note in why_none(store, self_opinion):
        # At once: later it could no longer be asked.
        print(f"note: {note}", file=sys.stderr, flush=True)
    with store.lock("refine"):
        store.remove_leftovers()
        work = Work(store, raw, plan, device, num_processes, limits, plans is not None)
        work.said += [*begin(work), *take_up_edits(work)]
        if (warning := work.folds_that_see_all()) is not None:
            # At once: the summary comes after hours of training.
            print(f"warning: {warning}", file=sys.stderr, flush=True)
        return _result(work, _rounds(work))


def _starts_warm(store: Store, asked: bool | None) -> bool:
    """Whether rounds start from the weights before; what trained under another default goes on by that."""
    if asked is not None:
        return asked
    begun = begun_plan(store.folder)
    return True if begun is None or not Record(store).is_trained() else begun.warm_start


def check_no_results(dataset: str, plan: Plan) -> None:
    """OneShotError where nnU-Net's results folder holds a model that new labels of this dataset will not have made."""
    begun, models = begun_plan(nnunet.root("nnUNet_raw") / dataset), Models(dataset, plan, "cpu")
    is_ours = begun is not None and Models(dataset, begun, "cpu").folder == models.folder
    models.check_none(", or run without --overwrite to go on with that training" if is_ours else "")


def check_arguments(
    configuration: str,
    *,
    trainer: str | None = None,
    rounds: int = 1,
    min_quality: float = MIN_QUALITY,
    num_folds: int = 1,
    min_margin: float = 0.0,
    stop_dice: float = STOP_DICE,
    **others: object,
) -> None:
    """OneShotError where `refine` would refuse these arguments whatever the dataset is; others are not looked at."""
    if rounds < 0:
        raise OneShotError(f"expected -rounds to be 0 or more, found {rounds}; give a whole number")
    if not 1 <= num_folds <= 5:
        raise OneShotError(f"expected -num_folds from 1 to 5, found {num_folds}; 1 trains one model on all cases")
    if not 0 <= min_quality <= 1:
        raise OneShotError(f"expected -min_quality from 0 to 1, found {min_quality}; it is a Dice")
    if not 0 <= min_margin < 1:
        raise OneShotError(f"expected -min_margin from 0 to below 1, found {min_margin}; 0 asks for none")
    if not 0 < stop_dice <= 1:
        raise OneShotError(f"expected -stop_dice above 0 and up to 1, found {stop_dice}; it is a Dice")
    if "cascade" in configuration:
        raise OneShotError(
            f"expected a configuration of one stage (2d, 3d_fullres, 3d_lowres), found {configuration}; train the "
            "cascade by nnU-Net's own commands on the labels in force"
        )
    if trainer is not None:
        nnunet.check_trainer_name(trainer)


def _rounds(work: Work) -> str:
    """Train and relabel until it is enough; returns why it was."""
    for number in range(work.limits.rounds):
        train(work, number)
        change = relabel_round(work, number + 1)
        if work.limits.all_rounds:
            continue
        if (worse := _worse(work, change)) is not None:
            train_further(work, number)
            end(work, number)
            further = work.record.is_done(f"further-{number}")
            more = ", its model trained once more on those labels" if further else ""
            return f"{worse}: round {number} is in force again{more}. {_LEARNT_LITTLE}"
        if change.mean >= work.limits.stop_dice:
            end(work, number + 1)
            return f"labels settled: Dice {change.mean:.3f} between rounds {number} and {number + 1}"
    end(work, work.limits.rounds)
    return f"{work.limits.rounds} rounds were asked for"


def _worse(work: Work, change: Change) -> str | None:
    """In words, where a round's labels went astray from those before; None where they did not."""
    step = f"quality-{change.number}"
    found = work.record.value(step)
    if found is None or "before" in found:
        # Older records hold another comparison. What people decide later about the labels before changes nothing.
        found = compare_round(change.agreement, kept_manifest(work.store, change.number - 1).cases)
        work.record.mark(step, found)
    if not is_astray(found, work.limits.stop_dice):
        return None
    return (
        f"labels moved by {found['moved']:.3f} in round {change.number} (one less their Dice with those before), "
        f"which were estimated to be wrong by {found['error']:.3f}"
    )


def _result(work: Work, ended: str) -> Refinement:
    """What was done, from the records."""
    changes = list(_changes(work))
    manifest = work.store.read_manifest()
    return Refinement(
        work.plan,
        work.models.folder,
        work.plan.folds,
        changes,
        {number: _quality(work, number) for number in (0, *(c.number for c in changes))},
        manifest.round,
        ended,
        work.said,
        needs_review(manifest, work.raw.class_names),
        write_postprocessing(work.raw, work.models.folder),
    )


def _changes(work: Work) -> Iterator[Change]:
    for step, value in work.record.steps().items():
        if step.startswith("relabel-"):
            yield Change(int(step.split("-")[1]), value)


def _quality(work: Work, number: int) -> float | None:
    path = record_path(work.store, number)
    return mean_quality(kept_manifest(work.store, number)) if path.is_file() else None
