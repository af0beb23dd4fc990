"""What a case's label is judged by, as it lies in the pseudo-label dataset."""

from __future__ import annotations

from collections.abc import Sequence

from nnunet_oneshot.dataset import RawDataset
from nnunet_oneshot.quality import Opinions, by_source
from nnunet_oneshot.store import LEFT_OUT, CaseRecord, Store
from sam2_propagation.interface import LabelVolume
from sam2_propagation.physical_space import PhysicalSpacePropagator


def opinions(dataset: RawDataset, store: Store, name: str, record: CaseRecord, before: LabelVolume | None) -> Opinions:
    """A case's views on disk, their scores, and the label `before` that its change is told from."""
    there = {f"{s}/{v}": store.view_path(s, v, name) for s, v in _named(independent(record.views))}
    views = {view: path for view, path in there.items() if path.is_file()}
    labels = [dataset.read_label(path) for path in views.values()]
    return Opinions(by_source(list(views), labels), before, view_scores(store, record.views, name))


def independent(views: Sequence[str]) -> list[str]:
    """The views `source/view` whose agreement says anything of a label.

    Those by place in space are one label that is continued in two ways beyond the annotated image: where that image
    reaches they agree even if the patient moved.
    """
    by_place = PhysicalSpacePropagator.name
    return [view for view in views if not view.startswith(f"{by_place}/")]


def round_compared(record: CaseRecord, number: int) -> int:
    """The round whose label a case's new one of round `number` is held against; `record` is of the round before.

    Round 0's, as where the rules were learnt: from round to round a model agrees more and more with itself, rightly or
    not. The round before where nothing was carried, and where the case was not trained on: there the model says the
    same again without having been taught it.
    """
    return 0 if record.views and record.status not in LEFT_OUT else number - 1


def view_scores(store: Store, views: Sequence[str], name: str) -> list[dict[str, float]]:
    """Label-free figures of the propagation of each view `source/view`."""
    named = _named(views)
    workers = {source: store.read_worker(source, name) for source, _ in named}
    known = ((workers[source], view) for source, view in named)
    return [worker.views[view].scores for worker, view in known if worker is not None and view in worker.views]


def _named(views: Sequence[str]) -> list[tuple[str, str]]:
    """Source and name of each view `source/view`."""
    split = [view.partition("/") for view in views]
    return [(source, view) for source, _, view in split]
