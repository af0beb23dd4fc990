"""Tasks: which slices of which subjects a step sees, which object it follows and with what memory."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

from sam2_propagation.pretraining.appearance import Look, draw_look, normalise, render, same_contrast
from sam2_propagation.pretraining.corruption import Corruption, corrupt, draw_corruption
from sam2_propagation.pretraining.parts import Subject, another_subject, cropped, draw_window, first_subject
from sam2_propagation.pretraining.recipe import Difficulty, Recipe
from sam2_propagation.pretraining.rendering import Slices, clutter, implicit_functions, paint, part_radius
from sam2_propagation.pretraining.templates import draw_parts

IntArray = npt.NDArray[np.int64]
FRESH_CORRUPTION = 0.15
"""Share of support masks that are a little wrong too, as drawn labels and earlier predictions are."""


class NoObject(ValueError):
    """No group of the batch shows an object that its tasks ask for; draw other groups."""


BEYOND_LABEL = 0.25
"""Share of self tasks where only the neighbouring slice, not the query, has a registered label."""


@dataclass(frozen=True)
class Group:
    """One anatomy seen in `frames` slices: the first half support, the second half query."""

    subjects: tuple[Subject, ...]
    owner: tuple[int, ...]
    z: tuple[float, ...]
    looks: tuple[Look, ...]


@dataclass(frozen=True)
class Elements:
    """Object tasks over the frames of a batch.

    Attributes:
        memory_frame: int64 (elements, memories), the frames that memory comes from.
        queries: int64 (elements, queries), the frame to segment and those after it, by `_path`.
        chosen: bool (elements, 1 + parts), the parts that make up the object.
        corruption: of the memory masks.
    """

    memory_frame: IntArray
    queries: IntArray
    chosen: npt.NDArray[np.bool_]
    corruption: Corruption


@dataclass(frozen=True)
class Batch:
    """One step's data.

    Attributes:
        images: float32 (frames, H, W) in [0, 1].
        memory_frame, queries: int64 as in `Elements`, on the device.
        memory_mask: float32 (elements, memories, H, W).
        true_memory_mask: the same before corruption.
        targets: float32 (elements, queries, H, W); only of the first query is it known that it shows the object.
    """

    images: torch.Tensor
    memory_frame: torch.Tensor
    memory_mask: torch.Tensor
    true_memory_mask: torch.Tensor
    queries: torch.Tensor
    targets: torch.Tensor

    @property
    def query(self) -> torch.Tensor:
        """(elements,): the first frame to segment."""
        return self.queries[:, 0]

    @property
    def target(self) -> torch.Tensor:
        """(elements, H, W): what is to be found there."""
        return self.targets[:, 0]


def draw_group(rng: np.random.Generator, difficulty: Difficulty, frames: int) -> Group:
    """Slices of one volume, or of a support subject and another subject."""
    support = first_subject(rng, draw_parts(rng))
    window = draw_window(rng, support) if rng.random() < difficulty.crop else None
    look = draw_look(rng)
    z = float(rng.uniform(-0.5, 0.4)) + _heights(rng, difficulty.gap, frames)
    if rng.random() < difficulty.one_volume:
        return Group((cropped(support, window),), (0,) * frames, tuple(z), (look,) * frames)
    half = frames // 2
    other = another_subject(rng, support, difficulty.unlike * float(rng.uniform(0.4, 1)))
    if rng.random() < difficulty.other_contrast:
        other_look = draw_look(rng)
    else:
        other_look = same_contrast(rng, look, difficulty.unlike * float(rng.uniform(0.2, 1)))
    query_z = z[:half] + rng.normal(0, 0.1 * difficulty.unlike) + rng.normal(0, 0.04 * difficulty.unlike, half)
    heights = np.concatenate([z[:half], query_z])
    subjects = (cropped(support, window), cropped(other, window))
    return Group(subjects, (0,) * half + (1,) * half, tuple(heights), (look,) * half + (other_look,) * half)


def _heights(rng: np.random.Generator, gap: float, frames: int) -> npt.NDArray[np.float64]:
    """Increasing slice positions, close or far apart; one volume in two is seen top down."""
    steps = np.cumsum(rng.uniform(0.02, max(0.04, gap * rng.uniform(0.3, 1)), frames))
    return steps if rng.random() < 0.5 else steps[::-1].copy()


def make_batch(
    groups: Sequence[Group],
    rng: np.random.Generator,
    difficulty: Difficulty,
    recipe: Recipe,
    memories: int,
    device: torch.device,
) -> Batch:
    """Render the groups and draw `recipe.elements` tasks for each.

    Args:
        groups: one or more of `draw_group`.
        rng: source of everything that is drawn here.
        difficulty: of the tasks.
        recipe: sizes.
        memories: conditioning frames for each element.
        device: where it is rendered.

    Raises:
        NoObject: nothing in these groups is large enough (or absent enough) for a task.
    """
    images, labels = render_groups(groups, rng, recipe.size, device)
    counts = _areas(labels)
    drawn = [_draw_elements(rng, counts, g, recipe, difficulty, memories) for g in range(len(groups))]
    elements = [e for group in drawn for e in group]
    if not elements:
        raise NoObject(f"expected an object of {difficulty.min_area:.2%} of the image in a slice pair, found none")
    return _gather(images, labels, _join(rng, elements))


def render_groups(
    groups: Sequence[Group], rng: np.random.Generator, size: int, device: torch.device
) -> tuple[torch.Tensor, torch.Tensor]:
    """Images (frames, H, W) in [0, 1] and label maps (frames, H, W) of all frames of all groups."""
    generator = torch.Generator(device=device)
    generator.manual_seed(int(rng.integers(2**62)))
    subjects, owner, z, looks = _flatten(groups)
    slices = Slices(subjects, owner, z)
    values = implicit_functions(slices, size, device)
    fields = clutter(slices, size, device)
    images = render(values, part_radius(slices, device), fields, [subjects[o] for o in owner], looks, generator)
    return normalise(images, owner, looks), paint(values)


def _flatten(groups: Sequence[Group]) -> tuple[list[Subject], list[int], list[float], list[Look]]:
    subjects: list[Subject] = []
    owner: list[int] = []
    for group in groups:
        owner += [o + len(subjects) for o in group.owner]
        subjects += group.subjects
    return subjects, owner, [z for g in groups for z in g.z], [k for g in groups for k in g.looks]


def _areas(labels: torch.Tensor) -> IntArray:
    """Pixels of each part in each frame, (frames, 1 + parts)."""
    n_labels = int(labels.max()) + 1
    offset = torch.arange(len(labels), device=labels.device).view(-1, 1, 1) * n_labels
    counts = torch.bincount((labels + offset).flatten(), minlength=len(labels) * n_labels)
    return counts.view(len(labels), n_labels).cpu().numpy()


@dataclass(frozen=True)
class _Element:
    memory_frame: IntArray
    amount: npt.NDArray[np.float32]
    queries: IntArray
    chosen: npt.NDArray[np.bool_]


def _draw_elements(
    rng: np.random.Generator, counts: IntArray, group: int, recipe: Recipe, difficulty: Difficulty, memories: int
) -> list[_Element]:
    """Tasks over the frames of one group; none when it shows no object that is large enough."""
    first = group * recipe.frames
    support = np.arange(first, first + recipe.frames // 2)
    queries = np.arange(first + recipe.frames // 2, first + recipe.frames)
    least = max(4.0, difficulty.min_area * recipe.size**2)
    elements = []
    for _ in range(recipe.elements):
        path = _path(rng, queries)
        chosen = _choose_object(rng, counts, support, int(path[0]), least, rng.random() < difficulty.absent)
        if chosen is None:
            continue
        areas = counts[:, chosen].sum(1)
        frames, amount = _draw_memories(rng, areas, support, int(path[0]), int(path[1]), difficulty, memories)
        elements.append(_Element(frames, amount, path, chosen))
    return elements


def _path(rng: np.random.Generator, queries: IntArray) -> IntArray:
    """The queries from any of them to one end of the stack, then to the other; what is remembered goes along."""
    start = int(rng.integers(len(queries)))
    on, back = queries[start:], queries[:start][::-1]
    if rng.random() < 0.5:
        on, back = queries[: start + 1][::-1], queries[start + 1 :]
    return np.concatenate([on, back])


def _choose_object(
    rng: np.random.Generator, counts: IntArray, support: IntArray, query: int, least: float, absent: bool
) -> npt.NDArray[np.bool_] | None:
    """The parts of an object that is in the support and, unless `absent`, in the query."""
    seen = counts[support].max(0) >= least
    there = counts[query] == 0 if absent else counts[query] >= least
    candidates = np.flatnonzero(seen & there)
    candidates = candidates[candidates > 0]
    if len(candidates) == 0:
        return None
    chosen = np.zeros(counts.shape[1], bool)
    chosen[rng.choice(candidates)] = True
    if len(candidates) > 1 and rng.random() < 0.15:
        chosen[rng.choice(candidates)] = True
    return chosen


def _draw_memories(
    rng: np.random.Generator,
    areas: IntArray,
    support: IntArray,
    query: int,
    following: int,
    difficulty: Difficulty,
    memories: int,
) -> tuple[IntArray, npt.NDArray[np.float32]]:
    """Frames of the memories and how much each mask is corrupted."""
    seen = support[areas[support] >= 4]
    frames = rng.choice(seen, memories)
    if memories > 1 and len(seen) > 1:
        frames[:2] = rng.permutation(seen)[:2]
    amount = rng.uniform(0.1, 0.4, memories) * (rng.random(memories) < FRESH_CORRUPTION)
    if areas[query] >= 4 and rng.random() < difficulty.own_memory:
        frames[0], amount[0] = query, difficulty.damage * rng.uniform(0.05, 1)
        if memories > 1 and areas[following] >= 4 and rng.random() < 0.7:
            frames[1], amount[1] = following, amount[0]
        elif areas[following] >= 4 and rng.random() < BEYOND_LABEL:
            frames[0] = following
    return frames, amount.astype(np.float32)


def _join(rng: np.random.Generator, drawn: list[_Element]) -> Elements:
    return Elements(
        memory_frame=np.stack([e.memory_frame for e in drawn]),
        queries=np.stack([e.queries for e in drawn]),
        chosen=np.stack([e.chosen for e in drawn]),
        corruption=draw_corruption(rng, np.stack([e.amount for e in drawn])),
    )


def _gather(images: torch.Tensor, labels: torch.Tensor, elements: Elements) -> Batch:
    device = images.device
    chosen = torch.from_numpy(elements.chosen).to(device)
    memory_frame, queries = (torch.from_numpy(a).to(device) for a in (elements.memory_frame, elements.queries))
    row = torch.arange(len(chosen), device=device).view(-1, 1, 1, 1)
    targets, true_mask = (chosen[row, labels[frames]].float() for frames in (queries, memory_frame))
    return Batch(images, memory_frame, corrupt(true_mask, elements.corruption), true_mask, queries, targets)
