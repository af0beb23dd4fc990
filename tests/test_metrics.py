"""Surface metrics against SimpleITK's filters, and the conventions that the module's text promises."""

from __future__ import annotations

import math

import numpy as np
import pytest
import SimpleITK as sitk
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import ndimage

from nnunet_oneshot.metrics import Spacing, bootstrap, image_diagonal, nan_mean, score, surface

SPACINGS = [(1.0, 1.0, 1.0), (7.7, 1.25, 1.3)]


def blob(seed: int, shape: tuple[int, int, int] = (12, 24, 22)) -> np.ndarray:
    """A smooth random mask that keeps away from the border, (Z, Y, X)."""
    noise = ndimage.gaussian_filter(np.random.default_rng(seed).normal(size=shape), (1.5, 3, 3))
    mask = noise > np.quantile(noise, 0.7)
    mask[[0, -1]] = mask[:, [0, -1]] = mask[:, :, [0, -1]] = False
    return mask


def to_sitk(mask: np.ndarray, spacing: Spacing) -> sitk.Image:
    image = sitk.GetImageFromArray(mask.astype(np.uint8))
    image.SetSpacing(spacing[::-1])
    return image


def sitk_surface_distances(a: sitk.Image, b: sitk.Image) -> np.ndarray:
    """From a's contour to b's, by SimpleITK alone."""
    edge_a, edge_b = (sitk.LabelContour(i, fullyConnected=False) for i in (a, b))
    distance = sitk.Abs(sitk.SignedMaurerDistanceMap(edge_b, squaredDistance=False, useImageSpacing=True))
    return sitk.GetArrayFromImage(distance)[sitk.GetArrayFromImage(edge_a) > 0]


@pytest.mark.parametrize("spacing", SPACINGS)
@pytest.mark.parametrize("seed", range(4))
def test_same_figures_as_simpleitk(spacing: Spacing, seed: int) -> None:
    reference, prediction = blob(seed), blob(seed) ^ (blob(seed + 100) & blob(seed + 50))
    a, b = to_sitk(reference, spacing), to_sitk(prediction, spacing)
    overlap = sitk.LabelOverlapMeasuresImageFilter()
    overlap.Execute(a, b)
    hausdorff = sitk.HausdorffDistanceImageFilter()
    hausdorff.Execute(sitk.LabelContour(a, fullyConnected=False), sitk.LabelContour(b, fullyConnected=False))
    there, back = sitk_surface_distances(a, b), sitk_surface_distances(b, a)

    found = score(reference, prediction, spacing)

    assert found.dice == pytest.approx(overlap.GetDiceCoefficient())
    assert found.hd == pytest.approx(hausdorff.GetHausdorffDistance(), rel=1e-5)
    assert found.hd95 == pytest.approx(max(np.percentile(there, 95), np.percentile(back, 95)), rel=1e-5)
    assert found.assd == pytest.approx(np.concatenate([there, back]).mean(), rel=1e-5)
    assert (found.n_reference, found.n_prediction) == (reference.sum(), prediction.sum())


def test_thick_slices_weigh_in_millimetres() -> None:
    reference = np.zeros((8, 20, 20), bool)
    reference[2:4, 5:10, 5:10] = True
    moved = np.roll(reference, 1, axis=0)
    assert score(reference, moved, (5.0, 1.0, 1.0)).hd == 5.0
    assert score(reference, np.roll(reference, 1, axis=2), (5.0, 1.0, 1.0)).hd == 1.0


def test_one_slice_is_two_dimensional() -> None:
    square = np.zeros((1, 20, 20), bool)
    square[0, 5:12, 5:12] = True
    assert surface(square).sum() == 24
    assert score(square, np.roll(square, 2, axis=1), (999.0, 1.0, 1.0)).hd == 2.0


def test_masks_at_the_image_border_have_a_surface_there() -> None:
    assert surface(np.ones((4, 5, 6), bool)).sum() == 4 * 5 * 6 - 2 * 3 * 4


def test_both_empty_is_left_out_and_one_empty_is_the_worst() -> None:
    empty, mask, spacing = np.zeros((4, 6, 6), bool), np.zeros((4, 6, 6), bool), (5.0, 1.0, 2.0)
    mask[1, 2, 3] = True
    assert all(math.isnan(v) for v in score(empty, empty, spacing).values)
    diagonal = math.sqrt(20**2 + 6**2 + 12**2)
    for pair in [(empty, mask), (mask, empty)]:
        assert score(*pair, spacing).values == (0.0, *[pytest.approx(diagonal)] * 3)
    assert image_diagonal((1, 3, 4), (999.0, 1.0, 1.0)) == 5.0


def test_ignored_voxels_neither_count_nor_make_a_surface() -> None:
    reference = np.zeros((6, 12, 12), bool)
    reference[1:5, 2:10, 2:10] = True
    ignored = np.zeros_like(reference)
    ignored[:, :, 6:] = True
    wrong_where_ignored = reference.copy()
    wrong_where_ignored[:, :, 7:] = False
    found = score(reference, wrong_where_ignored, (1.0, 1.0, 1.0), ignored)
    assert found.values == (1.0, 0.0, 0.0, 0.0)
    assert not surface(reference & ~ignored, ignored)[2, 5, 5], "the border with ignored voxels is no surface"
    everything = score(reference, reference, (1.0, 1.0, 1.0), np.ones_like(reference))
    assert math.isnan(everything.dice)


def test_enclosed_by_ignored_voxels_has_dice_but_no_distance() -> None:
    mask = np.zeros((5, 5, 5), bool)
    mask[2, 2, 2] = True
    found = score(mask, mask, (1.0, 1.0, 1.0), ~mask)
    assert found.dice == 1.0
    assert math.isnan(found.hd)


def test_shapes_must_agree() -> None:
    with pytest.raises(ValueError, match="same shape"):
        score(np.ones((2, 2, 2), bool), np.ones((2, 2, 3), bool), (1.0, 1.0, 1.0))


@settings(max_examples=20)
@given(seed=st.integers(0, 10**6), shift=st.tuples(*[st.integers(-1, 1)] * 3))
def test_symmetric_ordered_and_blind_to_a_common_shift(seed: int, shift: tuple[int, int, int]) -> None:
    a, b, spacing = blob(seed), blob(seed + 1), (3.0, 1.0, 1.5)
    found = score(a, b, spacing)
    assert found.values == pytest.approx(score(b, a, spacing).values)
    assert found.hd >= found.hd95 >= 0
    assert found.hd >= found.assd >= 0
    padded = [np.pad(m, 2) for m in (a, b)]
    moved = [np.roll(m, shift, axis=(0, 1, 2)) for m in padded]
    assert score(*moved, spacing).values == pytest.approx(score(*padded, spacing).values)


def test_bootstrap_covers_a_known_mean() -> None:
    """95 % intervals of the mean of 40 normal draws hold the true mean about 95 times in 100."""
    rng = np.random.default_rng(0)
    draws = rng.normal(size=(200, 40))
    bounds = [bootstrap(d[:, None], lambda v: nan_mean(v, 0), n_bootstrap=200, seed=i) for i, d in enumerate(draws)]
    covered = np.mean([low[0] <= 0 <= high[0] for low, high in bounds])
    assert 0.90 <= covered <= 0.98


def test_bootstrap_is_repeatable_and_silent_on_one_case_or_on_nan() -> None:
    values = np.array([[0.2, np.nan], [0.4, np.nan], [0.9, 0.5]])
    first, again = (bootstrap(values, lambda v: nan_mean(v, 0), seed=3) for _ in range(2))
    np.testing.assert_array_equal(first, again)
    assert first[0][0] < 0.5 < first[1][0]
    assert first[0][1] == first[1][1] == 0.5
    assert np.isnan(bootstrap(values[:1], lambda v: nan_mean(v, 0))).all()
