"""What SAM2, prompted by a model's predictions, makes of them: in three turns, along three planes, and with the model.

    python benchmarks/opinion.py NAME -d B -ref FOLDER

B is a dataset in nnUNet_raw that `refine` has predicted at least once (for example WORK of evidence.py, or the output
of `nnUNetv2_oneshot_demo`); FOLDER holds true labels, which score alone. Mean foreground Dice over un-annotated cases:

    before, model            the labels that the model was trained on, and its predictions
    turns, planes            SAM2's self mode, the built-in weights, prompted by the predictions; three views fused
    model_turns, model_planes  the same fused with the predictions, as `refine -self_opinion` does

The row is benchmarks/results/opinion_<NAME>.json. One thread; nothing is random.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import numpy as np
import torch
from builtin_checkpoint import Recorded
from common import markdown, write_row
from registration import dice
from tqdm import tqdm

from nnunet_oneshot.dataset import Case, RawDataset
from nnunet_oneshot.refine import open_store
from nnunet_oneshot.store import Store
from sam2_propagation.consensus import fuse
from sam2_propagation.interface import LabelVolume
from sam2_propagation.sam2 import Sam2Propagator
from sam2_propagation.sam2_settings import TURNED
from sam2_propagation.views import EVERY_PLANE


def labels_of(raw: RawDataset, store: Store, case: Case, propagator: Sam2Propagator) -> dict[str, LabelVolume]:
    """Every way to label one case."""
    image, supports = raw.read_image(case), [raw.support(annotated) for annotated in raw.annotated]
    before = raw.read_label(store.round_path(0, case.name))
    said = raw.read_label(store.state_folder / "predictions" / "01" / f"{case.name}{raw.file_ending}")
    prompter = propagator.prompter
    assert isinstance(prompter, Recorded)
    prompter.label = said
    found = {"before": before, "model": said}
    for name, views in (("turns", TURNED), ("planes", EVERY_PLANE)):
        results = propagator.propagate(supports, [image], views)
        labels = [result.label for result in results if result.label is not None]
        found[name] = fuse(labels, spacing=image.spacing).label if labels else np.zeros_like(said)
        found[f"model_{name}"] = fuse([*labels, said], spacing=image.spacing).label
    return found


def scores(raw: RawDataset, store: Store, reference: Path) -> dict[str, list[float]]:
    """Dice of every way, case by case."""
    propagator, found = Sam2Propagator(mode="self", prompter=Recorded()), {}
    for case in tqdm(raw.unannotated):
        labels = labels_of(raw, store, case, propagator)
        truth = raw.read_label(reference / f"{case.name}{raw.file_ending}")
        for name, label in labels.items():
            found.setdefault(name, []).append(dice(label, truth, sorted(raw.class_names)))
    return found


def main() -> None:
    """Score, write the row and print it."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("name", help="of the row")
    parser.add_argument("-d", required=True, metavar="B")
    parser.add_argument("-ref", type=Path, required=True, metavar="FOLDER")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    store, raw = open_store(arguments.d)
    found = scores(raw, store, arguments.ref)
    means: dict[str, Any] = {name: round(float(np.mean(values)), 4) for name, values in found.items()}
    cases = {name: [round(value, 4) for value in values] for name, values in found.items()}
    write_row(
        f"opinion_{arguments.name}",
        {"set": arguments.name, "n": len(raw.unannotated), "dice": means} | {"cases": cases},
    )
    print(markdown(["set", "n", *means], [[arguments.name, len(raw.unannotated), *means.values()]]))


if __name__ == "__main__":
    main()
