"""How doubtful labels are that already exist: divergence and estimated quality, of cases and of slices."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt

from nnunet_oneshot.dataset import Case, RawDataset
from nnunet_oneshot.store import HUMAN_WORD, LEFT_OUT, CaseRecord, Store, is_by_model_alone


@dataclass(frozen=True, eq=False)
class Doubt:
    """What is doubtful about one case.

    Attributes:
        value: in [0, 1]; the most doubtful case of a set has 1, one that a person labelled whole 0.
        human: a person drew or approved the label.
        sparse: of which only a part.
        slices: (N,) doubt of each slice in [0, 1], where it is known.
    """

    value: float
    human: bool = False
    sparse: bool = False
    slices: npt.NDArray[np.float32] | None = None


def doubt_of_cases(store: Store) -> dict[str, Doubt]:
    """Doubt of every case, from a manifest: the mean of divergence over the set's largest and of 1 - quality."""
    records = store.read_manifest().cases
    largest = max((r.divergence or 0.0 for r in records.values()), default=0.0)
    return {name: _doubt(record, largest) for name, record in records.items()}


def doubt_of_slices(dataset: RawDataset, case: Case, doubt: Doubt, axis: int) -> Doubt:
    """The same doubt with that of each slice: its share of ignored voxels over the largest share."""
    if case.label is None or dataset.ignore is None:
        return doubt
    ignored = dataset.read_label(case.label) == dataset.ignore
    shares = ignored.mean(axis=tuple(a for a in range(3) if a != axis))
    return replace(doubt, slices=(shares / max(float(shares.max()), 1e-9)).astype(np.float32))


def _doubt(record: CaseRecord, largest: float) -> Doubt:
    if record.status in HUMAN_WORD:
        return Doubt(0.0, human=True)
    if record.status in LEFT_OUT or is_by_model_alone(record):
        return Doubt(1.0)
    signs = [] if record.divergence is None or largest == 0 else [record.divergence / largest]
    if record.quality is not None and "mean" in record.quality:
        signs.append(1 - record.quality["mean"])
    value = float(np.clip(np.mean(signs), 0, 1)) if signs else 0.0
    return Doubt(value, human=record.status == "sparse", sparse=record.status == "sparse")
