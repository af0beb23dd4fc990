"""SAM2's memory tracking over frames that are encoded already.

The arithmetic is that of sam2's video predictor (Ravi et al., arXiv 2408.00714), step by step through
`SAM2Base.track_step`; what differs is who keeps the memory. Here it is kept as tensors whose first axis runs over
objects, or over (object, slice) pairs that do not depend on each other, so that one step serves all of them. As in that
predictor, a mask prompt becomes memory after it has been brought to the decoder's resolution and back, and memories are
kept in bfloat16. Points, boxes and corrections of tracked frames are not offered: labels prompt.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from scipy import ndimage
from torch import Tensor

from sam2_propagation.architecture import NO_OBJ_SCORE, SAM2Base
from sam2_propagation.embeddings import Features, Frames

_STABILITY_OFFSET = 1.0
_FILLED = 0.1


@dataclass(frozen=True, eq=False)
class Memories:
    """What is remembered of B (frame, object) pairs.

    Attributes:
        features: (B, M, h, w) bfloat16, memory features.
        pointers: (B, C), object pointers.
    """

    features: Tensor
    pointers: Tensor

    def take(self, indices: Sequence[int] | Tensor) -> Memories:
        """The pairs at `indices`, which may repeat."""
        index = torch.as_tensor(indices, dtype=torch.long, device=self.features.device)
        return Memories(self.features[index], self.pointers[index])

    @staticmethod
    def join(parts: Sequence[Memories]) -> Memories:
        """Several as one, in order."""
        return Memories(torch.cat([p.features for p in parts]), torch.cat([p.pointers for p in parts]))


@dataclass(frozen=True, eq=False)
class Outcome:
    """What a step says of B (frame, object) pairs.

    Attributes:
        logits: (B, s, s) float32 mask logits, s being a quarter of the input size; -1024 where a head for the object's
            presence says that it is absent.
        predicted_iou: (B,), the decoder's own estimate of the mask's IoU.
        object_score: (B,), logit of the object's presence; 10 throughout for models without that head.
        memories: what to remember of them, or None when that was not asked for.
    """

    logits: Tensor
    predicted_iou: Tensor
    object_score: Tensor
    memories: Memories | None = None

    def without_doubted(self, least_iou: Tensor) -> Outcome:
        """Objects whose predicted IoU is below (B,) are absent, the surer the lower it is: their logits change sign.

        For models without a head for an object's presence; those with one say so themselves.
        """
        absent = self.predicted_iou < least_iou
        doubt = 1 - self.predicted_iou.clamp(min=0) / least_iou.clamp(min=1e-6)
        flipped = -self.logits.abs() * doubt[:, None, None]
        return replace(self, logits=torch.where(absent[:, None, None], flipped, self.logits))

    @property
    def stability(self) -> Tensor:
        """(B,): IoU of the masks above +1 and above -1, one where both are empty (SAM's stability score)."""
        flat = self.logits.flatten(1)
        inner, outer = (flat > _STABILITY_OFFSET).sum(1), (flat > -_STABILITY_OFFSET).sum(1)
        return torch.where(outer > 0, inner / outer.clamp(min=1), torch.ones_like(inner, dtype=torch.float32))


@dataclass
class Memory:
    """The memory bank of B objects: prompted frames, and frames tracked so far, by frame number."""

    prompted: Mapping[int, Memories]
    tracked: dict[int, Memories] = field(default_factory=dict)


class Tracker:
    """Tracks objects through encoded frames.

    Args:
        model: in evaluation mode.
        fill_hole_area: fill holes of masks up to that many pixels of the decoder's resolution, as sam2 does (with 8)
            where its CUDA extension was built; 0 for never, which is what it does elsewhere.
    """

    def __init__(self, model: SAM2Base, fill_hole_area: int = 0) -> None:
        self.model = model
        self._fill_hole_area = fill_hole_area
        # The video predictor runs each object as a batch of its own, where this option does nothing; here objects
        # share a batch, where it would make them compete.
        model.non_overlap_masks_for_mem_enc = False
        self._position: Tensor | None = None

    @property
    def blind_to_absence(self) -> bool:
        """Whether the model has no head for an object's presence."""
        return not self.model.pred_obj_scores

    @torch.inference_mode()
    def prompt(self, features: Features, masks: Tensor) -> tuple[Memories, Outcome]:
        """Turn masks into memories.

        Args:
            features: of B frames.
            masks: (B, S, S) float32 in {0, 1} at the model's input size; an empty one says that the object is absent.
        """
        empty: dict[str, dict[int, Any]] = {"cond_frame_outputs": {}, "non_cond_frame_outputs": {}}
        out, iou = self._track_step(features, masks[:, None], 0, empty, 1, False, False)
        logits = self._filled(out["pred_masks"])
        size = (self.model.image_size, self.model.image_size)
        stored, _ = self.model._encode_new_memory(
            current_vision_feats=features.maps,
            feat_sizes=features.sizes,
            pred_masks_high_res=F.interpolate(logits, size=size, mode="bilinear", align_corners=False),
            object_score_logits=out["object_score_logits"],
            is_mask_from_pts=True,
        )
        memories = Memories(stored.to(torch.bfloat16), out["obj_ptr"])
        return memories, Outcome(logits[:, 0], iou, out["object_score_logits"][:, 0], memories)

    @torch.inference_mode()
    def step(
        self, features: Features, memory: Memory, frame: int, count: int, reverse: bool = False, remember: bool = True
    ) -> Outcome:
        """Segment frame number `frame` of `count` from memory.

        Args:
            features: of the frame, B times (or of B frames that do not depend on each other).
            memory: of B pairs; not changed.
            frame: the number that temporal distances are counted from.
            count: of frames in the sequence; it limits the number of object pointers.
            reverse: tracking towards lower numbers.
            remember: also encode what is found, for later steps.
        """
        bank = {
            "cond_frame_outputs": {t: self._stored(m) for t, m in memory.prompted.items()},
            "non_cond_frame_outputs": {t: self._stored(m) for t, m in memory.tracked.items()},
        }
        out, iou = self._track_step(features, None, frame, bank, count, reverse, remember)
        logits = self._filled(out["pred_masks"])[:, 0]
        memories = Memories(out["maskmem_features"].to(torch.bfloat16), out["obj_ptr"]) if remember else None
        return Outcome(logits, iou, out["object_score_logits"][:, 0], memories)

    def track(
        self,
        frames: Frames,
        memory: Memory,
        order: Iterable[int],
        reverse: bool = False,
        keep: bool = False,
        recent: int | None = None,
        least_share: float = 0.0,
    ) -> Iterator[tuple[int, Outcome]]:
        """Track through the frames in `order`, passing over prompted ones, and yield each frame's outcome.

        `memory.tracked` grows as it goes; unless `keep`, what no later frame of this direction can look at is dropped,
        and with `recent` all but that many of the latest. An object is absent
        from a frame where its predicted IoU is below `least_share` of the highest so far, and is then remembered as it
        last was; for models without a head for an object's presence.
        """
        best: Tensor | None = None
        for frame in order:
            if frame in memory.prompted:
                continue
            objects = len(next(iter(memory.prompted.values())).pointers)
            features = frames.features([frame]).expand(objects)
            outcome = self.step(features, memory, frame, len(frames), reverse)
            if least_share and self.blind_to_absence:
                found = outcome.predicted_iou
                best = found if best is None else torch.maximum(best, found)
                outcome = _without_doubted(outcome, least_share * best, memory, frame + 1 if reverse else frame - 1)
            if outcome.memories is not None:
                memory.tracked[frame] = outcome.memories
            if not keep:
                self.forget(memory, frame, recent)
            yield frame, replace(outcome, memories=None)

    def forget(self, memory: Memory, frame: int, recent: int | None = None) -> None:
        """Drop what no step beyond `frame` can look at any more, or all but the `recent` latest frames."""
        model = self.model
        reach = max(model.num_maskmem * model.memory_temporal_stride_for_eval, model.max_obj_ptrs_in_encoder)
        if recent is not None:
            reach = recent - 1
        for old in [t for t in memory.tracked if abs(t - frame) > reach]:
            del memory.tracked[old]

    def _track_step(
        self,
        features: Features,
        masks: Tensor | None,
        frame: int,
        bank: dict[str, dict[int, Any]],
        count: int,
        reverse: bool,
        remember: bool,
    ) -> tuple[dict[str, Any], Tensor]:
        with _decoder_outputs(self.model) as outputs:
            out = self.model.track_step(
                frame_idx=frame,
                is_init_cond_frame=masks is not None,
                current_vision_feats=features.maps,
                current_vision_pos_embeds=features.positions,
                feat_sizes=features.sizes,
                point_inputs=None,
                mask_inputs=masks,
                output_dict=bank,
                num_frames=count,
                track_in_reverse=reverse,
                run_mem_encoder=remember,
            )
        # A mask given as the output of its own frame is certain; otherwise the best of the candidates was chosen.
        certain = masks is not None and self.model.use_mask_input_as_output_without_sam
        iou = torch.ones(features.count) if certain else outputs[-1][1].amax(dim=1)
        return out, iou.to(out["pred_masks"].device)

    def _stored(self, memories: Memories) -> dict[str, Any]:
        if self._position is None:
            # It depends on the map's size alone; the memories may come from another process.
            self._position = self.model.memory_encoder.position_encoding(memories.features[:1].float())
        position = self._position.expand(len(memories.pointers), -1, -1, -1)
        return {
            # Stacked with float32 pointers, bfloat16 features would become float32 anyhow; without pointers they
            # would meet float32 weights.
            "maskmem_features": memories.features.float(),
            "maskmem_pos_enc": [position],
            "obj_ptr": memories.pointers,
        }

    def _filled(self, logits: Tensor) -> Tensor:
        return fill_holes(logits, self._fill_hole_area) if self._fill_hole_area else logits


def _without_doubted(outcome: Outcome, least_iou: Tensor, memory: Memory, before: int) -> Outcome:
    """The outcome of a step after frame `before`; what is doubted is remembered as it last was."""
    absent = outcome.predicted_iou < least_iou
    memories = outcome.memories
    if memories is not None and absent.any():
        memories = _held(memories, absent, memory, before)
    return replace(outcome.without_doubted(least_iou), memories=memories)


def _held(found: Memories, absent: Tensor, memory: Memory, before: int) -> Memories:
    """What was found, but for absent objects what is remembered of the frame before, or of the nearest prompted one."""
    last = memory.tracked.get(before)
    if last is None:
        last = memory.prompted[min(memory.prompted, key=lambda frame: abs(frame - before))]
    features = torch.where(absent[:, None, None, None], last.features, found.features)
    return Memories(features, torch.where(absent[:, None], last.pointers, found.pointers))


@contextmanager
def _decoder_outputs(model: SAM2Base) -> Iterator[list[Any]]:
    """`track_step` does not hand on the predicted IoUs, so they are read where they leave the decoder."""
    outputs: list[Any] = []
    handle = model.sam_mask_decoder.register_forward_hook(lambda _module, _args, output: outputs.append(output))
    try:
        yield outputs
    finally:
        handle.remove()


def fill_holes(logits: Tensor, area: int) -> Tensor:
    """Raise background islands of at most `area` pixels (8-connected) to a small positive logit, as sam2 does.

    Args:
        logits: (B, 1, H, W).
        area: pixels.
    """
    filled = logits.clone()
    for mask in filled[:, 0]:
        islands, count = ndimage.label((mask <= 0).cpu().numpy(), np.ones((3, 3)))
        if count:
            small = np.bincount(islands.ravel()) <= area
            small[0] = False
            mask[torch.from_numpy(small[islands]).to(mask.device)] = _FILLED
    return filled


def prompt_masks(masks: Tensor, image_size: int) -> Tensor:
    """Bring binary masks to the model's input size as sam2 does: smoothed, then halved.

    Args:
        masks: (B, Y, X), any dtype, nonzero is foreground.
        image_size: S.

    Returns:
        (B, S, S) float32 in {0, 1}; a mask much thinner than a pixel of the smaller grid may vanish.
    """
    given = (masks != 0).float()
    if given.shape[-2:] == (image_size, image_size):
        return given
    size = (image_size, image_size)
    resized = F.interpolate(given[:, None], size=size, mode="bilinear", align_corners=False, antialias=True)
    return (resized[:, 0] >= 0.5).float()


def at_slice_size(logits: Tensor, size: tuple[int, int]) -> Tensor:
    """Bring mask logits (K, s, s) to a slice's own (Y, X), as sam2 does: (K, Y, X)."""
    if logits.shape[-2:] == size:
        return logits
    return F.interpolate(logits[None], size=size, mode="bilinear", align_corners=False)[0]


def fuse_objects(logits: Tensor, classes: Sequence[int]) -> tuple[Tensor, Tensor]:
    """One label of several objects' logits: the largest logit wins where it is positive, else background.

    Args:
        logits: (K, Y, X).
        classes: K label values.

    Returns:
        label (Y, X) int16, and the largest logit (Y, X).
    """
    best, index = logits.max(dim=0)
    values = torch.as_tensor(classes, dtype=torch.int16, device=logits.device)
    return torch.where(best > 0, values[index], torch.zeros_like(index, dtype=torch.int16)), best


def absent(count: int, model: SAM2Base) -> Tensor:
    """(count, s, s): the logits of objects that are not there."""
    side = model.image_size // 4
    return torch.full((count, side, side), NO_OBJ_SCORE)
