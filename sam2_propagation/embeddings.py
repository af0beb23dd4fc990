"""Encode every slice of a view once, and keep what the tracker needs of it.

The encoder is most of SAM2's cost, so its output is kept for all supports, objects, directions and insertions that
look at the slice again. It is kept in float32, so that keeping changes no result: a slice of hiera-tiny takes 4 MiB at
512 pixels and 16 MiB at 1024. Stacks beyond a budget of RAM go to a memory-mapped temporary file, which the operating
system drops from RAM as it needs to; memory is therefore bounded for any number of slices, and a window that encodes
slices anew (what the stock predictor does) is not needed.
"""

from __future__ import annotations

import shutil
import tempfile
import weakref
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from sam2_propagation.architecture import SAM2Base
from sam2_propagation.errors import PropagationError

DEFAULT_BUDGET = 3 << 30
"""Bytes of RAM for embeddings before they go to a file."""

_DESCRIPTOR_GRID = 4


class Slices(Protocol):
    """Something that hands out normalised slices, (B, 3, S, S) float32, S being the model's input size."""

    def __len__(self) -> int: ...

    def batch(self, indices: Sequence[int]) -> Tensor:
        """The slices at `indices`."""


@dataclass(frozen=True, eq=False)
class Features:
    """What SAM2 takes of B frames, in its own layout.

    Attributes:
        maps: feature maps from fine to coarse, each (H * W, B, C).
        positions: their position encodings, same shapes.
        sizes: (H, W) of each.
    """

    maps: list[Tensor]
    positions: list[Tensor]
    sizes: list[tuple[int, int]]

    @property
    def count(self) -> int:
        """B, the number of frames."""
        return self.maps[-1].shape[1]

    def expand(self, count: int) -> Features:
        """One frame as `count` equal ones, without copies."""
        return Features(
            [m.expand(-1, count, -1) for m in self.maps], [p.expand(-1, count, -1) for p in self.positions], self.sizes
        )


class Frames(Protocol):
    """A sequence of encoded frames."""

    def __len__(self) -> int: ...

    def features(self, indices: Sequence[int]) -> Features:
        """Features of the frames at `indices`, which may repeat."""


class EmbeddedStack:
    """Features of N slices, in RAM or in a temporary file that goes when the stack does.

    Args:
        levels: per feature level (N, C, H, W), fine to coarse, on the CPU.
        positions: per level (1, C, H, W), on the model's device.
    """

    def __init__(self, levels: list[Tensor], positions: list[Tensor]) -> None:
        self._levels = levels
        self._encodings = positions
        self._positions = [p.flatten(2).permute(2, 0, 1) for p in positions]
        self._sizes = [(int(level.shape[-2]), int(level.shape[-1])) for level in levels]
        self._device = positions[-1].device

    def __len__(self) -> int:
        return len(self._levels[-1])

    @property
    def nbytes(self) -> int:
        """Bytes of all features."""
        return sum(level.nbytes for level in self._levels)

    def state(self) -> dict[str, list[Tensor]]:
        """All of it as tensors on the CPU, for a file."""
        return {"levels": self._levels, "positions": [p.cpu() for p in self._encodings]}

    @classmethod
    def restored(cls, state: Mapping[str, list[Tensor]], device: torch.device) -> EmbeddedStack:
        """The stack that `state` was taken of."""
        return cls(state["levels"], [p.to(device) for p in state["positions"]])

    def features(self, indices: Sequence[int]) -> Features:
        """Features of the slices at `indices`, on the model's device."""
        index = torch.as_tensor(indices, dtype=torch.long)
        maps = [level[index].to(self._device).flatten(2).permute(2, 0, 1) for level in self._levels]
        return Features(maps, [p.expand(-1, len(index), -1) for p in self._positions], self._sizes)

    def descriptors(self) -> Tensor:
        """(N, D) float32: the coarsest map averaged over a 4x4 grid, for comparing slices with each other."""
        coarsest = self._levels[-1]
        # A memory-mapped stack is read in pieces, not as a whole.
        pieces = [F.adaptive_avg_pool2d(piece.float(), _DESCRIPTOR_GRID) for piece in coarsest.split(32)]
        return torch.cat(pieces).flatten(1)


class SplicedFrames:
    """Frames of several sequences as one: frame i is `frames[which[i][0]]` at `which[i][1]`. Nothing is copied."""

    def __init__(self, frames: Sequence[Frames], which: Sequence[tuple[int, int]]) -> None:
        self._frames = frames
        self._which = which

    def __len__(self) -> int:
        return len(self._which)

    def features(self, indices: Sequence[int]) -> Features:
        """Features of the frames at `indices`, in that order."""
        parts = [self._frames[self._which[i][0]].features([self._which[i][1]]) for i in indices]
        if len(parts) == 1:
            return parts[0]
        maps = [torch.cat(level, dim=1) for level in zip(*[p.maps for p in parts], strict=True)]
        positions = [torch.cat(level, dim=1) for level in zip(*[p.positions for p in parts], strict=True)]
        return Features(maps, positions, parts[0].sizes)


class Encoder:
    """Runs the image encoder in batches, and places what it gives in RAM or on disk.

    Args:
        model: whose `forward_image` is called, once for every batch of distinct slices.
        batch_size: slices at once.
        budget: bytes of RAM for all living stacks together; a stack that does not fit goes to a file.
        folder: where such files lie; the system's temporary folder when None.
    """

    def __init__(
        self, model: SAM2Base, batch_size: int = 4, budget: int = DEFAULT_BUDGET, folder: Path | None = None
    ) -> None:
        self._model = model
        self._batch_size = max(1, batch_size)
        self._budget = budget
        self._folder = folder
        self._in_use = 0

    @torch.inference_mode()
    def encode(self, slices: Slices, progress: Callable[[int], None] = lambda _: None) -> EmbeddedStack:
        """Encode all slices, each exactly once; `progress` is told after each batch how many it had."""
        count = len(slices)
        levels: list[Tensor] = []
        positions: list[Tensor] = []
        directory: tempfile.TemporaryDirectory[str] | None = None
        for start in range(0, count, self._batch_size):
            maps, encodings = self._forward(slices.batch(range(start, min(start + self._batch_size, count))))
            if not levels:
                levels, directory = self._allocate(count, maps)
                positions = [e[:1] for e in encodings]
            for level, piece in zip(levels, maps, strict=True):
                level[start : start + len(piece)] = piece
            progress(len(levels[0][start : start + self._batch_size]))
        return self._tracked(EmbeddedStack(levels, positions), directory)

    def _forward(self, batch: Tensor) -> tuple[list[Tensor], list[Tensor]]:
        out = self._model.forward_image(batch.to(self._model.device))
        used = self._model.num_feature_levels
        return out["backbone_fpn"][-used:], out["vision_pos_enc"][-used:]

    def _allocate(self, count: int, maps: list[Tensor]) -> tuple[list[Tensor], tempfile.TemporaryDirectory[str] | None]:
        shapes = [(count, *m.shape[1:]) for m in maps]
        needed = sum(4 * int(np.prod(shape)) for shape in shapes)
        if self._in_use + needed <= self._budget:
            return [torch.empty(shape) for shape in shapes], None
        _check_room(Path(self._folder or tempfile.gettempdir()), needed)
        directory = tempfile.TemporaryDirectory(prefix="sam2_embeddings_", dir=self._folder, ignore_cleanup_errors=True)
        paths = [Path(directory.name) / f"level{i}" for i in range(len(shapes))]
        mapped = [np.memmap(p, np.float32, "w+", shape=shape) for p, shape in zip(paths, shapes, strict=True)]
        return [torch.from_numpy(array) for array in mapped], directory

    def _tracked(self, stack: EmbeddedStack, directory: tempfile.TemporaryDirectory[str] | None) -> EmbeddedStack:
        if directory is not None:
            weakref.finalize(stack, directory.cleanup)
        else:
            self._in_use += stack.nbytes
            weakref.finalize(stack, self._release, stack.nbytes)
        return stack

    def _release(self, nbytes: int) -> None:
        self._in_use -= nbytes


def _check_room(folder: Path, needed: int) -> None:
    """A mapped file on a full disk would end the process without a word."""
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise PropagationError(
            f"expected {needed / 2**30:.1f} GiB free in {folder} for encoded slices, found {free / 2**30:.1f}; "
            "set TMPDIR to a folder with more room, or use a checkpoint of smaller input"
        )
