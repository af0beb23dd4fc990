"""The tracker gives what sam2's own video predictor gives, and says more about it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from hydra.utils import instantiate
from omegaconf import OmegaConf
from sam2.sam2_video_predictor import SAM2VideoPredictor
from sam2_tiny import enliven, tiny_config
from torch import Tensor

from sam2_propagation.architecture import at_size, build_sam2, known_configurations
from sam2_propagation.embeddings import Encoder
from sam2_propagation.tracker import Memories, Memory, Tracker, at_slice_size, fill_holes, fuse_objects, prompt_masks

FRAMES, HEIGHT, WIDTH = 9, 50, 70
PROMPTS = {1: (3, 4), 2: (4,)}
"""Frames that prompt each object."""


def _video(image_size: int) -> Tensor:
    """Smooth frames that change slowly, as neighbouring slices do."""
    noise = torch.randn(FRAMES + 4, 3, 8, 8, generator=torch.Generator().manual_seed(1))
    blended = torch.stack([noise[i : i + 5].mean(0) for i in range(FRAMES)])
    return torch.nn.functional.interpolate(2 * blended, size=(image_size, image_size), mode="bicubic")


def _mask(obj: int, frame: int) -> Tensor:
    y, x = torch.meshgrid(torch.arange(HEIGHT), torch.arange(WIDTH), indexing="ij")
    return (y - 20 - frame) ** 2 + (x - 20 * obj) ** 2 < (6 + 2 * obj) ** 2


class _Tensors:
    def __init__(self, data: Tensor) -> None:
        self.data = data

    def __len__(self) -> int:
        return len(self.data)

    def batch(self, indices: Sequence[int]) -> Tensor:
        return self.data[list(indices)]


def stock_predictor(config: dict[str, Any], video_settings: bool) -> SAM2VideoPredictor:
    """sam2's own predictor, with weights that our `build_sam2` draws from the same seed."""
    torch.manual_seed(0)
    ours = build_sam2(config, video_settings)
    enliven(ours)
    tree = dict(config["model"], _target_="sam2.sam2_video_predictor.SAM2VideoPredictor")
    if video_settings:
        tree["binarize_mask_from_pts_for_mem_enc"] = True
        tree["sam_mask_decoder_extra_args"] = {
            "dynamic_multimask_via_stability": True,
            "dynamic_multimask_stability_delta": 0.05,
            "dynamic_multimask_stability_thresh": 0.98,
        }
    stock = instantiate(OmegaConf.create(tree)).eval()
    stock.load_state_dict(ours.state_dict())
    # Without a pointer in the past the stock predictor only runs under autocast: bfloat16 memory meets float32 weights.
    stock.memory_attention.register_forward_pre_hook(
        lambda _m, args, kw: (args, {**kw, "memory": kw["memory"].float()}), with_kwargs=True
    )
    return stock


def _stock_logits(stock: SAM2VideoPredictor, video: Tensor, monkeypatch: pytest.MonkeyPatch, reset: bool) -> Tensor:
    """(direction, object, frame, Y, X); NaN where a direction does not go."""
    monkeypatch.setattr("sam2.sam2_video_predictor.load_video_frames", lambda **_: (video, HEIGHT, WIDTH))
    state = stock.init_state("frames")
    out = torch.full((2, 2, FRAMES, HEIGHT, WIDTH), float("nan"))
    for reverse in (False, True):
        if not reverse or reset:
            stock.reset_state(state)
            for obj, frames in PROMPTS.items():
                for frame in frames:
                    stock.add_new_mask(state, frame, obj, _mask(obj, frame))
        start = 4 if reverse else 3
        for frame, _, logits in stock.propagate_in_video(state, start, reverse=reverse):
            out[int(reverse), :, frame] = logits[:, 0]
    return out


def _our_logits(model: SAM2VideoPredictor, video: Tensor, reset: bool) -> Tensor:
    frames = Encoder(model, batch_size=3).encode(_Tensors(video))
    tracker = Tracker(model)
    out = torch.full((2, 2, FRAMES, HEIGHT, WIDTH), float("nan"))
    for obj, prompts in PROMPTS.items():
        masks = prompt_masks(torch.stack([_mask(obj, f) for f in prompts]), model.image_size)
        memories, outcome = tracker.prompt(frames.features(prompts), masks)
        bank = Memory({f: memories.take([i]) for i, f in enumerate(prompts)})
        for reverse, order in ((False, range(3, FRAMES)), (True, range(4, -1, -1))):
            tracked = dict(tracker.track(frames, bank, order, reverse, keep=not reset))
            for frame, found in tracked.items():
                out[int(reverse), obj - 1, frame] = at_slice_size(found.logits, (HEIGHT, WIDTH))[0]
            for i, frame in enumerate(prompts):
                if frame in order:
                    out[int(reverse), obj - 1, frame] = at_slice_size(outcome.logits[i : i + 1], (HEIGHT, WIDTH))[0]
            if reset:
                bank = Memory(bank.prompted)
    return out


CONFIGS: dict[str, dict[str, Any]] = {
    "scores and pointers": tiny_config(),
    "no scores": tiny_config(scores=False),
    # sam2 itself cannot prompt by a mask with object scores but without pointers: it lacks `no_obj_ptr` then.
    "no pointers": tiny_config(scores=False, pointers=False),
    "neither, one mask": tiny_config(scores=False, pointers=False, multimask=False),
    "few conditioning frames": tiny_config(max_cond_frames_in_attn=2, memory_temporal_stride_for_eval=2),
    "SAM2.1 tiny": at_size(known_configurations()["sam2.1_hiera_tiny"], 128),
}


@pytest.mark.parametrize("reset", [True, False], ids=["reset between directions", "memory kept"])
@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[pytest.mark.slow] * (name == "SAM2.1 tiny")) for name in CONFIGS]
)
def test_logits_equal_those_of_the_stock_predictor(name: str, reset: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    stock = stock_predictor(CONFIGS[name], video_settings=name.startswith("SAM2.1"))
    video = _video(stock.image_size)
    expected = _stock_logits(stock, video, monkeypatch, reset)
    found = _our_logits(stock, video, reset)
    assert torch.equal(expected.isnan(), found.isnan())
    assert (expected[0, 0, 5] - expected[0, 0, 8]).abs().max() > 1e-2, "the frames must differ for this to mean much"
    torch.testing.assert_close(found, expected, atol=1e-3, rtol=0, equal_nan=True)


@pytest.fixture(scope="module")
def tiny() -> tuple[Any, Any]:
    torch.manual_seed(0)
    model = build_sam2(tiny_config())
    enliven(model)
    return model, Encoder(model).encode(_Tensors(_video(64)))


def test_objects_in_one_batch_do_not_feel_each_other(tiny: tuple[Any, Any]) -> None:
    model, frames = tiny
    model.non_overlap_masks_for_mem_enc = True
    tracker = Tracker(model)
    masks = prompt_masks(torch.stack([_mask(obj, 4) for obj in (1, 2)]), 64)
    both, _ = tracker.prompt(frames.features([4, 4]), masks)
    joint = dict(tracker.track(frames, Memory({4: both}), range(5, FRAMES)))
    for obj in range(2):
        alone = dict(tracker.track(frames, Memory({4: both.take([obj])}), range(5, FRAMES)))
        for frame, outcome in alone.items():
            torch.testing.assert_close(joint[frame].logits[obj], outcome.logits[0], atol=1e-4, rtol=1e-4)


def test_slices_in_one_batch_do_not_feel_each_other(tiny: tuple[Any, Any]) -> None:
    model, frames = tiny
    tracker = Tracker(model)
    memories, _ = tracker.prompt(frames.features([3, 4]), prompt_masks(torch.stack([_mask(1, 3), _mask(1, 4)]), 64))
    bank = Memory({0: memories.take([0, 1]), 1: memories.take([1, 0])})
    together = tracker.step(frames.features([0, 8]), bank, 2, 3, remember=False)
    for i, (frame, first) in enumerate([(0, 0), (8, 1)]):
        own = Memory({0: memories.take([first]), 1: memories.take([1 - first])})
        alone = tracker.step(frames.features([frame]), own, 2, 3, remember=False)
        torch.testing.assert_close(together.logits[i], alone.logits[0], atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(together.predicted_iou[i], alone.predicted_iou[0], atol=1e-4, rtol=1e-4)


def test_forgetting_changes_nothing(tiny: tuple[Any, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    model, frames = tiny
    monkeypatch.setattr(model, "max_obj_ptrs_in_encoder", 3)
    monkeypatch.setattr(model, "num_maskmem", 3)
    tracker = Tracker(model)
    memories, _ = tracker.prompt(frames.features([0]), prompt_masks(_mask(1, 0)[None], 64))
    kept, dropped = Memory({0: memories}), Memory({0: memories})
    long = dict(tracker.track(frames, kept, range(1, FRAMES), keep=True))
    short = dict(tracker.track(frames, dropped, range(1, FRAMES)))
    assert len(dropped.tracked) < len(kept.tracked)
    assert all(torch.equal(long[f].logits, short[f].logits) for f in long)


def test_an_object_that_the_score_denies_is_absent(tiny: tuple[Any, Any]) -> None:
    model, frames = tiny
    tracker = Tracker(model)
    memories, _ = tracker.prompt(frames.features([4]), prompt_masks(_mask(1, 4)[None], 64))
    head = model.sam_mask_decoder.pred_obj_score_head.layers[-1]
    bias = head.bias.detach().clone()
    try:
        with torch.no_grad():
            head.bias.fill_(-1e4)
        outcome = tracker.step(frames.features([5]), Memory({4: memories}), 5, FRAMES)
    finally:
        with torch.no_grad():
            head.bias.copy_(bias)
    assert outcome.object_score[0] < 0
    assert (outcome.logits == -1024).all()
    assert outcome.stability[0] == 1


@pytest.mark.parametrize("reverse", [False, True])
def test_what_the_decoder_doubts_is_absent_and_remembered_as_it_last_was(
    tiny: tuple[Any, Any], monkeypatch: pytest.MonkeyPatch, reverse: bool
) -> None:
    model, frames = tiny
    tracker = Tracker(model)
    masks = prompt_masks(torch.stack([_mask(1, 4), _mask(2, 4)]), 64)
    memories, _ = tracker.prompt(frames.features([4, 4]), masks)
    order = [3, 2, 1] if reverse else [5, 6, 7]
    predicted = dict(zip(order, ([0.9, 0.5], [0.7, 0.2], [0.95, 0.4]), strict=True))
    step = tracker.step

    def predicting(features: Any, memory: Any, frame: int, *args: Any, **options: Any) -> Any:
        outcome = step(features, memory, frame, *args, **options)
        return replace(outcome, predicted_iou=torch.tensor(predicted[frame]), logits=outcome.logits.abs())

    monkeypatch.setattr(tracker, "step", predicting)
    # A head for the object's presence has the word.
    kept = dict(tracker.track(frames, Memory({4: memories}), order, reverse, least_share=0.7))
    assert all((outcome.logits > 0).any(dim=(1, 2)).all() for outcome in kept.values())
    monkeypatch.setattr(model, "pred_obj_scores", False)
    bank = Memory({4: memories})
    found = dict(tracker.track(frames, bank, order, reverse, keep=True, least_share=0.7))
    there = [(found[frame].logits > 0).any(dim=(1, 2)).tolist() for frame in order]
    assert there == [[True, True], [True, False], [True, True]]
    first, second, _ = (bank.tracked[frame] for frame in order)
    assert torch.equal(second.features[1], first.features[1])
    assert torch.equal(second.pointers[1], first.pointers[1])
    assert not torch.equal(second.features[0], first.features[0])
    # The surer of its absence, the lower the IoU.
    low = predicted[order[1]][1] / (0.7 * predicted[order[0]][1])
    assert float(-found[order[1]].logits[1].max()) == pytest.approx(
        float(kept[order[1]].logits[1].min()) * (1 - low), rel=0.2
    )


def test_confidence_is_that_of_the_chosen_mask(tiny: tuple[Any, Any]) -> None:
    model, frames = tiny
    tracker = Tracker(model)
    memories, prompted = tracker.prompt(frames.features([4]), prompt_masks(_mask(1, 4)[None], 64))
    assert prompted.predicted_iou.tolist() == [1.0]
    assert prompted.object_score[0] > 0
    outcome = tracker.step(frames.features([5]), Memory({4: memories}), 5, FRAMES)
    assert 0 <= outcome.predicted_iou[0] <= 1
    assert 0 <= outcome.stability[0] <= 1


def test_fused_label_is_the_largest_positive_logit() -> None:
    logits = torch.tensor([[[1.0, -1.0, 2.0]], [[3.0, -2.0, 1.0]]])
    label, best = fuse_objects(logits, (4, 7))
    assert label.tolist() == [[7, 0, 4]]
    assert best.tolist() == [[3.0, -1.0, 2.0]]


def test_small_holes_are_filled_and_large_ones_are_not() -> None:
    logits = torch.ones(1, 1, 12, 12)
    logits[0, 0, 2:4, 2:4] = -1
    logits[0, 0, 6:10, 6:10] = -1
    filled = fill_holes(logits, 8)
    assert (filled[0, 0, 2:4, 2:4] == 0.1).all()
    assert (filled[0, 0, 6:10, 6:10] == -1).all()
    assert (logits[0, 0, 2:4, 2:4] == -1).all()


def test_memories_join_and_take() -> None:
    parts = [Memories(torch.full((2, 1, 1, 1), v), torch.full((2, 1), v)) for v in (1.0, 2.0)]
    assert Memories.join(parts).take([3, 0]).pointers.tolist() == [[2.0], [1.0]]
