"""Registration carries labels onto deformed, moved, turned and re-scanned phantoms, and says when it cannot."""

from __future__ import annotations

import itertools
import json
import os
import pickle
from dataclasses import replace
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import SimpleITK as sitk
from hypothesis import example, given, settings
from hypothesis import strategies as st
from scipy import ndimage

from sam2_propagation.interface import Image, Propagation, Propagator, Support
from sam2_propagation.registration import RegistrationPropagator, affinely_aligned
from sam2_propagation.registration_carry import carried_label, problem_of
from sam2_propagation.registration_demons import folding_share
from sam2_propagation.registration_similarity import matched
from sam2_propagation.registration_start import starts
from sam2_propagation.registration_volume import centred, coarser, frame_of, working_spacing

pytestmark = pytest.mark.slow

DATA = Path(os.environ.get("ONESHOT_DATA", Path(__file__).resolve().parents[2] / "shared" / "data"))


def body(shape: tuple[int, ...], seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """(image, label) of an ellipsoid body with two bright organs on a textured ground."""
    grid = np.stack(np.meshgrid(*[np.linspace(-1, 1, n) for n in shape], indexing="ij"))
    middle = np.array([0.1, -0.25, 0.2])[-len(shape) :].reshape(-1, *[1] * len(shape))
    first = ((grid - middle) ** 2).sum(axis=0) < 0.12
    second = ((grid + middle * 1.3) ** 2).sum(axis=0) < 0.05
    label = np.where(first, 1, np.where(second, 2, 0)).astype(np.int16)
    texture = ndimage.gaussian_filter(np.random.default_rng(seed).normal(size=shape), 2) * 1.5
    image = (0.3 + texture) * ((grid**2).sum(axis=0) < 0.9) + 0.5 * first + 0.9 * second
    return ndimage.gaussian_filter(image, 0.6).astype(np.float32), label


def deformed(array: np.ndarray, order: int, shift: float = 0.0) -> np.ndarray:
    """A smooth sine warp of up to two voxels, and a shift along the last axis."""
    grid = np.stack(np.meshgrid(*[np.arange(n, dtype=float) for n in array.shape], indexing="ij"))
    wave = [
        2 * np.sin(2 * np.pi * grid[(k + 1) % array.ndim] / array.shape[(k + 1) % array.ndim])
        for k in range(array.ndim)
    ]
    wave[-1] = wave[-1] + shift
    if array.ndim == 3 and array.shape[0] < 16:
        wave[0] = np.zeros_like(wave[0])
    return ndimage.map_coordinates(array, grid + np.stack(wave), order=order, mode="nearest")


def pair(shape: tuple[int, ...], spacing: tuple[float, float, float] = (1, 1, 1), shift: float = 0.0):
    """A support, a query made of it with other intensities, and the query's truth; 2D shapes get Z = 1."""
    image, label = body(shape)
    moved, truth = 100 * deformed(image, 1, shift) + 20, deformed(label, 0, shift)
    full = (1,) * (3 - len(shape)) + tuple(shape)
    support = Support(Image("s", image.reshape(1, *full), spacing), label.reshape(full))
    return support, Image("q", moved.reshape(1, *full), spacing), truth.reshape(full)


def dice(a: np.ndarray, b: np.ndarray) -> float:
    return float(np.mean([2 * ((a == c) & (b == c)).sum() / ((a == c).sum() + (b == c).sum()) for c in (1, 2)]))


def one(supports: Support | list[Support], query: Image, view: str = "local") -> Propagation:
    supports = supports if isinstance(supports, list) else [supports]
    return next(RegistrationPropagator().propagate(supports, [query], [view]))


def test_every_view_follows_a_deformation() -> None:
    support, query, truth = pair((16, 18, 20))
    results = list(RegistrationPropagator().propagate([support], [query], RegistrationPropagator.views))
    assert [r.view for r in results] == list(RegistrationPropagator.views)
    for result in results:
        assert result.label is not None, result.reason
        assert (result.label.dtype, result.label.shape) == (np.int16, query.shape)
        assert dice(result.label, truth) > 0.7 > 2 * dice(support.label, truth), result.view
        assert result.scores["similarity_after"] > result.scores["similarity_before"]


@pytest.mark.parametrize(
    ("shape", "spacing"),
    [
        ((8, 30, 34), (8.0, 1.5, 1.5)),
        ((60, 70), (1.0, 1.0, 1.0)),
        ((60, 70), (999.0, 0.1, 0.1)),
        ((6, 14, 16), (1, 1, 1)),
    ],
)
def test_thick_slices_flat_images_and_small_ones(shape: tuple[int, ...], spacing: tuple[float, float, float]) -> None:
    support, query, truth = pair(shape, spacing)
    result = one(support, query)
    assert result.label is not None, result.reason
    assert dice(result.label, truth) > (0.85 if min(shape) > 6 else 1.5 * dice(support.label, truth))


def test_an_organ_far_from_its_place_is_found() -> None:
    image, label = body((16, 26, 26))
    far = ((0, 0), (0, 0), (16, 0))
    support = Support(Image("s", image[None]), label)
    query = Image("q", np.pad(image, far)[None])
    result = one(support, query)
    assert result.label is not None, result.reason
    assert dice(result.label, np.pad(label, far)) > 0.9


def test_an_aligned_support_lies_where_the_query_is() -> None:
    image, label = body((16, 26, 26))
    far = ((0, 0), (0, 0), (16, 0))
    query = Image("q", np.pad(image, far)[None])
    aligned = affinely_aligned(Support(Image("s", image[None]), label), query)
    assert (aligned.image.case, aligned.image.shape) == ("s", query.shape)
    assert dice(aligned.label, np.pad(label, far)) > 0.9
    assert np.corrcoef(aligned.image.data.ravel(), query.data.ravel())[0, 1] > 0.9


@pytest.mark.parametrize("case", [lambda: _sparse(), lambda: _with_image(np.zeros_like)])
def test_a_support_that_cannot_be_aligned_stays_as_it_is(case) -> None:
    support, query = case()
    assert affinely_aligned(support, query) is support


@settings(max_examples=3)
@given(st.permutations(range(3)), st.tuples(*[st.booleans()] * 3), st.tuples(*[st.floats(-500, 500)] * 3))
def test_the_grid_of_the_query_does_not_matter(order: list[int], flips: tuple[bool, ...], origin: tuple) -> None:
    """The same body stored along other axes, the direction telling so, gets the same label."""
    support, query, _ = pair((10, 12, 11))
    straight = _straight()
    stored, turn = _stored(query, order, [k for k, f in enumerate(flips) if f], origin)
    result = one(support, stored)
    assert result.label is not None
    np.testing.assert_array_equal(result.label, turn(straight))


@cache
def _straight() -> np.ndarray:
    support, query, _ = pair((10, 12, 11))
    label = one(support, query).label
    assert label is not None
    return label


def _stored(image: Image, order: list[int], flips: list[int], origin: tuple[float, float, float]):
    """The image with its axes in another order and some reversed, and the function that does this to a label."""

    def turn(array: np.ndarray) -> np.ndarray:
        return np.flip(array.transpose(order), flips)

    cosines = np.eye(3)[:, order]  # rows: z, y, x of the body; columns: stored axes
    cosines[:, flips] *= -1
    spacing = tuple(image.spacing[k] for k in order)
    direction = tuple(cosines[::-1, ::-1].ravel().tolist())
    return Image(image.case, turn(image.data[0])[None], spacing, origin, direction), turn


@settings(max_examples=30)
@given(st.permutations(range(3)), st.tuples(*[st.booleans()] * 3), st.tuples(*[st.sampled_from([1, 4, 5, 7])] * 3))
def test_a_frame_is_left_the_way_it_was_entered(order: list[int], flips: tuple[bool, ...], shape: tuple) -> None:
    if shape.count(1) > 1:
        return
    array = np.arange(np.prod(shape), dtype=np.float32).reshape(shape)
    stored, turn = _stored(Image("i", array[None]), order, [k for k, f in enumerate(flips) if f], (0, 0, 0))
    frame = frame_of(stored)
    np.testing.assert_array_equal(frame.enter(turn(array)), array.squeeze())
    np.testing.assert_array_equal(frame.leave(frame.enter(turn(array))), turn(array))


def test_an_oblique_direction_is_read_as_the_nearest_axes() -> None:
    cosine, sine = np.cos(0.5), np.sin(0.5)
    oblique = (cosine, -sine, 0.0, sine, cosine, 0.0, 0.0, 0.0, 1.0)
    frame = frame_of(Image("i", np.zeros((1, 5, 6, 7), np.float32), direction=oblique))
    assert (frame.order, frame.flips) == ((0, 1, 2), ())


@settings(max_examples=15)
@given(st.integers(0, 1000), st.integers(1, 12), st.integers(2, 3))
def test_a_label_carried_nowhere_is_unchanged(seed: int, classes: int, dimension: int) -> None:
    label = np.random.default_rng(seed).integers(0, classes + 1, (5,) * dimension).astype(np.int16)
    values = [int(v) for v in np.unique(label) if v]
    grid = centred(label, (1.0,) * dimension)
    np.testing.assert_array_equal(
        carried_label(grid, values, grid, sitk.Transform(dimension, sitk.sitkIdentity)), label
    )


def test_several_channels_work_and_must_be_as_many() -> None:
    support, query, truth = pair((14, 16, 18))
    noise = np.random.default_rng(1).normal(size=(2, *query.shape)).astype(np.float32)
    two = Support(replace(support.image, data=np.concatenate([support.image.data, 0 * noise[:1]])), support.label)
    result = one(two, replace(query, data=np.concatenate([query.data, 0 * noise[1:]])))
    assert result.label is not None
    assert dice(result.label, truth) > 0.8
    assert "2 channels" in (one(two, query).reason or "")


def test_votes_follow_similarity() -> None:
    """Two misplaced labels on worse matching images do not outvote the one that fits."""
    support, query, truth = pair((14, 18, 18))
    rng = np.random.default_rng(0)
    wrong = np.roll(support.label, 6, axis=2)
    blurred = ndimage.gaussian_filter(support.image.data, (0, 3, 3, 3)) + 0.3 * rng.normal(
        size=support.image.data.shape
    )
    poor = Support(replace(support.image, data=blurred.astype(np.float32)), wrong)
    alone, together = one(support, query), one([poor, support, poor], query)
    assert alone.label is not None
    assert together.label is not None, together.reason
    assert dice(together.label, truth) > dice(alone.label, truth) - 0.05


def _sparse() -> tuple[Support, Image]:
    support, query, _ = pair((12, 14, 14))
    label = support.label.copy()
    label[:6] = 3
    return Support(support.image, label, ignore=3), query


def _with_image(change) -> tuple[Support, Image]:
    support, query, _ = pair((12, 14, 14))
    return support, replace(query, data=change(query.data))


def _nan(data: np.ndarray) -> np.ndarray:
    data = data.copy()
    data[0, 0, 0, 0] = np.nan
    return data


def _empty_label() -> tuple[Support, Image]:
    support, query, _ = pair((12, 14, 14))
    return Support(support.image, np.zeros_like(support.label)), query


@pytest.mark.parametrize(
    ("case", "reason"),
    [
        (_sparse, "sparse"),
        (_empty_label, "no foreground"),
        (lambda: _with_image(np.zeros_like), "constant"),
        (lambda: _with_image(_nan), "not finite"),
        (lambda: _with_image(lambda d: d[:, :2]), "4 voxels"),
        (lambda: _with_image(lambda d: d[:, :1]), "axes"),
    ],
)
def test_what_cannot_be_registered_says_why(case, reason: str) -> None:
    support, query = case()
    results = list(RegistrationPropagator().propagate([support], [query, query], ["local", "edges"]))
    assert len(results) == 4
    assert all(r.label is None and reason in (r.reason or "") for r in results)


def test_a_sparse_support_is_left_out_beside_a_whole_one() -> None:
    sparse, query = _sparse()
    whole = Support(sparse.image, pair((12, 14, 14))[0].label, ignore=3)
    result = one([sparse, whole], query)
    assert result.label is not None, result.reason
    assert result.scores["supports"] == 1
    assert set(np.unique(result.label)) <= {0, 1, 2}


def test_an_unrelated_image_is_no_good_label() -> None:
    support, query, _ = pair((14, 18, 18))
    noise = np.random.default_rng(3).normal(size=query.data.shape).astype(np.float32)
    result = one(support, replace(query, data=noise))
    assert result.label is None
    assert "similarity" in (result.reason or "")


@pytest.mark.parametrize(
    ("changed", "word"),
    [
        ({}, None),
        ({"similarity_after": 0.05}, "below"),
        ({"similarity_after": 0.3}, "no better"),
        ({"folding": 0.2}, "folds"),
        ({"volume_ratio": 9.0}, "volume"),
        ({"volume_ratio": 0.0}, "empty"),
    ],
)
def test_the_verdict_on_a_registration(changed: dict[str, float], word: str | None) -> None:
    good = {"similarity_before": 0.4, "similarity_after": 0.8, "folding": 0.0, "volume_ratio": 1.1}
    problem = problem_of({**good, **changed})
    assert problem is None if word is None else word in (problem or "")


def test_folding_is_seen() -> None:
    x = np.arange(16, dtype=np.float64)
    field = np.zeros((16, 16, 2))
    field[..., 0] = np.where((x > 6) & (x < 10), -2 * (x - 8), 0)[None]
    image = sitk.GetImageFromArray(field, isVector=True)
    everywhere = np.ones((16, 16), bool)
    assert folding_share(image, everywhere) > 0.05
    assert folding_share(sitk.GetImageFromArray(0 * field, isVector=True), everywhere) == 0


def test_queries_are_streamed_in_order() -> None:
    support, query, _ = pair((12, 14, 14))
    taken = itertools.count()
    queries = (replace(query, case=f"q{next(taken)}") for _ in range(3))
    stream = RegistrationPropagator().propagate([support], queries, ["local", "edges"])
    assert next(taken) == 0
    found = [(next(stream).case, next(stream).view) for _ in range(1)]
    assert found == [("q1", "edges")]
    assert next(taken) == 2, "the next query was read before it was asked for"


def test_the_same_again_in_another_process_state() -> None:
    support, query, _ = pair((14, 16, 16))
    before = sitk.ProcessObject.GetGlobalDefaultNumberOfThreads()
    propagator = pickle.loads(pickle.dumps(RegistrationPropagator(threads=2)))
    again = next(propagator.propagate([support], [query], ["local"]))
    assert sitk.ProcessObject.GetGlobalDefaultNumberOfThreads() == before
    first = one(support, query)
    assert first.scores == one(support, query).scores
    assert first.label is not None
    assert again.label is not None
    assert (first.label != again.label).mean() < 0.01


def test_protocol_and_bad_calls() -> None:
    support, query, _ = pair((12, 14, 14))
    propagator = RegistrationPropagator()
    assert isinstance(propagator, Propagator)
    assert len(propagator.default_views) >= 3
    assert set(propagator.default_views) <= set(propagator.views)
    propagator.fit([query])
    with pytest.raises(ValueError, match="at least one annotated"):
        propagator.propagate([], [query], ["local"])
    with pytest.raises(ValueError, match="sideways"):
        propagator.propagate([support], [query], ["sideways"])
    with pytest.raises(ValueError, match="threads"):
        RegistrationPropagator(threads=0)


def test_matched_takes_the_histogram_of_the_reference() -> None:
    rng = np.random.default_rng(0)
    array, reference = rng.normal(size=5000), rng.gamma(2.0, size=5000)
    same = matched(array, reference)
    assert np.abs(np.percentile(same, [10, 50, 90]) - np.percentile(reference, [10, 50, 90])).max() < 0.1
    assert (np.diff(same[np.argsort(array)]) >= 0).all()


@settings(max_examples=10)
@example((8, 40, 40), (0.5, 9.0, 9.0), 1000)
@given(st.tuples(*[st.integers(8, 40)] * 3), st.tuples(*[st.floats(0.5, 9)] * 3), st.integers(1000, 20000))
def test_a_coarser_grid_keeps_place_and_budget(size: tuple[int, ...], spacing: tuple, voxels: int) -> None:
    image = centred(np.zeros(size, np.float32), spacing)
    small = coarser(image, working_spacing(image, voxels))
    # An axis that would be one voxel long stays two, the others are rounded.
    assert np.prod([n if n > 2 else 1 for n in small.GetSize()]) <= 1.5 * voxels
    middle = [(n - 1) / 2 for n in small.GetSize()]
    np.testing.assert_allclose(small.TransformContinuousIndexToPhysicalPoint(middle), 0, atol=1e-6)


def test_starts_hold_the_true_place_first_and_the_centres_last() -> None:
    image, label = body((20, 30, 30))
    query = centred(np.pad(image, ((0, 0), (0, 0), (12, 0))), (1.0, 1.0, 1.0))
    support = centred(image, (1.0, 1.0, 1.0))
    found = starts(support, np.zeros(3), np.array([8.0, 8.0, 6.0]), query, 3)
    assert abs(found[0].transform.TransformPoint((0.0, 0.0, 0.0))[0] - 6) < 2
    assert found[-1].transform.TransformPoint((0.0, 0.0, 0.0)) == (0.0, 0.0, 0.0)
    assert label.any()


@pytest.mark.real
def test_hippocampus() -> None:
    folder = DATA / "hippocampus"
    if not folder.is_dir():
        pytest.skip(f"no data set at {folder}; set ONESHOT_DATA")
    split = json.loads((folder / "split.json").read_text())
    annotated = split["annotated_default"]
    cases = [case for case in split["pool"] if case != annotated][:3]
    results = RegistrationPropagator().propagate(
        [_real(folder, annotated)], (_real(folder, c).image for c in cases), ["local"]
    )
    scores = [dice(r.label, _real(folder, r.case).label) for r in results if r.label is not None]
    assert len(scores) == 3
    assert np.mean(scores) > 0.7


def _real(folder: Path, case: str) -> Support:
    image = sitk.ReadImage(str(folder / "images" / f"{case}.nii.gz"), sitk.sitkFloat32)
    label = sitk.GetArrayFromImage(sitk.ReadImage(str(folder / "labels" / f"{case}.nii.gz"))).astype(np.int16)
    array = sitk.GetArrayFromImage(image)[None]
    return Support(Image(case, array, image.GetSpacing()[::-1], image.GetOrigin(), image.GetDirection()), label)
