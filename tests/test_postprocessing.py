"""Which structures are one piece in the annotated cases, and nnU-Net's own command keeping it."""

from __future__ import annotations

import os
import pickle
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from nnunetv2.postprocessing.remove_connected_components import apply_postprocessing
from raw_datasets import Roots, edit_json, label_array, make_sparse, write_image, write_raw

from nnunet_oneshot.dataset import open_dataset
from nnunet_oneshot.postprocessing import FILE, one_piece, write_postprocessing

IGNORE = 9


def blocks(value: int, *starts: int, size: int = 2) -> np.ndarray:
    label = np.zeros((4, 6, 40), np.int16)
    for start in starts:
        label[1:3, 2:4, start : start + size] = value
    return label


def test_two_pieces_are_not_one_unless_the_second_is_a_stray_voxel() -> None:
    stray = blocks(2, 0, size=30)
    stray[1, 2, 35] = 2
    assert one_piece([blocks(1, 0) + blocks(2, 10, 20)], None) == [1]
    assert one_piece([stray], None) == [2]
    corner = blocks(3, 0)
    corner[3, 4, 2] = 3
    assert one_piece([corner], None) == [3], "what meets at a corner is connected"


def test_every_annotated_case_must_say_so_and_sparse_ones_say_nothing() -> None:
    sparse = blocks(1, 0, 20)
    sparse[0] = IGNORE
    assert one_piece([blocks(1, 0), blocks(1, 0, 20)], IGNORE) == []
    assert one_piece([blocks(1, 0), sparse], IGNORE) == [1]
    assert one_piece([blocks(1, 0), blocks(2, 0)], IGNORE) == [1, 2], "a case without a structure does not speak of it"
    assert one_piece([sparse], IGNORE) == []


@given(st.permutations([1, 2, 3]), st.integers(0, 3))
def test_what_is_one_piece_does_not_depend_on_order_or_orientation(values: list[int], turns: int) -> None:
    labels = [blocks(value, *range(0, 10 * at + 1, 10)) for at, value in enumerate(values)]
    turned = [np.rot90(label, turns, axes=(0, 2)) for label in labels]
    assert one_piece(labels, None) == one_piece(turned[::-1], None) == [values[0]]


def test_nnunet_applies_what_is_written(roots: Roots, tmp_path: Path) -> None:
    folder = write_raw(roots.raw)
    label = label_array(0)
    label[0, 0, 0] = label[-1, -1, -1] = 2
    write_image(folder / "labelsTr/case_0.nii.gz", label)
    assert write_postprocessing(open_dataset(501), tmp_path / "model") == ["organ"]
    steps, arguments = pickle.loads((tmp_path / "model" / FILE).read_bytes())
    predicted = label_array(1).astype(np.int16)
    predicted[:, 8, 7] = 1
    predicted[0, 8, 0] = 2
    found = apply_postprocessing(predicted, steps, arguments)
    assert not (found[:, 8, 7] == 1).any(), "a far piece of what is one is gone"
    assert found[0, 8, 0] == 2, "of what is two pieces nothing goes"
    np.testing.assert_array_equal(found == 1, label_array(1) == 1)


@pytest.mark.parametrize("known", [True, False])
def test_what_a_kill_left_half_written_goes(
    roots: Roots, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, known: bool
) -> None:
    folder, model = write_raw(roots.raw), tmp_path / "model"

    def killed(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(os, "replace", killed)
        with pytest.raises(KeyboardInterrupt):
            write_postprocessing(open_dataset(501), model)
    (model / f"{FILE}.123.new").write_bytes(b"of an earlier release")
    if not known:
        make_sparse(folder)
    write_postprocessing(open_dataset(501), model)
    assert [path.name for path in model.iterdir()] == ([FILE] if known else [])


@pytest.mark.parametrize("how", ["regions", "sparse"])
def test_nothing_is_left_where_nothing_is_known(roots: Roots, tmp_path: Path, how: str) -> None:
    folder = write_raw(roots.raw)
    assert write_postprocessing(open_dataset(501), tmp_path / "model") == ["organ", "spot"]
    if how == "sparse":
        make_sparse(folder)
    else:
        edit_json(folder, labels={"background": 0, "organ": [1, 2], "spot": 2}, regions_class_order=[1, 2])
    assert write_postprocessing(open_dataset(501), tmp_path / "model") == []
    assert not list((tmp_path / "model").iterdir())
