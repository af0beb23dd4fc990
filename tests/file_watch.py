"""Who opens a folder's files, whatever process and library it is: the kernel says (Linux only)."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest


@contextmanager
def opened_files(*folders: Path) -> Iterator[set[str]]:
    """Names of the files in `folders` that any process opened meanwhile; filled in when the block ends."""
    if sys.platform != "linux":
        pytest.skip("inotify is Linux's")
    inotify = importlib.import_module("inotify_simple")
    found: set[str] = set()
    with inotify.INotify() as watch:
        for folder in folders:
            watch.add_watch(folder, inotify.flags.OPEN)
        yield found
        found |= {event.name for event in watch.read(timeout=0) if not event.mask & inotify.flags.ISDIR}
