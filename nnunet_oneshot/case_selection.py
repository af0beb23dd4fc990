"""Which cases train and validate, and how often each is drawn: pure functions over names for the trainer's split."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from math import ceil, gcd

from nnunet_oneshot.errors import OneShotError
from nnunet_oneshot.settings import OneShotBlock

FOLDS = 5
"""nnU-Net's number of folds; it cannot split fewer cases than that by itself."""
_STEPS = 20
"""Weights are rounded to this fraction of 1."""


def dealt_split(cases: Sequence[str], fold: int, annotated: Sequence[str] = ()) -> tuple[list[str], list[str]]:
    """Training and validation cases of a fold where there is no splits_final.json.

    Cases without a person's label are dealt out over the folds; where they are fewer than folds, or none, one case
    validates. A single case trains and validates.
    """
    candidates = sorted(set(cases) - set(annotated)) or sorted(cases)
    held_out = candidates[fold::FOLDS] or [candidates[fold % len(candidates)]]
    return sorted(set(cases) - set(held_out)) or held_out, held_out


def usable_split(train: Sequence[str], validation: Sequence[str], block: OneShotBlock) -> tuple[list[str], list[str]]:
    """A split without the cases left out and with every annotated case in training.

    Annotated cases do not validate unless nothing else is left to, or unless every case validates (fold `all`). Where a
    person labelled every usable case, there is no pseudo label to keep apart, and the split stays as it is.

    Raises:
        OneShotError: nothing is left to train on.
    """
    usable = (set(train) | set(validation) | set(block.annotated)) - set(block.left_out)
    if not usable:
        raise OneShotError(
            f"expected at least one case to train on, found all {len(block.left_out)} in left_out; "
            "annotate a case or accept labels in the review"
        )
    annotated = usable & set(block.annotated)
    always = annotated if annotated != usable else set()
    training = sorted((set(train) & usable) | always)
    if set(train) == set(validation):
        return training, training
    held_out = sorted((set(validation) & usable) - always)
    return training or held_out, held_out or sorted(annotated) or training


def drawn_by_weight(cases: Sequence[str], weights: Mapping[str, float]) -> list[str]:
    """Each case as often as its weight says (1 where it has none), for a loader that draws names evenly.

    Weights are rounded to steps of 1/20; a case of weight 0 is not drawn. Equal weights give the cases themselves.

    Raises:
        OneShotError: every weight is 0.
    """
    counts = {case: _count(weights.get(case, 1.0)) for case in cases}
    divisor = gcd(*counts.values())
    if divisor == 0:
        raise OneShotError(f"expected a case_weight above 0 among {len(cases)} training cases, found none; raise one")
    return [case for case, count in counts.items() for _ in range(count // divisor)]


def with_share(drawn: Sequence[str], favoured: Collection[str], share: float) -> list[str]:
    """Names for a loader that draws evenly, the favoured ones repeated until they are at least `share` of the draws.

    Nothing is repeated where they are that already, where there are none, or where there are no others.

    Raises:
        OneShotError: a share outside [0, 1).
    """
    if not 0 <= share < 1:
        raise OneShotError(f"expected an annotated_share in [0, 1), found {share}; correct it")
    chosen = [case for case in drawn if case in favoured]
    others = len(drawn) - len(chosen)
    if not chosen or not others:
        return list(drawn)
    wanted = ceil(share / (1 - share) * others / len(chosen))
    return [*drawn, *(chosen * max(0, wanted - 1))]


def by_author(keys: Sequence[str], annotated: Collection[str]) -> dict[str, list[int]]:
    """Positions of a batch's samples by whose labels they have: "annotated" and "pseudo", only those that occur."""
    authors: dict[str, list[int]] = {}
    for position, key in enumerate(keys):
        authors.setdefault("annotated" if key in annotated else "pseudo", []).append(position)
    return authors


def _count(weight: float) -> int:
    return max(1, round(weight * _STEPS)) if weight > 0 else 0
