"""The error that a user's own input causes."""

from __future__ import annotations


class PropagationError(ValueError):
    """Bad input: one sentence that says what was expected, what was found and what to do.

    The command line prints that sentence and exits with 2, without a traceback.
    """
