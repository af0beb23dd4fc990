"""float32 and bfloat16 on the CPU: the same training in both, its Dice on test cases and its seconds.

    python benchmarks/precision.py --set hippocampus -c 3d_fullres --epochs 10 --no_mirroring --seed 0 1 2 -o WORK

Trainings by OneShotTrainer's defaults on the labels of round 0, preset `small` (`--epochs` of it), seeded: one seed
draws the same samples in either. Each is predicted in what it was trained in, the float32 one in
bfloat16, too. `ONESHOT_DATA` may name what `made_up_sets.py` has written; WORK may be that of `refinement_ablation.py`.
Seconds are those of the processor. Finished rows are small JSON files and are not made again. Needs AMX for a gain.
"""

from __future__ import annotations

import argparse
import os
import time
from collections.abc import Sequence
from typing import Any

import numpy as np
from common import markdown, read_row, use_folders, write_row
from in_process import Weights, make, predict
from refinement_ablation import UNGATED, Rounds
from trainer_ablation import PRESET, add_data_arguments, difference

from nnunet_oneshot.evaluate import FOREGROUND, evaluate
from nnunet_oneshot.metrics import METRICS

PRECISIONS = ("float32", "bfloat16")


class Precision(Rounds):
    """One data set, one annotated case, one budget; every seed in both."""

    prefix = "precision"

    def pair(self, seed: int) -> dict[str, Any]:
        """The row of one seed, made now where it is not there yet."""
        self.seed = seed
        if (done := read_row(self.key("pair"))) is not None:
            return self.checked("pair", done, {**self.settings, "pool": len(self.pool) + 1, "n": len(self.test)})
        found: dict[str, Any] = {}
        weights: Weights = {}
        for precision in PRECISIONS:
            begin = time.process_time()
            trainer = self._made(precision)
            trainer.run_training()
            seconds = time.process_time() - begin
            found[precision] = {"training_cpu_seconds": round(seconds), **self._scored(trainer, precision, precision)}
            if precision == "float32":
                weights = trainer.network.state_dict()
        found["float32, predicted in bfloat16"] = self._scored(self._made("bfloat16"), "both", "bfloat16", weights)
        about = {**self.settings, "pool": len(self.pool) + 1, "n": len(self.test)}
        return write_row(self.key("pair"), {**about, "trainings": found})

    def _made(self, precision: str) -> Any:
        names = (PRESET.trainer(), PRESET.plans)
        return make(UNGATED, self.configuration, names, self.epochs, self.seed, bfloat16=precision == "bfloat16")

    def _scored(self, trainer: Any, name: str, precision: str, weights: Weights | None = None) -> dict[str, Any]:
        output = self.work / "predictions" / f"precision_{name}_seed{self.seed}"
        images = {case: [self.data.folder / "images" / f"{case}{self.data.ending}"] for case in self.test}
        begin = time.process_time()
        predict(trainer, images, output, self.mirroring, [weights] if weights else None)
        seconds = time.process_time() - begin
        scored = evaluate(self.data.labels, output, self.dataset_json, cases=self.test)
        case_dice = scored.case_mean()[:, METRICS.index("Dice")]
        return {
            "predicted_in": precision,
            "predicting_cpu_seconds": round(seconds, 1),
            "dice": round(scored.summary[FOREGROUND]["Dice"].mean, 4),
            "case_dice": [round(float(value), 4) for value in case_dice],
        }


def line(rows: Sequence[dict[str, Any]]) -> list[Any]:
    """One set's line: means over seeds, medians of seconds."""
    by = {name: [row["trainings"][name] for row in rows] for name in rows[0]["trainings"]}
    first = by["float32"]
    dice = [f"{np.mean([one['dice'] for one in ones]):.3f}" for ones in by.values()]
    seconds = [
        np.median([one[what] for one in by[name]])
        for what in ("training_cpu_seconds", "predicting_cpu_seconds")
        for name in PRECISIONS
    ]
    gains = [f"{before:.0f} to {after:.0f}" for before, after in (seconds[:2], seconds[2:])]
    differences = [difference(by["bfloat16"], first), difference(by["float32, predicted in bfloat16"], first)]
    return [rows[0]["set"], rows[0]["n"], len(rows), *dice[:2], *differences, *gains]


def main() -> None:
    """Make what is missing and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_data_arguments(parser)
    parser.add_argument("--seed", nargs="+", type=int, default=[0], help="one or more")
    parser.set_defaults(spoil=False)
    arguments = parser.parse_args()
    use_folders(arguments.o)
    os.environ["nnUNet_n_proc_DA"] = "0"
    made = Precision(arguments, 0)
    made.prepare()
    rows = [made.pair(seed) for seed in arguments.seed]
    header = ["set", "n", "seeds", "float32", "bfloat16", "difference", "of predicting alone"]
    print(markdown([*header, "CPU s of training", "of predicting"], [line(rows)]))


if __name__ == "__main__":
    main()
