"""The commands. Each parses its arguments, calls the function of the same name and prints a summary.

A command's module is imported when the command runs, not before, so that `-h` answers at once.
Exit codes: 0 done; 2 bad input or usage, with one sentence; 1 anything else.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import json
import os
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from nnunet_oneshot.errors import USER_ERRORS, NnunetFailureError

Summary = Mapping[str, Any]
"""What a command ends with: "lines" for people, all else for `-json`."""
Execute = Callable[[argparse.Namespace], Summary]

CONFIGURATIONS = "2d, 3d_fullres, 3d_lowres, 3d_cascade_fullres"
INTERRUPTED = "interrupted; run the same command again to go on from where it stopped"


def suggest(argv: Sequence[str] | None = None) -> None:
    """Not in this version."""
    _not_yet("suggest", "ranks the cases or slices that are worth annotating", argv)


def propagate(argv: Sequence[str] | None = None) -> None:
    """Carry the label of the annotated case(s) to every other image."""
    parser = _parser(
        "nnUNetv2_oneshot_propagate",
        "Carry the labels of the annotated cases to all other images and make a pseudo-label dataset of them.",
        "nnUNetv2_oneshot_propagate -d 501 -o 601 -propagator registration",
    )
    _add_source(parser)
    _add_propagation(parser)
    _add_device(parser)
    _add_work(parser)
    parser.add_argument("-num_parts", type=int, default=1, metavar="N", help="deal the cases out to N shards")
    parser.add_argument("-part_id", type=int, default=0, metavar="N", help="this shard, from 0")
    _main(parser, _do_propagate, argv)


def consensus(argv: Sequence[str] | None = None) -> None:
    """Make a pseudo-label dataset of label folders made elsewhere."""
    parser = _parser(
        "nnUNetv2_oneshot_consensus",
        "Fuse label folders made by any other tool into a pseudo-label dataset; where they differ becomes ignore.",
        "nnUNetv2_oneshot_consensus -d 501 -o 601 -i labels_of_tool_a labels_of_tool_b",
    )
    _add_source(parser)
    parser.add_argument("-i", type=Path, nargs="+", required=True, metavar="FOLDER", help="folders of CASE.EXT labels")
    _add_work(parser)
    _main(parser, _do_consensus, argv)


def refine(argv: Sequence[str] | None = None) -> None:
    """Train, predict, relabel; repeat."""
    parser = _parser(
        "nnUNetv2_oneshot_refine",
        "Train nnU-Net on the pseudo labels, refresh them by its predictions, and train on the new ones; resumable.",
        "nnUNetv2_oneshot_refine -d 601 -c 3d_fullres -rounds 1",
    )
    parser.add_argument("-d", required=True, metavar="B", help="id or name of the pseudo-label dataset")
    _add_training(parser)
    _add_device(parser)
    _add_processes(parser)
    _add_json(parser)
    _main(parser, _do_refine, argv)


def run(argv: Sequence[str] | None = None) -> None:
    """Propagate and refine in one command."""
    parser = _parser(
        "nnUNetv2_oneshot_run",
        "From one annotated image to a trained nnU-Net: propagate, then refine. Run it again to go on after a stop.",
        "nnUNetv2_oneshot_run -d 501 -o 601 -c 3d_fullres",
    )
    _add_source(parser)
    _add_propagation(parser)
    _add_training(parser)
    _add_device(parser)
    _add_work(parser)
    parser.add_argument("-ref", type=Path, metavar="DIR", help="folder of true labels, to score the final labels by")
    _main(parser, _do_run, argv)


def evaluate(argv: Sequence[str] | None = None) -> None:
    """Score predictions against true labels."""
    parser = _parser(
        "nnUNetv2_oneshot_evaluate",
        "Dice, Hausdorff distance, its 95th percentile and average surface distance, with 95 % intervals over cases.",
        "nnUNetv2_oneshot_evaluate -ref labelsTs -pred predictions -djfile dataset.json -o scores.json",
    )
    parser.add_argument("-ref", type=Path, required=True, metavar="DIR", help="folder of true labels")
    parser.add_argument("-pred", type=Path, required=True, metavar="DIR", help="folder of labels to score")
    parser.add_argument("-djfile", type=Path, required=True, metavar="F", help="dataset.json")
    parser.add_argument("-o", type=Path, metavar="JSON", help="write all scores there")
    _add_json(parser)
    _main(parser, _do_evaluate, argv)


def report(argv: Sequence[str] | None = None) -> None:
    """Not in this version."""
    _not_yet("report", "writes a static page about a pseudo-label dataset", argv)


def review(argv: Sequence[str] | None = None) -> None:
    """Not in this version."""
    _not_yet("review", "serves a local page to accept or reject labels", argv)


def export(argv: Sequence[str] | None = None) -> None:
    """Not in this version."""
    _not_yet("export", "packs the trained model for a stock nnU-Net", argv)


def convert_care_liseg(argv: Sequence[str] | None = None) -> None:
    """Not in this version."""
    _not_yet("convert_care_liseg", "converts the CARE-LiSeg layout", argv)


def convert_yoloseg(argv: Sequence[str] | None = None) -> None:
    """Not in this version."""
    _not_yet("convert_yoloseg", "converts the YoloSeg layout", argv)


def convert_dicom(argv: Sequence[str] | None = None) -> None:
    """Not in this version."""
    _not_yet("convert_dicom", "converts DICOM series", argv)


def demo(argv: Sequence[str] | None = None) -> None:
    """The whole loop on phantoms."""
    parser = _parser(
        "nnUNetv2_oneshot_demo",
        "Make phantom volumes, annotate one, run the whole loop on them and print the scores (minutes on two cores).",
        "nnUNetv2_oneshot_demo -o demo_output",
    )
    parser.add_argument(
        "-o", type=Path, default=Path("demo_output"), metavar="DIR", help="folder (default: %(default)s)"
    )
    parser.add_argument("-preset", choices=("default", "small", "tiny"), default="tiny", help="default: %(default)s")
    parser.add_argument("--overwrite", action="store_true", help="start again in a folder that holds a demo")
    _add_device(parser)
    _add_processes(parser)
    _add_json(parser)
    _main(parser, _do_demo, argv)


def info(argv: Sequence[str] | None = None) -> None:
    """Versions, devices and folders."""
    parser = _parser(
        "nnUNetv2_oneshot_info", "Versions, devices and folders, for a bug report.", "nnUNetv2_oneshot_info"
    )
    _add_json(parser)
    _main(parser, _do_info, argv)


def _do_propagate(arguments: argparse.Namespace) -> Summary:
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
    )
    return _function("summary", "propagation_summary")(outcome)


def _do_consensus(arguments: argparse.Namespace) -> Summary:
    manifest = _function("consensus")(
        arguments.d, arguments.o, arguments.i, num_processes=arguments.np, overwrite=arguments.overwrite
    )
    return _function("summary", "manifest_summary")(manifest, arguments.o)


def _do_refine(arguments: argparse.Namespace) -> Summary:
    result = _function("refine")(
        arguments.d, arguments.c, **_training_options(arguments), device=arguments.device, num_processes=arguments.np
    )
    return _function("summary", "refinement_summary")(result)


def _do_run(arguments: argparse.Namespace) -> Summary:
    result = _function("run")(
        arguments.d,
        arguments.o,
        arguments.c,
        propagators=_propagators(arguments),
        views=arguments.views,
        options=_propagator_options(arguments),
        training=_training_options(arguments),
        num_processes=arguments.np,
        overwrite=arguments.overwrite,
        reference=arguments.ref,
    )
    return _function("summary", "run_summary")(result)


def _do_evaluate(arguments: argparse.Namespace) -> Summary:
    module = importlib.import_module("nnunet_oneshot.evaluate")
    result = module.evaluate(arguments.ref, arguments.pred, arguments.djfile, arguments.o)
    return {"lines": [module.format_table(result)], **result.to_json()}


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
    )


def _propagators(arguments: argparse.Namespace) -> list[str]:
    return arguments.propagator or ["registration" if arguments.recipe is None else "sam2"]


def _training_options(arguments: argparse.Namespace) -> dict[str, Any]:
    return {
        "trainer": arguments.tr,
        "plans": arguments.p,
        "rounds": arguments.rounds,
        "preset": arguments.preset,
    }


def _parser(name: str, description: str, example: str) -> argparse.ArgumentParser:
    return argparse.ArgumentParser(
        prog=name,
        description=description,
        epilog=f"example: {example}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )


def _add_source(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "-d", required=True, metavar="A", help="id or name of the raw dataset with the annotated case(s)"
    )
    parser.add_argument("-o", type=int, required=True, metavar="B", help="id of the dataset to write")


def _add_propagation(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "-propagator",
        nargs="+",
        metavar="NAME",
        help="what carries the labels, registration or sam2; several are fused (default: registration; with a "
        "-recipe sam2)",
    )
    parser.add_argument("-sam2_chk", metavar="NAME", help="SAM2 weights: builtin, sam2.1_hiera_tiny, ..., or a file")
    parser.add_argument("-sam2_cfg", metavar="YAML", help="configuration of a weights file that nothing identifies")
    parser.add_argument(
        "-mode",
        choices=("insert", "sequence", "slice", "retrieve", "self"),
        help="how sam2 works (default: slice where a label is sparse, else self)",
    )
    parser.add_argument(
        "-adapt",
        type=int,
        default=0,
        metavar="N",
        help="fine-tune SAM2 for N steps on warps of the annotated case first (default: 0)",
    )
    parser.add_argument("-recipe", metavar="NAME", help="set sam2 up as a publication did: yoloseg or ssl_medsam2")
    parser.add_argument("-views", nargs="+", metavar="VIEW", help="views to use (default: each propagator's own)")


def _add_training(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("-c", required=True, metavar="CONFIG", help=f"nnU-Net configuration: {CONFIGURATIONS}")
    parser.add_argument("-tr", default=None, metavar="TRAINER", help="trainer (default: the preset's OneShotTrainer)")
    parser.add_argument("-p", default=None, metavar="PLANS", help="plans that exist (default: the preset's own)")
    parser.add_argument(
        "-rounds", type=int, default=1, metavar="N", help="rounds of relabelling (default: %(default)s)"
    )
    parser.add_argument(
        "-preset",
        choices=("default", "small", "tiny"),
        default="default",
        help="small: what two CPU cores can train; tiny: for a try (default: %(default)s)",
    )


def _add_work(parser: argparse.ArgumentParser) -> None:
    _add_processes(parser)
    parser.add_argument("--overwrite", action="store_true", help="replace the output dataset if it exists")
    _add_json(parser)


def _add_device(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "-device", choices=("cpu", "cuda", "mps"), default=None, help="default: cuda where there is one"
    )


def _add_processes(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("-np", type=int, metavar="N", help="cases at once (default: the processor count)")


def _add_json(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("-json", action="store_true", help="print the final summary as JSON on standard output")


def _main(parser: argparse.ArgumentParser, execute: Execute, argv: Sequence[str] | None) -> None:
    arguments = parser.parse_args(argv)
    if getattr(arguments, "device", "cpu") is None:
        arguments.device = _best_device()
    try:
        with _only_errors_printed() if arguments.json else contextlib.nullcontext():
            summary = execute(arguments)
    except USER_ERRORS as error:
        parser.exit(2, f"{parser.prog}: error: {' '.join(str(error).split())}\n")
    except NnunetFailureError as error:
        parser.exit(1, f"{parser.prog}: failed: {error}\n")
    except KeyboardInterrupt:
        parser.exit(1, f"\n{parser.prog}: {INTERRUPTED}\n")
    if arguments.json:
        print(json.dumps({key: value for key, value in summary.items() if key != "lines"}, indent=2))
    else:
        print("\n".join(summary["lines"]))


@contextlib.contextmanager
def _only_errors_printed() -> Iterator[None]:
    """Standard output goes to standard error, that of workers and libraries too: with -json it is JSON alone."""
    sys.stdout.flush()
    kept = os.dup(1)
    os.dup2(2, 1)
    try:
        with contextlib.redirect_stdout(sys.stderr):
            yield
    finally:
        os.dup2(kept, 1)
        os.close(kept)


def _best_device() -> str:
    torch = importlib.import_module("torch")
    return "cuda" if torch.cuda.is_available() else "cpu"


def _not_yet(name: str, does: str, argv: Sequence[str] | None) -> None:
    command = f"nnUNetv2_oneshot_{name}"
    parser = argparse.ArgumentParser(prog=command, description=f"Will be the command that {does}; not in this version.")
    parser.parse_known_args(argv)
    parser.exit(
        2,
        f"{command}: error: expected a command of this version, found one that is not there yet ({does}); "
        "see the README for what is\n",
    )
