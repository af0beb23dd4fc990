"""What nnU-Net's loader draws of cases with an ignore label: where it crops, and how often divergence has a label."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import blosc2
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from nnunetv2.training.dataloading.data_loader import nnUNetDataLoader

from nnunet_oneshot.case_selection import with_share
from nnunet_oneshot.errors import OneShotError
from nnunet_oneshot.training_cases import Crop, TrainingCases

FEW = settings(max_examples=25)
KEY = (-1, 0, 1)


class OneCase:
    """A dataset of one case, labelled everywhere."""

    def __init__(self, shape: tuple[int, int, int]) -> None:
        self.identifiers = ["a"]
        self.image = np.zeros((1, *shape), np.float32)
        voxels = np.argwhere(np.ones((1, *shape), bool))
        self.locations: dict[Any, Any] = {KEY: voxels, 1: voxels[:1]}

    def load_case(self, _: str) -> tuple[Any, Any, Any, dict[str, Any]]:
        seg = np.full(self.image.shape, 2, np.int16)
        return self.image, seg, None, {"class_locations": self.locations}


def loader(data: Any, crop: Crop, ignore: bool) -> Any:
    labels = SimpleNamespace(all_labels=[0, 1], has_ignore_label=ignore)
    return nnUNetDataLoader(data, 2, crop.drawn, crop.final, labels, 0.33)


@FEW
@given(st.tuples(*[st.integers(1, 40)] * 3), st.tuples(*[st.integers(4, 24)] * 3), st.tuples(*[st.integers(0, 9)] * 3))
def test_boxes_beside_an_ignore_label_lie_where_they_lie_without_one(
    shape: tuple[int, int, int], final: tuple[int, ...], more: tuple[int, ...]
) -> None:
    crop = Crop(tuple(f + m for f, m in zip(final, more, strict=True)), final)
    plain, data = OneCase(shape), OneCase(shape)
    cases = TrainingCases(data, KEY, crop, Path("none"), 0.0)  # type: ignore[arg-type]
    locations = cases.load_case("a")[3]["class_locations"]
    np.random.seed(0)
    without, beside = loader(plain, crop, ignore=False), loader(cases, crop, ignore=True)
    ours = np.array([beside.get_bbox(shape, False, locations)[0] for _ in range(50)])
    nnunets = np.array([without.get_bbox(shape, False, plain.locations)[0] for _ in range(200)])
    last = nnunets.max(0)
    first = np.minimum(nnunets.min(0), last)
    exact = nnunets.min(0) == nnunets.max(0)
    assert (ours[:, exact] == first[exact]).all()
    lowest, highest = crop_bounds(shape, crop)
    assert (ours >= lowest).all()
    assert (ours <= highest).all()


def crop_bounds(shape: tuple[int, ...], crop: Crop) -> tuple[np.ndarray, np.ndarray]:
    """First and last corner of nnU-Net's boxes, from its own words on padding: half on each side, the rest behind."""
    image, drawn, final = np.array(shape), np.array(crop.drawn), np.array(crop.final)
    padding = np.maximum(drawn - final, drawn - image)
    return -padding // 2, image + padding // 2 + padding % 2 - drawn


def test_a_two_dimensional_box_keeps_its_slice() -> None:
    assert Crop((8, 8), (6, 6)).last_centre((5, 20, 4)).tolist() == [4, 17, 2]


def test_other_classes_and_cases_without_a_labelled_voxel_stay_as_they_are() -> None:
    data = OneCase((4, 4, 4))
    cases = TrainingCases(data, KEY, Crop((8, 8, 8), (8, 8, 8)), Path("none"), 0.0)  # type: ignore[arg-type]
    kept = cases.load_case("a")[3]["class_locations"]
    assert kept[1] is data.locations[1]
    data.locations = {KEY: []}
    assert cases.load_case("a")[3]["class_locations"][KEY] == []


@pytest.mark.parametrize(("share", "low", "high"), [(0.0, 0, 0), (0.5, 30, 70), (1.0, 100, 100)])
def test_the_filled_label_is_drawn_as_often_as_asked(tmp_path: Path, share: float, low: int, high: int) -> None:
    data = OneCase((4, 4, 4))
    blosc2.asarray(np.zeros((1, 4, 4, 4), np.int16), urlpath=str(tmp_path / "a.b2nd"))
    cases = TrainingCases(data, KEY, Crop((4, 4, 4), (4, 4, 4)), tmp_path, share)  # type: ignore[arg-type]
    np.random.seed(0)
    drawn = [int(np.asarray(cases.load_case("a")[1][:]).max()) for _ in range(100)]
    assert low <= drawn.count(0) <= high
    assert drawn.count(0) + drawn.count(2) == 100


def test_a_case_without_a_filled_label_keeps_its_ignore_voxels(tmp_path: Path) -> None:
    cases = TrainingCases(OneCase((4, 4, 4)), KEY, Crop((4, 4, 4), (4, 4, 4)), tmp_path, 1.0)  # type: ignore[arg-type]
    assert (cases.load_case("a")[1] == 2).all()


@FEW
@given(st.integers(1, 40), st.integers(0, 5), st.floats(0, 0.9))
def test_favoured_cases_have_at_least_their_share(others: int, favoured: int, share: float) -> None:
    names = [f"other_{n}" for n in range(others)] + [f"own_{n}" for n in range(favoured)]
    own = {f"own_{n}" for n in range(favoured)}
    drawn = with_share(names, own, share)
    assert set(drawn) == set(names)
    counts = [drawn.count(name) for name in own]
    if favoured:
        assert sum(counts) / len(drawn) >= share - 1e-9
        assert len(set(counts)) == 1
    assert [name for name in drawn if name not in own] == names[:others]


def test_a_share_of_all_draws_is_refused() -> None:
    with pytest.raises(OneShotError, match="annotated_share"):
        with_share(["a"], {"a"}, 1.0)
