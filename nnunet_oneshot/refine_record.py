"""What a refinement is and which of its steps are done: `.oneshot/refine.json`."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from nnunet_oneshot.dataset import RawDataset
from nnunet_oneshot.errors import OneShotError
from nnunet_oneshot.file_hash import hash_of, hash_of_voxels
from nnunet_oneshot.nnunet import Fold
from nnunet_oneshot.parallel import FEW, over_cases
from nnunet_oneshot.settings import PRESETS
from nnunet_oneshot.store import Store

_HASH = 16
Splits = list[dict[str, list[str]]]
"""nnU-Net's splits: each fold's cases, `train` and `val`."""


@dataclass(frozen=True)
class Plan:
    """What a refinement trains; a second run on the same dataset must ask for the same.

    Attributes:
        configuration: nnU-Net configuration.
        trainer: trainer class.
        plans: plans identifier.
        preset: default, small or tiny.
        num_folds: 1 trains one model on all cases; k deals them over k models, and a case's new label comes from the
            model that did not train on its old one.
        warm_start: each round's training starts from the weights of the round before.
        weight_by_quality: cases are drawn as often as their estimated quality says.
        self_opinion: SAM2 weights whose `self` mode, prompted by the predictions, must agree too; None for none.
        min_margin: margin between the model's first two classes below which a voxel becomes ignore.
    """

    configuration: str
    trainer: str
    plans: str
    preset: str
    num_folds: int = 1
    warm_start: bool = False
    weight_by_quality: bool = False
    self_opinion: str | None = None
    min_margin: float = 0.0

    @property
    def folds(self) -> tuple[Fold, ...]:
        """The folds that are trained and make up the final model."""
        return ("all",) if self.num_folds == 1 else tuple(range(self.num_folds))


def make_plan(
    configuration: str, trainer: str | None = None, plans: str | None = None, preset: str = "default", **more: Any
) -> Plan:
    """What is trained: the trainer and plans given, else the preset's own."""
    chosen = PRESETS[preset]
    return Plan(configuration, trainer or chosen.trainer(), plans or chosen.plans, preset, **more)


def flags_of(plan: Plan) -> dict[str, str]:
    """What to type for a plan, by flag, without a preset's own trainer and plans and without switches that are off."""
    own = make_plan(plan.configuration, preset=plan.preset)
    typed = {"-c": plan.configuration, "-preset": plan.preset}
    typed |= {"-tr": plan.trainer} if plan.trainer != own.trainer else {}
    typed |= {"-p": plan.plans} if plan.plans != own.plans else {}
    typed |= {"-num_folds": str(plan.num_folds), "-min_margin": f"{plan.min_margin:g}"}
    typed |= {"-self_opinion": plan.self_opinion or "none"}
    switches = {"--from_scratch": not plan.warm_start, "--weight_by_quality": plan.weight_by_quality}
    return typed | {flag: "" for flag, on in switches.items() if on}


def repeated_flags(folder: Path) -> str | None:
    """What `refine` must be told to go on in a pseudo-label dataset's folder, beside dataset and rounds.

    Second opinions and weights to begin with are taken from the record once a training has ended. None where nothing
    was begun.
    """
    plan = begun_plan(folder)
    if plan is None:
        return None
    defaults = flags_of(make_plan(plan.configuration)) | {"-c": ""}
    trained = _any_training(json.loads(_path(folder).read_text(encoding="utf-8"))["done"])
    if not trained:
        del defaults["-self_opinion"]
    asked = {flag: value for flag, value in flags_of(plan).items() if defaults.get(flag) != value}
    recorded = ("-self_opinion", "--from_scratch") if trained else ()
    return " ".join(_typed(asked, flag) for flag in asked if flag not in recorded)


def _any_training(steps: Iterable[str]) -> bool:
    return any(step.startswith(("train-", "further-")) for step in steps)


def _differences(begun: Plan, plan: Plan) -> tuple[str, str]:
    """The flags in which two plans differ, as each has them."""
    before, now = flags_of(begun), flags_of(plan)
    differing = [flag for flag in {**before, **now} if before.get(flag) != now.get(flag)]
    return ", ".join(_typed(before, f) for f in differing), ", ".join(_typed(now, f) for f in differing)


def _typed(flags: Mapping[str, str], flag: str) -> str:
    return f"{flag} {flags[flag]}".strip() if flag in flags else f"no {flag}"


def begun_plan(folder: Path) -> Plan | None:
    """What the refinement of a pseudo-label dataset's folder trains, None where none was begun."""
    if not _path(folder).is_file():
        return None
    content = json.loads(_path(folder).read_text(encoding="utf-8"))["plan"]
    return Plan(**{key: value for key, value in content.items() if key in _names()})


class Record:
    """The steps that are done, and the labels and the deal over folds that each training began with."""

    def __init__(self, store: Store) -> None:
        self._store = store

    @property
    def path(self) -> Path:
        """Where it lies."""
        return _path(self._store.folder)

    def begun(self) -> Plan | None:
        """What was begun, None where nothing was."""
        return begun_plan(self._store.folder)

    def is_trained(self) -> bool:
        """Whether any training has ended, be it for a second one on the same labels to begin."""
        return _any_training(self.steps())

    def begin(self, plan: Plan) -> bool:
        """Record what is begun; False where it had begun before. OneShotError where something else was trained.

        What was begun and never trained to an end, for example by a mistyped trainer, gives way.
        """
        begun = self.begun()
        if begun is None or (begun != plan and not self.is_trained()):
            self._store.write_json({"plan": asdict(plan), "done": {}, "labels": {}}, self.path)
            return True
        if begun != plan:
            expected, found = _differences(begun, plan)
            raise OneShotError(
                f"{self._store.folder.name}: expected the refinement that was begun there, {expected}, found {found}; "
                "repeat those settings, or make another dataset for new ones"
            )
        return False

    def is_done(self, step: str) -> bool:
        """Whether a step has ended."""
        return step in self._content()["done"]

    def mark(self, step: str, value: Mapping[str, float] | None = None) -> None:
        """A step has ended; `value` is what it found."""
        content = self._content()
        content["done"][step] = dict(value or {})
        self._store.write_json(content, self.path)

    def value(self, step: str) -> dict[str, float] | None:
        """What a step found, None where it is not done."""
        return self._content()["done"].get(step)

    def steps(self) -> dict[str, dict[str, float]]:
        """All steps that are done, in order, with what they found."""
        return self._content()["done"]

    def in_place(self) -> int | None:
        """The round whose models lie where nnU-Net looks; None for none, and while they are moved."""
        content = self._content()
        # Older records say which round's training was prepared, by moving the models before it.
        prepared = [int(step.split("-")[1]) for step in content["done"] if step.startswith("prepare-")]
        found: int | None = content.get("in_place", max(prepared, default=None))
        return found

    def note_in_place(self, number: int | None) -> None:
        """Models were moved."""
        content = self._content()
        content["in_place"] = number
        self._store.write_json(content, self.path)

    def note_labels(
        self, number: int, labels: Mapping[str, str], splits: Splits | None, voxels: Mapping[str, str]
    ) -> None:
        """The labels that the training of a round begins with, as hashes by case, and how folds split the cases.

        `labels` are hashes of the files, `voxels` of what they hold: files that differ may hold the same.

        A decision can move cases between folds and leave every label as it is: what the models there are trained on
        is then no longer what splits_final.json says. `splits` is None where one model trains on all cases.
        """
        content = self._content()
        content.setdefault("labels", {})[str(number)] = dict(labels)
        content.setdefault("voxels", {})[str(number)] = dict(voxels)
        if splits is not None:
            content.setdefault("splits", {})[str(number)] = splits
        self._store.write_json(content, self.path)

    def labels(self, number: int) -> dict[str, str] | None:
        """The labels that the training of a round began with, None where it has not begun."""
        return self._content().get("labels", {}).get(str(number))

    def voxels(self, number: int) -> dict[str, str]:
        """Hashes of what those labels hold, by case; older records do not tell."""
        return self._content().get("voxels", {}).get(str(number), {})

    def splits(self, number: int) -> Splits | None:
        """How folds split the cases when the training of a round began; None where that is not noted."""
        return self._content().get("splits", {}).get(str(number))

    def begin_further(self, number: int) -> None:
        """The models of round `number` are to be trained once more on its labels."""
        content = self._content()
        content["done"] = {step: value for step, value in content["done"].items() if step != f"train-{number}"}
        content["done"][f"further-{number}"] = {}
        self._store.write_json(content, self.path)

    def forget_training(self, number: int) -> None:
        """Models of round `number` are to be trained again; what came of them stands."""
        content = self._content()
        content["done"].pop(f"train-{number}", None)
        self._store.write_json(content, self.path)

    def forget_from(self, number: int) -> None:
        """Training on round `number`'s labels, and all that came of it, is to be done again."""
        content = self._content()
        first = dict.fromkeys(("prepare", "train", "further"), number)
        first |= dict.fromkeys(("relabel", "quality"), number + 1)
        content["done"] = {
            step: value
            for step, value in content["done"].items()
            if "-" not in step or int(step.split("-")[1]) < first[step.split("-")[0]]
        }
        for key in ("labels", "voxels", "splits"):
            content[key] = {n: noted for n, noted in content.get(key, {}).items() if int(n) < number}
        self._store.write_json(content, self.path)

    def _content(self) -> dict[str, Any]:
        return json.loads(self.path.read_text(encoding="utf-8"))


def label_hashes(store: Store, cases: Iterable[str]) -> dict[str, str]:
    """Hash of each case's label file that is trained on."""
    return {name: hash_of(store.label_path(name))[:_HASH] for name in cases}


def voxel_hashes(dataset: RawDataset, store: Store, cases: Sequence[str], processes: int) -> dict[str, str]:
    """Hash of the voxels of each case's label that is trained on, which programs that save it again leave as it is."""
    tasks = [(dataset, store, name) for name in cases]
    return dict(over_cases(_voxel_hash, tasks, processes=processes, title="note labels", few=FEW))


def changed_labels(dataset: RawDataset, store: Store, number: int, processes: int) -> list[str]:
    """Cases whose label is another one than the training on a round began with; none where it has not begun.

    A label that is gone or cannot be read is another one.
    """
    record = Record(store)
    before, voxels = record.labels(number), record.voxels(number)
    if before is None:
        return []
    cases = list(store.read_manifest().cases)
    now = label_hashes(store, [name for name in cases if store.label_path(name).is_file()])
    # Only files that differ are read.
    other = sorted(name for name in cases if name not in now or before.get(name) != now[name])
    tasks = [(dataset, store, name, voxels[name]) for name in other if name in now and name in voxels]
    same = dict(over_cases(_holds, tasks, processes=processes, title="note labels", few=FEW))
    return [name for name in other if not same.get(name, False)]


def _voxel_hash(task: tuple[RawDataset, Store, str]) -> tuple[str, str]:
    dataset, store, name = task
    return name, hash_of_voxels(dataset.read_label(store.label_path(name)))[:_HASH]


def _holds(task: tuple[RawDataset, Store, str, str]) -> tuple[str, bool]:
    dataset, store, name, known = task
    try:
        return name, _voxel_hash((dataset, store, name))[1] == known
    except OneShotError:
        return name, False


def _path(folder: Path) -> Path:
    return Store(folder, "").state_folder / "refine.json"


def _names() -> set[str]:
    return {field.name for field in fields(Plan)}
