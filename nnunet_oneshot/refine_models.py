"""The models of a refinement: trained fold by fold, kept aside round by round, asked for new labels."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from nnunet_oneshot import nnunet
from nnunet_oneshot.dataset import Case
from nnunet_oneshot.errors import OneShotError
from nnunet_oneshot.refine_record import Plan
from nnunet_oneshot.store import Manifest
from nnunet_oneshot.training_data import splits


@dataclass(frozen=True)
class Models:
    """The models of one dataset and plan."""

    dataset: str
    plan: Plan
    device: str

    @property
    def folder(self) -> Path:
        """nnU-Net's results folder of what is trained."""
        return nnunet.results_folder(self.dataset, self.plan.trainer, self.plan.plans, self.plan.configuration)

    def check_none(self) -> None:
        """OneShotError where nnU-Net's results folder holds a model that this dataset's labels did not make."""
        if any((self.folder / f"fold_{fold}").exists() for fold in self.plan.folds):
            raise OneShotError(
                f"expected no earlier results in {self.folder}, found some that this dataset's labels did not make; "
                "move or remove them"
            )

    def train(self, number: int) -> None:
        """Train every fold on the labels in force, those of round `number`; resumes, or does nothing."""
        plan = self.plan
        for fold in plan.folds:
            start = self._kept(number - 1) / f"fold_{fold}" / nnunet.FINAL if plan.warm_start and number else None
            nnunet.train(
                self.dataset,
                plan.configuration,
                fold,
                plan.trainer,
                plan.plans,
                self.device,
                pretrained_weights=start,
            )

    def predict(self, cases: Sequence[Case], manifest: Manifest, output: Path, probabilities: bool = False) -> None:
        """Predict each case by the model that did not train on its label, where there is one; else by all folds.

        With `probabilities` each case's are written too, `CASE.npz`.
        """
        groups: dict[tuple[nnunet.Fold, ...], list[Case]] = {}
        for case in cases:
            groups.setdefault(self._folds_for(case.name, manifest), []).append(case)
        for folds, members in sorted(groups.items(), key=lambda group: str(group[0])):
            self._predict(folds, members, output, probabilities)

    def keep_aside(self, number: int) -> None:
        """Move the models trained on round `number` out of nnU-Net's way; repeating it does nothing."""
        self._move(self._kept(number))

    def set_aside_superseded(self, number: int) -> None:
        """Move models trained on labels of round `number` that are no longer in force out of the way."""
        taken = self.folder / "oneshot_rounds"
        free = next(n for n in range(1, 10_000) if not (taken / f"{number:02d}_superseded_{n}").exists())
        self._move(taken / f"{number:02d}_superseded_{free}")

    def _predict(
        self, folds: tuple[nnunet.Fold, ...], cases: Sequence[Case], output: Path, probabilities: bool
    ) -> None:
        plan = self.plan
        images: Mapping[str, Sequence[Path]] = {case.name: case.images for case in cases}
        nnunet.predict(
            self.dataset,
            plan.configuration,
            folds,
            plan.trainer,
            plan.plans,
            images,
            output,
            self.device,
            save_probabilities=probabilities,
        )

    def _folds_for(self, case: str, manifest: Manifest) -> tuple[nnunet.Fold, ...]:
        if self.plan.num_folds == 1:
            return self.plan.folds
        dealt = splits(manifest, self.plan.num_folds)
        unseen = [fold for fold, split in enumerate(dealt) if case in split["val"] and case not in split["train"]]
        return tuple(unseen[:1]) or self.plan.folds

    def _kept(self, number: int) -> Path:
        return self.folder / "oneshot_rounds" / f"{number:02d}"

    def _move(self, target: Path) -> None:
        for fold in self.plan.folds:
            source = self.folder / f"fold_{fold}"
            if source.is_dir() and not (target / source.name).exists():
                target.mkdir(parents=True, exist_ok=True)
                os.rename(source, target / source.name)
