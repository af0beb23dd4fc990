"""Dataset 601 for the tests of the review page: made of two label folders that differ in a few voxels."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
from raw_datasets import Roots, label_array, write_image, write_raw

from nnunet_oneshot.consensus import consensus

CASES = ("case_0", "case_1", "case_2", "case_3")


def make_reviewed(roots: Roots, tools: Path, *, failed: bool = False, **raw: Any) -> Path:
    """Dataset 501 of four volumes, the first annotated, and 601; the later the case, the more its two labels differ.

    With `failed`, the last case has no label. Returns the folder of 601.
    """
    ending = raw.get("ending", ".nii.gz")
    write_raw(roots.raw, cases=CASES, **raw)
    for tool, by in (("tool_a", 0), ("tool_b", 1)):
        for index, name in enumerate(CASES[1:-1] if failed else CASES[1:], start=1):
            label = label_array(index)
            label[:index] = np.roll(label[:index], by, axis=-1)
            write_image(tools / tool / f"{name}{ending}", label[0] if ending == ".png" else label)
    consensus(501, 601, [tools / "tool_a", tools / "tool_b"], num_processes=1)
    return roots.raw / "Dataset601_toy_oneshot"


def record(folder: Path, case: str) -> dict[str, Any]:
    """A case's record in the manifest, as it lies on disk."""
    return json.loads((folder / "oneshot.json").read_text())["cases"][case]


def block(folder: Path) -> dict[str, Any]:
    """What nnU-Net's trainer reads of ours."""
    return json.loads((folder / "dataset.json").read_text())["oneshot"]
