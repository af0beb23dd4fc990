"""When a round makes labels worse, and what of that can be seen without ground truth: models of ever less training.

    python benchmarks/guard.py --set isotropic --cases 10 -c 3d_fullres --budgets 1 2 3 10 -o WORK
    python benchmarks/guard.py --table -o WORK

On sets of `made_up_sets.py` (ONESHOT_DATA names their folder), so that `refine`'s guard may be chosen by this. Labels
of round 0 are those of `propagate`; a model is trained on them for each of the budgets, in epochs of the preset
`small`, and makes round 1's labels as `refine` does by default. Each row tells the true Dice of both, and what a guard
can go by: the estimated Dice of both, how far labels moved (one less their Dice with the labels before), and both
labels' Dice with the views of all propagators. Seeded; finished rows are not made again.
"""

from __future__ import annotations

import argparse
import json
import os
from pathlib import Path
from typing import Any

import numpy as np
from common import GATED, RESULTS, markdown, read_row, use_folders, write_row
from refinement_ablation import Rounds
from trainer_ablation import add_data_arguments

from nnunet_oneshot.evaluate import FOREGROUND, evaluate
from nnunet_oneshot.first_round import take_over
from nnunet_oneshot.quality import VIEWS, Opinions, gather
from nnunet_oneshot.quality_gate import mean_quality
from nnunet_oneshot.quality_opinions import opinions
from nnunet_oneshot.refine import open_store
from nnunet_oneshot.relabel import Change, relabel
from nnunet_oneshot.rounds import kept_manifest

COPY = 700
"""With the epochs added, id of the dataset whose round 1 the model of a budget makes."""


class Guard(Rounds):
    """One set, one annotated case, models of several budgets."""

    prefix = "guard"

    @property
    def settings(self) -> dict[str, Any]:
        """What all rows of a working folder share."""
        return {key: value for key, value in super().settings.items() if key != "epochs"}

    def row_of(self, epochs: int) -> dict[str, Any]:
        """The row of a budget, made now where it is not there."""
        self.epochs, number = epochs, COPY + epochs
        if (done := read_row(self.key("round_1"))) is not None:
            return self.checked("round_1", done, {**self.settings, "epochs": epochs, "n": len(self.pool)})
        self._copy(number)
        store, raw = open_store(number)
        take_over(raw, store, 1, GATED)
        predictions = self._said_by(f"round_0_{epochs}")
        self._relabelled(number, predictions, 1)
        # The round is kept: this tells how far its labels moved.
        change = relabel(raw, store, predictions, 1, 1, GATED)
        return write_row(self.key("round_1"), self._content(number, change, predictions))

    def _content(self, number: int, change: Change, predictions: Path) -> dict[str, Any]:
        store, _ = open_store(number)
        content: dict[str, Any] = {**self.settings, "epochs": self.epochs, "n": len(self.pool)}
        content["true"] = [self._dice(store.round_path(made, "x").parent) for made in (0, 1)]
        content["estimated"] = [round(mean_quality(kept_manifest(store, made)) or 0.0, 4) for made in (0, 1)]
        content["moved"] = round(1 - change.mean, 4)
        content["with_views"] = [round(self._with_views(number, made), 4) for made in (0, 1)]
        content["model"] = self._dice(predictions)
        return content

    def _with_views(self, number: int, made: int) -> float:
        """Mean Dice of a round's labels with the views of all propagators."""
        store, raw = open_store(number)
        found = []
        for case, record in kept_manifest(store, 0).cases.items():
            if case in self.pool:
                said = opinions(raw, store, case, record, None)
                agreements = gather(raw.read_label(store.round_path(made, case)), Opinions(said.views))[VIEWS]
                found.append(float(np.mean(list(agreements.values()))))
        return float(np.mean(found))

    def _dice(self, folder: Path) -> float:
        scored = evaluate(self.data.labels, folder, self.dataset_json, cases=self.pool)
        return round(scored.summary[FOREGROUND]["Dice"].mean, 4)


def table() -> str:
    """All rows, those whose labels got better first."""
    rows = [json.loads(path.read_text(encoding="utf-8")) for path in RESULTS.glob("guard_*.json")]
    rows.sort(key=lambda row: row["true"][0] - row["true"][1])
    header = ["set", "configuration", "epochs", "true Dice", "the model's", "estimated", "moved", "times the error"]
    lines = []
    for row in rows:
        times = row["moved"] / (1 - row["estimated"][0])
        true, estimated, views = ("{:.3f} to {:.3f}".format(*row[key]) for key in ("true", "estimated", "with_views"))
        about = [row["set"], row["configuration"], row["epochs"], true, f"{row['model']:.3f}", estimated]
        lines.append([*about, f"{row['moved']:.3f}", f"{times:.1f}", views])
    return markdown([*header, "with the views"], lines)


def main() -> None:
    """Make what is missing and print the table of all rows."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_data_arguments(parser)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--budgets", type=int, nargs="+", default=[1, 2, 3, 10], help="epochs of the preset small")
    parser.add_argument("--table", action="store_true", help="only print what is there")
    parser.set_defaults(spoil=False)
    arguments = parser.parse_args()
    if not arguments.table:
        use_folders(arguments.o)
        os.environ["nnUNet_n_proc_DA"] = "0"
        guard = Guard(arguments, arguments.seed)
        guard.prepare()
        for epochs in arguments.budgets:
            guard.row_of(epochs)
    print(table())


if __name__ == "__main__":
    main()
