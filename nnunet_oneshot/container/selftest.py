"""Run predict.py on a made-up image, without Docker, and check what comes out: `python selftest.py`."""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
from nnunetv2.imageio.base_reader_writer import BaseReaderWriter
from nnunetv2.utilities.plans_handling.plans_handler import PlansManager

HERE = Path(__file__).resolve().parent


def main() -> int:
    """Exit code: 0 when predict.py labels the image on its own grid with known values."""
    dataset = json.loads((HERE / "model" / "dataset.json").read_text(encoding="utf-8"))
    plans = PlansManager(json.loads((HERE / "model" / "plans.json").read_text(encoding="utf-8")))
    reader: BaseReaderWriter = plans.image_reader_writer_class()
    with tempfile.TemporaryDirectory() as folder:
        source, target = Path(folder) / "input", Path(folder) / "output"
        source.mkdir()
        image = write_noise(reader, plans, dataset, source)
        subprocess.run([sys.executable, str(HERE / "predict.py"), str(source), str(target)], check=True)
        label = reader.read_seg(str(target / f"selftest{dataset['file_ending']}"))[0][0]
    known = set(plans.get_label_manager(dataset).all_labels)
    if label.shape != image or not set(np.unique(label).astype(int).tolist()) <= known:
        print(f"selftest failed: image {image}, label {label.shape} with values {np.unique(label)}", file=sys.stderr)
        return 1
    print("selftest passed")
    return 0


def write_noise(
    reader: BaseReaderWriter, plans: PlansManager, dataset: dict[str, Any], folder: Path
) -> tuple[int, ...]:
    """Write one noise image, a file a channel; returns its shape (Z, Y, X)."""
    ending = dataset["file_ending"]
    flat = ending in (".png", ".bmp") or "3d_fullres" not in plans.plans["configurations"]
    shape = (1, 48, 56) if flat else (20, 40, 44)
    rng = np.random.default_rng(0)
    for channel in range(len(dataset["channel_names"])):
        noise = rng.integers(0, 200, size=shape).astype(np.uint8)
        reader.write_seg(noise, str(folder / f"selftest_{channel:04d}{ending}"), _geometry(plans))
    return shape


def _geometry(plans: PlansManager) -> dict[str, Any]:
    """What any of nnU-Net's writers asks for: the training set's median spacing, no rotation."""
    spacing = [float(s) for s in plans.plans["original_median_spacing_after_transp"]]
    # 2D data sets carry nnU-Net's stand-in for "no third dimension", which a file need not.
    z, y, x = (s if s < 100 else 1.0 for s in spacing)
    affine = np.diag([x, y, z, 1.0])
    return {
        "spacing": (z, y, x),
        "sitk_stuff": {"spacing": (x, y, z), "origin": (0.0, 0.0, 0.0), "direction": tuple(np.eye(3).ravel())},
        "nibabel_stuff": {"original_affine": affine, "reoriented_affine": affine},
    }


if __name__ == "__main__":
    sys.exit(main())
