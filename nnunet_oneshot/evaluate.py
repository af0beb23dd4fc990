"""Scores of predicted labels against reference labels: per class, with bootstrap intervals over cases.

Nothing that makes labels or trains imports this module: reference labels of un-annotated cases end here.
"""

from __future__ import annotations

import contextlib
import io
import json
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
import numpy.typing as npt
from nnunetv2.imageio.base_reader_writer import BaseReaderWriter
from nnunetv2.imageio.reader_writer_registry import determine_reader_writer_from_dataset_json
from nnunetv2.utilities.label_handling.label_handling import LabelManager

from nnunet_oneshot.dataset import READ_ERRORS
from nnunet_oneshot.errors import OneShotError
from nnunet_oneshot.metrics import METRICS, UNITS, Interval, Scores, bootstrap, nan_mean, score
from nnunet_oneshot.parallel import over_cases

SCHEMA = 1
FOREGROUND = "foreground"
"""The name of the mean over all classes."""


@dataclass(frozen=True)
class Evaluation:
    """Scores of a set of cases.

    Attributes:
        cases: identifiers, sorted.
        classes: names of the labels or regions that are scored, in dataset.json's order.
        values: float64 (cases, classes, metrics), metrics in the order of `nnunet_oneshot.metrics.METRICS`; NaN where
            a figure does not exist (see there).
        voxels: int64 (cases, classes, 2), voxels of the reference and of the prediction.
        summary: summary[class or "foreground"][metric] is the mean over cases with its interval. "foreground" is the
            mean of the classes' means, as in nnU-Net's own summary.
        not_scored: predictions that have no reference.
        n_bootstrap, seed: of the intervals.
    """

    cases: tuple[str, ...]
    classes: tuple[str, ...]
    values: npt.NDArray[np.float64]
    voxels: npt.NDArray[np.int64]
    summary: dict[str, dict[str, Interval]]
    not_scored: tuple[str, ...]
    n_bootstrap: int
    seed: int

    def case_mean(self) -> npt.NDArray[np.float64]:
        """Mean over the classes of each case, float64 (cases, metrics)."""
        return nan_mean(self.values, axis=1)

    def to_json(self) -> dict[str, Any]:
        """What `evaluate` writes.

        Keys: `schema` (1), `metrics`, `units`, `classes`, `n_cases`, `n_bootstrap`, `seed`, `confidence`, `not_scored`,
        `mean` ({class or "foreground": {metric: {mean, low, high, n}}}) and `cases` ({case: {"foreground": {metric:
        value}, class: {metric: value, n_reference, n_prediction}}}). Figures that do not exist are null.
        """
        return {
            "schema": SCHEMA,
            "metrics": list(METRICS),
            "units": UNITS,
            "classes": list(self.classes),
            "n_cases": len(self.cases),
            "n_bootstrap": self.n_bootstrap,
            "seed": self.seed,
            "confidence": 0.95,
            "not_scored": list(self.not_scored),
            "mean": {name: {m: _interval_json(i) for m, i in row.items()} for name, row in self.summary.items()},
            "cases": {case: self._case_json(row) for row, case in enumerate(self.cases)},
        }

    def _case_json(self, row: int) -> dict[str, dict[str, float | int | None]]:
        entry: dict[str, dict[str, float | int | None]] = {FOREGROUND: _metrics_json(self.case_mean()[row])}
        for column, name in enumerate(self.classes):
            reference, prediction = (int(n) for n in self.voxels[row, column])
            counts = {"n_reference": reference, "n_prediction": prediction}
            entry[name] = {**_metrics_json(self.values[row, column]), **counts}
        return entry


def evaluate(
    reference: Path,
    prediction: Path,
    dataset_json: Path,
    output: Path | None = None,
    *,
    cases: Sequence[str] | None = None,
    n_bootstrap: int = 2000,
    seed: int = 0,
    num_processes: int = 1,
) -> Evaluation:
    """Score a folder of label files against a folder of reference files of the same names.

    Labels, regions, the ignore label, the file ending and the reader are those of dataset.json; see
    `nnunet_oneshot.metrics` for the definitions, and for what happens to empty masks.

    Args:
        reference, prediction: folders of CASE + file_ending. Predictions without a reference are not scored, but named.
        dataset_json: of the nnU-Net dataset.
        output: JSON file to write (see `Evaluation.to_json`), or None.
        cases: score only these; all that have a reference when None.
        num_processes: cases scored side by side.

    Raises:
        OneShotError: a folder or file is missing or unreadable; a case has no prediction; shapes, spacings or
            directions differ; a label value is not in dataset.json.
    """
    task = _read_task(Path(dataset_json))
    wanted, not_scored = _match_cases(Path(reference), Path(prediction), task.file_ending, cases)
    jobs = [_Job(case, Path(reference), Path(prediction), task) for case in wanted]
    rows = _run(jobs, num_processes)
    values = np.array([[s.values for s in row] for row in rows], dtype=np.float64)
    voxels = np.array([[(s.n_reference, s.n_prediction) for s in row] for row in rows], dtype=np.int64)
    summary = summarize(values, task.names, n_bootstrap=n_bootstrap, seed=seed)
    result = Evaluation(tuple(wanted), task.names, values, voxels, summary, tuple(not_scored), n_bootstrap, seed)
    if output is not None:
        _write_json(result.to_json(), Path(output))
    return result


def summarize(
    values: npt.NDArray[np.float64], classes: Sequence[str], *, n_bootstrap: int = 2000, seed: int = 0
) -> dict[str, dict[str, Interval]]:
    """Means over cases and their 95 % bootstrap intervals, from values (cases, classes, metrics)."""
    means = _class_and_foreground_means(values)
    low, high = bootstrap(values, _class_and_foreground_means, n_bootstrap=n_bootstrap, seed=seed)
    present = ~np.isnan(values)
    counts = np.concatenate([present.any(1).sum(0)[None], present.sum(0)])
    return {
        name: {
            metric: Interval(float(means[i, j]), float(low[i, j]), float(high[i, j]), int(counts[i, j]))
            for j, metric in enumerate(METRICS)
        }
        for i, name in enumerate((FOREGROUND, *classes))
    }


def format_table(evaluation: Evaluation, *, per_case: bool = False) -> str:
    """The summary as text, one line a class with its 95 % intervals; with `per_case` a line a case below it."""
    lines = [f"{'class':<24}" + "".join(f"{_title(m):>26}" for m in METRICS) + f"{'cases':>7}"]
    for name, row in evaluation.summary.items():
        figures = "".join(f"{_interval_text(m, row[m]):>26}" for m in METRICS)
        lines.append(f"{name[:24]:<24}{figures}{row['Dice'].n:>7}")
    if per_case:
        lines += ["", f"{'case':<24}" + "".join(f"{_title(m):>12}" for m in METRICS)]
        for case, means in zip(evaluation.cases, evaluation.case_mean(), strict=True):
            lines.append(f"{case[:24]:<24}" + "".join(f"{v:>12.3f}" for v in means))
    if evaluation.not_scored:
        lines.append(f"not scored, no reference: {_some(evaluation.not_scored)}")
    return "\n".join(lines)


@dataclass(frozen=True)
class _Task:
    """What of dataset.json the scores depend on."""

    names: tuple[str, ...]
    members: tuple[tuple[int, ...], ...]
    known: frozenset[int]
    ignore: int | None
    file_ending: str
    dataset_json: dict[str, Any]


@dataclass(frozen=True)
class _Job:
    case: str
    reference: Path
    prediction: Path
    task: _Task


def _read_task(path: Path) -> _Task:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        manager = LabelManager(content["labels"], content.get("regions_class_order"))
        file_ending = content["file_ending"]
    except OSError as error:
        raise OneShotError(f"cannot read {path} ({error.strerror}); give the dataset.json of the dataset") from error
    except (KeyError, ValueError, AssertionError, RuntimeError, TypeError) as error:
        raise OneShotError(f"{path} is not a valid nnU-Net dataset.json: {error}") from error
    scored = manager.foreground_regions if manager.has_regions else manager.foreground_labels
    members = tuple(tuple(int(i) for i in np.atleast_1d(r)) for r in scored)
    names = tuple(_name_of(m, content["labels"]) for m in members)
    return _Task(
        names, members, frozenset(int(i) for i in manager.all_labels), manager.ignore_label, file_ending, content
    )


def _name_of(members: tuple[int, ...], labels: dict[str, Any]) -> str:
    for name, value in labels.items():
        if tuple(np.atleast_1d(value)) == members:
            return str(name)
    return "/".join(str(i) for i in members)


def _match_cases(
    reference: Path, prediction: Path, file_ending: str, only: Sequence[str] | None
) -> tuple[list[str], list[str]]:
    """(cases to score, predictions without a reference), both sorted."""
    references, predictions = _cases_in(reference, file_ending), _cases_in(prediction, file_ending)
    wanted = references if only is None else set(only)
    if absent := sorted(wanted - references):
        raise OneShotError(f"no reference in {reference} for {_some(absent)}; check the cases asked for")
    if not wanted:
        raise OneShotError(f"expected reference labels *{file_ending} in {reference}, found none; check the folder")
    if missing := sorted(wanted - predictions):
        raise OneShotError(
            f"{len(missing)} of {len(wanted)} cases have no prediction in {prediction}: {_some(missing)}; "
            "predict them, or take their references away"
        )
    return sorted(wanted), sorted(predictions - references)


def _cases_in(folder: Path, file_ending: str) -> set[str]:
    if not folder.is_dir():
        raise OneShotError(f"expected a folder of label files, found none at {folder}; check the path")
    return {p.name[: -len(file_ending)] for p in folder.iterdir() if p.name.endswith(file_ending)}


def _run(jobs: Sequence[_Job], num_processes: int) -> list[list[Scores]]:
    numbered = list(enumerate(jobs))
    scored = dict(over_cases(_score_numbered, numbered, processes=num_processes, title="evaluate"))
    return [scored[number] for number, _ in numbered]


def _score_numbered(numbered: tuple[int, _Job]) -> tuple[int, list[Scores]]:
    """They end in any order."""
    return numbered[0], _score_case(numbered[1])


def _score_case(job: _Job) -> list[Scores]:
    """One Scores a class."""
    task = job.task
    files = [folder / (job.case + task.file_ending) for folder in (job.reference, job.prediction)]
    reader = _reader(task, files[0])
    (reference, geometry), (prediction, other) = (_read_label(reader, f) for f in files)
    _check_geometry(job.case, reference.shape, prediction.shape, geometry, other)
    _check_values(files[0], reference, task.known | ({task.ignore} if task.ignore is not None else set()))
    _check_values(files[1], prediction, task.known)
    ignored = reference == task.ignore if task.ignore is not None else None
    z, y, x = (float(s) for s in geometry["spacing"])
    return [score(np.isin(reference, m), np.isin(prediction, m), (z, y, x), ignored) for m in task.members]


def _reader(task: _Task, example: Path) -> BaseReaderWriter:
    try:
        # nnU-Net prints a traceback for each reader that does not fit, as with 3D .tif files.
        with contextlib.redirect_stderr(io.StringIO()):
            return determine_reader_writer_from_dataset_json(task.dataset_json, str(example), verbose=False)()
    except RuntimeError as error:
        raise OneShotError(f"none of nnU-Net's readers can read {example}; it may be damaged: copy it again") from error


def _read_label(reader: BaseReaderWriter, path: Path) -> tuple[npt.NDArray[np.int64], dict[str, Any]]:
    """(label (Z, Y, X), nnU-Net's properties)."""
    try:
        array, properties = reader.read_seg(str(path))
        if path.name.endswith((".nii", ".nii.gz")):
            # ITK fills up a file that was cut short and says nothing; nibabel refuses it.
            np.asanyarray(nibabel.load(path).dataobj)  # type: ignore[attr-defined]
    except READ_ERRORS as error:
        raise OneShotError(f"cannot read {path}; it may be damaged: write it again") from error
    if array.shape[0] != 1:
        raise OneShotError(f"{path}: expected one label channel, found {array.shape[0]}; save it as a single channel")
    if not np.array_equal(array, np.round(array)):
        raise OneShotError(f"{path}: expected whole numbers as labels, found fractions; was it interpolated?")
    return array[0].astype(np.int64), properties


def _check_geometry(
    case: str, shape: tuple[int, ...], other_shape: tuple[int, ...], properties: dict[str, Any], other: dict[str, Any]
) -> None:
    advice = "write predictions in the geometry of the image"
    if shape != other_shape:
        raise OneShotError(f"{case}: reference has shape {shape} (Z, Y, X), prediction {other_shape}; {advice}")
    spacing, other_spacing = (np.asarray(p["spacing"], dtype=float) for p in (properties, other))
    if not np.allclose(spacing, other_spacing, rtol=1e-3, atol=1e-4):
        found = f"reference has spacing {spacing.tolist()} mm (z, y, x), prediction {other_spacing.tolist()}"
        raise OneShotError(f"{case}: {found}; {advice}")
    direction, other_direction = (np.asarray(p.get("sitk_stuff", {}).get("direction", ())) for p in (properties, other))
    if direction.shape != other_direction.shape or not np.allclose(direction, other_direction, atol=1e-2):
        raise OneShotError(f"{case}: reference and prediction have different directions; {advice}")


def _check_values(path: Path, label: npt.NDArray[np.int64], known: Iterable[int]) -> None:
    expected = sorted(known)
    if unknown := sorted(set(np.unique(label).tolist()) - set(expected)):
        raise OneShotError(
            f"{path}: expected label values {expected}, found {_some(unknown)} too; mend the file or dataset.json"
        )


def _class_and_foreground_means(values: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    """(1 + classes, metrics): the mean of the classes' means first."""
    per_class = nan_mean(values, axis=0)
    return np.concatenate([nan_mean(per_class, axis=0)[None], per_class])


def _write_json(content: dict[str, Any], path: Path) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_name(path.name + ".part")
        partial.write_text(json.dumps(content, indent=1, allow_nan=False) + "\n", encoding="utf-8")
        partial.replace(path)
    except OSError as error:
        raise OneShotError(
            f"cannot write {path} ({error.strerror}); choose a file in a folder you may write to"
        ) from error


def _metrics_json(row: npt.NDArray[np.float64]) -> dict[str, float | int | None]:
    return {metric: _number(value) for metric, value in zip(METRICS, row, strict=True)}


def _interval_json(interval: Interval) -> dict[str, float | int | None]:
    bounds = {"mean": interval.mean, "low": interval.low, "high": interval.high}
    return {**{key: _number(value) for key, value in bounds.items()}, "n": interval.n}


def _number(value: float) -> float | None:
    return None if math.isnan(value) else float(value)


def _title(metric: str) -> str:
    return f"{metric} ({UNITS[metric]})" if UNITS[metric] else metric


def _interval_text(metric: str, interval: Interval) -> str:
    digits = 3 if metric == "Dice" else 2
    return f"{interval.mean:.{digits}f} [{interval.low:.{digits}f}, {interval.high:.{digits}f}]"


def _some(items: Sequence[Any], limit: int = 5) -> str:
    shown = ", ".join(str(i) for i in items[:limit])
    return shown if len(items) <= limit else f"{shown} and {len(items) - limit} more"
