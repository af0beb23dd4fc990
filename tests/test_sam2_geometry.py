"""Masks land where they belong, in every mode and view: SAM2's place is taken by something that follows intensities."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from sam2_tiny import balls
from torch import Tensor

from sam2_propagation.embeddings import Features
from sam2_propagation.interface import Image, Propagation, Support
from sam2_propagation.sam2 import Sam2Propagator
from sam2_propagation.sam2_memory import window_around
from sam2_propagation.sam2_settings import Sam2Settings, recipe
from sam2_propagation.tracker import Memories, Memory, Outcome, Tracker
from sam2_propagation.views import VIEWS

SIZE = 96
SIDE = SIZE // 4
SHAPE = (11, 40, 52)
IGNORE = 9


class FollowsIntensity(Tracker):
    """Remembers the mean intensity under a mask, and finds what is about as bright."""

    def __init__(self, model: Any, fill_hole_area: int = 0) -> None:
        self.model = model

    def prompt(self, features: Features, masks: Tensor) -> tuple[Memories, Outcome]:
        small = F.adaptive_avg_pool2d(masks[:, None], SIDE)[:, 0]
        grey = _grey(features)
        mean = (grey * small).sum((1, 2)) / small.sum((1, 2)).clamp(min=1e-3)
        # An empty mask teaches nothing that could be found.
        mean = torch.where(small.sum((1, 2)) > 0, mean, torch.full_like(mean, 99.0))
        memories = Memories(torch.zeros(len(mean), 1, 1, 1), mean[:, None])
        return memories, self._outcome(grey, mean)

    def step(
        self, features: Features, memory: Memory, frame: int, count: int, reverse: bool = False, remember: bool = True
    ) -> Outcome:
        learnt = torch.stack([m.pointers[:, 0] for m in memory.prompted.values()])
        known = (learnt < 50).float()
        mean = (learnt * known).sum(0) / known.sum(0).clamp(min=1)
        mean = torch.where(known.sum(0) > 0, mean, torch.full_like(mean, 99.0))
        return self._outcome(_grey(features), mean)

    def _outcome(self, grey: Tensor, mean: Tensor) -> Outcome:
        logits = 20 * (0.9 - (grey - mean[:, None, None]).abs())
        ones = torch.ones(len(mean))
        return Outcome(logits, ones, ones, Memories(torch.zeros(len(mean), 1, 1, 1), mean[:, None]))


def _grey(features: Features) -> Tensor:
    return features.maps[-1][..., 0].permute(1, 0).unflatten(1, (SIDE, SIDE))


@pytest.fixture(autouse=True)
def _no_sam2(monkeypatch: pytest.MonkeyPatch) -> None:
    def forward_image(batch: Tensor) -> dict[str, list[Tensor]]:
        small = F.adaptive_avg_pool2d(batch, SIDE)
        return {"backbone_fpn": [small], "vision_pos_enc": [torch.zeros_like(small)]}

    model = SimpleNamespace(
        pred_obj_scores=True,
        image_size=SIZE,
        num_feature_levels=1,
        device=torch.device("cpu"),
        forward_image=forward_image,
        num_maskmem=7,
        memory_temporal_stride_for_eval=1,
        max_obj_ptrs_in_encoder=16,
    )
    loaded = SimpleNamespace(model=model, image_size=SIZE, name="stub", sha256=None)
    monkeypatch.setattr("sam2_propagation.sam2.load_checkpoint", lambda *_: loaded)
    monkeypatch.setattr("sam2_propagation.sam2_engine.Tracker", FollowsIntensity)


def _stored(case: str, shift: float, axes: Sequence[int] = (0, 1, 2), flips: Sequence[int] = ()) -> Support:
    """A phantom and its label, stored with its array axes reordered and turned about."""
    # Cropped at one end, so that no axis is symmetric.
    data, label = (a[2:] for a in balls(SHAPE, shift, seed=len(case)))
    direction = np.eye(3)[:, [2 - a for a in axes][::-1]]
    for axis in flips:
        direction[:, 2 - axis] *= -1
    spacing = tuple(np.array([4.0, 1.0, 1.0])[list(axes)])
    data, label = (np.flip(a.transpose(axes), flips).copy() for a in (data, label))
    return Support(Image(case, data[None], spacing, direction=tuple(direction.ravel())), label)  # type: ignore[arg-type]


def _dice(found: np.ndarray, truth: np.ndarray) -> float:
    scores = [2 * ((found == v) & (truth == v)).sum() / ((found == v).sum() + (truth == v).sum()) for v in (1, 2)]
    return float(min(scores))


class _Prompter:
    name, views, default_views, whole_set = "prompter", ("identity",), ("identity",), False

    def __init__(self, label: np.ndarray) -> None:
        self.label = label

    def fit(self, images: Any) -> None:
        pass

    def propagate(self, supports: Any, queries: Any, views: Sequence[str]) -> Iterator[Propagation]:
        yield Propagation("query", views[0], self.label)


MODES = {
    "retrieve": Sam2Settings(mode="retrieve"),
    "retrieve and track": Sam2Settings(mode="retrieve", track=True, recent=2),
    "retrieve by line": Sam2Settings(mode="retrieve", matching="line"),
    "self": Sam2Settings(mode="self", support_slices=1),
    "self twice": Sam2Settings(mode="self", repeats=2),
    "insert": Sam2Settings(mode="insert", insertions=2),
    "insert whole": Sam2Settings(mode="insert", whole_stack=True),
    "ssl_medsam2": recipe("ssl_medsam2"),
}


@pytest.mark.parametrize("name", MODES)
def test_volumes_stored_in_any_orientation(name: str) -> None:
    support = _stored("support", 0.0)
    query = _stored("query", 0.1, axes=(2, 0, 1), flips=(0, 2))
    propagator = Sam2Propagator(settings=MODES[name], prompter=_Prompter(query.label))
    views = VIEWS if name == "retrieve" else ("identity", "rot90", "sagittal_rot180")
    for result in propagator.propagate([support], [query.image], views):
        assert result.label is not None
        assert _dice(result.label, query.label) > 0.75, result.view


def test_a_wrong_orientation_would_be_seen() -> None:
    query = _stored("query", 0.1)
    result = next(Sam2Propagator(mode="retrieve").propagate([_stored("support", 0.0)], [query.image], ("rot90",)))
    assert result.label is not None
    assert _dice(result.label, query.label) > 0.75
    for wrong in (result.label[::-1], result.label[:, ::-1], result.label[:, :, ::-1]):
        assert _dice(wrong, query.label) < 0.97 * _dice(result.label, query.label)


@pytest.mark.parametrize("annotated", [(5,), (4, 6)])
def test_annotated_slices_through_a_volume(annotated: Sequence[int]) -> None:
    whole = _stored("query", 0.1, flips=(0, 1))
    sparse = np.full_like(whole.label, IGNORE)
    sparse[list(annotated)] = whole.label[list(annotated)]
    own = Support(whole.image, sparse, ignore=IGNORE)
    for result in Sam2Propagator().propagate([own], [whole.image], ("identity", "rot90", "rot180")):
        assert result.label is not None
        assert _dice(result.label, whole.label) > 0.75


def test_several_supports_that_show_different_classes() -> None:
    first, second, query = _stored("a", 0.0), _stored("bb", 0.05), _stored("query", 0.1)
    ones = Support(first.image, np.where(first.label == 1, 1, 0).astype(np.int16))
    twos = Support(second.image, np.where(second.label == 2, 2, 0).astype(np.int16))
    for mode in ("retrieve", "insert"):
        result = next(Sam2Propagator(mode=mode).propagate([ones, twos], [query.image], ("identity",)))
        assert result.label is not None
        assert _dice(result.label, query.label) > 0.75, mode


@pytest.mark.parametrize("order", ["file", "similarity"])
@pytest.mark.parametrize("background", [True, False])
def test_sets_of_2d_images_of_several_sizes(order: str, background: bool) -> None:
    sizes = [(1, 40, 52), (1, 61, 33), (1, 48, 48), (1, 30, 90)]
    truth = {f"p{i}": balls(size, 0.05 * i, seed=i) for i, size in enumerate(sizes)}
    images = {case: Image(case, data[None]) for case, (data, _) in truth.items()}
    support = Support(images["p2"], truth["p2"][1])
    settings = Sam2Settings(mode="sequence", order=order, background=background)
    queries = [images[case] for case in ("p3", "p0", "p1")]
    for result in Sam2Propagator(settings=settings).propagate([support], queries, ("identity", "rot90", "rot180")):
        assert result.label is not None
        assert _dice(result.label, truth[result.case][1]) > 0.75


@given(
    size=st.tuples(st.integers(3, 40), st.integers(3, 40)),
    corner=st.tuples(st.integers(0, 39), st.integers(0, 39)),
    extent=st.tuples(st.integers(1, 12), st.integers(1, 12)),
    margin=st.floats(0, 2),
)
@settings(max_examples=60)
def test_a_window_holds_the_objects_and_pastes_back_where_it_was_cut(
    size: tuple[int, int], corner: tuple[int, int], extent: tuple[int, int], margin: float
) -> None:
    label = np.zeros((2, *size), np.int16)
    rows, columns = (min(c, n - 1) for c, n in zip(corner, size, strict=True))
    label[1, rows : rows + extent[0], columns : columns + extent[1]] = 5
    label[0, 0, 0] = 7  # another structure, which is not looked for
    window = window_around(label, [5], margin)
    cut = window.cut(label)
    assert (cut == 5).sum() == (label == 5).sum()
    np.testing.assert_array_equal(window.paste(cut, 0) == 5, label == 5)
    height, width = cut.shape[-2:]
    assert height == width or height == size[0] or width == size[1], "a square where the slice has room"
