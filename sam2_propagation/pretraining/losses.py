"""What a predicted mask is charged for: binary cross-entropy + soft Dice, 1:1, and the error of its predicted IoU."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from sam2_propagation.pretraining.model import Prediction

IOU_WEIGHT = 0.05


def mask_loss(prediction: Prediction, target: torch.Tensor) -> torch.Tensor:
    """Mean over elements; the Dice term leaves out absent objects, whose Dice says nothing.

    Args:
        prediction: logits (elements, H, W) and IoU (elements,).
        target: float32 (elements, H, W), zeros and ones.
    """
    entropy = F.binary_cross_entropy_with_logits(prediction.logits, target)
    probability = prediction.logits.sigmoid()
    overlap = 2 * (probability * target).sum((1, 2))
    dice = 1 - (overlap + 1) / (probability.sum((1, 2)) + target.sum((1, 2)) + 1)
    present = (target.sum((1, 2)) > 0).float()
    dice_term = (dice * present).sum() / present.sum().clamp(min=1)
    iou_term = F.mse_loss(prediction.iou, intersection_over_union(prediction.logits, target))
    return entropy + dice_term + IOU_WEIGHT * iou_term


def dice_score(mask: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """Dice of boolean-like masks (elements, H, W), 1 where both are empty: (elements,)."""
    mask, target = mask.float(), target.float()
    total = mask.sum((1, 2)) + target.sum((1, 2))
    return torch.where(total > 0, 2 * (mask * target).sum((1, 2)) / total.clamp(min=1), torch.ones_like(total))


def intersection_over_union(logits: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """IoU of the thresholded prediction, without gradient: (elements,)."""
    dice = dice_score(logits.detach() > 0, target)
    return dice / (2 - dice)
