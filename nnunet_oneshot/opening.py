"""Opening a pseudo-label dataset: its store, and the source dataset that holds its images."""

from __future__ import annotations

from collections.abc import Sequence

from nnunet_oneshot.dataset import RawDataset, find_raw_folder, open_source
from nnunet_oneshot.errors import OneShotError
from nnunet_oneshot.store import Store, read_manifest
from nnunet_oneshot.training_data import check_labels


def open_store(dataset: int | str, grown: bool = False) -> tuple[Store, RawDataset]:
    """A pseudo-label dataset's store and the raw dataset that holds its images.

    Args:
        dataset: id or name.
        grown: accept images that were added since.

    Raises:
        OneShotError: no such dataset, no manifest, or cases or label values that the source dataset no longer has.
    """
    folder = find_raw_folder(dataset)
    manifest = read_manifest(folder / "oneshot.json")
    raw = open_source(manifest.source_dataset, folder)
    check_labels(raw, folder)
    names, before = {c.name for c in raw.cases}, set(manifest.cases)
    gone, added = sorted(before - names), sorted(names - before)
    if gone or (added and not grown):
        found = f"no images of {_first_of(gone)}" if gone else f"{_first_of(added)} beside them"
        raise OneShotError(
            f"{folder.name}: expected the cases of {raw.name} to be those it was made of, found {found}; "
            f"{'put back those that are gone' if gone else 'refine'} or propagate again with --overwrite"
        )
    return Store(folder, raw.file_ending), raw


def _first_of(cases: Sequence[str]) -> str:
    return cases[0] if len(cases) == 1 else f"{cases[0]} and {len(cases) - 1} more"
