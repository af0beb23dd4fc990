"""`consensus` on label folders of other tools: how any program's labels enter."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import SimpleITK as sitk
from raw_datasets import Roots, geometry, label_array, make_sparse, read, write_image, write_raw

from nnunet_oneshot.consensus import consensus, view_weights
from nnunet_oneshot.errors import OneShotError
from nnunet_oneshot.store import Manifest, Store

IGNORE = 3


@pytest.fixture
def tools(tmp_path: Path) -> list[Path]:
    """Three tools' labels of case_1 and case_2: two agree, the third moves the organ by a voxel."""
    for name, shift in (("tool_a", 0), ("tool_b", 1), ("tool_c", 0)):
        for index in (1, 2):
            write_image(tmp_path / name / f"case_{index}.nii.gz", np.roll(label_array(index), shift, axis=2))
    return [tmp_path / name for name in ("tool_a", "tool_b", "tool_c")]


def run(roots: Roots, folders: list[Path], **more: object) -> tuple[Manifest, Store]:
    manifest = consensus(501, 601, folders, num_processes=1, **more)  # type: ignore[arg-type]
    return manifest, Store(roots.raw / "Dataset601_toy_oneshot", ".nii.gz")


def test_two_of_three_tools_make_the_guess_and_disagreement_is_ignore(
    roots: Roots, toy: Path, tools: list[Path]
) -> None:
    manifest, store = run(roots, tools)
    for index in (1, 2):
        most, other = label_array(index), np.roll(label_array(index), 1, axis=2)
        np.testing.assert_array_equal(read(store.fused_path(f"case_{index}")), most)
        np.testing.assert_array_equal(read(store.label_path(f"case_{index}")), np.where(most == other, most, IGNORE))
    assert manifest.cases["case_1"].views == ["tool_a/given", "tool_b/given", "tool_c/given"]
    assert manifest.cases["case_1"].divergence == pytest.approx((most != other).mean(), abs=1e-6)
    assert set(manifest.sources) == {"tool_a", "tool_b", "tool_c"}


def test_labels_are_kept_by_tool(roots: Roots, toy: Path, tools: list[Path]) -> None:
    _, store = run(roots, tools)
    for tool in tools:
        np.testing.assert_array_equal(
            read(store.folder / "pseudoTr" / tool.name / "given" / "case_2.nii.gz"), read(tool / "case_2.nii.gz")
        )


def test_small_rounding_of_a_tools_geometry_is_mended(roots: Roots, toy: Path, tools: list[Path]) -> None:
    path = tools[0] / "case_1.nii.gz"
    image = sitk.ReadImage(str(path))
    image.SetOrigin([v + 4e-4 for v in image.GetOrigin()])
    sitk.WriteImage(image, str(path))
    _, store = run(roots, tools[:1])
    expected = geometry(toy / "imagesTr/case_1_0000.nii.gz")
    assert geometry(store.view_path("tool_a", "given", "case_1")) == expected
    assert geometry(store.label_path("case_1")) == expected


def test_case_that_no_tool_labelled_is_left_out(roots: Roots, toy: Path, tools: list[Path]) -> None:
    for tool in tools:
        (tool / "case_2.nii.gz").unlink()
    manifest, store = run(roots, tools)
    assert manifest.cases["case_2"].status == "failed"
    assert "no label was given" in str(manifest.cases["case_2"].reason)
    assert (read(store.label_path("case_2")) == IGNORE).all()
    assert json.loads((store.folder / "dataset.json").read_text())["oneshot"]["left_out"] == ["case_2"]


def test_a_persons_label_outranks_a_tools(roots: Roots, toy: Path, tools: list[Path]) -> None:
    write_image(tools[0] / "case_0.nii.gz", 0 * label_array(0))
    _, store = run(roots, tools)
    np.testing.assert_array_equal(read(store.label_path("case_0")), label_array(0))


def test_a_tool_fills_what_a_sparse_label_leaves_open(roots: Roots, toy: Path, tools: list[Path]) -> None:
    drawn = make_sparse(toy)
    filled = np.roll(label_array(0), 1, axis=1)
    for tool in tools:
        write_image(tool / "case_0.nii.gz", filled)
    manifest, store = run(roots, tools)
    for path in (store.label_path("case_0"), store.fused_path("case_0")):
        np.testing.assert_array_equal(read(path), np.where(drawn == IGNORE, filled, drawn))
    assert manifest.cases["case_0"].status == "sparse"


def test_an_interrupted_run_is_repeated(
    roots: Roots, toy: Path, tools: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = run(roots, tools)[0].model_dump()
    with monkeypatch.context() as patched:
        patched.setattr("nnunet_oneshot.consensus.build", _interrupt)
        with pytest.raises(KeyboardInterrupt):
            run(roots, tools, overwrite=True)
    assert run(roots, tools)[0].model_dump() == expected


def _interrupt(*_: object) -> None:
    raise KeyboardInterrupt


@pytest.mark.parametrize("name", ["fused", "rounds", "same_patient", "self_05"])
def test_a_folder_whose_name_means_something_else_is_refused(
    roots: Roots, toy: Path, tools: list[Path], tmp_path: Path, name: str
) -> None:
    taken = tools[0].rename(tmp_path / name)
    before = roots.snapshot()
    with pytest.raises(OneShotError, match=f"found {name}, which is taken; rename it"):
        run(roots, [taken])
    assert roots.snapshot() == before


def test_a_name_that_only_begins_like_a_taken_one_is_free(roots: Roots, toy: Path, tools: list[Path]) -> None:
    manifest, _ = run(roots, [tools[0].rename(tools[0].with_name("self_made"))])
    assert manifest.cases["case_1"].status == "pseudo"


def test_natural_images(roots: Roots, tmp_path: Path) -> None:
    write_raw(roots.raw, ending=".png", channels=3)
    for index in (1, 2):
        write_image(tmp_path / "tool" / f"case_{index}.png", label_array(index)[0])
    manifest, store = run(roots, [tmp_path / "tool"])
    assert {record.status for record in manifest.cases.values()} == {"annotated", "pseudo"}
    assert (store.folder / "labelsTr" / "case_1.png").is_file()


def test_sam2s_planes_have_the_say() -> None:
    views = ["sam2/axial", "sam2/coronal", "sam2/identity", "registration/local", "tool/axial"]
    assert view_weights(views) == [8.0, 8.0, 1.0, 1.0, 1.0]
    assert view_weights(["sam2/sagittal", "sam2/sagittal_rot90", "correspondence/joint"]) == [1.0, 1.0, 1.0]


def test_correspondence_weighs_twice_in_images_that_are_partly_drawn() -> None:
    views = ["sam2/identity", "correspondence/joint"]
    assert view_weights(views) == [1.0, 1.0]
    assert view_weights(views, partly_drawn=True) == [1.0, 2.0]


def test_where_correspondence_drifted_only_contradicts() -> None:
    """By itself it still makes a label."""
    weights = view_weights(["correspondence/joint", "correspondence/coarse", "correspondence/checked"], True)
    assert weights[2] < 0.01 * weights[0]
    assert view_weights(["correspondence/checked"])[0] > 0
