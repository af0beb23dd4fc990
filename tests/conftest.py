"""Fixtures that several test files share: nnU-Net's folders, a raw dataset, a cheap propagator, commands in-process."""

from __future__ import annotations

import importlib
import os
import random
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch
from fake_propagator import FakePropagator
from hypothesis import settings
from raw_datasets import Roots, write_raw

import _nnunet_oneshot_path
from nnunet_oneshot.bfloat16 import VARIABLE


@dataclass(frozen=True)
class Answer:
    """What a command said and how it ended."""

    code: int
    out: str
    err: str

    @property
    def error(self) -> str:
        """The sentence after `error:`; the last line of standard error (progress bars come before it)."""
        return self.err.strip().splitlines()[-1].partition(": error: ")[2]


Command = Callable[[Sequence[str] | None], None]


def pytest_configure() -> None:
    """Tests that run side by side have a processor each: what they start would else start workers for all of them."""
    worker = os.environ.get("PYTEST_XDIST_WORKER", "")
    if worker and hasattr(os, "sched_setaffinity"):
        processors = sorted(os.sched_getaffinity(0))
        os.sched_setaffinity(0, {processors[int(worker.removeprefix("gw")) % len(processors)]})


# A busy machine makes any example slow, and no run sees other examples than the one before.
settings.register_profile("repeatable", deadline=None, derandomize=True, database=None)
settings.load_profile("repeatable")


@pytest.fixture(scope="session")
def benchmark_module() -> Callable[[str], ModuleType]:
    """Imports a module of benchmarks/, whose modules import each other by their bare names."""
    folder = str(Path(__file__).parents[1] / "benchmarks")

    def imported(name: str) -> ModuleType:
        sys.path.insert(0, folder)
        try:
            return importlib.import_module(name)
        finally:
            sys.path.remove(folder)

    return imported


@pytest.fixture(autouse=True)
def seeds() -> None:
    """The same draws in every run, of nnU-Net's loaders too where they run in line."""
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def own_checkpoints(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Networks that are learnt or downloaded stay out of the user's folder, and tests apart."""
    monkeypatch.setenv("nnUNet_oneshot_checkpoints", str(tmp_path / "checkpoints_of_this_test"))


@pytest.fixture(autouse=True)
def same_precision(monkeypatch: pytest.MonkeyPatch) -> None:
    """The same figures on every processor; tests of bfloat16 ask for it."""
    monkeypatch.setenv(VARIABLE, "0")


@pytest.fixture(autouse=True)
def no_proxy_here(monkeypatch: pytest.MonkeyPatch) -> None:
    """Servers of tests are on this machine, wherever the user's proxy is."""
    monkeypatch.setenv("no_proxy", "127.0.0.1,localhost")


@pytest.fixture
def roots(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Roots:
    """nnU-Net's three folders, empty, with their environment variables."""
    folders = Roots(tmp_path / "raw", tmp_path / "preprocessed", tmp_path / "results")
    for name in ("raw", "preprocessed", "results"):
        (tmp_path / name).mkdir()
        monkeypatch.setenv(f"nnUNet_{name}", str(tmp_path / name))
    return folders


@pytest.fixture
def toy(roots: Roots) -> Path:
    """Dataset501_toy: one of three anisotropic volumes of odd orientation is annotated."""
    return write_raw(roots.raw)


@pytest.fixture
def fakes(monkeypatch: pytest.MonkeyPatch) -> dict[str, FakePropagator]:
    """Every propagator's name makes a fake; the fakes made, by name, so that a test can ask what they did."""
    made: dict[str, FakePropagator] = {}

    def make(name: str, options: object) -> FakePropagator:
        return made.setdefault(name, FakePropagator(name, whole_set=name == "fake_set"))

    monkeypatch.setattr("nnunet_oneshot.propagators.make_propagator", make)
    return made


@pytest.fixture
def call(capsys: pytest.CaptureFixture[str]) -> Callable[..., Answer]:
    """Call a command's function with arguments as on a command line."""

    def run(command: Command, *argv: object) -> Answer:
        capsys.readouterr()
        code = 0
        try:
            command([str(a) for a in argv])
        except SystemExit as end:
            code = end.code if isinstance(end.code, int) else 1
        out, err = capsys.readouterr()
        return Answer(code, out, err)

    return run


@pytest.fixture
def training_roots(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """nnU-Net's three folders, ours among its trainers, one thread; the folder that holds the three."""
    for root in ("nnUNet_raw", "nnUNet_preprocessed", "nnUNet_results"):
        (tmp_path / root).mkdir()
        monkeypatch.setenv(root, str(tmp_path / root))
    monkeypatch.setenv("nnUNet_extTrainer", "")
    _nnunet_oneshot_path.register()
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield tmp_path
    torch.set_num_threads(threads)
