"""How many rounds, asked of made-up sets: `evidence.py`'s ours with none, one and up to three, on phantoms and anatomy.

    python benchmarks/made_up_rounds.py -o WORK --data FOLDER [--sets isotropic synthetic10] [--preset small]

FOLDER is what `made_up_sets.py` has written, which has no patient's image: so the default may be chosen by this. Rows
are as those of `evidence.py`, made_up_<set>_..., and are not run again; labels' Dice by round, agreement of rounds, the
model on test cases and its paired difference to the row before, with a bootstrap 95 % interval over cases.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Mapping
from itertools import pairwise
from pathlib import Path
from typing import Any

from common import data_set, markdown
from evidence import FOREGROUND, PRESETS, Evidence
from evidence_table import paired

METHODS = ("ours_no_refinement", "ours", "ours_3_rounds")


class MadeUp(Evidence):
    """One made-up set."""

    prefix = "made_up"


def line(row: Mapping[str, Any], before: Mapping[str, Any] | None) -> list[Any]:
    """One row's cells."""
    labels = " / ".join(f"{dice:.3f}" for dice in row["label_dice"].values())
    agreement = " / ".join(f"{dice:.3f}" for dice in row["agreement_with_round_before"].values())
    difference = "-" if before is None else "{:+.3f} ({:+.3f} to {:+.3f})".format(*paired(row, before))
    model = f"{row['scores'][FOREGROUND]['Dice'][0]:.3f}"
    return [row["set"], row["what"], row["test_cases"], labels, agreement or "-", model, difference]


def main() -> None:
    """Run what is missing and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sets", nargs="+", default=["isotropic", "synthetic10"])
    parser.add_argument("--data", type=Path, required=True, help="what made_up_sets.py has written")
    parser.add_argument("--preset", default="small", choices=sorted(PRESETS))
    parser.add_argument("-device", default="cpu")
    parser.add_argument("-o", type=Path, required=True, help="working folder")
    parser.set_defaults(cases=26, training=1, configuration=None, no_mirroring=False)
    arguments = parser.parse_args()
    os.environ["ONESHOT_DATA"] = str(arguments.data.resolve())
    lines = []
    for name in arguments.sets:
        made = MadeUp(name, data_set(name).split["annotated_default"], arguments)
        rows = [made.row(method) for method in METHODS]
        lines += [line(row, before) for before, row in pairwise([None, *rows]) if row is not None]
    print(
        markdown(["set", "what", "test cases", "labels by round", "rounds agree", "model", "to the row above"], lines)
    )


if __name__ == "__main__":
    main()
