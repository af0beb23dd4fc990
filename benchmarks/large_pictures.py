"""Whether `small` learns large 2D images better from coarser pixels, on phantoms alone.

    python benchmarks/large_pictures.py -o WORK [--rows as_planned:0 coarser:0] [--size 540 800]

Twenty-six RGB phantoms of that size, all annotated, nnU-Net's own trainer in the preset `small`, 2d: once on the plan
that nnU-Net makes within the preset's budget, whose patch holds a part of an image, once on that of
`nnUNetOneShotSmallPlans`, whose pixels are coarser so that it holds all of it. NAME:SEED is a row; seeds are those of
weights, samples and augmentation. Dice, HD95 in pixels and ASSD on twelve other phantoms. Finished rows are small JSON
files in benchmarks/results/.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

from common import markdown, read_row, use_folders, write_row
from in_process import make, predict
from nnunetv2.experiment_planning.plan_and_preprocess_api import (
    extract_fingerprint_dataset,
    plan_experiment_dataset,
    preprocess_dataset,
)

from nnunet_oneshot.evaluate import FOREGROUND, evaluate
from nnunet_oneshot.phantom import write_phantom_dataset
from nnunet_oneshot.planner import OneShotSmallPlanner, SmallFingerprintExtractor
from nnunet_oneshot.settings import PRESETS

SMALL = PRESETS["small"]
CASES, TEST = 26, 12
NUMBERS = {"as_planned": 501, "coarser": 502}


class AsPlanned(OneShotSmallPlanner):
    """The same budget, nnU-Net's own resolution."""

    assert SMALL.planner is not None
    limits = replace(SMALL.planner, least_of_image_2d=0)


PLANNERS = {"as_planned": AsPlanned, "coarser": OneShotSmallPlanner}


def prepare(row: str, work: Path, size: tuple[int, int]) -> dict[str, Any]:
    """Phantoms with all their labels, planned and preprocessed; the plan of 2d."""
    number = NUMBERS[row]
    folder, truth = work / "nnUNet_raw" / f"Dataset{number}_{row}", work / f"truth_{row}"
    if not folder.is_dir():
        shape = (1, *size)
        write_phantom_dataset(
            folder.parent, number, row, truth=truth, cases=CASES, test_cases=TEST, shape=shape, kind="rgb2d"
        )
        for image in sorted((folder / "imagesTr").glob("*_0000.png")):
            shutil.copy(truth / image.name.replace("_0000", ""), folder / "labelsTr")
        content = json.loads((folder / "dataset.json").read_text(encoding="utf-8"))
        (folder / "dataset.json").write_text(json.dumps({**content, "numTraining": CASES}), encoding="utf-8")
    extract_fingerprint_dataset(number, SmallFingerprintExtractor, 2)
    plans, _ = plan_experiment_dataset(number, PLANNERS[row])
    preprocess_dataset(number, SMALL.plans, ["2d"], [2])
    return dict(plans["configurations"]["2d"])


def run_row(row: str, seed: int, work: Path, size: tuple[int, int]) -> dict[str, Any]:
    """Train and score one row, or read it."""
    name = f"large_pictures_{size[0]}_{size[1]}_{row}_{seed}"
    if (done := read_row(name)) is not None:
        return done
    os.environ.pop("nnUNet_n_proc_DA", None)  # nnU-Net's planner takes its threads from it, and takes no 0
    plan = prepare(row, work, size)
    os.environ["nnUNet_n_proc_DA"] = "0"
    assert SMALL.schedule is not None
    names = SMALL.trainer("nnUNetTrainer"), SMALL.plans
    trainer = make(NUMBERS[row], "2d", names, SMALL.schedule.epochs, seed, bfloat16=True)
    begin = time.monotonic()
    trainer.run_training()
    minutes = (time.monotonic() - begin) / 60
    folder = work / "nnUNet_raw" / f"Dataset{NUMBERS[row]}_{row}"
    images = {path.name.removesuffix("_0000.png"): [path] for path in sorted((folder / "imagesTs").iterdir())}
    output = predict(trainer, images, work / "predictions" / f"{row}_{seed}", mirroring=SMALL.mirroring)
    scored = evaluate(work / f"truth_{row}", output, folder / "dataset.json", cases=sorted(images))
    scores = {metric: round(float(value.mean), 4) for metric, value in scored.summary[FOREGROUND].items()}
    kept = {key: plan[key] for key in ("patch_size", "spacing", "batch_size")}
    about = {"row": row, "seed": seed, "size": list(size), "cases": CASES, "n": TEST, **kept}
    return write_row(name, {**about, "scores": scores, "minutes_of_training": round(minutes, 1)})


def main() -> None:
    """Run what is missing and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("-o", type=Path, required=True, help="working folder")
    parser.add_argument("--rows", nargs="+", default=["as_planned:0", "coarser:0"])
    parser.add_argument("--size", nargs=2, type=int, default=[540, 800], help="rows and columns")
    arguments = parser.parse_args()
    use_folders(arguments.o)
    lines = []
    for chosen in arguments.rows:
        name, _, seed = chosen.partition(":")
        row = run_row(name, int(seed), arguments.o, tuple(arguments.size))
        patch, spacing = " x ".join(map(str, row["patch_size"])), f"{row['spacing'][0]:.2f}"
        scores = [f"{row['scores'][metric]:.3f}" for metric in ("Dice", "HD95", "ASSD")]
        lines.append([name, row["seed"], patch, spacing, row["batch_size"], *scores, row["minutes_of_training"]])
    head = ["plan", "seed", "patch", "pixel", "batch", f"Dice, n = {TEST}", "HD95", "ASSD", "min training"]
    print(markdown(head, lines))


if __name__ == "__main__":
    main()
