"""The small SAM2 that is trained, and one differentiable step of it as the propagator uses it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from hydra.utils import instantiate
from omegaconf import OmegaConf
from sam2.modeling.sam2_base import SAM2Base

from sam2_propagation.checkpoints import fits, read_tensors
from sam2_propagation.errors import PropagationError
from sam2_propagation.pretraining.pairing import Batch

CONFIGURATION = Path(__file__).parent.parent / "builtin" / "builtin.yaml"
IMAGE_MEAN = (0.485, 0.456, 0.406)
IMAGE_STD = (0.229, 0.224, 0.225)
"""SAM2's own input scaling, so that the built-in and the official checkpoints take the same input."""
MOST_HOPS = 3


def build_model(configuration: Path = CONFIGURATION) -> SAM2Base:
    """An untrained model of a configuration in SAM2's own form."""
    return instantiate(OmegaConf.load(configuration).model, _recursive_=True)


def load_weights(model: SAM2Base, path: Path) -> None:
    """Put the weights of a file into a model.

    Raises:
        PropagationError: a damaged file, or weights of another configuration.
    """
    weights = read_tensors(path)
    if not fits(model, weights):
        raise PropagationError(
            f"expected weights in {path} that fit {CONFIGURATION.name}, found others; choose some that this recipe made"
        )
    model.load_state_dict(weights)


@dataclass
class Prediction:
    """Mask logits (elements, H, W) and predicted IoU (elements,) of one query each."""

    logits: torch.Tensor
    iou: torch.Tensor


@dataclass
class Features:
    """The encoded frames of a batch, in SAM2's flattened form (positions, frames, channels)."""

    maps: list[torch.Tensor]
    positions: list[torch.Tensor]
    sizes: list[tuple[int, int]]

    def of(self, frames: torch.Tensor) -> dict[str, Any]:
        """The arguments of `track_step` for these frames."""
        return {
            "current_vision_feats": [m[:, frames] for m in self.maps],
            "current_vision_pos_embeds": [p[:, frames] for p in self.positions],
            "feat_sizes": self.sizes,
        }


def encode(model: SAM2Base, images: torch.Tensor) -> Features:
    """Encode images (frames, H, W) in [0, 1], each once."""
    mean = torch.tensor(IMAGE_MEAN, device=images.device).view(1, 3, 1, 1)
    std = torch.tensor(IMAGE_STD, device=images.device).view(1, 3, 1, 1)
    output = model.forward_image((images[:, None] - mean) / std)
    _, maps, positions, sizes = model._prepare_backbone_features(output)
    return Features(maps, positions, sizes)


def remember(
    model: SAM2Base, features: Features, frames: torch.Tensor, masks: torch.Tensor, soft: bool = False
) -> dict[int, Any]:
    """Conditioning memories of frames (elements, memories) with masks (elements, memories, H, W).

    With `soft`, a mask goes through the decoder's resolution before it becomes memory, as in SAM2's video predictor;
    otherwise it becomes memory as sharp as it is. The weights serve both.
    """
    n, k = frames.shape
    output = model.track_step(
        frame_idx=0,
        is_init_cond_frame=True,
        **features.of(frames.flatten()),
        point_inputs=None,
        mask_inputs=masks.flatten(0, 1)[:, None],
        output_dict={},
        num_frames=1,
        run_mem_encoder=not soft,
    )
    if soft:
        _remember_softly(model, features.of(frames.flatten()), output)
    spatial = output["maskmem_features"].unflatten(0, (n, k))
    position = output["maskmem_pos_enc"][-1].unflatten(0, (n, k))
    pointer = output["obj_ptr"].unflatten(0, (n, k))
    return {i: _memory(spatial[:, i], position[:, i], pointer[:, i]) for i in range(k)}


def _remember_softly(model: SAM2Base, seen: dict[str, Any], output: dict[str, Any]) -> None:
    """Encode the memory of a prompted step from its masks at the decoder's resolution."""
    size = (model.image_size, model.image_size)
    masks = F.interpolate(output["pred_masks"], size=size, mode="bilinear", align_corners=False)
    output["maskmem_features"], output["maskmem_pos_enc"] = model._encode_new_memory(
        current_vision_feats=seen["current_vision_feats"],
        feat_sizes=seen["feat_sizes"],
        pred_masks_high_res=masks,
        object_score_logits=torch.full((len(masks), 1), 10.0, device=masks.device),
        is_mask_from_pts=False,
    )


def _memory(spatial: torch.Tensor, position: torch.Tensor, pointer: torch.Tensor) -> dict[str, Any]:
    return {"maskmem_features": spatial, "maskmem_pos_enc": [position], "obj_ptr": pointer}


def follow(model: SAM2Base, batch: Batch, hop: int = 0, soft: bool = True) -> list[Prediction]:
    """Segment each element's query from its memories; with `hop`, also those after it, each prediction a memory too.

    Args:
        model: in training or evaluation mode.
        batch: of `make_batch`.
        hop: 0 for the first query alone, else how many frames each query lies after the one before, 1 to MOST_HOPS.
        soft: how masks become memory, see `remember`.
    """
    features = encode(model, batch.images)
    memories = {"cond_frame_outputs": remember(model, features, batch.memory_frame, batch.memory_mask, soft)}
    first = batch.memory_frame.shape[1] + MOST_HOPS
    queries = batch.queries.T if hop else batch.queries.T[:1]
    history: dict[int, Any] = {}
    predictions = []
    for index, frame in enumerate(queries):
        place = first + index * hop
        with _watched_iou(model) as iou:
            output = model.track_step(
                frame_idx=place,
                is_init_cond_frame=False,
                **features.of(frame),
                point_inputs=None,
                mask_inputs=None,
                output_dict={**memories, "non_cond_frame_outputs": history},
                num_frames=first + len(queries) * MOST_HOPS + 1,
                run_mem_encoder=bool(hop),
            )
        history[place] = output
        predictions.append(Prediction(output["pred_masks_high_res"][:, 0], iou[-1]))
    return predictions


@contextmanager
def _watched_iou(model: SAM2Base) -> Iterator[list[torch.Tensor]]:
    """The decoder's predicted IoU, which `track_step` does not return."""
    seen: list[torch.Tensor] = []
    handle = model.sam_mask_decoder.register_forward_hook(lambda _m, _i, output: seen.append(output[1][:, 0]))
    try:
        yield seen
    finally:
        handle.remove()
