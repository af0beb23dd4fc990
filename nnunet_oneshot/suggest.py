"""Which case, or which slice of each case, is worth annotating next.

Before any label exists: those that stand best for all others (`suggest_ranking`) by how images look
(`suggest_features`). In a dataset that this package made, whose labels already exist: those that would help most, the
doubtful ones that are also like other doubtful ones and unlike what is annotated.
"""

from __future__ import annotations

import csv
import io
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from nnunet_oneshot.checks import check_image
from nnunet_oneshot.dataset import Case, RawDataset, open_dataset, open_source
from nnunet_oneshot.errors import OneShotError
from nnunet_oneshot.parallel import FEW, default_processes, over_cases
from nnunet_oneshot.propagators import RECIPE
from nnunet_oneshot.store import MANIFEST, Store
from nnunet_oneshot.suggest_doubt import Doubt, doubt_of_cases, doubt_of_slices
from nnunet_oneshot.suggest_features import Described, Vectors, alike, along, describe
from nnunet_oneshot.suggest_pictures import picture_of
from nnunet_oneshot.suggest_ranking import best_slice, rank
from sam2_propagation.correspondence import CorrespondencePropagator
from sam2_propagation.views import natural_plane

FOLDER = "suggest"
AXES = "zyx"
COLUMNS = ("rank", "case", "axis", "slice", "coverage", "doubt", "annotated")


@dataclass(frozen=True)
class Suggestion:
    """One row of the table.

    Attributes:
        rank: from 1, the most worth annotating.
        case: name of the case.
        axis: of the array, "z", "y" or "x", that slices are counted along.
        slice: the slice that stands best for this case, counted from 0.
        coverage: how well this and all rows before it, with what is annotated, stand for the set: mean correlation.
        doubt: how doubtful the case's label is, in [0, 1]; None before any label exists.
        annotated: the case has a sparse label already; the slice is one more.
    """

    rank: int
    case: str
    axis: str
    slice: int
    coverage: float
    doubt: float | None
    annotated: bool


@dataclass(frozen=True)
class Suggestions:
    """What `suggest` found and wrote: `suggest.csv` and `suggest.png` in `folder`."""

    rows: tuple[Suggestion, ...]
    folder: Path
    cases: int
    slices: bool


@dataclass(frozen=True, eq=False)
class _Set:
    """All cases' descriptions, in the order of their names."""

    described: list[Described]
    labelled: dict[str, set[int]]
    annotated: set[int]
    candidates: list[int]
    doubt: dict[str, Doubt] | None


def suggest(
    dataset: int | str,
    count: int | None = None,
    *,
    slices: bool = False,
    learn: bool = False,
    output: Path | None = None,
    num_processes: int | None = None,
) -> Suggestions:
    """Rank the cases (or one slice of every case) that are worth annotating; write a table and pictures.

    Args:
        dataset: id or name of a raw dataset, annotated or not, or of one that `propagate` made.
        count: how many to name; 5 cases, or with `slices` every case, when None.
        slices: choose one slice of every case rather than whole cases.
        learn: let the network of `correspondence` learn from the images (or take up what it has learnt of them), and
            rank slices by what it predicts that a label keeps from each to the next.
        output: folder to write to; `suggest` in the dataset's folder when None.
        num_processes: cases looked at together; the processor count when None.

    Raises:
        OneShotError: a set with nothing to choose between, a bad image, no permission to write.
    """
    if count is not None and count < 1:
        raise OneShotError(f"expected -n of 1 or more, found {count}; leave it out for the default")
    if learn and not slices:
        raise OneShotError(
            "expected --slices with --learn, which ranks slices, found it alone; add it or leave --learn out"
        )
    raw = open_dataset(dataset)
    folder = output or raw.folder / FOLDER
    _check_choice(raw, slices)
    _check_folder(folder)
    processes = num_processes or default_processes()
    check_image(raw, raw.cases[0])
    plane = natural_plane(raw.read_image(raw.cases[0]))
    tasks = [(raw, case, plane) for case in raw.cases]
    found = over_cases(_look_at, tasks, processes=processes, title="look at images", few=FEW // 2)
    described = sorted(found, key=lambda one: one.case)
    items = _collected(raw, _predicted(raw, described) if learn else described, slices)
    rows = _rows(items, count or (len(items.candidates) if slices else 5))
    picture = picture_of(rows, lambda case: raw.read_image(raw.case(case)))
    try:
        folder.mkdir(parents=True, exist_ok=True)
        write_table(rows, folder / "suggest.csv")
        picture.save(folder / "suggest.png")
    except OSError as error:
        raise _not_writable(folder, error.strerror) from error
    return Suggestions(tuple(rows), folder, len(raw.cases), slices)


def write_table(rows: Sequence[Suggestion], path: Path) -> None:
    """Write rows as CSV with a header."""
    text = io.StringIO()
    writer = csv.DictWriter(text, COLUMNS, lineterminator="\n")
    writer.writeheader()
    writer.writerows(as_row(row) for row in rows)
    path.write_text(text.getvalue(), encoding="utf-8")


def read_slices(path: Path) -> dict[str, list[tuple[str, int]]]:
    """For each case of a table of `suggest` the (axis, slice) it names; a case may stand there more than once.

    Raises:
        OneShotError: no such file, or columns or values that are no table of slices.
    """
    if not path.is_file():
        raise OneShotError(f"expected a table of slices, found no file {path}; nnUNetv2_oneshot_suggest writes one")
    found: dict[str, list[tuple[str, int]]] = {}
    for number, row in enumerate(csv.DictReader(path.read_text(encoding="utf-8").splitlines()), start=2):
        axis, index = row.get("axis"), row.get("slice") or ""
        if not row.get("case") or axis not in tuple(AXES) or not index.isdigit():
            raise OneShotError(
                f"{path}: expected the columns case, axis (z, y or x) and slice (from 0) in line {number}, found "
                f"{dict(row)}; correct it"
            )
        found.setdefault(row["case"], []).append((axis, int(index)))
    return found


def as_row(row: Suggestion) -> dict[str, Any]:
    """A suggestion with rounded figures, as it is written and printed."""
    doubt = None if row.doubt is None else round(row.doubt, 4)
    return {**vars(row), "coverage": round(row.coverage, 4), "doubt": doubt}


def _check_folder(folder: Path) -> None:
    """Said before minutes of work, and without writing: bad input found later leaves nothing behind."""
    there = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    if not there.is_dir():
        raise _not_writable(folder, f"{there} is a file")
    table = folder / "suggest.csv"
    if not os.access(table if table.exists() else there, os.W_OK):
        raise _not_writable(folder, f"no permission to write to {there}")


def _not_writable(folder: Path, reason: str | None) -> OneShotError:
    return OneShotError(
        f"expected a folder that can be written to, found {folder} ({reason}); name another one with -o"
    )


def _check_choice(raw: RawDataset, slices: bool) -> None:
    if len(raw.cases) < 2 and not slices:
        raise OneShotError(
            f"{raw.folder}: expected at least two cases to choose between, found {len(raw.cases)}; annotate it, or add "
            "--slices to choose a slice of it"
        )


def _look_at(task: tuple[RawDataset, Case, str]) -> Described:
    raw, case, plane = task
    check_image(raw, case)
    return describe(raw.read_image(case), plane=plane)


def _predicted(raw: RawDataset, described: Sequence[Described]) -> list[Described]:
    """The same, with what a network that learnt from the images predicts of every step."""
    network = CorrespondencePropagator(recipe=RECIPE)
    network.fit(raw.read_image(case) for case in raw.cases)
    with tqdm(described, desc="predict what a label keeps", unit="case") as bar:
        return [replace(one, steps=network.survival(raw.read_image(raw.case(one.case)))) for one in bar]


def _collected(raw: RawDataset, described: list[Described], slices: bool) -> _Set:
    doubt = doubt_of_cases(Store(raw.folder, raw.file_ending)) if (raw.folder / MANIFEST).is_file() else None
    labelled = {d.case: _annotated_slices(raw, raw.case(d.case), d.axis, doubt) for d in described}
    annotated = {i for i, d in enumerate(described) if labelled[d.case] and (not slices or _all(labelled[d.case], d))}
    candidates = [i for i in range(len(described)) if i not in annotated]
    if not candidates:
        raise OneShotError(
            f"{raw.folder}: expected cases that a person has not labelled, found none; there is nothing to choose"
        )
    if doubt is not None and slices:
        doubt = {d.case: doubt_of_slices(raw, raw.case(d.case), doubt[d.case], d.axis) for d in described}
    return _Set(described, labelled, annotated, candidates, doubt)


def _all(labelled: set[int], described: Described) -> bool:
    return len(labelled) == len(described.slices)


def _annotated_slices(raw: RawDataset, case: Case, axis: int, doubt: Mapping[str, Doubt] | None) -> set[int]:
    """Slices that a person has labelled, most of each."""
    path = case.label if doubt is None else _source_label(raw, case, doubt[case.name])
    if path is None:
        return set()
    label = raw.read_label(path)
    drawn = np.ones(label.shape, bool) if raw.ignore is None else label != raw.ignore
    shares = drawn.mean(axis=tuple(a for a in range(3) if a != axis))
    return {int(i) for i in np.flatnonzero(shares >= 0.5)}


def _source_label(raw: RawDataset, case: Case, doubt: Doubt) -> Path | None:
    """What a person drew, of a dataset whose label files also hold what was made of it."""
    if not doubt.human:
        return None
    if not doubt.sparse:
        return case.label
    source = open_source(Store(raw.folder, raw.file_ending).read_manifest().source_dataset, raw.folder)
    return source.case(case.name).label


def _rows(items: _Set, count: int) -> list[Suggestion]:
    vectors: Vectors = np.stack([d.whole for d in items.described])
    doubts = None if items.doubt is None else np.array([items.doubt[d.case].value for d in items.described])
    weights = doubts if doubts is not None and doubts.any() else None
    ranking = rank(alike(vectors, vectors), items.candidates, count, items.annotated, weights)
    return [_row(items, number, at, coverage) for number, (at, coverage) in enumerate(ranking, start=1)]


def _row(items: _Set, number: int, at: int, coverage: float) -> Suggestion:
    found, labelled = items.described[at], items.labelled[items.described[at].case]
    doubt = None if items.doubt is None else items.doubt[found.case]
    doubts, value = (None, None) if doubt is None else (doubt.slices, doubt.value)
    index = best_slice(along(found.steps), found.content, doubts, labelled)
    return Suggestion(number, found.case, AXES[found.axis], index, coverage, value, bool(labelled))
