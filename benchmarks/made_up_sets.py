"""Made-up sets in the layout of the real ones, so that a benchmark with --set can choose a default on them.

    python benchmarks/made_up_sets.py FOLDER isotropic thick_slices synthetic10 synthetic11 [--cases 14] [--test 4]
    ONESHOT_DATA=FOLDER python benchmarks/refinement_ablation.py --set isotropic ...

`isotropic` and `thick_slices` are phantoms, `synthetic<seed>` synthetic anatomy (synthetic_sets.py; quality's rules are
learnt on seeds 0 to 9). The first case is the annotated one, the last ones are the test cases.
"""

from __future__ import annotations

import argparse
import json
import shutil
import tempfile
from pathlib import Path

from quality import PHANTOMS, SYNTHETIC
from synthetic_sets import write_synthetic_dataset

from nnunet_oneshot.phantom import write_phantom_dataset

SEEDS = {"isotropic": 0, "thick_slices": 1}
"""Of phantoms; quality's rules are learnt on others."""


def write(folder: Path, name: str, cases: int, test: int) -> None:
    """Write one set: images/, labels/ and split.json."""
    place = folder / name
    place.mkdir(parents=True)
    with tempfile.TemporaryDirectory() as scratch:
        raw, truth = Path(scratch) / "raw", place / "labels"
        if name in SEEDS:
            shape, seed = PHANTOMS[name][0], SEEDS[name]
            made = write_phantom_dataset(raw, 501, name, truth=truth, cases=cases, shape=shape, seed=seed, kind=name)
            dataset = made.folder
        else:
            dataset = write_synthetic_dataset(raw, 501, name, truth, int(name.removeprefix(SYNTHETIC)), cases)
        (place / "images").mkdir()
        for path in sorted((dataset / "imagesTr").iterdir()):
            shutil.move(path, place / "images" / path.name.replace("_0000", ""))
        content = json.loads((dataset / "dataset.json").read_text(encoding="utf-8"))
    names = sorted(path.name.removesuffix(".nii.gz") for path in truth.iterdir())
    split = {"channel": content["channel_names"]["0"], "labels": content["labels"], "annotated_default": names[0]}
    split |= {"annotated_choices": names[:1], "pool": names[: cases - test], "test": names[cases - test :]}
    (place / "split.json").write_text(json.dumps(split, indent=1), encoding="utf-8")


def main() -> None:
    """Write the sets that are not there."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("sets", nargs="+")
    parser.add_argument("--cases", type=int, default=14)
    parser.add_argument("--test", type=int, default=4)
    arguments = parser.parse_args()
    for name in arguments.sets:
        if not (arguments.folder / name / "split.json").is_file():
            shutil.rmtree(arguments.folder / name, ignore_errors=True)
            write(arguments.folder, name, arguments.cases, arguments.test)


if __name__ == "__main__":
    main()
