"""The pseudo-label dataset on disk: its folders, the manifest `oneshot.json`, atomic writes and locks.

The one way out: every stage writes labels and case records through `Store`. Workers and shards write one small file a
case; the manifest is merged from them. A file appears under its name only when it is whole: it is written below
`.oneshot/tmp` first and moved, and whatever a killed run left there is removed by the next one.
"""

from __future__ import annotations

import errno
import json
import os
import platform
import shutil
import socket
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

from filelock import FileLock, Timeout
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from nnunet_oneshot.dataset import Case, RawDataset
from nnunet_oneshot.errors import OneShotError
from sam2_propagation.interface import LabelVolume

SCHEMA = 1
ABANDONED = 30 * 24 * 3600.0
"""Seconds after which nobody uses a temporary folder any longer in which nothing changes: most are there for a moment,
and one that processes share, for as long as a propagator is at work on a set."""
MANIFEST = "oneshot.json"

Status = Literal["annotated", "sparse", "pseudo", "failed", "gated", "accepted", "rejected", "corrected"]
DRAWN = ("annotated", "sparse", "corrected")
"""Statuses of cases whose label a person drew, whole or in part; they train in every fold."""
HUMAN_WORD = ("annotated", "corrected", "accepted")
"""Statuses whose label is a person's word throughout, so that no model changes it."""
MACHINE_MADE = ("pseudo", "gated")
"""Statuses of cases whose label is a program's throughout."""
LEFT_OUT = ("failed", "gated", "rejected")
"""Statuses of cases whose label is all ignore and that training leaves out."""
STATUS_MEANING: Mapping[Status, str] = {
    "annotated": "drawn by a person",
    "sparse": "some slices drawn by a person, the rest made by programs",
    "pseudo": "made by programs, not decided on by a person",
    "failed": "no label could be made; left out of training",
    "gated": "made by programs and estimated too poor; left out of training",
    "accepted": "made by programs and found right by a person; trained on as it is",
    "rejected": "found wrong by a person; left out of training",
    "corrected": "corrected by a person; trained on as it is",
}
"""Every status in a reader's words."""

DIVERGENCE_MEANING = "programs disagree; ignored by stock trainers, OneShotTrainer learns the best guess there"
"""What divergence, voxels that carry the ignore label, is to a reader."""


class _Record(BaseModel):
    # A field that a later release of the same schema adds must survive being read and written here.
    model_config = ConfigDict(extra="allow", populate_by_name=True)


class Source(_Record):
    """Where labels came from: one propagator, or one folder of labels made elsewhere."""

    settings: dict[str, Any] = Field(default_factory=dict, description="how the propagator was set up")
    checkpoint: str | None = Field(None, description="name of the weights, where the propagator has any")
    sha256: str | None = Field(None, description="hash of the weights' file")


class CaseRecord(_Record):
    """What is known of one case's label."""

    status: Status = Field(description="who made the label in force, and whether it is used")
    round: int = Field(0, description="the round that made the label in force; 0 is propagation")
    views: list[str] = Field(default_factory=list, description="source/view of every label that was fused")
    divergence: float | None = Field(None, description="share of voxels without consensus, in [0, 1]")
    quality: dict[str, float] | None = Field(None, description="estimated Dice: mean and per label value")
    reason: str | None = Field(None, description="why the case failed, or what a reader should know of it")
    review: dict[str, Any] | None = Field(None, description="a person's decision, with its time")


def is_by_model_alone(record: CaseRecord) -> bool:
    """Whether nothing but a model labelled the case: propagation failed, or its image was added later."""
    return record.status == "pseudo" and not record.views


class Manifest(_Record):
    """Content of `oneshot.json`."""

    schema_: Literal[1] = Field(1, alias="schema", description="version of this layout")
    source_dataset: str = Field(description="name of the raw dataset that holds the images")
    round: int = Field(0, description="the round in force")
    versions: dict[str, str] = Field(default_factory=dict, description="versions of the packages that made it")
    settings: dict[str, Any] = Field(default_factory=dict, description="settings of the run that made round 0")
    sources: dict[str, Source] = Field(default_factory=dict, description="every source of labels, by name")
    cases: dict[str, CaseRecord] = Field(default_factory=dict, description="every case, by name")
    num_folds: int = Field(5, description="folds of splits_final.json; nnU-Net's own number unless refine deals others")
    weight_by_quality: bool = Field(False, description="cases are drawn as often as their estimated quality says")


class ViewRecord(_Record):
    """What one view said of one case; written by workers, merged into the manifest by consensus."""

    label: bool = Field(description="True where the view gave a label")
    reason: str | None = Field(None, description="why there is no label")
    scores: dict[str, float] = Field(default_factory=dict, description="label-free figures of the propagation")


class WorkerRecord(_Record):
    """One case's result of one source, `.oneshot/cases/<source>/<case>.json`."""

    case: str = Field(description="name of the case")
    source: str = Field(description="name of the source")
    views: dict[str, ViewRecord] = Field(description="what each view said, by name")
    seconds: float = Field(description="wall-clock of all views")


class Store:
    """Dataset BBB. Paths and reading need no lock; writing a stage's results needs `lock(stage)`."""

    def __init__(self, folder: Path, file_ending: str) -> None:
        self.folder = folder
        self.file_ending = file_ending

    @property
    def manifest_path(self) -> Path:
        return self.folder / MANIFEST

    @property
    def state_folder(self) -> Path:
        """Working state that is no part of the contract but for `.oneshot/cases`."""
        return self.folder / ".oneshot"

    def label_path(self, case: str) -> Path:
        """The label that nnU-Net trains on: divergence is the ignore label."""
        return self.folder / "labelsTr" / f"{case}{self.file_ending}"

    def fused_path(self, case: str) -> Path:
        """The best guess everywhere of the round in force, without ignore."""
        return self.folder / "pseudoTr" / "fused" / f"{case}{self.file_ending}"

    def round_path(self, number: int, case: str) -> Path:
        """The best guess everywhere of one round."""
        return self.folder / "pseudoTr" / "rounds" / f"{number:02d}" / f"{case}{self.file_ending}"

    def view_path(self, source: str, view: str, case: str) -> Path:
        """One view's label."""
        return self.folder / "pseudoTr" / source / view / f"{case}{self.file_ending}"

    def drawn_path(self, case: str) -> Path:
        """What a person had drawn of a sparse case when its labels in force were made."""
        return self.state_folder / "drawn" / f"{case}{self.file_ending}"

    def worker_path(self, source: str, case: str) -> Path:
        """One case's result of one source."""
        return self.state_folder / "cases" / source / f"{case}.json"

    def write_label(self, dataset: RawDataset, label: LabelVolume, path: Path, like: Case) -> None:
        """Write a label atomically with the geometry of a case's image."""
        with self.temporary_folder() as folder:
            dataset.write_label(label, folder / path.name, like)
            path.parent.mkdir(parents=True, exist_ok=True)
            # A writer may add a side file (the spacing of a .tif); the label itself comes last: a sign of wholeness.
            for written in sorted(folder.iterdir(), key=lambda p: p.name == path.name):
                os.replace(written, path.parent / written.name)

    def write_json(self, content: Mapping[str, Any] | Sequence[Any], path: Path) -> None:
        """Write JSON atomically; below the dataset's folder several processes may write the same file at once."""
        path.parent.mkdir(parents=True, exist_ok=True)
        with self.temporary_folder() as folder:
            written = folder / path.name
            written.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
            try:
                os.replace(written, path)
            except OSError as error:
                if error.errno != errno.EXDEV:
                    raise
                # On another file system, where one process writes at a time: in place at once only from beside it.
                os.replace(shutil.move(written, path.parent / f".{path.name}.new"), path)

    def write_worker(self, record: WorkerRecord) -> None:
        """Write one case's result of one source."""
        self.write_json(record.model_dump(), self.worker_path(record.source, record.case))

    def read_worker(self, source: str, case: str) -> WorkerRecord | None:
        """One case's result of one source, or None where it is not done."""
        path = self.worker_path(source, case)
        return WorkerRecord.model_validate_json(path.read_text(encoding="utf-8")) if path.is_file() else None

    def write_manifest(self, manifest: Manifest) -> None:
        """Write `oneshot.json` atomically."""
        self.write_json(manifest.model_dump(by_alias=True), self.manifest_path)

    def read_manifest(self) -> Manifest:
        """Read `oneshot.json`; OneShotError where it is absent, broken or of a newer version."""
        return read_manifest(self.manifest_path)

    @contextmanager
    def lock(self, stage: str, wait: bool = False) -> Iterator[None]:
        """Hold a stage's lock; where another process holds it, wait for it or raise OneShotError.

        `stage` names what must not run twice, for example `refine` or `propagate-0-of-4`.
        """
        folder = self.state_folder / "locks"
        folder.mkdir(parents=True, exist_ok=True)
        lock, holder = FileLock(folder / f"{stage}.lock", timeout=-1 if wait else 0), folder / f"{stage}.holder"
        try:
            lock.acquire()
        except Timeout:
            who = holder.read_text(encoding="utf-8").strip() if holder.is_file() else "another process"
            raise OneShotError(
                f"{self.folder.name}: expected {stage} to run once at a time, found it running as {who}; "
                "wait for it or stop it"
            ) from None
        try:
            # Computers that share a disk each count their own processes.
            holder.write_text(f"process {os.getpid()} on {platform.node()}\n", encoding="utf-8")
            yield
        finally:
            holder.unlink(missing_ok=True)
            lock.release()

    def check_idle(self) -> None:
        """OneShotError where any stage is at work on this dataset."""
        for path in sorted((self.state_folder / "locks").glob("*.lock")):
            with self.lock(path.stem):
                pass

    @contextmanager
    def temporary_folder(self) -> Iterator[Path]:
        """A folder on the dataset's file system that is gone afterwards; its name tells whose it is."""
        root = self.state_folder / "tmp"
        root.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=root, prefix=f"{socket.gethostname()}-{os.getpid()}-") as folder:
            yield Path(folder)

    def remove_leftovers(self) -> None:
        """Remove temporary files of this machine's processes that are gone, and of others' that nobody can be using.

        Shards may run on other machines, whose processes cannot be asked after. A container's name is another each
        time, so that what was left in one would stay for ever.
        """
        with self.temporary_folder() as own:
            # By the clock of the disk, which may not be this machine's.
            now = own.stat().st_mtime
            for folder in own.parent.glob("*-*-*"):
                here = folder.name.rsplit("-", 2)[0] == socket.gethostname()
                dead = here and not _alive(int(folder.name.split("-")[-2]))
                if dead or now - _last_change(folder) > ABANDONED:
                    shutil.rmtree(folder, ignore_errors=True)


def read_manifest(path: Path) -> Manifest:
    """Read a manifest; OneShotError where it is absent, broken or of a newer version."""
    if not path.is_file():
        raise OneShotError(f"expected {path}, found no such file; run nnUNetv2_oneshot_propagate to make the dataset")
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        version = content.get("schema")
        if isinstance(version, int) and version > SCHEMA:
            raise OneShotError(
                f"{path}: expected a manifest of schema {SCHEMA} or older, found schema {version}; "
                "install a newer nnunet-oneshot"
            )
        return Manifest.model_validate(content)
    except (json.JSONDecodeError, UnicodeDecodeError, ValidationError, AttributeError) as error:
        detail = _first_mistake(error) if isinstance(error, ValidationError) else str(error).splitlines()[0]
        raise OneShotError(
            f"{path}: expected a manifest, found one that cannot be read ({detail}); restore it"
        ) from error


def _first_mistake(error: ValidationError) -> str:
    first = error.errors()[0]
    return f"{'.'.join(map(str, first['loc']))}: {first['msg']}"


def _last_change(folder: Path) -> float:
    """When a folder or what is in it changed last; now where it went meanwhile."""
    try:
        return max(path.stat().st_mtime for path in (folder, *folder.rglob("*")))
    except FileNotFoundError:
        return time.time()


def _alive(process: int) -> bool:
    if sys.platform == "win32":
        # There signal 0 is Ctrl-C, and there is no other asking without system calls: what a killed run left, stays.
        return True
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True
