"""The documentation: every command on it is run on phantoms, or says why not and parses at least; the site builds."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import SimpleITK as sitk
from conftest import Answer
from skimage import io
from test_convert_dicom import SHAPE, write_series

from nnunet_oneshot import cli, command_line
from nnunet_oneshot.phantom import write_phantom_dataset

Call = Callable[..., Answer]
ROOT = Path(__file__).parents[1]
PAGES = sorted((ROOT / "docs").rglob("*.md"))
SCRIPTS = dict(
    re.findall(
        r'^(nnUNetv2_oneshot_\w+) = "nnunet_oneshot\.cli:(\w+)"$',
        (ROOT / "pyproject.toml").read_text(encoding="utf-8"),
        re.M,
    )
)
TRAINING = re.compile(r"^(nnUNetv2_oneshot_(?:refine|run)\b.*?)(\s*#.*)?$", re.M)
"""Gets the preset that a test can wait for; of a flag that is given twice the last counts."""
SMALL, TINY = "OneShotTrainer_small", "OneShotTrainer_tiny"
"""What is trained where a page says `-preset small`, and what in its place."""
BLOCK = re.compile(r"(?:<!-- not run: (?P<reason>[^>]+) -->\n)?^```bash\n(?P<code>.*?)^```$", re.M | re.S)


@dataclass(frozen=True)
class Block:
    """A block of commands: run, or not for a reason."""

    page: str
    code: str
    reason: str | None


def blocks(page: Path) -> list[Block]:
    name = page.relative_to(ROOT / "docs").as_posix()
    return [Block(name, found["code"], found["reason"]) for found in BLOCK.finditer(page.read_text(encoding="utf-8"))]


EVERY = [block for page in PAGES for block in blocks(page)]
RUN = sorted({block.page for block in EVERY if block.reason is None})


def ours(code: str) -> Iterator[list[str]]:
    """Calls of our commands in a block, as words; what is quoted for another program's shell is looked into."""
    for line in code.replace("\\\n", " ").splitlines():
        for found in re.finditer(r"nnUNetv2_oneshot_[^'&|]*", line):
            yield shlex.split(found.group(), comments=True)


def test_commands_that_are_not_run_parse(call: Call, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(command_line, "_best_device", lambda: "cpu")
    for block in EVERY:
        for words in ours(block.code):
            name = SCRIPTS[words[0]]
            monkeypatch.setattr(cli, f"_do_{name}", lambda arguments: {"lines": []})
            given = [word if not word.startswith("$SLURM") else "0" for word in words[1:]]
            assert call(getattr(cli, name), *given).code == 0, (block.page, words)


def test_every_command_has_a_place_in_the_docs() -> None:
    text = "\n".join(page.read_text(encoding="utf-8") for page in [*PAGES, ROOT / "README.md"])
    missing = [name for name in SCRIPTS if name not in text and name.replace("nnUNetv2_oneshot", "") not in text]
    assert missing == []


def test_links_between_pages_lead_somewhere() -> None:
    for page in [*PAGES, ROOT / "README.md"]:
        for target, place in re.findall(r"\]\((?!https?:)([^)#]*)(?:#([^)]*))?\)", page.read_text(encoding="utf-8")):
            there = page.parent / target if target else page
            assert there.exists(), (page.name, target)
            assert not place or place in _places(there), (page.name, target, place)


def _places(page: Path) -> set[str]:
    """What a link may name after #: the headings of a page, as GitHub and the site write them."""
    prose = re.sub(r"^```.*?^```", "", page.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)
    headings = re.findall(r"^#+ (.+)$", prose, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading).strip().lower().replace(" ", "-") for heading in headings}


@pytest.mark.slow
def test_the_site_builds_without_a_warning(tmp_path: Path) -> None:
    pytest.importorskip("mkdocs", reason="needs the extra docs: pip install -e '.[docs]'")
    pytest.importorskip("mkdocstrings", reason="needs the extra docs: pip install -e '.[docs]'")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "-q", "-d", str(tmp_path / "site")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, encoding="utf-8")
    assert done.returncode == 0, done.stderr
    reference = (tmp_path / "site" / "api" / "index.html").read_text(encoding="utf-8")
    assert 'id="nnunet_oneshot.propagate.propagate"' in reference


# What each page finds on the reader's machine.


def _tutorial(folder: Path) -> None:
    made = write_phantom_dataset(folder / "made", 1, "patient", truth=folder / "truth", cases=5, shape=(10, 64, 64))
    for sub, source in (("images", made.folder / "imagesTr"), ("labels", made.folder / "labelsTr")):
        (folder / sub).mkdir()
        for path in source.iterdir():
            path.rename(folder / sub / path.name.replace("_0000", ""))
    (folder / "true_labels").mkdir()
    shutil.copy(folder / "truth" / "patient_002.nii.gz", folder / "true_labels")


def _annotated(folder: Path) -> Path:
    """Thick slices, which SAM2 labels along one plane: the tutorial's images are labelled along three."""
    raw, truth = folder / "nnUNet_raw", folder / "truth"
    return write_phantom_dataset(raw, 501, truth=truth, cases=3, shape=(10, 64, 64), kind="thick_slices").folder


def _tools(folder: Path) -> None:
    _annotated(folder)
    for tool, by in (("tool_a", 0), ("tool_b", 1)):
        (folder / tool).mkdir()
        for path in sorted((folder / "truth").iterdir()):
            image = sitk.ReadImage(str(path))
            moved = sitk.GetImageFromArray(np.roll(sitk.GetArrayFromImage(image), by, axis=2))
            moved.CopyInformation(image)
            sitk.WriteImage(moved, str(folder / tool / path.name))


def _drawn_slices(folder: Path) -> None:
    dataset = _annotated(folder)
    next((dataset / "labelsTr").iterdir()).unlink()
    (folder / "drawn_slices").mkdir()
    for path in sorted((folder / "truth").iterdir())[:2]:
        image = sitk.ReadImage(str(path))
        label = sitk.GetArrayFromImage(image)
        label[np.arange(len(label)) != int((label > 0).sum((1, 2)).argmax())] = 0
        drawn = sitk.GetImageFromArray(label)
        drawn.CopyInformation(image)
        sitk.WriteImage(drawn, str(folder / "drawn_slices" / path.name))


def _scanned(folder: Path) -> None:
    pydicom = pytest.importorskip("pydicom", reason="needs the extra dicom: pip install -e '.[dicom]'")
    pytest.importorskip("highdicom", reason="needs the extra dicom: pip install -e '.[dicom]'")
    write_series(folder / "export" / "patient_a" / "arterial", "1.2.3")
    write_series(folder / "export" / "patient_a" / "portal", "1.2.4", seed=1)
    for file in (folder / "export").rglob("*.dcm"):
        header = pydicom.dcmread(file)
        header.FrameOfReferenceUID = "1.2.3.9"
        header.save_as(file)
    (folder / "drawn").mkdir()
    label = np.zeros(SHAPE, np.uint8)
    label[1:4, 4:9, 4:9] = 1
    drawn = sitk.GetImageFromArray(label)
    drawn.SetSpacing((0.8, 0.9, 3.0))
    drawn.SetOrigin((1.5, -2.5, 10.0))
    sitk.WriteImage(drawn, str(folder / "drawn" / "case_001.nii.gz"))


def _challenge(folder: Path) -> None:
    _annotated(folder)
    images = sorted((folder / "nnUNet_raw" / "Dataset501_phantom" / "imagesTr").iterdir())
    for number, image in enumerate(images):
        patient = folder / "LiQA_training_data" / "Vendor_A" / f"10{number}-A-S{number + 1}"
        patient.mkdir(parents=True)
        for name in ("GED4", "T2"):
            (patient / f"{name}.nii.gz").write_bytes(image.read_bytes())
        if number == 0:
            truth = folder / "truth" / image.name.replace("_0000", "")
            liver = sitk.ReadImage(str(truth)) == 1
            sitk.WriteImage(liver, str(patient / "mask_GED4.nii.gz"))
    held_out = folder / "LiQA_validation_data" / "Vendor_B1" / "201-B1"
    held_out.mkdir(parents=True)
    for name in ("GED4", "T2"):
        (held_out / f"{name}.nii.gz").write_bytes(images[0].read_bytes())


def _photographs(folder: Path) -> None:
    """Colour pictures, transparent ones among them, and one mask of two structures."""
    made = write_phantom_dataset(folder, 1, "picture", truth=folder / "truth", cases=4, shape=(1, 64, 64), kind="rgb2d")
    for sub in ("pictures", "masks"):
        (folder / sub).mkdir()
    for case in made.cases:
        picture = io.imread(made.folder / "imagesTr" / f"{case}_0000.png")
        opaque = np.full((*picture.shape[:2], 1), 255, np.uint8)
        io.imsave(folder / "pictures" / f"{case}.png", np.concatenate([picture, opaque], axis=2))
    mask = io.imread(made.truth / "picture_001.png")
    io.imsave(folder / "masks" / "picture_001.png", np.where(mask < 3, mask, 0).astype(np.uint8), check_contrast=False)


PREPARE: dict[str, Callable[[Path], object]] = {
    "tutorial.md": _tutorial,
    "howto/slices.md": _drawn_slices,
    "howto/other_tools.md": _tools,
    "howto/cluster.md": _annotated,
    "howto/dicom.md": _scanned,
    "howto/care_liseg.md": _challenge,
    "howto/pictures_2d.md": _photographs,
}


def _environment(folder: Path) -> dict[str, str]:
    """The reader's: nnU-Net's folders, and this checkout's commands first."""
    programs = folder / "programs"
    programs.mkdir(exist_ok=True)
    for script, function in SCRIPTS.items():
        code = f"from nnunet_oneshot import cli; cli.{function}()"
        (programs / script).write_text(f'#!/bin/sh\nexec "{sys.executable}" -c "{code}" "$@"\n')
        (programs / script).chmod(0o755)
    roots = {name: str(folder / name) for name in ("nnUNet_raw", "nnUNet_preprocessed", "nnUNet_results")}
    path = os.pathsep.join([str(programs), str(Path(sys.executable).parent), os.environ["PATH"]])
    trainers = os.pathsep.join([str(ROOT / "tests" / "quick_trainers"), str(ROOT / "trainers")])
    return {**os.environ, **roots, "PATH": path, "nnUNet_extTrainer": trainers}


@pytest.mark.slow
@pytest.mark.parametrize("page", RUN)
def test_commands_of_a_page_run(page: str, tmp_path: Path) -> None:
    for name in ("nnUNet_raw", "nnUNet_preprocessed", "nnUNet_results"):
        (tmp_path / name).mkdir()
    PREPARE[page](tmp_path)
    code = "\n".join(block.code for block in EVERY if block.page == page and block.reason is None)
    code = TRAINING.sub(r"\1 -preset tiny -device cpu", code).replace(SMALL, TINY)
    shell = subprocess.run(
        ["bash", "-euo", "pipefail"],
        input=code,
        cwd=tmp_path,
        env=_environment(tmp_path),
        encoding="utf-8",
        capture_output=True,
    )
    assert shell.returncode == 0, f"{shell.stdout[-3000:]}\n{shell.stderr[-3000:]}"
    logs = [log.read_text(encoding="utf-8") for log in (tmp_path / "nnUNet_results").rglob("training_log*.txt")]
    assert not any("Epoch 2" in log for log in logs), "a training of full length, which this test need not wait for"
