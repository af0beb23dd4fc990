"""What commands print when they end: lines for people and the same figures for machines."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from statistics import mean
from typing import TYPE_CHECKING, Any

from nnunet_oneshot.command_line import has_gpu
from nnunet_oneshot.dataset import find_raw_folder, open_dataset
from nnunet_oneshot.quality_gate import Doubt, mean_quality, needs_review
from nnunet_oneshot.refine_record import repeated_flags
from nnunet_oneshot.store import DIVERGENCE_MEANING, MANIFEST, Manifest, read_manifest

if TYPE_CHECKING:  # what is summed up is there already; loading torch to print a table is not worth seconds
    from nnunet_oneshot.demo import DemoResult
    from nnunet_oneshot.export import Exported
    from nnunet_oneshot.propagate import Outcome
    from nnunet_oneshot.refine import Refinement
    from nnunet_oneshot.review.session import Reviewed
    from nnunet_oneshot.run import RunResult
    from nnunet_oneshot.trial import Trial

DIVERGENCE_COST = (
    "nothing that was measured on two sets where OneShotTrainer learns the best guess there; nnU-Net's own trainers "
    "ignore these voxels, and lost Dice by it on both (docs/method.md)"
)
"""What "Divergence: ignore it or not" there found on two real sets."""
REVIEW_LINES = 10
"""Labels that a summary lists for a person; -json has all."""


def table(header: Sequence[str], rows: Sequence[Sequence[object]]) -> list[str]:
    """A plain text table, one line a row."""
    cells = [[str(c) for c in row] for row in (header, *rows)]
    widths = [max(len(row[i]) for row in cells) for i in range(len(header))]
    lines = ["  ".join(c.ljust(w) for c, w in zip(row, widths, strict=True)).rstrip() for row in cells]
    return [lines[0], "-" * len(lines[0]), *lines[1:]]


def preset_here() -> str:
    """What a command that trains is told beside the rest on this machine: without a GPU, to train small networks."""
    return "" if has_gpu() else " -preset small"


def manifest_figures(manifest: Manifest) -> dict[str, Any]:
    """Cases by status, mean divergence and the cases without a label, of a manifest."""
    records = manifest.cases
    divergences = [r.divergence for r in records.values() if r.status == "pseudo" and r.divergence is not None]
    return {
        "round": manifest.round,
        "cases": dict(Counter(r.status for r in records.values())),
        "mean_divergence": round(mean(divergences), 5) if divergences else None,
        "mean_quality": mean_quality(manifest),
        "needs_review": [vars(doubt) for doubt in _doubts(manifest)],
        "failed": {name: r.reason for name, r in records.items() if r.status == "failed"},
    }


def manifest_summary(manifest: Manifest, output: int | str) -> dict[str, Any]:
    """Summary of a pseudo-label dataset."""
    figures = manifest_figures(manifest)
    rows = [(status, count) for status, count in sorted(figures["cases"].items())]
    lines = ["", *table(("label", "cases"), rows)]
    if figures["mean_divergence"] is not None:
        lines.append(f"divergence: {100 * figures['mean_divergence']:.2f} % of voxels ({DIVERGENCE_MEANING})")
    if figures["mean_quality"] is not None:
        lines.append(f"estimated Dice of the labels (no ground truth was used): {figures['mean_quality']:.3f}")
    lines += [f"no label for {name}: {reason}" for name, reason in figures["failed"].items()]
    lines += _review_lines([doubt for doubt in _doubts(manifest) if doubt.case not in figures["failed"]])
    lines += [
        "",
        f"next: nnUNetv2_oneshot_report -d {output} to look at them; "
        f"nnUNetv2_oneshot_refine -d {output} -c CONFIG{preset_here()}",
    ]
    return {"output": str(output), **figures, "lines": lines}


def propagation_summary(outcome: Outcome) -> dict[str, Any]:
    """Summary of `propagate`."""
    warnings = [f"warning: {text}" for text in outcome.warnings]
    number = outcome.store.folder.name[7:10]
    if outcome.manifest is None:
        lines = [*warnings, "this part is done; the labels are fused when the last part is"]
        lines += ["", "next: the same command with the next -part_id, until all parts are done"]
        return {"output": number, "complete": False, "warnings": outcome.warnings, "lines": lines}
    summary = manifest_summary(outcome.manifest, number)
    lines = [*warnings, *summary["lines"][:-2], f"labelled in {outcome.seconds:.0f} s", *summary["lines"][-2:]]
    more = {"complete": True, "warnings": outcome.warnings, "seconds": round(outcome.seconds, 1)}
    return {**summary, **more, "lines": lines}


def trial_summary(result: Trial) -> dict[str, Any]:
    """Summary of `propagate --trial`."""
    rows = [
        (
            c.case,
            f"{c.share:.0%}",
            "no label" if c.quality is None else f"{c.quality['mean']:.2f}",
            f"{100 * c.divergence:.2f}",
            f"{c.seconds:.0f}",
        )
        for c in result.cases
    ]
    header = ("case", "stands for", "estimated Dice", "divergence %", "seconds")
    lines = [*(f"warning: {text}" for text in result.warnings), "", *table(header, rows), ""]
    lines += [f"no label for {c.case}: {c.reason}" for c in result.cases if c.reason]
    expected = "unknown" if result.quality is None else f"{result.quality:.2f}"
    lines += [
        f"expected of all {result.set_size} images:",
        f"  estimated Dice of the labels: {expected}",
        f"  divergence, where views disagree: {100 * result.divergence:.2f} % of voxels, "
        f"{result.divergence_of_foreground:.0%} of those in and around the structures",
        f"  time: about {result.minutes:.0f} minutes; disk: about {result.megabytes:.0f} MB",
        f"  what divergence costs: {DIVERGENCE_COST}",
        f"if one label is not enough, annotate next: {result.annotate_next}",
        f"picture: {result.picture}",
        "",
        "next: the same command without --trial; no dataset was made",
    ]
    figures = {**vars(result), "folder": str(result.folder), "cases": [vars(c) for c in result.cases]}
    return {**figures, "picture": str(result.picture), "lines": lines}


def refinement_summary(result: Refinement) -> dict[str, Any]:
    """Summary of `refine`."""
    agreement = {c.number: c for c in result.changes}
    rows = [
        (
            n,
            _figure(quality),
            *((f"{agreement[n].mean:.3f}", len(agreement[n].agreement)) if n in agreement else ("", "")),
        )
        for n, quality in result.quality.items()
    ]
    lines = ["", *result.taken_up, *table(("round", "estimated Dice", "Dice to the round before", "cases"), rows)]
    lines += [f"in force: round {result.round} ({result.ended})", *_review_lines(result.doubts)]
    lines += [f"model: {result.model_folder}, folds {' '.join(map(str, result.folds))}", *_postprocessing_lines(result)]
    lines += ["", *_after_training(result)]
    figures = {
        "rounds": [
            {"round": c.number, "agreement": c.mean, "quality": result.quality.get(c.number), "cases": c.agreement}
            for c in result.changes
        ],
        "round_in_force": result.round,
        "ended": result.ended,
        "taken_up": result.taken_up,
        "needs_review": [vars(doubt) for doubt in result.doubts],
        "trainer": result.plan.trainer,
        "plans": result.plan.plans,
        "model": str(result.model_folder),
        "folds": list(result.folds),
        "one_piece": result.one_piece,
    }
    return {**figures, "lines": lines}


def _postprocessing_lines(result: Refinement) -> list[str]:
    if not result.one_piece:
        return []
    return [
        f"one piece in every annotated case: {', '.join(result.one_piece)}; of predictions "
        "nnUNetv2_apply_postprocessing keeps the largest, by the model's postprocessing.pkl (remove that before export "
        "where a patient may have several, as of lesions)"
    ]


def _after_training(result: Refinement) -> list[str]:
    number = result.model_folder.parent.name[7:10]
    export = f"nnUNetv2_oneshot_export -d {number} -c {result.plan.configuration} -o model.zip"
    return [f"next: nnUNetv2_oneshot_review -d {number}, then refine with one round more; or {export}"]


def _figure(value: float | None) -> str:
    return "" if value is None else f"{value:.3f}"


def _doubts(manifest: Manifest) -> list[Doubt]:
    return needs_review(manifest, open_dataset(manifest.source_dataset).class_names)


def _review_lines(doubts: Sequence[Doubt]) -> list[str]:
    """The worst labels, as a list for a person."""
    if not doubts:
        return []
    shown = [f"  {doubt.case}: {doubt.reason}" for doubt in doubts[:REVIEW_LINES]]
    more = [f"  and {len(doubts) - REVIEW_LINES} more, see -json"] if len(doubts) > REVIEW_LINES else []
    return ["needs review, worst first:", *shown, *more]


def run_summary(result: RunResult) -> dict[str, Any]:
    """Summary of `run`."""
    labels = manifest_figures(result.manifest)
    refined = refinement_summary(result.refinement)
    rows = [(status, count) for status, count in sorted(labels["cases"].items())]
    warnings = [f"warning: {text}" for text in result.warnings]
    lines = [*warnings, "", *table(("label", "cases"), rows), *refined["lines"][:-2], *result.score_lines]
    lines += refined["lines"][-2:]
    refinement = {key: value for key, value in refined.items() if key != "lines"}
    return {"labels": labels, "refinement": refinement, "scores": result.scores, "lines": lines}


def review_summary(result: Reviewed, dataset: int | str) -> dict[str, Any]:
    """Summary of `review`."""
    lines = ["", *table(("decision", "cases"), list(result.decisions.items()))]
    lines += ["", f"next: nnUNetv2_oneshot_refine -d {dataset} {_as_begun(dataset)} -rounds {result.round + 1}"]
    return {"dataset": result.dataset, "round": result.round, "decisions": result.decisions, "lines": lines}


def _as_begun(dataset: int | str) -> str:
    """Flags that repeat the refinement that was begun; those of a first one where none was."""
    flags = repeated_flags(find_raw_folder(dataset))
    return f"-c CONFIG{preset_here()}" if flags is None else flags


def report_summary(page: Path, dataset: int | str) -> dict[str, Any]:
    """Summary of `report`: how many cases of each kind the page shows."""
    figures = manifest_figures(read_manifest(find_raw_folder(dataset) / MANIFEST))
    rows = [(status, count) for status, count in sorted(figures["cases"].items())]
    lines = ["", *table(("label", "cases"), rows), f"written: {page}", ""]
    return {"page": str(page), **figures, "lines": [*lines, f"next: nnUNetv2_oneshot_review -d {dataset}"]}


def export_summary(packed: Exported) -> dict[str, Any]:
    """Summary of `export`."""
    megabytes = packed.zip.stat().st_size / 1e6
    rows = [(model, " ".join(packed.folds), packed.trainer) for model in packed.models]
    lines = ["", *table(("model", "folds", "trained by"), rows), f"written: {packed.zip} ({megabytes:.1f} MB)"]
    lines += [] if packed.container is None else [f"container: {packed.container}; its README says how to build it"]
    figures = {"zip": str(packed.zip), "models": list(packed.models), "folds": list(packed.folds)}
    figures["commands"] = list(packed.commands)
    return {
        **figures,
        "lines": [
            *lines,
            "",
            "next: where a stock nnU-Net is installed (without a GPU add -device cpu)",
            *packed.commands,
        ],
    }


def demo_summary(result: DemoResult) -> dict[str, Any]:
    """Summary of `demo`."""
    rows = [(r.what, f"{r.dice:.3f}", f"{r.low:.3f} to {r.high:.3f}") for r in result.rows]
    lines = [
        "",
        f"Phantoms, 1 annotated case, mean foreground Dice on the {result.cases} others:",
        "",
        *table(("labels of", "Dice", "95 % interval"), rows),
        "",
        f"done in {result.seconds / 60:.1f} minutes; everything is in {result.folder}",
        "",
        f"next: open {result.page} in a browser; then the same with your own images, by nnUNetv2_oneshot_suggest",
    ]
    figures = {"cases": result.cases, "seconds": round(result.seconds, 1), "folder": str(result.folder)}
    figures["page"] = str(result.page)
    return {**figures, "rows": [vars(row) for row in result.rows], "lines": lines}
