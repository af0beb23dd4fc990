"""Checks of a raw dataset that read its files, made before anything is written."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from nnunet_oneshot.dataset import Case, RawDataset
from nnunet_oneshot.errors import OneShotError
from sam2_propagation.interface import LabelVolume


def check_for_propagation(dataset: RawDataset) -> list[str]:
    """Check that labels can be carried, reading the annotated cases; returns warnings.

    Raises:
        OneShotError: no label, nothing to do, a label that does not fit its image or dataset.json, no foreground.
    """
    if not dataset.annotated:
        raise OneShotError(
            f"{dataset.folder}: expected a label of at least one case in labelsTr, found none; annotate one "
            f"(nnUNetv2_oneshot_suggest -d {dataset.id} says which)"
        )
    empty, sparse = [], False
    for case in dataset.annotated:
        label = _checked_label(dataset, case)
        foreground = (label != 0) & (label != (dataset.ignore if dataset.ignore is not None else -1))
        sparse |= dataset.ignore is not None and bool((label == dataset.ignore).any())
        if not foreground.any():
            empty.append(case.name)
    if not dataset.unannotated and not sparse:
        raise OneShotError(
            f"{dataset.folder}: expected images without a label, found every image annotated: nothing "
            "to do; train nnU-Net as usual, or put more images in imagesTr or imagesUn"
        )
    if len(empty) == len(dataset.annotated):
        raise OneShotError(
            f"{dataset.folder}: expected foreground in an annotated case, found background alone in "
            f"{', '.join(empty)}; annotate a case that shows the structures"
        )
    return [f"annotated case {name} has no foreground; it teaches what background looks like" for name in empty]


def check_image(dataset: RawDataset, case: Case) -> None:
    """Read a case's image whole; OneShotError where it cannot be used."""
    image = dataset.read_image(case)
    expected = len(dataset.json["channel_names"])
    if image.data.shape[0] != expected:
        raise OneShotError(
            f"{case.images[0]}: expected {expected} channels as dataset.json says, found "
            f"{image.data.shape[0]}; correct channel_names or the file"
        )


def checked_geometry(dataset: RawDataset, label: Path, case: Case) -> None:
    """OneShotError where a label file's shape, spacing, origin or direction differs from its image's."""
    words = ("shape (z, y, x)", "spacing", "origin", "direction")
    for word, of_label, of_image in zip(words, dataset.geometry(label), dataset.geometry(case.images[0]), strict=True):
        if len(of_label) != len(of_image) or not np.allclose(of_label, of_image, rtol=1e-3, atol=1e-3):
            raise OneShotError(
                f"{label}: expected the {word} of its image, {_short(of_image)}, found "
                f"{_short(of_label)}; resample the label onto the image's grid"
            )


def checked_values(dataset: RawDataset, label: LabelVolume, path: Path) -> None:
    """OneShotError where a label holds values that dataset.json does not declare."""
    known = {*dataset.label_values, *([] if dataset.ignore is None else [dataset.ignore])}
    unknown = sorted(set(np.unique(label).tolist()) - known)
    if unknown:
        raise OneShotError(
            f"{path}: expected label values {sorted(known)} as dataset.json declares, found {unknown}; "
            "correct the label or dataset.json"
        )


def _checked_label(dataset: RawDataset, case: Case) -> LabelVolume:
    assert case.label is not None
    label = dataset.read_label(case.label)
    checked_geometry(dataset, case.label, case)
    checked_values(dataset, label, case.label)
    return label


def _short(values: tuple[float, ...]) -> tuple[float, ...]:
    return tuple(round(float(v), 4) for v in values)
