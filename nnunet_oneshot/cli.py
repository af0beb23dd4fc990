"""The commands. Each parses its arguments, calls the function of the same name and prints a summary.

A command's module is imported when the command runs, not before, so that `-h` answers at once.
"""

from __future__ import annotations

import argparse
import importlib
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from nnunet_oneshot.arguments import (
    LABELLING_PROCESSES,
    TRAINING_PROCESSES,
    add_device,
    add_json,
    add_processes,
    add_propagation,
    add_source,
    add_starting_anew,
    add_training,
    add_work,
    new_parser,
)
from nnunet_oneshot.command_line import Summary, execute
from nnunet_oneshot.errors import OneShotError

TRIAL_CASES = 5


def suggest(argv: Sequence[str] | None = None) -> None:
    """Rank what is worth annotating."""
    parser = new_parser(
        "nnUNetv2_oneshot_suggest",
        "Rank the cases, or one slice of every case, that stand best for the rest; of a dataset that propagate or "
        "refine made, those whose annotation would help most next. Writes suggest.csv and suggest.png.",
        "nnUNetv2_oneshot_suggest -d 501 -n 3",
    )
    parser.add_argument("-d", required=True, metavar="A", help="id or name of the dataset")
    parser.add_argument("-n", type=int, metavar="N", help="how many to name (default: 5; with --slices every case)")
    parser.add_argument("--slices", action="store_true", help="choose one slice of every case, not whole cases")
    parser.add_argument(
        "--learn",
        action="store_true",
        help="with --slices: rank by what a network that learns from the images predicts",
    )
    parser.add_argument("-o", type=Path, metavar="DIR", help="folder (default: suggest in the dataset's folder)")
    add_processes(parser)
    add_json(parser)
    execute(parser, _do_suggest, argv)


def make_sparse(argv: Sequence[str] | None = None) -> None:
    """Make sparse labels of single drawn slices."""
    parser = new_parser(
        "nnUNetv2_oneshot_make_sparse",
        "Put label files in which only some slices were drawn into a raw dataset; all else becomes the ignore label.",
        "nnUNetv2_oneshot_make_sparse -d 501 -i drawn_slices",
    )
    parser.add_argument("-d", required=True, metavar="A", help="id or name of the raw dataset")
    parser.add_argument("-i", type=Path, required=True, metavar="FOLDER", help="CASE.EXT files, 0 where nobody drew")
    parser.add_argument("-slices", type=Path, metavar="CSV", help="table of the drawn slices (default: the non-empty)")
    parser.add_argument("--overwrite", action="store_true", help="replace labels that are there")
    add_json(parser)
    execute(parser, _do_make_sparse, argv)


def propagate(argv: Sequence[str] | None = None) -> None:
    """Carry the label of the annotated case(s) to every other image."""
    parser = new_parser(
        "nnUNetv2_oneshot_propagate",
        "Carry the labels of the annotated cases to all other images and make a pseudo-label dataset of them.",
        "nnUNetv2_oneshot_propagate -d 501 -o 601",
    )
    add_source(parser)
    add_propagation(parser)
    add_device(parser)
    add_work(parser, LABELLING_PROCESSES)
    parser.add_argument("-num_parts", type=int, default=1, metavar="N", help="deal the cases out to N shards")
    parser.add_argument("-part_id", type=int, default=0, metavar="N", help="this shard, from 0")
    parser.add_argument(
        "--trial", action="store_true", help="label a few cases that span the set and tell what to expect; no dataset"
    )
    parser.add_argument("-n", type=int, metavar="N", help=f"cases of a --trial (default: {TRIAL_CASES})")
    execute(parser, _do_propagate, argv)


def consensus(argv: Sequence[str] | None = None) -> None:
    """Make a pseudo-label dataset of label folders made elsewhere."""
    parser = new_parser(
        "nnUNetv2_oneshot_consensus",
        "Fuse label folders made by any other tool into a pseudo-label dataset; where they differ becomes ignore.",
        "nnUNetv2_oneshot_consensus -d 501 -o 601 -i labels_of_tool_a labels_of_tool_b",
    )
    add_source(parser)
    parser.add_argument("-i", type=Path, nargs="+", required=True, metavar="FOLDER", help="folders of CASE.EXT labels")
    add_work(parser)
    execute(parser, _do_consensus, argv)


def refine(argv: Sequence[str] | None = None) -> None:
    """Train, predict, relabel; repeat."""
    parser = new_parser(
        "nnUNetv2_oneshot_refine",
        "Train nnU-Net on the pseudo labels, refresh them by its predictions, and train on the new ones; resumable.",
        "nnUNetv2_oneshot_refine -d 601 -c 3d_fullres -rounds 1",
    )
    parser.add_argument("-d", required=True, metavar="B", help="id or name of the pseudo-label dataset")
    add_training(parser)
    add_device(parser)
    add_processes(parser, TRAINING_PROCESSES)
    add_json(parser)
    execute(parser, _do_refine, argv)


def run(argv: Sequence[str] | None = None) -> None:
    """Propagate and refine in one command."""
    parser = new_parser(
        "nnUNetv2_oneshot_run",
        "From one annotated image to a trained nnU-Net: propagate, then refine. Run it again to go on after a stop.",
        "nnUNetv2_oneshot_run -d 501 -o 601 -c 3d_fullres",
    )
    add_source(parser)
    add_propagation(parser)
    add_training(parser)
    add_device(parser)
    add_work(parser, TRAINING_PROCESSES)
    parser.add_argument("-ref", type=Path, metavar="DIR", help="folder of true labels, to score the final labels by")
    execute(parser, _do_run, argv)


def evaluate(argv: Sequence[str] | None = None) -> None:
    """Score predictions against true labels."""
    parser = new_parser(
        "nnUNetv2_oneshot_evaluate",
        "Dice, Hausdorff distance, its 95th percentile and average surface distance, with 95 % intervals over cases.",
        "nnUNetv2_oneshot_evaluate -ref labelsTs -pred predictions -djfile dataset.json -o scores.json",
    )
    parser.add_argument("-ref", type=Path, required=True, metavar="DIR", help="folder of true labels")
    parser.add_argument("-pred", type=Path, required=True, metavar="DIR", help="folder of labels to score")
    parser.add_argument("-djfile", type=Path, required=True, metavar="F", help="dataset.json")
    parser.add_argument("-o", type=Path, metavar="JSON", help="write all scores there")
    add_processes(parser)
    add_json(parser)
    execute(parser, _do_evaluate, argv)


def report(argv: Sequence[str] | None = None) -> None:
    """Write a static page about a pseudo-label dataset."""
    parser = new_parser(
        "nnUNetv2_oneshot_report",
        "Write one self-contained HTML page about a pseudo-label dataset: rounds, every case, outliers and pictures.",
        "nnUNetv2_oneshot_report -d 601",
    )
    parser.add_argument("-d", required=True, metavar="B", help="id or name of the pseudo-label dataset")
    parser.add_argument("-o", type=Path, metavar="HTML", help="file (default: report.html in the dataset's folder)")
    parser.add_argument("-ref", type=Path, metavar="DIR", help="folder of true labels, to show true Dice as well")
    add_processes(parser)
    add_json(parser)
    execute(parser, _do_report, argv)


def review(argv: Sequence[str] | None = None) -> None:
    """Look at labels on a local page, accept, reject and correct them."""
    parser = new_parser(
        "nnUNetv2_oneshot_review",
        "Serve a page to this machine alone: look at labels, accept, reject, flag or correct them; refine obeys.",
        "nnUNetv2_oneshot_review -d 601",
    )
    parser.add_argument("-d", required=True, metavar="B", help="id or name of the pseudo-label dataset")
    parser.add_argument("--port", type=int, default=8642, help="0 for any that is free (default: %(default)s)")
    parser.add_argument("--no_browser", action="store_true", help="print the page's address alone")
    parser.add_argument(
        "-sam2_chk", default="builtin", metavar="NAME", help="SAM2 weights that carry corrected slices (%(default)s)"
    )
    add_device(parser)
    add_json(parser)
    execute(parser, _do_review, argv)


def export(argv: Sequence[str] | None = None) -> None:
    """Pack a trained model for a stock nnU-Net."""
    parser = new_parser(
        "nnUNetv2_oneshot_export",
        "Pack the trained model as a zip that a stock nnU-Net installs and predicts with, and as a container.",
        "nnUNetv2_oneshot_export -d 601 -c 3d_fullres -o model.zip --container submission",
    )
    parser.add_argument("-d", required=True, metavar="B", help="id or name of the dataset the model was trained on")
    parser.add_argument("-c", required=True, metavar="CONFIG", help="its nnU-Net configuration")
    parser.add_argument("-o", type=Path, required=True, metavar="ZIP", help="file to write; must not exist")
    parser.add_argument("-tr", metavar="TRAINER", help="trainer, where several models fit (default: refine's)")
    parser.add_argument("-p", metavar="PLANS", help="plans, where several models fit (default: refine's)")
    parser.add_argument("-f", nargs="+", metavar="FOLD", help="folds (default: all, else the numbered ones trained)")
    parser.add_argument("--container", type=Path, metavar="DIR", help="also write a challenge container's folder")
    add_json(parser)
    execute(parser, _do_export, argv)


def convert_care_liseg(argv: Sequence[str] | None = None) -> None:
    """Convert the CARE-LiSeg layout."""
    parser = _converter(
        "care_liseg", "Make one raw dataset a modality of CARE-LiSeg's training data.", "-i CARE -d 510"
    )
    parser.add_argument("-modalities", nargs="+", metavar="M", help="which ones (default: all that are there)")
    parser.add_argument("-support", metavar="M", help="add this modality's annotated cases to datasets without a label")
    parser.add_argument("-test", type=Path, metavar="DIR", help="validation or test data, for imagesTs")
    execute(parser, _do_convert_care_liseg, argv)


def convert_yoloseg(argv: Sequence[str] | None = None) -> None:
    """Convert the YoloSeg layout."""
    parser = _converter("yoloseg", "Make a raw dataset of YoloSeg's Train, Val and Test folders.", "-i REFUGE -d 520")
    parser.add_argument("-name", metavar="NAME", help="name of the dataset (default: the folder's)")
    parser.add_argument("-annotated", nargs="+", metavar="FILE", help="annotated pictures (default: the list's)")
    parser.add_argument("-truth", type=Path, metavar="DIR", help="write the labels of all pictures there")
    execute(parser, _do_convert_yoloseg, argv)


def convert_dicom(argv: Sequence[str] | None = None) -> None:
    """Convert DICOM series."""
    parser = _converter("dicom", "Make a raw dataset of un-annotated cases of DICOM series.", "-i EXPORT -d 530")
    parser.add_argument("-name", metavar="NAME", default="dicom", help="name of the dataset (default: %(default)s)")
    parser.add_argument("-modality", metavar="M", help="take only series of this modality, for example MR")
    parser.add_argument("-description", metavar="RE", help="take only series whose description matches")
    parser.add_argument("-labels", nargs="+", default=["structure"], metavar="NAME", help="classes that will be drawn")
    parser.add_argument("-mapping", type=Path, metavar="JSON", help="write which case came from where (identifiers!)")
    execute(parser, _do_convert_dicom, argv)


def convert_labels(argv: Sequence[str] | None = None) -> None:
    """Labels for 3D Slicer, ITK-SNAP or DICOM archives."""
    parser = new_parser(
        "nnUNetv2_oneshot_convert_labels",
        "Write a dataset's labels, or predictions, for 3D Slicer and ITK-SNAP or as DICOM segmentations.",
        "nnUNetv2_oneshot_convert_labels -d 601 -o for_slicer",
    )
    parser.add_argument("-d", required=True, metavar="B", help="id or name of the dataset")
    parser.add_argument("-o", type=Path, required=True, metavar="DIR", help="folder to write to")
    parser.add_argument("-i", type=Path, metavar="DIR", help="folder of labels (default: the dataset's own)")
    parser.add_argument("-dicom", type=Path, metavar="DIR", help="write DICOM SEG; the folder that was converted")
    parser.add_argument("-mapping", type=Path, metavar="JSON", help="with -dicom: what convert_dicom -mapping wrote")
    add_json(parser)
    execute(parser, _do_convert_labels, argv)


def demo(argv: Sequence[str] | None = None) -> None:
    """The whole loop on phantoms."""
    parser = new_parser(
        "nnUNetv2_oneshot_demo",
        "Make phantom volumes, annotate one, run the whole loop on them and print the scores (minutes on two cores).",
        "nnUNetv2_oneshot_demo -o demo_output",
    )
    parser.add_argument(
        "-o", type=Path, default=Path("demo_output"), metavar="DIR", help="folder (default: %(default)s)"
    )
    parser.add_argument("-preset", choices=("default", "small", "tiny"), default="tiny", help="default: %(default)s")
    add_starting_anew(parser, "start again in a folder that holds a demo")
    add_device(parser)
    add_processes(parser, TRAINING_PROCESSES)
    add_json(parser)
    execute(parser, _do_demo, argv)


def info(argv: Sequence[str] | None = None) -> None:
    """Versions, devices, checkpoints and folders."""
    parser = new_parser(
        "nnUNetv2_oneshot_info",
        "Versions, devices, checkpoints and folders, for a bug report.",
        "nnUNetv2_oneshot_info",
    )
    add_json(parser)
    execute(parser, _do_info, argv)


def _do_suggest(arguments: argparse.Namespace) -> Summary:
    module = importlib.import_module("nnunet_oneshot.suggest")
    found = module.suggest(
        arguments.d,
        arguments.n,
        slices=arguments.slices,
        learn=arguments.learn,
        output=arguments.o,
        num_processes=arguments.np,
    )
    rows = [module.as_row(row) for row in found.rows]
    cells = [["" if value is None else value for value in row.values()] for row in rows]
    table = _function("summary", "table")(module.COLUMNS, cells)
    warnings = _dataset_warnings(arguments.d)
    lines = [
        *_as_lines(warnings),
        "",
        *table,
        "",
        f"of {found.cases} cases; slices count from 0; written: {found.folder}/suggest.csv and .png",
        _after_suggest(arguments, any(row["doubt"] is not None for row in rows)),
    ]
    figures = {"suggestions": rows, "cases": found.cases, "folder": str(found.folder), "warnings": warnings}
    return {**figures, "lines": lines}


def _dataset_warnings(dataset: str) -> list[str]:
    warnings: list[str] = _function("dataset", "open_dataset")(dataset).warnings
    return warnings


def _as_lines(warnings: Sequence[str]) -> list[str]:
    return [f"warning: {text}" for text in warnings]


def _after_suggest(arguments: argparse.Namespace, after_a_round: bool) -> str:
    if after_a_round:
        return f"next: nnUNetv2_oneshot_review -d {arguments.d}, correct what is named, then refine with one round more"
    if arguments.slices:
        return f"next: draw what is named, then nnUNetv2_oneshot_make_sparse -d {arguments.d} -i FOLDER"
    return f"next: draw what is named into labelsTr, then nnUNetv2_oneshot_propagate -d {arguments.d} -o B"


def _do_make_sparse(arguments: argparse.Namespace) -> Summary:
    made = _function("make_sparse")(arguments.d, arguments.i, slices=arguments.slices, overwrite=arguments.overwrite)
    rows = [(s.case, s.axis, " ".join(map(str, s.slices)), ", ".join(s.missing)) for s in made]
    table = _function("summary", "table")(("case", "axis", "slices", "missing classes"), rows)
    warnings = [f"warning: {s.case} misses {', '.join(s.missing)}; {s.advice}" for s in made if s.missing]
    small = _function("summary", "preset_here")()
    run = f"next: nnUNetv2_oneshot_run -d {arguments.d} -o B -c CONFIG{small} -propagator correspondence sam2"
    return {"cases": [vars(s) for s in made], "lines": ["", *table, *warnings, "", run]}


def _do_propagate(arguments: argparse.Namespace) -> Summary:
    if arguments.trial:
        return _do_trial(arguments)
    if arguments.n is not None:
        raise OneShotError("expected -n with --trial, found it alone, to label all images; add --trial or leave -n out")
    outcome = _function("propagate")(
        arguments.d,
        arguments.o,
        propagators=_propagators(arguments),
        views=arguments.views,
        options=_propagator_options(arguments),
        num_processes=arguments.np,
        num_parts=arguments.num_parts,
        part_id=arguments.part_id,
        overwrite=arguments.overwrite,
        same_patient=arguments.same_patient,
    )
    return _function("summary", "propagation_summary")(outcome)


def _do_trial(arguments: argparse.Namespace) -> Summary:
    _check_trial(arguments)
    result = _function("trial")(
        arguments.d,
        arguments.o,
        TRIAL_CASES if arguments.n is None else arguments.n,
        propagators=_propagators(arguments),
        views=arguments.views,
        options=_propagator_options(arguments),
        num_processes=arguments.np,
    )
    return _function("summary", "trial_summary")(result)


def _check_trial(arguments: argparse.Namespace) -> None:
    given = {
        "-same_patient": arguments.same_patient is not None,
        "--overwrite": arguments.overwrite,
        "-num_parts": arguments.num_parts != 1,
        "-part_id": arguments.part_id != 0,
    }
    if refused := " ".join(flag for flag, there in given.items() if there):
        raise OneShotError(
            f"expected --trial without {refused}, found both; leave {refused} out: a trial labels a few images that "
            "propagators carry to, at once, and makes no dataset"
        )


def _do_consensus(arguments: argparse.Namespace) -> Summary:
    manifest = _function("consensus")(
        arguments.d, arguments.o, arguments.i, num_processes=arguments.np, overwrite=arguments.overwrite
    )
    summary, warnings = _function("summary", "manifest_summary")(manifest, arguments.o), _dataset_warnings(arguments.d)
    return {**summary, "warnings": warnings, "lines": [*_as_lines(warnings), *summary["lines"]]}


def _say_device(arguments: argparse.Namespace) -> None:
    """Say what trains, at once; and of nnU-Net's own 1000 epochs on a CPU that nobody named, what to do instead."""
    found = not arguments.device_typed and arguments.device == "cpu"
    why = " (no GPU was found)" if found else "" if arguments.device_typed else " (found; -device chooses)"
    print(f"device: {arguments.device}{why}", file=sys.stderr, flush=True)
    if found and arguments.preset == "default" and arguments.tr in (None, "OneShotTrainer"):
        warning = (
            "trainings of 1000 epochs (-preset default) are for a GPU and may take weeks here; stop this and add "
            "-preset small, which two CPU cores can train"
        )
        print(f"warning: {warning}", file=sys.stderr, flush=True)


def _do_refine(arguments: argparse.Namespace) -> Summary:
    refine = _function("refine")
    _say_device(arguments)
    result = refine(
        arguments.d, arguments.c, **_training_options(arguments), device=arguments.device, num_processes=arguments.np
    )
    return _function("summary", "refinement_summary")(result)


def _do_run(arguments: argparse.Namespace) -> Summary:
    run = _function("run")
    _say_device(arguments)
    result = run(
        arguments.d,
        arguments.o,
        arguments.c,
        propagators=_propagators(arguments),
        views=arguments.views,
        options=_propagator_options(arguments),
        training=_training_options(arguments),
        num_processes=arguments.np,
        overwrite=arguments.overwrite,
        same_patient=arguments.same_patient,
        reference=arguments.ref,
    )
    return _function("summary", "run_summary")(result)


def _do_evaluate(arguments: argparse.Namespace) -> Summary:
    module = importlib.import_module("nnunet_oneshot.evaluate")
    processes = arguments.np or _function("parallel", "default_processes")()
    result = module.evaluate(arguments.ref, arguments.pred, arguments.djfile, arguments.o, num_processes=processes)
    following = f"next: nnUNetv2_oneshot_report -d B -ref {arguments.ref}, which sets them beside estimated Dice"
    return {**result.to_json(), "lines": [module.format_table(result), "", following]}


def _do_report(arguments: argparse.Namespace) -> Summary:
    page = _function("report")(arguments.d, arguments.o, truth=arguments.ref, num_processes=arguments.np)
    return _function("summary", "report_summary")(page, arguments.d)


def _do_review(arguments: argparse.Namespace) -> Summary:
    reviewed = _function("review.session", "review")(
        arguments.d,
        port=arguments.port,
        open_browser=not arguments.no_browser,
        checkpoint=arguments.sam2_chk,
        device=arguments.device,
        # At once, and to standard error: with -json standard output is for the summary.
        say=lambda text: print(text, file=sys.stderr, flush=True),
    )
    return _function("summary", "review_summary")(reviewed, arguments.d)


def _do_export(arguments: argparse.Namespace) -> Summary:
    packed = _function("export")(
        arguments.d,
        arguments.c,
        arguments.o,
        trainer=arguments.tr,
        plans=arguments.p,
        folds=arguments.f,
        container=arguments.container,
    )
    return _function("summary", "export_summary")(packed)


def _do_convert_care_liseg(arguments: argparse.Namespace) -> Summary:
    return _convert(
        "care_liseg", arguments, modalities=arguments.modalities, support=arguments.support, test=arguments.test
    )


def _do_convert_yoloseg(arguments: argparse.Namespace) -> Summary:
    return _convert("yoloseg", arguments, name=arguments.name, annotated=arguments.annotated, truth=arguments.truth)


def _do_convert_dicom(arguments: argparse.Namespace) -> Summary:
    return _convert(
        "dicom",
        arguments,
        name=arguments.name,
        modality=arguments.modality,
        description=arguments.description,
        labels=arguments.labels,
        mapping=arguments.mapping,
    )


def _do_convert_labels(arguments: argparse.Namespace) -> Summary:
    if (arguments.dicom is None) != (arguments.mapping is None):
        raise OneShotError("expected -dicom and -mapping together, found one of them; give both or none")
    writer = None if arguments.dicom is None else _function("dicom_seg", "SegmentationWriter")
    made = None if writer is None else writer(arguments.dicom, arguments.mapping)
    written = _function("convert_labels")(arguments.d, arguments.o, arguments.i, made)
    lines = [
        f"written: {len(written)} labels in {arguments.o}, and labels.txt for ITK-SNAP",
        "",
        "next: send them to the archive" if made else "next: open them in 3D Slicer or ITK-SNAP",
    ]
    return {"files": [str(path) for path in written], "lines": lines}


def _convert(layout: str, arguments: argparse.Namespace, **options: Any) -> Summary:
    done = _function(f"convert_{layout}")(arguments.i, arguments.d, dry_run=arguments.dry_run, **options)
    figures = {"datasets": [str(folder) for folder in done.datasets], "notes": list(done.notes)}
    lines = [*done.lines(verbose=arguments.dry_run), "", f"next: {done.following(arguments.d)}"]
    return {**figures, "dry_run": done.dry_run, "lines": lines}


def _converter(layout: str, description: str, example: str) -> argparse.ArgumentParser:
    command = f"nnUNetv2_oneshot_convert_{layout}"
    parser = new_parser(command, description, f"{command} {example}")
    parser.add_argument("-i", type=Path, required=True, metavar="DIR", help="folder of the original layout")
    parser.add_argument("-d", type=int, required=True, metavar="ID", help="id of the raw dataset to make")
    parser.add_argument("--dry_run", action="store_true", help="tell what would be written, and write nothing")
    add_json(parser)
    return parser


def _do_demo(arguments: argparse.Namespace) -> Summary:
    result = _function("demo")(
        arguments.o,
        preset=arguments.preset,
        device=arguments.device,
        num_processes=arguments.np,
        overwrite=arguments.overwrite,
    )
    return _function("summary", "demo_summary")(result)


def _do_info(arguments: argparse.Namespace) -> Summary:
    return _function("info")()


def _function(module: str, name: str | None = None) -> Callable[..., Any]:
    return getattr(importlib.import_module(f"nnunet_oneshot.{module}"), name or module)


def _propagator_options(arguments: argparse.Namespace) -> Any:
    return _function("propagators", "PropagatorOptions")(
        device=arguments.device,
        checkpoint=arguments.sam2_chk,
        config=arguments.sam2_cfg,
        mode=arguments.mode,
        adapt=arguments.adapt,
        recipe=arguments.recipe,
        window=_joined(arguments.window),
        channels=_joined(arguments.channels),
        batch_size=arguments.sam2_batch,
        reverse_check=arguments.reverse_check,
    )


def _joined(words: Sequence[str] | None) -> str | None:
    return None if words is None else " ".join(words)


def _propagators(arguments: argparse.Namespace) -> list[str]:
    return arguments.propagator or _function("propagators", "default_names")(arguments.recipe)


def _training_options(arguments: argparse.Namespace) -> dict[str, Any]:
    return {
        "trainer": arguments.tr,
        "plans": arguments.p,
        "rounds": arguments.rounds,
        "preset": arguments.preset,
        "num_folds": arguments.num_folds,
        "warm_start": False if arguments.from_scratch else None,
        "stop_dice": arguments.stop_dice,
        "all_rounds": arguments.all_rounds,
        "min_quality": arguments.min_quality,
        "weight_by_quality": arguments.weight_by_quality,
        "self_opinion": None if arguments.self_opinion == "none" else arguments.self_opinion,
        "min_margin": arguments.min_margin,
    }
