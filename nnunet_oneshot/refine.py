"""The rounds: train on the labels in force, predict the un-annotated cases, make new labels of that, train again.

Training and prediction are nnU-Net's own. Every finished step is recorded, so that an interrupted run goes on with the
first step that is not done; each step by itself can be repeated without harm. Rounds end when labels settle, when
they go astray, or at the number asked for.
"""

from __future__ import annotations

import shutil
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from nnunet_oneshot import nnunet
from nnunet_oneshot.checks import check_shapes
from nnunet_oneshot.dataset import Case, RawDataset, find_raw_folder, open_source
from nnunet_oneshot.errors import OneShotError
from nnunet_oneshot.first_round import take_over
from nnunet_oneshot.nnunet import Fold
from nnunet_oneshot.output import check_writable
from nnunet_oneshot.parallel import default_processes, processes_on
from nnunet_oneshot.postprocessing import FILE as POSTPROCESSING
from nnunet_oneshot.postprocessing import write_postprocessing
from nnunet_oneshot.quality_gate import MIN_QUALITY, Doubt, mean_quality, needs_review
from nnunet_oneshot.refine_changes import check_no_edit_amid_switch, is_added, take_up
from nnunet_oneshot.refine_models import Models, knows_held_out
from nnunet_oneshot.refine_record import (
    Plan,
    Record,
    Splits,
    begun_plan,
    changed_labels,
    label_hashes,
    make_plan,
    voxel_hashes,
)
from nnunet_oneshot.refresh import note_preprocessed, raw_label_hashes, refresh
from nnunet_oneshot.relabel import Change, Trust, cases_to_predict, label_by_model, relabel
from nnunet_oneshot.round_quality import compare_round, is_astray
from nnunet_oneshot.rounds import (
    bring_up_to_date,
    check_room,
    finish_switch,
    is_kept,
    keep,
    kept_manifest,
    kept_rounds,
    put_in_force,
    record_path,
)
from nnunet_oneshot.second_opinion import AS_BEFORE, ask_sam2, check_sam2, forget_opinions, opinion_of, why_none
from nnunet_oneshot.settings import PRESETS
from nnunet_oneshot.store import DRAWN, Store, read_manifest
from nnunet_oneshot.training_data import check_labels, preprocessed_folder, splits, write_training_files
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
STOP_DICE = 0.95
"""Mean Dice between two rounds' labels from which on they have settled. The label before has a voice in the new one, so
that they agree more than what was said in them does."""
_LEARNT_LITTLE = (
    "Mostly its model had learnt too little: train longer (another -preset) or in another configuration, on a dataset "
    "of its own (propagate -o)"
)


@dataclass(frozen=True)
class Limits:
    """When rounds end and which labels are trusted; these may differ from one run to the next.

    Attributes:
        rounds: how often labels are refreshed at most; 0 trains on the labels as they are.
        stop_dice: mean Dice between two rounds' labels from which on they have settled.
        min_quality: estimated mean Dice below which a case is left out of training, in rounds made from then on.
        all_rounds: make all of them, whether labels settle or get worse.
    """

    rounds: int = 1
    stop_dice: float = STOP_DICE
    min_quality: float = MIN_QUALITY
    all_rounds: bool = False


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
        work = _Work(store, raw, plan, device, num_processes, limits, plans is not None)
        work.said += [*work.begin(), *work.take_up()]
        if (warning := work.folds_that_see_all()) is not None:
            # At once: the summary comes after hours of training.
            print(f"warning: {warning}", file=sys.stderr, flush=True)
        return work.result(work.rounds())


def _starts_warm(store: Store, asked: bool | None) -> bool:
    """Whether rounds start from the weights before; what trained under another default goes on by that."""
    if asked is not None:
        return asked
    begun = begun_plan(store.folder)
    return True if begun is None or not Record(store).is_trained() else begun.warm_start


def _again(changed: Sequence[str], number: int) -> str:
    return f"labels of {len(changed)} cases changed since round {number} was trained on: training it again"


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


def open_store(dataset: int | str, grown: bool = False) -> tuple[Store, RawDataset]:
    """A pseudo-label dataset's store and the raw dataset that holds its images.

    Args:
        dataset: id or name.
        grown: accept images that were added since.

    Raises:
        OneShotError: no such dataset, no manifest, or cases or label values that the source dataset no longer has.
    """
    folder = find_raw_folder(dataset)
    manifest = read_manifest(folder / "oneshot.json")
    raw = open_source(manifest.source_dataset, folder)
    check_labels(raw, folder)
    names, before = {c.name for c in raw.cases}, set(manifest.cases)
    gone, added = sorted(before - names), sorted(names - before)
    if gone or (added and not grown):
        found = f"no images of {_first_of(gone)}" if gone else f"{_first_of(added)} beside them"
        raise OneShotError(
            f"{folder.name}: expected the cases of {raw.name} to be those it was made of, found {found}; "
            f"{'put back those that are gone' if gone else 'refine'} or propagate again with --overwrite"
        )
    return Store(folder, raw.file_ending), raw


def _first_of(cases: Sequence[str]) -> str:
    return cases[0] if len(cases) == 1 else f"{cases[0]} and {len(cases) - 1} more"


@dataclass
class _Work:
    """The steps of one refinement."""

    store: Store
    raw: RawDataset
    plan: Plan
    device: str
    processes_asked: int | None
    limits: Limits
    plans_given: bool
    said: list[str] = field(default_factory=list)
    """What a person should know of this run, in words."""

    @property
    def processes(self) -> int:
        return self.processes_asked or default_processes()

    @property
    def name(self) -> str:
        return self.store.folder.name

    @property
    def record(self) -> Record:
        return Record(self.store)

    @property
    def models(self) -> Models:
        return Models(self.name, self.plan, self.device)

    def begin(self) -> list[str]:
        """Check that this refinement may run here, record what it is, and bring the labels to a known state."""
        if self.plans_given or nnunet.plans_file(self.name, self.plan.plans).is_file():
            nnunet.check_configuration(self.name, self.plan.plans, self.plan.configuration)
        begun = self.record.begun()
        if begun is not None and begun != self.plan and not self.record.is_trained():
            # A training that never ended leaves a folder, which the one that is asked for now must not go on from.
            Models(self.name, begun, self.device).set_aside_superseded(0, self.record.in_place())
            begun = None
        if begun is None:
            self.models.check_none()
        self.record.begin(self.plan)
        check_no_edit_amid_switch(self.raw, self.store)
        finish_switch(self.raw, self.store, self.processes)
        return [str(t) for t in take_over(self.raw, self.store, self.processes, self.limits.min_quality)]

    def take_up(self) -> list[str]:
        """Take up what people changed; forgets what was made of labels that are no longer in force."""
        taken = take_up(self.raw, self.store, self.processes)
        # Only now it is known which cases a person drew on; a plan that is refused for that must leave no trace.
        self._check_folds()
        self._adopt_plan()
        number = self.store.read_manifest().round
        said = [str(change) for change in taken]
        self._label_added(number)
        bring_up_to_date(self.store)
        if changed := self._changed_labels(number):
            said.append(_again(changed, number))
        elif not self.record.is_done(f"train-{number}") and self._folds_trained_on(number) != self._folds_now():
            said.append(f"cases were dealt over the folds anew amid training on round {number}: training it again")
        else:
            return said
        self._forget(number)
        return said

    def folds_that_see_all(self) -> str | None:
        """In words, which new labels are not out of fold, as was asked for; None where all are, or nobody asked."""
        cases, folds = self.store.read_manifest().cases, self.plan.num_folds
        partly = [name for name, record in cases.items() if record.status == "sparse"]
        if folds == 1 or not partly:
            return None
        named = f"{', '.join(partly[:3])}{', ...' if len(partly) > 3 else ''}"
        return (
            f"{len(partly)} partly drawn cases ({named}) train in every fold, for what was drawn there: their new "
            f"labels come from all {folds} models and are not out of fold"
        )

    def _check_folds(self) -> None:
        """OneShotError where every fold would train on all cases, so that no new label would be out of fold."""
        statuses, folds = {record.status for record in self.store.read_manifest().cases.values()}, self.plan.num_folds
        # What trained already goes on: people may have drawn on the last un-annotated case since.
        if folds == 1 or "sparse" not in statuses or not statuses <= set(DRAWN) or self.record.is_trained():
            return
        raise OneShotError(
            f"expected -num_folds {folds} to hold un-annotated cases out of training, found slices drawn in every "
            "case, and cases that a person drew on train in every fold, so that all models would see the same; "
            "leave -num_folds out"
        )

    def rounds(self) -> str:
        """Train and relabel until it is enough; returns why it was."""
        for number in range(self.limits.rounds):
            self.train(number)
            change = self.relabel(number + 1)
            if self.limits.all_rounds:
                continue
            if (worse := self._worse(change)) is not None:
                self._train_further(number)
                self.end(number)
                further = self.record.is_done(f"further-{number}")
                more = ", its model trained once more on those labels" if further else ""
                return f"{worse}: round {number} is in force again{more}. {_LEARNT_LITTLE}"
            if change.mean >= self.limits.stop_dice:
                self.end(number + 1)
                return f"labels settled: Dice {change.mean:.3f} between rounds {number} and {number + 1}"
        self.end(self.limits.rounds)
        return f"{self.limits.rounds} rounds were asked for"

    def train(self, number: int) -> bool:
        """Train on the labels of round `number`; the models of other rounds are kept aside.

        Returns:
            Whether its models may know other labels than lay there when this was called: they were trained before, or
            labels changed while they were preprocessed.
        """
        if self.record.is_done(f"train-{number}"):
            return True
        self._go_to(number)
        # It is written anew when the final model is there.
        (self.models.folder / POSTPROCESSING).unlink(missing_ok=True)
        # What nnU-Net derived may have been removed, and with it how cases are dealt over the folds.
        write_training_files(self.raw, self.store, self.store.read_manifest())
        self._preprocess()
        # Before they are read: what a person edits meanwhile must not count as trained on.
        cases = list(self.store.read_manifest().cases)
        labels = label_hashes(self.store, cases)
        voxels = voxel_hashes(self.raw, self.store, cases, self.processes)
        refresh(self.name, self.processes)
        self.record.note_labels(number, labels, self._folds_now(), voxels)
        changed = bool(self._changed_labels(number))
        if self.record.is_done(f"further-{number}"):
            self.models.set_aside_first(number)
        self.models.train(self._start(number))
        self.record.mark(f"train-{number}")
        return changed

    def _train_further(self, number: int) -> None:
        """Have the models of round `number` trained once more on its labels, from their own weights; once.

        In place of the training on the round after it, whose labels went astray. Networks that learnt too little gain
        more by it than they would lose by worse labels.
        """
        if self.record.is_done(f"further-{number}"):
            return
        self._go_to(number)
        if self._knows_other_labels(number):
            # `end` sees to labels that changed.
            return
        self.record.begin_further(number)

    def _start(self, number: int) -> Path | None:
        """Folder of the models that the training on round `number` starts from; what keeps it from that is said."""
        if self.record.is_done(f"further-{number}"):
            if self.models.are_in(self.models.first(number)):
                return self.models.first(number)
            self.said.append(f"models of round {number}'s first training are gone: it was trained from new weights")
            return None
        if not self.plan.warm_start or number == 0:
            return None
        known, now = self._splits_known(number - 1), self._folds_now()
        if now is not None and (not known or any(knows_held_out(before, now) for before in known)):
            # A fold's weights have seen cases that are its own to relabel now, and would say what they were taught.
            self.said.append(f"cases were dealt over the folds anew: round {number} was trained from new weights")
            return None
        if not self.models.are_in(self.models.kept(number - 1)):
            self.said.append(f"models of round {number - 1} are gone: round {number} was trained from new weights")
            return None
        return self.models.kept(number - 1)

    def end(self, number: int) -> None:
        """Leave the labels of round `number` in force, and the models that were trained on them in place."""
        may_know_others = self.train(number)
        self._go_to(number)
        if may_know_others and self._changed_labels(number):
            # Before the models are moved: labels that do not fit are refused while these stand.
            self.said += (taken := [str(change) for change in take_up(self.raw, self.store, self.processes)])
            # What a person decided while another round was in force holds in this one too.
            if changed := self._changed_labels(number):
                self.said += [_again(changed, number)] if taken else []
                self._forget(number)
                self.train(number)
        self._train_lost(number)
        self.models.check_trained()
        if changed := self._changed_labels(number):
            # Trained again at once, whoever edits one label after the other would get no model at all.
            named = f"{', '.join(changed[:3])}{', ...' if len(changed) > 3 else ''}"
            self.said.append(
                f"labels of {len(changed)} cases ({named}) changed while round {number} was trained on, so that its "
                "models do not know them: refine again to take them up"
            )

    def _train_lost(self, number: int) -> None:
        """Train round `number` again where models of it, which are to be in place, were removed or moved since."""
        if self.models.are_in(self.models.folder):
            return
        self.said.append(f"models of round {number} are gone: they were trained again")
        if not self.record.is_done(f"relabel-{number + 1}"):
            # Other models say something else; labels that were made of what these said stand.
            shutil.rmtree(self._predictions(number + 1), ignore_errors=True)
            forget_opinions(self.store, number)
        if self._knows_other_labels(number):
            self._forget(number)
        self.record.forget_training(number)
        self.train(number)

    def _knows_other_labels(self, number: int) -> bool:
        """Whether models of round `number` know other labels than are in force, or cases that are no longer theirs."""
        return bool(self._changed_labels(number)) or self._folds_trained_on(number) != self._folds_now()

    def relabel(self, number: int) -> Change:
        """Predict the un-annotated cases by the last model and make round `number`'s labels."""
        predictions = self._predictions(number)
        if (agreement := self.record.value(f"relabel-{number}")) is None:
            check_room(self.store, number - 1)
            # Labels that are made are but put in force, and nothing is asked of models, which may be gone since.
            trust = Trust() if is_kept(self.store, number) else self._predict(number, predictions)
            quality = self.limits.min_quality
            change = relabel(self.raw, self.store, predictions, number, self.processes, quality, trust)
            self.said += [str(taken) for taken in change.taken_up]
            self.record.mark(f"relabel-{number}", agreement := change.agreement)
        # Probabilities are as large as all images together, and of no use once labels are made of them.
        for path in (*predictions.glob("*.npz"), *predictions.glob("*.pkl")):
            path.unlink()
        return Change(number, agreement)

    def _predict(self, number: int, predictions: Path) -> Trust:
        """Predict the cases whose labels round `number` makes; returns what a voxel of these needs to be trained on."""
        self._go_to(number - 1)
        self._train_lost(number - 1)
        cases = cases_to_predict(self.raw, self.store.read_manifest())
        # Before they are predicted: predictions that are there are kept, also when the image is put back.
        check_shapes(self.raw, {case.name: self.store.fused_path(case.name) for case in cases}, self.processes)
        folds, margins = self._folds_trained_on(number - 1), self.plan.min_margin > 0
        earlier = self._splits_known(number - 1)
        self.models.predict(cases, folds, predictions, probabilities=margins, earlier=earlier)
        return Trust(self._second_opinion(cases, predictions, number), self.plan.min_margin)

    def result(self, ended: str) -> Refinement:
        """What was done, from the records."""
        changes = list(self._changes())
        manifest = self.store.read_manifest()
        return Refinement(
            self.plan,
            self.models.folder,
            self.plan.folds,
            changes,
            {number: self._quality(number) for number in (0, *(c.number for c in changes))},
            manifest.round,
            ended,
            self.said,
            needs_review(manifest, self.raw.class_names),
            write_postprocessing(self.raw, self.models.folder),
        )

    def _changes(self) -> Iterator[Change]:
        for step, value in self.record.steps().items():
            if step.startswith("relabel-"):
                yield Change(int(step.split("-")[1]), value)

    def _quality(self, number: int) -> float | None:
        path = record_path(self.store, number)
        return mean_quality(kept_manifest(self.store, number)) if path.is_file() else None

    def _worse(self, change: Change) -> str | None:
        """In words, where a round's labels went astray from those before; None where they did not."""
        step = f"quality-{change.number}"
        found = self.record.value(step)
        if found is None or "before" in found:
            # Older records hold another comparison. What people decide later about the labels before changes nothing.
            found = compare_round(change.agreement, kept_manifest(self.store, change.number - 1).cases)
            self.record.mark(step, found)
        if not is_astray(found, self.limits.stop_dice):
            return None
        return (
            f"labels moved by {found['moved']:.3f} in round {change.number} (one less their Dice with those before), "
            f"which were estimated to be wrong by {found['error']:.3f}"
        )

    def _go_to(self, number: int) -> None:
        """Put the labels of round `number` in force and its models, if there are any yet, in place.

        An earlier run may have ended at another round, by other limits.
        """
        if self.store.read_manifest().round != number:
            self.said += [str(taken) for taken in take_up(self.raw, self.store, self.processes)]
            put_in_force(self.raw, self.store, number, self.processes)
        if (before := self.record.in_place()) == number:
            # A kill amid setting them aside for another round leaves some there.
            self.models.bring_back(number)
            return
        if before is not None:
            self.models.keep_aside(before)
            # Noted before others come: after a kill these would be taken for those of the round before.
            self.record.note_in_place(None)
        self.models.bring_back(number)
        self.record.note_in_place(number)

    def _changed_labels(self, number: int) -> list[str]:
        return changed_labels(self.raw, self.store, number, self.processes)

    def _folds_now(self) -> Splits | None:
        """How folds split the cases by the manifest; None where one model trains on all."""
        return splits(self.store.read_manifest(), self.plan.num_folds) if self.plan.num_folds > 1 else None

    def _folds_trained_on(self, number: int) -> Splits | None:
        """How folds split the cases when round `number` was trained on; older records do not tell."""
        noted = self.record.splits(number)
        return self._folds_now() if noted is None else noted

    def _splits_known(self, number: int) -> list[Splits]:
        """How cases were split in the trainings that made the weights of round `number`, latest first.

        Empty where one model trains on all, or where an older record does not tell.
        """
        own = self.record.splits(number)
        if own is None:
            return []
        before = self._splits_known(number - 1) if self.plan.warm_start and number > 0 else []
        return [own] if any(knows_held_out(earlier, own) for earlier in before) else [own, *before]

    def _predictions(self, number: int) -> Path:
        return self.store.state_folder / "predictions" / f"{number:02d}"

    def _adopt_plan(self) -> None:
        """What nnU-Net and the trainer must know of the plan goes into the manifest and into every round's.

        The one in force comes last: as long as it differs, a killed run does all of it again.
        """
        manifest = self.store.read_manifest()
        folds = self.plan.num_folds if self.plan.num_folds > 1 else manifest.num_folds
        if (manifest.num_folds, manifest.weight_by_quality) == (folds, self.plan.weight_by_quality):
            return
        adopted = {"num_folds": folds, "weight_by_quality": self.plan.weight_by_quality}
        for number in kept_rounds(self.store):
            keep(self.store, kept_manifest(self.store, number).model_copy(update=adopted), number)
        manifest = manifest.model_copy(update=adopted)
        write_training_files(self.raw, self.store, manifest)
        self.store.write_manifest(manifest)

    def _preprocess(self) -> None:
        """Full preprocessing where there is none; a refresh then sees to what changed since."""
        plan, arguments = self.plan, ([self.plan.configuration], self.processes_asked)
        there = nnunet.plans_file(self.name, plan.plans).is_file()
        there = there and nnunet.preprocessed_folder(self.name, plan.plans, plan.configuration).is_dir()
        if not (self.record.is_done("preprocess") and there):
            if not nnunet.is_preprocessed(self.name, plan.plans, plan.configuration):
                labels = raw_label_hashes(self.name)
                cases = self.store.read_manifest().cases
                check_shapes(self.raw, {name: self.store.label_path(name) for name in cases}, self.processes)
                if self.plans_given:
                    nnunet.preprocess(self.name, plan.plans, *arguments, overwrite=True)
                else:
                    nnunet.plan_and_preprocess(self.name, PRESETS[plan.preset], *arguments, overwrite=True)
                note_preprocessed(self.name, plan.plans, [plan.configuration], labels)
            self.record.mark("preprocess")

    def _second_opinion(self, cases: Sequence[Case], predictions: Path, number: int) -> str | None:
        """The source of one more opinion, where one was asked for."""
        chosen = self.plan.self_opinion
        if chosen is None:
            return None
        processes = processes_on(self.device, self.processes_asked)
        return ask_sam2(self.raw, self.store, cases, predictions, number, chosen, self.device, processes)

    def _label_added(self, number: int) -> None:
        """Images that were added get labels by the model of the round in force, where there is one."""
        cases = self.store.read_manifest().cases
        added = [case for case in self.raw.cases if is_added(cases[case.name])]
        if not added or not self.record.is_done(f"train-{number}"):
            return
        self._go_to(number)
        self._train_lost(number)
        predictions = self.store.state_folder / "predictions" / "added"
        shutil.rmtree(predictions, ignore_errors=True)
        self.models.predict(added, self._folds_trained_on(number), predictions)
        label_by_model(self.raw, self.store, added, predictions, number, self.processes)

    def _forget(self, number: int) -> None:
        """Round `number` is to be trained on again, and nothing that came of its models counts any longer."""
        self.models.set_aside_superseded(number, before := self.record.in_place())
        if before is not None and before >= number:
            self.record.note_in_place(None)
        for folder in sorted((self.store.state_folder / "predictions").glob("[0-9][0-9]")):
            if int(folder.name) > number:
                shutil.rmtree(folder)
        forget_opinions(self.store, number)
        for later in kept_rounds(self.store):
            if later > number:
                record_path(self.store, later).unlink()
        self.record.forget_from(number)
