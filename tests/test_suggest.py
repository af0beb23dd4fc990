"""`suggest`: the case that stands for most others comes first, then one of another kind; after a round the doubtful."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import Answer
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image as Picture
from raw_datasets import Roots, edit_json, make_sparse, read, write_image, write_raw

from nnunet_oneshot import cli
from nnunet_oneshot import suggest as suggest_module
from nnunet_oneshot.errors import OneShotError
from nnunet_oneshot.parallel import over_cases
from nnunet_oneshot.store import read_manifest
from nnunet_oneshot.suggest import read_slices, suggest
from nnunet_oneshot.suggest_features import FEATURES, alike, along, describe, normalised
from nnunet_oneshot.suggest_ranking import best_slice, rank
from sam2_propagation.correspondence_training import Recipe
from sam2_propagation.interface import Image
from sam2_propagation.views import natural_plane

Call = Callable[..., Answer]
PROPAGATE = ("-d", 501, "-o", 601, "-np", 1, "-device", "cpu", "-propagator", "fake")
SHAPE = (6, 24, 20)


def blobs(centre: tuple[float, float], seed: int, size: float = 4.0) -> np.ndarray:
    """A bright ball in noise; its place is what tells kinds of image apart."""
    z, y, x = np.meshgrid(*(np.arange(n) for n in SHAPE), indexing="ij")
    distance = (y - centre[0]) ** 2 + (x - centre[1]) ** 2 + 4 * (z - 2.5) ** 2
    noise = np.random.default_rng(seed).normal(100, 4, SHAPE)
    return np.round(noise + 200 * (distance < size**2)).astype(np.int16)


@pytest.fixture
def kinds(roots: Roots) -> Path:
    """Five images of one kind (b the middle of it), two of another; nothing annotated."""
    places = {"a": (8, 8), "b": (9, 9), "c": (10, 10), "d": (9, 8), "e": (9, 10), "y": (18, 15), "z": (18, 16)}
    folder = write_raw(roots.raw, cases=tuple(places), annotated=())
    for seed, (name, centre) in enumerate(places.items()):
        write_image(folder / f"imagesTr/{name}_0000.nii.gz", blobs(centre, seed))
    return folder


def test_the_middle_of_the_largest_group_comes_first_and_another_kind_second(kinds: Path) -> None:
    found = suggest(501, 2, num_processes=1).rows
    assert found[0].case == "b"
    assert found[1].case in ("y", "z")
    assert [row.rank for row in found] == [1, 2]
    assert found[0].coverage < found[1].coverage <= 1


@pytest.mark.slow
def test_two_runs_say_the_same_whatever_runs_side_by_side(
    roots: Roots, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Eleven cases are the fewest for which processes start; they end in any order."""
    names = [f"case_{i:02d}" for i in range(11)]
    folder = write_raw(roots.raw, cases=names, annotated=())
    for seed, name in enumerate(names):
        write_image(folder / f"imagesTr/{name}_0000.nii.gz", blobs((5 + seed, 15 - seed), seed))
    started = []

    def watched(*arguments: Any, processes: int, **named: Any) -> Any:
        started.append(processes)
        return over_cases(*arguments, processes=processes, **named)

    monkeypatch.setattr(suggest_module, "over_cases", watched)
    one, two = (suggest(501, slices=True, output=tmp_path / str(n), num_processes=n) for n in (1, 2))
    assert started == [1, 2]
    assert one.rows == two.rows
    for name in ("suggest.csv", "suggest.png"):
        assert (one.folder / name).read_bytes() == (two.folder / name).read_bytes()


def test_what_is_annotated_needs_no_second_like_it(kinds: Path) -> None:
    write_image(kinds / "labelsTr/b.nii.gz", np.ones(SHAPE, np.uint8))
    found = suggest(501, num_processes=1).rows
    assert found[0].case in ("y", "z")
    assert "b" not in [row.case for row in found]


def test_slices_name_one_slice_with_something_on_it_for_every_case(kinds: Path) -> None:
    found = suggest(501, slices=True, num_processes=1)
    assert sorted(row.case for row in found.rows) == ["a", "b", "c", "d", "e", "y", "z"]
    assert {(row.axis, row.slice) for row in found.rows} <= {("z", 2), ("z", 3)}, "the ball is largest there"
    assert read_slices(found.folder / "suggest.csv") == {r.case: [(r.axis, r.slice)] for r in found.rows}


@pytest.mark.slow
def test_slices_may_be_ranked_by_what_a_network_predicts(
    kinds: Path, call: Call, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Of a volume that is cut in two unlike halves, a slice of the larger half is worth most."""
    monkeypatch.setattr(suggest_module, "RECIPE", Recipe(steps=30, batch=2, crop=32, radius=3))
    data = read(kinds / "imagesTr/a_0000.nii.gz")
    moved = np.concatenate([data[2:3]] * 5 + [np.roll(data[2:3], 5, axis=2)] * 3)
    write_image(kinds / "imagesTr/a_0000.nii.gz", moved)
    found = call(cli.suggest, "-d", 501, "--slices", "--learn", "-np", 1, "-o", tmp_path / "one")
    assert found.code == 0, found.err
    again = suggest(501, slices=True, learn=True, output=tmp_path / "two", num_processes=1)
    assert (tmp_path / "one/suggest.csv").read_bytes() == (tmp_path / "two/suggest.csv").read_bytes()
    assert {row.case: row.slice for row in again.rows}["a"] < 5
    refused = call(cli.suggest, "-d", 501, "--learn")
    assert (refused.code, "--slices" in refused.error) == (2, True)


def test_a_sparse_case_is_offered_another_slice_than_the_one_it_has(toy: Path) -> None:
    make_sparse(toy)
    rows = {row.case: row for row in suggest(501, slices=True, num_processes=1).rows}
    assert rows["case_0"].annotated
    assert rows["case_0"].slice != 2
    assert not rows["case_1"].annotated


def test_an_image_of_one_slice_is_its_own_slice(kinds: Path) -> None:
    """Beside volumes, and annotated: then there is no other slice of it to draw."""
    for name in ("a", "y"):
        write_image(kinds / f"imagesTr/{name}_0000.nii.gz", blobs((8, 8), 1)[2:3])
    write_image(kinds / "labelsTr/y.nii.gz", np.ones((1, *SHAPE[1:]), np.uint8))
    rows = {row.case: row for row in suggest(501, slices=True, num_processes=1).rows}
    assert (rows["a"].axis, rows["a"].slice) == ("z", 0)
    assert sorted(rows) == ["a", "b", "c", "d", "e", "z"]
    assert {row.case for row in suggest(501, 7, num_processes=1).rows} == set(rows), "and as whole cases"


@pytest.mark.parametrize(("ending", "channels"), [(".png", 3), (".png", 1), (".nii.gz", 2)])
def test_other_kinds_of_image_are_ranked_too(roots: Roots, ending: str, channels: int) -> None:
    write_raw(roots.raw, ending=ending, channels=channels, annotated=())
    found = suggest(501, num_processes=1)
    assert len(found.rows) == 3
    with Picture.open(found.folder / "suggest.png") as picture:
        assert picture.width > 3 * 200


def test_after_a_round_the_doubtful_case_comes_first(toy: Path, fakes: dict, call: Call) -> None:
    """The manifest says that one case's views diverge most; labels are read from dataset B."""
    assert call(cli.propagate, *PROPAGATE).code == 0
    folder = toy.parent / "Dataset601_toy_oneshot"
    manifest = json.loads((folder / "oneshot.json").read_text())
    manifest["cases"]["case_1"].update(divergence=0.01, quality={"mean": 0.99})
    manifest["cases"]["case_2"].update(divergence=0.5, quality={"mean": 0.2})
    (folder / "oneshot.json").write_text(json.dumps(manifest))
    found = suggest(601, num_processes=1).rows
    assert [row.case for row in found] == ["case_2", "case_1"]
    assert found[0].doubt == pytest.approx(0.9), "of its divergence, the set's largest, and 1 - quality"
    assert read_manifest(folder / "oneshot.json").cases["case_2"].divergence == 0.5, "nothing is written to it"


def test_a_case_that_the_model_alone_labelled_is_as_doubtful_as_one_without_a_label(
    toy: Path, fakes: dict, call: Call
) -> None:
    """It has neither divergence nor an estimate, which is no sign of a good label."""
    assert call(cli.propagate, *PROPAGATE).code == 0
    folder = toy.parent / "Dataset601_toy_oneshot"
    manifest = json.loads((folder / "oneshot.json").read_text())
    manifest["cases"]["case_1"].update(round=1, views=[], divergence=0.0, quality=None)
    manifest["cases"]["case_2"].update(round=1, divergence=0.1, quality={"mean": 0.8})
    (folder / "oneshot.json").write_text(json.dumps(manifest))
    assert {row.case: row.doubt for row in suggest(601, num_processes=1).rows}["case_1"] == 1


def test_after_a_round_the_slice_with_most_divergence_is_offered(toy: Path, fakes: dict, call: Call) -> None:
    assert call(cli.propagate, *PROPAGATE).code == 0
    path = toy.parent / "Dataset601_toy_oneshot/labelsTr/case_1.nii.gz"
    label = np.zeros_like(read(path))
    label[4] = 3
    write_image(path, label)
    rows = {row.case: row for row in suggest(601, slices=True, num_processes=1).rows}
    assert rows["case_1"].slice == 4
    assert "case_0" not in rows, "annotated whole"


def test_command_prints_the_table_or_json_and_leaves_the_images_alone(kinds: Path, call: Call) -> None:
    before = {p: p.read_bytes() for p in (kinds / "imagesTr").iterdir()}
    shown = call(cli.suggest, "-d", 501, "-n", 2, "-np", 1)
    assert shown.code == 0
    assert "1     b" in shown.out
    figures = json.loads(call(cli.suggest, "-d", 501, "-n", 2, "-np", 1, "-json").out)
    assert figures["suggestions"][0]["case"] == "b"
    with (kinds / "suggest" / "suggest.csv").open() as file:
        assert [row["case"] for row in csv.DictReader(file)] == [row["case"] for row in figures["suggestions"]]
    assert {p: p.read_bytes() for p in (kinds / "imagesTr").iterdir()} == before


def test_bad_input_is_one_sentence_and_leaves_nothing_behind(roots: Roots, call: Call) -> None:
    folder = write_raw(roots.raw, cases=("only",), annotated=())
    before = roots.snapshot()
    assert "--slices" in call(cli.suggest, "-d", 501).error
    assert call(cli.suggest, "-d", 501, "--slices", "-n", 0).code == 2
    assert call(cli.suggest, "-d", 777).code == 2
    assert roots.snapshot() == before
    assert call(cli.suggest, "-d", 501, "--slices", "-np", 1, "-o", roots.results / "suggest").code == 0
    edit_json(folder, channel_names={"0": "a", "1": "b"})
    before = roots.snapshot()
    assert call(cli.suggest, "-d", 501, "--slices", "-np", 1).code == 2
    assert roots.snapshot() == before


def test_an_image_found_broken_on_the_way_leaves_nothing_behind(kinds: Path, roots: Roots, call: Call) -> None:
    image = kinds / "imagesTr/e_0000.nii.gz"
    image.write_bytes(image.read_bytes()[:-200])
    before = roots.snapshot()
    answer = call(cli.suggest, "-d", 501, "-np", 1)
    assert answer.code == 2
    assert "e_0000.nii.gz" in answer.error
    assert roots.snapshot() == before


def test_nothing_left_to_annotate_is_said(roots: Roots, call: Call) -> None:
    write_raw(roots.raw, annotated=("case_0", "case_1", "case_2"))
    before = roots.snapshot()
    answer = call(cli.suggest, "-d", 501, "-np", 1)
    assert answer.code == 2
    assert "nothing to choose" in answer.error
    assert roots.snapshot() == before


def test_a_folder_that_is_a_file_is_refused(kinds: Path, call: Call, tmp_path: Path) -> None:
    (tmp_path / "taken").write_text("")
    for folder in (tmp_path / "taken", tmp_path / "taken" / "below"):
        answer = call(cli.suggest, "-d", 501, "-o", folder)
        assert answer.code == 2
        assert "taken is a file" in answer.error
        assert "-o" in answer.error


@pytest.mark.parametrize("text", ["name\nx\n", "case,axis,slice\nx,w,1\n", "case,axis,slice\nx,z,-1\n"])
def test_a_table_that_names_no_slices_is_refused(tmp_path: Path, text: str) -> None:
    (tmp_path / "t.csv").write_text(text)
    with pytest.raises(OneShotError, match="line 2"):
        read_slices(tmp_path / "t.csv")


@settings(max_examples=15)
@given(seed=st.integers(0, 1000), gain=st.floats(0.2, 5), lift=st.floats(-50, 50))
def test_brightness_and_contrast_do_not_change_what_an_image_looks_like(seed: int, gain: float, lift: float) -> None:
    data = blobs((9, 9), seed)[None].astype(np.float32) + 200
    plain, bright = (describe(Image("a", d.astype(np.float32))) for d in (data, gain * data + lift))
    assert float(plain.whole @ bright.whole) > 0.99
    assert len(plain.slices) == SHAPE[0]


@pytest.mark.parametrize("feature", sorted(FEATURES))
def test_how_an_array_is_stored_does_not_change_what_is_seen(feature: str) -> None:
    """The same body stored upside down, slices last to first: alike as a whole, slices in the array's order."""
    data = blobs((7, 12), 3)[None].astype(np.float32)
    data[:, 0] += 100
    turned = Image("b", np.ascontiguousarray(data[:, ::-1]), direction=(1, 0, 0, 0, 1, 0, 0, 0, -1))
    one, two = describe(Image("a", data), feature, feature), describe(turned, feature, feature)
    np.testing.assert_allclose(one.whole, two.whole, atol=1e-5)
    np.testing.assert_allclose(one.slices[::-1], two.slices, atol=1e-5)
    np.testing.assert_allclose(one.content[::-1], two.content, atol=1e-5)


def test_a_volume_stored_along_other_axes_is_as_alike_in_the_plane_of_the_set() -> None:
    """Isotropic, so that nothing but the plane that is asked for says which axis slices are counted along."""
    cube = np.random.default_rng(4).normal(100, 4, (20, 20, 20))
    cube[4:10, 6:16, 3:9] += 200
    image = Image("a", cube[None].astype(np.float32))
    sideways = np.array(((0, 0, 1), (0, 1, 0), (1, 0, 0)), float)
    turned = Image("b", np.ascontiguousarray(image.data.transpose(0, 3, 2, 1)), direction=tuple(sideways.ravel()))
    plane = natural_plane(image)
    assert float(describe(image).whole @ describe(turned).whole) < 0.8
    assert float(describe(image, plane=plane).whole @ describe(turned, plane=plane).whole) > 0.999


def test_an_empty_image_is_like_nothing_and_stops_nothing() -> None:
    empty = describe(Image("e", np.zeros((1, *SHAPE), np.float32)))
    other = describe(Image("o", blobs((9, 9), 1)[None].astype(np.float32)))
    assert float(alike(empty.whole[None], other.whole[None])[0, 0]) == 0


@settings(max_examples=25)
@given(seed=st.integers(0, 1000), count=st.integers(2, 6))
def test_coverage_grows_by_less_and_less(seed: int, count: int) -> None:
    vectors = np.random.default_rng(seed).normal(size=(9, 4))
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    found = rank(vectors @ vectors.T, range(9), count)
    gains = np.diff([value for _, value in found])
    assert len({at for at, _ in found}) == count
    assert (gains >= -1e-9).all()
    assert (np.diff(gains) <= 1e-9).all()


def test_weights_move_the_choice_to_what_matters() -> None:
    groups = np.kron(np.eye(2), np.ones((3, 3)))[:5, :5]
    assert rank(groups, range(5), 1)[0][0] in (0, 1, 2)
    assert rank(groups, range(5), 1, weights=np.array([0, 0, 0, 1, 1]))[0][0] in (3, 4)


def test_a_slice_without_content_is_never_the_best() -> None:
    same = np.ones((4, 4))
    assert best_slice(same, np.array([0, 0, 0.5, 0])) == 2
    assert best_slice(np.eye(4), np.array([1, 0.9, 0, 0]), chosen=[0]) == 1


def test_likeness_is_lost_on_the_way_along_the_stack() -> None:
    turned = normalised(np.array([[1, -1, 0, 0], [1, -0.5, -0.5, 0], [0, 1, 0, -1], [1, -1, 0, 0]], float))
    found = along((turned[:-1] * turned[1:]).sum(axis=1))
    np.testing.assert_allclose(np.diag(found), 1)
    np.testing.assert_allclose(found, found.T)
    assert found[0, 3] < found[0, 1], "the last slice looks like the first, and no label gets there"
    np.testing.assert_allclose(found[0, 1], turned[0] @ turned[1], rtol=1e-5)
