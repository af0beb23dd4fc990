"""Reading a raw dataset: formats, channels, geometry, sparse labels, and what is annotated."""

from __future__ import annotations

import os
import pickle
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import SimpleITK as sitk
from nnunetv2.imageio.natural_image_reader_writer import NaturalImage2DIO
from nnunetv2.imageio.tif_reader_writer import Tiff3DIO
from raw_datasets import (
    FLIPPED_OBLIQUE,
    LABELS,
    ORIGIN,
    SHAPE,
    SPACING,
    Roots,
    edit_json,
    geometry,
    image_array,
    label_array,
    write_image,
    write_raw,
)

from nnunet_oneshot.dataset import RawDataset, open_dataset


@pytest.fixture
def opened(toy: Path) -> RawDataset:
    return open_dataset(501)


class SlowReader(NaturalImage2DIO):
    """The second of two that read at once ends last."""

    def read_seg(self, seg_fname: str) -> tuple[np.ndarray, dict]:
        time.sleep(0.2 if seg_fname == "first" else 0.4)
        return np.zeros((1, 1, 2, 2)), {"spacing": (1, 1, 1)}


def test_threads_that_read_leave_standard_output_alone(opened: RawDataset) -> None:
    """The review page's server reads image, label and divergence at once, and has a summary to print at its end."""
    before, slow = sys.stdout, replace(opened, reader=SlowReader)
    with ThreadPoolExecutor(2) as threads:
        first = threads.submit(slow.read_label, Path("first"))
        time.sleep(0.1)
        second = threads.submit(slow.read_label, Path("second"))
        assert first.result().shape == second.result().shape
    after, sys.stdout = sys.stdout, before
    assert after is before


@pytest.mark.parametrize("wanted", [501, "501", "Dataset501_toy"])
def test_found_by_id_and_by_name(toy: Path, wanted: int | str) -> None:
    found = open_dataset(wanted)
    assert (found.name, found.id, found.folder) == ("Dataset501_toy", 501, toy)


def test_annotated_is_what_has_a_label(roots: Roots) -> None:
    write_raw(roots.raw, annotated=("case_1",), apart=("far_0", "far_1"))
    found = open_dataset(501)
    assert [c.name for c in found.annotated] == ["case_1"]
    assert [c.name for c in found.unannotated] == ["case_0", "case_2", "far_0", "far_1"]
    assert found.case("far_1").images[0].parent.name == "imagesUn"


def test_test_images_are_never_cases(toy: Path) -> None:
    write_image(toy / "imagesTs/case_9_0000.nii.gz", image_array(9))
    assert "case_9" not in {c.name for c in open_dataset(501).cases}


@pytest.mark.parametrize("ending", [".nii.gz", ".nrrd", ".mha"])
def test_volume_with_its_geometry(roots: Roots, ending: str) -> None:
    write_raw(roots.raw, ending=ending)
    found = open_dataset(501)
    image = found.read_image(found.case("case_1"))
    np.testing.assert_array_equal(image.data, image_array(1)[None])
    assert image.data.dtype == np.float32
    assert image.spacing == pytest.approx(SPACING[::-1])
    assert image.origin == pytest.approx(ORIGIN)
    assert image.direction == pytest.approx(FLIPPED_OBLIQUE, abs=1e-6)


def test_channels_in_their_order(roots: Roots) -> None:
    write_raw(roots.raw, channels=2)
    found = open_dataset(501)
    data = found.read_image(found.case("case_2")).data
    np.testing.assert_array_equal(data, np.stack([image_array(2, 0), image_array(2, 1)]))


def test_rgb_file_holds_three_channels(roots: Roots) -> None:
    write_raw(roots.raw, ending=".png", channels=3)
    found = open_dataset(501)
    support = found.support(found.case("case_0"))
    assert support.image.data.shape == (3, 1, *SHAPE[1:])
    assert support.image.spacing == (1.0, 1.0, 1.0)
    np.testing.assert_array_equal(support.image.data[2, 0], image_array(0, 2)[0])
    np.testing.assert_array_equal(support.label[0], label_array(0)[0])


def test_four_dimensional_file_holds_all_channels(roots: Roots) -> None:
    folder = write_raw(roots.raw, annotated=())
    both = sitk.JoinSeries([sitk.GetImageFromArray(image_array(0, c)) for c in (0, 1)])
    for index in range(3):
        sitk.WriteImage(both, str(folder / f"imagesTr/case_{index}_0000.nii.gz"))
    edit_json(folder, channel_names={"0": "a", "1": "b"})
    found = open_dataset(501)
    image = found.read_image(found.cases[0])
    np.testing.assert_array_equal(image.data, np.stack([image_array(0, 0), image_array(0, 1)]))
    assert (len(image.origin), len(image.direction)) == (3, 9)


def test_flat_image_of_a_volume_format(roots: Roots) -> None:
    folder = write_raw(roots.raw, ending=".mha")
    flat = sitk.GetImageFromArray(image_array(0)[0])
    flat.SetSpacing((0.5, 0.7))
    flat.SetOrigin((3.0, 4.0))
    for index in range(3):
        sitk.WriteImage(flat, str(folder / f"imagesTr/case_{index}_0000.mha"))
    found = open_dataset(501)
    image = found.read_image(found.cases[0])
    assert (image.shape, image.spacing) == ((1, *SHAPE[1:]), (1.0, 0.7, 0.5))
    assert (image.origin, len(image.direction)) == ((3.0, 4.0, 0.0), 9)


def test_nibabel_readers_place_the_volume_where_simpleitk_does(toy: Path, opened: RawDataset) -> None:
    """The same file by three of nnU-Net's readers: one world position for every voxel."""
    case = opened.case("case_1")
    expected = _centre(opened, toy)
    for reader in ("NibabelIO", "NibabelIOWithReorient"):
        edit_json(toy, overwrite_image_reader_writer=reader)
        found = open_dataset(501)
        assert found.reader.__name__ == reader
        assert found.read_image(case).data.sum() == opened.read_image(case).data.sum()
        assert _centre(found, toy) == pytest.approx(expected, abs=1e-3)


def _centre(dataset: RawDataset, folder: Path) -> np.ndarray:
    """World position (x, y, z) in mm of the brightest voxel."""
    image = dataset.read_image(dataset.case("case_1"))
    index = np.array(np.unravel_index(image.data[0].argmax(), image.shape))[::-1]
    return np.asarray(image.direction).reshape(3, 3) @ (index * image.spacing[::-1]) + image.origin


@pytest.mark.parametrize(("shape", "reader"), [((9, 8), NaturalImage2DIO), ((5, 9, 8), Tiff3DIO)])
def test_tif_is_read_flat_or_deep_as_nnunet_would(roots: Roots, shape: tuple[int, ...], reader: type) -> None:
    folder = write_raw(roots.raw, ending=".tif", annotated=())
    for index in range(3):
        write_image(folder / f"imagesTr/case_{index}_0000.tif", image_array(index, 0, shape).astype(np.uint8))
    found = open_dataset(501)
    assert found.reader is reader
    assert found.read_image(found.cases[0]).shape == (1, *shape)[-3:]


def test_label_of_a_tif_has_the_spacing_beside_it(roots: Roots) -> None:
    """nnU-Net keeps the spacing of CASE_0000.tif and of the label CASE.tif in a CASE.json beside each."""
    folder = write_raw(roots.raw, ending=".tiff")
    for sub in ("imagesTr", "labelsTr"):
        (folder / sub / "case_0.json").write_text('{"spacing": [3.0, 1.1, 0.8]}')
    found = open_dataset(501)
    case = found.case("case_0")
    assert case.label is not None
    assert found.label_geometry(case.label) == found.image_geometry(case)
    assert found.image_geometry(case)[1] == (3.0, 1.1, 0.8)


def test_sparse_label_is_known_by_its_ignore_voxels(toy: Path, opened: RawDataset) -> None:
    assert opened.ignore is None
    assert opened.support(opened.case("case_0")).ignore is None
    edit_json(toy, labels={**LABELS, "ignore": 3})
    whole = open_dataset(501)
    assert (whole.ignore, whole.label_values) == (3, (0, 1, 2))
    assert whole.support(whole.case("case_0")).ignore is None, "declared, but every voxel is annotated"
    label = label_array(0)
    label[1:] = 3
    write_image(toy / "labelsTr/case_0.nii.gz", label)
    support = whole.support(whole.case("case_0"))
    assert (support.ignore, support.classes) == (3, (1, 2))


def test_regions(toy: Path) -> None:
    edit_json(toy, labels={"background": 0, "whole": [1, 2], "core": [2], "ignore": 3}, regions_class_order=[1, 2])
    found = open_dataset(501)
    assert (found.label_values, found.ignore) == ((0, 1, 2), 3)
    assert found.class_names == {1: "whole", 2: "core"}


def test_cases_of_the_dataset_key(toy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """nnU-Net's "dataset" key: relative paths, environment variables, labels that are not there yet."""
    monkeypatch.setenv("IMAGES", str(toy / "imagesTr"))
    edit_json(
        toy,
        dataset={
            "b": {"images": ["imagesTr/case_1_0000.nii.gz"], "label": "labelsTr/none.nii.gz"},
            "a": {"images": ["$IMAGES/case_0_0000.nii.gz"], "label": "../Dataset501_toy/labelsTr/case_0.nii.gz"},
            "c": {"images": ["imagesTr/case_2_0000.nii.gz"]},
        },
    )
    found = open_dataset(501)
    assert [c.name for c in found.cases] == ["a", "b", "c"]
    assert [c.name for c in found.annotated] == ["a"]
    np.testing.assert_array_equal(found.read_image(found.case("a")).data[0], image_array(0))


@pytest.mark.parametrize("ending", [".nii.gz", ".nrrd", ".mha"])
def test_written_label_has_its_images_geometry(roots: Roots, ending: str) -> None:
    folder = write_raw(roots.raw, ending=ending)
    found = open_dataset(501)
    written = folder / f"new{ending}"
    label = label_array(1).astype(np.int16)
    found.write_label(label, written, found.case("case_1"))
    image, saved = (sitk.ReadImage(str(p)) for p in (found.case("case_1").images[0], written))
    for read in ("GetSpacing", "GetOrigin", "GetDirection"):
        assert getattr(saved, read)() == pytest.approx(getattr(image, read)())
    np.testing.assert_array_equal(sitk.GetArrayFromImage(saved), label)
    np.testing.assert_array_equal(found.read_label(written), label)


def test_written_label_follows_an_image_that_was_replaced(toy: Path, opened: RawDataset) -> None:
    case, label = opened.case("case_1"), label_array(1).astype(np.int16)
    opened.write_label(label, toy / "before.nii.gz", case)
    write_image(case.images[0], image_array(1), direction=(1, 0, 0, 0, 1, 0, 0, 0, 1))
    os.utime(case.images[0], ns=(0, case.images[0].stat().st_mtime_ns + 10**9))
    opened.write_label(label, toy / "after.nii.gz", case)
    assert geometry(toy / "before.nii.gz") != geometry(toy / "after.nii.gz") == geometry(case.images[0])


def test_it_goes_to_workers_and_stays_as_it_is(opened: RawDataset) -> None:
    copy = pickle.loads(pickle.dumps(opened))
    assert copy == opened
    with pytest.raises(AttributeError):
        opened.folder = Path()  # type: ignore[misc]


def test_values_that_no_format_holds_are_not_laid_to_the_disk(toy: Path, tmp_path: Path) -> None:
    """What a correction by file says that has a negative value: it is told of its values."""
    dataset = open_dataset(501)
    odd = np.full(SHAPE, -1, np.int16)
    dataset.write_label(odd, tmp_path / "odd.nii.gz", dataset.cases[0])
    assert (dataset.read_label(tmp_path / "odd.nii.gz") == 255).all()
