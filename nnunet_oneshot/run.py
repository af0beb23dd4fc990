"""All of it in one command: propagate, refine and, where true labels are given, score."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from nnunet_oneshot.dataset import RawDataset, open_dataset
from nnunet_oneshot.errors import OneShotError
from nnunet_oneshot.evaluate import evaluate, format_table
from nnunet_oneshot.output import find_output
from nnunet_oneshot.propagate import PropagatorOptions, check_repeated, propagate
from nnunet_oneshot.propagators import DEFAULT
from nnunet_oneshot.refine import Refinement, check_arguments, check_no_results, make_plan, open_store, refine
from nnunet_oneshot.run_checks import check_training
from nnunet_oneshot.second_opinion import AS_BEFORE
from nnunet_oneshot.store import Manifest, Store


@dataclass
class RunResult:
    """What `run` did: the labels in force, the refinement, and scores where true labels were given."""

    manifest: Manifest
    refinement: Refinement
    scores: dict[str, Any] | None = None
    score_lines: list[str] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)


def run(
    dataset: int | str,
    output: int,
    configuration: str,
    *,
    propagators: Sequence[str] = DEFAULT,
    views: Sequence[str] | None = None,
    options: PropagatorOptions | None = None,
    training: Mapping[str, Any] | None = None,
    num_processes: int | None = None,
    overwrite: bool = False,
    same_patient: Path | None = None,
    reference: Path | None = None,
) -> RunResult:
    """From one annotated case to a trained model; run it again to go on after a stop.

    Args:
        dataset: id or name of the raw dataset with the annotated case(s).
        output: id of the dataset to write.
        configuration: nnU-Net configuration.
        propagators, views, options: as in `propagate`.
        training: `trainer`, `plans`, `rounds`, `preset` and all else that `refine` takes.
        num_processes: cases at once; the processor count when None.
        overwrite: replace an output dataset that exists.
        same_patient: as in `propagate`.
        reference: folder of true labels `CASE.EXT`; the labels in force of those cases are scored at the end. It is
            read after all labels and the model are made, by nothing else.

    Raises:
        OneShotError: whatever `propagate`, `refine` and `evaluate` refuse.
    """
    training, options = dict(training or {}), options or PropagatorOptions()
    # Better to say so before hours of labelling and training than after.
    check_arguments(configuration, **training)
    raw = open_dataset(dataset)
    store, warnings = find_output(dataset, output), []
    if reference is not None:
        _check_reference(raw, reference)
    if overwrite or not store.manifest_path.is_file():
        named = {key: training[key] for key in ("trainer", "plans", "preset", "num_folds") if key in training}
        plan = make_plan(configuration, **named)
        check_training(
            raw,
            store,
            configuration,
            plan.plans,
            plans_given=training.get("plans") is not None,
            self_opinion=training.get("self_opinion", AS_BEFORE),
            device=options.device,
            overwrite=overwrite,
        )
        # New labels make a new model.
        check_no_results(store.folder.name, plan)
        labelled = propagate(
            dataset,
            output,
            propagators=propagators,
            views=views,
            options=options,
            num_processes=num_processes,
            overwrite=overwrite,
            same_patient=same_patient,
        )
        warnings = labelled.warnings
    else:
        check_repeated(raw, store, propagators, views, options, same_patient)
    refinement = refine(output, configuration, **training, device=options.device, num_processes=num_processes)
    # Training takes hours, in which images may have been added: the next run takes them up.
    store, raw = open_store(output, grown=True)
    result = RunResult(store.read_manifest(), refinement, warnings=warnings)
    if reference is not None:
        _score(result, raw, store, reference)
    return result


def _with_truth(raw: RawDataset, reference: Path) -> list[str]:
    """Un-annotated cases with a true label: annotated ones would score 1 by copying. Names are looked at, no file."""
    return [c.name for c in raw.unannotated if (reference / f"{c.name}{raw.file_ending}").is_file()]


def _check_reference(raw: RawDataset, reference: Path) -> None:
    if not _with_truth(raw, reference):
        raise OneShotError(
            f"expected true labels CASE{raw.file_ending} of un-annotated cases of {raw.name} in {reference}, found "
            "none; check -ref"
        )


def _score(result: RunResult, raw: RawDataset, store: Store, reference: Path) -> None:
    # What people drew or added during training must not cost what was trained its summary.
    cases = [name for name in _with_truth(raw, reference) if name in result.manifest.cases]
    if not cases:
        result.score_lines = ["", "no scores: every case with a true label was annotated since"]
        return
    scored = evaluate(reference, store.fused_path("x").parent, raw.folder / "dataset.json", cases=cases)
    result.scores = scored.to_json()
    result.score_lines = ["", "labels in force against the reference:", format_table(scored)]
