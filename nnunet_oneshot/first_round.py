"""The labels that a refinement starts from: judged, gated and kept as a round, before anything is trained."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from nnunet_oneshot.dataset import Case, RawDataset
from nnunet_oneshot.parallel import over_cases
from nnunet_oneshot.quality import estimate
from nnunet_oneshot.quality_gate import gate
from nnunet_oneshot.quality_opinions import opinions
from nnunet_oneshot.refine_changes import Taken, take_up
from nnunet_oneshot.rounds import announce_switch, is_kept, keep, put_in_force, target_path
from nnunet_oneshot.store import LEFT_OUT, CaseRecord, Store
from nnunet_oneshot.training_data import ignore_value


@dataclass(frozen=True)
class Task:
    """What a worker needs to judge one case."""

    dataset: RawDataset
    store: Store
    case: Case
    record: CaseRecord
    number: int


def take_over(dataset: RawDataset, store: Store, processes: int, min_quality: float) -> list[Taken]:
    """Judge and gate the labels in force and keep them as their round, once; repeat it after an interruption.

    Returns:
        What people changed since the labels were propagated.
    """
    manifest = store.read_manifest()
    if is_kept(store, manifest.round):
        return []
    known = [case for case in dataset.cases if case.name in manifest.cases]
    tasks = [Task(dataset, store, case, manifest.cases[case.name], manifest.round) for case in known]
    judged = dict(over_cases(judge_case, tasks, processes=processes, title="judge labels"))
    # Before the round is kept and put in force, which would put the labels that were propagated over a correction.
    taken = take_up(dataset, store, processes)
    manifest = store.read_manifest()
    changed = {change.case for change in taken}
    judged = {name: record for name, record in judged.items() if name not in changed}
    manifest.cases = gate(dict(sorted({**manifest.cases, **judged}.items())), min_quality)
    announce_switch(store, manifest.round)
    keep(store, manifest, manifest.round)
    put_in_force(dataset, store, manifest.round, processes)
    return taken


def judge_case(task: Task) -> tuple[str, CaseRecord]:
    """Keep one case's training label of the round and estimate its quality."""
    dataset, store, name = task.dataset, task.store, task.case.name
    guess, label = (dataset.read_label(p) for p in (store.round_path(task.number, name), store.label_path(name)))
    ignore, target = ignore_value(dataset), label
    if task.record.status in LEFT_OUT:
        # A label that says anything was put there since, even where it says what was carried.
        target = np.full(guess.shape, ignore, np.int16)
    elif task.record.status != "annotated":
        # What the fusion wrote: its guess or ignore. Anything else is an edit, of whatever shape it is.
        agreed = label == guess if label.shape == guess.shape else np.zeros(guess.shape, bool)
        target = np.where(agreed, guess, ignore).astype(np.int16)
    store.write_label(dataset, target, target_path(store, task.number, name), task.case)
    if task.record.status not in ("pseudo", "sparse"):
        return name, task.record
    found = estimate(guess, opinions(dataset, store, name, task.record, None))
    return name, task.record.model_copy(update={"quality": found})
