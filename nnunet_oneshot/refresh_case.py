"""One case of nnU-Net's preprocessed data: its segmentation part rewritten for a new label, or the whole case made.

What nnU-Net's DefaultPreprocessor does with a label depends on the image only by where the image is not zero. With
that mask kept, a new label needs no image: it is cropped, resampled and sampled by nnU-Net's own functions, and every
file appears under its name only when it is whole.
"""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any

import blosc2
import numpy as np
import numpy.typing as npt
from acvl_utils.cropping_and_padding.bounding_boxes import bounding_box_to_slice, get_bbox_from_mask
from batchgenerators.utilities.file_and_folder_operations import load_pickle
from nnunetv2.preprocessing.cropping.cropping import create_nonzero_mask
from nnunetv2.preprocessing.preprocessors.default_preprocessor import DefaultPreprocessor
from nnunetv2.preprocessing.resampling.default_resampling import compute_new_shape
from nnunetv2.training.dataloading.nnunet_dataset import comp_blosc2_params, nnUNetDatasetBlosc2
from nnunetv2.utilities.plans_handling.plans_handler import PlansManager

from nnunet_oneshot.errors import cut_short, other_shape

OUTSIDE = -1
"""nnU-Net's label of background where the image is zero."""
MASKS = "oneshot_nonzero"
"""Folder, beside nnU-Net's, of the masks of where images are not zero."""
TEMPORARY = ".oneshot_refresh_"
DATA_FILES = (".b2nd", "_seg.b2nd", ".pkl")
"""What nnU-Net keeps of a preprocessed case."""


@dataclass(frozen=True)
class Target:
    """The preprocessed data of one configuration.

    Attributes:
        folder: where the cases lie, `nnUNet_preprocessed/DatasetXXX_Name/<data identifier>`.
        plans: the plans file.
        configuration: name of a configuration whose data it is.
    """

    folder: Path
    plans: Path
    configuration: str

    @property
    def tools(self) -> Tools:
        """nnU-Net's objects of this configuration; kept, since many cases follow each other."""
        return _tools(self.plans, self.plans.stat().st_mtime_ns, self.configuration)

    def files(self, case: str) -> list[Path]:
        """The case's image, segmentation and properties."""
        return [self.folder / f"{case}{ending}" for ending in DATA_FILES]


@dataclass(frozen=True)
class Tools:
    """nnU-Net's plans, configuration and preprocessor."""

    plans: PlansManager
    configuration: Any

    @cached_property
    def preprocessor(self) -> DefaultPreprocessor:
        """A preprocessor that prints nothing."""
        return self.configuration.preprocessor_class(verbose=False)

    @property
    def takes_labels_alone(self) -> bool:
        """False for a preprocessor that does something of its own with a case."""
        kind = type(self.preprocessor)
        own = ("run_case", "run_case_npy", "run_case_save")
        return all(getattr(kind, name) is getattr(DefaultPreprocessor, name) for name in own)


@lru_cache(maxsize=16)
def _tools(plans: Path, modified: int, configuration: str) -> Tools:
    manager = PlansManager(str(plans))
    return Tools(manager, manager.get_configuration(configuration))


@dataclass(frozen=True, eq=False)
class Nonzero:
    """Where an image is not zero, holes filled, within the box that nnU-Net crops to.

    Attributes:
        shape: (Z, Y, X) of the image.
        box: first and one past the last index of each axis.
        mask: bool, shape of the box; None where it is True everywhere.
    """

    shape: tuple[int, ...]
    box: tuple[tuple[int, int], ...]
    mask: npt.NDArray[np.bool_] | None

    def crop(self, seg: npt.NDArray[Any], forward: Sequence[int]) -> npt.NDArray[Any]:
        """What nnU-Net's crop_to_nonzero makes of a label (1, Z, Y, X), its axes in the order `forward`."""
        seg = seg.transpose([0, *[i + 1 for i in forward]])
        seg = seg[(slice(None), *bounding_box_to_slice([self.box[i] for i in forward]))]
        if self.mask is not None:
            seg[(seg == 0) & ~self.mask.transpose(list(forward))[None]] = OUTSIDE
        return seg


def nonzero(path: Path, images: Sequence[Path], tools: Tools) -> Nonzero:
    """The mask kept at `path`, or made of the image and kept there."""
    stamp = json.dumps(image_stamps(images))
    if path.is_file():
        with np.load(path) as kept:
            if str(kept["stamp"]) == stamp:
                return _unpacked(kept)
    made = _made(tools, images)
    with replacing(path.parent.parent) as folder:
        bits = np.zeros(0, np.uint8) if made.mask is None else np.packbits(made.mask)
        np.savez_compressed(folder / path.name, stamp=stamp, shape=made.shape, box=made.box, bits=bits)
        path.parent.mkdir(exist_ok=True)
        os.replace(folder / path.name, path)
    return made


def _made(tools: Tools, images: Sequence[Path]) -> Nonzero:
    data, _ = tools.plans.image_reader_writer_class().read_images([str(image) for image in images])
    mask = create_nonzero_mask(data.astype(np.float32))
    box = tuple((int(low), int(high)) for low, high in get_bbox_from_mask(mask))
    inside = mask[bounding_box_to_slice(box)]
    return Nonzero(data.shape[1:], box, None if inside.all() else inside)


def _unpacked(kept: Mapping[str, Any]) -> Nonzero:
    box = tuple((int(low), int(high)) for low, high in kept["box"])
    size = tuple(high - low for low, high in box)
    bits = kept["bits"]
    mask = np.unpackbits(bits, count=int(np.prod(size))).reshape(size).astype(bool) if bits.size else None
    return Nonzero(tuple(int(n) for n in kept["shape"]), box, mask)


def image_stamps(images: Sequence[Path]) -> list[list[int]]:
    """Size and modification time of each channel file: other ones mean another image."""
    return [[status.st_size, status.st_mtime_ns] for status in (image.stat() for image in images)]


def rewrite_label(
    target: Target, case: str, label: npt.NDArray[Any], mask: Nonzero, dataset_json: dict[str, Any]
) -> bool:
    """Rewrite the segmentation part of a case; False where only the whole case can be made.

    Args:
        target: the configuration's data.
        case: the case's name.
        label: (1, Z, Y, X) as nnU-Net's reader gives it; it is changed.
        mask: where the image is not zero.
        dataset_json: nnU-Net's preprocessed copy of dataset.json.

    Raises:
        OneShotError: the label has another shape than the image.
    """
    properties = load_pickle(str(target.files(case)[2]))
    if label.shape[1:] != mask.shape:
        raise other_shape(case, mask.shape, label.shape[1:])
    forward = target.tools.plans.transpose_forward
    if [list(pair) for pair in properties["bbox_used_for_cropping"]] != [list(mask.box[i]) for i in forward]:
        return False
    seg, locations = segmentation_part(target.tools, label, mask, properties["spacing"], dataset_json)
    properties["class_locations"] = locations
    _save(target, case, seg, properties)
    return True


def segmentation_part(
    tools: Tools, label: npt.NDArray[Any], mask: Nonzero, spacing: Sequence[float], dataset_json: dict[str, Any]
) -> tuple[npt.NDArray[np.int16], dict[Any, Any]]:
    """The label's half of DefaultPreprocessor.run_case_npy: int16 (1, Z, Y, X) and nnU-Net's class_locations."""
    forward = tools.plans.transpose_forward
    seg = mask.crop(label, forward)
    old_spacing = [spacing[i] for i in forward]
    new_spacing = [*old_spacing[: 3 - len(tools.configuration.spacing)], *tools.configuration.spacing]
    new_shape = compute_new_shape(seg.shape[1:], old_spacing, new_spacing)
    seg = tools.configuration.resampling_fn_seg(seg, new_shape, old_spacing, new_spacing)
    manager = tools.plans.get_label_manager(dataset_json)
    wanted = list(manager.foreground_regions if manager.has_regions else manager.foreground_labels)
    if manager.has_ignore_label:
        wanted.append([OUTSIDE, *manager.all_labels])
    locations = tools.preprocessor._sample_foreground_locations(seg, wanted)
    seg = tools.preprocessor.modify_seg_fn(seg, tools.plans, dataset_json, tools.configuration)
    return seg.astype(np.int16), locations


def make_whole(target: Target, case: str, images: Sequence[Path], label: Path, dataset_json: dict[str, Any]) -> None:
    """Preprocess one case, image and label, by nnU-Net's own preprocessor.

    Raises:
        OneShotError: the label has another shape than the image.
    """
    tools = target.tools
    reader = tools.plans.image_reader_writer_class()
    # nnU-Net asserts it, without naming the case.
    shapes = [reader.read_images([str(i) for i in images])[0].shape[1:], reader.read_seg(str(label))[0].shape[1:]]
    if shapes[0] != shapes[1]:
        raise other_shape(case, *shapes)
    with replacing(target.folder.parent) as folder:
        tools.preprocessor.run_case_save(
            str(folder / case), [str(i) for i in images], str(label), tools.plans, tools.configuration, dataset_json
        )
        _move(folder, target, case)


def _save(target: Target, case: str, seg: npt.NDArray[np.int16], properties: Mapping[str, Any]) -> None:
    patch = tuple(target.tools.configuration.patch_size)
    blocks, chunks = comp_blosc2_params(seg.shape, patch, seg.itemsize)
    point = (1,) * seg.ndim
    with replacing(target.folder.parent) as folder:
        # nnU-Net writes image and segmentation together: a single voxel stands in for the image and stays here.
        nnUNetDatasetBlosc2.save_case(
            np.zeros(point, np.float32),
            seg,
            properties,
            str(folder / case),
            chunks=point,
            blocks=point,
            chunks_seg=chunks,
            blocks_seg=blocks,
        )
        (folder / f"{case}.b2nd").unlink()
        _move(folder, target, case)


def _move(folder: Path, target: Target, case: str) -> None:
    """Put finished files in place, the properties last: nnU-Net's own order."""
    for written in folder.glob("*.b2nd"):
        # On a full disk Blosc2 may cut a file short without a word, and does not open it then.
        blosc2.open(urlpath=str(written), mode="r")
    for place in target.files(case):
        if (folder / place.name).is_file():
            os.replace(folder / place.name, place)


@contextmanager
def replacing(base: Path) -> Iterator[Path]:
    """A folder on the preprocessed data's file system for files that are not whole yet.

    Raises:
        OneShotError: Blosc2 could not write a file, or one is not whole.
    """
    with tempfile.TemporaryDirectory(dir=base, prefix=TEMPORARY) as folder:
        try:
            yield Path(folder)
        except RuntimeError as error:
            if begun := sorted(Path(folder).iterdir()):
                raise cut_short(begun[-1], error) from error
            raise


def remove_leftovers(base: Path) -> None:
    """Remove what a killed run left; call it where no other run can be at work."""
    for folder in base.glob(f"{TEMPORARY}*"):
        shutil.rmtree(folder)
