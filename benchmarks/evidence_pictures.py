"""What a row of `evidence.py` looks like: some test cases with what the model said, where it is wrong in colour.

The pictures stay in the working folder: several of the sets are not ours to show.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from html import escape
from pathlib import Path

import numpy as np
from common import DataSet
from registration import read_image

from nnunet_oneshot.dataset import RawDataset
from nnunet_oneshot.evaluate import Evaluation
from nnunet_oneshot.metrics import METRICS
from nnunet_oneshot.report_pictures import Overlay
from nnunet_oneshot.trial_picture import Tile, draw
from sam2_propagation.interface import Image

WORST = 3
"""Cases that are shown, before the median one and the best one."""


def shown_cases(scored: Evaluation) -> dict[str, float]:
    """The worst cases, the median one and the best one, each with its mean Dice over classes."""
    dice = dict(zip(scored.cases, scored.case_mean()[:, list(METRICS).index("Dice")].tolist(), strict=True))
    ranked = sorted(dice, key=dice.__getitem__)
    chosen = [*ranked[:WORST], ranked[len(ranked) // 2], ranked[-1]]
    return {case: dice[case] for case in dict.fromkeys(chosen)}


def draw_cases(
    data: DataSet,
    raw: RawDataset,
    scored: Evaluation,
    predictions: Path,
    path: Path,
    image_of: Callable[[str], Image] | None = None,
) -> None:
    """Write a PNG of some test cases, a line each; contours are what was predicted, tinted is what is wrong.

    Args:
        raw: any dataset of the set, which reads its labels.
        predictions: folder of the predictions that were scored.
        image_of: gives a case's image, where it is not the data set's own.
    """
    tiles = []
    for case, dice in shown_cases(scored).items():
        said, truth = (raw.read_label(folder / f"{case}{data.ending}") for folder in (predictions, data.labels))
        image = read_image(data.name, case) if image_of is None else image_of(case)
        overlay = Overlay(image, said, np.asarray(said != truth), data.ending == ".nii.gz")
        tiles.append(Tile(overlay, f"{case}: Dice {dice:.3f}"))
    path.parent.mkdir(parents=True, exist_ok=True)
    draw(tiles, path)


def write_index(folder: Path, said: Mapping[str, str]) -> Path:
    """A page of all PNGs in a folder, index.html in it; `said` of each, by its name without ending."""
    parts = [
        f"<h2>{escape(said.get(path.stem, path.stem))}</h2>\n<img src='{escape(path.name)}' alt='{escape(path.stem)}'>"
        for path in sorted(folder.glob("*.png"))
    ]
    head = "<!doctype html>\n<meta charset='utf-8'>\n<title>Test cases</title>\n<style>img {max-width: 100%}</style>"
    page = folder / "index.html"
    page.write_text("\n".join([head, *parts, ""]), encoding="utf-8")
    return page
