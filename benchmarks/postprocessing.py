"""What keeping the largest piece gives to what `evidence.py` made, where an annotated case shows one piece.

    python benchmarks/postprocessing.py -o WORK [--sets acdc_mr hippocampus] [--cases 24 26] [--preset small]

Data: $ONESHOT_DATA, or ../shared/data beside the repository, and what `evidence.py` left in WORK: predictions for test
cases, and the pool's pseudo labels of every round of ours. Which structures are one piece is read from the annotated
case's label alone. Mean foreground Dice before and after; other labels are read for scoring only. Nothing is random.
What benchmarks/results/postprocessing_<set>_<annotated>_<cases>_<preset>.json holds of what is no longer in WORK stays.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import numpy as np
import SimpleITK as sitk
from common import markdown, read_row, write_row
from evidence_methods import LABELS, METHODS
from nnunetv2.postprocessing.remove_connected_components import remove_all_but_largest_component_from_segmentation
from registration import dice, read_label, split_of

from nnunet_oneshot.postprocessing import one_piece


def scores(name: str, folder: Path, single: list[int], left_out: str = "") -> dict[str, float]:
    """Mean Dice of a folder of labels before and after; the annotated case is left out."""
    before, after = [], []
    for path in sorted(folder.glob("*.nii.gz")):
        case = path.name.removesuffix(".nii.gz")
        if case == left_out:
            continue
        truth = read_label(name, case)
        found = sitk.GetArrayFromImage(sitk.ReadImage(str(path))).astype(np.int16)
        kept = found
        for value in single:
            kept = remove_all_but_largest_component_from_segmentation(kept, value)
        classes = [int(value) for value in np.unique(truth) if value]
        before.append(dice(found, truth, classes))
        after.append(dice(kept, truth, classes))
    return {"n": len(before), "before": round(float(np.mean(before)), 4), "after": round(float(np.mean(after)), 4)}


def run(name: str, cases: int, preset: str, work: Path) -> dict[str, Any]:
    """One set's row, what WORK has beside what its file had."""
    annotated = split_of(name)["annotated_default"]
    title = f"{name}_{annotated}_{cases}_{preset}"
    before = (read_row(f"postprocessing_{title}") or {}).get("methods", {})
    single = one_piece([read_label(name, annotated)], None)
    # Named METHOD_NUMBER.
    folders = {path.name.rpartition("_")[0]: path for path in sorted((work / title / "predictions").iterdir())}
    found = {method: scores(name, folders[method], single) for method in METHODS if method in folders}
    rounds = sorted((work / title / "nnUNet_raw").glob(f"Dataset{LABELS['ours'].number}_*/pseudoTr/rounds/[0-9]*"))
    labels = {f"labels of round {int(folder.name)}": scores(name, folder, single, annotated) for folder in rounds}
    return write_row(f"postprocessing_{title}", {"set": name, "one_piece": single, "methods": before | found | labels})


def main() -> None:
    """Fill in what is missing and print the table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("-o", type=Path, required=True, help="work folder of evidence.py")
    parser.add_argument("--sets", nargs="+", default=["acdc_mr", "hippocampus"])
    parser.add_argument("--cases", nargs="+", type=int, default=[24, 26], help="of the pool, for each set")
    parser.add_argument("--preset", default="small")
    options = parser.parse_args()
    rows = [run(name, n, options.preset, options.o) for name, n in zip(options.sets, options.cases, strict=True)]
    cells = [
        [row["set"], method, entry["n"], f"{entry['before']:.3f}", f"{entry['after']:.3f}"]
        for row in rows
        for method, entry in row["methods"].items()
    ]
    print(markdown(["set", "method", "n", "before", "after"], cells))


if __name__ == "__main__":
    main()
