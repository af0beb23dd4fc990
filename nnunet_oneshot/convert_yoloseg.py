"""From YoloSeg's folders of pictures to an nnU-Net raw dataset.

The layout (YoloSeg's README and loaders, github.com/iMED-Lab/YoloSeg at ad75f1d):

    file_list/train_all_frames.txt, train_label_frames.txt, test_all_frames.txt     plain file names, one a line
    Train/JPEGImages/*.png    Train/Annotations/*.png     colour pictures and grey label pictures of the same names
    Val/... (optional), Test/...                          the same two folders

train_label_frames.txt names the one labelled picture. The other training labels are there too in the published sets:
they are truth, and go to a folder of their own or nowhere, never into the dataset.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from skimage import io

from nnunet_oneshot.conversion import Conversion, DatasetPlan, Step, carry_out, dataset_name, safe_name, visible_files
from nnunet_oneshot.errors import OneShotError

PICTURES = (".png", ".jpg", ".jpeg", ".bmp", ".tif", ".tiff")
MOST_VALUES = 32
"""More label values than this are no labels but the grey shades of a lossy or smoothed mask."""


def convert_yoloseg(
    source: Path,
    dataset_id: int,
    name: str | None = None,
    *,
    annotated: Sequence[str] | None = None,
    truth: Path | None = None,
    dry_run: bool = False,
) -> Conversion:
    """Make a raw dataset: Train in imagesTr, Test in imagesTs, the listed picture's label in labelsTr.

    Pictures become PNG, of three channels when any of them has colour and of one otherwise. Label values become 0, 1,
    2, ... in ascending order (0 and 255 become 0 and 1).

    Args:
        source: the folder that holds Train.
        name: of the dataset; the folder's own when None.
        annotated: file names of the annotated pictures; those of file_list/train_label_frames.txt when None.
        truth: folder for the labels of Train, Val and Test, in folders of these names; not written when None.
        dry_run: write nothing.

    Raises:
        OneShotError: not that layout, no or an unknown annotated picture, a mask that holds no labels, names that
            collide, or the dataset id is taken.
    """
    source = Path(source)
    pictures = _pictures(source / "Train" / "JPEGImages", required=True)
    chosen = _annotated(source, pictures, annotated)
    masks = {split: _pictures(source / split / "Annotations") for split in ("Train", "Val", "Test")}
    absent = [stem for stem in chosen if stem not in masks["Train"]]
    if absent:
        raise OneShotError(f"expected a label of {absent[0]} in {source / 'Train' / 'Annotations'}, found none; add it")
    test = _pictures(source / "Test" / "JPEGImages")
    values = _label_values([path for split in masks.values() for path in split.values()])
    channels = _channels([*pictures.values(), *test.values()])
    image, label = partial(_write_picture, channels), partial(_write_label, tuple(values))
    steps = [Step(path, f"imagesTr/{safe_name(stem)}_0000.png", image) for stem, path in pictures.items()]
    steps += [Step(masks["Train"][stem], f"labelsTr/{safe_name(stem)}.png", label) for stem in chosen]
    steps += [Step(path, f"imagesTs/{safe_name(stem)}_0000.png", image) for stem, path in test.items()]
    title = dataset_name(dataset_id, safe_name(name or source.resolve().name).replace(".", "_"))
    plan = DatasetPlan(title, tuple(steps), _dataset_json(channels, len(values), len(chosen)))
    _check_truth(truth, title)
    done = carry_out([plan], _notes(source, values, pictures, masks, truth), dry_run=dry_run)
    if truth is not None and not dry_run:
        _write_truth(masks, Path(truth), label)
    return done


def _pictures(folder: Path, required: bool = False) -> dict[str, Path]:
    """Picture files of a folder by name without ending."""
    if not folder.is_dir():
        if required:
            raise OneShotError(
                f"expected YoloSeg's layout (Train/JPEGImages and Train/Annotations), found no folder {folder}; "
                "give the folder that holds Train"
            )
        return {}
    found: dict[str, Path] = {}
    for path in visible_files(folder):
        if path.suffix.lower() in PICTURES and found.setdefault(path.stem, path) != path:
            raise OneShotError(f"expected one file a picture, found {found[path.stem]} and {path}; remove one")
    if required and not found:
        raise OneShotError(f"expected pictures ({', '.join(PICTURES)}) in {folder}, found none; check the folder")
    return found


def _annotated(source: Path, pictures: dict[str, Path], given: Sequence[str] | None) -> list[str]:
    """Stems of the annotated pictures."""
    listing = source / "file_list" / "train_label_frames.txt"
    names = list(given) if given is not None else _read_list(listing)
    if not names:
        raise OneShotError(f"expected the annotated picture's file name in {listing}, found none; name it")
    by_name = {path.name: stem for stem, path in pictures.items()}
    stems = [by_name.get(name, name) for name in names]
    if unknown := [name for name, stem in zip(names, stems, strict=True) if stem not in pictures]:
        raise OneShotError(f"expected annotated pictures of Train/JPEGImages, found the unknown {unknown[0]}; check it")
    return sorted(set(stems))


def _read_list(path: Path) -> list[str]:
    if not path.is_file():
        return []
    return [line.strip() for line in path.read_text(encoding="utf-8-sig").splitlines() if line.strip()]


def _read(path: Path) -> npt.NDArray[Any]:
    try:
        return io.imread(path)
    except (OSError, ValueError, SyntaxError, RuntimeError) as error:
        raise OneShotError(f"expected a readable picture, found {path} damaged or unknown; export it again") from error


def _grey(mask: npt.NDArray[Any], path: Path) -> npt.NDArray[Any]:
    """A label picture with one channel; colour is taken only where all its channels are alike."""
    if mask.ndim == 3 and mask.shape[-1] in (2, 4):
        mask = mask[..., :-1]
    if mask.ndim == 3 and (mask == mask[..., :1]).all():
        mask = mask[..., 0]
    if mask.ndim != 2:
        raise OneShotError(f"expected a grey label picture, found {path} with colours; save its label values as grey")
    return mask


def _label_values(paths: Sequence[Path]) -> list[int]:
    """All values that occur, ascending, background first."""
    values: set[int] = {0}
    for path in paths:
        values |= {int(v) for v in np.unique(_grey(_read(path), path))}
        if len(values) > MOST_VALUES:
            raise OneShotError(
                f"expected a few label values in masks, found more than {MOST_VALUES} up to {path}; masks must not be "
                "saved as JPEG or smoothed"
            )
    if len(values) < 2:
        raise OneShotError("expected a label value beside 0 in the masks, found none; check the masks")
    return sorted(values)


def _channels(paths: Sequence[Path]) -> int:
    """3 when a picture has colour, else 1."""
    for path in paths:
        picture = _read(path)
        if picture.ndim == 3 and picture.shape[-1] >= 3 and (np.ptp(picture[..., :3].astype(int), axis=-1) > 0).any():
            return 3
    return 1


def _write_picture(channels: int, source: Path, target: Path) -> None:
    picture = _read(source)
    if picture.ndim == 3 and picture.shape[-1] in (2, 4):
        picture = picture[..., :-1]
    if picture.ndim == 2 or picture.shape[-1] == 1:
        picture = np.repeat(picture.reshape(*picture.shape[:2], 1), channels, axis=2)
    io.imsave(target, picture[..., :channels].squeeze(), check_contrast=False)


def _write_label(values: tuple[int, ...], source: Path, target: Path) -> None:
    mask = _grey(_read(source), source)
    io.imsave(target, np.searchsorted(values, mask).astype(np.uint8), check_contrast=False)


def _dataset_json(channels: int, values: int, annotated: int) -> dict[str, Any]:
    names = ("R", "G", "B") if channels == 3 else ("grey",)
    return {
        "channel_names": {str(i): name for i, name in enumerate(names)},
        "labels": {"background": 0, **{f"class_{i}": i for i in range(1, values)}},
        "numTraining": annotated,
        "file_ending": ".png",
    }


def _notes(
    source: Path,
    values: Sequence[int],
    pictures: dict[str, Path],
    masks: dict[str, dict[str, Path]],
    truth: Path | None,
) -> list[str]:
    notes = []
    if list(values) != list(range(len(values))):
        notes.append("label values " + ", ".join(f"{v} became {i}" for i, v in enumerate(values)))
    if unlisted := sorted(set(_read_list(source / "file_list" / "train_all_frames.txt")) ^ _file_names(pictures)):
        notes.append(
            f"train_all_frames.txt and Train/JPEGImages differ, in {unlisted[0]} for one; the folder was taken"
        )
    if orphans := sorted(set(masks["Train"]) - set(pictures)):
        notes.append(f"{len(orphans)} training labels have no picture, {orphans[0]} for one")
    if truth is None and len(masks["Train"]) > 1:
        notes.append("the other labels were not taken: give a folder for the truth to score by them")
    return notes


def _file_names(pictures: dict[str, Path]) -> set[str]:
    return {path.name for path in pictures.values()}


def _check_truth(truth: Path | None, title: str) -> None:
    if truth is not None and title in Path(truth).resolve().parts:
        raise OneShotError(f"expected a folder for the truth outside of the dataset, found {truth}; choose another")


def _write_truth(masks: dict[str, dict[str, Path]], truth: Path, write: Callable[[Path, Path], None]) -> None:
    for split, paths in masks.items():
        for stem, path in paths.items():
            target = truth / split / f"{safe_name(stem)}.png"
            target.parent.mkdir(parents=True, exist_ok=True)
            write(path, target)
