"""Arguments that several commands share, in nnU-Net's own spelling."""

from __future__ import annotations

import argparse
from pathlib import Path

CONFIGURATIONS = "2d, 3d_fullres, 3d_lowres"
LABELLING_PROCESSES = "of sam2 and correspondence on a CUDA device 2"
TRAINING_PROCESSES = "of SAM2 on a CUDA device 2; nnU-Net preprocesses at most 8, of 3d_fullres 4"


def new_parser(name: str, description: str, example: str) -> argparse.ArgumentParser:
    return argparse.ArgumentParser(
        prog=name,
        description=description,
        epilog=f"example: {example}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )


def add_source(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "-d", required=True, metavar="A", help="id or name of the raw dataset with the annotated case(s)"
    )
    parser.add_argument("-o", type=int, required=True, metavar="B", help="id of the dataset to write")


def add_propagation(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "-propagator",
        nargs="+",
        metavar="NAME",
        help="what carries the labels: registration, relay (registration's, carried on from other images), sam2, "
        "correspondence; several are fused (default: registration relay sam2, or that of the -recipe)",
    )
    _add_sam2(parser)
    parser.add_argument(
        "-recipe",
        metavar="NAME",
        help="carry labels as a publication did: yoloseg or ssl_medsam2 (by sam2), oneseg (by correspondence)",
    )
    parser.add_argument(
        "--reverse_check",
        action="store_true",
        help="carry registered labels back to the annotated case too: a third more time, and a better estimate of "
        "their Dice (relay does so unasked)",
    )
    parser.add_argument(
        "-same_patient",
        type=Path,
        metavar="FILE",
        help="JSON or CSV of un-annotated cases and the annotated case of the same patient, whose label they get by "
        "their place in space",
    )
    parser.add_argument("-views", nargs="+", metavar="VIEW", help="views to use (default: each propagator's own)")


def _add_sam2(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("-sam2_chk", metavar="NAME", help="SAM2 weights: builtin, sam2.1_hiera_tiny, ..., or a file")
    parser.add_argument("-sam2_cfg", metavar="YAML", help="configuration of a weights file that nothing identifies")
    parser.add_argument(
        "-mode",
        choices=("insert", "sequence", "slice", "retrieve", "self"),
        help="how sam2 works (default: self, slice first where a label is sparse; see the documentation)",
    )
    parser.add_argument(
        "-window",
        nargs="+",
        metavar="W",
        help="intensities that sam2 sees: abdomen, lung, brain, bone (CT), or LOW HIGH (default: percentiles)",
    )
    parser.add_argument(
        "-channels",
        nargs="+",
        metavar="C",
        help="channels that sam2 sees, from 0: one, three (as colours) or mean (default: colours of 2D images, or 0)",
    )
    parser.add_argument(
        "-sam2_batch", type=int, default=8, metavar="N", help="slices that sam2 works on at once (default: %(default)s)"
    )
    parser.add_argument(
        "-adapt",
        type=int,
        default=0,
        metavar="N",
        help="fine-tune SAM2 for N steps on warps of the annotated case first; 100 to 300 are usual, each about 1 s on "
        "one CPU core with the built-in checkpoint, once for all cases (default: 0)",
    )


def add_training(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("-c", required=True, metavar="CONFIG", help=f"nnU-Net configuration: {CONFIGURATIONS}")
    parser.add_argument("-tr", default=None, metavar="TRAINER", help="trainer (default: the preset's OneShotTrainer)")
    parser.add_argument("-p", default=None, metavar="PLANS", help="plans that exist (default: the preset's own)")
    _add_rounds(parser)
    _add_trust(parser)
    parser.add_argument(
        "-preset",
        choices=("default", "small", "tiny"),
        default="default",
        help="default: nnU-Net's own length, rounds + 1 trainings of 1000 epochs, for a GPU; small: what two CPU cores "
        "can train, 30 short epochs each; tiny: for a try (default: %(default)s)",
    )


def _add_rounds(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "-rounds",
        type=int,
        default=1,
        metavar="N",
        help="rounds of relabelling, at most; rounds + 1 trainings of 1000 epochs (preset default) are made "
        "(default: %(default)s)",
    )
    parser.add_argument(
        "-num_folds",
        type=int,
        default=1,
        metavar="K",
        help="1: one model on all cases; 2 to 5: as many, each case relabelled by the one that did not train on it, "
        "but for partly drawn cases, on which all train (default: %(default)s)",
    )
    parser.add_argument(
        "--from_scratch",
        action="store_true",
        help="train each round from new weights, not from those of the one before",
    )
    parser.add_argument(
        "-stop_dice",
        type=float,
        default=0.95,
        metavar="D",
        help="mean Dice between two rounds' labels from which on they have settled (default: %(default)s)",
    )
    parser.add_argument("--all_rounds", action="store_true", help="make all rounds, whether labels settle or go astray")


def _add_trust(parser: argparse.ArgumentParser) -> None:
    """Which labels, and which of their voxels, are trained on."""
    parser.add_argument(
        "-min_quality",
        type=float,
        default=0.0,
        metavar="D",
        help="estimated Dice below which a case is left out, in labels made from then on, until a round lifts it; "
        "never more than half of the cases (default: %(default)s, none)",
    )
    parser.add_argument(
        "--weight_by_quality", action="store_true", help="draw cases in training as often as their estimated Dice says"
    )
    parser.add_argument(
        "-self_opinion",
        metavar="NAME",
        default="auto",
        help="SAM2 weights (builtin, ...) for one more opinion in relabelling: self mode, prompted by the model's "
        "prediction; none for none; auto: those that labelled the images, if along three planes and not adapted "
        "(default: %(default)s)",
    )
    parser.add_argument(
        "-min_margin",
        type=float,
        default=0.0,
        metavar="P",
        help="margin between the model's first two classes below which a voxel becomes ignore; OneShotTrainer fills it "
        "with the best guess all the same, OneShotTrainerConsistency does not (default: %(default)s)",
    )


def add_work(parser: argparse.ArgumentParser, more: str = "") -> None:
    add_processes(parser, more)
    add_starting_anew(
        parser,
        "replace the output dataset if it exists; where it was trained on, move its models out of nnUNet_results first",
    )
    add_json(parser)


def add_starting_anew(parser: argparse.ArgumentParser, meaning: str) -> None:
    """--overwrite of a command that begins again with it, so that what was interrupted goes on without."""
    parser.add_argument("--overwrite", action="store_true", help=meaning)
    parser.set_defaults(goes_on_without_overwrite=True)


def add_device(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "-device", choices=("cpu", "cuda", "mps"), default=None, help="default: cuda where there is one"
    )


def add_processes(parser: argparse.ArgumentParser, more: str = "") -> None:
    parser.add_argument(
        "-np",
        type=_at_least_one,
        metavar="N",
        help=f"cases at once (default: the processor count{more and f'; {more}'})",
    )


def _at_least_one(text: str) -> int:
    """A whole number of 1 or more, as argparse wants its types."""
    try:
        number = int(text)
    except ValueError:
        number = 0
    if number < 1:
        raise argparse.ArgumentTypeError(
            f"expected a whole number of 1 or more, found {text}; leave it out for the default"
        )
    return number


def add_json(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("-json", action="store_true", help="print the final summary as JSON on standard output")
