"""Whether a round's labels are better than those before: both judged by the same evidence and the same rule.

The estimates that stand in the manifests do not tell: labels of round 0 are judged by a rule that knows of no change,
those of later rounds by rules learnt from models' labels, which say another Dice of the same agreement with the views.
Here each of two labels of a case is held against the views and against the other label.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from nnunet_oneshot.dataset import Case, RawDataset
from nnunet_oneshot.parallel import over_cases
from nnunet_oneshot.quality import estimate
from nnunet_oneshot.quality_opinions import opinions
from nnunet_oneshot.rounds import kept_manifest
from nnunet_oneshot.store import MACHINE_MADE, CaseRecord, Store


@dataclass(frozen=True)
class Task:
    """What a worker needs to judge one case's labels of a round and of the round before."""

    dataset: RawDataset
    store: Store
    case: Case
    record: CaseRecord
    number: int


def compare_rounds(dataset: RawDataset, store: Store, number: int, processes: int) -> dict[str, float]:
    """Mean estimated Dice of the labels of round `number`, `now`, and of the round before it, `before`.

    Only cases that a program labelled in both rounds count; empty where there is none.
    """
    now, before = (kept_manifest(store, n).cases for n in (number, number - 1))
    tasks = [
        Task(dataset, store, case, now[case.name], number)
        for case in dataset.cases
        if all(case.name in cases and cases[case.name].status in MACHINE_MADE for cases in (now, before))
    ]
    found = list(over_cases(compare_case, tasks, processes=processes, title=f"judge round {number}"))
    if not found:
        return {}
    means = np.mean(found, axis=0)
    return {"before": round(float(means[0]), 4), "now": round(float(means[1]), 4)}


def compare_case(task: Task) -> tuple[float, float]:
    """Estimated mean Dice of one case's label of the round before, and of its new one."""
    dataset, store, name = task.dataset, task.store, task.case.name
    old, new = (dataset.read_label(store.round_path(n, name)) for n in (task.number - 1, task.number))
    judged = [
        estimate(label, opinions(dataset, store, name, task.record, other)) for label, other in ((old, new), (new, old))
    ]
    # The other label alone is something to judge by.
    before, now = (found["mean"] for found in judged if found is not None)
    return before, now
