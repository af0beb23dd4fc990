"""A disk that takes no more than so many bytes a file: writers fail amid a file, as where the disk is full."""

from __future__ import annotations

import importlib
import os
from collections.abc import Iterator
from contextlib import contextmanager

import pytest


@contextmanager
def files_end_at(size: int) -> Iterator[None]:
    """Nothing that this process writes gets longer than `size` bytes meanwhile."""
    if os.name == "nt":
        pytest.skip("needs limits of a process")
    resource = importlib.import_module("resource")
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
