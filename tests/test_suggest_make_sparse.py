"""`make_sparse`: what was drawn stays, all else is ignored, and whatever is doubtful is said."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from conftest import Answer
from raw_datasets import (
    FLIPPED_OBLIQUE,
    SHAPE,
    Roots,
    geometry,
    image_array,
    label_array,
    read,
    write_image,
    write_raw,
)

from nnunet_oneshot import cli
from nnunet_oneshot.dataset import open_dataset
from nnunet_oneshot.make_sparse import make_sparse
from nnunet_oneshot.suggest import suggest

Call = Callable[..., Answer]


@pytest.fixture
def bare(roots: Roots) -> Path:
    """Dataset501_toy without any label."""
    return write_raw(roots.raw, annotated=())


@pytest.fixture
def drawn(bare: Path, tmp_path: Path) -> Path:
    """Label files of two cases as a viewer saves them: one slice drawn, 0 elsewhere."""
    folder = tmp_path / "drawn"
    for index, at in ((0, 2), (1, 3)):
        label = np.zeros(SHAPE, np.uint8)
        label[at] = label_array(index)[at]
        write_image(folder / f"case_{index}.nii.gz", label)
    return folder


def test_drawn_slices_stay_and_the_rest_is_ignored(bare: Path, drawn: Path) -> None:
    made = make_sparse(501, drawn)
    assert [(s.case, s.axis, s.slices) for s in made] == [("case_0", "z", (2,)), ("case_1", "z", (3,))]
    label = read(bare / "labelsTr/case_1.nii.gz")
    np.testing.assert_array_equal(label[3], label_array(1)[3])
    assert (np.delete(label, 3, axis=0) == 3).all()
    assert geometry(bare / "labelsTr/case_1.nii.gz") == geometry(bare / "imagesTr/case_1_0000.nii.gz")
    raw = open_dataset(501)
    assert raw.ignore == 3
    assert [case.name for case in raw.annotated] == ["case_0", "case_1"]
    assert sorted(p.name for p in bare.iterdir()) == ["dataset.json", "imagesTr", "labelsTr"], "nothing is left behind"


@pytest.mark.parametrize("axis", [1, 2])
def test_a_slice_drawn_across_another_axis_is_found(bare: Path, drawn: Path, axis: int) -> None:
    label = np.zeros(SHAPE, np.uint8)
    where = [slice(None)] * 3
    where[axis] = slice(4, 5)
    label[tuple(where)] = label_array(0)[tuple(where)]
    write_image(drawn / "case_0.nii.gz", label)
    assert make_sparse(501, drawn)[0].axis == "zyx"[axis]
    assert (np.delete(read(bare / "labelsTr/case_0.nii.gz"), 4, axis=axis) == 3).all()


def test_the_table_of_suggest_names_slices_even_where_nothing_was_to_be_drawn(bare: Path, drawn: Path) -> None:
    found = suggest(501, slices=True, num_processes=1)
    table = found.folder / "suggest.csv"
    table.write_text("case,axis,slice\ncase_0,z,2\ncase_0,z,4\ncase_1,z,3\n")
    assert make_sparse(501, drawn, slices=table)[0].slices == (2, 4)
    assert (read(bare / "labelsTr/case_0.nii.gz")[4] == 0).all(), "drawn and empty is background, not ignored"


def test_a_class_that_a_slice_misses_is_said_with_a_slice_that_may_show_it(drawn: Path, call: Call) -> None:
    label = read(drawn / "case_0.nii.gz")
    write_image(drawn / "case_0.nii.gz", np.where(label == 2, 0, label))
    answer = call(cli.make_sparse, "-d", 501, "-i", drawn)
    assert answer.code == 0
    assert "warning: case_0 misses spot" in answer.out
    assert "around slice 3" in answer.out, "where the other case shows it"


def without_spot(drawn: Path, case: int, at: int) -> None:
    """Draw one slice of a case, the organ alone."""
    label = np.zeros(SHAPE, np.uint8)
    label[at] = np.minimum(label_array(case)[at], 1)
    write_image(drawn / f"case_{case}.nii.gz", label)


def seen_on_one_slice(bare: Path, case: int, at: int) -> None:
    """Replace a case's image by one with something to see on a single slice."""
    image = np.full(SHAPE, 100, np.int16)
    image[at] += 50 * label_array(case)[at]
    write_image(bare / f"imagesTr/case_{case}_0000.nii.gz", image)


def test_the_slice_that_is_named_is_not_the_one_already_drawn(drawn: Path) -> None:
    without_spot(drawn, 0, 3)
    advice = make_sparse(501, drawn)[0].advice
    assert "spot (around slice 2)" in advice, "the nearest to slice 3, where the other case shows it"


def test_a_volume_stored_upside_down_counts_slices_the_other_way(bare: Path, drawn: Path) -> None:
    without_spot(drawn, 0, 2)
    label = np.zeros(SHAPE, np.uint8)
    label[1] = label_array(1)[1]
    down = (*FLIPPED_OBLIQUE[:8], -1.0)
    write_image(drawn / "case_1.nii.gz", label, down)
    write_image(bare / "imagesTr/case_1_0000.nii.gz", image_array(1), down)
    assert "spot (around slice 3)" in make_sparse(501, drawn)[0].advice


def test_slices_drawn_along_another_axis_say_nothing_of_heights(bare: Path, drawn: Path) -> None:
    """Case 1 shows the spot on a slice along y: where that is along z is not known from its number."""
    without_spot(drawn, 0, 0)
    seen_on_one_slice(bare, 0, 4)
    label = np.zeros(SHAPE, np.uint8)
    label[:, 4] = label_array(1)[:, 4]
    write_image(drawn / "case_1.nii.gz", label)
    made = make_sparse(501, drawn)
    assert [s.axis for s in made] == ["z", "y"]
    assert "around" not in made[0].advice
    assert "slice 4," in made[0].advice


def test_a_class_that_nobody_drew_is_said_with_a_slice_worth_drawing(bare: Path, drawn: Path) -> None:
    for case, at in ((0, 2), (1, 3)):
        without_spot(drawn, case, at)
        seen_on_one_slice(bare, case, 4 - case)
    one, other = make_sparse(501, drawn)
    assert "no slice drawn along this axis shows spot" in one.advice
    assert "slice 4," in one.advice, "the only one with something on it"
    named = re.findall(r"slice (\d)", other.advice)
    assert named
    assert "3" not in named, "drawn already"


def test_the_only_drawn_volume_is_told_another_slice(bare: Path, drawn: Path) -> None:
    (drawn / "case_1.nii.gz").unlink()
    without_spot(drawn, 0, 0)
    seen_on_one_slice(bare, 0, 3)
    assert "slice 3," in make_sparse(501, drawn)[0].advice


@pytest.fixture
def flat(bare: Path, tmp_path: Path) -> Path:
    """Drawn labels of a dataset whose every image is one slice; case 0 lacks the spot."""
    for index in range(3):
        write_image(bare / f"imagesTr/case_{index}_0000.nii.gz", image_array(index, shape=(1, *SHAPE[1:])))
        label = label_array(index, (1, *SHAPE[1:]))
        write_image(tmp_path / f"flat/case_{index}.nii.gz", label if index else np.minimum(label, 1))
    return tmp_path / "flat"


def test_of_an_image_of_one_slice_nothing_is_ignored_and_no_other_slice_is_advised(bare: Path, flat: Path) -> None:
    (flat / "case_2.nii.gz").unlink()
    made = make_sparse(501, flat)
    assert [(s.axis, s.slices) for s in made] == [("z", (0,))] * 2
    np.testing.assert_array_equal(read(bare / "labelsTr/case_1.nii.gz"), label_array(1, (1, *SHAPE[1:])))
    assert made[0].missing == ("spot",)
    assert "annotate another case" in made[0].advice


def test_an_image_of_one_slice_has_no_slices_along_other_axes(
    bare: Path, flat: Path, roots: Roots, tmp_path: Path, call: Call
) -> None:
    (tmp_path / "t.csv").write_text("case,axis,slice\ncase_0,z,0\ncase_1,y,3\ncase_2,z,0\n")
    before = roots.snapshot()
    answer = call(cli.make_sparse, "-d", 501, "-i", flat, "-slices", tmp_path / "t.csv")
    assert answer.code == 2
    assert "case_1: expected slice 0 along z" in answer.error
    assert roots.snapshot() == before


def test_json_names_cases_and_slices(drawn: Path, call: Call) -> None:
    answer = call(cli.make_sparse, "-d", 501, "-i", drawn, "-json")
    assert [c["slices"] for c in json.loads(answer.out)["cases"]] == [[2], [3]]


def test_labels_that_are_there_are_not_replaced_unasked(bare: Path, drawn: Path, roots: Roots, call: Call) -> None:
    assert call(cli.make_sparse, "-d", 501, "-i", drawn).code == 0
    before = roots.snapshot()
    assert "--overwrite" in call(cli.make_sparse, "-d", 501, "-i", drawn).error
    assert roots.snapshot() == before
    assert call(cli.make_sparse, "-d", 501, "-i", drawn, "--overwrite").code == 0
    assert roots.snapshot() == before, "the same files again"


def whole(drawn: Path) -> Path:
    write_image(drawn / "case_0.nii.gz", label_array(0))
    return drawn


def empty(drawn: Path) -> Path:
    write_image(drawn / "case_0.nii.gz", np.zeros(SHAPE, np.uint8))
    return drawn


def stranger(drawn: Path) -> Path:
    return (drawn / "case_0.nii.gz").rename(drawn / "who.nii.gz").parent


def other_grid(drawn: Path) -> Path:
    write_image(drawn / "case_0.nii.gz", np.ones((2, 3, 4), np.uint8))
    return drawn


@pytest.mark.parametrize(
    ("damage", "word"),
    [
        (whole, "a few drawn slices"),
        (empty, "background alone"),
        (stranger, "who"),
        (other_grid, "shape"),
        (lambda drawn: drawn / "nowhere", "no folder"),
        (lambda drawn: drawn.parent, "found none"),
    ],
)
def test_bad_input_changes_nothing(drawn: Path, roots: Roots, call: Call, damage: Callable, word: str) -> None:
    folder = damage(drawn)
    before = roots.snapshot()
    answer = call(cli.make_sparse, "-d", 501, "-i", folder)
    assert answer.code == 2
    assert word in answer.error
    assert roots.snapshot() == before


@pytest.mark.parametrize(
    ("text", "word"),
    [
        ("case,axis,slice\ncase_0,z,9\ncase_1,z,3\n", "0 to 4"),
        ("case,axis,slice\ncase_0,z,1\ncase_1,z,3\n", "elsewhere"),
        ("case,axis,slice\ncase_1,z,3\n", "found none"),
    ],
)
def test_a_table_that_does_not_fit_is_refused(
    drawn: Path, roots: Roots, call: Call, tmp_path: Path, text: str, word: str
) -> None:
    (tmp_path / "t.csv").write_text(text)
    before = roots.snapshot()
    answer = call(cli.make_sparse, "-d", 501, "-i", drawn, "-slices", tmp_path / "t.csv")
    assert answer.code == 2
    assert word in answer.error
    assert roots.snapshot() == before
