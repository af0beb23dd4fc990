"""What the converters share: a plan of files to write, shown by a dry run or carried out as a whole.

A dataset is written beside its place under a name that begins with a dot, and moved there when it is complete: an
interrupted conversion leaves no half dataset that nnU-Net would take for a whole one.
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
import numpy.typing as npt
import SimpleITK as sitk
from tqdm import tqdm

from nnunet_oneshot.dataset import READ_ERRORS, raw_root
from nnunet_oneshot.errors import OneShotError

Writer = Callable[[Path, Path], None]
"""Writes the second file from the first."""


@dataclass(frozen=True)
class Step:
    """One file to write: its source, its path inside the dataset's folder, and how."""

    source: Path
    target: str
    write: Writer


@dataclass(frozen=True)
class DatasetPlan:
    """One dataset to write.

    Attributes:
        name: folder name, `DatasetXXX_name`.
        steps: its files.
        json: content of dataset.json.
        extra: further JSON files by name, such as a mapping of cases to patients.
    """

    name: str
    steps: tuple[Step, ...]
    json: Mapping[str, Any]
    extra: Mapping[str, Any] = field(default_factory=dict)

    def count(self, folder: str) -> int:
        """Files that go to one of the dataset's folders."""
        return sum(step.target.startswith(f"{folder}/") for step in self.steps)


@dataclass(frozen=True)
class Conversion:
    """What a converter wrote, or would write.

    Attributes:
        datasets: the datasets' folders.
        plans: what goes into each.
        notes: what a reader should know: cases passed over, files that were not understood.
        dry_run: True when nothing was written.
    """

    datasets: tuple[Path, ...]
    plans: tuple[DatasetPlan, ...]
    notes: tuple[str, ...]
    dry_run: bool

    def lines(self, verbose: bool = False) -> list[str]:
        """For people: what each dataset holds; every file with `verbose`."""
        lines = ["nothing was written: this was a dry run"] if self.dry_run else []
        for plan in self.plans:
            counts = [f"{plan.count(f)} in {f}" for f in ("imagesTr", "labelsTr", "imagesTs") if plan.count(f)]
            lines.append(f"{plan.name}: {', '.join(counts)}")
            lines += [f"  {step.source} -> {step.target}" for step in plan.steps if verbose]
        return [*lines, *(f"note: {note}" for note in self.notes)]

    def following(self, number: int) -> str:
        """The command to type next for the first dataset, whose id is `number`."""
        if self.dry_run:
            return "the same command without --dry_run"
        if self.plans[0].count("labelsTr"):
            return f"nnUNetv2_oneshot_propagate -d {number} -o ID"
        return f"nnUNetv2_oneshot_suggest -d {number}, and annotate what it names"


def carry_out(plans: Sequence[DatasetPlan], notes: Sequence[str], *, dry_run: bool) -> Conversion:
    """Write datasets into nnUNet_raw, each as a whole, or only say what would be written.

    Raises:
        OneShotError: a dataset with such an id is there, two sources want one file, or a source cannot be read.
    """
    root = raw_root()
    for plan in plans:
        _check(plan, root)
    for plan in () if dry_run else plans:
        _write(plan, root)
    return Conversion(tuple(root / plan.name for plan in plans), tuple(plans), tuple(notes), dry_run)


def dataset_name(dataset_id: int, name: str) -> str:
    """`DatasetXXX_name`; OneShotError for an id or a name that nnU-Net would not take."""
    if not 0 < dataset_id < 1000 or not re.fullmatch(r"[A-Za-z0-9_-]+", name):
        raise OneShotError(
            f"expected an id from 1 to 999 and a name of letters, digits and _, found {dataset_id} and {name!r}; "
            "choose others"
        )
    return f"Dataset{dataset_id:03d}_{name}"


def safe_name(text: str) -> str:
    """A case name without characters that file systems or nnU-Net's file lists mistake."""
    return re.sub(r"[^A-Za-z0-9.-]+", "_", text).strip("_.") or "case"


def copy(source: Path, target: Path) -> None:
    """The file as it is."""
    shutil.copyfile(source, target)


def read_volume(path: Path) -> sitk.Image:
    """Read a volume; OneShotError where it cannot be read whole."""
    try:
        if path.name.lower().endswith((".nii", ".nii.gz")):
            # ITK fills up a file that was cut short and says nothing; nibabel refuses it.
            np.asanyarray(nibabel.load(path).dataobj)  # type: ignore[attr-defined]
        return sitk.ReadImage(str(path))
    except READ_ERRORS as error:
        raise OneShotError(f"expected a readable image, found {path} damaged or unknown; export it again") from error


def rewrite(source: Path, target: Path) -> None:
    """The same volume in the target's format, or the same bytes where the format is the same."""
    if source.name.endswith(".nii.gz") and target.name.endswith(".nii.gz"):
        copy(source, target)
    else:
        sitk.WriteImage(read_volume(source), str(target), True)


def label_like(image: sitk.Image, label: npt.NDArray[np.integer[Any]]) -> sitk.Image:
    """A label with the geometry of its image."""
    written = sitk.GetImageFromArray(label.astype(np.uint8))
    written.CopyInformation(image)
    return written


def visible_files(folder: Path) -> Iterator[Path]:
    """All files below a folder, sorted, without hidden ones and what archives of other systems add."""
    for path in sorted(folder.rglob("*")):
        parts = path.relative_to(folder).parts
        if path.is_file() and not any(p.startswith(".") or p == "__MACOSX" for p in parts):
            yield path


def _check(plan: DatasetPlan, root: Path) -> None:
    taken = sorted(root.glob(f"{plan.name.split('_', 1)[0]}_*"))
    if taken:
        raise OneShotError(f"expected the dataset id of {plan.name} to be free, found {taken[0]}; choose another -d")
    seen: dict[str, Path] = {}
    for step in plan.steps:
        if step.target in seen:
            raise OneShotError(
                f"expected different case names, found {seen[step.target]} and {step.source} that both become "
                f"{step.target}; rename one"
            )
        seen[step.target] = step.source


def _write(plan: DatasetPlan, root: Path) -> None:
    partial = root / f".{plan.name}.part"
    shutil.rmtree(partial, ignore_errors=True)
    try:
        for step in tqdm(plan.steps, desc=plan.name, unit="file", disable=None):
            target = partial / step.target
            target.parent.mkdir(parents=True, exist_ok=True)
            step.write(step.source, target)
        (partial / "labelsTr").mkdir(parents=True, exist_ok=True)
        for name, content in {"dataset.json": plan.json, **plan.extra}.items():
            (partial / name).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
        partial.rename(root / plan.name)
    except PermissionError as error:
        raise OneShotError(f"cannot write {error.filename}; choose a folder that you may write to") from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)
