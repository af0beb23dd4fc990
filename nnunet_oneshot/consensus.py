"""Build dataset BBB from per-view labels: fuse the views, turn divergence into nnU-Net's ignore label.

`propagate` ends here, and labels of any other tool enter here.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np

from nnunet_oneshot.checks import check_for_propagation, check_images, checked_label
from nnunet_oneshot.dataset import Case, RawDataset, open_dataset
from nnunet_oneshot.errors import OneShotError
from nnunet_oneshot.output import create_output
from nnunet_oneshot.parallel import default_processes, over_cases
from nnunet_oneshot.quality import Opinions, by_source, estimate
from nnunet_oneshot.quality_opinions import independent, view_scores
from nnunet_oneshot.store import CaseRecord, Manifest, Source, Status, Store, ViewRecord, WorkerRecord
from nnunet_oneshot.training_data import ignore_value, write_training_files
from sam2_propagation.consensus import enough_views, fuse
from sam2_propagation.interface import LabelVolume
from sam2_propagation.physical_space import PhysicalSpacePropagator
from sam2_propagation.views import EVERY_PLANE

GIVEN_VIEW = "given"
"""Name of the one view of a label folder made elsewhere."""
PACKAGES = ("nnunet-oneshot", "nnunetv2", "sam2", "torch", "SimpleITK", "numpy")


_TAKEN = re.compile(rf"fused|rounds|{PhysicalSpacePropagator.name}|self_\d+")
"""Names in `pseudoTr` that are no tool's: labels in force and kept, those by place, second opinions of `refine`."""


_REGISTERED = ("registration", "relay")
"""Sources whose labels come from registration; what the first says is in what the second says."""


@dataclass(frozen=True)
class Task:
    """What a worker needs to fuse one case."""

    dataset: RawDataset
    store: Store
    sources: tuple[str, ...]
    case: Case


def consensus(
    dataset: int | str,
    output: int,
    folders: Sequence[Path],
    *,
    num_processes: int | None = None,
    overwrite: bool = False,
) -> Manifest:
    """Make dataset BBB from label folders made by any other tool; every folder is one source of one view.

    Args:
        dataset: id or name of the raw dataset with the images and the annotated case(s).
        output: id of the dataset to write.
        folders: one label file a case in each, named `CASE.EXT`; annotated cases' files are not used.
        num_processes: cases fused at once; the processor count when None.
        overwrite: replace an output dataset that exists.

    Raises:
        OneShotError: folders of differing case sets, shapes or label values, and whatever `propagate` refuses.
    """
    raw = open_dataset(dataset)
    check_for_propagation(raw)
    sources = _named(folders)
    processes = num_processes or default_processes()
    cases = _check_folders(raw, sources, processes)
    check_images(raw, processes)
    settings = {"folders": sorted(sources)}
    store = create_output(raw, output, settings, overwrite)
    with store.lock("consensus"):
        for name, folder in sources.items():
            for case in cases:
                _take_in(raw, store, name, folder, case)
        return build(raw, store, {name: Source() for name in sources}, settings, processes)


def build(
    dataset: RawDataset, store: Store, sources: Mapping[str, Source], settings: Mapping[str, Any], processes: int
) -> Manifest:
    """Fuse every case's views and write all that makes BBB an nnU-Net dataset; the manifest comes last.

    A case without any label gets an all-ignore label and is left out of training.
    """
    apart = PhysicalSpacePropagator.name
    patients, others = settings.get(apart, {}), tuple(name for name in sources if name != apart)
    tasks = [Task(dataset, store, (apart,) if c.name in patients else others, c) for c in dataset.cases]
    records = dict(over_cases(fuse_case, tasks, processes=processes, title="fuse views"))
    manifest = Manifest(
        source_dataset=dataset.name,
        versions={name: version(name) for name in PACKAGES},
        settings=dict(settings),
        sources=dict(sources),
        cases=dict(sorted(records.items())),
    )
    write_training_files(dataset, store, manifest)
    store.write_manifest(manifest)
    return manifest


def fuse_case(task: Task) -> tuple[str, CaseRecord]:
    """Write `labelsTr`, `pseudoTr/fused` and `pseudoTr/rounds/00` of one case."""
    dataset, case = task.dataset, task.case
    human = None if case.label is None else dataset.read_label(case.label)
    if human is not None and not dataset.is_sparse(human):
        _publish(task, human, human)
        return case.name, CaseRecord(status="annotated")
    views, labels, reasons = _trusted(*_collect(task))
    if labels:
        fused = fuse(labels, view_weights(views, partly_drawn=human is not None), dataset.image_geometry(case)[1])
        guess, agreed = fused.label, fused.agreed
    else:
        guess = np.zeros(dataset.read_image(case).shape, np.int16)
        agreed = np.zeros(guess.shape, bool)
    target = np.where(agreed, guess, ignore_value(dataset)).astype(np.int16)
    if human is not None:
        drawn = human != dataset.ignore
        guess, target = np.where(drawn, human, guess), np.where(drawn, human, target)
        task.store.write_label(dataset, human, task.store.drawn_path(case.name), case)
    _publish(task, target, guess)
    record = CaseRecord(status=_status(human, labels), views=views, divergence=round(float(1 - agreed.mean()), 6))
    record.reason = "; ".join(reasons) or None
    if labels:
        by_name, telling = dict(zip(views, labels, strict=True)), independent(views)
        said = by_source(telling, [by_name[view] for view in telling])
        record.quality = estimate(guess, Opinions(said, scores=view_scores(task.store, views, case.name)))
    return case.name, record


def view_weights(views: Sequence[str], partly_drawn: bool = False) -> list[float]:
    """What views `SOURCE/VIEW` weigh in the best guess.

    SAM2's three planes, each another look, have the say where there are any: others, beside which they weigh eight
    times as much, decide where planes differ evenly (benchmarks/builtin_checkpoint.py). Without SAM2 the relays' view
    weighs so much, which counts registration's views already. Views of correspondence weigh twice as much where
    a person drew on some slices of the image itself (benchmarks/slice_fusion.py); `checked` is there to contradict
    where `joint` has drifted and has no say of its own.
    """
    planes = {f"sam2/{plane}" for plane in EVERY_PLANE} & set(views)
    # A plane by itself, with its turns, is no other look than these.
    alone = all(name.split("/")[0] in _REGISTERED for name in views)
    leading = planes if len(planes) > 1 else {"relay/relayed"} if alone else set()
    return [8.0 if name in leading else _weight(*name.split("/"), partly_drawn=partly_drawn) for name in views]


def _weight(source: str, view: str, *, partly_drawn: bool) -> float:
    if source == "correspondence" and view == "checked":
        # Not 0: it may be the only view that there is.
        return 0.001
    return 2.0 if source == "correspondence" and partly_drawn else 1.0


def _status(human: LabelVolume | None, labels: Sequence[LabelVolume]) -> Status:
    if human is not None:
        return "sparse"
    return "pseudo" if labels else "failed"


def _publish(task: Task, target: LabelVolume, guess: LabelVolume) -> None:
    store, case = task.store, task.case
    for label, path in (
        (guess, store.round_path(0, case.name)),
        (guess, store.fused_path(case.name)),
        (target, store.label_path(case.name)),
    ):
        store.write_label(task.dataset, label, path, case)


def _collect(task: Task) -> tuple[list[str], list[LabelVolume], list[str], int, int]:
    """Names and labels of views that succeeded, distinct reasons of others, how many gave a label and were attempted.

    Where there are relays, registration's views do not count: an image that it missed is what relays are there for.
    """
    views, labels, reasons, given, attempted = [], [], [], 0, 0
    for source in task.sources:
        record = task.store.read_worker(source, task.case.name)
        if record is None:
            reasons.append(f"{source}: no label was given")
            continue
        if source != "registration" or "relay" not in task.sources:
            given += sum(result.label for result in record.views.values())
            attempted += len(record.views)
        for view, result in record.views.items():
            if result.label:
                views.append(f"{source}/{view}")
                labels.append(task.dataset.read_label(task.store.view_path(source, view, task.case.name)))
            elif (reason := f"{source}: {result.reason}") not in reasons:
                reasons.append(reason)
    return views, labels, reasons, given, attempted


def _trusted(
    views: list[str], labels: list[LabelVolume], reasons: list[str], given: int, attempted: int
) -> tuple[list[str], list[LabelVolume], list[str]]:
    """All as it is, or no label where most views failed: the rest would agree with itself and look like consensus."""
    if not labels or enough_views(given, attempted):
        return views, labels, reasons
    return [], [], [*reasons, f"only {given} of {attempted} views gave a label"]


def _named(folders: Sequence[Path]) -> dict[str, Path]:
    named = {folder.resolve().name: folder for folder in folders}
    if len(named) < len(folders):
        raise OneShotError(
            f"expected label folders of different names, found {[f.name for f in folders]}; rename one: the name is "
            "the source's name"
        )
    for name, folder in named.items():
        if not folder.is_dir():
            raise OneShotError(f"expected a folder of labels, found no folder {folder}; check -i")
        if _TAKEN.fullmatch(name):
            raise OneShotError(f"expected a free name for a label folder, found {name}, which is taken; rename it")
    return named


def _check_folders(dataset: RawDataset, folders: Mapping[str, Path], processes: int) -> list[Case]:
    """The cases whose labels are used, after every one of their files was checked."""
    ending = dataset.file_ending
    found = {name: {p.name[: -len(ending)] for p in f.glob(f"*{ending}")} for name, f in folders.items()}
    known = {c.name for c in dataset.cases}
    for name, cases in found.items():
        if unknown := sorted(cases - known):
            raise OneShotError(
                f"{folders[name]}: expected labels of cases of {dataset.name}, found one of the unknown "
                f"case {unknown[0]}; remove it or correct its name"
            )
    wanted = [c for c in dataset.cases if _needs_label(dataset, c)]
    sets = {name: {c.name for c in wanted} & cases for name, cases in found.items()}
    first = next(iter(sets))
    for name, cases in sets.items():
        if difference := sorted(cases ^ sets[first]):
            raise OneShotError(
                f"expected the same cases in all label folders, found {difference[0]} in only one of "
                f"{folders[first]} and {folders[name]}; add or remove it"
            )
    if not sets[first]:
        raise OneShotError(f"{folders[first]}: expected labels of un-annotated cases, named CASE{ending}, found none")
    used = [c for c in wanted if c.name in sets[first]]
    pairs = [(dataset, folder / f"{c.name}{ending}", c) for folder in folders.values() for c in used]
    for _ in over_cases(_check_file, pairs, processes=processes, title="check labels"):
        pass
    return used


def _check_file(pair: tuple[RawDataset, Path, Case]) -> None:
    dataset, path, case = pair
    checked_label(dataset, path, case, drawn=False)


def _needs_label(dataset: RawDataset, case: Case) -> bool:
    return case.label is None or dataset.is_sparse(dataset.read_label(case.label))


def _take_in(dataset: RawDataset, store: Store, source: str, folder: Path, case: Case) -> None:
    label = dataset.read_label(folder / f"{case.name}{dataset.file_ending}")
    # Written anew, not copied: geometry becomes the image's own, to the last digit.
    store.write_label(dataset, label, store.view_path(source, GIVEN_VIEW, case.name), case)
    record = WorkerRecord(case=case.name, source=source, views={GIVEN_VIEW: ViewRecord(label=True)}, seconds=0.0)
    store.write_worker(record)
