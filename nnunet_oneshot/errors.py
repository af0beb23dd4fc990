"""The errors that a user's mistake raises; the commands turn them into one sentence and exit code 2."""

from __future__ import annotations

from sam2_propagation.errors import PropagationError


class OneShotError(ValueError):
    """Bad input or usage. Its text is one sentence: what was expected, what was found, what to do."""


USER_ERRORS = (OneShotError, PropagationError)
