"""Preprocessed labels whose divergence voxels carry the best guess, beside those that nnU-Net preprocessed.

nnU-Net preprocesses `labelsTr`, where divergence is the ignore label. The best guess of `pseudoTr/fused` is brought to
the same grid here, and only where the preprocessed label says ignore.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import blosc2
import numpy as np
from acvl_utils.cropping_and_padding.bounding_boxes import bounding_box_to_slice
from batchgenerators.utilities.file_and_folder_operations import load_pickle
from nnunetv2.preprocessing.resampling.default_resampling import compute_new_shape
from nnunetv2.training.dataloading.nnunet_dataset import comp_blosc2_params
from nnunetv2.utilities.plans_handling.plans_handler import ConfigurationManager, PlansManager

from nnunet_oneshot.file_hash import hash_of
from nnunet_oneshot.parallel import over_cases

MADE_OF = "made_of"
"""Under this name a filled label keeps the hashes of its sources."""


@dataclass(frozen=True)
class FillTask:
    """One case to fill.

    Attributes:
        preprocessed: nnU-Net's folder of preprocessed cases.
        guess: the best guess in the image's own grid.
        output: the file to write.
        writer: names the file while it is written, see `fill_labels`.
    """

    preprocessed: Path
    case: str
    guess: Path
    output: Path
    plans: PlansManager
    configuration: ConfigurationManager
    ignore: int
    writer: str


def filled_folder(preprocessed: Path) -> Path:
    """Where the filled labels of a folder of preprocessed cases lie; beside it, for nnU-Net lists what is in it."""
    return preprocessed.with_name(f"{preprocessed.name}_filled")


def fill_labels(
    preprocessed: Path,
    guesses: Path,
    cases: Sequence[str],
    plans: PlansManager,
    configuration: ConfigurationManager,
    ending: str,
    ignore: int,
    processes: int,
    writer: str,
) -> list[str]:
    """Write the filled label of every case that has a best guess; files made of the same label and guess are kept.

    A file whose label has changed since and whose best guess is gone is removed; one whose label is the same is kept
    where no guess is at hand, as where preprocessed data alone was copied. Several trainings may do this at once.

    Args:
        preprocessed: nnU-Net's folder of preprocessed cases.
        guesses: `pseudoTr/fused` of the raw dataset.
        cases: identifiers.
        ending: file ending of the guesses.
        ignore: the ignore label.
        processes: cases at once.
        writer: of all trainings on these cases this one alone, whenever it runs: what a killed run of it left is
            removed, what another one is writing is not.

    Returns:
        The cases that stay as nnU-Net preprocessed them: none of their voxels is ignored, or they have no best guess,
        or none but background where their label says ignore, as where nothing was carried.
    """
    output = filled_folder(preprocessed)
    tasks = [
        FillTask(
            preprocessed,
            case,
            guesses / f"{case}{ending}",
            output / f"{case}.b2nd",
            plans,
            configuration,
            ignore,
            writer,
        )
        for case in cases
    ]
    for left in output.glob(f"*.part_{writer}.b2nd"):
        left.unlink()
    stale = [task for task in tasks if not _is_fresh(task)]
    for task in stale:
        if not task.guess.is_file():
            task.output.unlink(missing_ok=True)
    output.mkdir(exist_ok=True)
    due = [task for task in stale if task.guess.is_file()]
    for _ in over_cases(_fill, due, processes=processes, title="best guesses"):
        pass
    return [task.case for task in tasks if not task.output.is_file()]


def to_grid(
    label: np.ndarray, properties: Mapping[str, Any], plans: PlansManager, configuration: ConfigurationManager
) -> np.ndarray:
    """A label (1, Z, Y, X) of the image's grid on the preprocessed grid, by nnU-Net's own steps; int16."""
    axes = plans.transpose_forward
    turned = label.transpose([0, *(axis + 1 for axis in axes)])
    cropped = turned[(slice(None), *bounding_box_to_slice(properties["bbox_used_for_cropping"]))]
    spacing = [properties["spacing"][axis] for axis in axes]
    target = list(configuration.spacing)
    target = [*spacing[: len(spacing) - len(target)], *target]
    shape = compute_new_shape(cropped.shape[1:], spacing, target)
    return np.asarray(configuration.resampling_fn_seg(cropped, shape, spacing, target)).astype(np.int16)


def _is_fresh(task: FillTask) -> bool:
    """Whether the filled label is there and made of the label and, where there still is one, the best guess.

    By their bytes: times do not outlive every way of copying preprocessed data to where it is trained on.
    """
    try:
        written = blosc2.open(urlpath=str(task.output), mode="r")
    except (FileNotFoundError, RuntimeError):
        # Also where another training removes it just now, or where a copy of it was cut short.
        return False
    made_of = written.schunk.vlmeta.get(MADE_OF, {})
    return all(made_of.get(name) == known for name, known in _sources(task).items())


def _sources(task: FillTask) -> dict[str, str]:
    """Hashes of what is at hand of a filled label's two sources."""
    files = {"label": _label_file(task), "guess": task.guess}
    return {name: hash_of(file) for name, file in files.items() if file.is_file()}


def _label_file(task: FillTask) -> Path:
    return task.preprocessed / f"{task.case}_seg.b2nd"


def _fill(task: FillTask) -> None:
    made_of = _sources(task)
    seg = blosc2.open(urlpath=str(_label_file(task)), mode="r")[:]
    ignored = seg == task.ignore
    if ignored.any() and (placed := _placed_guess(task))[ignored].any():
        _write(task, np.where(ignored, placed, seg).astype(np.int16), made_of)
    else:
        task.output.unlink(missing_ok=True)


def _placed_guess(task: FillTask) -> np.ndarray:
    """The best guess (1, Z, Y, X) on the preprocessed grid."""
    guess, _ = task.plans.image_reader_writer_class().read_seg(str(task.guess))
    properties = load_pickle(str(task.preprocessed / f"{task.case}.pkl"))
    return to_grid(guess, properties, task.plans, task.configuration)


def _write(task: FillTask, filled: np.ndarray, made_of: dict[str, str]) -> None:
    blocks, chunks = comp_blosc2_params(filled.shape, tuple(task.configuration.patch_size), filled.itemsize)
    part = task.output.with_suffix(f".part_{task.writer}.b2nd")
    array = blosc2.asarray(np.ascontiguousarray(filled), urlpath=str(part), chunks=chunks, blocks=blocks)
    array.schunk.vlmeta[MADE_OF] = made_of
    os.replace(part, task.output)
