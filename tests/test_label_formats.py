"""Files for 3D Slicer and ITK-SNAP: read back with their names, colours and geometry."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import SimpleITK as sitk

from nnunet_oneshot.label_formats import write_itksnap_labels, write_seg_nrrd
from nnunet_oneshot.report_pictures import class_color
from sam2_propagation.interface import Image

NAMES = {1: "liver", 2: 'left "lobe"', 3: "absent"}
DIRECTION = (0.6, -0.8, 0.0, -0.8, -0.6, 0.0, 0.0, 0.0, 1.0)


def label() -> np.ndarray:
    array = np.zeros((4, 6, 8), np.int16)
    array[1:3, 2:5, 3:7] = 1
    array[2, 3, 4] = 2
    return array


def test_slicer_segmentation(tmp_path: Path) -> None:
    image = Image("case", np.zeros((1, 4, 6, 8), np.float32), (5.0, 1.2, 0.8), (3.0, -4.0, 7.0), DIRECTION)
    write_seg_nrrd(label(), image, NAMES, tmp_path / "case.seg.nrrd")
    read = sitk.ReadImage(str(tmp_path / "case.seg.nrrd"))
    np.testing.assert_array_equal(sitk.GetArrayFromImage(read), label())
    assert read.GetSpacing() == pytest.approx((0.8, 1.2, 5.0))
    assert read.GetOrigin() == pytest.approx((3.0, -4.0, 7.0))
    assert read.GetDirection() == pytest.approx(DIRECTION)
    assert read.GetMetaData("Segment0_Name") == "liver"
    assert read.GetMetaData("Segment0_LabelValue") == "1"
    assert read.GetMetaData("Segment0_Extent") == "3 6 2 4 1 2"
    color = [float(c) for c in read.GetMetaData("Segment0_Color").split()]
    assert color == pytest.approx([c / 255 for c in class_color(1)], abs=1e-5)
    assert read.GetMetaData("Segment2_Extent") == "0 -1 0 -1 0 -1"
    with pytest.raises(ValueError, match=r"ends in \.seg\.nrrd"):
        write_seg_nrrd(label(), image, NAMES, tmp_path / "case.nrrd")


def test_itksnap_labels(tmp_path: Path) -> None:
    write_itksnap_labels(NAMES, tmp_path / "labels.txt")
    lines = [line for line in (tmp_path / "labels.txt").read_text().splitlines() if not line.startswith("#")]
    assert [line.split('"')[1] for line in lines] == ["Clear Label", "liver", "left 'lobe'", "absent"]
    assert [int(n) for n in lines[1].split('"')[0].split()] == [1, *class_color(1), 1, 1, 1]
    assert all(line.count('"') == 2 for line in lines)
