"""Every number that decides what is trained, and how hard the tasks are at each step."""

from __future__ import annotations

from dataclasses import dataclass

GENERATOR = 3
"""Counts changes of what the same recipe draws, so that a run is not resumed with other tasks than it began with."""
MANY_MEMORIES_FROM = 900
"""The step from which some elements have five memories."""


@dataclass(frozen=True)
class Recipe:
    """What a run is; a run may only be resumed with the recipe it began with.

    Attributes:
        seed: all random parameters follow from it and the step.
        size: side of the images in pixels; must agree with the model configuration.
        groups: anatomies a step, over all workers.
        elements: object tasks for each anatomy.
        frames: slices for each anatomy, the first half support, the second half query.
        learning_rate, weight_decay, warmup: of AdamW.
        decay_share: share of the steps, at the end, over which the learning rate falls to zero.
        ema: decay of the averaged weights that are exported.
        hop_share: share of the steps where each prediction becomes memory of the slices after it.
        soft_share: share of the steps where prompts lose the decoder's resolution before they become memory.
        weights: sha256 of the weights that the run begins with, empty for random ones.
        practised: steps behind those weights; the curriculum goes on from there.
    """

    seed: int = 1
    size: int = 192
    groups: int = 2
    elements: int = 6
    frames: int = 4
    learning_rate: float = 5e-4
    weight_decay: float = 0.02
    warmup: int = 150
    decay_share: float = 0.25
    ema: float = 0.998
    hop_share: float = 0.2
    soft_share: float = 0.6
    weights: str = ""
    practised: int = 0


@dataclass(frozen=True)
class Difficulty:
    """How hard the tasks are.

    Attributes:
        unlike: how much the query's subject differs from the support's; 0 is not at all, 1 much.
        other_contrast: share of subject pairs whose contrasts are unrelated.
        min_area: smallest object, as a share of the image.
        damage: amount of corruption of registered masks, 0 to 1.
        absent: share of elements whose object is not in the query.
        one_volume: share of groups whose frames are all slices of one volume.
        own_memory: share of elements whose query is its own, corrupted, memory.
        gap: largest distance of neighbouring slices, in half stacks.
        crop: share of groups of which only a part is seen, as where the propagator looks around a label.
    """

    unlike: float
    other_contrast: float
    min_area: float
    damage: float
    absent: float
    one_volume: float = 0.35
    own_memory: float = 0.4
    gap: float = 0.2
    crop: float = 0.0


def curriculum(step: int) -> Difficulty:
    """The difficulty at a step: nearly equal frames and large objects first, other contrasts last.

    It depends on the step alone and not on the length of the run, so that a run can be prolonged.
    """
    return Difficulty(
        unlike=_ramp(step, 0, 700, 0.15, 1.0) + _ramp(step, 900, 1400, 0.0, 0.25),
        other_contrast=_ramp(step, 300, 900, 0.0, 0.25),
        min_area=_ramp(step, 0, 700, 0.02, 0.0015),
        damage=_ramp(step, 0, 700, 0.4, 1.0),
        absent=_ramp(step, 800, 1100, 0.0, 0.05),
        gap=_ramp(step, 0, 600, 0.06, 0.22),
        crop=_ramp(step, 500, 900, 0.0, 0.3),
    )


def memory_shares(step: int) -> dict[int, float]:
    """How often a step's elements have so many conditioning memories; more of them once one is understood."""
    if step < MANY_MEMORIES_FROM:
        return {1: 0.4, 2: 0.4, 3: 0.2}
    return {1: 0.35, 2: 0.3, 3: 0.2, 5: 0.15}


def learning_rate(recipe: Recipe, step: int, steps: int) -> float:
    """Warm-up, then constant, then a straight fall to zero over the last `decay_share` of the steps."""
    rise = min(1.0, (step + 1) / max(1, recipe.warmup))
    fall = min(1.0, (steps - step) / max(1.0, recipe.decay_share * steps))
    return recipe.learning_rate * min(rise, fall)


def _ramp(step: int, start: int, stop: int, first: float, last: float) -> float:
    share = min(1.0, max(0.0, (step - start) / (stop - start)))
    return first + (last - first) * share
