"""The cases as nnU-Net's loader draws them: where it crops beside an ignore label, and what divergence says."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import blosc2
import numpy as np
from nnunetv2.training.dataloading.nnunet_dataset import nnUNetBaseDataset


@dataclass(frozen=True)
class Crop:
    """The boxes that a loader cuts.

    Attributes:
        drawn: size of what is cut out before augmentation, ([z,] y, x) voxels.
        final: size of what the network gets, ([z,] y, x) voxels.
    """

    drawn: tuple[int, ...]
    final: tuple[int, ...]

    def last_centre(self, shape: Sequence[int]) -> np.ndarray:
        """The centre of the last box that nnU-Net cuts of an image (Z, Y, X) without an ignore label, int64 (3,).

        A box reaches over the image's border by no more than augmentation needs, or than an image smaller than the
        box leaves empty.
        """
        drawn, final = (np.array((1, *size) if len(size) == 2 else size) for size in (self.drawn, self.final))
        padding = np.maximum(drawn - final, drawn - np.array(shape))
        start = np.array(shape) + padding // 2 + padding % 2 - drawn
        return np.asarray(start + drawn // 2)


def any_ignored(dataset: nnUNetBaseDataset, cases: Iterable[str], ignore: int) -> bool:
    """Whether the preprocessed label of any of the cases has a voxel of value `ignore`; read until one has."""
    return any(bool((dataset.load_case(case)[1][:] == ignore).any()) for case in cases)


class TrainingCases:
    """nnU-Net's dataset for a loader, with two changes that only concern labels with an ignore value.

    Boxes around a labelled voxel stay as near to the image as boxes without an ignore label do. nnU-Net centres them on
    the voxel, which in an image no larger than the patch leaves up to seven eighths of a batch empty.

    A share of the draws takes the filled label (see `fill_labels`) instead of the one with ignore: on average,
    divergence voxels learn their best guess with that weight.
    """

    def __init__(
        self, dataset: nnUNetBaseDataset, annotated_key: tuple[int, ...], crop: Crop, filled: Path, share: float
    ) -> None:
        """Args:
        dataset: nnU-Net's own.
        annotated_key: nnU-Net's key of voxels with any label in the class locations.
        crop: the boxes of the loader that draws these cases.
        filled: folder of filled labels; a case without a file there keeps its ignore voxels.
        share: of the draws that take the filled label, 0 to 1.
        """
        self.dataset = dataset
        self.annotated_key = annotated_key
        self.crop = crop
        self.filled = filled
        self.share = share
        self.identifiers: list[str] = dataset.identifiers

    def load_case(self, identifier: str) -> tuple[Any, Any, Any, dict[str, Any]]:
        """Data (C, Z, Y, X), segmentation (1, Z, Y, X), that of the previous stage or None, and properties."""
        data, seg, previous, properties = self.dataset.load_case(identifier)
        file = self.filled / f"{identifier}.b2nd"
        if self.share > 0 and np.random.uniform() < self.share and file.is_file():
            seg = blosc2.open(urlpath=str(file), mode="r", dparams={"nthreads": 1})
        return data, seg, previous, self._near(properties, data.shape[1:])

    def _near(self, properties: dict[str, Any], shape: Sequence[int]) -> dict[str, Any]:
        locations = properties["class_locations"]
        voxels = locations.get(self.annotated_key, ())
        if len(voxels) == 0:
            return properties
        limit = np.array([0, *self.crop.last_centre(shape)])
        return {
            **properties,
            "class_locations": {**locations, self.annotated_key: np.minimum(voxels, np.maximum(limit, 0))},
        }
