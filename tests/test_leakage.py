"""Labels of un-annotated cases have no way into labels that we make; test_end_to_end watches the whole loop's files."""

from __future__ import annotations

import hashlib
from pathlib import Path

import numpy as np
import pytest
import SimpleITK as sitk
from file_watch import opened_files
from raw_datasets import Roots, label_array, write_image, write_raw
from test_refine import replace_nnunet

from nnunet_oneshot.propagate import propagate
from nnunet_oneshot.propagators import DEFAULT, PropagatorOptions
from nnunet_oneshot.refine import refine
from nnunet_oneshot.second_opinion import source_of

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


def _shifted(case: str, trainings: int) -> np.ndarray:
    """What a model says of a case, beside the truth so that it is told apart from it."""
    return np.roll(label_array(CASES.index(case)), trainings, axis=1)


@pytest.mark.slow
def test_noise_for_the_other_cases_labels_changes_no_byte(
    roots: Roots, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Propagation and a round: a model's predictions, SAM2 asked again, and what is made of both."""
    dataset_folder = write_raw(roots.raw, cases=CASES)
    made = []
    for output, seed in ((601, None), (602, 0)):
        folders = _truth_beside(dataset_folder, seed)
        replace_nnunet(roots, monkeypatch).say = _shifted
        with opened_files(*folders) as opened:
            store = propagate(501, output, options=PropagatorOptions(adapt=1), num_processes=1).store
            refined = refine(output, "2d", rounds=1, all_rounds=True, self_opinion="builtin", num_processes=1)
        assert not opened
        assert refined.round == 1
        records = {name: record.model_dump() for name, record in store.read_manifest().cases.items()}
        made.append((_labels_made(store.folder), records))
    for source in (*DEFAULT, source_of(1)):
        assert {Path(path).name for path in made[0][0] if f"/{source}/" in path} >= {f"{c}.nii.gz" for c in CASES[1:]}
    assert made[0] == made[1], "labels, estimated quality or who is left out depend on a hidden label"
