"""From votes for masks to a label, its confidence and its scores."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from scipy import ndimage
from torch import Tensor

from sam2_propagation.interface import FloatVolume, LabelVolume
from sam2_propagation.sam2_memory import Votes
from sam2_propagation.sam2_settings import Sam2Settings
from sam2_propagation.tracker import at_slice_size, fuse_objects


@dataclass(frozen=True, eq=False)
class Finished:
    """A view's label, as seen.

    Attributes:
        label: int16 (N, Y, X).
        confidence: float32 (N, Y, X), one minus the entropy in bits of the best object's probability: 0 where it is one
            half, 1 where it is certain.
        scores: label-free figures.
    """

    label: LabelVolume
    confidence: FloatVolume
    scores: dict[str, float]


def finish(
    votes: Votes, size: tuple[int, int], settings: Sam2Settings, slices: Sequence[int] | None = None
) -> Finished:
    """Fuse the objects of each slice at its own size.

    Args:
        votes: for K objects on some slices.
        size: (Y, X) as seen.
        settings: which of the published clean-ups to do.
        slices: which of them; all when None.
    """
    chosen = range(votes.slices) if slices is None else slices
    label = np.zeros((len(chosen), *size), np.int16)
    confidence = np.zeros((len(chosen), *size), np.float32)
    for at, index in enumerate(chosen):
        fused, best = fuse_objects(at_slice_size(votes.logits(index), size), votes.classes)
        label[at], confidence[at] = fused.numpy(), _certainty(best).numpy()
    if settings.largest_component:
        label = largest_components(label)
    return Finished(label, confidence, _scores(votes, label, confidence, chosen))


def largest_components(label: LabelVolume) -> LabelVolume:
    """Keep each class's largest connected component (of 26 neighbours)."""
    kept = np.zeros_like(label)
    for value in np.unique(label[label > 0]):
        parts, count = ndimage.label(label == value, np.ones((3, 3, 3)))
        sizes = np.bincount(parts.ravel(), minlength=count + 1)
        sizes[0] = 0
        kept[parts == sizes.argmax()] = value
    return kept


def _certainty(logit: Tensor) -> Tensor:
    """1 - H(sigmoid(logit)) in bits."""
    probability = logit.sigmoid()
    entropy = torch.special.entr(probability) + torch.special.entr(1 - probability)
    return (1 - entropy / np.log(2)).clamp(0, 1)


def _scores(votes: Votes, label: LabelVolume, confidence: FloatVolume, slices: Sequence[int]) -> dict[str, float]:
    present = {value: np.zeros(votes.slices, bool) for value in votes.classes}
    for value, found in present.items():
        found[list(slices)] = (label == value).any(axis=(1, 2))
    foreground = label > 0
    certain = float(confidence[foreground].mean()) if foreground.any() else 0.0
    return {**votes.scores({v: p for v, p in present.items() if v != 0} | _background(votes)), "confidence": certain}


def _background(votes: Votes) -> dict[int, np.ndarray]:
    """The background's own object says nothing of a label's quality."""
    return {0: np.zeros(votes.slices, bool)} if 0 in votes.classes else {}
