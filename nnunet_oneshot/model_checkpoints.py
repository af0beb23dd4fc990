"""Whose training a checkpoint is of."""

from __future__ import annotations

import pickle
import zipfile
from pathlib import Path
from typing import Any

from nnunet_oneshot.errors import OneShotError


def check_trainer(checkpoint: str | Path, trainer: str, remedy: str) -> None:
    """Refuse a checkpoint that another trainer wrote.

    Args:
        checkpoint: a file of nnU-Net's.
        trainer: name of the class that should have written it.
        remedy: what the user may do about it.

    Raises:
        OneShotError: it is another trainer's, or cut short.
    """
    try:
        found = _trainer_of(Path(checkpoint))
    except (zipfile.BadZipFile, StopIteration, EOFError, pickle.UnpicklingError, KeyError, TypeError) as error:
        # nnU-Net's own trainers write into place, and leave half of it where they are killed amid that.
        raise OneShotError(
            f"{checkpoint}: expected a checkpoint of {trainer}, found a file that cannot be read; {remedy}"
        ) from error
    if found != trainer:
        raise OneShotError(f"{checkpoint}: expected a checkpoint of {trainer}, found one of {found}; {remedy}")


def _trainer_of(checkpoint: Path) -> str:
    """What a checkpoint of nnU-Net's says of its trainer; reads no weights and runs nothing of what is pickled.

    Without torch, which all who import nnunet.py would wait for, table printers and workers too. A checkpoint is a zip
    file whose `data.pkl` is the dictionary, in which tensors refer to the other files.
    """
    with zipfile.ZipFile(checkpoint) as archive:
        name = next(name for name in archive.namelist() if name.endswith("/data.pkl"))
        with archive.open(name) as file:
            return str(_Outline(file).load()["trainer_name"])


class _Anything:
    """Stands in for whatever is pickled beside numbers, text and containers."""

    def __init__(self, *_: Any) -> None:
        """Take what the real one would be made of."""

    def __setitem__(self, key: Any, value: Any) -> None:
        """Take an item, as an ordered dictionary does."""

    def __setstate__(self, state: Any) -> None:
        """Take a state."""


class _Outline(pickle.Unpickler):
    """Reads a pickle with a stand-in for every class, function and tensor."""

    def find_class(self, _module: str, _name: str) -> type[_Anything]:
        return _Anything

    def persistent_load(self, _reference: Any) -> None:
        return None
