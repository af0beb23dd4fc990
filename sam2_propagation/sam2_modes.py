"""The modes of the sam2 propagator, each from encoded slices to votes for masks.

`insert` is SSL-MedSAM2's procedure (CARE-LiSeg at MICCAI 2025) and `sequence` is YoloSeg's (Medical Image Analysis
2026); both track frame by frame. `retrieve` and `self` give every query slice a memory of its own, so that all slices
and classes go through the model in batches.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace

import numpy as np

from sam2_propagation.embeddings import Frames, SplicedFrames
from sam2_propagation.interface import LabelVolume
from sam2_propagation.matching import rank_slices
from sam2_propagation.sam2_memory import Bank, Tools, Viewed, ViewedSupport, Votes, batches, remember
from sam2_propagation.tracker import Memories, Memory, Outcome

Key = tuple[int, int, int]
"""(support, class, slice); the support is -1 for the query itself."""

_OWN = -1

Found = tuple[Sequence[tuple[int, int]], Outcome]
"""(class, slice) pairs and what a step says of them."""


def empty_votes(tools: Tools, classes: Sequence[int], slices: int, size: tuple[int, int] | None = None) -> Votes:
    """Votes for the masks of `classes` on so many slices, at the decoder's resolution or at `size`."""
    side = tools.tracker.model.image_size // 4
    return Votes(classes, slices, size or (side, side), tools.settings.average)


def insert(
    tools: Tools,
    supports: Sequence[ViewedSupport],
    query: Viewed,
    classes: Sequence[int],
    rng: np.random.Generator,
) -> Votes:
    """Insert each support's annotated slices into the query's sequence, and track out of them both ways."""
    # Logits may be averaged before they are enlarged; probabilities would not be the same then.
    size = query.size if tools.settings.average == "probabilities" else None
    votes = empty_votes(tools, classes, len(query.frames), size)
    for support in supports:
        chosen = _inserted_slices(tools, support, classes)
        own = [c for c in classes if (support.label[chosen] == c).any()]
        bank = remember(tools, support.image.frames, support.label, own, chosen)
        for position in _positions(tools, len(query.frames), rng):
            before = [(0, i) for i in range(position)]
            after = [(0, i) for i in range(position, len(query.frames))]
            which = [*before, *((1, int(i)) for i in chosen), *after]
            frames = SplicedFrames([query.frames, support.image.frames], which)
            prompts = {c: {position + chosen.index(i): i for i in bank.slices(c)} for c in own}
            counted = {f: i for f, (s, i) in enumerate(which) if s == 0}
            _track_both_ways(tools, frames, bank, prompts, votes, counted, "insert")
    return votes


def _inserted_slices(tools: Tools, support: ViewedSupport, classes: Sequence[int]) -> list[int]:
    annotated = [int(i) for i in support.slices]
    if tools.settings.whole_stack:
        return annotated
    return [i for i in annotated if np.isin(support.label[i], classes).any()]


def _positions(tools: Tools, slices: int, rng: np.random.Generator) -> list[int]:
    settings = tools.settings
    if settings.positions is not None:
        return [round(fraction * slices) for fraction in settings.positions]
    # Drawn without putting back, as published, for as long as there are places left.
    return [int(p) for p in rng.choice(slices, settings.insertions, replace=settings.insertions > slices)]


def sequence(
    tools: Tools,
    frames: Frames,
    labels: Mapping[int, LabelVolume],
    classes: Sequence[int],
    progress: Callable[[float], None] = lambda _: None,
) -> Votes:
    """Track a set of 2D images as one sequence, both ways from the annotated ones.

    Args:
        tools: the tracker and settings.
        frames: every image, in the sequence's order.
        labels: int16 (1, Y, X) of the annotated ones, by their place in the sequence.
        classes: label values.
        progress: is told of images tracked.
    """
    votes = empty_votes(tools, classes, len(frames))
    banks = {at: remember(tools, SplicedFrames([frames], [(0, at)]), lab, classes, [0]) for at, lab in labels.items()}
    others = {at: at for at in range(len(frames)) if at not in labels}
    groups = _grouped({v: [at for at in banks if (v, 0) in banks[at]] for v in classes})
    for where, values in groups.items():
        prompted = {at: banks[at].take([(value, 0) for value in values]) for at in where}
        _track_objects(
            tools, frames, values, prompted, votes, others, "sequence", lambda done: progress(done / len(groups))
        )
    return votes


def through_volume(tools: Tools, own: ViewedSupport, classes: Sequence[int], bank: Bank | None = None) -> Votes:
    """Carry the annotated slices of a volume through that volume; `bank` is their memory where it is there already."""
    frames = own.image.frames
    votes = empty_votes(tools, classes, len(frames))
    bank = bank or remember(tools, frames, own.label, classes, own.slices)
    prompts = {c: {i: i for i in bank.slices(c)} for c in classes}
    _track_both_ways(tools, frames, bank, prompts, votes, {i: i for i in range(len(frames))}, "slice")
    return votes


def _track_both_ways(
    tools: Tools,
    frames: Frames,
    bank: Bank,
    prompts: Mapping[int, Mapping[int, int]],
    votes: Votes,
    counted: Mapping[int, int],
    mode: str,
) -> None:
    """Track every class; those that are prompted on the same frames share a batch.

    Args:
        tools: the tracker.
        frames: the sequence.
        bank: memories by (class, slice).
        prompts: for each class, the slice of the bank that each prompted frame is.
        votes: is added to.
        counted: the frames that are voted on, and their slice.
        mode: the one whose `least_share` counts.
    """
    for where, values in _grouped(prompts).items():
        prompted = {f: bank.take([(value, prompts[value][f]) for value in values]) for f in where}
        _track_objects(tools, frames, values, prompted, votes, counted, mode)


def _grouped(prompts: Mapping[int, Iterable[int]]) -> dict[tuple[int, ...], list[int]]:
    """Classes by the frames that prompt them; those that nothing prompts are left out."""
    alike: dict[tuple[int, ...], list[int]] = defaultdict(list)
    for value, frames in prompts.items():
        alike[tuple(sorted(frames))].append(value)
    alike.pop((), None)
    return alike


def _track_objects(
    tools: Tools,
    frames: Frames,
    values: Sequence[int],
    prompted: Mapping[int, Memories],
    votes: Votes,
    counted: Mapping[int, int],
    mode: str,
    progress: Callable[[float], None] = lambda _: None,
) -> None:
    first, last, settings = min(prompted), max(prompted), tools.settings
    least = settings.least_share_in(mode)
    for reverse, order in ((False, range(first, len(frames))), (True, range(last, -1, -1))):
        # A fresh memory for each direction, as a reset between them.
        track = tools.tracker.track(frames, Memory(prompted), order, reverse, recent=settings.recent, least_share=least)
        for frame, outcome in track:
            if frame in counted:
                votes.add([(value, counted[frame]) for value in values], outcome)
                progress(1)


def retrieve(
    tools: Tools, supports: Sequence[ViewedSupport], banks: Sequence[Bank], query: Viewed, classes: Sequence[int]
) -> Votes:
    """Segment each query slice from the support slices that match it."""
    votes = empty_votes(tools, classes, len(query.frames))
    ranked = _ranked(tools, supports, query)
    memory = {
        (value, i): [(s, value, j) for s, j in ranking[: tools.settings.memory_slices] if (value, j) in banks[s]]
        for i, ranking in enumerate(ranked)
        for value in classes
    }
    if tools.settings.track:
        _track_from_own_memories(tools, dict(enumerate(banks)), query, classes, memory, votes)
    else:
        _segment_each(tools, dict(enumerate(banks)), query, memory, votes, "retrieve")
    return votes


def _ranked(tools: Tools, supports: Sequence[ViewedSupport], query: Viewed) -> list[list[tuple[int, int]]]:
    described = [s.image.frames.descriptors().numpy() for s in supports]
    slices = [s.slices for s in supports]
    return rank_slices(query.frames.descriptors().numpy(), described, slices, tools.settings.matching)


def itself(
    tools: Tools,
    supports: Sequence[ViewedSupport],
    banks: Sequence[Bank],
    query: Viewed,
    prompts: LabelVolume,
    classes: Sequence[int],
) -> Votes:
    """Segment each query slice from the query's own slices, which `prompts` (int16 (N, Y, X), as seen) label."""
    settings, frames = tools.settings, query.frames
    votes = empty_votes(tools, classes, len(frames))
    own = remember(tools, frames, prompts, classes, range(len(frames)))
    ranked = _ranked(tools, supports, query) if settings.support_slices else []
    memory: dict[tuple[int, int], list[Key]] = {}
    for value in classes:
        prompted = own.slices(value)
        for i in range(len(frames)):
            near = _nearest(prompted, i, settings.memory_slices, settings.margin, settings.own_slice)
            matching = ranked[i][: settings.support_slices] if near and ranked else []
            support = [(s, value, j) for s, j in matching if (value, j) in banks[s]]
            memory[value, i] = [(_OWN, value, j) for j in near] + support
    _segment_each(tools, {_OWN: own, **dict(enumerate(banks))}, query, memory, votes, "self")
    return votes


def _nearest(prompted: Sequence[int], at: int, count: int, margin: int, itself_too: bool) -> list[int]:
    """The nearest prompted slices, nearest first; none where even the nearest is further than the margin."""
    if not prompted or min(abs(j - at) for j in prompted) > margin:
        return []
    return sorted((j for j in prompted if itself_too or j != at), key=lambda j: (abs(j - at), j))[:count]


def _segment_each(
    tools: Tools,
    banks: Mapping[int, Bank],
    query: Viewed,
    memory: Mapping[tuple[int, int], Sequence[Key]],
    votes: Votes,
    mode: str,
) -> None:
    """Segment (class, slice) pairs, each from its own memory; without objects of which the decoder is in doubt."""
    for chunk, outcome in _present(tools, _outcomes(tools, banks, query, memory), mode):
        votes.add(chunk, outcome)


def _outcomes(
    tools: Tools, banks: Mapping[int, Bank], query: Viewed, memory: Mapping[tuple[int, int], Sequence[Key]]
) -> Iterator[Found]:
    """What each pair's own memory says of it; pairs that remember equally many slices share batches."""
    alike: dict[int, list[tuple[int, int]]] = defaultdict(list)
    for pair, keys in memory.items():
        alike[len(keys)].append(pair)
    for count, pairs in alike.items():
        if count == 0:
            continue
        # Pairs of one slice stay together: they look at the same features.
        for chunk in batches(sorted(pairs, key=lambda pair: pair[1]), tools.batch_size):
            prompted = _gathered(banks, [memory[pair] for pair in chunk], count, count)
            features = query.frames.features([i for _, i in chunk])
            yield chunk, tools.tracker.step(features, Memory(prompted), count, count + 1, remember=False)


def _present(tools: Tools, outcomes: Iterable[Found], mode: str) -> Iterator[Found]:
    """The outcomes, without objects whose predicted IoU falls too far short of the highest of their class."""
    share = tools.settings.least_share_in(mode)
    if not share or not tools.tracker.blind_to_absence:
        yield from outcomes
        return
    best: dict[int, float] = defaultdict(float)
    kept = list(outcomes)
    for chunk, outcome in kept:
        for (value, _), iou in zip(chunk, outcome.predicted_iou.tolist(), strict=True):
            best[value] = max(best[value], iou)
    for chunk, outcome in kept:
        yield chunk, outcome.without_doubted(outcome.predicted_iou.new_tensor([share * best[v] for v, _ in chunk]))


def _gathered(banks: Mapping[int, Bank], keys: Sequence[Sequence[Key]], at: int, side: int) -> dict[int, Memories]:
    """Conditioning frames before `at` (or behind it, for a negative `side`); the best match is the nearest."""
    step = 1 if side > 0 else -1
    ranks = range(len(keys[0]))
    return {at - step * (rank + 1): _taken(banks, [pair[rank] for pair in keys]) for rank in reversed(ranks)}


def _taken(banks: Mapping[int, Bank], keys: Iterable[Key]) -> Memories:
    return Memories.join([banks[s].take([(value, i)]) for s, value, i in keys])


def _track_from_own_memories(
    tools: Tools,
    banks: Mapping[int, Bank],
    query: Viewed,
    classes: Sequence[int],
    memory: Mapping[tuple[int, int], Sequence[Key]],
    votes: Votes,
) -> None:
    """As `_segment_each`, but each slice also remembers what was found on the slices before it, in both directions."""
    for pairs, outcome in _present(tools, _tracked_outcomes(tools, banks, query, classes, memory), "retrieve"):
        votes.add(pairs, outcome)


def _tracked_outcomes(
    tools: Tools,
    banks: Mapping[int, Bank],
    query: Viewed,
    classes: Sequence[int],
    memory: Mapping[tuple[int, int], Sequence[Key]],
) -> Iterator[Found]:
    """What each pair's own memory says of it with what was found before; of what is doubted so far, nothing is kept."""
    count = len(query.frames)
    share = tools.settings.least_share_in("retrieve") if tools.tracker.blind_to_absence else 0.0
    for value in classes:
        for reverse in (False, True):
            bank, best = Memory({}), 0.0
            for i in range(count - 1, -1, -1) if reverse else range(count):
                keys = memory[value, i]
                if not keys:
                    continue
                bank.prompted = _gathered(banks, [keys], i, -1 if reverse else 1)
                outcome = tools.tracker.step(query.frames.features([i]), bank, i, count, reverse)
                assert outcome.memories is not None
                iou = float(outcome.predicted_iou)
                best = max(best, iou)
                if not share or iou >= share * best:
                    bank.tracked[i] = outcome.memories
                tools.tracker.forget(bank, i, tools.settings.recent)
                yield [(value, i)], replace(outcome, memories=None)
