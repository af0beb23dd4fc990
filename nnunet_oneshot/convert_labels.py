"""Labels of a dataset for people's tools: 3D Slicer and ITK-SNAP here, DICOM Segmentation by `dicom_seg`."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Protocol

from tqdm import tqdm

from nnunet_oneshot.dataset import Case, RawDataset, find_raw_folder, open_dataset, open_source
from nnunet_oneshot.errors import OneShotError
from nnunet_oneshot.label_formats import write_itksnap_labels, write_seg_nrrd
from nnunet_oneshot.store import MANIFEST, Store, read_manifest
from sam2_propagation.interface import LabelVolume


class Writer(Protocol):
    """Writes one case's label in a format."""

    ending: str

    def write(self, raw: RawDataset, case: Case, label: LabelVolume, names: Mapping[int, str], path: Path) -> None:
        """Write to `path`, whose name ends in `ending`."""


class SlicerWriter:
    """`.seg.nrrd`, which 3D Slicer opens with names and colours and ITK-SNAP as a label image."""

    ending = ".seg.nrrd"

    def write(self, raw: RawDataset, case: Case, label: LabelVolume, names: Mapping[int, str], path: Path) -> None:
        """Write with the geometry of the case's image."""
        write_seg_nrrd(label, raw.read_image(case), names, path)


def convert_labels(
    dataset: int | str, output: Path, labels: Path | None = None, writer: Writer | None = None
) -> list[Path]:
    """Write labels in another format, and `labels.txt` with names and colours for ITK-SNAP.

    Args:
        dataset: id or name of a raw or of a pseudo-label dataset.
        output: folder to write to; files that are there are not touched.
        labels: folder of `CASE.EXT` labels on the images' grids, for example predictions; the best guesses of the round
            in force (of a raw dataset: labelsTr) when None.
        writer: of the format; 3D Slicer's when None.

    Returns:
        The written labels.

    Raises:
        OneShotError: no labels, labels of unknown cases or of another size than their image, or a file that exists.
    """
    folder = find_raw_folder(dataset)
    derived = (folder / MANIFEST).is_file()
    raw = open_source(read_manifest(folder / MANIFEST).source_dataset, folder) if derived else open_dataset(dataset)
    store, writer = Store(folder, raw.file_ending), writer or SlicerWriter()
    labels = labels or (store.fused_path("x").parent if derived else folder / "labelsTr")
    cases = _cases(raw, labels)
    targets = {case: output / f"{case.name}{writer.ending}" for case in cases}
    for target in targets.values():
        if target.exists():
            raise OneShotError(f"expected a free name, found {target}; choose another -o or remove it")
    output.mkdir(parents=True, exist_ok=True)
    for case, target in tqdm(targets.items(), desc="convert labels", unit="case", disable=None):
        label = _label(raw, case, labels / f"{case.name}{raw.file_ending}")
        writer.write(raw, case, label, raw.class_names, target)
    write_itksnap_labels(raw.class_names, output / "labels.txt")
    return list(targets.values())


def _cases(raw: RawDataset, labels: Path) -> list[Case]:
    found = {path.name[: -len(raw.file_ending)] for path in labels.glob(f"*{raw.file_ending}")}
    cases = [case for case in raw.cases if case.name in found]
    if unknown := sorted(found - {case.name for case in cases}):
        raise OneShotError(f"expected labels of cases of {raw.name} in {labels}, found one of {unknown[0]}; remove it")
    if not cases:
        raise OneShotError(f"expected labels CASE{raw.file_ending} in {labels}, found none; check -i")
    return cases


def _label(raw: RawDataset, case: Case, path: Path) -> LabelVolume:
    label, shape = raw.read_label(path), raw.image_geometry(case)[0]
    if label.shape != shape:
        raise OneShotError(f"{path}: expected the shape {shape} of its image, found {label.shape}; replace it")
    return label
