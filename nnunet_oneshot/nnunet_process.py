"""Running one job of `nnunet_jobs` in a process of its own: its environment, its log, its progress, its end."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import _nnunet_oneshot_path
from nnunet_oneshot.errors import DISK_FULL, NnunetFailureError, OneShotError
from nnunet_oneshot.parallel import default_processes, progress_bar

_POLL_SECONDS = 0.3
_NO_MEMORY = (
    "out of memory",
    "MemoryError",
    "Cannot allocate memory",
    "not enough memory",
    "Killed",
    "BrokenProcessPool",
    "background workers are no longer alive",
    "background worker is 6 feet under",
)
"""How Python, PyTorch, nnU-Net and the system say that memory is used up. Workers that are gone may have ended for
another reason, which the log then tells too."""
_KILLED = -9
_FEWER = {
    "prepare": "lower -np",
    "train": "lower the environment variable nnUNet_n_proc_DA (processes that augment)",
    "predict": "lower the environment variable nnUNet_def_n_proc (processes that read and write)",
}
USER_ERROR = "bad input: "
"""What a job prints before the sentence about a mistake of the user."""
STAGING = ".unfinished"
"""Folder inside a prediction folder for files that are still being written."""
_LOG_LINES = 15
_NO_SPACE = (os.strerror(errno.ENOSPC), f"[Errno {errno.EDQUOT}]")
"""How Python and PyTorch say that a disk, shared memory or a user's share of a disk is full."""
_PROBE = 1 << 20
"""Bytes that are written to see whether a disk is full: more than what a failed write leaves of its last block."""


def _environment() -> dict[str, str]:
    """This process's environment, with as many nnU-Net workers as there are cores and our trainers registered."""
    _nnunet_oneshot_path.register()
    defaults = {"nnUNet_def_n_proc": str(min(8, default_processes()))}
    return {**defaults, **os.environ, "PYTHONUNBUFFERED": "1"}


def training_environment(device: str) -> dict[str, str]:
    """On the CPU the network needs the cores: augmentation gets half of them, at most nnU-Net's twelve."""
    if device != "cpu" or "nnUNet_n_proc_DA" in os.environ:
        return {}
    return {"nnUNet_n_proc_DA": str(min(12, max(1, default_processes() // 2)))}


class Progress:
    """A progress bar that follows a count of what is done."""

    def __init__(self, title: str, total: int | None, done: Callable[[], int]) -> None:
        self._done = done
        self._bar = progress_bar(title, total)

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, *_: object) -> None:
        self.update()
        self._bar.close()

    def update(self) -> None:
        """Move the bar to what is done by now."""
        self._bar.n = self._done()
        if sys.stderr.isatty():
            self._bar.refresh()  # the clock goes on within an epoch
        else:
            self._bar.update(0)


class Epochs:
    """Counts the epochs in a growing log, from where it ended when this was made."""

    def __init__(self, log: Path) -> None:
        self._log = log
        self._position = log.stat().st_size if log.is_file() else 0
        self._seen = 0

    def count(self) -> int:
        """The number of the epoch in progress, which is how many have ended."""
        if self._log.is_file():
            with self._log.open(errors="replace", encoding="utf-8") as file:
                file.seek(self._position)
                found = re.findall(r": Epoch (\d+)\s*$", file.read(), flags=re.MULTILINE)
            self._seen = int(found[-1]) if found else self._seen
        return self._seen


def run_job(
    job: Mapping[str, Any],
    log: Path,
    follow: Callable[[], None] = lambda: None,
    environment: Mapping[str, str] | None = None,
) -> None:
    """Run a job of nnunet_jobs in a process group of its own; it ends with this process, whatever ends this one.

    Raises:
        OneShotError: the job found a mistake of the user, or no space to write somewhere else than beside the log.
        OSError: it failed and the disk of the log, or the user's share of it, is full.
        NnunetFailureError: it failed otherwise.
    """
    logged = log.stat().st_size if log.is_file() else 0
    with log.open("ab") as output:
        process = subprocess.Popen(
            [sys.executable, "-m", "nnunet_oneshot.nnunet_jobs"],
            stdin=subprocess.PIPE,
            stdout=output,
            stderr=subprocess.STDOUT,
            env={**_environment(), **(environment or {})},
            start_new_session=True,
        )
        try:
            _send(process, job)
            while process.poll() is None:
                follow()
                time.sleep(_POLL_SECONDS)
        finally:
            _end(process)
    if process.returncode:
        end = _end_of(log, logged)
        _, found, sentence = end.rpartition(USER_ERROR)
        if process.returncode == 2 and found:
            raise OneShotError(sentence.splitlines()[0])
        _raise_where_full(log, end)
        advice = _memory_advice(job["job"], process.returncode, end)
        raise NnunetFailureError(f"nnU-Net failed to {job['job']}{advice}; the end of {log}:\n{end}")


def _memory_advice(job: str, code: int, end: str) -> str:
    """What to do where memory seems to have run out; empty elsewhere."""
    if code != _KILLED and not any(words in end for words in _NO_MEMORY):
        return ""
    if re.search(r"CUDA.*out of memory", end):
        return " for lack of GPU memory: end what else uses the GPU, or train smaller plans (-preset small)"
    return f", perhaps for lack of memory: {_FEWER.get(job, 'lower -np')}, and run the same command again"


def _raise_where_full(log: Path, end: str) -> None:
    """OSError where nothing can be written beside the log any more, OneShotError where nnU-Net says so of elsewhere."""
    try:
        with tempfile.TemporaryFile(dir=log.parent) as probe:
            probe.write(bytes(_PROBE))
    except OSError as error:
        # What else may be wrong with the folder is not why nnU-Net failed, or its log says so.
        if error.errno in DISK_FULL:
            raise OSError(error.errno, error.strerror, str(log.parent)) from error
    if said := [line.strip() for line in end.splitlines() if any(words in line for words in _NO_SPACE)]:
        raise OneShotError(
            f"expected space for what nnU-Net writes, found none left ('{said[-1]}', at the end of {log}); free some "
            f"on its disks, in shared memory or in {tempfile.gettempdir()} and run the same command again"
        )


def _send(process: subprocess.Popen[bytes], job: Mapping[str, Any]) -> None:
    assert process.stdin is not None
    process.stdin.write(json.dumps(job).encode() + b"\n")
    process.stdin.flush()


def _end(process: subprocess.Popen[bytes]) -> None:
    """Leave nothing of the process behind, its own workers included."""
    if hasattr(os, "killpg"):
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
    elif process.poll() is None:
        process.kill()
    assert process.stdin is not None
    process.stdin.close()
    process.wait()


def _end_of(log: Path, logged: int) -> str:
    """The last lines of what was added after so many bytes."""
    added = log.read_bytes()[logged:].decode("utf-8", errors="replace")
    return "\n".join(added.splitlines()[-_LOG_LINES:])
