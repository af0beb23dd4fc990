"""Cross-patch augmentation: cells of a pseudo-labelled sample and of the annotated reference change places.

After YoloSeg (Medical Image Analysis 2026), here for 2D and 3D and inside nnU-Net's augmentation, so in the loader's
workers. YoloSeg makes a batch three times as large; here a sample is replaced, so a step costs what it costs without.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from typing import Any

import numpy as np
import torch
from batchgeneratorsv2.transforms.base.basic_transform import BasicTransform
from batchgeneratorsv2.transforms.utils.compose import ComposeTransforms
from batchgeneratorsv2.transforms.utils.remove_label import RemoveLabelTansform
from torch import Tensor

FROM_REFERENCE = 2
"""Cells with divergence that the reference replaces, at most (YoloSeg)."""
INTO_REFERENCE = 5
"""Cells of consensus that go into the reference, at most (YoloSeg)."""
CELLS_ACROSS = 4
"""Cells along the shortest in-plane edge of a patch (YoloSeg: 64 of 256 pixels)."""

Cell = tuple[slice, ...]


@dataclass(frozen=True)
class Exchange:
    """One drawn augmentation.

    Attributes:
        into_reference: True where the reference, with consensus cells of the sample, takes the sample's place; False
            where the sample gets reference cells in the place of its divergence.
        cells: what moves, from one place to the same place.
    """

    into_reference: bool
    cells: tuple[Cell, ...]


def cell_size(patch: Sequence[int], spacing: Sequence[float]) -> tuple[int, ...]:
    """Edge lengths of a cell in voxels: equal in mm as far as whole voxels and the patch allow.

    Args:
        patch: ([z,] y, x) voxels.
        spacing: ([z,] y, x) mm.
    """
    edge = min(voxels * mm for voxels, mm in zip(patch[-2:], spacing[-2:], strict=True)) / CELLS_ACROSS
    return tuple(int(np.clip(round(edge / mm), 1, voxels)) for voxels, mm in zip(patch, spacing, strict=True))


def cells(shape: Sequence[int], size: Sequence[int]) -> list[Cell]:
    """The whole cells of a grid that starts in the first voxel."""
    starts = (range(0, extent - edge + 1, edge) for extent, edge in zip(shape, size, strict=True))
    return [tuple(slice(s, s + edge) for s, edge in zip(start, size, strict=True)) for start in product(*starts)]


def draw_exchange(label: Tensor, ignore: int, size: Sequence[int], random: np.random.RandomState) -> Exchange | None:
    """Draw direction and cells for a label ([Z,] Y, X); None for a sample without divergence or without a fitting cell.

    Cells go into the reference only where they hold a label other than background: others would teach nothing.
    """
    divergent, consensus = [], []
    for cell in cells(label.shape, size):
        values = label[cell]
        if bool((values == ignore).any()):
            divergent.append(cell)
        elif bool((values > 0).any()):
            consensus.append(cell)
    if not divergent:
        return None
    into_reference = bool(random.randint(2))
    choice, most = (consensus, INTO_REFERENCE) if into_reference else (divergent, FROM_REFERENCE)
    if not choice:
        return None
    chosen = random.permutation(len(choice))[:most]
    return Exchange(into_reference, tuple(choice[index] for index in chosen))


def apply_exchange(
    sample: Mapping[str, Tensor], reference: Mapping[str, Tensor], exchange: Exchange, ignore: int, use_labels: bool
) -> dict[str, Tensor]:
    """The sample that takes part in training: image (C, [Z,] Y, X) and segmentation (K, [Z,] Y, X) of both stay as is.

    Args:
        ignore: the ignore label.
        use_labels: consensus cells keep their labels in the reference; YoloSeg marks them as divergence.
    """
    base, other = (reference, sample) if exchange.into_reference else (sample, reference)
    image, label = base["image"].clone(), base["segmentation"].clone()
    for cell in exchange.cells:
        everywhere = (slice(None), *cell)
        image[everywhere] = other["image"][everywhere]
        label[everywhere] = other["segmentation"][everywhere]
        if exchange.into_reference and not use_labels:
            label[0][cell] = ignore
    return {"image": image, "segmentation": label}


class CrossPatch(BasicTransform):
    """The augmentation as a step of nnU-Net's, where labels are whole numbers and of the final size."""

    def __init__(
        self,
        references: Iterator[Mapping[str, Tensor]],
        ignore: int,
        size: Sequence[int],
        probability: float,
        use_labels: bool,
    ) -> None:
        """Args:
        references: nnU-Net's loader of annotated cases, its batches of one sample augmented up to this step.
        ignore: the ignore label.
        size: of a cell, ([z,] y, x) voxels.
        probability: of an exchange, where the sample has divergence.
        use_labels: see `apply_exchange`.
        """
        super().__init__()
        self.references = references
        self.ignore = ignore
        self.size = tuple(size)
        self.probability = probability
        self.use_labels = use_labels

    def get_parameters(self, **data_dict: Any) -> dict[str, Any]:
        """Draw the exchange and the reference that takes part in it, or neither."""
        # nnU-Net's workers seed numpy's global state, and its own steps draw from it.
        random = np.random.RandomState(np.random.randint(2**31))
        if random.uniform() >= self.probability:
            return {"exchange": None, "reference": None}
        exchange = draw_exchange(data_dict["segmentation"][0], self.ignore, self.size, random)
        return {"exchange": exchange, "reference": None if exchange is None else self._next_reference()}

    def apply(self, data_dict: dict[str, Any], **params: Any) -> dict[str, Any]:
        """Apply what was drawn."""
        exchange, reference = params["exchange"], params["reference"]
        if exchange is None:
            return data_dict
        with torch.no_grad():
            return {**data_dict, **apply_exchange(data_dict, reference, exchange, self.ignore, self.use_labels)}

    def _next_reference(self) -> dict[str, Tensor]:
        """Image (C, [Z,] Y, X) and segmentation (K, [Z,] Y, X)."""
        batch = next(self.references)
        return {"image": batch["data"][0], "segmentation": batch["target"][0]}


def before_targets(transforms: ComposeTransforms) -> int:
    """How many of nnU-Net's steps give the final image and labels, before labels become regions or several levels."""
    kinds = [isinstance(step, RemoveLabelTansform) for step in transforms.transforms]
    return kinds.index(True) + 1
