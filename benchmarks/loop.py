"""The whole loop on a real set, against what a user would do instead; all trained rows have the same budget.

    python benchmarks/loop.py --set hippocampus --cases 26 --preset small -o WORK

Rows, each scored on the test cases, whose images and labels no labelling or training sees:
  registration   the annotated case registered to every test image, views fused
  annotated      stock trainer on the annotated case alone
  fused          stock trainer on the fused pseudo labels, divergence not ignored
  oneshot        OneShotTrainer on the same labels with divergence as ignore
  refined        OneShotTrainer after one round of relabelling
Rows that are there already are not run again; an interrupted one goes on. Nothing is chosen by these scores.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from common import DataSet, data_set, lay_out, markdown, read_row, use_folders, write_row

from nnunet_oneshot import nnunet
from nnunet_oneshot.baseline import train_annotated_only
from nnunet_oneshot.evaluate import FOREGROUND, Evaluation, evaluate
from nnunet_oneshot.parallel import default_processes
from nnunet_oneshot.propagate import propagate
from nnunet_oneshot.refine import Plan, open_store, refine
from nnunet_oneshot.settings import PRESETS

POOL, LABELLED, ALONE, FUSED, TEST, TEST_LABELLED = 501, 601, 602, 603, 701, 801
ROWS = ("registration", "annotated", "fused", "oneshot", "refined")


class Loop:
    """One data set, one annotated case, one preset."""

    def __init__(self, arguments: argparse.Namespace) -> None:
        self.data: DataSet = data_set(arguments.set)
        self.annotated: str = arguments.annotated or self.data.split["annotated_default"]
        self.preset: str = arguments.preset
        self.configuration: str = arguments.c
        self.device: str = arguments.device
        self.work: Path = arguments.o
        pool = [case for case in self.data.split["pool"] if case != self.annotated]
        self.pool = pool[: (arguments.cases or len(pool) + 1) - 1]
        self.test: list[str] = self.data.split["test"]

    def registration(self) -> Path:
        """Labels of the test images by registration alone."""
        lay_out(self.data, TEST, self.test, [self.annotated], name=f"{self.data.name}_test")
        self._propagate(TEST, TEST_LABELLED)
        return open_store(TEST_LABELLED)[0].fused_path("x").parent

    def annotated_alone(self) -> Path:
        """Predictions of the stock trainer that saw the annotated case alone."""
        self._lay_out_pool()
        plan = train_annotated_only(
            POOL, ALONE, self.configuration, preset=self.preset, device=self.device, num_processes=default_processes()
        )
        return self._predict("annotated", ALONE, plan)

    def fused(self) -> Path:
        """Predictions of the stock trainer on the best guess everywhere."""
        self._pool()
        name, preset = self._fused_dataset(), PRESETS[self.preset]
        plan = Plan(self.configuration, preset.trainer("nnUNetTrainer"), preset.plans, self.preset)
        nnunet.plan_and_preprocess(name, preset, [self.configuration])
        nnunet.train(name, self.configuration, "all", plan.trainer, plan.plans, self.device)
        return self._predict("fused", FUSED, plan)

    def oneshot(self) -> Path:
        """Predictions of OneShotTrainer on round 0's labels."""
        return self._refined("oneshot", 0)

    def refined(self) -> Path:
        """Predictions of OneShotTrainer on round 1's labels."""
        return self._refined("refined", 1)

    def score(self, predictions: Path) -> Evaluation:
        """Scores on the test cases."""
        djfile = self._lay_out_pool() / "dataset.json"
        return evaluate(self.data.labels, predictions, djfile, cases=self.test)

    def _refined(self, row: str, rounds: int) -> Path:
        self._pool()
        result = refine(LABELLED, self.configuration, rounds=rounds, preset=self.preset, device=self.device)
        return self._predict(row, LABELLED, result.plan)

    def _lay_out_pool(self) -> Path:
        return lay_out(self.data, POOL, self.pool, [self.annotated])

    def _pool(self) -> None:
        self._lay_out_pool()
        self._propagate(POOL, LABELLED)

    def _propagate(self, source: int, output: int) -> None:
        raw = Path(os.environ["nnUNet_raw"])
        if not list(raw.glob(f"Dataset{output}_*/oneshot.json")):
            propagate(source, output)

    def _predict(self, row: str, dataset: int, plan: Plan) -> Path:
        images = {c: [self.data.folder / "images" / f"{c}{self.data.ending}"] for c in self.test}
        output = self.work / "predictions" / row
        nnunet.predict(dataset, self.configuration, ("all",), plan.trainer, plan.plans, images, output, self.device)
        return output

    def _fused_dataset(self) -> str:
        store, _ = open_store(LABELLED)
        folder = store.folder.with_name(f"Dataset{FUSED}_{self.data.name}_fused")
        content = json.loads((store.folder / "dataset.json").read_text())
        del content["labels"]["ignore"], content["oneshot"]
        for case, entry in content["dataset"].items():
            entry["label"] = f"../{store.folder.name}/pseudoTr/rounds/00/{case}{self.data.ending}"
        folder.mkdir(exist_ok=True)
        (folder / "dataset.json").write_text(json.dumps(content, indent=2))
        return folder.name


def main() -> None:
    """Run what is missing and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--set", default="hippocampus")
    parser.add_argument("--annotated", help="annotated case (default: the split's own)")
    parser.add_argument("--cases", type=int, default=26, help="pool cases, the annotated one included")
    parser.add_argument("--preset", default="small", choices=sorted(PRESETS))
    parser.add_argument("-c", default="3d_fullres")
    parser.add_argument("-device", default="cpu")
    parser.add_argument("--rows", nargs="+", default=list(ROWS), choices=ROWS)
    parser.add_argument("-o", type=Path, required=True, help="working folder")
    arguments = parser.parse_args()
    use_folders(arguments.o)
    loop = Loop(arguments)
    steps: dict[str, Callable[[], Path]] = {
        "registration": loop.registration,
        "annotated": loop.annotated_alone,
        "fused": loop.fused,
        "oneshot": loop.oneshot,
        "refined": loop.refined,
    }
    rows = [_row(loop, name, steps[name]) for name in ROWS if name in arguments.rows]
    header = ["row", "Dice", "95 % interval", "HD95 mm", "minutes"]
    print(markdown(header, [[r["row"], r["dice"], r["dice_interval"], r["hd95"], r["minutes"]] for r in rows]))


def _row(loop: Loop, name: str, step: Callable[[], Path]) -> dict[str, Any]:
    key = f"loop_{loop.data.name}_{loop.annotated}_{len(loop.pool) + 1}_{loop.preset}_{loop.configuration}_{name}"
    if (row := read_row(key)) is not None:
        return row
    begin = time.monotonic()
    scored = loop.score(step())
    dice, hd95 = (scored.summary[FOREGROUND][metric] for metric in ("Dice", "HD95"))
    return write_row(
        key,
        {
            "row": name,
            "set": loop.data.name,
            "annotated": loop.annotated,
            "pool": len(loop.pool) + 1,
            "test_cases": len(loop.test),
            "preset": loop.preset,
            "configuration": loop.configuration,
            "dice": round(dice.mean, 4),
            "dice_interval": [round(dice.low, 4), round(dice.high, 4)],
            "hd95": round(hd95.mean, 3),
            "classes": {c: round(r["Dice"].mean, 4) for c, r in scored.summary.items()},
            "minutes": round((time.monotonic() - begin) / 60, 1),
            "seed": "nnU-Net's own (none)",
        },
    )


if __name__ == "__main__":
    main()
