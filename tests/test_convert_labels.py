"""Labels for people's tools, by the command: 3D Slicer's files, and DICOM segmentations that other readers open."""

from __future__ import annotations

import json
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import SimpleITK as sitk
from conftest import Answer
from raw_datasets import Roots, label_array, read, write_image
from test_convert_dicom import NAME, OBLIQUE, SHAPE, write_series

from nnunet_oneshot import cli
from nnunet_oneshot.consensus import consensus
from nnunet_oneshot.convert_dicom import convert_dicom

Call = Callable[..., Answer]
PLACES = [(0.0, -0.6 * 4 * i, 0.8 * 4 * i) for i in range(SHAPE[0])]


@pytest.fixture
def labelled(toy: Path, tmp_path: Path) -> Path:
    for index in (1, 2):
        write_image(tmp_path / "tool" / f"case_{index}.nii.gz", label_array(index))
    consensus(501, 601, [tmp_path / "tool"], num_processes=1)
    return toy.parent / "Dataset601_toy_oneshot"


def test_best_guesses_for_slicer(labelled: Path, tmp_path: Path, call: Call) -> None:
    answer = call(cli.convert_labels, "-d", 601, "-o", tmp_path / "out", "-json")
    assert answer.code == 0
    assert len(json.loads(answer.out)["files"]) == 3
    written = sitk.ReadImage(str(tmp_path / "out" / "case_2.seg.nrrd"))
    assert (sitk.GetArrayFromImage(written) == label_array(2)).all()
    assert written.GetMetaData("Segment1_Name") == "spot"
    assert "spot" in (tmp_path / "out" / "labels.txt").read_text()
    again = call(cli.convert_labels, "-d", 601, "-o", tmp_path / "out")
    assert (again.code, "expected a free name" in again.error) == (2, True)


def test_other_folders_and_what_does_not_fit(labelled: Path, tmp_path: Path, call: Call) -> None:
    assert call(cli.convert_labels, "-d", 501, "-o", tmp_path / "a").code == 0, "a raw dataset's own labels"
    assert [p.name for p in (tmp_path / "a").glob("*.nrrd")] == ["case_0.seg.nrrd"]
    (tmp_path / "empty").mkdir()
    assert "found none" in call(cli.convert_labels, "-d", 501, "-o", tmp_path / "b", "-i", tmp_path / "empty").error
    write_image(tmp_path / "odd" / "nobody.nii.gz", label_array(0))
    assert "nobody" in call(cli.convert_labels, "-d", 501, "-o", tmp_path / "b", "-i", tmp_path / "odd").error
    write_image(tmp_path / "short" / "case_1.nii.gz", label_array(0)[1:])
    assert "shape" in call(cli.convert_labels, "-d", 501, "-o", tmp_path / "b", "-i", tmp_path / "short").error
    assert "together" in call(cli.convert_labels, "-d", 501, "-o", tmp_path / "b", "-dicom", tmp_path).error


@pytest.fixture
def scanned(roots: Roots, tmp_path: Path) -> Path:
    """An oblique series as a raw dataset 730 of one case, and a label of it; the folder of labels."""
    pydicom = pytest.importorskip("pydicom", reason="needs the extra dicom: pip install -e '.[dicom]'")
    pytest.importorskip("highdicom", reason="needs the extra dicom: pip install -e '.[dicom]'")
    write_series(tmp_path / "in", "1.2.3", orientation=OBLIQUE, positions=PLACES)
    for file in (tmp_path / "in").glob("*.dcm"):
        header = pydicom.dcmread(file)
        header.FrameOfReferenceUID = "1.2.3.9"
        header.save_as(file)
    convert_dicom(tmp_path / "in", 730, labels=("liver", "spleen"), mapping=tmp_path / "mapping.json")
    image = sitk.ReadImage(str(roots.raw / "Dataset730_dicom" / "imagesTr" / "case_001_0000.nii.gz"))
    written = sitk.GetImageFromArray(drawn())
    written.CopyInformation(image)
    (tmp_path / "labels").mkdir()
    sitk.WriteImage(written, str(tmp_path / "labels" / "case_001.nii.gz"))
    return tmp_path / "labels"


def drawn() -> np.ndarray:
    label = np.zeros(SHAPE, np.uint8)
    label[1:4, 3:9, 5:9] = 1
    label[2, 4:6, 10:14] = 2
    return label


def dicom(scanned: Path, call: Call) -> Path:
    out = scanned.parent / "seg"
    words = ("-d", 730, "-i", scanned, "-o", out, "-dicom", scanned.parent / "in")
    answer = call(cli.convert_labels, *words, "-mapping", scanned.parent / "mapping.json")
    assert answer.code == 0, answer.err
    return out / "case_001.dcm"


def test_dicom_segmentation_lies_where_the_image_does(scanned: Path, call: Call) -> None:
    pydicom = pytest.importorskip("pydicom")
    found = pydicom.dcmread(dicom(scanned, call))
    assert found.SOPClassUID.name == "Segmentation Storage"
    assert str(found.PatientName) == NAME, "a segmentation belongs to its patient"
    assert [s.SegmentLabel for s in found.SegmentSequence] == ["liver", "spleen"]
    result, places = np.zeros(SHAPE, np.uint8), np.array(PLACES)
    for plane, frame in zip(found.pixel_array, found.PerFrameFunctionalGroupsSequence, strict=True):
        place = np.array(frame.PlanePositionSequence[0].ImagePositionPatient, float)
        z = int(np.abs(places - place).sum(axis=1).argmin())
        result[z][plane > 0] = frame.SegmentIdentificationSequence[0].ReferencedSegmentNumber
    assert (result == drawn()).all()


def test_dcmqi_reads_the_segmentation(scanned: Path, call: Call) -> None:
    program = shutil.which("segimage2itkimage")
    if program is None:
        pytest.skip("needs dcmqi, an independent reader: pip install dcmqi")
    out = scanned.parent / "dcmqi"
    out.mkdir()
    command = [
        program,
        "--inputDICOM",
        str(dicom(scanned, call)),
        "--outputDirectory",
        str(out),
        "--outputType",
        "nrrd",
    ]
    subprocess.run(command, check=True, capture_output=True)
    image = sitk.ReadImage(str(scanned / "case_001.nii.gz"))
    for value, name in ((1, "liver"), (2, "spleen")):
        found = sitk.Resample(
            sitk.ReadImage(str(out / f"{value}.nrrd")), image, sitk.Transform(), sitk.sitkNearestNeighbor
        )
        assert ((sitk.GetArrayFromImage(found) > 0) == (drawn() == value)).all(), name
    meta = json.loads((out / "meta.json").read_text())
    assert [segment[0]["SegmentLabel"] for segment in meta["segmentAttributes"]] == ["liver", "spleen"]
    assert meta["segmentAttributes"][0][0]["recommendedDisplayRGBValue"] == [230, 159, 0]


def test_a_wrong_mapping_or_series_is_said(scanned: Path, tmp_path: Path, call: Call) -> None:
    words = ("-d", 730, "-i", scanned, "-o", tmp_path / "seg", "-dicom", tmp_path / "in", "-mapping")
    assert "-mapping" in call(cli.convert_labels, *words, tmp_path / "nothing.json").error
    (tmp_path / "other.json").write_text('{"case_001": {"series": "9.9"}}')
    assert "expected the DICOM series of case_001" in call(cli.convert_labels, *words, tmp_path / "other.json").error
    write_series(tmp_path / "short", "1.2.3", positions=PLACES[:4], orientation=OBLIQUE)
    words = ("-d", 730, "-i", scanned, "-o", tmp_path / "seg", "-dicom", tmp_path / "short", "-mapping")
    assert "expected a series of the label's size" in call(cli.convert_labels, *words, tmp_path / "mapping.json").error
    assert read(scanned / "case_001.nii.gz").any()
