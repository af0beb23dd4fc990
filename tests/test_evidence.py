"""What a row of the evidence is called, and who trains it."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from nnunetv2.utilities.find_objects import recursive_find_trainer_class_by_name

from nnunet_oneshot.settings import PRESETS

# Of timm, which nnU-Net imports while it looks for trainers.
pytestmark = [
    pytest.mark.filterwarnings("ignore:`torch.jit:FutureWarning"),
    pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning"),
]


@pytest.fixture
def make(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, benchmark_module: Callable[[str], Any]) -> Any:
    """An Evidence of chaos_mr_t2, whose folder has a split and nothing else."""
    (tmp_path / "chaos_mr_t2" / "images").mkdir(parents=True)
    (tmp_path / "chaos_mr_t2" / "images" / "a.nii.gz").touch()
    split = {"pool": ["a", "b"], "test": ["c"], "annotated_default": "a", "annotated_choices": ["a"]}
    split |= {"channel": "MRI", "labels": {"background": 0, "liver": 1}}
    (tmp_path / "chaos_mr_t2" / "split.json").write_text(json.dumps(split), encoding="utf-8")
    monkeypatch.setenv("ONESHOT_DATA", str(tmp_path))
    evidence = benchmark_module("evidence")

    def made(**more: Any) -> Any:
        given = {"cases": 26, "preset": "small", "training": 1, "configuration": None, "no_mirroring": False}
        arguments = SimpleNamespace(**{**given, "device": "cpu", "o": tmp_path / "work", **more})
        return evidence.Evidence("chaos_mr_t2", "a", arguments)

    return made


@pytest.mark.parametrize(
    ("given", "key", "trainer"),
    [
        ({}, "small_ours", "OneShotTrainer_small"),
        ({"configuration": "2d"}, "small_ours", "OneShotTrainer_small"),
        ({"configuration": "3d_fullres"}, "small_3d_fullres_ours", "OneShotTrainer_small"),
        ({"no_mirroring": True}, "small_no_mirroring_ours", "OneShotTrainerNoMirroring_small"),
        (
            {"no_mirroring": True, "configuration": "3d_fullres", "preset": "tiny", "training": 2},
            "tiny_3d_fullres_no_mirroring_ours_training2",
            "OneShotTrainerNoMirroring_tiny",
        ),
        ({"no_mirroring": True, "preset": "default"}, "default_no_mirroring_ours", "OneShotTrainerNoMirroring"),
    ],
)
def test_rows_that_are_trained_in_another_way_have_other_names_and_folders(
    make: Any, given: dict[str, Any], key: str, trainer: str
) -> None:
    """Under one name the second would be taken for done."""
    made = make(**given)
    assert made.key("ours") == f"evidence_chaos_mr_t2_a_2_{key}"
    assert made.work.name == f"chaos_mr_t2_a_2_{key}".replace("_ours", "")
    assert made._trainer(SimpleNamespace(trainer="OneShotTrainer")) == trainer


def test_a_row_whose_labels_are_of_a_later_round_is_left_out_and_said(
    make: Any, benchmark_module: Callable[[str], Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The rows after it are made all the same."""
    evidence, made = benchmark_module("evidence"), make()
    for root in ("nnUNet_raw", "nnUNet_preprocessed", "nnUNet_results"):
        monkeypatch.setenv(root, "")
    monkeypatch.setattr(evidence, "read_row", lambda key: None)
    assert made.too_late("ours_no_refinement") is None, "nothing is labelled yet"
    labels = made.work / "nnUNet_raw" / f"Dataset{evidence.LABELS['ours'].number}_chaos_mr_t2_oneshot"
    labels.mkdir()
    (labels / "oneshot.json").touch()
    store = SimpleNamespace(read_manifest=lambda: SimpleNamespace(round=1))
    monkeypatch.setattr(evidence, "open_store", lambda _: (store, None))
    done: list[str] = []
    monkeypatch.setattr(evidence.Evidence, "row", lambda _, method: done.append(method))
    monkeypatch.setattr(evidence, "Evidence", lambda *_: made)
    methods = ["ours", "ours_no_refinement", "sam2_stock"]
    given = SimpleNamespace(sets=["chaos_mr_t2"], annotated="default")
    (why,) = evidence.run(given, methods)
    assert "ours_no_refinement: expected labels of round 0 at most, found 1" in why
    assert sorted(done) == ["ours", "sam2_stock"]


@pytest.mark.real
@pytest.mark.parametrize("name", ["hippocampus", "chaos_mr_t2", "acdc_mr", "hc18_us"])
def test_the_protocol_is_the_data_sets_own(name: str, benchmark_module: Callable[[str], Any]) -> None:
    common = benchmark_module("common")
    try:
        own = common.data_set(name)
    except FileNotFoundError as absent:
        pytest.skip(str(absent))
    written = common.SPLITS[name]
    assert {key: own.split[key] for key in written} == written
    cases = [*written["pool"], *written["test"]]
    assert len(set(cases)) == len(cases)
    assert all((own.labels / f"{case}{own.ending}").is_file() for case in cases)


@pytest.mark.parametrize("preset", sorted(PRESETS))
@pytest.mark.parametrize("base", ["OneShotTrainer", "nnUNetTrainer"])
def test_nnunet_finds_the_trainers_without_mirrored_images(make: Any, preset: str, base: str) -> None:
    name = make(preset=preset, no_mirroring=True)._trainer(SimpleNamespace(trainer=base))
    assert recursive_find_trainer_class_by_name(name).__name__ == name
