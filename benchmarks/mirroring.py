"""Whether short trainings learn more without mirrored images: nnU-Net from all true labels of a pool.

    python benchmarks/mirroring.py -o WORK [--set chaos_mr_t2] [--rows mirrored:0 not_mirrored:0] [--cases 26]

nnU-Net's own trainer in the preset `small`, in the set's own configuration of evidence.py, with and without mirroring
in augmentation and prediction (nnU-Net's `nnUNetTrainerNoMirroring` is without). NAME:SEED is a row; seeds are those of
weights, samples and augmentation. Scores of the test cases by class. Finished rows are small JSON files in
benchmarks/results/.
"""

from __future__ import annotations

import argparse
import os
from pathlib import Path
from typing import Any

from common import NOT_MIRRORED, data_set, lay_out, markdown, read_row, use_folders, write_row
from evidence import FULL, SETS, figures
from in_process import make, predict

from nnunet_oneshot import nnunet
from nnunet_oneshot.evaluate import FOREGROUND, evaluate
from nnunet_oneshot.settings import PRESETS

SMALL = PRESETS["small"]
ROWS = {"mirrored": "nnUNetTrainer", "not_mirrored": NOT_MIRRORED["nnUNetTrainer"]}
"""The trainer of each row."""


def run_row(name: str, row: str, seed: int, work: Path, cases: int) -> dict[str, Any]:
    """Train and score one row, or read it."""
    key = f"mirroring_{name}_{row}_{seed}"
    if (done := read_row(key)) is not None:
        return done
    data, configuration = data_set(name), SETS.get(name, "3d_fullres")
    pool = sorted(data.split["pool"][:cases])
    folder = lay_out(data, FULL, pool, pool, name=f"{name}_full")
    os.environ.pop("nnUNet_n_proc_DA", None)  # nnU-Net's planner takes its threads from it, and takes no 0
    nnunet.plan_and_preprocess(FULL, SMALL, [configuration], 2)
    os.environ["nnUNet_n_proc_DA"] = "0"
    assert SMALL.schedule is not None
    names = SMALL.trainer(ROWS[row]), SMALL.plans
    trainer = make(FULL, configuration, names, SMALL.schedule.epochs, seed, bfloat16=True)
    trainer.run_training()
    images = {case: [data.folder / "images" / f"{case}{data.ending}"] for case in data.split["test"]}
    output = predict(trainer, images, work / "predictions" / key, mirroring=SMALL.mirroring)
    scored = evaluate(data.labels, output, folder / "dataset.json", cases=data.split["test"])
    about = {
        "set": name,
        "row": row,
        "trainer": names[0],
        "seed": seed,
        "pool": len(pool),
        "n": len(images),
        "configuration": configuration,
    }
    return write_row(key, {**about, **figures(scored)})


def main() -> None:
    """Run what is missing and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("-o", type=Path, required=True, help="working folder")
    parser.add_argument("--set", default="chaos_mr_t2", help="also one that made_up_sets.py wrote to $ONESHOT_DATA")
    parser.add_argument("--rows", nargs="+", default=["mirrored:0", "not_mirrored:0"])
    parser.add_argument("--cases", type=int, default=26, help="pool cases")
    arguments = parser.parse_args()
    use_folders(arguments.o / arguments.set)
    rows = []
    for chosen in arguments.rows:
        row, _, seed = chosen.partition(":")
        rows.append(run_row(arguments.set, row, int(seed), arguments.o, arguments.cases))
    classes = [name for name in rows[0]["scores"] if name != FOREGROUND]
    lines = [
        [row["row"], row["seed"], *(f"{row['scores'][name]['Dice'][0]:.3f}" for name in (FOREGROUND, *classes))]
        for row in rows
    ]
    print(markdown(["row", "seed", f"Dice, n = {rows[0]['n']}", *classes], lines))


if __name__ == "__main__":
    main()
