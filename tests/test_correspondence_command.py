"""One annotated slice per volume through the commands: make_sparse, then propagate by correspondence."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from conftest import Answer
from raw_datasets import (
    LABELS,
    SHAPE,
    Roots,
    edit_json,
    image_array,
    label_array,
    make_sparse,
    read,
    write_image,
    write_raw,
)

from nnunet_oneshot import cli, propagators
from nnunet_oneshot.store import read_manifest
from sam2_propagation.correspondence_training import Recipe
from sam2_propagation.views import FLAT

Call = Callable[..., Answer]
PROPAGATE = ("-d", 501, "-o", 601, "-np", 1, "-device", "cpu", "-propagator", "correspondence")


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Networks that learn for two steps, kept apart from a user's."""
    monkeypatch.setattr(propagators, "RECIPE", Recipe(steps=2, batch=1, crop=32, radius=2))
    monkeypatch.setenv("nnUNet_oneshot_checkpoints", str(tmp_path / "checkpoints"))


def test_one_slice_in_every_volume_becomes_a_dataset(roots: Roots, tmp_path: Path, call: Call) -> None:
    folder = write_raw(roots.raw, annotated=())
    for index in range(3):
        label = np.zeros(SHAPE, np.uint8)
        label[2] = label_array(index)[2]
        write_image(tmp_path / "drawn" / f"case_{index}.nii.gz", label)
    assert call(cli.make_sparse, "-d", 501, "-i", tmp_path / "drawn").code == 0
    answer = call(cli.propagate, *PROPAGATE)
    assert answer.code == 0, answer.err
    made = folder.parent / "Dataset601_toy_oneshot"
    manifest = read_manifest(made / "oneshot.json")
    assert {record.status for record in manifest.cases.values()} == {"sparse"}
    assert manifest.cases["case_1"].views == [f"correspondence/{view}" for view in ("joint", "coarse", "checked")]
    assert manifest.sources["correspondence"].settings["steps"] == 2
    for index in range(3):
        fused = read(made / f"pseudoTr/fused/case_{index}.nii.gz")
        np.testing.assert_array_equal(fused[2], label_array(index)[2])
        assert (fused[1] > 0).any(), "carried to the next slice"


def test_one_slice_of_one_volume_reaches_all_others(toy: Path, call: Call) -> None:
    make_sparse(toy)
    assert call(cli.propagate, *PROPAGATE).code == 0
    made = toy.parent / "Dataset601_toy_oneshot"
    records = read_manifest(made / "oneshot.json").cases
    assert {name: record.status for name, record in records.items()} == {
        "case_0": "sparse",
        "case_1": "pseudo",
        "case_2": "pseudo",
    }
    for name in ("case_1", "case_2"):
        assert (read(made / f"pseudoTr/fused/{name}.nii.gz") > 0).any()
        assert not (read(made / f"labelsTr/{name}.nii.gz") == 3).all(), "something of it is trained on"


def test_a_set_of_a_single_sparse_case_is_completed(roots: Roots, call: Call) -> None:
    folder = write_raw(roots.raw, cases=("only",), annotated=("only",))
    drawn = make_sparse(folder, "only")
    answer = call(cli.propagate, *PROPAGATE)
    assert answer.code == 0, answer.err
    made = folder.parent / "Dataset601_toy_oneshot"
    assert read_manifest(made / "oneshot.json").cases["only"].status == "sparse"
    fused = read(made / "pseudoTr/fused/only.nii.gz")
    np.testing.assert_array_equal(fused[2], drawn[2])
    assert (fused[[1, 3]] > 0).any(axis=(1, 2)).all(), "carried both ways"


def test_images_of_one_slice_are_labelled_from_an_annotated_one(roots: Roots, call: Call) -> None:
    folder = write_raw(roots.raw)
    flat = (1, *SHAPE[1:])
    for index in range(3):
        write_image(folder / f"imagesTr/case_{index}_0000.nii.gz", image_array(index, shape=flat))
    write_image(folder / "labelsTr/case_0.nii.gz", label_array(0, flat))
    answer = call(cli.propagate, *PROPAGATE)
    assert answer.code == 0, answer.err
    made = folder.parent / "Dataset601_toy_oneshot"
    assert {r.status for r in read_manifest(made / "oneshot.json").cases.values()} == {"annotated", "pseudo"}
    assert (read(made / "pseudoTr/fused/case_1.nii.gz") > 0).any()


CORONAL = (1.0, 0.0, 0.0, 0.0, 0.0, 1.0, 0.0, 1.0, 0.0)
"""Columns are the directions of x, y and z: the array's first axis runs along the body's y."""


@pytest.mark.parametrize("propagator", ["correspondence", "sam2"])
def test_a_slice_of_another_plane_fails_alone(toy: Path, call: Call, propagator: str) -> None:
    """The annotated volume is sliced axially; of case 2 there is one coronal slice."""
    write_image(toy / "imagesTr/case_2_0000.nii.gz", image_array(2, shape=(1, *SHAPE[1:])), CORONAL)
    answer = call(cli.propagate, *PROPAGATE[:-1], propagator)
    assert answer.code == 0, answer.err
    records = read_manifest(toy.parent / "Dataset601_toy_oneshot/oneshot.json").cases
    assert {name: record.status for name, record in records.items()} == {
        "case_0": "annotated",
        "case_1": "pseudo",
        "case_2": "failed",
    }
    assert records["case_2"].reason == f"{propagator}: {FLAT}"


def test_an_annotated_slice_of_another_plane_is_left_out(toy: Path, call: Call) -> None:
    """Annotated are a coronal slice, which comes first, and a volume: the volume labels the other one."""
    write_image(toy / "imagesTr/case_0_0000.nii.gz", image_array(0, shape=(1, *SHAPE[1:])), CORONAL)
    write_image(toy / "labelsTr/case_0.nii.gz", label_array(0, (1, *SHAPE[1:])), CORONAL)
    write_image(toy / "labelsTr/case_1.nii.gz", label_array(1))
    assert call(cli.propagate, *PROPAGATE).code == 0
    records = read_manifest(toy.parent / "Dataset601_toy_oneshot/oneshot.json").cases
    assert records["case_2"].status == "pseudo"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("wanted", "carrying", "said"),
    [
        ((), {"correspondence", "sam2"}, "no annotated image is labelled in every slice"),
        (("correspondence", "registration"), {"correspondence"}, "registration needs a whole label"),
    ],
    ids=["default", "with registration"],
)
def test_what_needs_a_whole_label_does_not_spoil_the_others(
    toy: Path, call: Call, wanted: tuple[str, ...], carrying: set[str], said: str
) -> None:
    make_sparse(toy)
    answer = call(cli.propagate, *PROPAGATE[:-2], *(("-propagator", *wanted) if wanted else ()))
    assert answer.code == 0, answer.err
    assert said in answer.out
    record = read_manifest(toy.parent / "Dataset601_toy_oneshot/oneshot.json").cases["case_0"]
    assert {view.split("/")[0] for view in record.views} == carrying
    assert (read(toy.parent / "Dataset601_toy_oneshot/pseudoTr/fused/case_0.nii.gz")[1] > 0).any()


def test_scribbles_are_refused_with_what_to_do(toy: Path, call: Call) -> None:
    edit_json(toy, labels={**LABELS, "ignore": 3})
    label = np.full(SHAPE, 3, np.uint8)
    label[2, 4:6, 3:5] = 1
    write_image(toy / "labelsTr/case_0.nii.gz", label)
    answer = call(cli.propagate, *PROPAGATE)
    assert answer.code == 2
    assert "whole annotated slice" in answer.error
