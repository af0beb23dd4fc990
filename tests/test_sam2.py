"""The sam2 propagator: every mode, counted from outside, and the mistakes that users make."""

from __future__ import annotations

import itertools
import pickle
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from sam2_tiny import balls, tiny_config, tiny_model

from sam2_propagation import sam2_engine
from sam2_propagation.adaptation import example
from sam2_propagation.consensus import fuse
from sam2_propagation.errors import PropagationError
from sam2_propagation.intensities import scale
from sam2_propagation.interface import Image, Propagation, Propagator, Support
from sam2_propagation.registration_slices import carried_through
from sam2_propagation.sam2 import Sam2Propagator
from sam2_propagation.sam2_engine import Prompts
from sam2_propagation.sam2_labels import largest_components
from sam2_propagation.sam2_memory import Votes, drawn_slices, window_around
from sam2_propagation.sam2_settings import Sam2Settings, recipe
from sam2_propagation.tracker import Memory, Tracker, at_slice_size
from sam2_propagation.views import VIEWS

SHAPE = (6, 12, 14)
IGNORE = 9


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model with random weights, its configuration beside it."""
    folder = tmp_path_factory.mktemp("checkpoint")
    torch.save({"model": tiny_model(seed=1).state_dict()}, folder / "tiny.pt")
    (folder / "tiny.yaml").write_text(yaml.safe_dump(tiny_config()))
    return folder / "tiny.pt"


def _volume(case: str, shift: float = 0.0, shape: tuple[int, int, int] = SHAPE) -> tuple[Image, np.ndarray]:
    data, label = balls(shape, shift, seed=len(case))
    return Image(case, data[None], spacing=(3.0, 1.0, 1.0)), label


def _support(case: str = "support", shape: tuple[int, int, int] = SHAPE) -> Support:
    image, label = _volume(case, shape=shape)
    return Support(image, label)


def _sparse(case: str, slices: Sequence[int]) -> Support:
    image, label = _volume(case)
    sparse = np.full_like(label, IGNORE)
    sparse[list(slices)] = label[list(slices)]
    return Support(image, sparse, ignore=IGNORE)


class _Prompter:
    """A propagator that hands out the true label, or fails."""

    name, views, default_views, whole_set = "prompter", ("identity",), ("identity",), False

    def __init__(self, label: np.ndarray | None) -> None:
        self.label = label
        self.calls = 0

    def fit(self, images: Iterable[Image]) -> None:
        pass

    def propagate(
        self, supports: Sequence[Support], queries: Iterable[Image], views: Sequence[str]
    ) -> Iterator[Propagation]:
        for query in queries:
            self.calls += 1
            reason = "it failed" if self.label is None else None
            yield Propagation(query.case, views[0], self.label, reason=reason)


def _count_passes(propagator: Sam2Propagator, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    passes: list[int] = []
    model = propagator.describe().model
    forward = model.forward_image
    monkeypatch.setattr(model, "forward_image", lambda batch: passes.append(len(batch)) or forward(batch))
    return passes


def test_it_is_a_propagator() -> None:
    propagator = Sam2Propagator()
    assert isinstance(propagator, Propagator)
    assert set(propagator.views) == set(VIEWS)
    assert propagator.views[:3] == propagator.default_views == ("identity", "rot90", "rot180")
    assert not propagator.whole_set
    assert Sam2Propagator(mode="sequence").whole_set


@pytest.mark.parametrize(
    ("settings", "shape", "sparse", "planes"),
    [
        (Sam2Settings(), (6, 14, 14), False, True),
        (Sam2Settings(mode="retrieve"), (14, 6, 14), False, True),
        (Sam2Settings(), (5, 14, 14), False, False),
        (Sam2Settings(), (1, 14, 14), False, False),
        (Sam2Settings(), (6, 14, 14), True, False),
        (Sam2Settings(mode="insert"), (6, 14, 14), False, False),
        (Sam2Settings(views=("identity",)), (6, 14, 14), False, False),
        (recipe("yoloseg"), (6, 14, 14), False, False),
    ],
)
def test_volumes_with_slices_enough_are_sliced_three_ways(
    settings: Sam2Settings, shape: tuple[int, int, int], sparse: bool, planes: bool
) -> None:
    label = np.zeros(shape, np.int16)
    label[0, 3:8, 3:8] = 1
    label[0, 0, 0] = 2 if sparse else 0
    support = Support(Image("a", np.zeros((1, *shape), np.float32)), label, 2 if sparse else None)
    propagator = Sam2Propagator(settings=settings)
    wanted = ("axial", "coronal", "sagittal") if planes else propagator.default_views
    assert propagator.fitting_views([support]) == wanted


def test_slices_that_a_prompter_completes_are_looked_at_three_ways() -> None:
    label = np.full((6, 14, 14), 2, np.int16)
    label[3], label[3, 3:8, 3:8] = 0, 1
    support = Support(Image("a", np.zeros((1, 6, 14, 14), np.float32)), label, 2)
    prompted = Sam2Propagator(prompter=_Prompter(None))
    assert prompted.fitting_views([support]) == ("axial", "coronal", "sagittal")
    assert Sam2Propagator(mode="slice", prompter=_Prompter(None)).fitting_views([support]) == prompted.default_views
    assert Sam2Propagator(mode="retrieve", prompter=_Prompter(None)).fitting_views([support]) == prompted.default_views


VOLUME_MODES = {
    "retrieve": Sam2Settings(mode="retrieve"),
    "retrieve and track": Sam2Settings(mode="retrieve", track=True),
    "retrieve by line": Sam2Settings(mode="retrieve", matching="line"),
    "retrieve by similarity": Sam2Settings(mode="retrieve", matching="similarity"),
    "self": Sam2Settings(mode="self", support_slices=2, repeats=2),
    "insert": Sam2Settings(mode="insert"),
    "insert twice": Sam2Settings(mode="insert", insertions=2, average="probabilities"),
}
LONG = ("insert twice",)


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=pytest.mark.slow if name in LONG else ()) for name in VOLUME_MODES]
)
def test_each_slice_of_each_view_is_encoded_once(name: str, checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    queries = [_volume(f"query{i}", shift) for i, shift in enumerate((0.1, -0.1))]
    prompter = _Prompter(queries[0][1])
    propagator = Sam2Propagator(checkpoint, prompter=prompter, settings=VOLUME_MODES[name])
    passes = _count_passes(propagator, monkeypatch)
    supports, views = [_support("a"), _support("bb")], ("identity", "rot180", "coronal")
    results = list(propagator.propagate(supports, [image for image, _ in queries], views))
    # Four images; identity and rot180 see 6 slices of each, coronal 12.
    assert sum(passes) == 4 * (6 + 6 + 12)
    assert [(r.case, r.view) for r in results] == [(q.case, v) for q, _ in queries for v in views]
    for result in results:
        assert result.label is not None
        assert (result.label.shape, result.label.dtype) == (SHAPE, np.int16)
        assert set(np.unique(result.label)) <= {0, 1, 2}
        assert result.confidence is not None
        assert 0 <= result.confidence.min() <= result.confidence.max() <= 1
    assert prompter.calls == (2 if name == "self" else 0)


def test_supports_are_encoded_once_over_calls(checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    propagator = Sam2Propagator(checkpoint)
    passes = _count_passes(propagator, monkeypatch)
    for case in ("q1", "q2", "q3"):
        list(propagator.propagate([_support()], [_volume(case)[0]], ("identity",)))
    assert sum(passes) == 4 * SHAPE[0]


def test_aligned_supports_are_encoded_for_each_query_and_not_kept(
    checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    support, queries = _support(), [_volume(f"q{i}", shift)[0] for i, shift in enumerate((0.1, 0.2))]
    propagator = Sam2Propagator(checkpoint, settings=Sam2Settings(mode="retrieve", align=True))
    passes = _count_passes(propagator, monkeypatch)
    labels = [result.label for result in propagator.propagate([support], queries, ["identity"])]
    assert all(label is not None and label.shape == query.shape for label, query in zip(labels, queries, strict=True))
    assert sum(passes) == 2 * (queries[0].shape[0] + queries[0].shape[0])


def test_another_label_of_the_same_case_is_not_taken_from_the_cache(checkpoint: Path) -> None:
    propagator, support, query = Sam2Propagator(checkpoint), _support(), _volume("query")[0]
    swapped = Support(support.image, np.array([0, 2, 1], np.int16)[support.label])
    first, second = (next(propagator.propagate([s], [query], ("identity",))).label for s in (support, swapped))
    assert first is not None
    assert second is not None
    assert np.array_equal(first > 0, second > 0)
    assert np.array_equal(np.array([0, 2, 1])[first], second)


@pytest.mark.parametrize("mode", ["retrieve", "self", "insert"])
def test_batches_do_not_change_the_label(mode: str, checkpoint: Path) -> None:
    query, truth = _volume("query", 0.1)
    labels = []
    for size in (1, 7):
        propagator = Sam2Propagator(checkpoint, mode=mode, prompter=_Prompter(truth), batch_size=size)
        labels.append(next(propagator.propagate([_support()], [query], ("identity",))).label)
    assert np.mean(labels[0] != labels[1]) < 0.002


def test_results_repeat_and_do_not_depend_on_other_cases(checkpoint: Path) -> None:
    queries = [_volume(f"query{i}", 0.1 * i)[0] for i in range(3)]
    propagator = Sam2Propagator(checkpoint, mode="insert", seed=4)
    together = list(propagator.propagate([_support()], queries, ("identity",)))
    alone = list(Sam2Propagator(checkpoint, mode="insert", seed=4).propagate([_support()], queries[2:], ("identity",)))
    assert np.array_equal(together[2].confidence, alone[0].confidence)
    other = list(Sam2Propagator(checkpoint, mode="insert", seed=5).propagate([_support()], queries[2:], ("identity",)))
    assert not np.array_equal(other[0].confidence, alone[0].confidence)


def test_self_falls_back_to_retrieve_where_the_prompter_failed(checkpoint: Path) -> None:
    query = _volume("query", 0.1)[0]
    found, expected = (
        next(Sam2Propagator(checkpoint, mode=mode, prompter=prompter).propagate([_support()], [query], ("identity",)))
        for mode, prompter in (("self", _Prompter(None)), ("retrieve", None))
    )
    assert np.array_equal(found.confidence, expected.confidence)


def test_the_prompter_decides_the_default_mode(checkpoint: Path) -> None:
    query, truth = _volume("query", 0.1)
    default, itself, retrieved = (
        next(Sam2Propagator(checkpoint, mode=mode, prompter=p).propagate([_support()], [query], ("identity",)))
        for mode, p in ((None, _Prompter(truth)), ("self", _Prompter(truth)), (None, None))
    )
    assert np.array_equal(default.confidence, itself.confidence)
    assert not np.array_equal(default.confidence, retrieved.confidence)


def test_annotated_slices_are_carried_through_their_volume(checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    own = _sparse("query", (2, 3))
    truth = _volume("query")[1]
    propagator = Sam2Propagator(checkpoint)
    passes = _count_passes(propagator, monkeypatch)
    results = list(propagator.propagate([own, _sparse("other", (2,))], [own.image], ("identity", "rot90", "coronal")))
    assert sum(passes) == 6 + 6, "what lies across a plane is not looked at in it"
    for result in results[:2]:
        assert result.label is not None
        assert np.array_equal(result.label[2:4], truth[2:4])
        assert IGNORE not in result.label
        assert result.confidence is not None
        assert (result.confidence[2:4] == 1).all()
    assert results[2].label is None
    assert "across this view's plane" in str(results[2].reason)


def test_annotated_slices_and_a_prompter_together_prompt_every_plane(
    checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    own, (_, truth) = _sparse("query", (2, 3)), _volume("query")
    prompter, planes = _Prompter(truth), ("axial", "coronal", "sagittal")
    propagator = Sam2Propagator(checkpoint, settings=Sam2Settings(zoom=None), prompter=prompter)
    passes = _count_passes(propagator, monkeypatch)
    results = list(propagator.propagate([own], [own.image], planes))
    sides = own.image.shape
    assert sum(passes) == sides[0] + sum(sides), "once to track the annotated slices, then once a plane"
    assert prompter.calls == 1
    for result in results:
        assert result.label is not None
        assert result.confidence is not None
        assert np.array_equal(result.label[2:4], truth[2:4])
        assert (result.confidence[2:4] == 1).all()
    tracked = next(Sam2Propagator(checkpoint, mode="slice").propagate([own], [own.image], ("axial",)))
    assert not np.array_equal(results[0].confidence, tracked.confidence)


def test_what_a_prompter_carried_outweighs_what_was_tracked(checkpoint: Path) -> None:
    """Far from the drawn slices, prompts are the prompter's where tracking finds nothing of it."""
    own, (image, truth) = _sparse("query", (2,)), _volume("query")
    asked: list[np.ndarray | None] = []
    prompts = Prompts(_Prompter(truth), [own], image)

    def tracked() -> np.ndarray:
        asked.append(None)
        return np.zeros_like(truth)

    label = prompts.beside(own, tracked, lambda: None)
    assert label is not None
    assert np.array_equal(label, truth)
    assert prompts.beside(own, tracked, lambda: None) is label
    assert len(asked) == 1, "tracked once for all views"


def test_tracking_and_registration_that_agree_outweigh_what_a_prompter_carried() -> None:
    own, (image, truth) = _sparse("query", (2,)), _volume("query")
    label = Prompts(_Prompter(truth), [own], image).beside(own, *[lambda: np.zeros_like(truth)] * 2)
    assert label is not None
    assert np.array_equal(label[2], truth[2]), "what is drawn stays"
    assert not np.delete(label, 2, axis=0).any()


def test_of_classes_that_no_own_slice_shows_tracking_knows_nothing() -> None:
    """What is large enough for its outline to move stays as it was carried."""
    z, y, x = np.ogrid[:48, :48, :48]
    carried = np.where((z - 24) ** 2 + (y - 24) ** 2 + (x - 24) ** 2 < 400, 2, 0).astype(np.int16)
    carried[:4, :4, :4] = 1
    drawn = np.full((48, 48, 48), IGNORE, np.int16)
    drawn[1] = np.where(carried[1] == 1, 1, 0)
    image = Image("a", np.zeros((1, 48, 48, 48), np.float32))
    own = Support(image, drawn, IGNORE)
    label = Prompts(_Prompter(carried), [own], image).beside(
        own, *[lambda: np.where(carried == 1, 1, 0).astype(np.int16)] * 2
    )
    assert label is not None
    np.testing.assert_array_equal(label[2:] == 2, carried[2:] == 2)


def test_adaptation_looks_at_drawn_slices_and_never_at_lines_across_them(
    checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    taught: list[Any] = []
    monkeypatch.setattr(sam2_engine, "adapt", lambda model, examples, steps, seed: taught.extend(examples))
    own = _sparse("query", (2, 3))
    propagator = Sam2Propagator(checkpoint, adapt=1, prompter=_Prompter(None))
    propagator.adapt([own], ("axial", "coronal", "sagittal"))
    assert len(taught) == 1, "one plane, not three"
    taught.clear()
    propagator.adapt([_support()], ("axial", "coronal", "sagittal"))
    assert len(taught) == 3


@pytest.mark.parametrize(
    ("mode", "prompted", "zoom", "seen"),
    [
        (None, True, 0.25, True),
        ("self", True, 0.5, True),
        ("self", True, None, False),
        ("retrieve", True, 0.25, False),
        (None, False, 0.25, False),
    ],
)
def test_adaptation_also_looks_through_the_window_that_self_looks_through(
    mode: str | None, prompted: bool, zoom: float | None, seen: bool, checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    taught: list[Any] = []
    monkeypatch.setattr(sam2_engine, "adapt", lambda model, examples, steps, seed: taught.extend(examples))
    image, label = _volume("support", shape=(5, 40, 60))
    label = np.where(label == 2, label, 0).astype(np.int16)  # the small ball at the side
    prompter = _Prompter(None) if prompted else None
    propagator = Sam2Propagator(checkpoint, adapt=1, prompter=prompter, settings=Sam2Settings(mode=mode, zoom=zoom))
    propagator.adapt([Support(image, label)], ("identity",))
    assert (taught[0].window is not None) == seen
    if seen and zoom is not None:
        window = window_around(label, [2], zoom)
        expected = example(window.cut(scale(image)), window.cut(label), range(5), 64)
        torch.testing.assert_close(taught[0].window.images, expected.images)
        assert torch.equal(taught[0].window.labels, expected.labels)
        assert (taught[0].window.labels > 0).sum() > 1.5 * (taught[0].labels > 0).sum()


def test_own_slices_tracked_and_registered_prompt_where_the_prompter_failed(checkpoint: Path) -> None:
    own = _sparse("query", (2, 3))
    found = next(Sam2Propagator(checkpoint, prompter=_Prompter(None)).propagate([own], [own.image], ("coronal",)))
    tracked = next(Sam2Propagator(checkpoint, mode="slice").propagate([own], [own.image], ("axial",)))
    assert tracked.label is not None
    registered = carried_through(scale(own.image)[0], own.label, [2, 3])
    assert not np.array_equal(registered, tracked.label)
    both = _Prompter(fuse([tracked.label, registered], [2.0, 1.0], own.image.spacing).label)
    again = Sam2Propagator(checkpoint, mode="self", prompter=both)
    expected = next(again.propagate([own], [own.image], ("coronal",)))
    assert np.array_equal(found.confidence, expected.confidence)


def test_slices_drawn_in_two_planes_are_each_tracked_in_their_own(checkpoint: Path) -> None:
    image, truth = _volume("query")
    label = np.full_like(truth, IGNORE)
    label[3], label[:, :, 10] = truth[3], truth[:, :, 10]
    own = Support(image, label, IGNORE)
    propagator = Sam2Propagator(checkpoint, mode="slice")
    axial, sagittal, coronal = propagator.propagate([own], [image], ("axial", "sagittal", "coronal"))
    for found in (axial, sagittal):
        assert found.label is not None, found.reason
        assert np.array_equal(found.label[label != IGNORE], truth[label != IGNORE])
    assert coronal.label is None
    np.testing.assert_array_equal(drawn_slices(label != IGNORE), [3])


def test_lines_across_a_plane_are_no_memory(checkpoint: Path) -> None:
    """Seen from the side, an annotated slice is a line: another image is not labelled from that."""
    query = _volume("query", 0.1)[0]
    propagator = Sam2Propagator(checkpoint, mode="retrieve")
    axial, coronal = propagator.propagate([_sparse("support", (2, 3))], [query], ("axial", "coronal"))
    assert axial.label is not None
    assert coronal.label is None
    assert "across this view's plane" in str(coronal.reason)


def test_sparse_supports_only_count_where_they_speak(checkpoint: Path) -> None:
    query = _volume("query", 0.1)[0]
    sparse = _sparse("support", (2, 3))
    loud = Support(sparse.image, np.where(sparse.label == IGNORE, 1, sparse.label).astype(np.int16))
    quiet, other = (next(Sam2Propagator(checkpoint).propagate([s], [query], ("identity",))) for s in (sparse, loud))
    assert quiet.label is not None
    assert IGNORE not in quiet.label
    assert not np.array_equal(quiet.confidence, other.confidence)


def _pictures(count: int) -> list[Image]:
    sizes = [(1, 20, 24), (1, 33, 17), (1, 21, 21)]
    return [Image(f"p{i}", balls(sizes[i % 3], 0.05 * i, seed=i)[0][None]) for i in range(count)]


@pytest.mark.parametrize("order", ["file", "similarity"])
def test_a_set_of_2d_images_is_one_sequence(order: str, checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pictures = _pictures(5)
    support = Support(pictures[2], balls((1, 21, 21), 0.1)[1])
    settings = replace(recipe("yoloseg"), order=order)
    propagator = Sam2Propagator(checkpoint, settings=settings)
    passes = _count_passes(propagator, monkeypatch)
    queries = [p for p in pictures if p.case != "p2"]
    results = list(propagator.propagate([support], queries, propagator.default_views))
    assert sum(passes) == 5 * 3
    views = ("identity", "rot90", "rot180")
    assert [(r.case, r.view) for r in results] == [(q.case, v) for q in queries for v in views]
    assert all(r.label is not None and r.label.shape == q.shape for r, q in zip(results[::3], queries, strict=True))


def test_colour_and_single_2d_images_are_taken(checkpoint: Path) -> None:
    shape = (1, 30, 20)
    data, label = balls(shape)
    support = Support(Image("rgb", np.stack([data, data / 2, data / 3])), label)
    query = Image("other", np.stack([data / 3, data, data / 2]))
    for mode in ("retrieve", "insert"):
        result = next(Sam2Propagator(checkpoint, mode=mode).propagate([support], [query], ("rot90",)))
        assert result.label is not None
        assert result.label.shape == shape


@pytest.mark.parametrize("shape", [(1, 1, 1), (2, 3, 5), (3, 1, 40), (1, 200, 7)])
def test_tiny_and_odd_slices(shape: tuple[int, int, int], checkpoint: Path) -> None:
    query = Image("query", np.random.default_rng(0).uniform(1, 2, (1, *shape)).astype(np.float32))
    result = next(Sam2Propagator(checkpoint).propagate([_support()], [query], ("identity",)))
    assert result.label is not None
    assert result.label.shape == shape


def test_progress_counts_slices(checkpoint: Path) -> None:
    done: list[tuple[int, int]] = []
    propagator = Sam2Propagator(checkpoint, batch_size=4, progress=lambda *slices: done.append(slices))
    list(propagator.propagate([_support()], [_volume("query")[0]], ("identity", "coronal")))
    assert done == [(4, 18), (2, 18), (4, 18), (4, 18), (4, 18)], "6 slices and 12; supports do not count"


def test_it_can_be_sent_to_a_worker_before_and_after_its_model_is_loaded(checkpoint: Path) -> None:
    propagator, query = Sam2Propagator(checkpoint), _volume("query")[0]
    before = pickle.loads(pickle.dumps(propagator))
    here = next(propagator.propagate([_support()], [query], ("identity",)))
    after = pickle.loads(pickle.dumps(propagator))
    for sent in (before, after):
        there = next(sent.propagate([_support()], [query], ("identity",)))
        assert np.array_equal(here.confidence, there.confidence)


def test_adaptation_is_done_once_and_goes_along_to_workers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.save({"model": tiny_model(scores=False, multimask=False).state_dict()}, tmp_path / "tiny.pt")
    (tmp_path / "tiny.yaml").write_text(yaml.safe_dump(tiny_config(scores=False, multimask=False)))
    propagator, query = Sam2Propagator(tmp_path / "tiny.pt", adapt=2), _volume("query")[0]
    first = next(propagator.propagate([_support()], [query], ("identity",)))
    monkeypatch.setattr("sam2_propagation.sam2_engine.adapt", lambda *_: pytest.fail("adapted twice"))
    for again in (propagator, pickle.loads(pickle.dumps(propagator))):
        second = next(again.propagate([_support()], [query], ("identity",)))
        assert np.array_equal(first.confidence, second.confidence)
    plain = next(Sam2Propagator(tmp_path / "tiny.pt").propagate([_support()], [query], ("identity",)))
    assert not np.array_equal(first.confidence, plain.confidence)


def test_scores_say_what_the_model_thinks_of_itself(checkpoint: Path) -> None:
    result = next(Sam2Propagator(checkpoint).propagate([_support()], [_volume("query")[0]], ("identity",)))
    assert set(result.scores) >= {"confidence"}
    assert result.label is not None
    if (result.label > 0).any():
        assert 0 <= result.scores["predicted_iou"] <= 1
        assert 0 <= result.scores["stability"] <= 1


def _run(checkpoint: Path, supports: Sequence[Support], query: Image, view: str = "identity", **options: Any) -> None:
    list(Sam2Propagator(checkpoint, **options).propagate(supports, [query], (view,)))


def test_bad_input_is_answered_in_one_sentence(checkpoint: Path) -> None:
    support, query = _support(), _volume("query")[0]
    blank = Support(support.image, np.zeros_like(support.label))
    with pytest.raises(PropagationError, match="at least one annotated case"):
        _run(checkpoint, [], query)
    with pytest.raises(PropagationError, match="foreground in the label of support"):
        _run(checkpoint, [blank, blank], query)
    with pytest.raises(PropagationError, match="2D images for mode sequence"):
        _run(checkpoint, [support], query, mode="sequence")
    with pytest.raises(PropagationError, match="sparse label of query itself"):
        _run(checkpoint, [support], query, mode="slice")
    with pytest.raises(PropagationError, match="expected views out of"):
        _run(checkpoint, [support], query, view="upside_down")
    with pytest.raises(PropagationError, match="prompts mode self"):
        Sam2Propagator(checkpoint, mode="self")
    with pytest.raises(PropagationError, match="expected a mode out of"):
        Sam2Propagator(checkpoint, mode="teleport")
    with pytest.raises(PropagationError, match="expected a recipe out of"):
        recipe("oneseg9")
    for share in (-0.1, 1.0):
        with pytest.raises(PropagationError, match="least_share of at least 0 and below 1"):
            Sam2Settings(least_share=share)
    with pytest.raises(PropagationError, match="memory_slices of at least 1"):
        Sam2Settings(memory_slices=0)


@pytest.mark.parametrize(
    "error",
    [
        MemoryError(),
        RuntimeError("DefaultCPUAllocator: not enough memory: you tried"),
        RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried"),
        RuntimeError("MPS backend out of memory"),
        torch.OutOfMemoryError(),
    ],
)
def test_too_little_memory_is_said(error: Exception, checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    propagator = Sam2Propagator(checkpoint)

    def fail(_: Any) -> None:
        raise error

    monkeypatch.setattr(propagator.describe().model, "forward_image", fail)
    with pytest.raises(PropagationError, match=r"lower -sam2_batch \(it is 8\) or -np"):
        list(propagator.propagate([_support()], [_volume("query")[0]], ("identity",)))


def test_another_error_of_torch_is_not_taken_for_too_little_memory(
    checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    propagator = Sam2Propagator(checkpoint)

    def fail(_: Any) -> None:
        raise RuntimeError("shapes differ")

    monkeypatch.setattr(propagator.describe().model, "forward_image", fail)
    with pytest.raises(RuntimeError, match="shapes differ"):
        list(propagator.propagate([_support()], [_volume("query")[0]], ("identity",)))


def test_a_support_without_foreground_is_passed_over(checkpoint: Path) -> None:
    support, query = _support(), _volume("query")[0]
    blank = Support(_volume("blank")[0], np.zeros_like(support.label))
    for mode in ("retrieve", "insert"):
        alone, both = (
            next(Sam2Propagator(checkpoint, mode=mode).propagate(given, [query], ("identity",)))
            for given in ([support], [blank, support])
        )
        assert np.array_equal(alone.confidence, both.confidence)


def test_self_looks_at_no_support_that_it_does_not_need(checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    query, truth = _volume("query", 0.1)
    propagator = Sam2Propagator(checkpoint, mode="self", prompter=_Prompter(truth))
    passes = _count_passes(propagator, monkeypatch)
    list(propagator.propagate([_support("a"), _support("bb")], [query], ("identity",)))
    assert sum(passes) == SHAPE[0]


def test_recipes_are_as_published() -> None:
    yoloseg, ssl = recipe("yoloseg"), recipe("ssl_medsam2")
    assert (yoloseg.mode, yoloseg.background, yoloseg.order) == ("sequence", True, "file")
    assert (yoloseg.views, ssl.views) == (("identity", "rot90", "rot180"), ("identity",))
    assert (ssl.mode, ssl.insertions, ssl.whole_stack, ssl.average) == ("insert", 5, True, "probabilities")
    assert (ssl.largest_component, ssl.intensities.positive, ssl.checkpoint) == (True, True, "medsam2_latest")
    # No published one drops what is doubted.
    assert yoloseg.least_share_in("sequence") == ssl.least_share_in("insert") == 0


def _spied_tracks(propagator: Sam2Propagator, monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, list[int], bool]]:
    """(frames of the sequence, prompted frames, reverse) of every pass."""
    tracker = propagator._ready()._tools.tracker
    track, seen = tracker.track, []

    def spy(frames: Any, memory: Any, order: Any, reverse: bool = False, **more: Any) -> Any:
        seen.append((len(frames), sorted(memory.prompted), reverse))
        return track(frames, memory, order, reverse, **more)

    monkeypatch.setattr(tracker, "track", spy)
    return seen


def test_ssl_medsam2_inserts_the_whole_stack_at_five_places(checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    support, query = _support(shape=(7, 12, 14)), _volume("query")[0]
    label = np.where(support.label == 2, 0, support.label)
    label[:2] = 0
    propagator = Sam2Propagator(checkpoint, settings=recipe("ssl_medsam2"))
    seen = _spied_tracks(propagator, monkeypatch)
    list(propagator.propagate([Support(support.image, label)], [query], ("identity",)))
    drawn = np.flatnonzero((label == 1).any(axis=(1, 2)))
    assert [reverse for *_, reverse in seen] == [False, True] * 5
    assert {count for count, *_ in seen} == {SHAPE[0] + 7}, "the whole stack is inserted, empty slices too"
    places = [prompted[0] - int(drawn[0]) for _, prompted, _ in seen[::2]]
    assert len(set(places)) == 5, "drawn without putting back"
    assert set(places) <= set(range(SHAPE[0]))
    for _, prompted, _ in seen:
        assert [f - prompted[0] for f in prompted] == [int(i - drawn[0]) for i in drawn], "every mask prompts"


def test_ssl_medsam2_averages_probabilities_at_the_slices_own_size(
    checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    query = _volume("query")[0]
    propagator = Sam2Propagator(checkpoint, settings=recipe("ssl_medsam2"))
    tracker, logits = propagator._ready()._tools.tracker, []
    step = tracker.step
    monkeypatch.setattr(tracker, "step", lambda *a, **k: logits.append(step(*a, **k)) or logits[-1])
    support = _support()
    support = Support(support.image, np.where(support.label == 2, 0, support.label).astype(np.int16))
    result = next(propagator.propagate([support], [query], ("identity",)))
    # Frames of the query, by the order in which they are tracked: forward and backward of each insertion.
    frames = _tracked_slices(support, query)
    total, count = np.zeros(SHAPE), np.zeros(SHAPE[0])
    for index, outcome in zip(frames, logits, strict=True):
        if index is not None:
            total[index] += at_slice_size(outcome.logits, SHAPE[1:])[0].sigmoid().numpy()
            count[index] += 1
    assert (count == 5).all()
    mean = total / 5
    expected = largest_components((mean > 0.5).astype(np.int16))
    assert np.mean(result.label != expected) < 0.01


def _tracked_slices(support: Support, query: Image) -> list[int | None]:
    """The query's slice of every step that `ssl_medsam2` makes with its own random places, None for the stack's."""
    rng = np.random.default_rng([0, zlib.crc32(query.case.encode())])
    drawn = np.flatnonzero((support.label == 1).any(axis=(1, 2)))
    depth, frames = len(support.label), []
    for place in rng.choice(SHAPE[0], 5, replace=False):
        which = [*range(place), *[None] * depth, *range(place, SHAPE[0])]
        prompted = {int(place + i) for i in drawn}
        forward = [f for f in range(min(prompted), len(which)) if f not in prompted]
        backward = [f for f in range(max(prompted), -1, -1) if f not in prompted]
        frames += [which[f] for f in (*forward, *backward)]
    return frames


def test_yoloseg_prompts_the_background_too_and_takes_the_largest_positive_logit(
    checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pictures = _pictures(4)
    support = Support(pictures[1], balls((1, 33, 17), 0.05)[1])
    propagator = Sam2Propagator(checkpoint, settings=recipe("yoloseg"))
    seen = _spied_tracks(propagator, monkeypatch)
    add, objects = Votes.add, []
    monkeypatch.setattr(Votes, "add", lambda votes, where, out: objects.append(len(where)) or add(votes, where, out))
    list(propagator.propagate([support], [p for p in pictures if p.case != "p1"], propagator.default_views))
    assert seen == [(4, [1], False), (4, [1], True)] * 3, "one reset between directions, once a view"
    assert objects == [3] * 3 * 3, "background and two classes, each an object of its own"


def test_tracking_with_the_built_in_weights_ends_where_an_organ_ends() -> None:
    z, y, x = np.meshgrid(np.arange(24), np.arange(64), np.arange(64), indexing="ij")
    ball = (((z - 12) / 6) ** 2 + ((y - 30) / 14) ** 2 + ((x - 34) / 14) ** 2) < 1
    body = ((y - 32) / 28) ** 2 + ((x - 32) / 28) ** 2 < 1
    data = (0.3 * body + 0.5 * ball + np.random.default_rng(0).normal(0, 0.03, ball.shape)).astype(np.float32)
    label = np.full(ball.shape, IGNORE, np.int16)
    label[12] = ball[12]
    support = Support(Image("ball", data[None], spacing=(3.0, 1.0, 1.0)), label, ignore=IGNORE)

    def found(least_share: float | None) -> np.ndarray:
        propagator = Sam2Propagator(settings=Sam2Settings(mode="slice", least_share=least_share))
        result = next(iter(propagator.propagate([support], [support.image], ["identity"]))).label
        assert result is not None
        return result == 1

    stopped = found(None)
    assert 2 * (stopped & ball).sum() / (stopped.sum() + ball.sum()) > 0.9
    assert not stopped[:5].any()
    assert not stopped[20:].any()
    assert found(0.0).sum() > 1.2 * ball.sum()  # or this body would not tell


def test_an_object_must_be_surer_within_a_volume_than_across_and_settings_have_the_word() -> None:
    default = Sam2Settings()
    assert default.least_share_in("slice") > default.least_share_in("retrieve") > default.least_share_in("self") == 0
    assert Sam2Settings(least_share=0.45).least_share_in("self") == 0.45


def _predict_iou(monkeypatch: pytest.MonkeyPatch, predicted: Callable[[int, Memory], float]) -> None:
    """Find everything everywhere, as sure of it as told of the frame's number and what is remembered there."""
    step = Tracker.step

    def told(self: Tracker, features: Any, memory: Memory, frame: int, *args: Any, **options: Any) -> Any:
        outcome = step(self, features, memory, frame, *args, **options)
        iou = torch.full_like(outcome.predicted_iou, predicted(frame, memory))
        return replace(outcome, predicted_iou=iou, logits=outcome.logits.abs())

    monkeypatch.setattr(Tracker, "step", told)


def test_across_subjects_slices_of_a_low_predicted_iou_are_dropped(
    checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    support, (query, _), calls = _support(), _volume("query"), itertools.count()
    # Half as sure of every other slice, whose two objects make up a batch.
    _predict_iou(monkeypatch, lambda frame, memory: 0.8 if next(calls) % 2 else 0.4)
    for blind, share, whole in ((True, 0.6, False), (True, 0.4, True), (False, 0.6, True)):
        monkeypatch.setattr(Tracker, "blind_to_absence", blind)
        propagator = Sam2Propagator(checkpoint, settings=Sam2Settings(mode="retrieve", least_share=share), batch_size=2)
        label = next(iter(propagator.propagate([support], [query], ["identity"]))).label
        assert label is not None
        assert bool((label > 0).all()) == whole
        assert bool((label > 0).any())


@pytest.mark.parametrize(("blind", "share", "whole"), [(True, 0.6, False), (True, 0.4, True), (False, 0.6, True)])
def test_tracked_across_subjects_they_are_neither_kept_nor_remembered(
    blind: bool, share: float, whole: bool, checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    remembered: set[int] = set()

    def half_as_sure_of_even_slices(frame: int, memory: Memory) -> float:
        remembered.update(memory.tracked)
        return 0.8 if frame % 2 else 0.4

    _predict_iou(monkeypatch, half_as_sure_of_even_slices)
    monkeypatch.setattr(Tracker, "blind_to_absence", blind)
    propagator = Sam2Propagator(checkpoint, settings=Sam2Settings(mode="retrieve", track=True, least_share=share))
    label = next(iter(propagator.propagate([_support()], [_volume("query")[0]], ["identity"]))).label
    assert label is not None
    assert (label[1::2] > 0).all()
    assert (label[::2] > 0).all() if whole else not label[::2].any()
    # Of the very first slice, nothing surer is known yet.
    assert (2 in remembered) == (4 in remembered) == whole


def test_ssl_medsam2_keeps_slices_that_are_doubted(checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _predict_iou(monkeypatch, lambda frame, memory: 0.1 if memory.tracked else 0.8)
    monkeypatch.setattr(Tracker, "blind_to_absence", True)
    support = _support()
    support = Support(support.image, np.where(support.label == 1, 1, 0).astype(np.int16))
    propagator = Sam2Propagator(checkpoint, settings=recipe("ssl_medsam2"))
    label = next(iter(propagator.propagate([support], [_volume("query")[0]], ["identity"]))).label
    assert label is not None
    assert (label > 0).all()
