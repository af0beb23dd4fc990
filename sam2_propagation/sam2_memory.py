"""What the modes of the sam2 propagator share: viewed images, banks of memories, and votes for masks."""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from sam2_propagation.architecture import NO_OBJ_SCORE
from sam2_propagation.embeddings import EmbeddedStack, Frames
from sam2_propagation.interface import BoolVolume, LabelVolume
from sam2_propagation.sam2_settings import Sam2Settings
from sam2_propagation.tracker import Memories, Outcome, Tracker, at_slice_size, prompt_masks
from sam2_propagation.views import Presentation

Item = TypeVar("Item")
Value = TypeVar("Value", bound=np.generic)

WHOLE = 0.5
"""Share of a slice from which on it counts as annotated."""
_CERTAIN = 32.0
"""Logits are clipped to this before they are averaged; an absent object's -1024 would outvote everything."""


@dataclass(frozen=True)
class Window:
    """A part of every slice of a stack.

    Attributes:
        rows, columns: first and one past the last.
        size: (Y, X) of the whole slice.
    """

    rows: tuple[int, int]
    columns: tuple[int, int]
    size: tuple[int, int]

    def cut(self, stack: npt.NDArray[Value]) -> npt.NDArray[Value]:
        """(..., Y, X) to the window."""
        return stack[..., slice(*self.rows), slice(*self.columns)]

    def paste(self, stack: npt.NDArray[Value], outside: float) -> npt.NDArray[Value]:
        """What was made of the window, (N, y, x), in whole slices, (N, Y, X)."""
        whole = np.full((len(stack), *self.size), outside, stack.dtype)
        self.cut(whole)[...] = stack
        return whole


def window_around(label: LabelVolume, classes: Sequence[int], margin: float) -> Window:
    """The smallest window with all objects of a stack and a margin, at least a square where the slice has room.

    Args:
        label: int16 (N, Y, X) as shown, with at least one voxel of `classes`.
        classes: label values that count.
        margin: on each side, as a share of the objects' extent.
    """
    drawn = np.logical_or.reduce(np.isin(label, classes), axis=0)
    ends = [np.flatnonzero(drawn.any(axis=other))[[0, -1]] + (0, 1) for other in (1, 0)]
    side = max(last - first for first, last in ends) * (1 + 2 * margin)
    sizes = drawn.shape
    spans = [_span((first + last) / 2, side, size) for (first, last), size in zip(ends, sizes, strict=True)]
    return Window(spans[0], spans[1], (sizes[0], sizes[1]))


def _span(centre: float, side: float, size: int) -> tuple[int, int]:
    """As long as `side` where there is room, moved inside rather than cut."""
    length = min(size, int(np.ceil(side)))
    first = min(max(0, round(centre - length / 2)), size - length)
    return first, first + length


@dataclass(frozen=True, eq=False)
class Viewed:
    """An image in one view, encoded.

    Attributes:
        case: the case identifier.
        frames: its N slices.
        size: (Y, X) of what was encoded of a slice.
        shown: how it is shown.
        window: where in the slice as shown that lies; None where it is all of it.
    """

    case: str
    frames: EmbeddedStack
    size: tuple[int, int]
    shown: Presentation
    window: Window | None = None


@dataclass(frozen=True, eq=False)
class ViewedSupport:
    """An annotated image in one view.

    Attributes:
        image: the image.
        label: int16 (N, Y, X) as seen.
        annotated: bool (N, Y, X) as seen, False where a sparse label is silent.
    """

    image: Viewed
    label: LabelVolume
    annotated: BoolVolume

    @property
    def slices(self) -> npt.NDArray[np.intp]:
        """Indices of slices that are annotated."""
        return drawn_slices(self.annotated)


def drawn_slices(annotated: BoolVolume) -> npt.NDArray[np.intp]:
    """Indices of slices of (N, Y, X) of which at least half is annotated, or where there are none, any part.

    Seen from the side, a slice drawn in another plane is a line in every slice: that is no slice.
    """
    shares = annotated.mean(axis=(1, 2))
    return np.flatnonzero(shares >= WHOLE if (shares >= WHOLE).any() else shares > 0)


@dataclass(frozen=True, eq=False)
class Tools:
    """What every mode works with."""

    tracker: Tracker
    settings: Sam2Settings
    batch_size: int


class Bank:
    """Memories by key; keys are (class, slice) of one image."""

    def __init__(self, keys: Sequence[tuple[int, int]], memories: Memories | None) -> None:
        self._rows = {key: row for row, key in enumerate(keys)}
        self._memories = memories

    def state(self) -> dict[str, Any]:
        """All of it as lists and tensors on the CPU, for a file."""
        kept = self._memories
        tensors = None if kept is None else (kept.features.cpu(), kept.pointers.cpu())
        return {"keys": list(self._rows), "memories": tensors}

    @classmethod
    def restored(cls, state: Mapping[str, Any], device: torch.device) -> Bank:
        """The bank that `state` was taken of."""
        kept = state["memories"]
        return cls(state["keys"], None if kept is None else Memories(*(tensor.to(device) for tensor in kept)))

    def __contains__(self, key: Hashable) -> bool:
        return key in self._rows

    def slices(self, value: int) -> list[int]:
        """Slices that remember the class `value`, ascending."""
        return sorted(i for v, i in self._rows if v == value)

    def take(self, keys: Iterable[tuple[int, int]]) -> Memories:
        """The memories of `keys`, in that order."""
        assert self._memories is not None  # a key in an empty bank cannot be asked for
        return self._memories.take([self._rows[key] for key in keys])


def remember(tools: Tools, frames: Frames, label: LabelVolume, classes: Sequence[int], slices: Iterable[int]) -> Bank:
    """Prompt slices with a label's masks, each class by itself; a slice without a class is passed over for it.

    Args:
        tools: the tracker and how much it does at once.
        frames: N slices.
        label: int16 (N, Y, X).
        classes: label values that become objects.
        slices: which slices prompt.
    """
    keys = [(value, int(i)) for i in slices for value in classes if (label[i] == value).any()]
    parts = [
        tools.tracker.prompt(frames.features([i for _, i in chunk]), _masks(tools, label, chunk))[0]
        for chunk in batches(keys, tools.batch_size)
    ]
    return Bank(keys, Memories.join(parts) if parts else None)


def _masks(tools: Tools, label: LabelVolume, keys: Sequence[tuple[int, int]]) -> Tensor:
    model = tools.tracker.model
    given = torch.from_numpy(np.stack([label[i] == value for value, i in keys]))
    return prompt_masks(given, model.image_size).to(model.device)


def batches(items: Sequence[Item], size: int) -> Iterator[Sequence[Item]]:
    """Items in pieces of at most `size`."""
    for start in range(0, len(items), size):
        yield items[start : start + size]


class Votes:
    """Averages mask logits of K objects on N slices, and what the model said of them.

    Args:
        classes: K label values.
        slices: N.
        size: (Y, X) of what is averaged: the logits' own, or the slices'.
        average: "logits" or "probabilities".
    """

    def __init__(self, classes: Sequence[int], slices: int, size: tuple[int, int], average: str = "logits") -> None:
        self.classes = tuple(classes)
        self.slices = slices
        self._objects = {value: k for k, value in enumerate(self.classes)}
        self._average = average
        self._size = size
        self._sum = torch.zeros(len(self.classes), slices, *size)
        self._count = torch.zeros(len(self.classes), slices)
        # Predicted IoU, object score, stability.
        self._said = torch.zeros(3, len(self.classes), slices)

    def add(self, where: Sequence[tuple[int, int]], outcome: Outcome) -> None:
        """Count an outcome of B (class, slice) pairs."""
        k = torch.tensor([self._objects[value] for value, _ in where])
        n = torch.tensor([i for _, i in where])
        logits = at_slice_size(outcome.logits.float().cpu(), self._size)
        vote = logits.sigmoid() if self._average == "probabilities" else logits.clamp(-_CERTAIN, _CERTAIN)
        said = torch.stack([outcome.predicted_iou, outcome.object_score, outcome.stability]).float().cpu()
        self._sum.index_put_((k, n), vote, accumulate=True)
        self._count.index_put_((k, n), torch.ones(len(where)), accumulate=True)
        for total, values in zip(self._said, said, strict=True):
            total.index_put_((k, n), values, accumulate=True)

    def logits(self, index: int) -> Tensor:
        """(K, Y, X) of slice `index`; an object without a vote is absent."""
        count = self._count[:, index, None, None]
        mean = self._sum[:, index] / count.clamp(min=1)
        if self._average == "probabilities":
            mean = torch.logit(mean, eps=1e-6)
        return torch.where(count > 0, mean, torch.full_like(mean, NO_OBJ_SCORE))

    def scores(self, present: Mapping[int, npt.NDArray[np.bool_]]) -> dict[str, float]:
        """Mean predicted IoU, object score and stability over the slices where a class was found.

        Args:
            present: for each class, bool (N,).
        """
        found = np.stack([present[value] for value in self.classes]) & (self._count > 0).numpy()
        if not found.any():
            return {}
        mean = (self._said / self._count.clamp(min=1)).numpy()
        names = ("predicted_iou", "object_score", "stability")
        scores = {name: float(values[found].mean()) for name, values in zip(names, mean, strict=True)}
        for k, value in enumerate(self.classes):
            if found[k].any():
                scores[f"predicted_iou/{value}"] = float(mean[0, k][found[k]].mean())
        return scores
