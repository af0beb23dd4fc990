"""Labels out to other programs and back: the formats people save, and what is refused."""

from __future__ import annotations

import shlex
from pathlib import Path

import numpy as np
import pytest
import SimpleITK as sitk
from raw_datasets import Roots, geometry, label_array, read
from review_dataset import make_reviewed

from nnunet_oneshot.dataset import Case, RawDataset, open_dataset
from nnunet_oneshot.errors import OneShotError
from nnunet_oneshot.review.corrections import check_in, check_out, forget, read_label
from nnunet_oneshot.store import Store


class Bench:
    """Case 2 of dataset 601."""

    def __init__(self, folder: Path, ending: str) -> None:
        self.raw: RawDataset = open_dataset(501)
        self.store = Store(folder, ending)
        self.case: Case = self.raw.case("case_2")

    def take(self, path: Path, name: str | None = None) -> np.ndarray:
        return read_label(self.raw, self.store, self.case, path.read_bytes(), path.name if name is None else name)


@pytest.fixture
def bench(roots: Roots, tmp_path: Path) -> Bench:
    return Bench(make_reviewed(roots, tmp_path), ".nii.gz")


def save(path: Path, label: np.ndarray, like: Path, **changes: tuple[float, ...]) -> Path:
    """Write a label with an image's geometry, or with `spacing`, `origin` or `direction` changed."""
    image = sitk.GetImageFromArray(label)
    model = sitk.ReadImage(str(like))
    image.SetSpacing(changes.get("spacing", model.GetSpacing()))
    image.SetOrigin(changes.get("origin", model.GetOrigin()))
    image.SetDirection(changes.get("direction", model.GetDirection()))
    sitk.WriteImage(image, str(path))
    return path


@pytest.mark.parametrize("name", ["a.nii.gz", "a.nii", "a.nrrd", "a.mha"])
def test_label_comes_back_in_the_formats_people_save(bench: Bench, tmp_path: Path, name: str) -> None:
    label = label_array(3)
    for dtype in (np.uint8, np.int16, np.float32):
        path = save(tmp_path / name, label.astype(dtype), bench.case.images[0])
        assert (bench.take(path) == label).all()
        assert bench.take(path).dtype == np.int16


@pytest.mark.parametrize("name", ["a.nii.gz", "a.mha"])
@pytest.mark.parametrize(
    ("what", "change"),
    [
        ("spacing", {"spacing": (0.8, 1.1, 2.5)}),
        ("origin", {"origin": (5.0, -7.0, 12.0)}),
        ("direction", {"direction": (1.0, 0.0, 0.0, 0.0, 1.0, 0.0, 0.0, 0.0, 1.0)}),
    ],
)
def test_another_geometry_is_refused(
    bench: Bench, tmp_path: Path, name: str, what: str, change: dict[str, tuple[float, ...]]
) -> None:
    path = save(tmp_path / name, label_array(2), bench.case.images[0], **change)
    with pytest.raises(OneShotError, match=f"corrected label of case_2.*expected the {what}") as refused:
        bench.take(path)
    assert str(tmp_path) not in str(refused.value), "no path of a temporary file"


@pytest.mark.parametrize("name", ["a.nii.gz", "a.nrrd"])
def test_other_sizes_values_and_files_are_refused(bench: Bench, tmp_path: Path, name: str) -> None:
    like = bench.case.images[0]
    with pytest.raises(OneShotError, match=r"expected the (size|shape)"):
        bench.take(save(tmp_path / name, label_array(2)[:-1], like))
    with pytest.raises(OneShotError, match=r"expected label values \[0, 1, 2\].*found \[7\]"):
        bench.take(save(tmp_path / name, np.where(label_array(2) == 2, 7, label_array(2)).astype(np.uint8), like))
    with pytest.raises(OneShotError, match="whole numbers"):
        bench.take(save(tmp_path / name, label_array(2) * np.float32(0.5), like))
    (tmp_path / name).write_bytes(b"no image at all")
    with pytest.raises(OneShotError, match="expected a whole"):
        bench.take(tmp_path / name)


def test_unknown_format_is_refused(bench: Bench, tmp_path: Path) -> None:
    path = save(tmp_path / "a.nrrd", label_array(2), bench.case.images[0])
    for name in ("label.exe", "../../label", ""):
        with pytest.raises(OneShotError, match="expected a label as"):
            bench.take(path, name)


def test_there_and_back_by_files(bench: Bench) -> None:
    done = check_out(bench.raw, bench.store, bench.case)
    words = shlex.split(done.command)
    assert words[0] == "itksnap"
    assert [Path(words[i + 1]).is_file() for i, word in enumerate(words) if word in ("-g", "-s", "-l")] == [True] * 3
    assert geometry(done.label) == geometry(bench.case.images[0])
    assert "organ" in done.names.read_text()
    with pytest.raises(OneShotError, match="found none that changed"):
        check_in(bench.raw, bench.store, bench.case)
    corrected = label_array(3)
    save(done.label, corrected, done.label)
    check_out(bench.raw, bench.store, bench.case)
    assert (read(done.label) == corrected).all(), "opening it again does not throw the work away"
    assert (check_in(bench.raw, bench.store, bench.case) == corrected).all()
    forget(bench.store, bench.case)
    check_out(bench.raw, bench.store, bench.case)
    assert (read(done.label) == read(bench.store.fused_path("case_2"))).all()


def test_segments_of_3d_slicer_are_told_by_name(bench: Bench) -> None:
    done = check_out(bench.raw, bench.store, bench.case)
    assert done.segmentation is not None
    opened = sitk.ReadImage(str(done.segmentation))
    # As if the segments had been numbered anew.
    swapped = sitk.GetImageFromArray(np.choose(read(done.segmentation), [0, 2, 1]).astype(np.uint8))
    swapped.CopyInformation(opened)
    for key in opened.GetMetaDataKeys():
        swapped.SetMetaData(key, opened.GetMetaData(key))
    swapped.SetMetaData("Segment0_LabelValue", "2")
    swapped.SetMetaData("Segment1_LabelValue", "1")
    sitk.WriteImage(swapped, str(done.segmentation))
    assert (check_in(bench.raw, bench.store, bench.case) == read(bench.store.fused_path("case_2"))).all()
    swapped.SetMetaData("Segment0_Name", "Segment_1")
    sitk.WriteImage(swapped, str(done.segmentation))
    with pytest.raises(OneShotError, match="expected segments named organ, spot, found 'Segment_1'"):
        check_in(bench.raw, bench.store, bench.case)


def test_both_files_edited_is_a_question(bench: Bench) -> None:
    done = check_out(bench.raw, bench.store, bench.case)
    assert done.segmentation is not None
    for path in (done.label, done.segmentation):
        save(path, label_array(3), done.label)
    with pytest.raises(OneShotError, match=r"found label.nii.gz and label.seg.nrrd"):
        check_in(bench.raw, bench.store, bench.case)


def test_pictures(roots: Roots, tmp_path: Path) -> None:
    bench = Bench(make_reviewed(roots, tmp_path, ending=".png", channels=3), ".png")
    done = check_out(bench.raw, bench.store, bench.case)
    assert done.label.suffix == ".png"
    assert done.segmentation is None
    assert (bench.take(done.label) == read(bench.store.fused_path("case_2"))).all()
    brushed = sitk.GetImageFromArray(label_array(3)[:1])
    sitk.WriteImage(brushed, str(tmp_path / "drawing.nii"))
    assert (bench.take(tmp_path / "drawing.nii") == label_array(3)[:1]).all(), "what the page's brush sends"
