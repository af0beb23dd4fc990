"""What a training learns that is killed amid its epochs and goes on, beside trainings that are left alone.

    python benchmarks/kill_training.py -o WORK [--runs 4] [--kills 2] [--seed 0]

nnU-Net's own code trains `OneShotTrainer_tiny` in 2D on ten labelled phantoms with thick slices, by the function that
`refine` calls; nothing is seeded, as in `refine`. Half of the runs are left alone. Of the others the process is killed
(SIGKILL) at random moments of the time that the first one took, and the same call goes on with what it left. All models
predict four more phantoms. nnU-Net's loader threads are not deterministic, so Dice are compared with the spread of the
runs that were left alone. One row is written; a run that is done is not done again.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from common import markdown, use_folders, write_row
from kill import no_process_left

from nnunet_oneshot import nnunet
from nnunet_oneshot.evaluate import FOREGROUND, evaluate
from nnunet_oneshot.phantom import write_phantom_dataset
from nnunet_oneshot.settings import PRESETS

DATASET, CONFIGURATION, TINY = 501, "2d", PRESETS["tiny"]
MODEL = (DATASET, CONFIGURATION, "all", TINY.trainer(), TINY.plans, "cpu")
TRAIN = f"from nnunet_oneshot import nnunet; nnunet.train(*{MODEL!r})"
LABELLED, TEST = 10, 4


def lay_out(work: Path) -> tuple[Path, list[str]]:
    """The phantoms, preprocessed; their dataset.json and the test cases."""
    truth, folder = work / "truth", work / "nnUNet_raw" / f"Dataset{DATASET}_phantom"
    if not folder.is_dir():
        shutil.rmtree(truth, ignore_errors=True)
        write_phantom_dataset(
            folder.parent,
            DATASET,
            "phantom",
            truth=truth,
            cases=LABELLED + TEST,
            shape=(10, 96, 96),
            kind="thick_slices",
        )
    cases = sorted(path.name.removesuffix(".nii.gz") for path in truth.iterdir())
    for case in cases[:LABELLED]:
        shutil.copy(truth / f"{case}.nii.gz", folder / "labelsTr")
    for case in cases[LABELLED:]:
        image = folder / "imagesTr" / f"{case}_0000.nii.gz"
        if image.is_file():
            (work / "test").mkdir(exist_ok=True)
            os.replace(image, work / "test" / image.name)
    content = json.loads((folder / "dataset.json").read_text(encoding="utf-8"))
    (folder / "dataset.json").write_text(json.dumps({**content, "numTraining": LABELLED}), encoding="utf-8")
    nnunet.plan_and_preprocess(DATASET, TINY, [CONFIGURATION], 1)
    return folder / "dataset.json", cases[LABELLED:]


def train(results: Path, moments: list[float]) -> dict[str, Any]:
    """Train into a results folder, killed at these seconds after each start; seconds, and epochs at the kills."""
    environment = {**os.environ, "nnUNet_results": str(results), "OMP_NUM_THREADS": "1"}
    begin, at = time.monotonic(), []
    for moment in [*moments, None]:
        with (results.parent / f"{results.name}.log").open("ab") as log:
            process = subprocess.Popen([sys.executable, "-c", TRAIN], env=environment, stdout=log, stderr=log)
        try:
            process.wait(moment)
        except subprocess.TimeoutExpired:
            os.kill(process.pid, signal.SIGKILL)
            process.wait()
            no_process_left(results)
            at.append(epochs(results))
        else:
            if process.returncode:
                raise SystemExit(f"a training failed; see {results}.log")
            break
    return {"seconds": round(time.monotonic() - begin, 1), "killed_at_epoch": at}


def epochs(results: Path) -> int:
    """How many epochs had begun by the log of the last start."""
    logs = sorted(results.rglob("training_log_*.txt"))
    said = [number for log in logs[-1:] for number in re.findall(r": Epoch (\d+)", log.read_text(encoding="utf-8"))]
    return int(said[-1]) if said else 0


def run(work: Path, name: str, moments: list[float], dataset_json: Path, test: list[str]) -> dict[str, Any]:
    """Train, predict and score one model, or read what came of it."""
    path = work / f"{name}.json"
    if path.is_file():
        return json.loads(path.read_text(encoding="utf-8"))
    results, output = work / f"results_{name}", work / f"predictions_{name}"
    # Predictions too: those that are there are kept, and would be another model's.
    for folder in (results, output):
        shutil.rmtree(folder, ignore_errors=True)
    results.mkdir()
    found = train(results, moments)
    os.environ["nnUNet_results"] = str(results)
    images = {case: [work / "test" / f"{case}_0000.nii.gz"] for case in test}
    nnunet.predict(*MODEL[:2], ("all",), *MODEL[3:5], images, output, "cpu")
    scored = evaluate(work / "truth", output, dataset_json, cases=test)
    found |= {"name": name, "dice": round(scored.summary[FOREGROUND]["Dice"].mean, 4)}
    path.write_text(json.dumps(found), encoding="utf-8")
    return found


def main() -> None:
    """Run all, write the row and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("-o", type=Path, required=True, help="working folder")
    parser.add_argument("--runs", type=int, default=4, help="left alone, and as many killed")
    parser.add_argument("--kills", type=int, default=2, help="of each that is killed")
    parser.add_argument("--seed", type=int, default=0, help="of the moments")
    arguments = parser.parse_args()
    work: Path = arguments.o.resolve()
    use_folders(work)
    dataset_json, test = lay_out(work)
    drawn = random.Random(arguments.seed)
    alone = [run(work, f"alone_{i}", [], dataset_json, test) for i in range(arguments.runs)]
    # Chosen before anything is killed, so that a run that is taken up again is killed at the same moments.
    most = alone[0]["seconds"]
    moments = [[drawn.uniform(0.2, 0.9) * most for _ in range(arguments.kills)] for _ in range(arguments.runs)]
    killed = [run(work, f"killed_{i}", moments[i], dataset_json, test) for i in range(arguments.runs)]
    write_row("kill_training", {"alone": alone, "killed": killed, "test_cases": TEST, "seed": arguments.seed})
    lines = [[row["name"], f"{row['dice']:.3f}", row["seconds"], row["killed_at_epoch"]] for row in (*alone, *killed)]
    print(markdown(["run", "Dice", "seconds", "killed in epoch"], lines))


if __name__ == "__main__":
    main()
