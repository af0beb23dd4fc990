"""Evidence on pseudo labels beside their true Dice: what `quality.py` learns from and measures by."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from nnunet_oneshot.dataset import Case, RawDataset
from nnunet_oneshot.prompting import carried_views
from nnunet_oneshot.quality import Opinions, by_source, dice_by_class, estimate, gather, reverse_dice
from nnunet_oneshot.quality_opinions import round_compared, view_scores
from nnunet_oneshot.rounds import kept_manifest
from nnunet_oneshot.second_opinion import source_of
from nnunet_oneshot.store import Store
from sam2_propagation.consensus import fuse
from sam2_propagation.interface import LabelVolume
from sam2_propagation.registration import RegistrationPropagator

Row = dict[str, Any]
"""One class of one case's label: `evidence` by kind, `dice`, `estimate` by the rules in force, and whose it is."""
DEFAULT, REGISTRATION = "default", "registration"


def dataset_rows(store: Store, raw: RawDataset, truth: Path, name: str, registration: bool = False) -> Iterator[Row]:
    """Rows of all un-annotated cases of a dataset, of every round whose labels are kept.

    Args:
        truth: folder of true labels.
        name: of the set.
        registration: give rows of what registration alone would have said, too, judged by its own views and by the
            label carried back, as where nothing else labels.
    """
    for case in raw.unannotated:
        labels = _rounds(store, raw, case)
        if not labels:
            continue
        true = raw.read_label(truth / f"{case.name}{raw.file_ending}")
        kinds = [(DEFAULT, labels, _said(store, raw, case))]
        if registration and (alone := _by_registration(store, raw, case, labels)):
            kinds.append((REGISTRATION, *alone))
        for source, of_rounds, (views, scores) in kinds:
            for number, label in enumerate(of_rounds):
                about = {"set": name, "case": case.name, "round": number, "source": source}
                before = of_rounds[_compared(store, case, number)] if number else None
                judged = _new_in_round(store, raw, case, number) if number else label
                yield from _rows(label, judged, true, Opinions(views, before, scores), about)


def _compared(store: Store, case: Case, number: int) -> int:
    return round_compared(kept_manifest(store, number - 1).cases[case.name], number)


def _rounds(store: Store, raw: RawDataset, case: Case) -> list[LabelVolume]:
    """The case's labels, round by round."""
    labels: list[LabelVolume] = []
    while (path := store.round_path(len(labels), case.name)).is_file():
        labels.append(raw.read_label(path))
    return labels


def _new_in_round(store: Store, raw: RawDataset, case: Case, number: int) -> LabelVolume:
    """What a round's label is judged by: what was said in it, without the label before."""
    predicted = store.state_folder / "predictions" / f"{number:02d}" / f"{case.name}{raw.file_ending}"
    new = [raw.read_label(predicted), *carried_views(raw, store, source_of(number), case.name)]
    return fuse(new, spacing=raw.image_geometry(case)[1]).label


Said = tuple[Mapping[str, Sequence[LabelVolume]], list[dict[str, float]]]


def _said(store: Store, raw: RawDataset, case: Case) -> Said:
    """What all propagators said of a case, by source, and their scores."""
    names = store.read_manifest().cases[case.name].views
    labels = [raw.read_label(store.view_path(*name.split("/", 1), case.name)) for name in names]
    return by_source(names, labels), view_scores(store, names, case.name)


def _by_registration(
    store: Store, raw: RawDataset, case: Case, labels: Sequence[LabelVolume]
) -> tuple[list[LabelVolume], Said] | None:
    """The rounds' labels, the first of them by registration's views alone, and what there is to judge them by."""
    names = [n for n in store.read_manifest().cases[case.name].views if n.startswith(f"{REGISTRATION}/")]
    if len(names) < 2:
        return None
    views = [raw.read_label(store.view_path(*name.split("/", 1), case.name)) for name in names]
    image = raw.read_image(case)
    first = fuse(views, spacing=image.spacing).label
    back = reverse_dice(
        RegistrationPropagator(), raw.support(raw.annotated[0]), image, first, names[0].split("/", 1)[1]
    )
    return [first, *labels[1:]], ({REGISTRATION: views}, [back])


def _rows(label: LabelVolume, judged: LabelVolume, true: LabelVolume, opinions: Opinions, about: Row) -> Iterator[Row]:
    """One row a class that label or truth shows; `judged` is what evidence is of."""
    evidence = gather(judged, opinions)
    estimated = estimate(judged, opinions) or {}
    for value, dice in dice_by_class(label, true, range(1, int(np.max(true, initial=0)) + 1)).items():
        known = {kind: round(agreements[value], 4) for kind, agreements in evidence.items() if value in agreements}
        if known:
            yield {
                **about,
                "class": value,
                "evidence": known,
                "dice": round(dice, 4),
                "estimate": estimated.get(str(value)),
            }
