"""What is done about labels of low estimated quality: left out, weighed less, or listed for a person."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from nnunet_oneshot.store import MACHINE_MADE, CaseRecord, Manifest, is_by_model_alone

MIN_QUALITY = 0.0
"""Estimated mean Dice below which a label is left out: none by default, since on neither of two real sets leaving out
what is estimated below 0.3 made the model better (docs/method.md, "Leaving labels out")."""
REVIEW_QUALITY = 0.7
"""Estimated mean Dice below which a label is listed for a person."""
MOST_GATED = 0.5
"""Share of the pseudo-labelled cases that gating may leave out, however low they are estimated."""


@dataclass(frozen=True)
class Doubt:
    """A label that a person should look at.

    Attributes:
        case: its case.
        quality: estimated mean Dice, None where nothing is known.
        reason: why it is listed, one sentence.
    """

    case: str
    quality: float | None
    reason: str


def gate(cases: Mapping[str, CaseRecord], min_quality: float) -> dict[str, CaseRecord]:
    """Records with statuses set by quality: `gated` below the threshold, `pseudo` again where a round lifted them.

    A person's word and failed cases stay as they are. Of the pseudo-labelled cases at most half are gated, the worst
    ones: were the estimate off for a whole set, training would be left with nothing.
    """
    machine_made = {name: record for name, record in cases.items() if record.status in MACHINE_MADE}
    low = {name: _mean(r) for name, r in machine_made.items() if r.quality is not None and _mean(r) < min_quality}
    worst = sorted(low, key=lambda name: (low[name], name))[: int(MOST_GATED * len(machine_made))]
    return {
        name: _with_status(record, name in worst, min_quality) if name in machine_made else record
        for name, record in cases.items()
    }


def needs_review(manifest: Manifest, class_names: Mapping[int, str]) -> list[Doubt]:
    """Labels that a person should look at, worst first: none was made, a model's alone, left out, or low."""
    doubts = [doubt for name, record in manifest.cases.items() if (doubt := _doubt(name, record, class_names))]
    return sorted(doubts, key=lambda doubt: (-1.0 if doubt.quality is None else doubt.quality, doubt.case))


def low_estimate(record: CaseRecord, class_names: Mapping[int, str]) -> str | None:
    """In words, that a label that training uses is estimated low, and for which class most; None where it is not."""
    if record.status not in ("pseudo", "sparse") or record.quality is None or _mean(record) >= REVIEW_QUALITY:
        return None
    return f"estimated Dice {_mean(record):.2f}, {_lowest(record.quality, class_names)}"


def mean_quality(manifest: Manifest) -> float | None:
    """Mean estimated Dice over the cases labelled by a program; None where nothing is known."""
    known = [_mean(r) for r in manifest.cases.values() if r.quality is not None and r.status in MACHINE_MADE]
    return sum(known) / len(known) if known else None


def _mean(record: CaseRecord) -> float:
    assert record.quality is not None
    return record.quality["mean"]


def _with_status(record: CaseRecord, low: bool, min_quality: float) -> CaseRecord:
    if low:
        reason = f"estimated Dice {_mean(record):.2f} is below {min_quality:.2f}"
        return record.model_copy(update={"status": "gated", "reason": reason})
    if record.status == "gated":
        return record.model_copy(update={"status": "pseudo", "reason": None})
    return record


def _doubt(name: str, record: CaseRecord, class_names: Mapping[int, str]) -> Doubt | None:
    quality = None if record.quality is None else _mean(record)
    if record.status == "failed":
        return Doubt(name, None, f"no label: {record.reason}")
    if record.status == "gated":
        return Doubt(name, quality, f"left out of training: {record.reason}")
    if is_by_model_alone(record):
        # An estimate, which a second round gives, tells no more than that the model repeats what it was taught.
        why = record.reason or "labelled by the model alone"
        return Doubt(name, None, f"{why}; nothing else tells how good its label is")
    low = low_estimate(record, class_names)
    return None if low is None else Doubt(name, quality, low)


def _lowest(quality: Mapping[str, float], class_names: Mapping[int, str]) -> str:
    classes = {int(key): value for key, value in quality.items() if key != "mean"}
    if not classes:
        return "no foreground found"
    worst = min(classes, key=lambda value: classes[value])
    return f"lowest for {class_names.get(worst, f'label {worst}')}: {classes[worst]:.2f}"
