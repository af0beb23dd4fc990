"""What `suggest` costs on a large set: seconds and peak memory for whole cases and for slices.

    python benchmarks/suggest_time.py [-n 200]

Phantoms of kind `thick_slices` (16 x 96 x 96 voxels, seed 0) are written to a temporary folder, none of them annotated;
that is not timed. Then the command runs as a user calls it, with one process (-np 1): start-up, checks of every image,
table and picture are included. Wall-clock seconds grow with other work on the machine, whose load before each run
stands beside them; processor seconds hardly do. Memory is the process's resident peak. A finished row,
benchmarks/results/suggest_time_<n>.json, is not computed again.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from common import markdown, read_row, use_folders, write_row
from cost import measured

from nnunet_oneshot.phantom import write_phantom_dataset

DATASET = 501
COMMAND = "from nnunet_oneshot.cli import suggest; suggest()"
RUNS: dict[str, tuple[str, ...]] = {"cases": (), "slices": ("--slices",)}


def timed(flags: tuple[str, ...], work: Path) -> dict[str, float]:
    """Seconds and memory of one run of the command."""
    load, begin = os.getloadavg()[0], time.perf_counter()
    command = [sys.executable, "-c", COMMAND, "-d", str(DATASET), "-np", "1", *flags]
    used = measured(command, work / "log.txt")
    return {**used, "wall_seconds": round(time.perf_counter() - begin, 1), "load_before": round(load, 1)}


def row(count: int) -> dict[str, Any]:
    """The row of so many volumes, from its file if it is there."""
    title = f"suggest_time_{count}"
    if (found := read_row(title)) is not None:
        return found
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        use_folders(work)
        made = write_phantom_dataset(work / "nnUNet_raw", DATASET, truth=work / "truth", cases=count)
        for label in (made.folder / "labelsTr").iterdir():
            label.unlink()
        runs = {name: timed(flags, work) for name, flags in RUNS.items()}
    return write_row(title, {"volumes": count, "processes": 1, "runs": runs})


def main() -> None:
    """Fill in what is missing and print the table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("-n", type=int, default=200, help="volumes")
    options = parser.parse_args()
    found = row(options.n)
    keys = ("wall_seconds", "cpu_seconds", "peak_gib", "load_before")
    print(markdown(["suggest", *keys], [[name, *(run[k] for k in keys)] for name, run in found["runs"].items()]))


if __name__ == "__main__":
    main()
