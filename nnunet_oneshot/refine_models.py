"""The models of a refinement: trained fold by fold, kept aside round by round, asked for new labels."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from nnunet_oneshot import nnunet
from nnunet_oneshot.dataset import Case
from nnunet_oneshot.errors import OneShotError
from nnunet_oneshot.refine_record import Plan, Splits

_FIRST = "_first"
"""After a round's number: models of its first training, where there was a second one on the same labels."""


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

    def check_none(self, or_else: str = "") -> None:
        """OneShotError where nnU-Net's results folder holds a model that this dataset's labels did not make.

        Args:
            or_else: another way out than to move these away, in words.
        """
        # Folds of another number too: export and nnU-Net's own commands could take them for this model.
        aside = (f"oneshot_rounds/[0-9][0-9]{ending}/fold_*" for ending in ("", _FIRST))
        there = [path for pattern in ("fold_*", *aside) for path in self.folder.glob(pattern)]
        if there:
            names = ", ".join(sorted(path.relative_to(self.folder).as_posix() for path in there))
            raise OneShotError(
                f"expected no earlier results in {self.folder}, found {names}, which were not trained on the labels "
                f"that are, or by --overwrite will be, there; move them out of nnUNet_results or remove them{or_else}"
            )

    def are_in(self, folder: Path) -> bool:
        """Whether the models of all folds are in a folder; they may have been removed to save room."""
        return all(_weights(folder, fold).is_file() for fold in self.plan.folds)

    def train(self, start: Path | None) -> None:
        """Train every fold on the labels in force; resumes, or does nothing.

        Args:
            start: folder of the models whose weights it starts from; None for new ones.
        """
        plan = self.plan
        for fold in plan.folds:
            nnunet.train(
                self.dataset,
                plan.configuration,
                fold,
                plan.trainer,
                plan.plans,
                self.device,
                pretrained_weights=None if start is None else _weights(start, fold),
            )

    def check_trained(self) -> None:
        """OneShotError where the model of a fold, which is there, is another trainer's."""
        for fold in self.plan.folds:
            nnunet.check_trained(self.dataset, self.plan.configuration, fold, self.plan.trainer, self.plan.plans)

    def predict(
        self,
        cases: Sequence[Case],
        splits: Splits | None,
        output: Path,
        probabilities: bool = False,
        earlier: Sequence[Splits] = (),
    ) -> None:
        """Predict each case by the model that did not train on its label, where there is one; else by all folds.

        Args:
            cases: what to predict.
            splits: how the folds split the cases when they were trained; None where one model trains on all.
            output: folder for `<case><file ending>`.
            probabilities: write each case's too, `CASE.npz`.
            earlier: how the folds split the cases when the weights that they started from were trained.
        """
        groups: dict[tuple[nnunet.Fold, ...], list[Case]] = {}
        for case in cases:
            groups.setdefault(self._folds_for(case.name, splits, earlier), []).append(case)
        for folds, members in sorted(groups.items(), key=lambda group: str(group[0])):
            self._predict(folds, members, output, probabilities)

    def keep_aside(self, number: int) -> None:
        """Move the models trained on round `number` out of nnU-Net's way; repeating it does nothing."""
        self._move(self.folder, self.kept(number))

    def bring_back(self, number: int) -> None:
        """Move models that were kept aside, if there are any, to where nnU-Net looks; repeating it does nothing."""
        self._move(self.kept(number), self.folder)

    def set_aside_first(self, number: int) -> None:
        """Move the models trained on round `number` to where its second training finds them.

        Those of folds that are there stay: what lies in place of them is the second training's. So is a training that
        did not end: the first one's models may be gone.
        """
        for fold in self.plan.folds:
            source, target = self.folder / f"fold_{fold}", self.first(number) / f"fold_{fold}"
            if _weights(self.folder, fold).is_file() and not target.exists():
                target.parent.mkdir(parents=True, exist_ok=True)
                os.rename(source, target)

    def set_aside_superseded(self, number: int, in_place: int | None) -> None:
        """Move models trained on labels of round `number`, and all that came of it, out of the way.

        Args:
            number: the round whose labels are no longer those that were trained on.
            in_place: the round whose models lie where nnU-Net looks, None for none.
        """
        if in_place is not None and in_place >= number:
            self._move(self.folder, self._superseded(in_place))
        kept = self.folder / "oneshot_rounds"
        for folder in sorted([*kept.glob("[0-9][0-9]"), *kept.glob(f"[0-9][0-9]{_FIRST}")]):
            if (made := int(folder.name.removesuffix(_FIRST))) >= number:
                self._move(folder, self._superseded(made))

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

    def _folds_for(self, case: str, splits: Splits | None, earlier: Sequence[Splits]) -> tuple[nnunet.Fold, ...]:
        if splits is None:
            return self.plan.folds
        own = [fold for fold, split in enumerate(splits) if case in split["val"] and case not in split["train"]]
        if own:
            return tuple(own[:1])
        # Of a case that is left out now, weights of before may know the label.
        known = (splits, *earlier)
        unseen = [fold for fold in range(len(splits)) if not any(case in deal[fold]["train"] for deal in known)]
        return tuple(unseen) or self.plan.folds

    def kept(self, number: int) -> Path:
        """Where the models of a round lie while others are in place."""
        return self.folder / "oneshot_rounds" / f"{number:02d}"

    def first(self, number: int) -> Path:
        """Where the models of a round's first training lie, if there was a second one on the same labels."""
        return self.folder / "oneshot_rounds" / f"{number:02d}{_FIRST}"

    def _superseded(self, number: int) -> Path:
        taken = self.folder / "oneshot_rounds"
        free = next(n for n in range(1, 10_000) if not (taken / f"{number:02d}_superseded_{n}").exists())
        return taken / f"{number:02d}_superseded_{free}"

    def _move(self, origin: Path, target: Path) -> None:
        for fold in self.plan.folds:
            source = origin / f"fold_{fold}"
            if not source.is_dir():
                continue
            if (target / source.name).exists():
                raise OneShotError(
                    f"expected no {target / source.name} when {source} was to be moved there, found one; move away the "
                    "one that is not of this refinement"
                )
            target.mkdir(parents=True, exist_ok=True)
            os.rename(source, target / source.name)


def knows_held_out(before: Splits, now: Splits) -> bool:
    """Whether a fold that trained as cases were split `before` saw one that is its own to predict `now`.

    A case that is left out of one of the two, or comes back, stays in its fold.
    """
    return any(set(old["train"]) & set(new["val"]) - set(new["train"]) for old, new in zip(before, now, strict=True))


def _weights(folder: Path, fold: nnunet.Fold) -> Path:
    return folder / f"fold_{fold}" / nnunet.FINAL
