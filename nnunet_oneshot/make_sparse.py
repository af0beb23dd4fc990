"""Single annotated slices in nnU-Net's form: everything that nobody drew becomes the ignore label.

A viewer saves a label file of the whole volume, 0 wherever nobody drew. nnU-Net would learn that all of it is
background. Here each such file becomes a sparse label of the dataset: the drawn slices as they are, the rest ignored.
"""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from nnunet_oneshot.checks import checked_label
from nnunet_oneshot.dataset import IGNORE, Case, RawDataset, open_dataset
from nnunet_oneshot.errors import OneShotError
from nnunet_oneshot.store import MANIFEST
from nnunet_oneshot.suggest import AXES, read_slices
from nnunet_oneshot.suggest_missing import Drawn, advice
from sam2_propagation.interface import LabelVolume
from sam2_propagation.views import present

_FEW, _SHARE = 3, 0.25
"""Slices, and share of a volume's, up to which a label with foreground on so many was drawn on single slices."""


@dataclass(frozen=True)
class Sparse:
    """One case's sparse label.

    Attributes:
        case: its name.
        axis: of the array, "z", "y" or "x", that slices are counted along.
        slices: annotated ones, from 0.
        missing: names of classes that no annotated slice of this case shows.
        advice: which other slice to annotate for them, a sentence; empty where none is missing.
    """

    case: str
    axis: str
    slices: tuple[int, ...]
    missing: tuple[str, ...]
    advice: str = ""


def make_sparse(
    dataset: int | str, labels: Path, *, slices: Path | None = None, overwrite: bool = False
) -> list[Sparse]:
    """Write `labelsTr` of a raw dataset from label files in which only some slices were drawn.

    dataset.json gains the label "ignore", the highest value. The files in `labels` stay as they are.

    Args:
        dataset: id or name of the raw dataset that holds the images.
        labels: folder of files `CASE.EXT`, 0 wherever nobody drew.
        slices: a table as `nnUNetv2_oneshot_suggest --slices` writes it, of the slices that were drawn, empty ones
            included; without it a slice counts as drawn if there is foreground on it.
        overwrite: replace labels that `labelsTr` already holds.

    Raises:
        OneShotError: no such folder or no file in it, a file that fits no image, a label without foreground, a slice
            that is not in its volume, or labels in the way.
    """
    raw = open_dataset(dataset)
    if (raw.folder / MANIFEST).is_file():
        raise OneShotError(
            f"expected a raw dataset, found {raw.name}, which propagate made; name the one it was made of"
        )
    drawn = _drawn_files(raw, labels, overwrite)
    named = None if slices is None else read_slices(slices)
    ignore = raw.ignore if raw.ignore is not None else len(raw.label_values)
    made = [_sparse(raw, case, path, named, ignore) for case, path in drawn]
    advised = advice(raw, made)
    _declare(raw, ignore)
    for one in made:
        _write(raw, one.label, one.case)
    return [Sparse(d.case.name, AXES[d.axis], d.slices, d.missing, advised.get(d.case.name, "")) for d in made]


def _drawn_files(raw: RawDataset, labels: Path, overwrite: bool) -> list[tuple[Case, Path]]:
    if not labels.is_dir():
        raise OneShotError(f"expected a folder of labels, found no folder {labels}; check -i")
    if labels.resolve() == (raw.folder / "labelsTr").resolve():
        raise OneShotError(
            f"expected a folder other than {labels}, which is written to, found that one; move the files elsewhere"
        )
    files = sorted(labels.glob(f"*{raw.file_ending}"))
    known = {case.name: case for case in raw.cases}
    names = [path.name[: -len(raw.file_ending)] for path in files]
    if not files:
        raise OneShotError(f"{labels}: expected label files named CASE{raw.file_ending}, found none; check -i")
    for name in names:
        if name not in known:
            raise OneShotError(f"{labels}: expected labels of cases of {raw.name}, found one of {name}; correct it")
        if known[name].label is not None and not overwrite:
            raise OneShotError(
                f"{raw.folder / 'labelsTr'}: expected no label of {name}, found one; add --overwrite to replace it"
            )
    return [(known[name], path) for name, path in zip(names, files, strict=True)]


def _sparse(
    raw: RawDataset, case: Case, path: Path, named: Mapping[str, Sequence[tuple[str, int]]] | None, ignore: int
) -> Drawn:
    """What was drawn, with everything else ignored."""
    label = checked_label(raw, path, case, drawn=True)
    label = np.where(label == ignore, 0, label).astype(np.int16)
    if not label.any():
        raise OneShotError(
            f"{path}: expected foreground, found background alone; draw a slice that shows the structures"
        )
    axis, chosen = _slices(raw, case, label) if named is None else _named(case, label, path, named)
    sparse = np.full_like(label, ignore)
    where: list[Any] = [slice(None)] * 3
    where[axis] = list(chosen)
    sparse[tuple(where)] = label[tuple(where)]
    lost = int((label > 0).sum() - ((sparse > 0) & (sparse != ignore)).sum())
    if lost:
        raise OneShotError(
            f"{path}: expected foreground on the slices of the table alone, found {lost} voxels elsewhere; correct "
            "the table or the label"
        )
    missing = tuple(name for value, name in raw.class_names.items() if not (sparse == value).any())
    return Drawn(case, sparse, axis, chosen, missing)


def _slices(raw: RawDataset, case: Case, label: LabelVolume) -> tuple[int, tuple[int, ...]]:
    """The axis along which few slices hold all foreground, the thickest one if it can be, and those slices."""
    image = raw.read_image(case)
    natural = present(image, "identity").axes[0]
    axes = [natural] if image.shape[0] == 1 else [natural, *(a for a in range(3) if a != natural)]
    filled = {axis: np.flatnonzero(label.any(axis=tuple(a for a in range(3) if a != axis))) for axis in axes}
    few = [axis for axis in axes if len(filled[axis]) <= max(_FEW, _SHARE * label.shape[axis])]
    if not few:
        raise OneShotError(
            f"case {case.name}: expected a few drawn slices, found foreground on {len(filled[natural])} of "
            f"{label.shape[natural]}; put a whole label in labelsTr as it is, or name the drawn slices with -slices"
        )
    return few[0], tuple(int(i) for i in filled[few[0]])


def _named(
    case: Case, label: LabelVolume, path: Path, named: Mapping[str, Sequence[tuple[str, int]]]
) -> tuple[int, tuple[int, ...]]:
    rows = named.get(case.name, ())
    axes = {axis for axis, _ in rows}
    if len(axes) != 1:
        raise OneShotError(
            f"case {case.name}: expected slices along one axis in the table, found {sorted(axes) or 'none'}; correct it"
        )
    axis = AXES.index(axes.pop())
    if label.shape[0] == 1 and axis != 0:
        raise OneShotError(
            f"case {case.name}: expected slice 0 along z of an image of one slice in the table, found slices along "
            f"{AXES[axis]}; correct it"
        )
    chosen = tuple(sorted({index for _, index in rows}))
    if chosen[-1] >= label.shape[axis]:
        raise OneShotError(
            f"{path}: expected slices 0 to {label.shape[axis] - 1} along {AXES[axis]} in the table, found "
            f"{chosen[-1]}; correct it"
        )
    return axis, chosen


def _declare(raw: RawDataset, ignore: int) -> None:
    """Add the ignore label to dataset.json, where it is not there yet; nothing else of it changes."""
    if raw.ignore is not None:
        return
    content = {**raw.json, "labels": {**raw.json["labels"], IGNORE: ignore}}
    path = raw.folder / "dataset.json"
    new = path.with_name(".dataset.json.new")
    new.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    os.replace(new, path)


def _write(raw: RawDataset, label: LabelVolume, case: Case) -> None:
    """Write a label with its image's geometry; a file appears under its name only when it is whole."""
    folder = raw.folder / "labelsTr"
    folder.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory(dir=raw.folder) as temporary:
        path = Path(temporary) / f"{case.name}{raw.file_ending}"
        raw.write_label(label, path, case)
        # A writer may add a side file (the spacing of a .tif); the label itself comes last.
        for written in sorted(path.parent.iterdir(), key=lambda p: p == path):
            os.replace(written, folder / written.name)
