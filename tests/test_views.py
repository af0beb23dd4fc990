"""Views are undone exactly, show what their names say, and bring differently stored images upright."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sam2_propagation.errors import PropagationError
from sam2_propagation.interface import Image
from sam2_propagation.views import VIEWS, Presentation, natural_plane, plane_of, present

SIGNED_AXES = [
    np.asarray(signs)[:, None] * np.eye(3)[list(order)]
    for order in ((0, 1, 2), (0, 2, 1), (1, 0, 2), (1, 2, 0), (2, 0, 1), (2, 1, 0))
    for signs in ((1, 1, 1), (-1, -1, 1), (1, -1, -1), (-1, 1, 1))
]


def _image(shape: tuple[int, int, int], direction: np.ndarray | None = None, spacing=(1.0, 1.0, 1.0)) -> Image:
    data = np.arange(int(np.prod(shape)), dtype=np.float32).reshape(1, *shape)
    return Image("case", data, spacing, direction=tuple((np.eye(3) if direction is None else direction).ravel()))


@settings(max_examples=60)
@given(
    shape=st.tuples(st.integers(2, 6), st.integers(1, 7), st.integers(1, 5)),
    view=st.sampled_from(VIEWS),
    direction=st.sampled_from(SIGNED_AXES),
    tilt=st.floats(-0.4, 0.4),
)
def test_every_view_is_undone(shape: tuple[int, int, int], view: str, direction: np.ndarray, tilt: float) -> None:
    turn = np.array([[np.cos(tilt), -np.sin(tilt), 0], [np.sin(tilt), np.cos(tilt), 0], [0, 0, 1]])
    image = _image(shape, turn @ direction)
    shown = present(image, view)
    assert np.array_equal(shown.inverse(shown.forward(image.data)), image.data)
    assert np.array_equal(shown.inverse(shown.forward(image.data[0])), image.data[0])


@settings(max_examples=40)
@given(view=st.sampled_from(VIEWS), direction=st.sampled_from(SIGNED_AXES))
def test_storage_does_not_change_what_is_seen(view: str, direction: np.ndarray) -> None:
    upright = _image((3, 4, 5), spacing=(5.0, 1.0, 1.0))
    # The same anatomy, stored along other axes: array axes (Z, Y, X) run along the columns (z, y, x) of `direction`.
    order, flips = [], []
    for axis in range(3):
        column = direction[:, 2 - axis]
        world = int(np.abs(column).argmax())
        order.append(2 - world)
        flips.append(column[world] < 0)
    data = np.flip(upright.data.transpose(0, *(1 + o for o in order)), [1 + a for a in range(3) if flips[a]])
    spacing = tuple(upright.spacing[o] for o in order)
    stored = Image("stored", data, spacing, direction=tuple(direction.ravel()))
    seen = present(stored, view).forward(stored.data)
    assert np.array_equal(seen, present(upright, view).forward(upright.data))


def test_yolosegs_three_views() -> None:
    image = _image((1, 2, 3))
    seen = {view: present(image, view).forward(image.data[0])[0].tolist() for view in ("identity", "rot90", "rot180")}
    assert seen["identity"] == [[0, 1, 2], [3, 4, 5]]
    assert seen["rot90"] == [[3, 0], [4, 1], [5, 2]]
    assert seen["rot180"] == [[5, 4, 3], [2, 1, 0]]


def test_planes_show_their_slices() -> None:
    image = _image((2, 3, 4))
    shapes = {plane: present(image, plane).forward(image.data[0]).shape for plane in ("axial", "coronal", "sagittal")}
    assert shapes == {"axial": (2, 3, 4), "coronal": (3, 2, 4), "sagittal": (4, 2, 3)}


@pytest.mark.parametrize(
    ("spacing", "plane"),
    [
        ((1, 1, 1), "axial"),
        ((5, 1, 1), "axial"),
        ((1, 4, 1), "coronal"),
        ((1, 1, 3), "sagittal"),
        ((1, 2, 2), "coronal"),
    ],
)
def test_slices_lie_across_the_thickest_axis(spacing: tuple[float, float, float], plane: str) -> None:
    assert natural_plane(_image((4, 4, 4), spacing=spacing)) == plane


def test_a_query_is_sliced_like_its_support() -> None:
    query = _image((3, 4, 5), spacing=(1.0, 1.0, 3.0))
    assert present(query, "identity").axes[0] == 2
    assert present(query, "identity", natural="axial").axes[0] == 0
    assert present(query, "coronal", natural="axial").axes[0] == 1


def test_a_2d_image_has_no_other_plane() -> None:
    with pytest.raises(PropagationError, match="found the 2D image"):
        present(_image((1, 8, 8)), "coronal")
    # A thick 'third' axis, or none at all, never makes rows into slices.
    assert present(_image((1, 8, 8), spacing=(1.0, 7.0, 1.0)), "identity").axes[0] == 0


def test_unknown_views_are_refused() -> None:
    for view in ("rot270", "axial_identity", "oblique", ""):
        with pytest.raises(PropagationError, match="expected views out of"):
            present(_image((2, 2, 2)), view)


def test_names_are_unique_and_say_their_plane() -> None:
    assert len(set(VIEWS)) == len(VIEWS) == 12
    assert plane_of("rot90") is None
    assert plane_of("coronal_rot180") == "coronal"


def test_presentations_of_different_turns_differ() -> None:
    square = np.arange(9).reshape(1, 3, 3)
    seen = [Presentation((0, 1, 2), (False,) * 3, turns).forward(square).tobytes() for turns in range(3)]  # type: ignore[arg-type]
    assert len(set(seen)) == 3
