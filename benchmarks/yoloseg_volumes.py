"""YoloSeg's labels for sets of volumes: the procedure is one of 2D images, so it is given the volumes' slices.

A dataset of all slices across the natural plane is laid out and labelled as any set of 2D images is, and each view's
labels are stacked back to volumes, which `consensus` takes in like labels made elsewhere. Of the three views it makes
what `propagate` makes of them for 2D images: they weigh the same, where they are equal stands the un-rotated view's
label, elsewhere the ignore label. The best guess there, which YoloSeg's loss does not look at, is fused by distances in
the volume rather than in the slice.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import numpy.typing as npt
import SimpleITK as sitk
from evidence_methods import Labels

from nnunet_oneshot.consensus import consensus
from nnunet_oneshot.dataset import Case, RawDataset, open_dataset, raw_root
from nnunet_oneshot.propagate import propagate
from nnunet_oneshot.refine import open_store
from sam2_propagation.intensities import scale
from sam2_propagation.interface import Image
from sam2_propagation.views import Presentation, natural_plane, present

CUT, CUT_LABELLED = 10, 20
"""Added to the number of a dataset of volumes: its slices, and these with labels."""


def label_by_slices(source: int, output: int, labels: Labels, work: Path) -> None:
    """Make dataset `output` of a dataset of volumes, labelled slice by slice; what is there already is kept.

    Args:
        source: number of the raw dataset of volumes.
        output: number of the label dataset to write.
        labels: one propagator and its options.
        work: folder for what is only needed on the way.
    """
    volumes = open_dataset(source)
    cut(volumes, source + CUT)
    if not list(raw_root().glob(f"Dataset{source + CUT_LABELLED}_*/oneshot.json")):
        propagate(source + CUT, source + CUT_LABELLED, propagators=labels.propagators, options=labels.options)
    consensus(source, output, stack(volumes, source + CUT_LABELLED, labels.propagators[0], work / f"stacked_{source}"))


def cut(volumes: RawDataset, number: int) -> None:
    """Write a raw dataset of the volumes' slices, 8-bit 2D images in mm, `CASE_zNNNN`: in file-name order neighbours.

    Every slice of an annotated volume gets its label. Those without foreground cannot prompt, and mode `sequence` then
    leaves them out of the video; without a label they would be tracked, and what is wrongly seen there be remembered.
    """
    folder = raw_root() / f"Dataset{number:03d}_{volumes.name.split('_', 1)[1]}_cut"
    if (folder / "dataset.json").is_file():
        return
    annotated = 0
    for case, image, shown in _presented(volumes):
        # The recipe takes 8-bit intensities as they are. They are made of the volume: its slices stay comparable.
        grey = np.rint(255 * shown.forward(scale(image))[0])
        _write_slices(grey, _in_plane(image, shown), folder / "imagesTr", case.name, "_0000")
        if case.label is not None:
            drawn = shown.forward(volumes.read_label(case.label))
            _write_slices(drawn, _in_plane(image, shown), folder / "labelsTr", case.name)
            annotated += len(drawn)
    content = {
        "channel_names": {"0": volumes.json["channel_names"]["0"]},
        "labels": volumes.json["labels"],
        "numTraining": annotated,
        "file_ending": ".nii.gz",
    }
    # Last, as a sign that all slices are there.
    (folder / "dataset.json").write_text(json.dumps(content, indent=2), encoding="utf-8")


def stack(volumes: RawDataset, labelled: int, source: str, folder: Path) -> list[Path]:
    """Write each view's labels of the un-annotated volumes, `VIEW/CASE.EXT`, on the images' own grids.

    Args:
        volumes: the raw dataset that was cut.
        labelled: number of the label dataset of its slices.
        source: the propagator whose views these are.
        folder: where the views' folders go.

    Returns:
        The views' folders, in the order of the views: the un-rotated one comes first, to which ties go.
    """
    store, slices = open_store(labelled)
    views: list[str] = store.read_manifest().settings["views"][source]
    for case, image, shown in _presented(volumes):
        if case.label is not None:
            continue
        count = image.shape[shown.axes[0]]
        for view in views:
            paths = [store.view_path(source, view, _name(case.name, at)) for at in range(count)]
            seen = np.concatenate([slices.read_label(path) for path in paths])
            (folder / view).mkdir(parents=True, exist_ok=True)
            path = folder / view / f"{case.name}{volumes.file_ending}"
            volumes.write_label(shown.inverse(seen), path, case)
    return [folder / view for view in views]


def _presented(volumes: RawDataset) -> Iterator[tuple[Case, Image, Presentation]]:
    """Every case, its image and how its slices are shown: upright and all alike, as the annotated image is."""
    natural = natural_plane(volumes.read_image(volumes.annotated[0]))
    for case in volumes.cases:
        image = volumes.read_image(case)
        yield case, image, present(image, "identity", natural)


def _name(case: str, at: int) -> str:
    return f"{case}_z{at:04d}"


def _in_plane(image: Image, shown: Presentation) -> tuple[float, float]:
    """Spacing along columns and rows, mm, (x, y) as SimpleITK counts."""
    return image.spacing[shown.axes[2]], image.spacing[shown.axes[1]]


def _write_slices(
    seen: npt.NDArray[np.generic], spacing: tuple[float, float], folder: Path, case: str, channel: str = ""
) -> None:
    """Write (N, Y, X), values in 0 to 255, as N 2D files of one byte a pixel; spacing (x, y) in mm."""
    folder.mkdir(parents=True, exist_ok=True)
    for at, pixels in enumerate(seen):
        image = sitk.GetImageFromArray(np.ascontiguousarray(pixels, dtype=np.uint8))
        image.SetSpacing(spacing)
        sitk.WriteImage(image, str(folder / f"{_name(case, at)}{channel}.nii.gz"))
