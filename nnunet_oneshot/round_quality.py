"""Whether a round went astray: whether its labels moved by more than those before are estimated to be wrong.

What is right in labels need not move. With M how far they moved and E how wrong those before were, each one less a
Dice, new labels can be right only where M is about E, and are worse where it is more than 2 E: M - E is left at the
least, as far as one less a Dice is a distance (nearly; one less Jaccard's index is one). In between it had to be seen.
The estimated Dice of the new labels says less: it mostly goes by that same move.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from nnunet_oneshot.store import MACHINE_MADE, CaseRecord

MOVED_PER_ERROR = 1.0
"""How far labels may move, as a multiple of what those before are estimated to be wrong by. On made-up sets
(`benchmarks/guard.py`) better rounds moved by 0.7 times at the most, rounds that lost up to 0.06 of Dice by 0.6 to 0.9
times, and those that lost more by 2.8 and more."""


def compare_round(agreement: Mapping[str, float], before: Mapping[str, CaseRecord]) -> dict[str, float]:
    """How far a round's labels `moved` and the estimated `error` of those before, both one less a mean Dice.

    Args:
        agreement: Dice of each case's new label with the one before.
        before: all cases as the round before has them.

    Returns:
        Means over the cases that a program labelled and whose quality is estimated; empty where there is none.
    """
    judged = [(name, r.quality) for name, r in before.items() if r.status in MACHINE_MADE and name in agreement]
    known = [(agreement[name], quality["mean"]) for name, quality in judged if quality is not None]
    if not known:
        return {}
    agreed, estimated = np.mean(known, axis=0)
    return {"moved": round(1 - float(agreed), 4), "error": round(1 - float(estimated), 4)}


def is_astray(compared: Mapping[str, float], settled: float) -> bool:
    """Whether a round of which `compare_round` found this went astray; not where its labels have settled.

    Args:
        compared: what was found; nothing where nothing is known.
        settled: mean Dice between two rounds' labels from which on they have settled.
    """
    if not compared or compared["moved"] <= 1 - settled:
        return False
    return compared["moved"] > MOVED_PER_ERROR * compared["error"]
