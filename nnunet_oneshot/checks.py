"""Checks of a raw dataset that read its files, made before anything is written."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from pathlib import Path

import nibabel
import numpy as np

from nnunet_oneshot.dataset import READ_ERRORS, Case, RawDataset
from nnunet_oneshot.errors import OneShotError, other_shape
from nnunet_oneshot.parallel import FEW, over_cases
from sam2_propagation.interface import Image, LabelVolume


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
    partly: set[str] = set()
    shown: dict[str, set[int]] = {}
    for case in dataset.annotated:
        assert case.label is not None
        label = checked_label(dataset, case.label, case, drawn=True)
        partly |= {case.name} if dataset.is_sparse(label) else set()
        shown[case.name] = {int(value) for value in np.unique(label)} - {0, dataset.ignore}
    empty = [name for name, classes in shown.items() if not classes]
    if not dataset.unannotated and not partly:
        raise OneShotError(
            f"{dataset.folder}: expected images without a label, found every image annotated: nothing "
            "to do; train nnU-Net as usual, or put more images in imagesTr or imagesUn"
        )
    if len(empty) == len(dataset.annotated):
        raise OneShotError(
            f"{dataset.folder}: expected foreground in an annotated case, found background alone in "
            f"{', '.join(empty)}; annotate a case that shows the structures"
        )
    told = [f"annotated case {name} has no foreground; it teaches what background looks like" for name in empty]
    return [*dataset.warnings, *told, *_missing_classes(dataset, shown, partly)]


def _missing_classes(dataset: RawDataset, shown: Mapping[str, set[int]], partly: Collection[str]) -> list[str]:
    """Warnings of classes that are in no annotated case, and of partly drawn ones that lack what others show."""
    every = set().union(*shown.values())
    warnings = [
        f"no annotated case shows {name}: nothing will be labelled {name}; annotate an image or a slice that shows it"
        for value, name in dataset.class_names.items()
        if value not in every
    ]
    for value, name in dataset.class_names.items():
        without = [case for case in sorted(partly) if shown[case] and value not in shown[case]]
        if value in every and without:
            warnings.append(
                f"{len(without)} of {len(partly)} partly drawn cases do not show {name} ({', '.join(without[:3])}"
                f"{', ...' if len(without) > 3 else ''}); draw a slice that shows it too"
            )
    return warnings


def check_images(dataset: RawDataset, processes: int) -> None:
    """Read every image once before anything is written; OneShotError for the first that cannot be used."""
    pairs = [(dataset, case) for case in dataset.cases]
    for _ in over_cases(_check_image, pairs, processes=processes, title="check images", few=FEW):
        pass


def check_image(dataset: RawDataset, case: Case) -> Image:
    """Read a case's image whole, float32 (C, Z, Y, X); OneShotError where it cannot be used."""
    image = dataset.read_image(case)
    expected = len(dataset.json["channel_names"])
    if image.data.shape[0] != expected:
        raise OneShotError(
            f"{case.images[0]}: expected {expected} channels as dataset.json says, found "
            f"{image.data.shape[0]}; correct channel_names or the file"
        )
    for path in case.images:
        _check_stored(path)
    return image


def check_shapes(dataset: RawDataset, labels: Mapping[str, Path], processes: int) -> None:
    """OneShotError where the image of a case, by its name, no longer has the shape of the label that was made of it."""
    tasks = [(dataset, dataset.case(name), path) for name, path in labels.items()]
    for _ in over_cases(_check_shape, tasks, processes=processes, title="check images", few=FEW):
        pass


def checked_label(dataset: RawDataset, path: Path, case: Case, *, drawn: bool) -> LabelVolume:
    """Read a label; OneShotError where it is broken, not on its image's grid or holds values that are not declared.

    The ignore label may stand in what a person drew only: a program's label says something of every voxel.
    """
    label = dataset.read_label(path)
    _check_stored(path)
    _check_geometry(dataset, path, case)
    _check_values(dataset, label, path, drawn)
    return label


def _check_image(pair: tuple[RawDataset, Case]) -> None:
    check_image(*pair)


def _check_shape(task: tuple[RawDataset, Case, Path]) -> None:
    dataset, case, path = task
    image, label = dataset.image_geometry(case)[0], dataset.label_geometry(path)[0]
    if image != label:
        raise other_shape(case.name, image, label)


def _check_geometry(dataset: RawDataset, label: Path, case: Case) -> None:
    words = ("shape (z, y, x)", "spacing", "origin", "direction")
    found, expected = dataset.label_geometry(label), dataset.image_geometry(case)
    for word, of_label, of_image in zip(words, found, expected, strict=True):
        if len(of_label) != len(of_image) or not np.allclose(of_label, of_image, rtol=1e-3, atol=1e-3):
            raise OneShotError(
                f"{label}: expected the {word} of its image, {_short(of_image)}, found "
                f"{_short(of_label)}; resample the label onto the image's grid"
            )


def _check_values(dataset: RawDataset, label: LabelVolume, path: Path, drawn: bool) -> None:
    known = {*dataset.label_values, *([dataset.ignore] if drawn and dataset.ignore is not None else [])}
    unknown = sorted(set(np.unique(label).tolist()) - known)
    if unknown:
        raise OneShotError(
            f"{path}: expected label values {sorted(known)} as dataset.json declares, found {unknown}; "
            "correct the label or dataset.json"
        )


def _check_stored(path: Path) -> None:
    """ITK's NIfTI reader fills up a truncated file and turns NaN and infinity into 0, both without a word."""
    if not path.name.endswith((".nii", ".nii.gz")):
        return
    try:
        stored = np.asanyarray(nibabel.load(path).dataobj)  # type: ignore[attr-defined]
    except READ_ERRORS as error:
        raise OneShotError(f"{path}: expected a whole file, found one cut short ({error}); export it again") from error
    if stored.dtype.kind == "f" and not np.isfinite(stored).all():
        raise OneShotError(f"{path}: expected finite values, found NaN or infinite ones; replace them")


def _short(values: tuple[float, ...]) -> tuple[float, ...]:
    return tuple(round(float(v), 4) for v in values)
