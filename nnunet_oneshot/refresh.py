"""Bring nnU-Net's preprocessed data up to date with the raw dataset's labels, without touching images.

A full `nnUNetv2_preprocess` gives the same: segmentations, class locations and gt_segmentations. Only cases whose label
changed are rewritten; a case that is new, or whose image changed, is made whole. All configurations of all plans
that have preprocessed data are kept alike, so that none of them trains on old labels.
"""

from __future__ import annotations

import json
import os
import shutil
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nnunetv2.utilities.plans_handling.plans_handler import PlansManager

from nnunet_oneshot.file_hash import hash_of
from nnunet_oneshot.nnunet import dataset_name, preprocessed_folder, root
from nnunet_oneshot.parallel import default_processes, over_cases
from nnunet_oneshot.refresh_case import MASKS, Target, make_whole, nonzero, remove_leftovers, replacing, rewrite_label
from nnunet_oneshot.refresh_ledger import CaseFiles, Ledger, Need

WORTH_WORKERS = 20.0
"""Seconds of work from which on processes, each of which takes seconds to start, are worth it."""


@dataclass(frozen=True)
class Refreshed:
    """What a refresh did, in cases.

    Attributes:
        labels: their segmentation part was rewritten.
        whole: image and label were preprocessed.
        kept: nothing was to be done.
        removed: they are no longer in the dataset.
    """

    labels: tuple[str, ...] = ()
    whole: tuple[str, ...] = ()
    kept: int = 0
    removed: tuple[str, ...] = ()


@dataclass(frozen=True)
class Task:
    """What is to be done with one case."""

    base: Path
    case: CaseFiles
    needs: tuple[tuple[Target, Need], ...]
    label_hash: str
    dataset_json: dict[str, Any]


def refresh(dataset: int | str, num_processes: int | None = None) -> Refreshed:
    """Bring every folder of preprocessed data of a dataset up to date; repeat it after an interruption.

    Nothing is done for configurations that have no preprocessed data. No other process may preprocess the same
    dataset or train on it meanwhile.

    Args:
        dataset: id or name of a raw dataset.
        num_processes: cases at once; the processor count when None.

    Raises:
        OneShotError: unknown dataset, or a label that does not fit its image.
    """
    name = dataset_name(dataset)
    base, cases = root("nnUNet_preprocessed") / name, training_cases(name)
    targets = preprocessed_targets(base)
    if not targets:
        return Refreshed()
    remove_leftovers(base)
    removed = [case for target in targets for case in _remove_unknown(target, {case.name for case in cases})]
    ledger = Ledger.read(base)
    tasks = _tasks(base, cases, targets, ledger)
    done = [(task, whole) for task, whole in _work(tasks, ledger, num_processes or default_processes())]
    return Refreshed(
        labels=tuple(sorted(task.case.name for task, whole in done if not whole)),
        whole=tuple(sorted(task.case.name for task, whole in done if whole)),
        kept=len(cases) - len(tasks),
        removed=tuple(sorted(set(removed))),
    )


def raw_label_hashes(dataset: int | str) -> dict[str, str]:
    """Hash of the label of every training case of a raw dataset, by case."""
    return {case.name: hash_of(case.label) for case in training_cases(dataset_name(dataset))}


def note_preprocessed(dataset: int | str, plans: str, configurations: Sequence[str], labels: Mapping[str, str]) -> None:
    """Remember that nnU-Net has just preprocessed every case for some configurations.

    Without that a refresh rewrites every label once.

    Args:
        dataset: id or name of the raw dataset.
        plans: plans identifier.
        configurations: what was preprocessed.
        labels: `raw_label_hashes` of before, so that a refresh brings in what was edited meanwhile; a case that is not
            named there is not noted.
    """
    name = dataset_name(dataset)
    base = root("nnUNet_preprocessed") / name
    made = {preprocessed_folder(name, plans, configuration) for configuration in configurations}
    targets = [target for target in preprocessed_targets(base) if target.folder in made]
    ledger = Ledger.read(base)
    for target in targets:
        ledger.forget_other_plans(target)
    for case in training_cases(name):
        if case.name in labels:
            for target in targets:
                ledger.note(target, case, labels[case.name])
    ledger.write()


def training_cases(name: str) -> list[CaseFiles]:
    """The training cases of a raw dataset, as nnU-Net sees them."""
    folder = root("nnUNet_raw") / name
    content = json.loads((folder / "dataset.json").read_text(encoding="utf-8"))
    listed = content["dataset"] if "dataset" in content else _found(folder, content["file_ending"])
    return [
        CaseFiles(case, tuple(_absolute(folder, i) for i in entry["images"]), _absolute(folder, entry["label"]))
        for case, entry in sorted(listed.items())
    ]


def _found(folder: Path, ending: str) -> dict[str, Any]:
    labels = sorted((folder / "labelsTr").glob(f"*{ending}"))
    names = [label.name.removesuffix(ending) for label in labels]
    images = {n: sorted(str(p) for p in (folder / "imagesTr").glob(f"{n}_[0-9][0-9][0-9][0-9]{ending}")) for n in names}
    return {n: {"images": images[n], "label": str(label)} for n, label in zip(names, labels, strict=True)}


def _absolute(folder: Path, path: str) -> Path:
    return Path(os.path.normpath(folder / os.path.expandvars(path)))


def preprocessed_targets(base: Path) -> list[Target]:
    """Every folder of preprocessed data below a dataset's folder, with plans that describe it."""
    targets: dict[Path, Target] = {}
    for path in sorted(base.glob("*.json")):
        content = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(content, dict) or "configurations" not in content:
            continue
        plans = PlansManager(str(path))
        for configuration in plans.available_configurations:
            folder = base / plans.get_configuration(configuration).data_identifier
            if folder.is_dir():
                targets.setdefault(folder, Target(folder, path, configuration))
    return list(targets.values())


def _tasks(base: Path, cases: Sequence[CaseFiles], targets: Sequence[Target], ledger: Ledger) -> list[Task]:
    content = json.loads((base / "dataset.json").read_text(encoding="utf-8"))
    # The list of all cases is of no use to one of them, and every task carries this to a worker.
    dataset_json = {key: value for key, value in content.items() if key != "dataset"}
    stale = {target for target in targets if ledger.forget_other_plans(target)}
    tasks = []
    for case in cases:
        label_hash = hash_of(case.label)
        needs = tuple((t, "whole" if t in stale else ledger.need(t, case, label_hash)) for t in targets)
        if any(need != "nothing" for _, need in needs):
            tasks.append(Task(base, case, needs, label_hash, dataset_json))
    return tasks


def _work(tasks: Sequence[Task], ledger: Ledger, processes: int) -> Iterator[tuple[Task, bool]]:
    """Do the tasks; yields each with whether its case was made whole anywhere."""
    by_name = {task.case.name: task for task in tasks}
    try:
        for name, whole in _spread(tasks, processes):
            task = by_name[name]
            for target, _ in task.needs:
                ledger.note(target, task.case, task.label_hash)
            yield task, whole
    finally:
        ledger.write()


def _spread(tasks: Sequence[Task], processes: int) -> Iterator[tuple[str, bool]]:
    """The first case here, and the others in processes where that one took long enough."""
    if not tasks:
        return
    begin = time.monotonic()
    yield refresh_case(tasks[0])
    expected = (time.monotonic() - begin) * (len(tasks) - 1)
    used = processes if expected > WORTH_WORKERS else 1
    yield from over_cases(refresh_case, tasks[1:], processes=used, title="refresh labels")


def refresh_case(task: Task) -> tuple[str, bool]:
    """Bring one case up to date everywhere; its true label for nnU-Net's validation is copied last."""
    whole = False
    for target, need in task.needs:
        if need == "whole" or (need == "label" and not _relabelled(task, target)):
            make_whole(target, task.case.name, task.case.images, task.case.label, task.dataset_json)
            whole = True
    _copy_truth(task)
    return task.case.name, whole


def _relabelled(task: Task, target: Target) -> bool:
    if not target.tools.takes_labels_alone:
        return False
    mask = nonzero(task.base / MASKS / f"{task.case.name}.npz", task.case.images, target.tools)
    label, _ = target.tools.plans.image_reader_writer_class().read_seg(str(task.case.label))
    return rewrite_label(target, task.case.name, label, mask, task.dataset_json)


def _copy_truth(task: Task) -> None:
    place = _truth(task.base, task.case)
    with replacing(task.base) as folder:
        shutil.copyfile(task.case.label, folder / place.name)
        place.parent.mkdir(exist_ok=True)
        os.replace(folder / place.name, place)


def _truth(base: Path, case: CaseFiles) -> Path:
    return base / "gt_segmentations" / f"{case.name}{case.label.name.removeprefix(case.name)}"


def _remove_unknown(target: Target, known: set[str]) -> list[str]:
    """Remove cases that the dataset no longer has, which nnU-Net would train on."""
    gone = sorted({path.stem for path in target.folder.glob("*.pkl")} - known)
    for case in gone:
        for path in target.files(case):
            path.unlink(missing_ok=True)
    return gone
