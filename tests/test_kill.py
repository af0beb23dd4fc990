"""Killed again and again, a run ends as one that was left alone; more kills: `python benchmarks/kill.py`."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


@pytest.mark.slow
@pytest.mark.long
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_kills_change_no_byte_and_leave_nothing(tmp_path: Path) -> None:
    """Labels, manifest, preprocessed data, files and processes; SIGINT; a second refinement at once."""
    command = [sys.executable, str(ROOT / "benchmarks" / "kill.py"), "-o", str(tmp_path / "work"), "--no_row"]
    done = subprocess.run([*command, "--stand_in", "--kills", "3"], capture_output=True, encoding="utf-8", check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    assert json.loads(done.stdout)["kills"] >= 3
