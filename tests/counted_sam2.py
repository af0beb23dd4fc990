"""A sam2 propagator whose encoder passes are counted from outside, in every process that it is sent to."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

from sam2_propagation.architecture import SAM2Base
from sam2_propagation.sam2 import Sam2Propagator

COUNT = "COUNTED_SAM2"
"""Environment variable that names the file of counts, a line a call."""


class CountedSam2(Sam2Propagator):
    """Arriving in a worker, it wraps `forward_image` there; a test wraps it in its own process by `counting`."""

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        wrap()
        _meet()


def wrap() -> None:
    """Count every slice that any model of this process encodes."""
    SAM2Base.forward_image = _counted(SAM2Base.forward_image)


@contextmanager
def counting() -> Iterator[None]:
    """Count in this process too, for a while."""
    with mock.patch.object(SAM2Base, "forward_image", _counted(SAM2Base.forward_image)):
        yield


def passes(path: Path) -> dict[int, int]:
    """Slices encoded, by process."""
    counts: dict[int, int] = {}
    for line in path.read_text().splitlines() if path.exists() else []:
        process, slices = map(int, line.split())
        counts[process] = counts.get(process, 0) + slices
    return counts


def _meet() -> None:
    """Wait until two workers are there, or one might do all before the other begins."""
    path = Path(os.environ[COUNT])
    with path.open("a") as stream:
        stream.write(f"{os.getpid()} 0\n")
    end = time.monotonic() + 120
    while len(passes(path)) < 2 and time.monotonic() < end:
        time.sleep(0.05)


def _counted(forward: Any) -> Any:
    def counted(self: SAM2Base, batch: Any) -> Any:
        # One short line, appended in one piece.
        with Path(os.environ[COUNT]).open("a") as stream:
            stream.write(f"{os.getpid()} {len(batch)}\n")
        return forward(self, batch)

    return counted
