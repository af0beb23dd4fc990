"""What the benchmarks share: the real data sets, the one-shot protocol's layout, and small JSON rows.

A data set is a folder of $ONESHOT_DATA (default: ../shared/data beside the repository) with images/ and labels/, whose
cases splits.json (or a split.json in the folder) shares out; docs/howto/evidence.md says where to get them. Only the
annotated case's label ever enters a dataset folder; the others are read by `evaluate` alone.
"""

from __future__ import annotations

import json
import os
import platform
import shutil
import subprocess
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np

from nnunet_oneshot.phantom import Kind, make_case
from sam2_propagation.interface import Image, Support

REPOSITORY = Path(__file__).resolve().parents[1]
RESULTS = REPOSITORY / "benchmarks" / "results"
SPLITS: dict[str, Any] = json.loads((REPOSITORY / "benchmarks" / "splits.json").read_text(encoding="utf-8"))
"""Of every real set the protocol: channel, labels, which cases may be annotated, pool and test cases."""
NOT_MIRRORED = {base: f"{base}NoMirroring" for base in ("nnUNetTrainer", "OneShotTrainer")}
"""The trainers that neither train nor predict with mirrored images."""
GATED = 0.3
"""Estimated Dice below which `refine` left cases out until gating was measured: rows of before are of that."""
PACKAGES = ("nnunet-oneshot", "nnunetv2", "sam2", "torch", "SimpleITK", "numpy")


@dataclass(frozen=True)
class DataSet:
    """One real data set and its split."""

    name: str
    folder: Path
    split: dict[str, Any]

    @property
    def labels(self) -> Path:
        """True labels of all cases: for scoring only."""
        return self.folder / "labels"

    @property
    def ending(self) -> str:
        """File ending of images and labels."""
        return ".png" if next((self.folder / "images").iterdir()).suffix == ".png" else ".nii.gz"


def data_set(name: str) -> DataSet:
    """The data set of that name; FileNotFoundError with what to do where it is absent."""
    root = Path(os.environ.get("ONESHOT_DATA", REPOSITORY.parent / "shared" / "data"))
    folder = root / name
    own = folder / "split.json"
    if not (folder / "images").is_dir() or not (own.is_file() or name in SPLITS):
        raise FileNotFoundError(
            f"no data set {name} in {root}; set ONESHOT_DATA to the folder that holds it (docs/howto/evidence.md)"
        )
    return DataSet(name, folder, json.loads(own.read_text(encoding="utf-8")) if own.is_file() else SPLITS[name])


def lay_out(data: DataSet, number: int, cases: list[str], annotated: list[str], *, name: str | None = None) -> Path:
    """Write an nnU-Net raw dataset of `cases`, with labels of the annotated ones alone; returns its folder."""
    folder = Path(os.environ["nnUNet_raw"]) / f"Dataset{number:03d}_{name or data.name}"
    if (folder / "dataset.json").is_file():
        return folder
    for sub in ("imagesTr", "labelsTr"):
        (folder / sub).mkdir(parents=True, exist_ok=True)
    for case in sorted({*cases, *annotated}):
        shutil.copy(data.folder / "images" / f"{case}{data.ending}", folder / "imagesTr" / f"{case}_0000{data.ending}")
    for case in annotated:
        shutil.copy(data.labels / f"{case}{data.ending}", folder / "labelsTr" / f"{case}{data.ending}")
    content = {
        "channel_names": {"0": data.split["channel"]},
        "labels": data.split["labels"],
        "numTraining": len(annotated),
        "file_ending": data.ending,
    }
    (folder / "dataset.json").write_text(json.dumps(content, indent=2), encoding="utf-8")
    return folder


def phantom(kind: Kind, number: int) -> Support:
    """One made-up patient of a kind with its label; the same body for the same number, seed 0."""
    image, label, origin = make_case(kind, np.random.SeedSequence([0, number]))
    return Support(Image(f"phantom_{number:03d}", image, kind.spacing, origin), label.astype(np.int16))


def use_folders(work: Path) -> None:
    """Point nnU-Net's three variables into a working folder."""
    for variable in ("nnUNet_raw", "nnUNet_preprocessed", "nnUNet_results"):
        (work / variable).mkdir(parents=True, exist_ok=True)
        os.environ[variable] = str((work / variable).resolve())


def surroundings() -> dict[str, Any]:
    """Hardware, versions and commit, as every row holds them."""
    return {
        "hardware": f"{_processor()}, {len(os.sched_getaffinity(0))} cores",
        "python": platform.python_version(),
        "versions": {name: version(name) for name in PACKAGES},
        "commit": _commit(),
    }


def patient(case: str) -> str:
    """Whose image a case is: acdc_mr has two phases of a heart, `patient001_frame01` and `patient001_frame12`."""
    return case.partition("_frame")[0]


def read_row(name: str) -> dict[str, Any] | None:
    """A finished row of an earlier run, or None."""
    path = RESULTS / f"{name}.json"
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else None


def write_row(name: str, row: dict[str, Any]) -> dict[str, Any]:
    """Write a finished row as small JSON and return it."""
    RESULTS.mkdir(parents=True, exist_ok=True)
    content = {**row, **surroundings()}
    (RESULTS / f"{name}.json").write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    return content


def markdown(header: list[str], rows: list[list[Any]]) -> str:
    """A markdown table."""
    lines = ["| " + " | ".join(header) + " |", "|" + " --- |" * len(header)]
    return "\n".join([*lines, *("| " + " | ".join(map(str, row)) + " |" for row in rows)])


def _processor() -> str:
    info = Path("/proc/cpuinfo")
    names = (
        [line for line in info.read_text(encoding="utf-8").splitlines() if line.startswith("model name")]
        if info.exists()
        else []
    )
    return names[0].split(":", 1)[1].strip() if names else platform.processor() or platform.machine()


def _commit() -> str:
    command = ["git", "-C", str(REPOSITORY), "rev-parse", "--short", "HEAD"]
    done = subprocess.run(command, capture_output=True, encoding="utf-8", check=False)
    return done.stdout.strip() or "unknown"
