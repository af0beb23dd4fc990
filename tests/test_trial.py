"""A trial of a few cases: which it takes, what it says, and that it writes nowhere else."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import Answer
from fake_propagator import FakePropagator
from PIL import Image as Picture
from raw_datasets import Roots, image_array, make_sparse, write_image, write_raw

from nnunet_oneshot import cli
from nnunet_oneshot import trial as trial_module
from nnunet_oneshot.errors import OneShotError
from nnunet_oneshot.propagate import Outcome, propagate
from nnunet_oneshot.summary import trial_summary
from nnunet_oneshot.trial import Trial, TrialCase, trial
from nnunet_oneshot.trial_cases import choose, evenly, statistics
from sam2_propagation.interface import Image

CASES = tuple(f"case_{i}" for i in range(8))


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty working directory."""
    folder = tmp_path / "here"
    folder.mkdir()
    monkeypatch.chdir(folder)
    return folder


@pytest.fixture
def ready(roots: Roots, fakes: dict[str, FakePropagator], here: Path) -> Roots:
    """Eight cases, one annotated; the last two are much brighter in one corner."""
    folder = write_raw(roots.raw, cases=CASES)
    for index in (6, 7):
        image = image_array(index)
        image[:, :4, :4] += 400
        write_image(folder / "imagesTr" / f"case_{index}_0000.nii.gz", image)
    return roots


def attempt(count: int = 2, **more: object) -> Trial:
    return trial(501, 601, count, propagators=("fake",), num_processes=1, **more)  # type: ignore[arg-type]


def test_it_spans_the_set_and_weighs_by_what_a_case_stands_for(ready: Roots) -> None:
    result = attempt(2)
    assert [case.share for case in result.cases] == pytest.approx([5 / 7, 2 / 7])
    assert result.cases[0].case in CASES[1:6]
    assert result.cases[1].case in CASES[6:]
    assert result.set_size == 7
    assert result.quality is not None
    means = [case.quality["mean"] for case in result.cases if case.quality is not None]
    assert result.quality == pytest.approx(np.dot([5 / 7, 2 / 7], means), abs=1e-3)
    assert 0 < result.divergence < result.divergence_of_foreground < 1
    assert result.megabytes > 0


def test_what_is_learnt_first_counts_once(ready: Roots, monkeypatch: pytest.MonkeyPatch) -> None:
    def slow(*arguments: Any, **more: Any) -> Outcome:
        return replace(propagate(*arguments, **more), preparation=600.0)

    monkeypatch.setattr(trial_module, "propagate", slow)
    result = attempt(2)
    seconds = float(np.dot([case.share for case in result.cases], [case.seconds for case in result.cases]))
    assert result.preparation == 600
    assert result.minutes == pytest.approx(10 + 7 * seconds / 60, abs=0.06)


def test_nothing_is_written_but_its_folder(ready: Roots, here: Path) -> None:
    before = ready.snapshot()
    result = attempt()
    assert ready.snapshot() == before
    assert [path.name for path in here.iterdir()] == ["oneshot_trial_501"]
    with Picture.open(result.picture) as picture:
        assert picture.width > 100
    written = json.loads((result.folder / "trial.json").read_text())
    assert written["quality"] == result.quality
    store = result.folder / "nnUNet_raw" / "Dataset601_toy_oneshot"
    assert (store / "pseudoTr" / "fused" / f"{result.cases[0].case}.nii.gz").is_file()


def test_a_second_trial_replaces_the_first_but_nothing_else(ready: Roots, here: Path) -> None:
    first = attempt(2)
    left = {path for path in first.folder.rglob("*") if first.cases[1].case in path.name}
    assert left
    again = attempt(1)
    assert len(again.cases) == 1
    assert again.cases[0].case != first.cases[1].case
    assert not [path for path in left if path.exists()]
    (first.folder / "trial.json").unlink()
    with pytest.raises(OneShotError, match="found other files"):
        attempt(2)


def test_a_trial_at_work_is_not_replaced_by_a_second_one(
    ready: Roots, here: Path, call: Callable[..., Answer], monkeypatch: pytest.MonkeyPatch
) -> None:
    command = ("-d", 501, "-o", 601, "-propagator", "fake", "-np", 1, "--trial", "-n", 2)
    second: list[Answer] = []

    def meanwhile(*arguments: Any, **more: Any) -> Outcome:
        second.append(call(cli.propagate, *command))
        return propagate(*arguments, **more)

    monkeypatch.setattr(trial_module, "propagate", meanwhile)
    first = attempt(3)
    assert second[0].code == 2
    assert f"found it running as process {os.getpid()} on" in second[0].error
    assert "oneshot_trial_501" in second[0].error
    assert len(first.cases) == len(json.loads((first.folder / "trial.json").read_text())["cases"]) == 3
    assert first.picture.is_file()


def test_files_that_are_links_into_a_store_are_tried(ready: Roots, tmp_path: Path) -> None:
    (tmp_path / "store").mkdir()
    files = sorted((ready.raw / "Dataset501_toy").rglob("*.nii.gz"))
    for number, path in enumerate(files):
        kept = path.rename(tmp_path / "store" / f"{number:04x}")
        path.symlink_to(kept)
    assert attempt(2).quality is not None


def test_more_cases_than_there_are_means_all(ready: Roots) -> None:
    assert {case.case for case in attempt(50).cases} == set(CASES[1:])


def test_of_a_set_of_slices_a_few_cases_are_tried(roots: Roots, fakes: dict[str, FakePropagator], here: Path) -> None:
    """Every case has one drawn slice, but for one that is drawn whole and has nothing to label."""
    folder = write_raw(roots.raw, cases=CASES, annotated=CASES)
    for case in CASES[1:]:
        make_sparse(folder, case)
    result = trial(501, 601, 3, propagators=("sam2",), views=("still",), num_processes=1)
    tried = {case.case for case in result.cases}
    assert len(tried) == 3
    assert tried <= set(CASES[1:])
    assert set(fakes["sam2"].asked) == tried, "no other case is labelled"
    assert result.set_size == 7
    laid_out = json.loads((result.folder / "nnUNet_raw" / "Dataset501_toy" / "dataset.json").read_text())["dataset"]
    assert set(laid_out) == tried | {"case_0"}


def test_partly_drawn_cases_beside_others_teach_and_are_not_labelled(
    roots: Roots, fakes: dict[str, FakePropagator], here: Path
) -> None:
    folder = write_raw(roots.raw, cases=CASES, annotated=CASES[:4])
    for case in CASES[:4]:
        make_sparse(folder, case)
    result = trial(501, 601, 2, propagators=("sam2",), views=("still",), num_processes=1)
    tried = {case.case for case in result.cases}
    assert len(tried) == 2
    assert tried <= set(CASES[4:])
    assert set(fakes["sam2"].asked) == tried, "no other case is labelled"
    laid_out = json.loads((result.folder / "nnUNet_raw" / "Dataset501_toy" / "dataset.json").read_text())["dataset"]
    assert set(laid_out) == tried | set(CASES[:4])
    assert set(fakes["sam2"].adapted) == set(CASES[:4])


def test_each_source_takes_the_time_of_its_own_processes(ready: Roots, monkeypatch: pytest.MonkeyPatch) -> None:
    def on_a_gpu(*arguments: Any, **more: Any) -> Outcome:
        return replace(propagate(*arguments, **more), preparation=0.0, workers={"registration": 16, "sam2": 2})

    monkeypatch.setattr(trial_module, "propagate", on_a_gpu)
    monkeypatch.setattr(trial_module, "_seconds", lambda *_: {"registration": 60.0, "sam2": 600.0})
    result = attempt(2)
    assert [case.seconds for case in result.cases] == [660, 660]
    assert result.minutes == pytest.approx(1 + 10 * 7 / 2), "seven images, of which SAM2 labels two at once"


def test_annotated_cases_cost_no_more_disk_the_more_images_there_are(
    roots: Roots, fakes: dict[str, FakePropagator], here: Path
) -> None:
    megabytes = []
    for number, annotated in ((501, CASES[:1]), (502, CASES[:4])):
        cases = (*annotated, *CASES[4:])
        write_raw(roots.raw, number, cases=cases, annotated=annotated, ending=".nii")
        result = trial(number, 601, 2, propagators=("fake",), num_processes=1)
        assert result.set_size == 4
        megabytes.append(result.megabytes)
    assert megabytes[0] == pytest.approx(megabytes[1], rel=0.05)


def test_a_partly_drawn_case_teaches_where_others_have_no_label(
    roots: Roots, fakes: dict[str, FakePropagator], here: Path
) -> None:
    make_sparse(write_raw(roots.raw, cases=CASES))
    result = trial(501, 601, 2, propagators=("sam2",), views=("still",), num_processes=1)
    assert {case.case for case in result.cases} <= set(CASES[1:])
    assert all(case.reason is None for case in result.cases)
    assert result.set_size == 7


def test_a_case_that_fails_is_told_and_is_to_be_annotated(
    roots: Roots, fakes: dict[str, FakePropagator], here: Path
) -> None:
    write_raw(roots.raw, cases=("case_0", "bad_1", "case_2"))
    result = attempt(2)
    failed = next(case for case in result.cases if case.case == "bad_1")
    assert failed.quality is None
    assert "similarity no better than identity" in str(failed.reason)
    assert result.annotate_next == "bad_1"


@pytest.mark.parametrize("count", [0, -1])
def test_no_cases_are_bad_input(ready: Roots, count: int) -> None:
    with pytest.raises(OneShotError, match="-n of 1 or more"):
        attempt(count)


def test_the_output_id_is_checked(ready: Roots) -> None:
    (ready.raw / "Dataset601_other").mkdir()
    with pytest.raises(OneShotError, match="output id 601 to be free"):
        attempt()


def test_the_command_says_what_to_expect(ready: Roots, call: Callable[..., Answer]) -> None:
    answer = call(cli.propagate, "-d", 501, "-o", 601, "-propagator", "fake", "-np", 1, "--trial", "-n", 2)
    assert answer.code == 0
    for line in (
        r"  divergence, where views disagree: \d+\.\d\d % of voxels, \d+% of those in and around the structures",
        r"  time: about \d+ minutes; disk: about \d+ MB",
    ):
        assert re.search(f"^{line}$", answer.out, re.MULTILINE)
    for words in ("stands for", "expected of all 7 images", "annotate next: case_", "trial.png", "no dataset was made"):
        assert words in answer.out
    answer = call(cli.propagate, "-d", 501, "-o", 601, "-propagator", "fake", "-np", 1, "--trial", "-n", 2, "-json")
    assert json.loads(answer.out)["set_size"] == 7


def test_the_summary_tells_divergence_time_and_disk_of_the_whole_set() -> None:
    tried = TrialCase("case_6", 0.4, {"mean": 0.61, "1": 0.61}, 0.0312, 0.25, 17.6, None)
    result = Trial(Path("there"), [tried], 70, 0.61, 0.01234, 0.456, 60.0, 83.7, 1236.4, "case_6")
    said = trial_summary(result)
    lines = said["lines"]
    assert "case_6  40%         0.61            3.12          18" in lines
    heading = lines.index("expected of all 70 images:")
    assert lines[heading + 1 : heading + 4] == [
        "  estimated Dice of the labels: 0.61",
        "  divergence, where views disagree: 1.23 % of voxels, 46% of those in and around the structures",
        "  time: about 84 minutes; disk: about 1236 MB",
    ]
    assert "OneShotTrainer learns the best guess there" in lines[heading + 4]
    figures = {key: said[key] for key in ("divergence", "divergence_of_foreground", "minutes", "megabytes")}
    assert list(figures.values()) == [0.01234, 0.456, 83.7, 1236.4], "exact for machines"


def test_like_cases_are_one_group() -> None:
    rng = np.random.default_rng(0)
    centres = {"a": 0.0, "b": 10.0, "c": 30.0}
    features = {f"{k}{i}": np.array([v, -v]) + rng.normal(0, 0.1, 2) for k, v in centres.items() for i in range(5)}
    chosen = choose(features, 3)
    assert {entry.case[0] for entry in chosen} == set(centres)
    assert [entry.share for entry in chosen] == pytest.approx([1 / 3] * 3)
    assert choose(features, 3) == chosen


@pytest.mark.parametrize("count", [2, 3, 5])
def test_images_alike_in_all_are_each_chosen_once(count: int) -> None:
    chosen = choose({name: np.ones(3) for name in "abcde"}, count)
    assert len({entry.case for entry in chosen}) == len(chosen) == count
    assert sum(entry.share for entry in chosen) == pytest.approx(1)
    assert min(entry.share for entry in chosen) > 0


def test_copies_of_an_image_are_each_chosen_once() -> None:
    features = {f"{name}{i}": np.array([value, 0.0]) for name, value in (("a", 0.0), ("b", 9.0)) for i in range(4)}
    for count in range(1, 9):
        assert len({entry.case for entry in choose(features, count)}) == count


def test_statistics_ignore_a_scanners_scale() -> None:
    data = np.random.default_rng(0).gamma(3, 100, (1, 4, 20, 20)).astype(np.float32)
    first, second = (statistics(Image("x", data * factor)) for factor in (1, 7))
    np.testing.assert_allclose(first, second, rtol=1e-3, atol=1e-3)
    assert np.abs(statistics(Image("x", data[..., ::-1])) - first).max() > 0.01


def test_evenly() -> None:
    assert evenly(list("abcde"), 3) == ["a", "c", "e"]
    assert evenly(list("abc"), 9) == list("abc")
