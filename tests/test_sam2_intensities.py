"""Intensities reach the model in floats, whatever the image's kind and size."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from sam2_propagation.errors import PropagationError
from sam2_propagation.intensities import ImageSlices, Intensities, scale
from sam2_propagation.interface import Image


def _image(data: np.ndarray) -> Image:
    return Image("case", data.astype(np.float32))


def test_percentiles_leave_out_zeros_and_outliers() -> None:
    data = np.zeros((1, 4, 50, 50))
    data[0, 1:3] = np.linspace(100, 200, 5000).reshape(2, 50, 50)
    data[0, 1, 0, 0] = 1e6
    scaled = scale(_image(data))
    assert scaled.dtype == np.float32
    assert (scaled[0, 0] == 0).all()
    assert scaled[0, 1, 0, 0] == 1
    assert abs(np.median(scaled[0, 1:3]) - 0.5) < 0.01


def test_percentiles_over_positive_voxels_alone() -> None:
    data = np.concatenate([np.full(5000, -100.0), np.zeros(1000), np.linspace(1, 101, 5000)]).reshape(1, 1, 100, 110)
    published = scale(_image(data), Intensities(positive=True)).ravel()
    assert (published[:6000] == 0).all()
    assert abs(np.median(published[6000:]) - 0.5) < 0.01
    assert np.median(scale(_image(data)).ravel()[6000:]) > 0.7, "negative voxels count unless told otherwise"


def test_levels_between_8_bit_steps_survive() -> None:
    data = np.linspace(1, 2, 4096).reshape(1, 1, 64, 64)
    assert len(np.unique(scale(_image(data)))) > 4000


@pytest.mark.parametrize("window", [(-160.0, 240.0), "abdomen"])
def test_a_ct_window_is_absolute(window: tuple[float, float] | str) -> None:
    data = np.array([-1000.0, -160.0, 40.0, 240.0, 3000.0]).reshape(1, 1, 1, 5)
    assert scale(_image(data), Intensities(window)).ravel().tolist() == [0, 0, 0.5, 1, 1]


def test_channels_are_chosen_combined_or_colour() -> None:
    data = np.random.default_rng(0).uniform(1, 9, (4, 3, 5, 5))
    assert scale(_image(data)).shape == (1, 3, 5, 5)
    assert not np.array_equal(scale(_image(data)), scale(_image(data), Intensities(channels=2)))
    assert scale(_image(data), Intensities(channels=(0, 1, 3))).shape[0] == 3
    assert scale(_image(data), Intensities(channels="mean")).shape[0] == 1
    assert scale(_image(data[:3, :1])).shape[0] == 3
    assert scale(_image(data[:3])).shape[0] == 1


@pytest.mark.parametrize("channels", [4, (0, 1), (0, 1, 9), "all", -1])
def test_channels_that_are_not_there(channels: int | tuple[int, int, int] | str) -> None:
    with pytest.raises(PropagationError, match="of the 2 channels of case"):
        scale(_image(np.ones((2, 1, 4, 4))), Intensities(channels=channels))


def test_an_unknown_window_is_refused() -> None:
    with pytest.raises(PropagationError, match="abdomen"):
        scale(_image(np.ones((1, 1, 4, 4))), Intensities("liver"))


@pytest.mark.parametrize("value", [0.0, 7.0, np.nan])
def test_flat_images_are_black_not_nan(value: float) -> None:
    assert (scale(_image(np.full((1, 2, 4, 4), value))) == 0).all()


@pytest.mark.parametrize("shape", [(1, 1), (3, 200), (77, 31), (128, 128)])
def test_slices_of_any_size_become_square(shape: tuple[int, int]) -> None:
    data = np.random.default_rng(0).uniform(0, 1, (1, 2, *shape)).astype(np.float32)
    batch = ImageSlices(data, 64).batch([1, 0])
    assert batch.shape == (2, 3, 64, 64)
    assert torch.isfinite(batch).all()


def test_grey_is_three_equal_channels_in_sam2s_normalisation() -> None:
    batch = ImageSlices(np.full((1, 1, 64, 64), 0.5, np.float32), 64).batch([0])
    mean, deviation = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    torch.testing.assert_close(batch[0, :, 3, 3], (0.5 - mean) / deviation)
