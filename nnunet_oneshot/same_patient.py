"""Which un-annotated images show the patient of an annotated one: the file that `-same_patient` names."""

from __future__ import annotations

import csv
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from nnunet_oneshot.dataset import RawDataset
from nnunet_oneshot.errors import OneShotError

HEADER = ["case", "annotated"]
"""First line of a CSV, if it has one."""


def read_same_patient(path: Path, dataset: RawDataset) -> dict[str, str]:
    """For un-annotated cases, the annotated case of the same patient.

    Args:
        path: JSON `{"case": "annotated case"}`, a CSV of such pairs, or the `care_liseg.json` of a converted dataset,
            whose cases are paired by their patient.
        dataset: the raw dataset.

    Raises:
        OneShotError: a file of another kind, unknown cases, or a label that cannot be carried.
    """
    pairs = read_pairs(path, dataset)
    if not pairs:
        raise OneShotError(
            f"{path}: expected an un-annotated case of the patient of an annotated one, found none; name one or leave "
            "-same_patient out"
        )
    annotated, known = {case.name for case in dataset.annotated}, {case.name for case in dataset.cases}
    for case, source in pairs.items():
        if unknown := [name for name in (case, source) if name not in known]:
            raise OneShotError(f"{path}: expected cases of {dataset.name}, found {unknown[0]}; correct the name")
        if case in annotated or source not in annotated:
            raise OneShotError(
                f"{path}: expected an un-annotated case and an annotated one, found {case} and {source}; put them in "
                "this order and leave out pairs that are both annotated"
            )
    _check_whole(path, dataset, set(pairs.values()))
    return dict(sorted(pairs.items()))


def _check_whole(path: Path, dataset: RawDataset, sources: set[str]) -> None:
    for name in sorted(sources):
        if dataset.support(dataset.case(name)).ignore is not None:
            raise OneShotError(
                f"{path}: expected annotated cases whose every voxel is labelled, found the sparse label of {name}; "
                "complete it or leave its pairs out"
            )


def read_pairs(path: Path, dataset: RawDataset) -> dict[str, str]:
    """The pairs of a file, whatever cases they name; OneShotError for a file of another kind."""
    if path.suffix not in (".json", ".csv") or not path.is_file():
        raise OneShotError(f"expected a .json or .csv file of pairs of cases, found no such file {path}; check it")
    return _from_json(path, dataset) if path.suffix == ".json" else _from_csv(path)


def _from_json(path: Path, dataset: RawDataset) -> dict[str, str]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise OneShotError(f"{path}: expected JSON, found {error}; correct the file") from error
    if isinstance(content, Mapping) and isinstance(content.get("cases"), Mapping):
        return _by_patient(content["cases"], dataset)
    if not isinstance(content, Mapping) or not all(isinstance(source, str) for source in content.values()):
        raise OneShotError(f'{path}: expected {{"case": "annotated case"}}, found something else; write it like that')
    return dict(content)


def _by_patient(origin: Mapping[str, Any], dataset: RawDataset) -> dict[str, str]:
    patient = {name: entry["patient"] for name, entry in origin.items() if "patient" in entry}
    sources = {patient[case.name]: case.name for case in dataset.annotated if case.name in patient}
    others = [case.name for case in dataset.unannotated if patient.get(case.name) in sources]
    return {name: sources[patient[name]] for name in others}


def _from_csv(path: Path) -> dict[str, str]:
    try:
        # Excel puts a mark before UTF-8, which is no part of the first name.
        with path.open(newline="", encoding="utf-8-sig") as file:
            rows = [[cell.strip() for cell in row] for row in csv.reader(file) if row]
    except UnicodeDecodeError as error:
        raise OneShotError(f"{path}: expected UTF-8 text, found {error}; save the table as UTF-8") from error
    if odd := [row for row in rows if len(row) != 2]:
        raise OneShotError(f"{path}: expected two columns, case and annotated case, found {odd[0]}; correct the line")
    return {case: source for case, source in rows if [case, source] != HEADER}
