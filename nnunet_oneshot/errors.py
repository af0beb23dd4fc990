"""The two ways in which a command fails, told apart by its exit code."""

from __future__ import annotations


class OneShotError(ValueError):
    """Bad input or usage: one sentence with what was expected, what was found and what to do. Exit code 2."""


class NnunetFailureError(RuntimeError):
    """nnU-Net stopped with an error although the input looked good. Carries the end of its log. Exit code 1."""
