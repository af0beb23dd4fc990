"""Labels as DICOM Segmentation objects, for archives and viewers that know DICOM alone, by highdicom.

A segmentation belongs to the series that it was drawn on and carries that series' patient and study: unlike everything
else that this package writes, its files identify the patient.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from pathlib import Path

import numpy as np

from nnunet_oneshot.convert_dicom import Series, find_series
from nnunet_oneshot.dataset import Case, RawDataset
from nnunet_oneshot.errors import OneShotError
from nnunet_oneshot.report_pictures import class_color
from sam2_propagation.interface import LabelVolume

try:
    import highdicom
    import pydicom
    from pydicom.sr.codedict import codes
except ModuleNotFoundError as error:
    raise OneShotError(
        f"expected the package {error.name} to write DICOM segmentations, found none; "
        'install it: pip install ".[dicom]" in the clone'
    ) from error

SERIES_NUMBER = 901
"""High, so that it stands behind the scanner's own series."""


class SegmentationWriter:
    """Writes cases' labels as segmentations of the series that `convert_dicom` made the cases of.

    Args:
        source: the folder of DICOM files that was converted.
        mapping: the file that `convert_dicom -mapping` wrote.

    Raises:
        OneShotError: no mapping there, or no DICOM files.
    """

    ending = ".dcm"

    def __init__(self, source: Path, mapping: Path) -> None:
        try:
            content = json.loads(mapping.read_text(encoding="utf-8"))
            self._uids = {str(case): str(entry["series"]) for case, entry in content.items()}
        except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
            raise OneShotError(
                f"expected the mapping of cases to series that nnUNetv2_oneshot_convert_dicom -mapping writes, found "
                f"{mapping} that cannot be read as one ({error}); convert again with -mapping"
            ) from error
        self._series: dict[str, Series] = {series.uid: series for series in find_series(source)}

    def write(self, raw: RawDataset, case: Case, label: LabelVolume, names: Mapping[int, str], path: Path) -> None:
        """Write one case's label; OneShotError where its series is not known or not there."""
        series = self._series.get(self._uids.get(case.name, ""))
        if series is None:
            raise OneShotError(
                f"expected the DICOM series of {case.name} in the mapping's folder, found none; check both"
            )
        write_dicom_seg(label, [piece.path for piece in series.slices], names, path)


def write_dicom_seg(label: LabelVolume, series: Sequence[Path], names: Mapping[int, str], path: Path) -> None:
    """Write a label as one DICOM Segmentation (binary, one segment a class, display colours as in the report).

    Args:
        label: (Z, Y, X), slice z on the z-th file of the series, or on the z-th frame of its only file.
        series: the image's files in the order of their places, as `convert_dicom.find_series` gives them.
        names: of the label values 1, 2, ...; classes that are absent become empty segments.
        path: file to write.

    Raises:
        OneShotError: no foreground, a label of another size than the series, or files that are no DICOM images.
    """
    if not label.any():
        raise OneShotError(f"{path.name}: expected foreground to write as a segmentation, found none; skip this case")
    images = [_read(file) for file in series]
    _check_size(label, images, path)
    try:
        _tell_distances(images)
        segmentation = _segmentation(label, images, names)
    except (AttributeError, ValueError) as error:  # what highdicom raises for headers that the standard does not allow
        raise OneShotError(
            f"{series[0]}: expected an image series as the DICOM standard has it, found one without what a "
            f"segmentation refers to ({error}); export the series again"
        ) from error
    path.parent.mkdir(parents=True, exist_ok=True)
    segmentation.save_as(path)


def _segmentation(
    label: LabelVolume, images: Sequence[pydicom.Dataset], names: Mapping[int, str]
) -> highdicom.seg.Segmentation:
    return highdicom.seg.Segmentation(
        source_images=images,
        pixel_array=label.astype(np.uint8),
        segmentation_type=highdicom.seg.SegmentationTypeValues.BINARY,
        segment_descriptions=[_segment(value, name) for value, name in sorted(names.items())],
        series_instance_uid=highdicom.UID(),
        series_number=SERIES_NUMBER,
        sop_instance_uid=highdicom.UID(),
        instance_number=1,
        manufacturer="nnunet-oneshot",
        manufacturer_model_name="nnunet-oneshot",
        software_versions=version("nnunet-oneshot"),
        device_serial_number="0",
        series_description="nnunet-oneshot labels",
    )


def _read(file: Path) -> pydicom.Dataset:
    try:
        return pydicom.dcmread(file)
    except (pydicom.errors.InvalidDicomError, OSError) as error:
        raise OneShotError(f"expected a DICOM file, found {file} that is none ({error}); restore the series") from error


def _check_size(label: LabelVolume, images: Sequence[pydicom.Dataset], path: Path) -> None:
    frames = int(getattr(images[0], "NumberOfFrames", 1)) if len(images) == 1 else len(images)
    found = (frames, int(images[0].Rows), int(images[0].Columns))
    if found != label.shape:
        raise OneShotError(
            f"{path.name}: expected a series of the label's size (slices, rows, columns) {label.shape}, found {found}; "
            "name the series that the case was made of"
        )


def _tell_distances(images: Sequence[pydicom.Dataset]) -> None:
    """The slice distance by the slices' places: headers leave it out, or say something else."""
    if len(images) < 2:
        return
    first, second = (np.array(image.ImagePositionPatient, float) for image in images[:2])
    gap = float(np.linalg.norm(second - first))
    for image in images:
        image.SpacingBetweenSlices = gap
        image.SliceThickness = getattr(image, "SliceThickness", None) or gap


def _segment(value: int, name: str) -> highdicom.seg.SegmentDescription:
    # What the classes mean anatomically is not known here: the name says it, and the code only that it is anatomy.
    return highdicom.seg.SegmentDescription(
        segment_number=value,
        segment_label=name[:64],
        segmented_property_category=codes.cid7150.AnatomicalStructure,
        segmented_property_type=codes.cid7150.AnatomicalStructure,
        algorithm_type=highdicom.seg.SegmentAlgorithmTypeValues.SEMIAUTOMATIC,
        algorithm_identification=highdicom.AlgorithmIdentificationSequence(
            name="nnunet-oneshot", family=codes.cid7162.ArtificialIntelligence, version=version("nnunet-oneshot")
        ),
        display_color=highdicom.color.CIELabColor.from_rgb(*class_color(value)),
    )
