"""Kill -9 a run at random moments, again and again, and see that it ends as one that was left alone.

    python benchmarks/kill.py -o WORK [--kills 20] [--seed 0] [-np 1] [--stand_in] [--astray]

Phantom pictures, one annotated; `nnUNetv2_oneshot_run` with a short trainer whose learning rate is zero and whose
weights come from a seed: nnU-Net's loader threads are not deterministic, and so every byte of every label can be
compared all the same. With --stand_in planning, training and prediction, which nnU-Net's own processes do, are replaced
by something that takes a second and depends on the images alone, so that the kills hit our own stages; preprocessing
stays nnU-Net's, case by case. With --astray the round's labels, which that makes nonsense, are judged, not taken, and
the model before is trained once more; otherwise all rounds are taken.

A first run is left alone. Then runs are killed at random moments of their work and taken up again until they end; each
one that ends must have the same labels, manifest and preprocessed segmentations, the same files and no others (of
results their names), nothing among the temporary files, and no process may be left. Then a new one begins, until there
were enough kills. Last, one run is interrupted by SIGINT, and a second refinement is started beside one that runs.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import blosc2
import numpy as np
from common import use_folders, write_row

from nnunet_oneshot.phantom import write_phantom_dataset
from nnunet_oneshot.refresh_case import MASKS

TRAINER = """
import torch
from nnunetv2.utilities.find_objects import recursive_find_trainer_class_by_name

class Still(recursive_find_trainer_class_by_name("OneShotTrainer_tiny")):
    def initialize(self):
        torch.manual_seed(0)
        self.initial_lr, self.num_epochs, self.num_iterations_per_epoch = 0.0, 3, 2
        self.num_val_iterations_per_epoch, self.save_every = 1, 1
        super().initialize()

    def plot_network_architecture(self):
        pass
"""
ROOTS = ("nnUNet_raw", "nnUNet_preprocessed", "nnUNet_results")
VOLATILE = ("versions", "seconds", "time")
LOGS = ("training_log_*", "progress.png", "debug.json")
"""What nnU-Net writes of a training on the way, each time that it goes on with it."""
PYTHONS = "pymp-*"
"""What Python itself leaves of worker processes that are killed."""
COMMAND = """
import sys
from nnunet_oneshot import cli
getattr(cli, sys.argv[1])(sys.argv[2:])
"""
STAND_IN = """
import json, os, time
import numpy as np
from nnunetv2.utilities.plans_handling.plans_handler import PlansManager
from nnunet_oneshot import nnunet
from nnunet_oneshot.dataset import open_dataset
from nnunet_oneshot.planner import OneShotSmallPlanner
from nnunet_oneshot.refresh import refresh

def plan_and_preprocess(dataset, preset, configurations, *_, **__):
    base = nnunet.root("nnUNet_preprocessed") / dataset
    raw = open_dataset(501)
    shapes = [raw.read_image(case).shape for case in raw.cases]
    names = ("mean", "median", "std", "min", "max", "percentile_99_5", "percentile_00_5")
    channel = dict(zip(names, (100.0, 100.0, 50.0, 0.0, 255.0, 255.0, 0.0)))
    fingerprint = {"spacings": [[999.0, 1.0, 1.0]] * len(shapes), "shapes_after_crop": shapes}
    fingerprint["foreground_intensity_properties_per_channel"] = {c: channel for c in raw.json["channel_names"]}
    fingerprint["median_relative_size_after_cropping"] = 1.0
    (base / "dataset_fingerprint.json").write_text(json.dumps(fingerprint))
    plans = PlansManager(OneShotSmallPlanner(dataset).plan_experiment())
    (base / plans.get_configuration("2d").data_identifier).mkdir(exist_ok=True)
    refresh(dataset, 1)

def train(dataset, configuration, fold, trainer, plans, *_, **__):
    folder = nnunet.results_folder(dataset, trainer, plans, configuration) / f"fold_{fold}"
    if not (folder / nnunet.FINAL).is_file():
        time.sleep(1)
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "part").write_text("weights", encoding="utf-8")
        os.replace(folder / "part", folder / nnunet.FINAL)
    return folder

def predict(dataset, configuration, folds, trainer, plans, images, output, *_, **__):
    raw = open_dataset(501)
    output.mkdir(parents=True, exist_ok=True)
    (output / ".unfinished").mkdir(exist_ok=True)
    for case in images:
        path = output / f"{case}{raw.file_ending}"
        if not path.is_file():
            time.sleep(0.2)
            said = (raw.read_image(raw.case(case)).data[0] > 150).astype(np.int16)
            raw.write_label(said, output / ".unfinished" / path.name, raw.case(case))
            os.replace(output / ".unfinished" / path.name, path)
    (output / ".unfinished").rmdir()

nnunet.plan_and_preprocess, nnunet.train, nnunet.predict = plan_and_preprocess, train, predict
nnunet.check_trained = lambda *_: None
"""


@dataclass
class Experiment:
    """One series of kills and what came of it."""

    work: Path
    processes: int
    random: random.Random
    stand_in: bool = False
    astray: bool = False
    kills: list[str] = field(default_factory=list)
    runs: int = 0

    def folder(self, name: str) -> Path:
        """Where one run's three nnU-Net folders lie."""
        return self.work / name

    def prepare(self, name: str) -> Path:
        """New folders with the phantoms."""
        folder = self.folder(name)
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(self.work / "fresh", folder)
        return folder

    def start(self, folder: Path, command: str = "run") -> subprocess.Popen[bytes]:
        """Start the run, or go on with it."""
        words = ["-d", "501", "-o", "601"] if command == "run" else ["-d", "601"]
        words += ["-c", "2d", "-preset", "tiny", "-tr", "Still", "-device", "cpu"]
        words += [] if self.astray else ["--all_rounds"]
        (folder / "temporary").mkdir(exist_ok=True)
        environment = {**os.environ, **{root: str(folder / root) for root in ROOTS}}
        environment |= {"TMPDIR": str(folder / "temporary")}
        environment |= {"nnUNet_extTrainer": str(self.work / "trainer"), "OMP_NUM_THREADS": "1"}
        with (folder.parent / f"{folder.name}.log").open("ab") as log:
            return subprocess.Popen(
                [
                    sys.executable,
                    "-c",
                    (STAND_IN if self.stand_in else "") + COMMAND,
                    command,
                    *words,
                    "-np",
                    str(self.processes),
                ],
                env=environment,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )

    def start_working(self, folder: Path) -> subprocess.Popen[bytes]:
        """Start the run and wait until its imports are over and it says something."""
        log = folder.parent / f"{folder.name}.log"
        before = log.stat().st_size if log.is_file() else 0
        process = self.start(folder)
        while process.poll() is None and log.stat().st_size == before:
            time.sleep(0.02)
        return process

    def undisturbed(self) -> tuple[float, dict[str, Any]]:
        """Seconds of work and result of a run that is left alone."""
        folder = self.prepare("undisturbed")
        process, begin = self.start_working(folder), time.monotonic()
        self._must_end(process, folder)
        return time.monotonic() - begin, result(folder)

    def killed(self, enough: int, seconds: float, expected: Mapping[str, Any]) -> None:
        """Runs that are killed until there were enough kills; each is compared when it has ended."""
        while len(self.kills) < enough:
            folder = self.prepare(f"killed_{self.runs}")
            while self._killed_once(folder, seconds, last=len(self.kills) >= enough):
                pass
            self.runs += 1
            compare(expected, result(folder), self.kills)
            shutil.rmtree(folder)

    def _killed_once(self, folder: Path, seconds: float, last: bool) -> bool:
        """Go on with a run; True where it was killed, False where it ended before."""
        process = self.start_working(folder)
        if last:
            self._must_end(process, folder)
            return False
        wait = self.random.uniform(0, 1) * seconds
        try:
            process.wait(wait)
        except subprocess.TimeoutExpired:
            os.kill(process.pid, signal.SIGKILL)
            process.wait()
            self.kills.append(stage(folder))
            no_process_left(folder)
            return True
        self._check_code(process, folder)
        return False

    def interrupted(self) -> None:
        """SIGINT to the whole group, as Ctrl-C sends it: a sentence, nothing left, and the run goes on afterwards."""
        folder = self.prepare("interrupted")
        process = self.start_working(folder)
        # Told by what is done: how long it takes differs where other work runs beside it.
        while process.poll() is None and not stage(folder).startswith("after"):
            time.sleep(0.05)
        if process.poll() is not None:
            raise AssertionError(f"the run ended before it could be interrupted: {self._log(folder)[-800:]}")
        os.killpg(process.pid, signal.SIGINT)
        code, said = process.wait(60), self._log(folder)
        no_process_left(folder)
        if code != 1 or "interrupted; run the same command again" not in said or "Traceback" in said:
            raise AssertionError(f"SIGINT: expected exit code 1 and a sentence, found {code} and {said[-800:]}")
        self._must_end(self.start(folder), folder)

    def second_is_refused(self) -> None:
        """A second refinement beside one that trains ends at once, naming the first."""
        folder = self.folder("interrupted")
        shutil.rmtree(folder / "nnUNet_results")
        (folder / "nnUNet_results").mkdir()
        next((folder / "nnUNet_raw").glob("Dataset601*/.oneshot/refine.json")).unlink()
        first = self.start(folder, "refine")
        holder = next((folder / "nnUNet_raw").glob("Dataset601*")) / ".oneshot" / "locks" / "refine.holder"
        end = time.monotonic() + 120
        while not holder.is_file() and time.monotonic() < end:
            time.sleep(0.05)
        # Held where it is, lock and all: it might end before the second has even loaded.
        os.kill(first.pid, signal.SIGSTOP)
        second = self.start(folder, "refine")
        code, said = second.wait(120), self._log(folder)
        os.kill(first.pid, signal.SIGKILL)
        first.wait()
        if code != 2 or f"found it running as process {first.pid}" not in said:
            raise AssertionError(f"a second refinement: expected a refusal, found {code} and {said[-800:]}")

    def _must_end(self, process: subprocess.Popen[bytes], folder: Path) -> None:
        process.wait()
        self._check_code(process, folder)

    def _check_code(self, process: subprocess.Popen[bytes], folder: Path) -> None:
        if process.returncode:
            raise AssertionError(
                f"{folder.name} ended with {process.returncode} after {self.kills}: {self._log(folder)}"
            )

    def _log(self, folder: Path) -> str:
        return (folder.parent / f"{folder.name}.log").read_text(errors="replace", encoding="utf-8")


def result(folder: Path) -> dict[str, Any]:
    """What a run left that must not depend on how often it was stopped: by file, a hash, or content without times."""
    found: dict[str, Any] = {}
    for path in sorted(p for root in ROOTS[:2] for p in (folder / root).rglob("*") if p.is_file()):
        name = str(path.relative_to(folder))
        if path.suffix in (".log", ".lock") or "oneshot_refresh.json" in name or "__pycache__" in name:
            continue
        if MASKS in path.parts:
            # Kept for the next time of every case that was looked at, which after a kill may be one more.
            continue
        found[name] = content(path)
    for name in [*files_of(folder / "nnUNet_results", LOGS), *files_of(folder / "temporary", (PYTHONS,))]:
        found[name] = "there"
    return found


def files_of(folder: Path, but: Sequence[str]) -> Iterator[str]:
    """Names of all files but those of these patterns, as seen from the folder around."""
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder.parent)
        if path.is_file() and not any(fnmatch(part, pattern) for part in name.parts for pattern in but):
            yield str(name)


def content(path: Path) -> Any:
    """A file's content, in a form that can be compared."""
    if path.suffix == ".json":
        return without_times(json.loads(path.read_text(encoding="utf-8")))
    if path.suffix == ".b2nd":
        array = np.ascontiguousarray(blosc2.open(urlpath=str(path), mode="r")[:])
        return hashlib.sha256(array.tobytes()).hexdigest()
    # Pickled properties hold times of files; that they are there is enough.
    return "" if path.suffix == ".pkl" else hashlib.sha256(path.read_bytes()).hexdigest()


def without_times(value: Any) -> Any:
    """JSON without what differs from run to run."""
    if isinstance(value, dict):
        return {key: without_times(v) for key, v in value.items() if key not in VOLATILE}
    return [without_times(v) for v in value] if isinstance(value, list) else value


def compare(expected: Mapping[str, Any], found: Mapping[str, Any], kills: list[str]) -> None:
    """AssertionError where anything differs from the run that was left alone."""
    missing, more = sorted(set(expected) - set(found)), sorted(set(found) - set(expected))
    other = sorted(name for name in set(expected) & set(found) if expected[name] != found[name])
    if missing or more or other:
        raise AssertionError(f"after kills in {kills}: missing {missing}, orphans {more}, different {other}")


def stage(folder: Path) -> str:
    """What the run was at, for the report."""
    record = next(iter((folder / "nnUNet_raw").glob("Dataset601*/.oneshot/refine.json")), None)
    if record is not None:
        return f"after {(list(json.loads(record.read_text(encoding='utf-8'))['done']) or ['begin'])[-1]}"
    return "propagate" if list((folder / "nnUNet_raw").glob("Dataset601*")) else "start"


def no_process_left(folder: Path, seconds: float = 30) -> None:
    """AssertionError where a process of the run is alive some time after its end."""
    end = time.monotonic() + seconds
    while alive := list(processes_of(folder)):
        if time.monotonic() > end:
            raise AssertionError(f"processes were left: {alive}")
        time.sleep(0.1)


def processes_of(folder: Path) -> Iterator[str]:
    """Living processes whose environment names the folder."""
    for entry in Path("/proc").iterdir():
        if re.fullmatch(r"\d+", entry.name):
            try:
                if str(folder).encode() in (entry / "environ").read_bytes():
                    yield f"{entry.name} {(entry / 'cmdline').read_bytes()[:200]!r}"
            except (FileNotFoundError, ProcessLookupError, PermissionError):
                continue


def main() -> None:
    """Run the series and write a row."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("-o", type=Path, required=True, help="working folder; it is emptied")
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("-np", type=int, default=1)
    parser.add_argument("--stand_in", action="store_true", help="replace training and prediction")
    parser.add_argument("--astray", action="store_true", help="judge the round, which is not taken")
    parser.add_argument("--no_row", action="store_true", help="write no row of results")
    arguments = parser.parse_args()
    # Shells start what they put into the background deaf to it, and children would inherit that.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    work = arguments.o.resolve()
    shutil.rmtree(work, ignore_errors=True)
    (work / "trainer").mkdir(parents=True)
    (work / "trainer" / "still.py").write_text(TRAINER, encoding="utf-8")
    use_folders(work / "fresh")
    write_phantom_dataset(
        work / "fresh" / "nnUNet_raw", 501, truth=work / "truth", cases=4, shape=(1, 64, 64), kind="rgb2d"
    )
    drawn = random.Random(arguments.seed)
    experiment = Experiment(work, arguments.np, drawn, arguments.stand_in, arguments.astray)
    seconds, expected = experiment.undisturbed()
    experiment.killed(arguments.kills, seconds, expected)
    experiment.interrupted()
    experiment.second_is_refused()
    row = {"kills": len(experiment.kills), "runs": experiment.runs, "seed": arguments.seed, "stages": experiment.kills}
    row |= {"stand_in": arguments.stand_in, "processes": arguments.np, "astray": arguments.astray}
    row |= {"files_compared": len(expected), "seconds_undisturbed": round(seconds, 1), "different": 0}
    if not arguments.no_row:
        kind = ("kill", *["stand_in"] * arguments.stand_in, *["astray"] * arguments.astray)
        write_row("_".join(kind), row)
    print(json.dumps(row, indent=1))


if __name__ == "__main__":
    main()
