"""DICOM series to volumes: geometry, compression, what is said of odd series, and that identifiers stay out."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import numpy as np
import pytest
import SimpleITK as sitk

from nnunet_oneshot.convert_dicom import convert_dicom, find_series
from nnunet_oneshot.errors import OneShotError

SHAPE = (6, 20, 16)
AXIAL = (1.0, 0.0, 0.0, 0.0, 1.0, 0.0)
OBLIQUE = (1.0, 0.0, 0.0, 0.0, 0.8, 0.6)
NAME, NUMBER = "Doe^Jane", "PATIENT77"


def stack(seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(-500, 900, SHAPE).astype(np.int16)


def write_series(
    folder: Path,
    uid: str,
    *,
    positions: list[tuple[float, float, float]] | None = None,
    orientation: tuple[float, ...] | list[tuple[float, ...]] = AXIAL,
    modality: str = "MR",
    description: str = "t2 tra",
    compressor: str | None = None,
    seed: int = 0,
) -> None:
    """One file a slice, as a scanner exports them; file names in an order of their own."""
    folder.mkdir(parents=True, exist_ok=True)
    image = sitk.GetImageFromArray(stack(seed))
    image.SetSpacing((0.8, 0.9, 3.0))
    places = positions or [(1.5, -2.5, 10.0 + 3 * i) for i in range(SHAPE[0])]
    for i, place in enumerate(places):
        turned = orientation[i] if isinstance(orientation, list) else orientation
        tags = {
            "0008|0060": modality,
            "0008|103e": description,
            "0010|0010": NAME,
            "0010|0020": NUMBER,
            "0020|000d": "1.2.826.0.1",
            "0020|000e": uid,
            "0008|0018": f"{uid}.{i + 1}",
            "0020|0013": str(i + 1),
            "0020|0032": "\\".join(map(str, place)),
            "0020|0037": "\\".join(map(str, turned)),
        }
        plane = image[:, :, i % SHAPE[0]]
        for key, value in tags.items():
            plane.SetMetaData(key, value)
        writer = sitk.ImageFileWriter()
        writer.KeepOriginalImageUIDOn()
        if compressor:
            writer.UseCompressionOn()
            writer.SetCompressor(compressor)
        writer.SetFileName(str(folder / f"{NUMBER}_{(7 * i) % 11}.dcm"))
        writer.Execute(plane)


@pytest.fixture
def raw(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "raw").mkdir()
    monkeypatch.setenv("nnUNet_raw", str(tmp_path / "raw"))
    return tmp_path / "raw"


def volume(raw: Path, number: int = 1) -> sitk.Image:
    return sitk.ReadImage(str(raw / "Dataset730_dicom" / "imagesTr" / f"case_{number:03d}_0000.nii.gz"))


@pytest.mark.parametrize("compressor", [None, "JPEG2000", "JPEG"])
def test_values_and_geometry_survive(raw: Path, tmp_path: Path, compressor: str | None) -> None:
    write_series(tmp_path / "in", "1.2.3", compressor=compressor)
    done = convert_dicom(tmp_path / "in", 730, labels=("liver", "spleen"))
    image = volume(raw)
    np.testing.assert_array_equal(sitk.GetArrayFromImage(image), stack())
    assert image.GetSpacing() == pytest.approx((0.8, 0.9, 3.0))
    assert image.GetOrigin() == pytest.approx((1.5, -2.5, 10.0))
    assert image.GetDirection() == pytest.approx(np.eye(3).ravel())
    assert done.notes == ()
    content = json.loads((raw / "Dataset730_dicom" / "dataset.json").read_text())
    assert content["channel_names"] == {"0": "MR"}
    assert content["labels"] == {"background": 0, "liver": 1, "spleen": 2}


def test_identifiers_stay_out_and_the_mapping_is_kept_apart(raw: Path, tmp_path: Path) -> None:
    write_series(tmp_path / "in" / NUMBER, "1.2.3.4444")
    convert_dicom(tmp_path / "in", 730, mapping=tmp_path / "private" / "mapping.json")
    for path in (raw / "Dataset730_dicom").rglob("*"):
        content = path.read_bytes() if path.is_file() else b""
        content = gzip.decompress(content) if path.name.endswith(".gz") else content
        for secret in (NAME, NUMBER, "1.2.3.4444", "t2 tra"):
            assert secret.encode() not in content
            assert secret not in path.name
    mapping = json.loads((tmp_path / "private" / "mapping.json").read_text())
    assert mapping["case_001"] == {"folder": NUMBER, "series": "1.2.3.4444", "description": "t2 tra"}
    with pytest.raises(OneShotError, match="holds identifiers"):
        convert_dicom(tmp_path / "in", 731, mapping=raw / "Dataset731_dicom" / "mapping.json")


def test_oblique_tilted_and_gapped_series_are_said(raw: Path, tmp_path: Path) -> None:
    along = [(0.0, -0.6 * 4 * i, 0.8 * 4 * i) for i in range(6)]
    write_series(tmp_path / "in" / "a_oblique", "1.1", orientation=OBLIQUE, positions=along)
    write_series(tmp_path / "in" / "b_tilted", "1.2", positions=[(0.0, 1.0 * i, 4.0 * i) for i in range(6)])
    write_series(tmp_path / "in" / "c_gapped", "1.3", positions=[(0, 0, z) for z in (0, 4, 8, 16, 20, 24)])
    notes = convert_dicom(tmp_path / "in", 730).notes
    assert notes == (
        "case_001: oblique slices; the direction is kept",
        "case_002: a tilted gantry or shifted slices: places are off by up to 5.0 mm",
        "case_003: uneven slice distances: 4.00 mm is assumed, but slices 3 and 4 are 8.00 mm apart (off by 4.00 mm)",
    )
    oblique = volume(raw, 1)
    assert oblique.GetSpacing()[2] == pytest.approx(4.0)
    assert oblique.TransformIndexToPhysicalPoint((0, 0, 5)) == pytest.approx(along[5])
    assert volume(raw, 3).GetSpacing()[2] == pytest.approx(4.0)


def test_what_is_no_stack_is_passed_over_and_said(raw: Path, tmp_path: Path) -> None:
    write_series(tmp_path / "in" / "good", "1.1")
    sagittal = (0.0, 1.0, 0.0, 0.0, 0.0, 1.0)
    write_series(tmp_path / "in" / "localiser", "1.2", orientation=[AXIAL, sagittal, AXIAL, AXIAL, AXIAL, AXIAL])
    write_series(tmp_path / "in" / "phases", "1.3", positions=[(0, 0, 4.0 * (i % 3)) for i in range(6)])
    write_series(tmp_path / "in" / "short", "1.4", positions=[(0, 0, 0.0), (0, 0, 5.0)])
    (tmp_path / "in" / "good" / "report.txt").write_text("no DICOM")
    done = convert_dicom(tmp_path / "in", 730)
    assert len(list((raw / "Dataset730_dicom" / "imagesTr").iterdir())) == 1
    assert [n.split(": ", 2)[2] for n in done.notes] == [
        "slices of several orientations (a localiser)",
        "several slices at one place (phases or echoes in one series)",
        "2 slices, fewer than 3",
    ]


def test_a_series_over_several_folders_is_one(tmp_path: Path) -> None:
    write_series(tmp_path / "in" / "x", "1.1")
    (tmp_path / "in" / "y").mkdir()
    for path in sorted((tmp_path / "in" / "x").iterdir())[::2]:
        path.rename(tmp_path / "in" / "y" / path.name)
    (found,) = find_series(tmp_path / "in")
    assert [s.position[2] for s in found.slices] == [10.0, 13.0, 16.0, 19.0, 22.0, 25.0]


def test_choice_by_modality_and_description(raw: Path, tmp_path: Path) -> None:
    write_series(tmp_path / "in" / "a", "1.1", modality="CT", description="abdomen", seed=1)
    write_series(tmp_path / "in" / "b", "1.2", description="T2 cor", seed=2)
    write_series(tmp_path / "in" / "c", "1.3", description="t1 tra", seed=3)
    with pytest.raises(OneShotError, match="found CT, MR; choose by -modality"):
        convert_dicom(tmp_path / "in", 730)
    with pytest.raises(OneShotError, match=r"found 3 others .*'abdomen'"):
        convert_dicom(tmp_path / "in", 730, description="flair")
    with pytest.raises(OneShotError, match="expected a regular expression"):
        convert_dicom(tmp_path / "in", 730, description="t2(")
    done = convert_dicom(tmp_path / "in", 730, modality="mr", description="^t2", dry_run=True)
    assert done.lines()[1] == "Dataset730_dicom: 1 in imagesTr"
    assert not list(raw.iterdir())
    convert_dicom(tmp_path / "in", 730, modality="mr", description="^t2")
    np.testing.assert_array_equal(sitk.GetArrayFromImage(volume(raw)), stack(2))


def test_no_dicom(raw: Path, tmp_path: Path) -> None:
    with pytest.raises(OneShotError, match="found no folder"):
        convert_dicom(tmp_path / "nowhere", 730)
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "a.dcm").write_text("no DICOM")
    with pytest.raises(OneShotError, match="expected DICOM series below"):
        convert_dicom(tmp_path / "in", 730)
    assert not list(raw.iterdir())
