"""YoloSeg's folders to a raw dataset: what goes where, what stays out, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from skimage import io

from nnunet_oneshot.convert_yoloseg import convert_yoloseg
from nnunet_oneshot.dataset import open_dataset
from nnunet_oneshot.errors import OneShotError

SHAPE = (12, 16)


def picture(path: Path, seed: int, colour: bool = True) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(seed).integers(0, 255, size=(*SHAPE, 3) if colour else SHAPE).astype(np.uint8)
    io.imsave(path, pixels, check_contrast=False)


def mask(path: Path, seed: int, values: tuple[int, ...] = (0, 255)) -> np.ndarray:
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(seed).choice(values, size=SHAPE).astype(np.uint8)
    io.imsave(path, pixels, check_contrast=False)
    return pixels


def layout(root: Path, colour: bool = True, values: tuple[int, ...] = (0, 255)) -> Path:
    """Four training and two test pictures, as YoloSeg's README lays them out."""
    for split, numbers in (("Train", range(1, 5)), ("Test", range(101, 103))):
        for number in numbers:
            picture(root / split / "JPEGImages" / f"XXX{number:03d}.png", number, colour)
            mask(root / split / "Annotations" / f"XXX{number:03d}.png", number, values)
    (root / "file_list").mkdir()
    (root / "file_list" / "train_label_frames.txt").write_text("XXX002.png\n\n")
    (root / "file_list" / "train_all_frames.txt").write_text("".join(f"XXX{n:03d}.png\n" for n in range(1, 5)))
    return root


@pytest.fixture
def raw(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "raw").mkdir()
    monkeypatch.setenv("nnUNet_raw", str(tmp_path / "raw"))
    return tmp_path / "raw"


def files(folder: Path) -> list[str]:
    return sorted(str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file())


def test_pictures_and_the_one_label(raw: Path, tmp_path: Path) -> None:
    source = layout(tmp_path / "ISIC2016")
    done = convert_yoloseg(source, 710)
    dataset = raw / "Dataset710_ISIC2016"
    assert done.datasets == (dataset,)
    assert files(dataset) == [
        "dataset.json",
        *[f"imagesTr/XXX{n:03d}_0000.png" for n in range(1, 5)],
        *[f"imagesTs/XXX{n:03d}_0000.png" for n in (101, 102)],
        "labelsTr/XXX002.png",
    ]
    original = io.imread(source / "Train" / "JPEGImages" / "XXX003.png")
    np.testing.assert_array_equal(io.imread(dataset / "imagesTr" / "XXX003_0000.png"), original)
    label = io.imread(dataset / "labelsTr" / "XXX002.png")
    np.testing.assert_array_equal(label, io.imread(source / "Train" / "Annotations" / "XXX002.png") // 255)
    assert "label values 0 became 0, 255 became 1" in done.notes
    opened = open_dataset(710)
    assert [c.name for c in opened.annotated] == ["XXX002"]
    assert len(opened.unannotated) == 3
    assert opened.read_image(opened.cases[0]).data.shape == (3, 1, *SHAPE)


def test_grey_pictures_have_one_channel_and_classes_are_numbered(raw: Path, tmp_path: Path) -> None:
    layout(tmp_path / "acdc", colour=False, values=(0, 85, 170, 255))
    convert_yoloseg(tmp_path / "acdc", 711, "acdc_2d", annotated=["XXX001.png", "XXX003"])
    content = json.loads((raw / "Dataset711_acdc_2d" / "dataset.json").read_text())
    assert content["labels"] == {"background": 0, "class_1": 1, "class_2": 2, "class_3": 3}
    assert content["channel_names"] == {"0": "grey"}
    opened = open_dataset(711)
    assert [c.name for c in opened.annotated] == ["XXX001", "XXX003"]
    assert opened.read_image(opened.cases[0]).data.shape == (1, 1, *SHAPE)
    assert opened.read_label(opened.annotated[0].label).max() == 3


def test_truth_goes_elsewhere(raw: Path, tmp_path: Path) -> None:
    source = layout(tmp_path / "set")
    picture(source / "Val" / "JPEGImages" / "v.png", 7)
    mask(source / "Val" / "Annotations" / "v.png", 7)
    convert_yoloseg(source, 712, truth=tmp_path / "truth")
    assert files(tmp_path / "truth") == [
        *[f"Test/XXX{n:03d}.png" for n in (101, 102)],
        *[f"Train/XXX{n:03d}.png" for n in range(1, 5)],
        "Val/v.png",
    ]
    assert set(np.unique(io.imread(tmp_path / "truth" / "Test" / "XXX101.png"))) == {0, 1}
    with pytest.raises(OneShotError, match="outside of the dataset"):
        convert_yoloseg(source, 713, truth=raw / "Dataset713_set" / "truth")


def test_dry_run_tells_everything_and_writes_nothing(raw: Path, tmp_path: Path) -> None:
    source = layout(tmp_path / "set")
    before = files(tmp_path)
    done = convert_yoloseg(source, 710, truth=tmp_path / "truth", dry_run=True)
    assert files(tmp_path) == before
    assert "Dataset710_set: 4 in imagesTr, 1 in labelsTr, 2 in imagesTs" in done.lines()
    assert any("XXX102.png -> imagesTs/XXX102_0000.png" in line for line in done.lines(verbose=True))


def test_what_is_not_that_layout_is_refused_and_nothing_written(raw: Path, tmp_path: Path) -> None:
    def refuses(match: str, source: Path, **options: object) -> None:
        with pytest.raises(OneShotError, match=match):
            convert_yoloseg(source, 710, **options)
        assert not list(raw.iterdir())

    refuses(r"Train/JPEGImages and Train/Annotations\), found no folder", tmp_path)
    source = layout(tmp_path / "set")
    refuses("unknown XXX999.png", source, annotated=["XXX999.png"])
    (source / "Train" / "Annotations" / "XXX002.png").unlink()
    refuses("expected a label of XXX002", source)
    mask(source / "Train" / "Annotations" / "XXX002.png", 2, tuple(range(200)))
    refuses("saved as JPEG or smoothed", source)
    picture(source / "Train" / "Annotations" / "XXX002.png", 2)
    refuses("found .*XXX002.png with colours", source)
    (source / "Train" / "Annotations" / "XXX002.png").write_bytes(b"no picture")
    refuses("damaged or unknown", source)
    mask(source / "Train" / "Annotations" / "XXX002.png", 2)
    picture(source / "Train" / "JPEGImages" / "XXX 002.png", 2)
    picture(source / "Train" / "JPEGImages" / "XXX_002.png", 3)
    refuses("both become imagesTr/XXX_002_0000.png", source)
    (source / "Train" / "JPEGImages" / "XXX 002.png").unlink()
    (source / "file_list" / "train_label_frames.txt").unlink()
    refuses("expected the annotated picture's file name", source)
    (raw / "Dataset710_other").mkdir()
    with pytest.raises(OneShotError, match="Dataset710_other; choose another -d"):
        convert_yoloseg(source, 710, annotated=["XXX003.png"])
    assert [p.name for p in raw.iterdir()] == ["Dataset710_other"]
