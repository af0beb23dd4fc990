"""Labels that one propagator has carried already, as the prompts of another: made once, and fused."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

from nnunet_oneshot.dataset import RawDataset
from nnunet_oneshot.store import Store
from sam2_propagation.consensus import enough_views, fuse
from sam2_propagation.interface import Image, LabelVolume, Propagation, Support


class CarriedLabels:
    """A propagator that says what the views of another one, on disk, agree on by majority.

    Args:
        dataset: the raw dataset whose images the labels belong to.
        store: where the labels are.
        source: the other propagator's name; it has done every case that is asked for.
    """

    views: tuple[str, ...] = ("fused",)
    default_views: tuple[str, ...] = ("fused",)
    whole_set = False

    def __init__(self, dataset: RawDataset, store: Store, source: str) -> None:
        self.name = source
        self._dataset = dataset
        self._store = store

    def fit(self, images: Iterable[Image]) -> None:
        """Nothing to learn: the labels are there."""

    def adapt(self, supports: Sequence[Support], views: Sequence[str]) -> None:
        """Nothing to learn: the labels are there."""

    def propagate(
        self, supports: Sequence[Support], queries: Iterable[Image], views: Sequence[str]
    ) -> Iterator[Propagation]:
        """One label for each query, or the reason why there is none; supports are not looked at."""
        for query in queries:
            label = self._fused(query.case)
            reason = None if label is not None else f"{self.name} gave no label that most of its views stand for"
            yield Propagation(query.case, self.views[0], label, reason=reason)

    def _fused(self, case: str) -> LabelVolume | None:
        record = self._store.read_worker(self.name, case)
        given = [view for view, result in record.views.items() if result.label] if record else []
        if record is None or not enough_views(len(given), len(record.views)):
            return None
        paths = (self._store.view_path(self.name, view, case) for view in given)
        return fuse([self._dataset.read_label(path) for path in paths]).label
