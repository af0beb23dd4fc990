"""Whether a round went astray: how far its labels agree with what all propagators said, and those before did.

Estimated Dice does not tell which of two rounds is better: what it mostly goes by (the change between them, the label
carried back, SAM2's confidence) is the same for both. Agreement with the views is each label's own. It favours the
consensus of the views, so that a better round has less of it too, and only a great fall says something.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from nnunet_oneshot.dataset import Case, RawDataset
from nnunet_oneshot.parallel import over_cases
from nnunet_oneshot.quality import VIEWS, Opinions, gather
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
    """Mean Dice with the views of the labels of round `number`, `now`, and of the round before it, `before`.

    Only cases that a program labelled in both rounds, and of which there are several views, count; empty where there is
    none.
    """
    now, before = (kept_manifest(store, n).cases for n in (number, number - 1))
    tasks = [
        Task(dataset, store, case, now[case.name], number)
        for case in dataset.cases
        if all(case.name in cases and cases[case.name].status in MACHINE_MADE for cases in (now, before))
    ]
    compared = over_cases(compare_case, tasks, processes=processes, title=f"judge round {number}")
    found = [pair for pair in compared if pair is not None]
    if not found:
        return {}
    means = np.mean(found, axis=0)
    return {"before": round(float(means[0]), 4), "now": round(float(means[1]), 4)}


def compare_case(task: Task) -> tuple[float, float] | None:
    """Mean Dice with the views of one case's label of the round before, and of its new one, over the same classes."""
    dataset, store, name = task.dataset, task.store, task.case.name
    said = opinions(dataset, store, name, task.record, None)
    agreements = []
    for number in (task.number - 1, task.number):
        label = dataset.read_label(store.round_path(number, name))
        agreements.append(gather(label, Opinions(said.views)).get(VIEWS, {}))
    both = sorted(set(agreements[0]) & set(agreements[1]))
    if not both:
        return None
    before, now = (float(np.mean([agreement[value] for value in both])) for agreement in agreements)
    return before, now
