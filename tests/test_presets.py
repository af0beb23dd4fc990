"""What the presets promise a user."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from nnunet_oneshot import nnunet
from nnunet_oneshot.settings import PRESETS, mirrors


@pytest.mark.parametrize("base", ["OneShotTrainer", "nnUNetTrainer"])
def test_only_the_quickest_preset_gives_up_nnunets_mirroring(base: str) -> None:
    assert {name: mirrors(preset.trainer(base)) for name, preset in PRESETS.items()} == {
        "default": True,
        "small": True,
        "tiny": False,
    }
    assert mirrors("nnUNetTrainer_250epochs")


@pytest.mark.parametrize(("trainer", "expected"), [("OneShotTrainer", True), ("OneShotTrainer_tiny", False)])
def test_prediction_job_is_told_about_mirroring(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, trainer: str, expected: bool
) -> None:
    for variable in ("raw", "preprocessed", "results"):
        (tmp_path / variable / "Dataset007_x").mkdir(parents=True)
        monkeypatch.setenv(f"nnUNet_{variable}", str(tmp_path / variable))
    fold = tmp_path / "results" / "Dataset007_x" / f"{trainer}__nnUNetPlans__2d" / "fold_all"
    fold.mkdir(parents=True)
    (fold / "checkpoint_final.pth").touch()
    (fold.parent / "dataset.json").write_text('{"file_ending": ".png"}')
    jobs: list[dict[str, Any]] = []
    monkeypatch.setattr(nnunet, "run_job", lambda job, *_: jobs.append(job))
    nnunet.predict(7, "2d", ["all"], trainer, "nnUNetPlans", {"a": [tmp_path / "a.png"]}, tmp_path / "out", "cpu")
    assert jobs[0]["mirroring"] is expected
