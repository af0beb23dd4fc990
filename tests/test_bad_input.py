"""A user's mistakes: exit code 2, one sentence with what was expected, found and to be done, and nothing touched."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import SimpleITK as sitk
from conftest import Answer
from raw_datasets import LABELS, SHAPE, SPACING, Roots, edit_json, image_array, label_array, write_image, write_raw

from nnunet_oneshot import cli
from nnunet_oneshot.propagate import propagate

pytestmark = pytest.mark.usefixtures("fakes")
Call = Callable[..., Answer]
Break = Callable[[Path], object]

PROPAGATE = ("-d", 501, "-o", 601, "-np", 1, "-device", "cpu")


@pytest.fixture
def tool(toy: Path) -> Path:
    """Labels of the un-annotated cases made elsewhere."""
    folder = toy.parent.parent / "tool"
    for index in (1, 2):
        write_image(folder / f"case_{index}.nii.gz", label_array(index))
    return folder


def refused(answer: Answer, *words: object) -> None:
    assert answer.code == 2, answer
    assert answer.out == ""
    assert "Traceback" not in answer.err
    assert "expected" in answer.error
    assert "found" in answer.error
    assert ";" in answer.error, "no word of what to do"
    for word in words:
        assert str(word) in answer.error


def change_header(path: Path, **changes: object) -> None:
    image = sitk.ReadImage(str(path))
    for name, value in changes.items():
        getattr(image, f"Set{name}")(value)
    sitk.WriteImage(image, str(path))


def change_voxel(path: Path, value: float, dtype: type = np.float32) -> None:
    image = sitk.ReadImage(str(path))
    data = sitk.GetArrayFromImage(image).astype(dtype)
    data[0, 0, 0] = value
    changed = sitk.GetImageFromArray(data)
    changed.CopyInformation(image)
    sitk.WriteImage(changed, str(path))


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


LABEL, IMAGE, ANNOTATED_IMAGE = "labelsTr/case_0.nii.gz", "imagesTr/case_1_0000.nii.gz", "imagesTr/case_0_0000.nii.gz"
BROKEN: dict[str, tuple[Break, tuple[str, ...]]] = {
    "no label at all": (lambda d: (d / LABEL).unlink(), ("labelsTr", "none")),
    "no labelsTr": (lambda d: shutil.rmtree(d / "labelsTr"), ("labelsTr", "none")),
    "all images labelled": (
        lambda d: [write_image(d / f"labelsTr/case_{i}.nii.gz", label_array(i)) for i in (1, 2)],
        ("nothing to do",),
    ),
    "label of an unknown case": (lambda d: write_image(d / "labelsTr/ghost.nii.gz", label_array(0)), ("ghost",)),
    "no images": (lambda d: (shutil.rmtree(d / "imagesTr"), shutil.rmtree(d / "labelsTr")), ("imagesTr",)),
    "a channel file missing": (
        lambda d: edit_json(d, channel_names={"0": "T1", "1": "T2"}),
        ("case_0_0001.nii.gz",),
    ),
    "other shape": (lambda d: write_image(d / LABEL, label_array(0, (4, 9, 8))), ("shape", LABEL)),
    "other spacing": (lambda d: change_header(d / LABEL, Spacing=(0.8, 1.1, 2.9)), ("spacing", LABEL)),
    "other direction": (
        lambda d: change_header(d / LABEL, Direction=(1.0, 0.0, 0.0, 0.0, 1.0, 0.0, 0.0, 0.0, 1.0)),
        ("direction", LABEL),
    ),
    "other origin": (lambda d: change_header(d / LABEL, Origin=(5.0, -7.0, 12.0)), ("origin", LABEL)),
    "value not in dataset.json": (lambda d: change_voxel(d / LABEL, 7), ("[7]", LABEL)),
    "negative value": (lambda d: change_voxel(d / LABEL, -1, np.int16), ("[-1]", LABEL)),
    "fractional value": (lambda d: change_voxel(d / LABEL, 0.5), ("0.5", LABEL)),
    "value that wraps to a known one": (lambda d: change_voxel(d / LABEL, 65537), ("65537", LABEL)),
    "NaN in the label": (lambda d: change_voxel(d / LABEL, np.nan), ("NaN", LABEL)),
    "no foreground": (lambda d: write_image(d / LABEL, 0 * label_array(0)), ("foreground", "case_0")),
    "NaN": (lambda d: change_voxel(d / IMAGE, np.nan), ("NaN", IMAGE)),
    "infinite": (lambda d: change_voxel(d / IMAGE, -np.inf), ("infinite", IMAGE)),
    "NaN in the annotated image": (lambda d: change_voxel(d / ANNOTATED_IMAGE, np.nan), ("NaN", ANNOTATED_IMAGE)),
    "truncated image": (lambda d: truncate(d / IMAGE), (IMAGE,)),
    "truncated label": (lambda d: truncate(d / LABEL), (LABEL,)),
    "unreadable image": (lambda d: (d / IMAGE).write_text("not an image"), (IMAGE,)),
    "empty file": (lambda d: (d / IMAGE).write_bytes(b""), (IMAGE,)),
    "case in imagesTr and imagesUn": (
        lambda d: write_image(d / "imagesUn/case_1_0000.nii.gz", image_array(1)),
        ("case_1", "imagesUn"),
    ),
    "labels not consecutive": (lambda d: edit_json(d, labels={**LABELS, "spot": 3}), ("consecutive", "[0, 1, 3]")),
    "no class": (lambda d: edit_json(d, labels={"background": 0}), ("consecutive", "[0]")),
    "background not 0": (lambda d: edit_json(d, labels={"background": 1, "organ": 0}), ("background",)),
    "ignore not the highest": (lambda d: edit_json(d, labels={**LABELS, "ignore": 255}), ("ignore", "3", "255")),
    "labels the wrong way round": (lambda d: edit_json(d, labels={"0": "background", "1": "organ"}), ("background",)),
    "regions without their order": (lambda d: edit_json(d, labels={**LABELS, "both": [1, 2]}), ("regions_class",)),
    "no file_ending": (lambda d: edit_json(d, file_ending=None), ("file_ending",)),
    "unknown file ending": (
        lambda d: (edit_json(d, file_ending=".xyz"), (d / "imagesTr/case_0_0000.xyz").write_text("x")),
        (".xyz",),
    ),
    "dataset.json broken": (lambda d: (d / "dataset.json").write_text("{"), ("JSON",)),
    "dataset.json no object": (lambda d: (d / "dataset.json").write_text("[]"), ("object",)),
    "no dataset.json": (lambda d: (d / "dataset.json").unlink(), ("dataset.json",)),
    "listed file missing": (
        lambda d: edit_json(d, dataset={"case_0": {"images": ["imagesTr/gone.nii.gz"], "label": LABEL}}),
        ("gone.nii.gz",),
    ),
    "listed case without images": (lambda d: edit_json(d, dataset={"case_0": {"label": LABEL}}), ("case_0", "images")),
}


@pytest.mark.parametrize("name", BROKEN)
@pytest.mark.parametrize("command", ["propagate", "consensus"])
def test_broken_dataset_is_refused(toy: Path, tool: Path, roots: Roots, call: Call, name: str, command: str) -> None:
    damage, words = BROKEN[name]
    damage(toy)
    before = roots.snapshot()
    if command == "propagate":
        answer = call(cli.propagate, *PROPAGATE)
    else:
        answer = call(cli.consensus, "-d", 501, "-o", 601, "-np", 1, "-i", tool)
    refused(answer, *words)
    assert roots.snapshot() == before


BROKEN_TOOL: dict[str, tuple[Break, tuple[str, ...]]] = {
    "folder missing": (shutil.rmtree, ("tool",)),
    "other case set": (lambda t: (t / "case_1.nii.gz").unlink(), ("case_1", "tool", "other")),
    "unknown case": (lambda t: write_image(t / "ghost.nii.gz", label_array(0)), ("ghost",)),
    "other shape": (lambda t: write_image(t / "case_2.nii.gz", label_array(0, (4, 9, 8))), ("shape", "case_2")),
    "other spacing": (lambda t: change_header(t / "case_2.nii.gz", Spacing=(1.0, 1.0, 1.0)), ("spacing", "case_2")),
    "unknown label": (lambda t: change_voxel(t / "case_2.nii.gz", 3), ("[3]", "case_2")),
    "truncated": (lambda t: truncate(t / "case_2.nii.gz"), ("case_2",)),
    "no labels": (lambda t: [(t / f"case_{i}.nii.gz").unlink() for i in (1, 2)], ("case_1",)),
}


@pytest.mark.parametrize("name", BROKEN_TOOL)
def test_broken_label_folder_is_refused(toy: Path, tool: Path, roots: Roots, call: Call, name: str) -> None:
    other = shutil.copytree(tool, tool.parent / "other")
    damage, words = BROKEN_TOOL[name]
    damage(tool)
    before = roots.snapshot()
    refused(call(cli.consensus, "-d", 501, "-o", 601, "-np", 1, "-i", other, tool), *words)
    assert roots.snapshot() == before


def test_ignore_label_in_a_label_folder_is_refused(toy: Path, tool: Path, roots: Roots, call: Call) -> None:
    """A best guess everywhere has no room for "I do not know"."""
    edit_json(toy, labels={**LABELS, "ignore": 3})
    change_voxel(tool / "case_1.nii.gz", 3)
    before = roots.snapshot()
    refused(call(cli.consensus, "-d", 501, "-o", 601, "-np", 1, "-i", tool), "[3]", "case_1")
    assert roots.snapshot() == before


def test_label_folders_of_one_name_are_refused(toy: Path, tool: Path, roots: Roots, call: Call) -> None:
    twin = shutil.copytree(tool, tool.parent / "twin" / "tool")
    before = roots.snapshot()
    refused(call(cli.consensus, "-d", 501, "-o", 601, "-i", tool, twin), "different names")
    assert roots.snapshot() == before


@pytest.mark.parametrize("name", ["fused", "rounds"])
def test_label_folder_with_a_taken_name_is_refused(toy: Path, tool: Path, roots: Roots, call: Call, name: str) -> None:
    taken = tool.rename(tool.parent / name)
    before = roots.snapshot()
    refused(call(cli.consensus, "-d", 501, "-o", 601, "-i", taken), name)
    assert roots.snapshot() == before


@pytest.mark.parametrize("variable", ["nnUNet_raw", "nnUNet_preprocessed"])
def test_unset_variable_is_refused(
    toy: Path, roots: Roots, call: Call, monkeypatch: pytest.MonkeyPatch, variable: str
) -> None:
    monkeypatch.delenv(variable)
    before = roots.snapshot()
    refused(call(cli.propagate, *PROPAGATE), variable)
    assert roots.snapshot() == before


def test_variable_that_names_no_folder_is_refused(
    toy: Path, roots: Roots, call: Call, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("nnUNet_raw", str(roots.raw / "nowhere"))
    refused(call(cli.propagate, *PROPAGATE), "nowhere")


@pytest.mark.parametrize("wanted", [502, "Dataset501_other", "liver", "5011"])
def test_unknown_dataset_is_refused(toy: Path, roots: Roots, call: Call, wanted: object) -> None:
    before = roots.snapshot()
    refused(call(cli.propagate, "-d", wanted, "-o", 601, "-device", "cpu"), wanted)
    assert roots.snapshot() == before


def test_duplicate_dataset_is_refused(toy: Path, roots: Roots, call: Call) -> None:
    shutil.copytree(toy, toy.parent / "Dataset501_twin")
    before = roots.snapshot()
    refused(call(cli.propagate, *PROPAGATE), "Dataset501_toy", "Dataset501_twin")
    assert roots.snapshot() == before


def test_an_archive_beside_the_dataset_is_no_duplicate(toy: Path, call: Call) -> None:
    (toy.parent / "Dataset501_toy.zip").write_text("an archive")
    assert call(cli.propagate, *PROPAGATE).code == 0


def test_output_id_of_the_input_is_refused(toy: Path, roots: Roots, call: Call) -> None:
    before = roots.snapshot()
    refused(call(cli.propagate, "-d", 501, "-o", 501, "-device", "cpu"), "501")
    assert roots.snapshot() == before


@pytest.mark.parametrize("root", ["raw", "preprocessed", "results"])
def test_output_id_of_another_dataset_is_refused(toy: Path, roots: Roots, call: Call, root: str) -> None:
    (getattr(roots, root) / "Dataset601_precious").mkdir()
    before = roots.snapshot()
    refused(call(cli.propagate, *PROPAGATE, "--overwrite"), "Dataset601_precious")
    assert roots.snapshot() == before


def test_output_that_is_there_is_refused_without_overwrite(toy: Path, roots: Roots, call: Call) -> None:
    assert call(cli.propagate, *PROPAGATE).code == 0
    before = roots.snapshot()
    refused(call(cli.propagate, *PROPAGATE), "--overwrite", "Dataset601_toy_oneshot")
    assert roots.snapshot() == before


def test_a_dataset_that_is_not_ours_is_never_overwritten(toy: Path, roots: Roots, call: Call) -> None:
    shutil.copytree(toy, toy.parent / "Dataset601_toy_oneshot")
    before = roots.snapshot()
    refused(call(cli.propagate, *PROPAGATE, "--overwrite"), "Dataset601_toy_oneshot")
    assert roots.snapshot() == before


@pytest.mark.parametrize(
    ("more", "word"),
    [
        (("-propagator", "telepathy"), "telepathy"),
        (("-recipe", "telepathy"), "oneseg"),
        (("-recipe", "oneseg", "-propagator", "sam2"), "correspondence alone"),
        (("-recipe", "yoloseg", "-propagator", "sam2", "registration"), "sam2 alone"),
        (("-views", "inside-out"), "inside-out"),
        (("-num_parts", 2, "-part_id", 2), "-part_id"),
        (("-num_parts", 0), "-num_parts"),
        (("-num_parts", 2, "-part_id", 1, "--overwrite"), "--overwrite"),
        (("-propagator", "fake_set", "-num_parts", 2), "-num_parts"),
    ],
)
def test_impossible_request_is_refused(
    toy: Path, roots: Roots, call: Call, monkeypatch: pytest.MonkeyPatch, more: tuple, word: str
) -> None:
    if {"telepathy", "-recipe"} & set(more):
        monkeypatch.undo()  # the true list of propagators
        monkeypatch.setenv("nnUNet_raw", str(roots.raw))
        monkeypatch.setenv("nnUNet_preprocessed", str(roots.preprocessed))
    before = roots.snapshot()
    refused(call(cli.propagate, *PROPAGATE, *more), word)
    assert roots.snapshot() == before


def test_wrong_usage_exits_2(call: Call) -> None:
    answer = call(cli.propagate, "-d", 501)
    assert answer.code == 2
    assert "-o" in answer.err


def test_one_annotated_case_of_several_without_foreground_is_a_warning(roots: Roots, call: Call) -> None:
    folder = write_raw(roots.raw, annotated=("case_0", "case_1"))
    write_image(folder / "labelsTr/case_1.nii.gz", np.zeros(SHAPE, np.uint8))
    answer = call(cli.propagate, *PROPAGATE)
    assert answer.code == 0
    assert "warning: annotated case case_1" in answer.out


@pytest.mark.parametrize("ending", [".nrrd", ".mha", ".png", ".tif", ".tiff"])
def test_truncated_file_of_any_format_is_refused(roots: Roots, call: Call, ending: str) -> None:
    folder = write_raw(roots.raw, ending=ending)
    truncate(folder / f"imagesTr/case_1_0000{ending}")
    before = roots.snapshot()
    refused(call(cli.propagate, *PROPAGATE), f"case_1_0000{ending}")
    assert roots.snapshot() == before


@pytest.mark.parametrize("name", ["imagesTr/case_1_0000.mha", "labelsTr/case_0.mha"])
def test_nan_is_found_whoever_reads_the_format(roots: Roots, call: Call, name: str) -> None:
    folder = write_raw(roots.raw, ending=".mha")
    change_voxel(folder / name, np.nan)
    before = roots.snapshot()
    refused(call(cli.propagate, *PROPAGATE), name, "nan" if "labels" in name else "NaN")
    assert roots.snapshot() == before


def test_truncated_first_file_of_a_multi_channel_set_is_refused(roots: Roots, call: Call) -> None:
    """Whether one file holds all channels is found out by reading the first one."""
    folder = write_raw(roots.raw, ending=".png", channels=3)
    truncate(folder / "imagesTr/case_0_0000.png")
    before = roots.snapshot()
    refused(call(cli.propagate, *PROPAGATE), "case_0_0000.png")
    assert roots.snapshot() == before


def test_one_channel_of_one_case_missing_is_refused(roots: Roots, call: Call) -> None:
    folder = write_raw(roots.raw, channels=2)
    (folder / "imagesTr/case_1_0001.nii.gz").unlink()
    before = roots.snapshot()
    refused(call(cli.propagate, *PROPAGATE), "case_1_0001.nii.gz")
    assert roots.snapshot() == before


def test_channels_of_different_spacing_are_refused(roots: Roots, call: Call) -> None:
    folder = write_raw(roots.raw, channels=2)
    change_header(folder / "imagesTr/case_1_0001.nii.gz", Spacing=(*SPACING[:2], 5.0))
    before = roots.snapshot()
    refused(call(cli.propagate, *PROPAGATE), "case_1_0000.nii.gz")
    assert roots.snapshot() == before


@pytest.fixture
def open_folder() -> Iterator[Path]:
    """A temporary folder that other users may enter, unlike pytest's."""
    with tempfile.TemporaryDirectory() as name:
        os.chmod(name, 0o755)
        yield Path(name)


@pytest.fixture
def open_roots(open_folder: Path, monkeypatch: pytest.MonkeyPatch) -> Roots:
    """nnU-Net's three folders, which other users may write to."""
    roots = Roots(*(open_folder / name for name in ("raw", "preprocessed", "results")))
    for name in ("raw", "preprocessed", "results"):
        getattr(roots, name).mkdir()
        getattr(roots, name).chmod(0o777)
        monkeypatch.setenv(f"nnUNet_{name}", str(getattr(roots, name)))
    return roots


needs_posix = pytest.mark.skipif(not hasattr(os, "geteuid"), reason="permissions of POSIX")


@needs_posix
@pytest.mark.parametrize("closed", ["raw", "preprocessed"])
def test_no_write_permission_is_refused(open_roots: Roots, call: Call, closed: str) -> None:
    write_raw(open_roots.raw)
    getattr(open_roots, closed).chmod(0o555)
    before = open_roots.snapshot()
    # Nobody may not enter the folder of the modules that a command imports when it is called.
    refused(call(cli.propagate, "-d", 999, *PROPAGATE[2:]), "999")
    with _without_privileges():
        answer = call(cli.propagate, *PROPAGATE)
    open_roots.raw.chmod(0o755)
    refused(answer, "permission", getattr(open_roots, closed))
    assert open_roots.snapshot() == before


REFINE = ("-d", 601, "-c", "2d", "-np", 1, "-device", "cpu")
REVIEW = ("-d", 601, "--port", 0, "--no_browser", "-device", "cpu")
MADE = "Dataset601_toy_oneshot"


@needs_posix
@pytest.mark.parametrize(
    ("command", "arguments", "closed"),
    [
        (cli.refine, REFINE, f"raw/{MADE}"),
        (cli.refine, REFINE, f"preprocessed/{MADE}"),
        (cli.refine, REFINE, "results"),
        (cli.run, ("-d", 501, "-o", 602, *REFINE[2:]), "results"),
        (cli.review, REVIEW, f"raw/{MADE}"),
        (cli.review, REVIEW, f"preprocessed/{MADE}"),
        (cli.propagate, (*PROPAGATE, "--trial"), "here"),
    ],
)
def test_what_other_users_made_is_not_begun_on_without_permission(
    open_roots: Roots, call: Call, monkeypatch: pytest.MonkeyPatch, command: Callable, arguments: tuple, closed: str
) -> None:
    if command is cli.review:
        for package in ("starlette", "uvicorn", "ipyniivue"):
            pytest.importorskip(package, reason=f"the review page needs {package}: pip install -e '.[dev,review]'")
        monkeypatch.setattr("nnunet_oneshot.review.session._serve", lambda *_: None)
    write_raw(open_roots.raw)
    propagate(501, 601, propagators=("fake",), num_processes=1)
    above = open_roots.raw.parent
    (above / "here").mkdir()
    monkeypatch.chdir(above / "here")
    for folder in (open_roots.raw / MADE, open_roots.preprocessed / MADE, above / "here"):
        folder.chmod(0o777)
    (above / closed).chmod(0o555)
    before = open_roots.snapshot()
    # As above: what the command imports.
    refused(call(command, "-d", 999, *arguments[2:]), "999")
    with _without_privileges():
        answer = call(command, *arguments)
    refused(answer, "expected permission to write", above / closed)
    assert open_roots.snapshot() == before


class _without_privileges:
    """Root may write anywhere, so root becomes nobody for a while."""

    def __enter__(self) -> None:
        self.user = os.geteuid()
        if self.user == 0:
            os.seteuid(65534)

    def __exit__(self, *_: object) -> None:
        os.seteuid(self.user)


@pytest.mark.parametrize(
    ("held", "words"),
    [
        (4, ("found 4 channels in", "case_0_0000.png (RGBA? save it without alpha)")),
        (1, ("found 1 channel in", "and no case_0_0001.png", "save the picture in colour")),
    ],
)
def test_pictures_with_other_channels_than_are_named_are_counted(
    roots: Roots, call: Call, held: int, words: tuple[str, ...]
) -> None:
    edit_json(write_raw(roots.raw, ending=".png", channels=held), channel_names={"0": "R", "1": "G", "2": "B"})
    answer = call(cli.propagate, *PROPAGATE)
    assert answer.code == 2
    assert "expected 3 channels, as many as dataset.json names" in answer.error
    for word in words:
        assert word in answer.error
