"""What an annotated case says of predictions: which structures are one connected piece, for nnU-Net's postprocessing.

nnU-Net keeps the largest piece of a structure where that raises Dice in cross-validation. Here validation is against
pseudo labels, which cannot say so; an annotated case can. What is found is written as nnU-Net writes it, for
`nnUNetv2_apply_postprocessing`.
"""

from __future__ import annotations

import os
import pickle
from pathlib import Path

import numpy as np
from nnunetv2.postprocessing.remove_connected_components import remove_all_but_largest_component_from_segmentation
from scipy import ndimage

from nnunet_oneshot.dataset import RawDataset
from sam2_propagation.interface import LabelVolume

FILE = "postprocessing.pkl"
_ALMOST_ALL = 0.99
"""Of a structure's voxels, in its largest piece: a stray voxel of a person's does not make two."""


def write_postprocessing(raw: RawDataset, folder: Path) -> list[str]:
    """Write nnU-Net's postprocessing.pkl for what is one piece in every annotated case.

    Args:
        raw: the dataset that people annotated.
        folder: of the model.

    Returns:
        The names of these structures. Where there are none, or where labels are regions, no file is left.
    """
    labels = [raw.read_label(case.label) for case in raw.annotated if case.label is not None]
    values = [] if raw.has_regions else one_piece(labels, raw.ignore)
    path = folder / FILE
    # A kill amid writing it leaves one, earlier releases under a name of its own each time.
    for unfinished in folder.glob(f"{FILE}*.new"):
        unfinished.unlink()
    if not values:
        path.unlink(missing_ok=True)
        return []
    steps = [remove_all_but_largest_component_from_segmentation] * len(values)
    folder.mkdir(parents=True, exist_ok=True)
    new = path.with_name(f"{FILE}.new")
    new.write_bytes(pickle.dumps((steps, [{"labels_or_regions": value} for value in values])))
    os.replace(new, path)
    return [raw.class_names[value] for value in values]


def one_piece(labels: list[LabelVolume], ignore: int | None) -> list[int]:
    """Values that are one connected piece in every label that shows them.

    Args:
        labels: int (Z, Y, X); those with an ignored voxel do not show what is whole and are passed over.
        ignore: the ignore label.
    """
    whole = [label for label in labels if ignore is None or not (label == ignore).any()]
    shown = sorted({int(value) for label in whole for value in np.unique(label) if value > 0})
    return [value for value in shown if all(_is_one_piece(label == value) for label in whole)]


def _is_one_piece(mask: np.ndarray) -> bool:
    # Voxels that meet at corners are connected, as for nnU-Net.
    pieces, count = ndimage.label(mask, np.ones((3,) * mask.ndim))
    return count < 2 or bool(np.bincount(pieces.ravel())[1:].max() >= _ALMOST_ALL * mask.sum())
