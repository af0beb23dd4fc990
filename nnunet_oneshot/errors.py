"""The one error that a user's mistake raises."""

from __future__ import annotations


class OneShotError(ValueError):
    """Bad input: one sentence that says what was expected, what was found and what to do. The commands exit with 2."""
