"""What labelling costs as work grows: seconds and peak memory of `propagate`, of relabelling and of SAM2's opinion.

    python benchmarks/cost.py -o WORK [--axes cases slices classes supports] [--most 150] [--memory | --opinion]
    python benchmarks/cost.py --table

From a base of 4 un-annotated phantoms of 30 x 64 x 64 voxels with 4 classes and one annotated case, one number grows at
a time: un-annotated cases, slices of every volume, classes, annotated cases. Each point is one small JSON in
benchmarks/results/ and is not computed again. `propagate` is the command with its default propagators and one worker,
relabelling one round of `relabel` on predictions that are round 0's labels moved by a voxel. What `refine` does before
that by default, ask SAM2 once more about every case, prompted by these predictions, is measured by `--opinion`, as rows
of their own, from labels by registration alone: its work is the same and theirs is less. Seconds are those of the
processor, children included, so other work on the machine does not count; memory is the largest process's resident
peak. A slope is that of a straight line through logarithms: 1 is proportional. Where a point has no memory of its own,
the process that measured it held more itself; `--memory` measures such points again, as rows of their own, of which
nothing but memory counts: seconds of a crowded machine are longer. Seed 0; nothing is scored.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import SimpleITK as sitk
from common import REPOSITORY, markdown, read_row, use_folders, write_row

from nnunet_oneshot.phantom import write_phantom_dataset

AXES: dict[str, tuple[int, ...]] = {
    "cases": (5, 15, 50, 150),
    "slices": (30, 120, 300, 600),
    "classes": (1, 2, 4, 8),
    "supports": (1, 2, 4, 8),
}
PICTURE = REPOSITORY / "docs" / "pictures" / "cost.png"
SOURCE, OUTPUT = 501, 601
RELABEL = """
import sys
from pathlib import Path
from nnunet_oneshot.refine import open_store
from nnunet_oneshot.relabel import relabel
store, raw = open_store(int(sys.argv[1]))
relabel(raw, store, Path(sys.argv[2]), 1, 1)
"""
ASK = """
import sys
from pathlib import Path
from nnunet_oneshot.refine import open_store
from nnunet_oneshot.second_opinion import ask_sam2
store, raw = open_store(int(sys.argv[1]))
ask_sam2(raw, store, raw.unannotated, Path(sys.argv[2]), 1, "builtin", "cpu", 1)
"""
STAGES = {"propagate": "`propagate`", "opinion": "SAM2's opinion", "relabel": "relabelling"}
"""In the order of a round's work, and what the table calls them."""


@dataclass(frozen=True)
class Size:
    """How much work there is: un-annotated cases, slices of each volume, classes, annotated cases."""

    cases: int = 4
    slices: int = 30
    classes: int = 4
    supports: int = 1


def lay_out(work: Path, size: Size) -> None:
    """Phantoms in nnUNet_raw, the first ones annotated, with as many classes as asked for."""
    made = write_phantom_dataset(
        work / "nnUNet_raw",
        SOURCE,
        truth=work / "truth",
        cases=size.cases + size.supports,
        shape=(size.slices, 64, 64),
    )
    for path in (made.folder / "labelsTr").iterdir():
        path.unlink()
    for case in made.cases[: size.supports]:
        label = sitk.ReadImage(str(made.truth / f"{case}.nii.gz"))
        _write_like(
            label, banded(sitk.GetArrayFromImage(label), size.classes), made.folder / "labelsTr" / f"{case}.nii.gz"
        )
    content = json.loads((made.folder / "dataset.json").read_text(encoding="utf-8"))
    content["labels"] = {"background": 0, **{f"class {i}": i for i in range(1, size.classes + 1)}}
    content["numTraining"] = size.supports
    (made.folder / "dataset.json").write_text(json.dumps(content), encoding="utf-8")


def banded(label: np.ndarray, classes: int) -> np.ndarray:
    """The foreground of (Z, Y, X), cut along x into `classes` bands of equal size."""
    columns = np.nonzero(label)[2]
    edges = np.quantile(columns, np.arange(1, classes) / classes)
    bands = 1 + np.searchsorted(edges, np.arange(label.shape[2]), side="left")
    return np.where(label > 0, bands[None, None], 0).astype(np.uint8)


def _write_like(image: sitk.Image, array: np.ndarray, path: Path) -> None:
    made = sitk.GetImageFromArray(array)
    made.CopyInformation(image)
    sitk.WriteImage(made, str(path))


def apart(function: Callable[..., Any], *arguments: Any) -> Any:
    """What a function gives, called in another process.

    A command's peak begins with the memory of the process that starts it, which therefore holds no images.
    """
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        return pool.submit(function, *arguments).result()


def measured(command: list[str], log: Path) -> dict[str, float]:
    """Processor seconds and peak resident memory (GiB) of a command and its children."""
    with log.open("ab") as output:
        process = subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT)
        _, status, used = os.wait4(process.pid, 0)
    if status:
        raise SystemExit(f"{' '.join(command)} failed; see {log}")
    return {"cpu_seconds": round(used.ru_utime + used.ru_stime, 1), "peak_gib": round(used.ru_maxrss / 2**20, 3)}


def moved_labels(work: Path) -> Path:
    """Predictions for relabelling: round 0's labels, moved by one voxel."""
    source = next((work / "nnUNet_raw").glob(f"Dataset{OUTPUT}_*")) / "pseudoTr" / "fused"
    folder = work / "predictions"
    folder.mkdir()
    for path in source.glob("*.nii.gz"):
        label = sitk.ReadImage(str(path))
        _write_like(label, np.roll(sitk.GetArrayFromImage(label), 1, axis=2), folder / path.name)
    return folder


def point(work: Path, axis: str, value: int, memory: bool = False) -> dict[str, Any]:
    """One row, from its file if it is there."""
    key = _key(axis, value, "memory_" if memory else "")
    if (done := read_row(key)) is not None:
        return done
    size = replace(Size(), **{axis: value})
    propagated = _propagated(work, size)
    relabelled = _by_code(work, RELABEL)
    row = {"axis": axis, **vars(size), "propagate": propagated, "relabel": relabelled, "seed": 0}
    return write_row(key, row)


def opinion(work: Path, axis: str, value: int) -> dict[str, Any]:
    """One row of what SAM2's opinion takes, from its file if it is there."""
    key = _key(axis, value, "opinion_")
    if (done := read_row(key)) is not None:
        return done
    size = replace(Size(), **{axis: value})
    _propagated(work, size, "-propagator", "registration")
    return write_row(key, {"axis": axis, **vars(size), "opinion": _by_code(work, ASK), "seed": 0})


def _propagated(work: Path, size: Size, *flags: str) -> dict[str, float]:
    """Lay phantoms out in an empty folder and carry their labels; what that took."""
    shutil.rmtree(work, ignore_errors=True)
    use_folders(work)
    apart(lay_out, work, size)
    command = str(Path(sys.executable).with_name("nnUNetv2_oneshot_propagate"))
    given = ["-d", str(SOURCE), "-o", str(OUTPUT), "-np", "1", "-device", "cpu", *flags]
    return measured([command, *given], work / "log.txt")


def _by_code(work: Path, code: str) -> dict[str, float]:
    """What a stage of a round takes, from predictions made here."""
    return measured([sys.executable, "-c", code, str(OUTPUT), str(apart(moved_labels, work))], work / "log.txt")


def _key(axis: str, value: int, kind: str = "") -> str:
    return f"cost_{kind}{axis}_{value:03d}"


def found() -> dict[str, list[dict[str, Any]]]:
    """All finished points, by axis."""
    rows = {axis: [_known(axis, value) for value in values] for axis, values in AXES.items()}
    return {axis: [row for row in of_axis if row is not None] for axis, of_axis in rows.items()}


def _known(axis: str, value: int) -> dict[str, Any] | None:
    """A point, with memory from where it was measured again, and with SAM2's opinion where that was measured."""
    row, again, asked = (read_row(_key(axis, value, kind)) for kind in ("", "memory_", "opinion_"))
    if row is not None and again is not None:
        for stage in ("propagate", "relabel"):
            row[stage]["peak_gib"] = row[stage]["peak_gib"] or again[stage]["peak_gib"]
    return row if row is None or asked is None else {**row, "opinion": asked["opinion"]}


def slope(rows: list[dict[str, Any]], axis: str, stage: str, figure: str) -> str:
    """Exponent of the growth between the points: 1 is proportional, 0 constant; - for fewer than two points."""
    known = [(row[axis], row[stage][figure]) for row in rows if row.get(stage, {}).get(figure) is not None]
    return f"{np.polyfit(*np.log(known).T, 1)[0]:.2f}" if len(known) > 1 else "-"


def table(points: dict[str, list[dict[str, Any]]]) -> str:
    """Markdown, a line for each axis and stage."""
    lines = []
    for axis, rows in points.items():
        for stage, name in STAGES.items():
            known = [row for row in rows if stage in row]
            seconds = ", ".join(f"{row[axis]}: {row[stage]['cpu_seconds']}" for row in known)
            memory = ", ".join(str(row[stage]["peak_gib"] or "-") for row in known)
            slopes = [slope(known, axis, stage, figure) for figure in ("cpu_seconds", "peak_gib")]
            lines += [[axis, name, seconds, slopes[0], memory, slopes[1]]] if len(known) > 1 else []
    return markdown(["grows", "stage", "CPU s", "slope", "peak GiB", "slope"], lines)


def draw(points: dict[str, list[dict[str, Any]]]) -> None:
    """Seconds, on logarithmic scales, and memory against each axis."""
    figure, axes = plt.subplots(2, len(points), figsize=(11, 5), sharex="col", sharey="row", constrained_layout=True)
    for column, (axis, rows) in enumerate(points.items()):
        for stage, called in STAGES.items():
            for line, name in enumerate(("cpu_seconds", "peak_gib")):
                known = [row for row in rows if row.get(stage, {}).get(name) is not None]
                values = [row[axis] for row in known], [row[stage][name] for row in known]
                axes[line, column].plot(*values, "o-", label=called.replace("`", ""))
        values = [row[axis] for row in rows]
        axes[1, column].set(xlabel=axis, xscale="log")
        axes[1, column].set_xticks(values, [str(value) for value in values])
        axes[1, column].minorticks_off()
    axes[0, 0].set(ylabel="CPU seconds", yscale="log")
    axes[1, 0].set_ylim(bottom=0)
    axes[1, 0].set_ylabel("peak GiB")
    axes[0, 0].legend()
    figure.savefig(PICTURE, dpi=90)
    plt.close(figure)


def main() -> None:
    """Measure what is missing, then print the table and draw the figure."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--axes", nargs="+", default=list(AXES), choices=sorted(AXES))
    parser.add_argument("--most", type=int, default=600, help="leave out points beyond this")
    again = parser.add_mutually_exclusive_group()
    again.add_argument("--memory", action="store_true", help="again, for memory alone")
    again.add_argument("--opinion", action="store_true", help="what SAM2's opinion takes, rows of their own")
    parser.add_argument("-o", type=Path, help="working folder; it is emptied")
    parser.add_argument("--table", action="store_true", help="only print and draw what is there")
    arguments = parser.parse_args()
    if not arguments.table:
        if arguments.o is None:
            parser.error("-o is needed to measure")
        for axis in arguments.axes:
            for value in AXES[axis]:
                work = arguments.o.resolve() / "cost"
                if value > arguments.most:
                    continue
                if arguments.opinion:
                    opinion(work, axis, value)
                else:
                    point(work, axis, value, arguments.memory)
    points = found()
    print(table(points))
    if all(points.values()):
        draw(points)


if __name__ == "__main__":
    main()
