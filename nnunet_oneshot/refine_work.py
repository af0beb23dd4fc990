"""The state of one refinement and what can be asked of it; nothing here changes a file."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from nnunet_oneshot.dataset import RawDataset
from nnunet_oneshot.parallel import default_processes
from nnunet_oneshot.quality_gate import MIN_QUALITY
from nnunet_oneshot.refine_models import Models, knows_held_out
from nnunet_oneshot.refine_record import Plan, Record, Splits, changed_labels
from nnunet_oneshot.store import Store
from nnunet_oneshot.training_data import splits

STOP_DICE = 0.95
"""Mean Dice between two rounds' labels from which on they have settled. The label before has a voice in the new one, so
that they agree more than what was said in them does."""


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
class Work:
    """One refinement: what was asked for, where it lies, and what its records tell.

    The steps that change something are functions of it in the modules beside this one.
    """

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
        """Cases worked on at once."""
        return self.processes_asked or default_processes()

    @property
    def name(self) -> str:
        """The dataset's, `DatasetNNN_Name`."""
        return self.store.folder.name

    @property
    def record(self) -> Record:
        """The steps that are done."""
        return Record(self.store)

    @property
    def models(self) -> Models:
        """What is trained, of all rounds."""
        return Models(self.name, self.plan, self.device)

    def changed_labels(self, number: int) -> list[str]:
        """Cases whose label is another one than the training on round `number` began with."""
        return changed_labels(self.raw, self.store, number, self.processes)

    def folds_now(self) -> Splits | None:
        """How folds split the cases by the manifest; None where one model trains on all."""
        return splits(self.store.read_manifest(), self.plan.num_folds) if self.plan.num_folds > 1 else None

    def folds_trained_on(self, number: int) -> Splits | None:
        """How folds split the cases when round `number` was trained on; older records do not tell."""
        noted = self.record.splits(number)
        return self.folds_now() if noted is None else noted

    def splits_known(self, number: int) -> list[Splits]:
        """How cases were split in the trainings that made the weights of round `number`, latest first.

        Empty where one model trains on all, or where an older record does not tell.
        """
        own = self.record.splits(number)
        if own is None:
            return []
        before = self.splits_known(number - 1) if self.plan.warm_start and number > 0 else []
        return [own] if any(knows_held_out(earlier, own) for earlier in before) else [own, *before]

    def knows_other_labels(self, number: int) -> bool:
        """Whether models of round `number` know other labels than are in force, or cases that are no longer theirs."""
        return bool(self.changed_labels(number)) or self.folds_trained_on(number) != self.folds_now()

    def predictions(self, number: int) -> Path:
        """Folder of the predictions that round `number`'s labels are made of."""
        return self.store.state_folder / "predictions" / f"{number:02d}"

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
