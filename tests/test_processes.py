"""How many processes work where nobody typed -np, and what is said where they were too many."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

import pytest
from fake_propagator import FakePropagator
from raw_datasets import Roots, write_raw
from test_refine import CASES, replace_nnunet
from tiny_dataset import write_dataset

from nnunet_oneshot import nnunet, nnunet_process, parallel, refine_relabelling, refine_work
from nnunet_oneshot import propagate as propagate_module
from nnunet_oneshot import refine as refine_module
from nnunet_oneshot.errors import NnunetFailureError
from nnunet_oneshot.propagators import PropagatorOptions
from nnunet_oneshot.settings import PRESETS

CORES = 16
SCRIPTS = pytest.mark.skipif(os.name == "nt", reason="a script stands in for Python")


@pytest.fixture(autouse=True)
def many_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (parallel, nnunet, propagate_module, refine_work):
        monkeypatch.setattr(module, "default_processes", lambda: CORES)


class Begun(Exception):
    """nnU-Net's job would begin."""


@pytest.mark.parametrize(
    ("device", "asked", "sam2", "registration"),
    [("cuda", None, 2, CORES), ("cuda", 5, 5, 5), ("cpu", None, CORES, CORES)],
)
def test_few_processes_share_a_gpu_unless_more_are_asked_for(
    toy: Path,
    fakes: dict[str, FakePropagator],
    monkeypatch: pytest.MonkeyPatch,
    device: str,
    asked: int | None,
    sam2: int,
    registration: int,
) -> None:
    seen: dict[str, int] = {}

    def carry(job: Any, cases: object, processes: int) -> float:
        seen[job.propagator.name] = processes
        return 0.0

    monkeypatch.setattr(propagate_module, "carry", carry)
    names, options = ("registration", "sam2"), PropagatorOptions(device=device)
    propagate_module.propagate(501, 601, propagators=names, options=options, num_processes=asked)
    assert seen == {"registration": registration, "sam2": sam2}


@pytest.mark.parametrize(("asked", "expected"), [(None, 2), (5, 5)])
def test_a_second_opinion_shares_the_gpu_too(
    roots: Roots,
    fakes: dict[str, FakePropagator],
    monkeypatch: pytest.MonkeyPatch,
    asked: int | None,
    expected: int,
) -> None:
    write_raw(roots.raw, cases=CASES)
    propagate_module.propagate(501, 601, propagators=("fake",), views=("still", "shifted"), num_processes=1)
    replace_nnunet(roots, monkeypatch)
    seen: list[object] = []

    def ask(*arguments: object) -> None:
        seen.append(arguments[-1])
        raise Begun

    monkeypatch.setattr(refine_module, "check_device", lambda *_: None)
    monkeypatch.setattr(refine_module, "check_sam2", lambda *_: None)
    monkeypatch.setattr(refine_relabelling, "ask_sam2", ask)
    monkeypatch.setattr(refine_work.Work, "processes", 1)
    with pytest.raises(Begun):
        refine_module.refine(601, "2d", self_opinion="builtin", device="cuda", num_processes=asked)
    assert seen == [expected]


@pytest.mark.parametrize(
    ("configurations", "asked", "expected"),
    [
        (["2d"], None, 8),
        (["3d_fullres"], None, 4),
        (["3d_lowres"], None, 8),
        (["2d", "own"], None, 4),
        (["2d"], 12, 12),
    ],
)
def test_preprocessing_is_as_wide_as_nnunets_own(
    roots: Roots, monkeypatch: pytest.MonkeyPatch, configurations: list[str], asked: int | None, expected: int
) -> None:
    write_dataset(roots.raw, "Dataset901_Tiny", cases=1)
    jobs: list[dict[str, Any]] = []

    def begin(job: dict[str, Any], *_: object) -> None:
        jobs.append(job)
        raise Begun

    monkeypatch.setattr(nnunet, "run_job", begin)
    with pytest.raises(Begun):
        nnunet.plan_and_preprocess(901, PRESETS["small"], configurations, asked)
    assert jobs[0]["num_processes"] == expected


@SCRIPTS
@pytest.mark.parametrize(
    ("job", "last", "advice"),
    [
        ("prepare", "RuntimeError: Some background worker is 6 feet under. Yuck.", "lower -np,"),
        ("train", "RuntimeError: One or more background workers are no longer alive.", "lower .* nnUNet_n_proc_DA"),
        ("predict", "concurrent.futures.process.BrokenProcessPool: ended abruptly", "lower .* nnUNet_def_n_proc"),
        ("train", "torch.OutOfMemoryError: CUDA out of memory. Tried to allocate", "uses the GPU"),
        ("prepare", None, "lower -np,"),
    ],
)
def test_a_failure_for_lack_of_memory_says_what_to_lower(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, job: str, last: str | None, advice: str
) -> None:
    stand_in(tmp_path, monkeypatch, "os.kill(os.getpid(), 9)" if last is None else f"print({last!r}); sys.exit(1)")
    with pytest.raises(NnunetFailureError, match=f"failed to {job}.* for lack of .*memory: .*{advice}"):
        nnunet_process.run_job({"job": job}, tmp_path / "log")


@SCRIPTS
def test_another_failure_is_not_laid_to_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stand_in(tmp_path, monkeypatch, "print('KeyError: 2'); sys.exit(1)")
    with pytest.raises(NnunetFailureError, match="failed to train; the end of"):
        nnunet_process.run_job({"job": "train"}, tmp_path / "log")


def stand_in(folder: Path, monkeypatch: pytest.MonkeyPatch, code: str) -> None:
    """A program that takes a job as nnU-Net's process does, and ends as it is told."""
    program = folder / "python"
    body = f"import json, os, sys\njson.loads(sys.stdin.readline())\n{code}\n"
    program.write_text(f"#!{sys.executable}\n{body}", encoding="utf-8")
    os.chmod(program, 0o755)
    monkeypatch.setattr(sys, "executable", str(program))
