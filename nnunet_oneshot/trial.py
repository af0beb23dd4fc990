"""A trial before a night's work: a few cases that span the set, carried, and what to expect of all of them.

Registered labels are carried back to the annotated case as well (`--reverse_check`), which tells most of how far they
can be trusted. A trial makes no dataset in nnUNet_raw. Everything it makes lies in one folder of the working directory:
nnU-Net's folders with the few cases (their images referenced, not copied), a picture, and the figures as JSON.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from nnunet_oneshot.checks import check_for_propagation
from nnunet_oneshot.dataset import Case, RawDataset, open_dataset
from nnunet_oneshot.errors import OneShotError
from nnunet_oneshot.output import check_writable, find_output, nnunet_folders
from nnunet_oneshot.parallel import FEW, default_processes, over_cases
from nnunet_oneshot.propagate import Outcome, PropagatorOptions, propagate
from nnunet_oneshot.propagators import DEFAULT, REVERSIBLE, fitting_names
from nnunet_oneshot.report_pictures import Overlay
from nnunet_oneshot.store import CaseRecord, Store
from nnunet_oneshot.training_data import ignore_value
from nnunet_oneshot.trial_cases import Chosen, Features, choose, evenly, statistics
from nnunet_oneshot.trial_picture import Tile, draw

MARK = "trial.json"


@dataclass(frozen=True)
class TrialCase:
    """What a trial found of one case.

    Attributes:
        case: its name.
        share: the share of the set that it stands for.
        quality: estimated Dice, by label value and `mean`; None where no label was made.
        divergence: share of all voxels without consensus.
        divergence_of_foreground: divergent voxels among those that any view calls foreground, or that diverge.
        seconds: wall-clock of all propagators, one after the other, once they have learnt.
        reason: why there is no label.
    """

    case: str
    share: float
    quality: dict[str, float] | None
    divergence: float
    divergence_of_foreground: float
    seconds: float
    reason: str | None


@dataclass
class Trial:
    """What to expect of the whole set.

    Attributes:
        folder: where everything lies.
        cases: the cases tried, the one that stands for most first.
        set_size: images that the whole run would label.
        quality: estimated mean Dice of the set, each case weighed by its share; None where nothing was labelled.
        divergence: expected share of voxels without consensus.
        divergence_of_foreground: the same of the voxels in and around the structures.
        preparation: seconds in which propagators learn before any case (correspondence's network, -adapt); next to
            none where an earlier run of the same images kept a network.
        minutes: expected wall-clock of the whole run's labelling with as many processes, with the reverse check and
            the preparation; of cases that a person drew in part too, which the run completes.
        megabytes: expected disk of the whole run's labels, of the same cases.
        annotate_next: the case whose annotation would help most if one label is not enough.
        warnings: what a user should know.
    """

    folder: Path
    cases: list[TrialCase]
    set_size: int
    quality: float | None
    divergence: float
    divergence_of_foreground: float
    preparation: float
    minutes: float
    megabytes: float
    annotate_next: str | None
    warnings: list[str] = field(default_factory=list)

    @property
    def picture(self) -> Path:
        """The picture of all cases tried."""
        return self.folder / "trial.png"


def trial(
    dataset: int | str,
    output: int,
    cases: int = 5,
    *,
    propagators: Sequence[str] = DEFAULT,
    views: Sequence[str] | None = None,
    options: PropagatorOptions | None = None,
    num_processes: int | None = None,
    folder: Path | None = None,
) -> Trial:
    """Propagate to a few cases that span the set and tell what to expect of all.

    Args:
        dataset: id or name of the raw dataset with the annotated case(s).
        output: id that the whole run's dataset would have; it is checked, and nothing is written there.
        cases: how many to try.
        propagators, views, options, num_processes: as in `propagate`.
        folder: where to write; `oneshot_trial_<dataset>` in the working directory when None. An earlier trial there
            is replaced.

    Raises:
        OneShotError: whatever `propagate` refuses, or a folder that holds something else or another trial at work, or
            that cannot be written to.
    """
    if cases < 1:
        raise OneShotError(f"expected -n of 1 or more cases to try, found {cases}; give a number such as 5")
    raw = open_dataset(dataset)
    warnings = check_for_propagation(raw)
    find_output(dataset, output)
    place = (folder or Path(f"oneshot_trial_{raw.id:03d}")).resolve()
    check_writable(place)
    processes = num_processes or default_processes()
    names, left = fitting_names(propagators, [raw.support(case) for case in raw.annotated])
    checked = replace(options or PropagatorOptions(), reverse_check=bool({*names} & {*REVERSIBLE}))
    partly = _partly_drawn(raw)
    to_label = raw.unannotated or partly
    # Before the place is emptied: an image that cannot be read must not cost the trial of before.
    chosen = _choose(raw, to_label, cases, processes)
    with _place_of_its_own(place):
        with nnunet_folders(place):
            tried = [c.case for c in chosen]
            _lay_out(raw, tried, to_label)
            outcome = propagate(
                raw.id, output, propagators=names, views=views, options=checked, num_processes=num_processes, only=tried
            )
            small = open_dataset(raw.id)
            found = [_found(small, outcome.store, entry) for entry in chosen]
            _draw(small, outcome.store, found, place / "trial.png")
        labelled = len(raw.unannotated) + len(partly)
        result = _expect(len(to_label), labelled, outcome, found, place)
        result.warnings = [*warnings, *left]
        content = {**asdict(result), "folder": str(place)}
        (place / MARK).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    return result


def _partly_drawn(raw: RawDataset) -> list[Case]:
    """The annotated cases that a person drew in part; where no image is un-annotated, they are what is tried."""
    drawn = ((case, case.label) for case in raw.annotated)
    return [c for c, path in drawn if path is not None and raw.is_sparse(raw.read_label(path))]


def _choose(raw: RawDataset, to_label: Sequence[Case], count: int, processes: int) -> list[Chosen]:
    """Cases that span those to label."""
    by_name = {case.name: case for case in to_label}
    tasks = [(raw, by_name[name]) for name in evenly(sorted(by_name))]
    features = dict(over_cases(_statistics, tasks, processes=processes, title="look at images", few=FEW))
    lengths = {len(vector) for vector in features.values()}
    if len(lengths) > 1:
        raise OneShotError(f"{raw.name}: expected images of one number of channels, found several; correct the images")
    return choose(features, count)


def _statistics(task: tuple[RawDataset, Case]) -> tuple[str, Features]:
    raw, case = task
    return case.name, statistics(raw.read_image(case))


@contextmanager
def _place_of_its_own(place: Path) -> Iterator[None]:
    """The folder of a trial, emptied of an earlier one; OneShotError where another trial is at work in it."""
    store = Store(place, "")
    others = [path for path in place.iterdir() if path != store.state_folder] if place.is_dir() else []
    if others and not (place / MARK).is_file():
        raise OneShotError(
            f"expected {place} to be free or to hold an earlier trial, found other files; run the trial in another "
            "working directory"
        )
    with store.lock("trial"):
        # There from the beginning, so that a trial that was stopped can be replaced.
        (place / MARK).write_text("{}\n", encoding="utf-8")
        for path in {*place.iterdir()} - {place / MARK, store.state_folder}:
            if path.is_dir() and not path.is_symlink():
                shutil.rmtree(path)
            else:
                path.unlink()
        yield


def _lay_out(raw: RawDataset, chosen: Sequence[str], to_label: Sequence[Case]) -> None:
    """A raw dataset without the cases to label that are not chosen; it refers to the files of all others."""
    left_out = {case.name for case in to_label} - set(chosen)
    folder = Path(os.environ["nnUNet_raw"]) / raw.name
    folder.mkdir()
    entries: dict[str, dict[str, Any]] = {}
    for case in (c for c in raw.cases if c.name not in left_out):
        # Links are not followed: readers go by a file's ending and look for a TIFF's spacing beside it.
        entries[case.name] = {"images": [str(path.absolute()) for path in case.images]}
        if case.label is not None:
            entries[case.name]["label"] = str(case.label.absolute())
    (folder / "dataset.json").write_text(json.dumps({**raw.json, "dataset": entries}), encoding="utf-8")


def _found(raw: RawDataset, store: Store, entry: Chosen) -> TrialCase:
    record: CaseRecord = store.read_manifest().cases[entry.case]
    guess, target = (raw.read_label(path) for path in (store.fused_path(entry.case), store.label_path(entry.case)))
    ignored = target == ignore_value(raw)
    around = (guess > 0) | ignored
    reason = record.reason if record.status == "failed" else None
    return TrialCase(
        entry.case,
        entry.share,
        record.quality,
        round(float(ignored.mean()), 5),
        round(float(ignored.sum() / max(1, around.sum())), 4),
        round(sum(_seconds(store, entry.case).values()), 2),
        reason,
    )


def _seconds(store: Store, case: str) -> dict[str, float]:
    """Wall-clock of a case by source."""
    names = [folder.name for folder in (store.state_folder / "cases").iterdir()]
    records = {name: store.read_worker(name, case) for name in names}
    return {name: record.seconds for name, record in records.items() if record is not None}


def _expect(size: int, labelled: int, outcome: Outcome, found: list[TrialCase], place: Path) -> Trial:
    """What to expect by what was found of a few of `size` images, of a run that labels so many cases."""
    shares = np.array([case.share for case in found])
    rated = [(case.share, case.quality["mean"]) for case in found if case.quality is not None]
    known = sum(share for share, _ in rated)
    seconds = outcome.preparation + sum(
        case.share * seconds * labelled / min(outcome.workers[source], labelled)
        for case in found
        for source, seconds in _seconds(outcome.store, case.case).items()
    )
    return Trial(
        folder=place,
        cases=found,
        set_size=size,
        quality=round(sum(share * mean for share, mean in rated) / known, 4) if rated else None,
        divergence=round(float((shares * [case.divergence for case in found]).sum()), 5),
        divergence_of_foreground=round(float((shares * [case.divergence_of_foreground for case in found]).sum()), 4),
        preparation=round(outcome.preparation, 2),
        minutes=round(seconds / 60, 1),
        megabytes=round(_written(outcome.store, found) / len(found) * labelled / 1e6, 3),
        annotate_next=max(found, key=_worth).case if found else None,
    )


def _written(store: Store, found: Sequence[TrialCase]) -> int:
    """Bytes of what was written of the cases that were tried; what there is of others does not grow with the set."""
    names = {f"{case.case}{ending}" for case in found for ending in (store.file_ending, ".json")}
    return sum(path.stat().st_size for path in store.folder.rglob("*") if path.name in names)


def _worth(case: TrialCase) -> float:
    """How much annotating a case promises: what is wrong with it, times the share of the set that is like it."""
    return case.share * (1 - (case.quality["mean"] if case.quality is not None else 0))


def _draw(raw: RawDataset, store: Store, found: Sequence[TrialCase], path: Path) -> None:
    tiles = []
    for case in found:
        guess, target = (raw.read_label(p) for p in (store.fused_path(case.case), store.label_path(case.case)))
        overlay = Overlay(raw.read_image(raw.case(case.case)), guess, target == ignore_value(raw))
        said = "no label" if case.quality is None else f"estimated Dice {case.quality['mean']:.2f}"
        tiles.append(Tile(overlay, f"{case.case}: {said}, stands for {case.share:.0%}"))
    draw(tiles, path)
