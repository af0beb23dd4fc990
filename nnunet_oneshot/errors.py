"""The two ways in which a command fails, told apart by its exit code."""

from __future__ import annotations

import errno
from pathlib import Path

from sam2_propagation.errors import PropagationError


class OneShotError(ValueError):
    """Bad input or usage: one sentence with what was expected, what was found and what to do. Exit code 2."""


class NnunetFailureError(RuntimeError):
    """nnU-Net stopped with an error although the input looked good. Carries the end of its log. Exit code 1."""


DISK_FULL = (errno.ENOSPC, errno.EDQUOT)
"""The disk is full, or a user's share of it."""
USER_ERRORS = (OneShotError, PropagationError)
"""A user's mistakes, of either package."""


def cut_short(path: Path, error: Exception | None = None) -> OneShotError:
    """What is said of a file that a library wrote, but not whole: some raise a RuntimeError then, some do nothing."""
    said = f" ({str(error).strip().splitlines()[-1]})" if error is not None and str(error).strip() else ""
    return OneShotError(
        f"{path}: expected the file to be written whole, found it cut short{said}, as a full disk does; free some "
        "space and run the same command again: what is whole is kept"
    )


def other_shape(case: str, image: tuple[int, ...], label: tuple[int, ...]) -> OneShotError:
    """What is said where an image and its label have other shapes, (Z, Y, X), as after the image was replaced."""
    return OneShotError(
        f"case {case}: expected a label of its image's shape {image}, found {label}; put back the image or the label "
        "that fits the other, or make the labels again (propagate --overwrite)"
    )
