"""The rounds: train on the labels in force, predict the un-annotated cases, make new labels of that, train again.

Training and prediction are nnU-Net's own. Every finished step is recorded, so that an interrupted run goes on with the
first step that is not done; each step by itself can be repeated without harm.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from nnunet_oneshot import nnunet
from nnunet_oneshot.dataset import RawDataset, find_raw_folder, open_dataset
from nnunet_oneshot.errors import OneShotError
from nnunet_oneshot.parallel import default_processes
from nnunet_oneshot.relabel import Change, cases_to_predict, relabel
from nnunet_oneshot.settings import PRESETS, Preset
from nnunet_oneshot.store import Store, read_manifest

FOLDS: tuple[nnunet.Fold, ...] = ("all",)
"""One model on all cases makes the labels."""


@dataclass(frozen=True)
class Plan:
    """What a refinement trains; a second run on the same dataset must ask for the same."""

    configuration: str
    trainer: str
    plans: str
    preset: str


@dataclass
class Refinement:
    """What `refine` did.

    Attributes:
        plan: what was trained.
        model_folder: nnU-Net's folder of the final model.
        folds: the folds that make up the final model.
        changes: one entry a round, how far the labels moved.
    """

    plan: Plan
    model_folder: Path
    folds: tuple[nnunet.Fold, ...] = FOLDS
    changes: list[Change] = field(default_factory=list)


def refine(
    dataset: int | str,
    configuration: str,
    *,
    trainer: str | None = None,
    plans: str | None = None,
    rounds: int = 1,
    preset: str = "default",
    device: str = "cpu",
    num_processes: int | None = None,
) -> Refinement:
    """Train, predict and relabel `rounds` times, then train the final model on the last labels.

    Args:
        dataset: id or name of a dataset that `propagate` or `consensus` made.
        configuration: nnU-Net configuration, for example `3d_fullres`.
        trainer: trainer class; the preset's OneShotTrainer when None.
        plans: plans identifier that exists; the preset's own, made when absent, when None.
        rounds: how often labels are refreshed; 0 trains on the labels as they are.
        preset: default, small or tiny.
        device: cpu, cuda or mps.
        num_processes: cases preprocessed and relabelled at once; the processor count when None.

    Raises:
        OneShotError: no manifest, unknown plans, earlier results in the way, a refinement of other settings begun.
    """
    _check(configuration, rounds)
    store, raw = open_store(dataset)
    plan, settings = make_plan(configuration, trainer, plans, preset), PRESETS[preset]
    processes = num_processes or default_processes()
    with store.lock("refine"):
        store.remove_leftovers()
        work = _Work(store, raw, plan, settings, device, processes, plans_given=plans is not None)
        work.begin()
        for number in range(rounds + 1):
            work.train(number)
            if number < rounds:
                work.relabel(number + 1)
    return Refinement(plan, work.model_folder, changes=list(work.changes()))


def make_plan(
    configuration: str, trainer: str | None = None, plans: str | None = None, preset: str = "default"
) -> Plan:
    """What is trained: the trainer and plans given, else the preset's own."""
    chosen = PRESETS[preset]
    return Plan(configuration, trainer or chosen.trainer(), plans or chosen.plans, preset)


def model_folder(dataset: str, plan: Plan) -> Path:
    """nnU-Net's results folder of what is trained."""
    return nnunet.results_folder(dataset, plan.trainer, plan.plans, plan.configuration)


def check_no_results(dataset: str, plan: Plan) -> None:
    """OneShotError where nnU-Net's results folder holds a model that this dataset's labels did not make."""
    folder = model_folder(dataset, plan)
    if any((folder / f"fold_{fold}").exists() for fold in FOLDS):
        raise OneShotError(
            f"expected no earlier results in {folder}, found some that this dataset's labels did not make; move or "
            "remove them"
        )


def _check(configuration: str, rounds: int) -> None:
    if rounds < 0:
        raise OneShotError(f"expected -rounds to be 0 or more, found {rounds}; give a whole number")
    if "cascade" in configuration:
        raise OneShotError(
            f"expected a configuration of one stage (2d, 3d_fullres, 3d_lowres), found {configuration}; train the "
            "cascade by nnU-Net's own commands on the labels in force"
        )


def open_store(dataset: int | str) -> tuple[Store, RawDataset]:
    """A pseudo-label dataset's store and the raw dataset that holds its images.

    Raises:
        OneShotError: no such dataset, no manifest, or cases that the source dataset no longer has.
    """
    folder = find_raw_folder(dataset)
    manifest = read_manifest(folder / "oneshot.json")
    raw = open_dataset(manifest.source_dataset)
    if {c.name for c in raw.cases} != set(manifest.cases):
        raise OneShotError(
            f"{folder.name}: expected the cases of {raw.name} to be those it was made of, found other ones; "
            "propagate again with --overwrite"
        )
    return Store(folder, raw.file_ending), raw


@dataclass
class _Work:
    """The steps of one refinement and the record of those that are done."""

    store: Store
    raw: RawDataset
    plan: Plan
    preset: Preset
    device: str
    processes: int
    plans_given: bool

    @property
    def model_folder(self) -> Path:
        return model_folder(self.store.folder.name, self.plan)

    @property
    def _record(self) -> Path:
        return self.store.state_folder / "refine.json"

    def begin(self) -> None:
        """Check that this refinement may run here, and record what it is."""
        wanted = vars(self.plan)
        if self.plans_given:
            nnunet.check_configuration(self.store.folder.name, self.plan.plans, self.plan.configuration)
        if self._record.is_file():
            begun = json.loads(self._record.read_text())["plan"]
            if begun != wanted:
                raise OneShotError(
                    f"{self.store.folder.name}: expected the refinement that was begun there, {begun}, "
                    f"found {wanted}; repeat those settings or make another dataset"
                )
            return
        check_no_results(self.store.folder.name, self.plan)
        self.store.write_json({"plan": wanted, "done": {}}, self._record)

    def train(self, number: int) -> None:
        """Train on the labels of round `number`; the model of the round before is kept aside."""
        if not self._is_done(f"prepare-{number}"):
            self._prepare(number)
            self._mark(f"prepare-{number}")
        if not self._is_done(f"train-{number}"):
            for fold in FOLDS:
                nnunet.train(
                    self.store.folder.name,
                    self.plan.configuration,
                    fold,
                    self.plan.trainer,
                    self.plan.plans,
                    self.device,
                )
            self._mark(f"train-{number}")

    def relabel(self, number: int) -> None:
        """Predict the un-annotated cases by the last model and make round `number`'s labels."""
        if self._is_done(f"relabel-{number}"):
            return
        predictions = self.store.state_folder / "predictions" / f"{number:02d}"
        images = {case.name: case.images for case in cases_to_predict(self.raw, self.store.read_manifest())}
        plan = self.plan
        nnunet.predict(
            self.store.folder.name,
            plan.configuration,
            FOLDS,
            plan.trainer,
            plan.plans,
            images,
            predictions,
            self.device,
        )
        change = relabel(self.raw, self.store, predictions, number, self.processes)
        self._mark(f"relabel-{number}", change.agreement)

    def changes(self) -> Iterator[Change]:
        """How far labels moved in each round that was made."""
        for step, value in self._done().items():
            if step.startswith("relabel-"):
                yield Change(int(step.split("-")[1]), value)

    def _prepare(self, number: int) -> None:
        name = self.store.folder.name
        for fold in FOLDS if number else ():
            _keep_aside(self.model_folder, f"fold_{fold}", number - 1)
        arguments = ([self.plan.configuration], self.processes)
        if number == 0 and not self.plans_given:
            nnunet.plan_and_preprocess(name, self.preset, *arguments, overwrite=True)
        else:
            # The labels are new, the images' part is made again with them.
            nnunet.preprocess(name, self.plan.plans, *arguments, overwrite=True)

    def _done(self) -> dict[str, dict[str, float]]:
        return json.loads(self._record.read_text())["done"]

    def _is_done(self, step: str) -> bool:
        return step in self._done()

    def _mark(self, step: str, value: dict[str, float] | None = None) -> None:
        content = json.loads(self._record.read_text())
        content["done"][step] = value or {}
        self.store.write_json(content, self._record)


def _keep_aside(model_folder: Path, fold: str, number: int) -> None:
    """Move a round's trained fold out of nnU-Net's way; repeating it does nothing."""
    target = model_folder / "oneshot_rounds" / f"{number:02d}" / fold
    if (model_folder / fold).is_dir() and not target.exists():
        target.parent.mkdir(parents=True, exist_ok=True)
        os.rename(model_folder / fold, target)
