"""How long new labels take to reach nnU-Net's preprocessed data: a label-only refresh against the full command.

    python benchmarks/refresh_speed.py -o WORK [--shape 40 256 256] [--cases 4]

Phantom volumes, every case labelled, one worker; once with one spacing, so that nothing is resampled, once with a
spacing of its own in every case. In one run: `nnUNetv2_preprocess`, a first refresh, which reads the images once to
keep their masks, and a later one, as in every round after that. Then the same inside one process, by parts. What
both leave behind is compared voxel by voxel (compressed bytes differ between two runs of nnU-Net itself, whose four
threads append blocks as they finish). Seconds are those of the processor, children included: other work on the
machine does not count.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import shutil
import subprocess
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import blosc2
import numpy as np
import SimpleITK as sitk
from batchgenerators.utilities.file_and_folder_operations import load_pickle
from common import markdown, use_folders, write_row
from nnunetv2.imageio.simpleitk_reader_writer import SimpleITKIO
from nnunetv2.preprocessing.preprocessors import default_preprocessor
from nnunetv2.preprocessing.preprocessors.default_preprocessor import DefaultPreprocessor
from nnunetv2.preprocessing.resampling import default_resampling
from nnunetv2.training.dataloading.nnunet_dataset import nnUNetDatasetBlosc2

from nnunet_oneshot import nnunet, refresh_case
from nnunet_oneshot.phantom import write_phantom_dataset
from nnunet_oneshot.refresh import preprocessed_targets, refresh, training_cases
from nnunet_oneshot.settings import PRESETS

CONFIGURATION = "3d_fullres"
KINDS = {"one spacing": 911, "own spacings": 912}
REFRESH = "from nnunet_oneshot.refresh import refresh; refresh({name!r}, 1)"


def main() -> None:
    """Measure both kinds of set and print the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", type=int, nargs=3, default=(40, 256, 256), metavar="N", help="Z Y X")
    parser.add_argument("--cases", type=int, default=4)
    parser.add_argument("-o", type=Path, required=True, help="working folder")
    arguments = parser.parse_args()
    use_folders(arguments.o)
    rows = [measure(arguments, kind, number) for kind, number in KINDS.items()]
    result = write_row("refresh_speed", {"shape": arguments.shape, "cases": arguments.cases, "seed": 0, "rows": rows})
    print(as_tables(result["rows"]))


def measure(arguments: argparse.Namespace, kind: str, number: int) -> dict[str, Any]:
    """Seconds of the commands and of their parts, on one set."""
    name = lay_out(arguments, kind, number)
    nnunet.plan_and_preprocess(name, PRESETS["small"], [CONFIGURATION], 1)
    base = nnunet.root("nnUNet_preprocessed") / name
    full = [str(Path(sys.executable).with_name("nnUNetv2_preprocess")), "-d", str(number), "-c", CONFIGURATION]
    full += ["-plans_name", PRESETS["small"].plans, "-np", "1"]
    seconds = {"full command": timed(lambda: command(full))}
    refresh_command = [sys.executable, "-c", REFRESH.format(name=name)]
    for index, what in enumerate(("first refresh", "later refresh")):
        new_labels(name, index)
        seconds[what] = timed(lambda: command(refresh_command))
    parts = {"full": by_parts(lambda: preprocess(base, name))}
    whole = contents(base)
    new_labels(name, 2)
    refresh(name, 1)
    new_labels(name, 1)
    parts["refresh"] = by_parts(lambda: refresh(name, 1) and None)
    equal = contents(base) == whole
    if not equal:
        raise RuntimeError(f"{name}: a refresh left something else than full preprocessing")
    ratio = seconds["later refresh"] / seconds["full command"]
    inside = parts["refresh"]["all"] / parts["full"]["all"]
    return {"set": kind, "seconds": seconds, "parts": parts, "ratio": ratio, "ratio_inside": inside, "equal": equal}


def lay_out(arguments: argparse.Namespace, kind: str, number: int) -> str:
    """A raw dataset of phantoms, every case labelled; returns its name."""
    name = f"Dataset{number}_{kind.replace(' ', '_')}"
    raw, truth = nnunet.root("nnUNet_raw"), arguments.o / f"truth_{number}"
    shutil.rmtree(raw / name, ignore_errors=True)
    shutil.rmtree(nnunet.root("nnUNet_preprocessed") / name, ignore_errors=True)
    shape = tuple(arguments.shape)
    short = kind.replace(" ", "_")
    made = write_phantom_dataset(raw, number, short, truth=truth, cases=arguments.cases, shape=shape)
    for index, case in enumerate(made.cases):
        shutil.copy(truth / f"{case}.nii.gz", made.folder / "labelsTr")
        if kind == "own spacings":
            scale = 1 + 0.06 * (index + 1) * (-1) ** index
            for path in (made.folder / "imagesTr" / f"{case}_0000.nii.gz", made.folder / "labelsTr" / f"{case}.nii.gz"):
                respace(path, scale)
    shutil.copytree(made.folder / "labelsTr", made.folder / "kept")
    content = json.loads((made.folder / "dataset.json").read_text(encoding="utf-8"))
    content["labels"]["ignore"], content["numTraining"] = len(content["labels"]), arguments.cases
    (made.folder / "dataset.json").write_text(json.dumps(content), encoding="utf-8")
    return name


def respace(path: Path, scale: float) -> None:
    """Multiply a file's in-plane spacing."""
    image = sitk.ReadImage(str(path))
    x, y, z = image.GetSpacing()
    image.SetSpacing((x * scale, y * scale, z))
    sitk.WriteImage(image, str(path), True)


def new_labels(name: str, shift: int) -> None:
    """Other labels: the phantoms' own, moved along x, with a band of ignore."""
    folder = nnunet.root("nnUNet_raw") / name
    for path in sorted((folder / "kept").iterdir()):
        image = sitk.ReadImage(str(path))
        label = np.roll(sitk.GetArrayFromImage(image), shift + 1, axis=2)
        label[:, :: 16 + shift] = 5
        moved = sitk.GetImageFromArray(label)
        moved.CopyInformation(image)
        sitk.WriteImage(moved, str(folder / "labelsTr" / path.name), True)


def command(words: list[str]) -> None:
    """Run a command, one thread, its output thrown away."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    subprocess.run(words, check=True, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)


def timed(action: Callable[[], object]) -> float:
    """Processor seconds of this process and of the children that ended meanwhile."""
    begin = processor_seconds()
    action()
    return round(processor_seconds() - begin, 3)


def processor_seconds() -> float:
    """Processor seconds of this process and of its children that have ended."""
    times = os.times()
    return times.user + times.system + times.children_user + times.children_system


def preprocess(base: Path, name: str) -> None:
    """What the full command does, in this process."""
    dataset_json = json.loads((base / "dataset.json").read_text(encoding="utf-8"))
    for target in preprocessed_targets(base):
        shutil.rmtree(target.folder)
        target.folder.mkdir()
        for case in training_cases(name):
            refresh_case.make_whole(target, case.name, case.images, case.label, dataset_json)
    for case in training_cases(name):
        shutil.copy(case.label, base / "gt_segmentations")


def by_parts(action: Callable[[], None]) -> dict[str, float]:
    """Seconds of each part of `action`, and of all of it."""
    spent: dict[str, float] = defaultdict(float)
    with clocks(spent):
        spent["all"] = timed(action)
    spent["rest"] = spent["all"] - sum(value for key, value in spent.items() if key != "all")
    return {key: round(value, 3) for key, value in sorted(spent.items())}


@contextmanager
def clocks(spent: dict[str, float]) -> Iterator[None]:
    """Clocks on nnU-Net's functions; of nested ones only the outermost counts."""
    running: list[str] = []

    def clock(name: Callable[..., str], function: Callable[..., Any]) -> Callable[..., Any]:
        def measured(*args: Any, **kwargs: Any) -> Any:
            begin = time.process_time()
            running.append(name(*args, **kwargs))
            try:
                return function(*args, **kwargs)
            finally:
                last = running.pop()
                spent[last] += 0 if running else time.process_time() - begin

        return measured

    sampling = clock(fixed("sample class locations"), DefaultPreprocessor._sample_foreground_locations)
    plain = {
        (SimpleITKIO, "read_seg"): "read label",
        (SimpleITKIO, "read_images"): "read image",
        (default_preprocessor, "crop_to_nonzero"): "crop",
        (DefaultPreprocessor, "_normalize"): "normalise",
        (nnUNetDatasetBlosc2, "save_case"): "write",
        (refresh_case, "nonzero"): "mask",
    }
    with ExitStack() as stack:
        for (owner, attribute), name in plain.items():
            wrapped = clock(fixed(name), getattr(owner, attribute))
            static = owner is nnUNetDatasetBlosc2
            stack.enter_context(mock.patch.object(owner, attribute, staticmethod(wrapped) if static else wrapped))
        stack.enter_context(
            mock.patch.object(DefaultPreprocessor, "_sample_foreground_locations", staticmethod(sampling))
        )
        resample = clock(which_resampling, default_resampling.resample_data_or_seg)
        stack.enter_context(mock.patch.object(default_resampling, "resample_data_or_seg", resample))
        yield


def fixed(name: str) -> Callable[..., str]:
    """A part that is always called the same."""
    return lambda *args, **kwargs: name


def which_resampling(data: object, shape: object, is_seg: bool = False, *args: object, **kwargs: object) -> str:
    """Resampling of labels, or of images."""
    return "resample label" if is_seg else "resample image"


def contents(base: Path) -> Mapping[str, Any]:
    """Hashes of nnU-Net's arrays with their layout, and of true labels; class locations as they are."""
    found: dict[str, Any] = {}
    for path in base.glob("*/*.b2nd"):
        array = blosc2.open(urlpath=str(path), mode="r")
        layout = (array.shape, array.chunks, array.blocks, str(array.dtype), str(array.cparams.filters))
        found[str(path)] = (layout, hashlib.sha256(np.ascontiguousarray(array[:]).tobytes()).hexdigest())
    for path in base.glob("*/*.pkl"):
        locations = load_pickle(str(path))["class_locations"]
        found[str(path)] = {key: np.asarray(value).tobytes() for key, value in locations.items()}
    truth = base.glob("gt_segmentations/*")
    return found | {str(path): hashlib.sha256(path.read_bytes()).hexdigest() for path in truth}


def as_tables(rows: list[dict[str, Any]]) -> str:
    """Commands and parts, as markdown."""
    commands = [[r["set"], *r["seconds"].values(), f"{r['ratio']:.2f}", f"{r['ratio_inside']:.2f}"] for r in rows]
    header = ["set", *rows[0]["seconds"], "later / full", "the same inside one process"]
    names = sorted({part for row in rows for side in row["parts"].values() for part in side})
    columns = [(row["set"], side) for row in rows for side in ("full", "refresh")]
    by_set = {row["set"]: row["parts"] for row in rows}
    parts = [[part, *(by_set[kind][side].get(part, 0) for kind, side in columns)] for part in names]
    return "\n\n".join([markdown(header, commands), markdown(["seconds", *(f"{k}, {s}" for k, s in columns)], parts)])


if __name__ == "__main__":
    main()
