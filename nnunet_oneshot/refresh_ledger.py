"""What preprocessed data were made of, so that a refresh does what is needed and no more.

The ledger only saves work: a case that it does not know, or whose files are not those that it knows, is made again.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from nnunet_oneshot.refresh_case import Target, image_stamps, replacing

LEDGER = "oneshot_refresh.json"
Need = Literal["nothing", "label", "whole"]


@dataclass(frozen=True)
class CaseFiles:
    """One training case's raw files."""

    name: str
    images: tuple[Path, ...]
    label: Path


@dataclass
class Ledger:
    """For each folder of preprocessed data: its plans' hash and, by case, what the case was made of."""

    base: Path
    folders: dict[str, dict[str, Any]] = field(default_factory=dict)

    @classmethod
    def read(cls, base: Path) -> Ledger:
        """The ledger of a dataset's preprocessed folder; an empty one where there is none."""
        path = base / LEDGER
        return cls(base, json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {})

    def write(self) -> None:
        """Write it atomically."""
        with replacing(self.base) as folder:
            (folder / LEDGER).write_text(json.dumps(self.folders) + "\n", encoding="utf-8")
            (folder / LEDGER).replace(self.base / LEDGER)

    def need(self, target: Target, case: CaseFiles, label_hash: str) -> Need:
        """What must be done so that a case's preprocessed data is that of its files now."""
        files = target.files(case.name)
        if not all(file.is_file() for file in files):
            return "whole"
        entry = self._entries(target).get(case.name)
        if entry is None:
            made = min(file.stat().st_mtime_ns for file in files)
            sources = (*case.images, target.plans)
            return "whole" if any(source.stat().st_mtime_ns > made for source in sources) else "label"
        if entry["images"] != image_stamps(case.images):
            return "whole"
        same = entry["label"] == label_hash and entry["files"] == _times(files)
        return "nothing" if same else "label"

    def note(self, target: Target, case: CaseFiles, label_hash: str) -> None:
        """A case's preprocessed data is that of its files now."""
        folder = self.folders.setdefault(target.folder.name, {"plans": plans_hash(target), "cases": {}})
        folder["cases"][case.name] = {
            "label": label_hash,
            "images": image_stamps(case.images),
            "files": _times(target.files(case.name)),
        }

    def forget_other_plans(self, target: Target) -> bool:
        """True where the folder was made by other plans; what is known of its cases is dropped then."""
        folder = self.folders.get(target.folder.name)
        if folder is None or folder["plans"] == plans_hash(target):
            return False
        del self.folders[target.folder.name]
        return True

    def _entries(self, target: Target) -> Mapping[str, Any]:
        return self.folders.get(target.folder.name, {"cases": {}})["cases"]


def plans_hash(target: Target) -> str:
    """Hash of all in the plans that preprocessing depends on."""
    tools = target.tools
    plans = {key: value for key, value in tools.plans.plans.items() if key != "configurations"}
    content = json.dumps([plans, tools.configuration.configuration], sort_keys=True, default=str)
    return hashlib.sha256(content.encode()).hexdigest()


def _times(files: Sequence[Path]) -> list[int]:
    return [file.stat().st_mtime_ns for file in files]
