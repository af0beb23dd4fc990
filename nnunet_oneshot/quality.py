"""Estimated Dice of a label without ground truth, by case and class.

What is at hand: how far the views of all propagators agree with the label, how far it moved from an earlier round's,
the IoU that SAM2 predicts for its masks, and, where a propagator carried the label back to the annotated case, the Dice
there. Each piece of evidence is a number in [0, 1] that grows with quality; a rule with weights that cannot be negative
turns them into a Dice. Its constants come from phantoms and synthetic anatomy (`benchmarks/quality.py learn`), whose
truth is known, and from no data set of anybody.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from math import exp, log

import numpy as np

from nnunet_oneshot.quality_rules import FITTED
from sam2_propagation.consensus import fuse
from sam2_propagation.interface import Image, LabelVolume, Propagation, Propagator, Support
from sam2_propagation.relay import REVERSE_SCORE

VIEWS, SOURCES, CHANGE, REVERSE, CONFIDENCE = "views", "sources", "change", "reverse", "confidence"
KINDS = (VIEWS, SOURCES, CHANGE, REVERSE, CONFIDENCE)
TOLD_BY = frozenset((CHANGE, SOURCES))
"""Kinds that say what a label is: a round's, or made by several propagators. Each rule is for one sort of label."""
_CLIP = 0.01

Evidence = dict[str, dict[int, float]]
"""By kind and label value: agreement in [0, 1]."""


@dataclass(frozen=True)
class Rule:
    """logit(quality) = bias + sum of weight * logit(evidence); no weight is negative, so that it is monotone."""

    bias: float
    weights: Mapping[str, float]

    def __call__(self, evidence: Mapping[str, float]) -> float:
        """Estimated Dice in [0, 1] of one class."""
        return _sigmoid(self.bias + sum(weight * logit(evidence[kind]) for kind, weight in self.weights.items()))


RULES: Mapping[frozenset[str], Rule] = {
    frozenset(kinds): Rule(bias, dict(zip(kinds, weights, strict=True))) for kinds, (bias, *weights) in FITTED.items()
}
"""A rule for every set of kinds that can be at hand together."""


@dataclass(frozen=True)
class Opinions:
    """The other labels of one case that a label is held against.

    Attributes:
        views: each source's labels, by the source's name.
        before: the label of an earlier round (see `quality_opinions.round_compared`), None in round 0.
        scores: label-free figures of the propagation of each view.
    """

    views: Mapping[str, Sequence[LabelVolume]]
    before: LabelVolume | None = None
    scores: Sequence[Mapping[str, float]] = field(default_factory=list)


def estimate(label: LabelVolume, opinions: Opinions) -> dict[str, float] | None:
    """Estimated Dice of a label: `mean` over classes, and each class by its value.

    Classes that neither the label nor any opinion shows are left out; with no class at all the mean is 0, since a
    label without foreground is worth a look. None where nothing is at hand to judge by.
    """
    evidence = gather(label, opinions)
    values = sorted({value for agreements in evidence.values() for value in agreements})
    found = {value: _of_class(value, evidence) for value in values}
    classes = {value: dice for value, dice in found.items() if dice is not None}
    if not evidence or (values and not classes):
        return None
    mean = float(np.mean(list(classes.values()))) if classes else 0.0
    return {"mean": round(mean, 4), **{str(value): round(dice, 4) for value, dice in classes.items()}}


def by_source(names: Sequence[str], labels: Sequence[LabelVolume]) -> dict[str, list[LabelVolume]]:
    """Labels of views named `source/view`, by source; relays' with those of registration, which they carried on."""
    grouped: dict[str, list[LabelVolume]] = {}
    for name, label in zip(names, labels, strict=True):
        source = name.split("/", 1)[0]
        grouped.setdefault("registration" if source == "relay" else source, []).append(label)
    return grouped


def gather(label: LabelVolume, opinions: Opinions) -> Evidence:
    """All evidence on a label, by kind; kinds that nothing is known of are absent."""
    everything = [view for views in opinions.views.values() for view in views]
    shown = foreground([label, *everything, *([] if opinions.before is None else [opinions.before])])
    counts = _Counts(shown, label)
    found: Evidence = {}
    if len(everything) > 1:
        found[VIEWS] = _mean([counts.dice(view) for view in everything])
    if len(opinions.views) > 1:
        found[SOURCES] = _across(opinions.views, shown)
    if opinions.before is not None:
        found[CHANGE] = counts.dice(opinions.before)
    if reverse := _reverse(opinions.scores, shown):
        found[REVERSE] = reverse
    if confidence := _confidence(opinions.scores, shown):
        found[CONFIDENCE] = confidence
    return found


def foreground(labels: Sequence[LabelVolume]) -> list[int]:
    """Label values other than background that any of the labels shows, ascending."""
    return sorted({int(value) for label in labels for value in np.flatnonzero(np.bincount(label.ravel()))} - {0})


def dice_by_class(first: LabelVolume, second: LabelVolume, values: Sequence[int]) -> dict[int, float]:
    """Dice of each value that at least one of two labels shows."""
    return {v: d for v, d in _Counts(values, first).dice(second).items() if (first == v).any() or (second == v).any()}


def logit(agreement: float) -> float:
    """Log odds, with what is all but certain clipped."""
    inside = min(max(agreement, _CLIP), 1 - _CLIP)
    return log(inside / (1 - inside))


class _Counts:
    """Dice of one label with others, its own voxels counted once."""

    def __init__(self, values: Sequence[int], label: LabelVolume) -> None:
        self._values = list(values)
        self._label = label
        self._size = _sizes(label, self._values)

    def dice(self, other: LabelVolume) -> dict[int, float]:
        """By value; 1 where neither shows it."""
        both = _sizes(other[other == self._label], self._values)
        total = self._size + _sizes(other, self._values)
        dice = np.divide(2 * both, total, out=np.ones(len(total)), where=total > 0)
        return {value: float(d) for value, d in zip(self._values, dice, strict=True)}


def _sizes(label: LabelVolume, values: Sequence[int]) -> np.ndarray:
    """Voxels of each value."""
    if not values:
        return np.zeros(0)
    return np.bincount(label.ravel(), minlength=max(values) + 1)[list(values)].astype(float)


def _mean(by_class: Sequence[Mapping[int, float]]) -> dict[int, float]:
    return {value: float(np.mean([agreement[value] for agreement in by_class])) for value in by_class[0]}


def _across(views: Mapping[str, Sequence[LabelVolume]], values: Sequence[int]) -> dict[int, float]:
    """Mean Dice between views of different propagators: unlike ones err differently."""
    groups = list(views.values())
    pairs = [(a, b) for i, one in enumerate(groups) for other in groups[i + 1 :] for a in one for b in other]
    return _mean([_Counts(values, a).dice(b) for a, b in pairs])


def _reverse(scores: Sequence[Mapping[str, float]], values: Sequence[int]) -> dict[int, float]:
    """Mean Dice of the label carried back to its support, by class where the propagator says it by class."""
    named = {
        value: [s[f"{REVERSE_SCORE}_{value}"] for s in scores if f"{REVERSE_SCORE}_{value}" in s] for value in values
    }
    overall = [s[REVERSE_SCORE] for s in scores if REVERSE_SCORE in s]
    return {value: float(np.mean(found or overall)) for value, found in named.items() if found or overall}


def _confidence(scores: Sequence[Mapping[str, float]], values: Sequence[int]) -> dict[int, float]:
    """The IoU that SAM2 predicts for its own masks, by class, mean over its views; classes without one are absent."""
    named = {value: [s[f"predicted_iou/{value}"] for s in scores if f"predicted_iou/{value}" in s] for value in values}
    return {value: float(np.mean(found)) for value, found in named.items() if found}


def _of_class(value: int, evidence: Evidence) -> float | None:
    known = {kind: agreements[value] for kind, agreements in evidence.items() if value in agreements}
    rule = rule_for(frozenset(known))
    return None if rule is None else rule(known)


def rule_for(kinds: frozenset[str]) -> Rule | None:
    """The rule that uses most of the kinds given, out of those for this sort of label; None where none applies."""
    usable = [names for names in RULES if names <= kinds]
    of_this_sort = [names for names in usable if names & TOLD_BY == kinds & TOLD_BY]
    return RULES[max(of_this_sort or usable, key=len)] if usable else None


def reverse_dice(
    propagator: Propagator, support: Support, query: Image, label: LabelVolume, view: str
) -> dict[str, float]:
    """The label of a query carried back to the annotated image, against the label that a person drew there.

    Args:
        propagator: what carried the label; one that starts from whole labels.
        support: the annotated case.
        query: the pseudo-labelled image, (C, Z, Y, X).
        label: its label, (Z, Y, X).
        view: the view to carry it back by.

    Returns:
        Scores for `Propagation.scores`: `reverse_dice_<value>` of each class of the support; 0 where it cannot be
        carried back.
    """
    if not (label > 0).any():
        return {f"{REVERSE_SCORE}_{value}": 0.0 for value in support.classes}
    results = list(propagator.propagate([Support(query, label)], [support.image], [view]))
    back = results[0].label
    if back is None:
        return {f"{REVERSE_SCORE}_{value}": 0.0 for value in support.classes}
    drawn = np.ones(back.shape, bool) if support.ignore is None else support.label != support.ignore
    dice = dice_by_class(support.label[drawn], back[drawn], support.classes)
    return {f"{REVERSE_SCORE}_{value}": d for value, d in dice.items()}


def reverse_scores(
    propagator: Propagator, supports: Sequence[Support], query: Image, results: Sequence[Propagation]
) -> dict[str, float]:
    """The reverse check of what a propagator said of a query, by its first view; nothing where it said nothing.

    A label can be carried back only to an annotated case whose every voxel is labelled: the first such one is taken.
    """
    said = [result for result in results if result.label is not None]
    whole = [support for support in supports if support.ignore is None]
    if not said or not whole:
        return {}
    fused = fuse([result.label for result in said if result.label is not None]).label
    return reverse_dice(propagator, whole[0], query, fused, said[0].view)


def _sigmoid(value: float) -> float:
    return 1 / (1 + exp(-value))
