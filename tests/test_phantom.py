"""Phantoms: repeatable, of the promised geometry, with the anatomy's topology, hard enough to be worth a demo."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import SimpleITK as sitk
from scipy import ndimage
from skimage import io

from nnunet_oneshot.errors import OneShotError
from nnunet_oneshot.phantom import KINDS, LABELS, PhantomDataset, make_case, write_phantom_dataset

SMALL = (10, 48, 48)


def tree(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def write(folder: Path, **options: object) -> PhantomDataset:
    return write_phantom_dataset(folder / "raw", 999, truth=folder / "truth", **{"cases": 3, "shape": SMALL, **options})


def read(path: Path) -> np.ndarray:
    return sitk.GetArrayFromImage(sitk.ReadImage(str(path)))


def test_only_the_annotated_label_is_inside_the_raw_dataset(tmp_path: Path) -> None:
    made = write(tmp_path, test_cases=2)
    assert [p.name for p in (made.folder / "labelsTr").iterdir()] == [f"{made.annotated}.nii.gz"]
    assert len(list((made.folder / "imagesTr").iterdir())) == len(made.cases) == 3
    assert len(list((made.folder / "imagesTs").iterdir())) == len(made.test_cases) == 2
    assert {p.name[:-7] for p in made.truth.iterdir()} == {*made.cases, *made.test_cases}
    np.testing.assert_array_equal(
        read(made.folder / "labelsTr" / f"{made.annotated}.nii.gz"), read(made.truth / f"{made.annotated}.nii.gz")
    )


def test_same_seed_same_bytes_and_another_seed_other_patients(tmp_path: Path) -> None:
    first, again, other = (write(tmp_path / n, seed=s) for n, s in (("a", 1), ("b", 1), ("c", 2)))
    assert tree(first.folder) == tree(again.folder)
    assert tree(first.truth) == tree(again.truth)
    assert tree(first.truth) != tree(other.truth)


def test_more_cases_leave_the_first_ones_as_they_were(tmp_path: Path) -> None:
    few, many = write(tmp_path / "few", cases=2), write(tmp_path / "many", cases=4)
    assert tree(few.truth).items() <= tree(many.truth).items()


def test_thick_slices_geometry(tmp_path: Path) -> None:
    made = write(tmp_path, shape=None, cases=2)
    for case in made.cases:
        image = sitk.ReadImage(str(made.folder / "imagesTr" / f"{case}_0000.nii.gz"))
        label = sitk.ReadImage(str(made.truth / f"{case}.nii.gz"))
        assert image.GetSpacing() == pytest.approx((1.2, 1.2, 5.0))
        assert image.GetSize() == label.GetSize()
        assert image.GetOrigin() == label.GetOrigin()


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_anatomy(kind: str) -> None:
    """All classes; the wall encloses the cavity in each slice; the liver touches the kidney; the corner is air."""
    touching = 0
    for seed in range(4):
        image, label, _ = make_case(KINDS[kind], np.random.SeedSequence([seed]))
        assert image.shape == (len(KINDS[kind].channels), *label.shape)
        assert set(np.unique(label)) == set(LABELS.values())
        in_plane = ndimage.generate_binary_structure(3, 1)
        in_plane[[0, 2]] = False
        shell = ndimage.binary_dilation(label == LABELS["cavity"], in_plane) & (label != LABELS["cavity"])
        assert (label[shell] == LABELS["wall"]).mean() > 0.95
        touching += (ndimage.binary_dilation(label == 1) & (label == 2)).any()
        contrast = [abs(image[c][label == 4].mean() - image[c][label == 3].mean()) for c in range(len(image))]
        assert max(contrast) > 30
    assert touching >= 3


@pytest.mark.slow
def test_subjects_differ_so_that_copying_the_label_is_poor() -> None:
    scores = []
    reference = make_case(KINDS["thick_slices"], np.random.SeedSequence([0, 0]))[1]
    for i in range(1, 5):
        label = make_case(KINDS["thick_slices"], np.random.SeedSequence([0, i]))[1]
        z, y, x = np.minimum(reference.shape, label.shape)
        a, b = reference[:z, :y, :x], label[:z, :y, :x]
        scores.append([2 * ((a == v) & (b == v)).sum() / ((a == v).sum() + (b == v).sum()) for v in range(1, 5)])
    assert 0.2 < np.mean(scores) < 0.6


def test_colour_pictures(tmp_path: Path) -> None:
    made = write(tmp_path, kind="rgb2d", shape=(1, 64, 72))
    picture = io.imread(made.folder / "imagesTr" / f"{made.annotated}_0000.png")
    label = io.imread(made.truth / f"{made.annotated}.png")
    assert picture.shape == (*label.shape, 3)
    assert picture.dtype == label.dtype == np.uint8
    content = json.loads((made.folder / "dataset.json").read_text())
    assert content["channel_names"] == {"0": "R", "1": "G", "2": "B"}
    assert content["file_ending"] == ".png"


def test_bad_input_writes_nothing(tmp_path: Path) -> None:
    with pytest.raises(OneShotError, match="thick_slices, isotropic, rgb2d, found 'ct'"):
        write(tmp_path, kind="ct")
    with pytest.raises(OneShotError, match="at least 2 cases"):
        write(tmp_path, cases=1)
    inside = tmp_path / "raw" / "Dataset999_phantom" / "labels"
    with pytest.raises(OneShotError, match="outside of the dataset"):
        write_phantom_dataset(tmp_path / "raw", 999, truth=inside)
    assert not list(tmp_path.rglob("*"))
    write(tmp_path)
    before = tree(tmp_path)
    with pytest.raises(OneShotError, match="exists already"):
        write(tmp_path)
    assert tree(tmp_path) == before
