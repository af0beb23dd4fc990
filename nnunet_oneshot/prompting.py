"""Labels that are on disk as the prompts of a propagator: another one's, fused, or a model's predictions."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

from nnunet_oneshot.dataset import RawDataset
from nnunet_oneshot.store import Store
from sam2_propagation.consensus import enough_views, fuse
from sam2_propagation.interface import Image, LabelVolume, Propagation, Support
from sam2_propagation.relay import Vote


class _LabelsOnDisk:
    """A propagator of one view that reads what it says; supports are not looked at."""

    name: str
    views: tuple[str, ...] = ("fused",)
    default_views: tuple[str, ...] = ("fused",)
    whole_set = False

    def fit(self, images: Iterable[Image]) -> None:
        """Nothing to learn: the labels are there."""

    def adapt(self, supports: Sequence[Support], views: Sequence[str]) -> None:
        """Nothing to learn: the labels are there."""

    def propagate(
        self, supports: Sequence[Support], queries: Iterable[Image], views: Sequence[str]
    ) -> Iterator[Propagation]:
        """One label for each query, or the reason why there is none."""
        for query in queries:
            label = self._label(query.case)
            reason = None if label is not None else f"{self.name} gave no label that most of its views stand for"
            yield Propagation(query.case, self.views[0], label, reason=reason)

    def _label(self, case: str) -> LabelVolume | None:
        raise NotImplementedError


class CarriedLabels(_LabelsOnDisk):
    """What the views of another propagator agree on by majority.

    Args:
        dataset: the raw dataset whose images the labels belong to.
        store: where the labels are.
        source: the other propagator's name; it has done every case that is asked for.
    """

    def __init__(self, dataset: RawDataset, store: Store, source: str) -> None:
        self.name = source
        self._dataset = dataset
        self._store = store

    def _label(self, case: str) -> LabelVolume | None:
        return carried_label(self._dataset, self._store, self.name, case)


class RegisteredLabels:
    """What registration said of a set, for labels to be carried on from there.

    Args:
        dataset: the raw dataset.
        store: where the labels are.
        cases: every case that registration was asked for.
    """

    def __init__(self, dataset: RawDataset, store: Store, cases: Sequence[str]) -> None:
        self._dataset = dataset
        self._store = store
        self._cases = list(cases)

    def cases(self) -> Sequence[str]:
        """Every case, those that are not done yet too."""
        return self._cases

    def image(self, case: str) -> Image:
        """The image of a case."""
        return self._dataset.read_image(self._dataset.case(case))

    def votes(self, case: str) -> list[Vote]:
        """The views of a case that succeeded, where these are most of what was attempted."""
        record = self._store.read_worker("registration", case)
        labels = carried_views(self._dataset, self._store, "registration", case)
        if record is None or not labels:
            return []
        similar = [view.scores["similarity_after"] for view in record.views.values() if view.label]
        return [Vote(label, similarity) for label, similarity in zip(labels, similar, strict=True)]


class PredictedLabels(_LabelsOnDisk):
    """A model's predictions.

    Args:
        dataset: the raw dataset whose images were predicted.
        folder: one label a case.
    """

    name = "model"

    def __init__(self, dataset: RawDataset, folder: Path) -> None:
        self._dataset = dataset
        self._folder = folder

    def shows_anything(self, case: str) -> bool:
        """Whether there is any foreground in what the model predicted of a case."""
        return bool(self._label(case).any())

    def _label(self, case: str) -> LabelVolume:
        return self._dataset.read_label(self._folder / f"{case}{self._dataset.file_ending}")


def carried_views(dataset: RawDataset, store: Store, source: str, case: str) -> list[LabelVolume]:
    """A source's views of a case; none where it has not most of those that were attempted."""
    record = store.read_worker(source, case)
    given = [view for view, result in record.views.items() if result.label] if record else []
    if record is None or not enough_views(len(given), len(record.views)):
        return []
    return [dataset.read_label(store.view_path(source, view, case)) for view in given]


def carried_label(dataset: RawDataset, store: Store, source: str, case: str) -> LabelVolume | None:
    """The majority of a source's views of a case, None where it has not most of the views that were attempted."""
    views = carried_views(dataset, store, source, case)
    return fuse(views).label if views else None
