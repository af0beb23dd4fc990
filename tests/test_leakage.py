"""Labels of un-annotated cases have no way into labels that we make; test_end_to_end watches the whole loop's files."""

from __future__ import annotations

import hashlib
from pathlib import Path

import numpy as np
import pytest
import SimpleITK as sitk
from file_watch import opened_files
from raw_datasets import Roots, label_array, write_image, write_raw

from nnunet_oneshot.dataset import open_dataset
from nnunet_oneshot.propagate import propagate
from nnunet_oneshot.propagators import DEFAULT, PropagatorOptions
from nnunet_oneshot.relabel import relabel

CASES = ("case_0", "case_1", "case_2")


def _truth_beside(dataset: Path, seed: int | None) -> list[Path]:
    """Labels of the un-annotated cases (noise, given a seed) where a careless reader would find them."""
    folders = [dataset / "labelsTs", dataset.parent / "labels"]
    rng = np.random.default_rng(seed)
    for folder in folders:
        for number, case in enumerate(CASES[1:], start=1):
            label = label_array(number)
            write_image(folder / f"{case}.nii.gz", label if seed is None else rng.permuted(label))
    return folders


def _labels_made(folder: Path) -> dict[str, str]:
    files = [path for path in folder.rglob("*.nii.gz") if path.is_file()]
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def test_the_watch_sees_a_label_read_by_a_library_in_c(tmp_path: Path) -> None:
    write_image(tmp_path / "a.nii.gz", label_array(1))
    with opened_files(tmp_path) as opened:
        sitk.ReadImage(str(tmp_path / "a.nii.gz"))
    assert opened == {"a.nii.gz"}


@pytest.mark.slow
def test_noise_for_the_other_cases_labels_changes_no_byte(roots: Roots, tmp_path: Path) -> None:
    dataset_folder = write_raw(roots.raw, cases=CASES)
    predictions = tmp_path / "predictions"
    for number, case in enumerate(CASES[1:], start=1):
        write_image(predictions / f"{case}.nii.gz", np.roll(label_array(number), 1, axis=1))
    made = []
    for output, seed in ((601, None), (602, 0)):
        folders = _truth_beside(dataset_folder, seed)
        with opened_files(*folders) as opened:
            store = propagate(501, output, options=PropagatorOptions(adapt=1), num_processes=1).store
            relabel(open_dataset(501), store, predictions, 1, 1)
        assert not opened
        records = {name: record.model_dump() for name, record in store.read_manifest().cases.items()}
        made.append((_labels_made(store.folder), records))
    assert all(any(f"/{name}/" in path for path in made[0][0]) for name in DEFAULT)
    assert made[0] == made[1], "labels, estimated quality or who is left out depend on a hidden label"
