"""Round 0: carry the labels of the annotated cases to every other image and fuse what the views say."""

from __future__ import annotations

import time
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import groupby
from pathlib import Path
from typing import Any

from tqdm import tqdm

from nnunet_oneshot.checks import check_for_propagation, check_images
from nnunet_oneshot.consensus import build
from nnunet_oneshot.dataset import Case, RawDataset, open_dataset
from nnunet_oneshot.errors import OneShotError
from nnunet_oneshot.output import LABEL_SUMS, create_output, differences
from nnunet_oneshot.parallel import advance, default_processes, over_cases, processes_on, show
from nnunet_oneshot.prompting import CarriedLabels, RegisteredLabels
from nnunet_oneshot.propagators import (
    DEFAULT,
    REVERSIBLE,
    PropagatorOptions,
    check_options,
    choose_views,
    describe,
    fitting_names,
    make_propagators,
    prepare,
)
from nnunet_oneshot.quality import reverse_scores
from nnunet_oneshot.same_patient import read_pairs, read_same_patient
from nnunet_oneshot.store import Manifest, Source, Store, ViewRecord, WorkerRecord
from sam2_propagation.download import file_sum
from sam2_propagation.interface import Image, Propagation, Propagator, Support
from sam2_propagation.physical_space import PhysicalSpacePropagator
from sam2_propagation.relay import RelayPropagator, candidates
from sam2_propagation.sam2 import Sam2Propagator


@dataclass(frozen=True)
class Job:
    """One propagator at work on one dataset; workers get it once."""

    dataset: RawDataset
    store: Store
    propagator: Propagator
    views: tuple[str, ...]
    reverse_check: bool = False


@dataclass
class Outcome:
    """What `propagate` did.

    Attributes:
        store: the output dataset.
        manifest: the manifest, or None while other shards are still at work.
        warnings: what a user should know.
        seconds: wall-clock of labelling, checks and fusion included.
        preparation: that part of it in which propagators learnt (`fit` and `adapt`) before any case was labelled.
        workers: cases that each source labels at once, of as many as there may be.
    """

    store: Store
    manifest: Manifest | None
    warnings: list[str] = field(default_factory=list)
    seconds: float = 0.0
    preparation: float = 0.0
    workers: dict[str, int] = field(default_factory=dict)


def propagate(
    dataset: int | str,
    output: int,
    *,
    propagators: Sequence[str] = DEFAULT,
    views: Sequence[str] | None = None,
    options: PropagatorOptions | None = None,
    num_processes: int | None = None,
    num_parts: int = 1,
    part_id: int = 0,
    overwrite: bool = False,
    same_patient: Path | None = None,
    only: Collection[str] | None = None,
) -> Outcome:
    """Make dataset BBB: a pseudo label for every un-annotated image, divergence as ignore.

    Resumes an interrupted run of the same settings from whole cases.

    Args:
        dataset: id or name of the raw dataset with at least one annotated case.
        output: id of the dataset to write, `DatasetBBB_<name>_oneshot`.
        propagators: their names; all their views are fused.
        views: names of views to use; each propagator's default ones when None.
        options: how propagators are set up.
        num_processes: cases labelled at once; the processor count when None, of propagators on a CUDA device two.
        num_parts: shards the cases are dealt out to; the last one to finish fuses.
        part_id: this shard, from 0.
        overwrite: replace an output dataset that exists.
        same_patient: file that pairs un-annotated cases with an annotated one of the same patient (see
            `read_same_patient`); these get its label by their place in space, and no propagator labels them.
        only: the cases to label, for a trial in which others, that a person drew in part, teach alone; all when None.

    Raises:
        OneShotError: bad input, one sentence (see the contract's list).
    """
    begin = time.monotonic()
    _check_parts(num_parts, part_id, overwrite)
    raw = open_dataset(dataset)
    warnings = check_for_propagation(raw)
    options = options or PropagatorOptions()
    supports = [raw.support(case) for case in raw.annotated]
    names, left = fitting_names(propagators, supports)
    warnings += left
    check_options(names, options)
    made = make_propagators(names, options, supports)
    prepare(made.values())
    _check_whole_sets(made, num_parts)
    chosen = choose_views(made, views, supports)
    _check_sam2(raw, made.get("sam2"), supports, chosen)
    patients = {} if same_patient is None else read_same_patient(same_patient, raw)
    processes = num_processes or default_processes()
    check_images(raw, processes)
    settings = _settings(chosen, options) | {LABEL_SUMS: _label_sums(raw)}
    if patients:
        known = PhysicalSpacePropagator(patients)
        made[known.name], chosen[known.name], settings[known.name] = known, known.views, patients
    store = create_output(raw, output, settings, overwrite)
    preparation, workers = 0.0, {name: _workers(made[name], options, num_processes) for name in made}
    with store.lock(f"propagate-{part_id}-of-{num_parts}"):
        _connect(made, raw, store, patients)
        for name in sorted(made, key=_turn):
            # Relays carry their labels back by themselves, and registration's are in these.
            reverse = options.reverse_check and name in REVERSIBLE and "relay" not in made
            job = Job(raw, store, made[name], chosen[name], reverse)
            queries = _queries(raw, name, patients, only)
            preparation += carry(job, _share(job, queries, made, patients, (num_parts, part_id)), workers[name])
        whole = all(_is_done(store, name, _queries(raw, name, patients, only)) for name in made)
        # Where two are as deep in what they say, the first is believed, which redraws what the others carried.
        sources = {name: describe(made[name], options) for name in sorted(made, key=_turn, reverse=True)}
        manifest = _fused(raw, store, sources, settings, processes) if whole else None
    return Outcome(store, manifest, warnings, time.monotonic() - begin, preparation, workers)


def check_repeated(
    dataset: RawDataset,
    store: Store,
    propagators: Sequence[str],
    views: Sequence[str] | None,
    options: PropagatorOptions,
    same_patient: Path | None,
) -> None:
    """Check that the labels of a finished dataset are those that `propagate` would be asked for with these arguments.

    Annotated labels may have changed since: `refine` takes them up. No weights are loaded.

    Raises:
        OneShotError: other propagators, views, options or pairs of cases.
    """
    supports = [dataset.support(case) for case in dataset.annotated]
    names, _ = fitting_names(propagators, supports)
    check_options(names, options)
    made = make_propagators(names, options, supports)
    manifest = store.read_manifest()
    before = {key: value for key, value in manifest.settings.items() if key != LABEL_SUMS}
    chosen = choose_views(made, views, supports)
    if views is None:
        # Default views follow what people drew, which may have changed since.
        chosen |= {name: own for name, own in before.get("views", {}).items() if name in chosen}
    now = _settings(chosen, options) | _pairs_now(dataset, same_patient, manifest)
    if found := differences(before, now):
        raise OneShotError(
            f"{store.folder.name}: expected the settings of its labels, which are finished, found {', '.join(found)}; "
            "repeat those, add --overwrite to label anew, or keep the labels and go on by nnUNetv2_oneshot_refine"
        )


def _settings(chosen: Mapping[str, Sequence[str]], options: PropagatorOptions) -> dict[str, Any]:
    return {"views": {name: list(views) for name, views in chosen.items()}, **options.settings()}


def _label_sums(raw: RawDataset) -> dict[str, str]:
    return {case.name: file_sum(case.label) for case in raw.annotated if case.label is not None}


def _pairs_now(raw: RawDataset, same_patient: Path | None, manifest: Manifest) -> dict[str, dict[str, str]]:
    """The setting that a file of pairs makes; images annotated or added since make no difference."""
    if same_patient is None:
        return {}
    apart, cases = PhysicalSpacePropagator.name, {case.name for case in raw.unannotated}
    since = {c: s for c, s in manifest.settings.get(apart, {}).items() if c not in cases}
    pairs = {c: s for c, s in read_pairs(same_patient, raw).items() if c in cases and c in manifest.cases}
    return {apart: since | pairs}


def _fused(
    raw: RawDataset, store: Store, sources: Mapping[str, Source], settings: Mapping[str, Any], processes: int
) -> Manifest:
    """Fuse what was carried; of two shards that end at once the second finds the labels fused."""
    with store.lock("consensus", wait=True):
        if store.manifest_path.is_file():
            return store.read_manifest()
        return build(raw, store, sources, settings, processes)


def _turn(name: str) -> int:
    """Who carries labels when: relays after registration, whose labels they carry on; SAM2 last, which all prompt."""
    return {"relay": 1, "sam2": 2}.get(name, 0)


def _connect(made: Mapping[str, Propagator], raw: RawDataset, store: Store, patients: Collection[str]) -> None:
    """What others carried is read from the store and not made again."""
    relay, sam2 = made.get("relay"), made.get("sam2")
    if isinstance(relay, RelayPropagator):
        relay.registered = RegisteredLabels(raw, store, _passing(raw, patients))
    if isinstance(sam2, Sam2Propagator):
        sam2.progress = _advance_slices
        # What is prompted looks at itself alone; the few images without a prompt encode what they draw on.
        sam2.keep_own = bool(raw.unannotated) and sam2.prompter is None
        if sam2.prompter is not None and sam2.prompter.name in made:
            sam2.prompter = CarriedLabels(raw, store, sam2.prompter.name if relay is None else relay.name)


def _advance_slices(done: float, of: int) -> None:
    advance(done / of)


def _check_parts(num_parts: int, part_id: int, overwrite: bool) -> None:
    if num_parts < 1:
        raise OneShotError(f"expected -num_parts of 1 or more, found {num_parts}; leave it out for one part")
    if not 0 <= part_id < num_parts:
        raise OneShotError(f"expected -part_id from 0 to {num_parts - 1}, found {part_id}; count parts from 0")
    if overwrite and part_id:
        raise OneShotError(
            f"expected --overwrite with part 0 alone, found it with part {part_id}, which would remove what other "
            "parts have done; start part 0 with it first"
        )


def _check_whole_sets(propagators: Mapping[str, Propagator], num_parts: int) -> None:
    for name, propagator in propagators.items():
        if propagator.whole_set and num_parts > 1:
            raise OneShotError(
                f"expected -num_parts 1 with {name}, which must see all images at once, found {num_parts}; "
                "leave -num_parts out"
            )


def _check_sam2(
    dataset: RawDataset,
    propagator: Propagator | None,
    supports: Sequence[Support],
    chosen: Mapping[str, tuple[str, ...]],
) -> None:
    """PropagationError where annotated cases, views or the mode do not fit each other, before anything is written."""
    if not isinstance(propagator, Sam2Propagator):
        return
    propagator.check(supports, chosen["sam2"])
    fit = propagator.settings.check_fit
    for support in supports:
        # An annotated case that is whole is no query: no mode asks it for a sparse label.
        whole = not (support.label == support.ignore).any()
        fit(support.image.case, support.image.shape, sparse=whole or bool(support.classes))
    for case in dataset.unannotated[:1]:
        fit(case.name, dataset.image_geometry(case)[0], sparse=False)


def carry(job: Job, cases: Sequence[Case], processes: int) -> float:
    """Run one propagator over the cases that are not done yet and write views and worker records.

    Returns the seconds in which it learnt before the first case.
    One that must see the whole set sees it again: what it says of a case depends on the others.
    """
    name = job.propagator.name
    todo = [case for case in cases if job.store.read_worker(name, case.name) is None]
    if not todo:
        return 0.0
    begin = time.monotonic()
    job.propagator.fit(_images(job.dataset, job.dataset.cases))
    job.propagator.adapt([job.dataset.support(case) for case in job.dataset.annotated], job.views)
    preparation = time.monotonic() - begin
    if job.propagator.whole_set:
        _carry_whole_set(job, cases)
        return preparation
    title = f"propagate by {name}"
    with _shared_supports(job, min(processes, len(todo))):
        for _ in over_cases(_carry_case, todo, processes=processes, title=title, setup=_set_up, setup_arguments=(job,)):
            pass
    return preparation


@contextmanager
def _shared_supports(job: Job, processes: int) -> Iterator[None]:
    """Several processes encode the annotated cases once, not each by itself."""
    if processes < 2 or not isinstance(job.propagator, Sam2Propagator):
        yield
        return
    with job.store.temporary_folder() as folder:
        job.propagator.share(folder)
        try:
            yield
        finally:
            job.propagator.share(None)


_AT_WORK: dict[str, Any] = {}
"""This process's job and its supports: read once, used for every case."""


def _set_up(job: Job) -> None:
    _AT_WORK.update(job=job, supports=[job.dataset.support(case) for case in job.dataset.annotated])


def _carry_case(case: Case) -> None:
    job: Job = _AT_WORK["job"]
    supports: list[Support] = _AT_WORK["supports"]
    begin = time.monotonic()
    image = job.dataset.read_image(case)
    results = list(job.propagator.propagate(supports, [image], job.views))
    reverse = reverse_scores(job.propagator, supports, image, results) if job.reverse_check else {}
    _write(job, case, results, time.monotonic() - begin, reverse)


def _carry_whole_set(job: Job, cases: Sequence[Case]) -> None:
    supports = [job.dataset.support(case) for case in job.dataset.annotated]
    by_name, begin = {case.name: case for case in cases}, time.monotonic()
    results = job.propagator.propagate(supports, _images(job.dataset, cases), job.views)
    with tqdm(total=len(cases), desc=f"propagate by {job.propagator.name}", unit="case") as bar:
        if isinstance(job.propagator, Sam2Propagator):
            job.propagator.progress = _Steps(bar)
        for name, group in groupby(results, key=lambda result: result.case):
            _write(job, by_name[name], list(group), time.monotonic() - begin)
            begin = time.monotonic()
        show(bar, float(len(cases)))


class _Steps:
    """Moves a bar of cases by the slices of the whole set: no case is done before all are."""

    def __init__(self, bar: tqdm[Any]) -> None:
        self._bar = bar
        self._done = 0.0

    def __call__(self, done: float, of: int) -> None:
        self._done = min(self._done + done / of, 1.0)
        show(self._bar, self._done * self._bar.total)


def _images(dataset: RawDataset, cases: Sequence[Case]) -> Iterator[Image]:
    return (dataset.read_image(case) for case in cases)


def _write(
    job: Job, case: Case, results: Sequence[Propagation], seconds: float, reverse: Mapping[str, float] | None = None
) -> None:
    name, views = job.propagator.name, {}
    for result in results:
        if result.label is not None:
            job.store.write_label(job.dataset, result.label, job.store.view_path(name, result.view, case.name), case)
        views[result.view] = ViewRecord(
            label=result.label is not None, reason=result.reason, scores=_rounded({**result.scores, **(reverse or {})})
        )
    # The record comes last: a case without one is done again.
    job.store.write_worker(WorkerRecord(case=case.name, source=name, views=views, seconds=round(seconds, 3)))


def _rounded(scores: Mapping[str, float]) -> dict[str, float]:
    return {key: round(float(value), 6) for key, value in scores.items()}


def _workers(propagator: Propagator, options: PropagatorOptions, num_processes: int | None) -> int:
    """Cases that a propagator labels at once."""
    if propagator.whole_set:
        return 1
    # The others work on the CPU.
    by_device = propagator.name in ("sam2", "correspondence")
    return processes_on(options.device if by_device else "cpu", num_processes)


def _queries(
    dataset: RawDataset, propagator: str, patients: Collection[str], only: Collection[str] | None = None
) -> list[Case]:
    """What a propagator labels: un-annotated cases, and annotated ones whose label is sparse; of these `only` some.

    Those of an annotated case's patient are labelled by their place in space, and by nothing else.
    """
    sparse = [c for c in dataset.annotated if _is_sparse(dataset, c)]
    by_space = propagator == PhysicalSpacePropagator.name
    chosen = [c for c in (*dataset.unannotated, *sparse) if (c.name in patients) == by_space]
    return sorted((c for c in chosen if only is None or c.name in only), key=lambda case: case.name)


def _share(
    job: Job, cases: Sequence[Case], made: Mapping[str, Propagator], patients: Collection[str], part: tuple[int, int]
) -> list[Case]:
    """One shard's part of the queries; with those that may pass labels on, which relays of every shard wait for."""
    num_parts, part_id = part
    own = list(cases[part_id::num_parts])
    if job.propagator.name != "registration" or "relay" not in made:
        return own
    wanted = {*(case.name for case in own), *candidates(_passing(job.dataset, patients))}
    return [case for case in cases if case.name in wanted]


def _passing(raw: RawDataset, patients: Collection[str]) -> list[str]:
    """The cases that may pass registration's labels on; a sparse one has better than that on its drawn slices."""
    return sorted(case.name for case in raw.unannotated if case.name not in patients)


def _is_sparse(dataset: RawDataset, case: Case) -> bool:
    assert case.label is not None
    # Without an ignore label no file need be read.
    return dataset.ignore is not None and dataset.is_sparse(dataset.read_label(case.label))


def _is_done(store: Store, source: str, queries: Sequence[Case]) -> bool:
    return all(store.worker_path(source, case.name).is_file() for case in queries)
