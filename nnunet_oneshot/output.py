"""Make, resume or replace the output dataset's folder."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from nnunet_oneshot.dataset import RawDataset, dataset_id, open_dataset, raw_root
from nnunet_oneshot.errors import OneShotError
from nnunet_oneshot.store import Store
from nnunet_oneshot.training_data import preprocessed_folder

NNUNET_ROOTS = ("nnUNet_raw", "nnUNet_preprocessed", "nnUNet_results")
LABEL_SUMS = "annotated"
"""Setting that holds the sha256 of each annotated case's label file: labels carried from others are others."""


@contextmanager
def nnunet_folders(folder: Path) -> Iterator[None]:
    """nnU-Net's three folders inside this one, whatever the environment says otherwise."""
    before = {name: os.environ.get(name) for name in NNUNET_ROOTS}
    for name in NNUNET_ROOTS:
        (folder / name).mkdir(exist_ok=True)
        os.environ[name] = str((folder / name).resolve())
    try:
        yield
    finally:
        for name, value in before.items():
            os.environ.pop(name)
            if value is not None:
                os.environ[name] = value


def find_output(dataset: int | str, output: int | str) -> Store:
    """The store that `create_output` would give, without touching the disk."""
    return _store(open_dataset(dataset), output)


def create_output(dataset: RawDataset, output: int | str, settings: Mapping[str, Any], overwrite: bool) -> Store:
    """The output dataset's store: a new one, an interrupted one to go on with, or one emptied for `overwrite`.

    Raises:
        OneShotError: output id equal to the input's or taken, a run of other settings begun there, no permission.
    """
    store = _store(dataset, output)
    check_writable(store.folder, preprocessed_folder(store))
    if store.folder.exists():
        _enter(store, settings, overwrite)
    _make(store, settings)
    store.remove_leftovers()
    return store


def _store(dataset: RawDataset, output: int | str) -> Store:
    number = dataset_id(output)
    name = f"Dataset{number:03d}_{dataset.name.split('_', 1)[1]}_oneshot"
    if number == dataset.id:
        raise OneShotError(f"expected an output id other than the input's, found {number} for both; choose another -o")
    for variable in NNUNET_ROOTS:
        root = os.environ.get(variable)
        for taken in sorted(Path(root).glob(f"Dataset{number:03d}_*")) if root else ():
            if taken.name != name:
                raise OneShotError(f"expected the output id {number:03d} to be free, found {taken}; choose another -o")
    return Store(raw_root() / name, dataset.file_ending)


def _enter(store: Store, settings: Mapping[str, Any], overwrite: bool) -> None:
    """Decide what to do with a folder that is there: refuse, resume or empty it."""
    begun = _begun(store)
    # A run that was killed at its very beginning, or while it emptied the folder, leaves nothing but its state folder.
    if begun is None and any(path != store.state_folder for path in store.folder.iterdir()):
        raise OneShotError(
            f"expected {store.folder} to be free, found a dataset that nnunet-oneshot did not make; choose another -o"
        )
    if overwrite:
        store.check_idle()
        _remove(store)
    elif store.manifest_path.is_file():
        raise OneShotError(
            f"expected {store.folder.name} not to exist, found it complete; add --overwrite to replace "
            "it or choose another -o"
        )
    elif begun is not None and begun != settings:
        raise OneShotError(
            f"{store.folder.name}: expected the settings and annotated labels of the run that was begun there, found "
            f"{', '.join(differences(begun, settings))}; go back to those, or add --overwrite to label every case anew"
        )


def differences(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """What settings `now` say otherwise than those of `before`, in words."""
    keys = sorted({*before, *now} - {LABEL_SUMS})
    said = [f"{k} {_said(now, k)} instead of {_said(before, k)}" for k in keys if before.get(k) != now.get(k)]
    old, new = before.get(LABEL_SUMS, {}), now.get(LABEL_SUMS, {})
    for case in sorted(case for case in {*old, *new} if old.get(case) != new.get(case)):
        what = "no label" if case not in new else "another label" if case in old else "a new label"
        said.append(f"{what} of {case}")
    return said


def _said(settings: Mapping[str, Any], key: str) -> str:
    return json.dumps(settings[key]) if key in settings else "none"


def _begun(store: Store) -> dict[str, Any] | None:
    path = store.state_folder / "settings.json"
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else None


def _remove(store: Store) -> None:
    # The marker goes last, so that an interrupted removal can be taken up again.
    for path in sorted(store.folder.iterdir(), key=lambda p: p == store.state_folder):
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    # What nnU-Net derived from the old labels must not be trained on.
    shutil.rmtree(preprocessed_folder(store), ignore_errors=True)


def _make(store: Store, settings: Mapping[str, Any]) -> None:
    store.state_folder.mkdir(parents=True, exist_ok=True)
    if _begun(store) is None:
        store.write_json(settings, store.state_folder / "settings.json")
    preprocessed_folder(store).mkdir(parents=True, exist_ok=True)


def check_writable(*folders: Path) -> None:
    """OneShotError where nothing can be written to a folder, or to the nearest one above that exists."""
    for folder in folders:
        there = next(path for path in (folder, *folder.parents) if path.exists())
        try:
            with tempfile.TemporaryFile(dir=there):
                pass
        except OSError as error:
            raise OneShotError(
                f"expected permission to write to {there}, found none ({error.strerror}); choose another folder or "
                "change its permissions"
            ) from error
