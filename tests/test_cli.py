"""The commands as a user meets them: help at once, summaries, JSON, exit codes."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from conftest import Answer
from fake_propagator import FakePropagator
from raw_datasets import Roots, label_array, write_image, write_raw

from nnunet_oneshot import cli, command_line
from nnunet_oneshot.errors import NnunetFailureError
from sam2_propagation.errors import PropagationError

Call = Callable[..., Answer]

ROOT = Path(__file__).parents[1]
SCRIPT = r'^(nnUNetv2_oneshot_\w+) = "nnunet_oneshot\.cli:(\w+)"$'
SCRIPTS = dict(re.findall(SCRIPT, (ROOT / "pyproject.toml").read_text(encoding="utf-8"), re.MULTILINE))
COMMANDS = ["suggest", "make_sparse", "propagate", "consensus", "refine", "run", "evaluate"]
COMMANDS += ["report", "review", "export", "demo", "info"]
CONVERTERS = ["convert_care_liseg", "convert_yoloseg", "convert_dicom", "convert_labels"]
PROPAGATE = ("-d", 501, "-o", 601, "-np", 1, "-device", "cpu", "-propagator", "fake")

HELP = """
import contextlib, io, json, sys
from nnunet_oneshot import cli
said = {}
for name in sys.argv[1:]:
    out = io.StringIO()
    try:
        with contextlib.redirect_stdout(out):
            getattr(cli, name)(["-h"])
    except SystemExit as end:
        said[name] = [end.code, out.getvalue()]
print(json.dumps({"said": said, "heavy": sorted({"torch", "nnunetv2", "SimpleITK", "numpy"} & set(sys.modules))}))
"""


def test_every_command_of_the_contract_is_installed() -> None:
    assert {f"nnUNetv2_oneshot_{name}": name for name in (*COMMANDS, *CONVERTERS)} == SCRIPTS


def _seconds_of_children() -> float:
    times = os.times()
    return times.children_user + times.children_system


def test_help_of_every_command_answers_at_once() -> None:
    begin = _seconds_of_children()
    done = subprocess.run(
        [sys.executable, "-c", HELP, *SCRIPTS.values()], capture_output=True, encoding="utf-8", check=True
    )
    answer = json.loads(done.stdout)
    assert answer["heavy"] == [], "what takes seconds to import"
    assert _seconds_of_children() - begin < 10, "all commands together, whatever else the machine does"
    for name in SCRIPTS.values():
        code, text = answer["said"][name]
        assert code == 0
        assert text.startswith(f"usage: nnUNetv2_oneshot_{name}")


def test_help_shows_an_example_that_parses(call: Call, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(command_line, "_best_device", lambda: "cpu")
    for name in SCRIPTS.values():
        shown = re.search(r"example: (nnUNetv2_oneshot_\w+.*)", call(getattr(cli, name), "-h").out)
        assert shown, name
        words = shown.group(1).split()
        assert SCRIPTS[words[0]] == name
        seen: list[object] = []
        monkeypatch.setattr(cli, f"_do_{name}", lambda arguments, seen=seen: seen.append(arguments) or {"lines": []})
        assert call(getattr(cli, name), *words[1:]).code == 0, name
        assert seen, name


def test_propagate_ends_with_a_table_and_what_comes_next(
    toy: Path, call: Call, fakes: dict[str, FakePropagator]
) -> None:
    answer = call(cli.propagate, *PROPAGATE)
    assert answer.code == 0
    assert re.search(r"annotated +1\npseudo +2", answer.out)
    divergence = next(line for line in answer.out.splitlines() if line.startswith("divergence"))
    assert re.match(r"divergence: \d+\.\d\d % of voxels \(", divergence)
    assert "ignored by stock trainers, OneShotTrainer learns the best guess there" in divergence
    assert "nnUNetv2_oneshot_refine -d 601" in answer.out
    assert "propagate by fake" in answer.err, "a progress bar"


def test_failed_cases_are_told(roots: Roots, call: Call, fakes: dict[str, FakePropagator]) -> None:
    write_raw(roots.raw, cases=("case_0", "bad_1", "case_2"))
    assert "no label for bad_1: fake: similarity no better than identity" in call(cli.propagate, *PROPAGATE).out


@pytest.mark.parametrize(
    ("arguments", "word"),
    [
        (("-n", 3), "with --trial"),
        (("--trial", "--overwrite"), "--overwrite"),
        (("--trial", "-num_parts", 2, "-part_id", 1), "-num_parts -part_id"),
        (("-mode", "self"), "-mode"),
        (("-adapt", 9), "-adapt"),
        (("-window", "lung"), "-window"),
        (("-channels", 1), "-channels"),
        (("-sam2_chk", "builtin"), "-sam2_chk"),
        (("-sam2_cfg", "medsam2"), "-sam2_cfg"),
        (("--reverse_check",), "--reverse_check"),
        (("--trial", "-mode", "self"), "-mode"),
    ],
)
def test_flags_that_cannot_act_are_refused(
    toy: Path,
    roots: Roots,
    call: Call,
    fakes: dict[str, FakePropagator],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    arguments: tuple,
    word: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    before = roots.snapshot()
    answer = call(cli.propagate, *PROPAGATE, *arguments)
    assert (answer.code, answer.out) == (2, "")
    assert word in answer.error
    assert "found" in answer.error
    assert " out" in answer.error, "what to do"
    assert roots.snapshot() == before


def test_flags_act_where_their_propagator_is_one_of_several(
    toy: Path, call: Call, fakes: dict[str, FakePropagator]
) -> None:
    flags = ("-propagator", "registration", "sam2", "-mode", "self", "-adapt", 9, "--reverse_check")
    assert call(cli.propagate, *PROPAGATE[:-2], *flags).code == 0


def test_info_names_the_weights_that_are_there(call: Call, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("nnUNet_oneshot_checkpoints", str(tmp_path))
    assert call(cli.info).out.count(f"checkpoint folder: {tmp_path}; in it: none") == 1
    (tmp_path / "MedSAM2_latest.pt").touch()
    found = strict(call(cli.info, "-json").out)["checkpoints"]
    weights = ROOT / "sam2_propagation" / "builtin" / "builtin.safetensors"
    sha256 = hashlib.sha256(weights.read_bytes()).hexdigest()
    assert found["builtin"] == {"name": "builtin.safetensors", "sha256": sha256}
    assert (found["cache"], found["downloaded"]) == (str(tmp_path), ["medsam2_latest"])
    shown = call(cli.info).out
    assert f"builtin.safetensors, sha256 {sha256}" in shown
    assert "in it: medsam2_latest" in shown


class Chatty(FakePropagator):
    def fit(self, images: object) -> None:
        """Prints, as third parties do."""
        print("hello from a library")


def strict(text: str) -> dict:
    """JSON as the standard has it, without NaN."""

    def refuse(name: str) -> None:
        raise ValueError(name)

    return json.loads(text, parse_constant=refuse)


def test_json_alone_on_standard_output(roots: Roots, call: Call, monkeypatch: pytest.MonkeyPatch) -> None:
    write_raw(roots.raw, cases=("case_0", "bad_1", "case_2"))
    monkeypatch.setattr("nnunet_oneshot.propagators.make_propagator", lambda name, options: Chatty(name))
    answer = call(cli.propagate, *PROPAGATE, "-json")
    summary = strict(answer.out)
    assert "hello from a library" in answer.err
    assert summary["cases"] == {"annotated": 1, "pseudo": 1, "failed": 1}
    assert summary["failed"] == {"bad_1": "fake: similarity no better than identity"}
    assert summary["complete"] is True
    assert 0 < summary["mean_divergence"] < 1
    assert "lines" not in summary


def test_json_of_a_shard_says_it_is_not_complete(toy: Path, call: Call, fakes: dict[str, FakePropagator]) -> None:
    summary = strict(call(cli.propagate, *PROPAGATE, "-json", "-num_parts", 2).out)
    assert summary["complete"] is False


def test_json_of_consensus(toy: Path, tmp_path: Path, call: Call) -> None:
    for index in (1, 2):
        write_image(tmp_path / "tool" / f"case_{index}.nii.gz", label_array(index))
    summary = strict(call(cli.consensus, "-d", 501, "-o", 601, "-np", 1, "-i", tmp_path / "tool", "-json").out)
    assert summary["cases"] == {"annotated": 1, "pseudo": 2}
    assert summary["mean_divergence"] == 0


def test_json_of_a_mistake_is_nothing(roots: Roots, call: Call) -> None:
    answer = call(cli.propagate, *PROPAGATE, "-json")
    assert (answer.code, answer.out) == (2, "")


def test_json_of_evaluate_with_an_empty_class(toy: Path, tmp_path: Path, call: Call) -> None:
    for folder in ("ref", "pred"):
        write_image(tmp_path / folder / "a.nii.gz", 0 * label_array(0))
    strict(
        call(
            cli.evaluate,
            *("-ref", tmp_path / "ref", "-pred", tmp_path / "pred", "-djfile", toy / "dataset.json", "-json"),
        ).out
    )


@pytest.mark.parametrize(
    ("error", "code", "said"),
    [
        (PropagationError("expected a,\nfound b; do c"), 2, "error: expected a, found b; do c\n"),
        (NnunetFailureError("nnU-Net stopped"), 1, "failed: nnU-Net stopped\n"),
        (KeyboardInterrupt(), 1, "run the same command again"),
    ],
)
def test_exit_codes(
    toy: Path, call: Call, monkeypatch: pytest.MonkeyPatch, error: BaseException, code: int, said: str
) -> None:
    def fail(name: str, options: object) -> None:
        raise error

    monkeypatch.setattr("nnunet_oneshot.propagators.make_propagator", fail)
    answer = call(cli.propagate, *PROPAGATE)
    assert (answer.code, answer.out) == (code, "")
    assert said in answer.err
    assert "Traceback" not in answer.err


@pytest.mark.parametrize(
    "error",
    [KeyboardInterrupt(), OSError(errno.ENOSPC, "full"), NnunetFailureError("no memory: run the same command again")],
)
@pytest.mark.parametrize("overwrite", [False, True])
@pytest.mark.parametrize("command", [cli.propagate, cli.run, cli.consensus, cli.demo])
def test_what_overwrite_began_goes_on_without_it(
    call: Call, monkeypatch: pytest.MonkeyPatch, command: Callable[..., None], overwrite: bool, error: BaseException
) -> None:
    def fail(*_: object) -> None:
        raise error

    monkeypatch.setattr(cli, f"_do_{command.__name__}", fail)
    given = {
        cli.propagate: PROPAGATE,
        cli.run: (*PROPAGATE, "-c", "2d"),
        cli.consensus: ("-d", 1, "-o", 2, "-i", "x"),
        cli.demo: (),
    }
    answer = call(command, *given[command], *(["--overwrite"] if overwrite else []))
    assert answer.code != 0
    assert "run the same command again" in answer.err
    assert ("run the same command again without --overwrite" in answer.err) == overwrite
    assert ("(with it, where the earlier labels are still there)" in answer.err) == overwrite


def test_ctrl_c_while_a_device_is_looked_for_is_told_too(
    toy: Path, call: Call, monkeypatch: pytest.MonkeyPatch
) -> None:
    """PyTorch takes seconds to import."""

    def interrupt() -> str:
        raise KeyboardInterrupt

    monkeypatch.setattr(command_line, "_best_device", interrupt)
    answer = call(cli.propagate, "-d", 501, "-o", 601)
    assert (answer.code, answer.out) == (1, "")
    assert "run the same command again" in answer.err


def test_a_programming_error_is_not_hidden(toy: Path, call: Call, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(name: str, options: object) -> None:
        raise ZeroDivisionError

    monkeypatch.setattr("nnunet_oneshot.propagators.make_propagator", fail)
    with pytest.raises(ZeroDivisionError):
        call(cli.propagate, *PROPAGATE)


@pytest.mark.parametrize(
    ("command", "more", "table", "following"),
    [
        (cli.suggest, (), r"rank +case", "draw what is named into labelsTr, then nnUNetv2_oneshot_propagate -d 501"),
        (cli.suggest, ("--slices",), r"rank +case", "nnUNetv2_oneshot_make_sparse -d 501 -i FOLDER"),
    ],
)
def test_every_end_has_a_table_and_says_what_comes_next(
    toy: Path, call: Call, command: Callable, more: tuple, table: str, following: str
) -> None:
    answer = call(command, "-d", 501, "-np", 1, *more)
    assert re.search(table, answer.out)
    assert answer.out.splitlines()[-1].startswith("next: ")
    assert following in answer.out.splitlines()[-1]


def test_ends_of_what_works_on_labels(toy: Path, tmp_path: Path, call: Call, fakes: dict[str, FakePropagator]) -> None:
    assert call(cli.propagate, *PROPAGATE).code == 0
    shown = call(cli.report, "-d", 601, "-np", 1).out
    assert re.search(r"annotated +1\npseudo +2", shown)
    assert shown.endswith("next: nnUNetv2_oneshot_review -d 601\n")
    assert "next: nnUNetv2_oneshot_review -d 601" in call(cli.suggest, "-d", 601, "-np", 1).out
    assert "next: open them in 3D Slicer" in call(cli.convert_labels, "-d", 601, "-o", tmp_path / "slicer").out
    folders = ("-ref", toy / "labelsTr", "-pred", toy / "labelsTr", "-djfile", toy / "dataset.json")
    assert "next: nnUNetv2_oneshot_report -d B -ref" in call(cli.evaluate, *folders).out


@pytest.mark.parametrize(
    ("terminal", "environment", "styled"),
    [(True, {}, True), (False, {}, False), (True, {"NO_COLOR": "1"}, False), (True, {"TERM": "dumb"}, False)],
)
def test_styles_on_a_terminal_alone(
    toy: Path, call: Call, monkeypatch: pytest.MonkeyPatch, terminal: bool, environment: dict, styled: bool
) -> None:
    for name in ("NO_COLOR", "TERM"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(sys.stdout, "isatty", lambda: terminal)
    monkeypatch.setattr(sys.stderr, "isatty", lambda: terminal)
    assert ("\033[1mnext:" in call(cli.suggest, "-d", 501, "-np", 1).out) is styled
    assert ("\033[31merror:" in call(cli.suggest, "-d", 999).err) is styled


@pytest.mark.parametrize(
    ("command", "arguments"),
    [
        (cli.suggest, ("-d", 501)),
        (cli.propagate, ("-d", 501, "-o", 601)),
        (cli.consensus, ("-d", 501, "-o", 601, "-i", "labels")),
        (cli.refine, ("-d", 601, "-c", "2d")),
        (cli.run, ("-d", 501, "-o", 601, "-c", "2d")),
    ],
)
@pytest.mark.parametrize("number", ["0", "-1", "two"])
def test_fewer_processes_than_one_are_refused(call: Call, command: Callable, arguments: tuple, number: str) -> None:
    answer = call(command, *arguments, "-np", number)
    assert answer.code == 2
    assert answer.error == (
        f"argument -np: expected a whole number of 1 or more, found {number}; leave it out for the default"
    )


# --- the device ---------------------------------------------------------------------------------------------------

TRAIN = {cli.refine: ("-d", 601, "-c", "2d"), cli.run: ("-d", 501, "-o", 601, "-c", "2d")}


class Reached(Exception):
    """The work itself would begin."""


@pytest.fixture
def no_work(monkeypatch: pytest.MonkeyPatch) -> None:
    def begin(*_: object, **__: object) -> None:
        raise Reached

    monkeypatch.setattr("nnunet_oneshot.refine.refine", begin)
    monkeypatch.setattr("nnunet_oneshot.run.run", begin)


@pytest.mark.parametrize("command", TRAIN)
def test_a_thousand_epochs_on_a_cpu_that_nobody_named_are_warned_of(
    call: Call,
    monkeypatch: pytest.MonkeyPatch,
    no_work: None,
    command: Callable,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(command_line, "_best_device", lambda: "cpu")
    for more in ((), ("-device", "cpu"), ("-preset", "small"), ("-tr", "OneShotTrainer_tiny")):
        with pytest.raises(Reached):
            call(command, *TRAIN[command], *more)
        said = capsys.readouterr().err
        assert "device: cpu" in said
        assert ("1000 epochs" in said and "-preset small" in said) == (not more)


@pytest.mark.parametrize("command", TRAIN)
def test_a_gpu_is_found_and_said(
    call: Call,
    monkeypatch: pytest.MonkeyPatch,
    no_work: None,
    command: Callable,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(command_line, "_best_device", lambda: "cuda")
    with pytest.raises(Reached):
        call(command, *TRAIN[command], "-json")
    out, err = capsys.readouterr()
    assert out == "", "kept for the summary"
    assert "device: cuda" in err


@pytest.mark.parametrize(("device", "small"), [("cpu", True), ("cuda", False)])
def test_without_a_gpu_the_next_command_names_the_small_preset(
    toy: Path, call: Call, fakes: dict, monkeypatch: pytest.MonkeyPatch, device: str, small: bool
) -> None:
    monkeypatch.setattr(command_line, "_best_device", lambda: device)
    shown = call(cli.propagate, *PROPAGATE).out.splitlines()[-1]
    assert shown.endswith("nnUNetv2_oneshot_refine -d 601 -c CONFIG" + " -preset small" * small)


def test_help_tells_how_long_the_default_trains(call: Call) -> None:
    shown = " ".join(call(cli.refine, "-h").out.split())
    assert shown.count("rounds + 1 trainings of 1000 epochs") == 2


# --- files that nobody reads --------------------------------------------------------------------------------------


@pytest.fixture
def misnamed(toy: Path) -> str:
    """What is said of a set with three images that no case takes, a hidden file and one of another kind."""
    for name in ("patient7.nii.gz", "case_8_0000.nii", "case_9_0000.NII.GZ", ".DS_Store", "case_0.json"):
        (toy / "imagesTr" / name).touch()
    return "3 files of imagesTr not named CASE_0000.nii.gz (for example case_8_0000.nii) passed over"


@pytest.mark.parametrize(
    ("command", "more"),
    [
        (cli.suggest, ("-d", 501, "-np", 1)),
        (cli.propagate, PROPAGATE),
        (cli.propagate, (*PROPAGATE, "--trial")),
        (cli.consensus, ("-d", 501, "-o", 601, "-np", 1, "-i", "tool")),
    ],
)
@pytest.mark.parametrize("json", [False, True])
def test_images_that_no_case_takes_are_told_once(
    misnamed: str,
    call: Call,
    fakes: dict,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    command: Callable,
    more: tuple,
    json: bool,
) -> None:
    monkeypatch.chdir(tmp_path)
    for index in (1, 2):
        write_image(tmp_path / "tool" / f"case_{index}.nii.gz", label_array(index))
    answer = call(command, *more, *(("-json",) if json else ()))
    assert answer.code == 0
    assert answer.out.count(misnamed) == 1
    if json:
        assert any(misnamed in text for text in strict(answer.out)["warnings"])


def test_a_folder_of_misnamed_images_alone_is_told_how_they_are_named(toy: Path, call: Call) -> None:
    (toy / "labelsTr" / "case_0.nii.gz").unlink()
    for path in list((toy / "imagesTr").iterdir()):
        path.rename(path.with_name(path.name.replace("_0000", "")))
    assert "found 3 files of imagesTr not named CASE_0000.nii.gz (for example case_0.nii.gz)" in (
        call(cli.suggest, "-d", 501).error
    )


def test_evaluate_scores_as_many_cases_at_once_as_are_asked_for(
    toy: Path, call: Call, monkeypatch: pytest.MonkeyPatch
) -> None:
    folders = ("-ref", toy / "labelsTr", "-pred", toy / "labelsTr", "-djfile", toy / "dataset.json")
    seen: list[object] = []

    def over_cases(function: Callable, items: list, *, processes: int, title: str) -> object:
        seen.append(processes)
        return map(function, items)

    monkeypatch.setattr("nnunet_oneshot.evaluate.over_cases", over_cases)
    monkeypatch.setattr("nnunet_oneshot.parallel.default_processes", lambda: 7)
    for more in (("-np", 3), ()):
        assert call(cli.evaluate, *folders, *more).code == 0
    assert seen == [3, 7]
