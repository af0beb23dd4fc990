"""The two ways in which a command fails, told apart by its exit code."""

from __future__ import annotations

import errno

from sam2_propagation.errors import PropagationError


class OneShotError(ValueError):
    """Bad input or usage: one sentence with what was expected, what was found and what to do. Exit code 2."""


class NnunetFailureError(RuntimeError):
    """nnU-Net stopped with an error although the input looked good. Carries the end of its log. Exit code 1."""


DISK_FULL = (errno.ENOSPC, errno.EDQUOT)
"""The disk is full, or a user's share of it."""
USER_ERRORS = (OneShotError, PropagationError)
"""A user's mistakes, of either package."""
