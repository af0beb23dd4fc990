"""Best guesses for divergence voxels on nnU-Net's preprocessed grid, and OneShotTrainer learning from them."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import blosc2
import numpy as np
import pytest
import SimpleITK as sitk
import torch
import torch.distributed as dist
from cropped_dataset import CASES as DRAWN
from cropped_dataset import (
    REGIONS,
    SAGITTAL,
    SPACINGS,
    THICK,
    label_of,
    prepare,
    preprocess_fully,
    save,
    write,
    write_label,
)
from nnunetv2.run.run_training import get_trainer_from_args
from nnunetv2.utilities.plans_handling.plans_handler import PlansManager
from raw_datasets import Roots
from tiny_dataset import LABELS, preprocess_in_process, write_dataset

from nnunet_oneshot.filled_labels import fill_labels, filled_folder
from nnunet_oneshot.refresh import preprocessed_targets
from nnunet_oneshot.settings import SMALL_PLANS, LossSettings

pytestmark = [
    pytest.mark.filterwarnings("ignore:`torch.jit:FutureWarning"),
    pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning"),
]

NAME = "Dataset901_Tiny"
IGNORE = 3
CASES = ["case_000", "case_001", "case_002"]


@pytest.fixture
def trainer(training_roots: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """OneShotTrainer on a dataset whose images are resampled and whose best guess in divergence is label 1."""
    monkeypatch.setenv("nnUNet_n_proc_DA", "1")
    folder = write_dataset(training_roots / "nnUNet_raw", NAME, cases=3)
    preprocess_in_process(NAME, ["3d_fullres"])
    monkeypatch.setenv("nnUNet_n_proc_DA", "0")
    (folder / "pseudoTr" / "fused").mkdir(parents=True)
    for case in CASES[1:]:
        write_guess(folder, case, 1)
    return get_trainer_from_args(
        "901", "3d_fullres", "all", "OneShotTrainer_tiny", SMALL_PLANS, device=torch.device("cpu")
    )


def write_guess(folder: Path, case: str, value: int) -> None:
    """The case's label with `value` in the place of ignore."""
    image = sitk.ReadImage(str(folder / "labelsTr" / f"{case}.nii.gz"))
    label = sitk.GetArrayFromImage(image)
    guess = sitk.GetImageFromArray(np.where(label == IGNORE, value, label).astype(np.int16))
    guess.CopyInformation(image)
    sitk.WriteImage(guess, str(folder / "pseudoTr" / "fused" / f"{case}.nii.gz"))


def raw_folder() -> Path:
    return Path(os.environ["nnUNet_raw"]) / NAME


def fill(trainer: Any, writer: str = "fold_0") -> list[str]:
    preprocessed = Path(trainer.preprocessed_dataset_folder)
    manager = (trainer.plans_manager, trainer.configuration_manager)
    return fill_labels(preprocessed, raw_folder() / "pseudoTr" / "fused", CASES, *manager, ".nii.gz", IGNORE, 1, writer)


def stored(trainer: Any, case: str) -> tuple[np.ndarray, np.ndarray]:
    """nnU-Net's preprocessed label and ours."""
    preprocessed = Path(trainer.preprocessed_dataset_folder)
    files = (preprocessed / f"{case}_seg.b2nd", filled_folder(preprocessed) / f"{case}.b2nd")
    own, filled = (blosc2.open(urlpath=str(file), mode="r")[:] for file in files)
    return own, filled


def test_divergence_gets_the_best_guess_and_nothing_else_changes(trainer: Any) -> None:
    assert fill(trainer) == ["case_000"]
    own, filled = stored(trainer, "case_001")
    assert (own == IGNORE).any()
    assert (filled[own == IGNORE] == 1).mean() > 0.9
    assert (filled != IGNORE).all()
    assert (filled[own != IGNORE] == own[own != IGNORE]).all()


@pytest.mark.parametrize(
    ("shape", "spacings", "labels", "more", "configuration"),
    [
        ((12, 26, 22), SPACINGS, LABELS, {}, "3d_fullres"),
        ((9, 26, 22), THICK, LABELS, {}, "3d_fullres"),
        ((12, 26, 22), SAGITTAL, LABELS, {}, "3d_fullres"),
        ((12, 26, 22), SPACINGS, LABELS, {}, "2d"),
        ((12, 26, 22), SPACINGS, REGIONS, {"regions_class_order": [1, 2]}, "3d_fullres"),
    ],
    ids=["cropped and resampled", "thick slices", "turned", "2d", "regions"],
)
def test_a_guess_lies_where_nnunet_would_have_put_it(
    roots: Roots,
    shape: tuple[int, int, int],
    spacings: tuple[tuple[float, ...], ...],
    labels: Mapping[str, Any],
    more: Mapping[str, Any],
    configuration: str,
) -> None:
    folder = write(roots, shape, spacings, labels, **more)
    base = prepare(roots, (configuration,))
    guesses = {case: guess_of(index, shape) for index, case in enumerate(DRAWN)}
    for index, (case, guess) in enumerate(guesses.items()):
        save(guess, folder / "pseudoTr" / "fused" / f"{case}.nii.gz", spacings[index])
    target = preprocessed_targets(base)[0]
    plans = PlansManager(str(target.plans))
    manager = (plans, plans.get_configuration(configuration))
    assert fill_labels(target.folder, folder / "pseudoTr" / "fused", DRAWN, *manager, ".nii.gz", IGNORE, 1, "w") == []
    before = {
        case: (array(target.files(case)[1]), array(filled_folder(target.folder) / f"{case}.b2nd")) for case in DRAWN
    }
    for index, (case, guess) in enumerate(guesses.items()):
        write_label(folder, case, guess, spacings[index])
    preprocess_fully(base)
    for case, (own, filled) in before.items():
        ignored, whole = own == IGNORE, array(target.files(case)[1])
        assert (filled[~ignored] == own[~ignored]).all()
        # Outside the image nnU-Net's background is -1.
        assert (filled[ignored] == np.maximum(whole, 0)[ignored]).all()
        assert len(np.unique(filled[ignored])) > 1


def guess_of(index: int, shape: tuple[int, int, int]) -> np.ndarray:
    """The label of a case with a class in one half of what is ignored, and another one in the other half."""
    label = label_of(index, shape)
    half = np.indices(shape)[2] < np.median(np.nonzero(label == IGNORE)[2])
    return np.where(label == IGNORE, np.where(half, 1, 2), label).astype(np.int16)


def array(file: Path) -> np.ndarray:
    return blosc2.open(urlpath=str(file), mode="r")[:]


def test_a_guess_of_background_alone_teaches_nothing(trainer: Any) -> None:
    """A sparse label that nothing was carried for: its best guess says background wherever the person did not draw."""
    fill(trainer)
    write_guess(raw_folder(), "case_001", 0)
    assert fill(trainer) == ["case_000", "case_001"]
    assert not (filled_folder(Path(trainer.preprocessed_dataset_folder)) / "case_001.b2nd").exists()


def test_refreshed_guesses_replace_the_old_ones_and_fresh_files_stay(trainer: Any) -> None:
    fill(trainer)
    file = filled_folder(Path(trainer.preprocessed_dataset_folder)) / "case_002.b2nd"
    before = file.stat()
    write_guess(raw_folder(), "case_001", 2)
    fill(trainer)
    own, filled = stored(trainer, "case_001")
    assert (filled[own == IGNORE] == 2).mean() > 0.9
    assert (file.stat().st_ino, file.stat().st_mtime_ns) == (before.st_ino, before.st_mtime_ns)


def test_a_label_that_changed_after_its_guess_went_is_not_filled_as_before(trainer: Any) -> None:
    fill(trainer)
    guesses, preprocessed = raw_folder() / "pseudoTr" / "fused", Path(trainer.preprocessed_dataset_folder)
    for case in CASES[1:]:
        (guesses / f"{case}.nii.gz").unlink()
    file = preprocessed / "case_001_seg.b2nd"
    seg = blosc2.open(urlpath=str(file), mode="r")[:]
    file.unlink()
    blosc2.asarray(np.where(seg == 1, 2, seg), urlpath=str(file))
    assert fill(trainer) == ["case_000", "case_001"]
    assert [file.name for file in filled_folder(preprocessed).iterdir()] == ["case_002.b2nd"]


def test_preprocessed_data_copied_without_times_and_raw_data_stay_filled(trainer: Any) -> None:
    fill(trainer)
    preprocessed = Path(trainer.preprocessed_dataset_folder)
    for file in (raw_folder() / "pseudoTr" / "fused").iterdir():
        file.unlink()
    for case in CASES[1:]:
        os.utime(filled_folder(preprocessed) / f"{case}.b2nd", ns=(0, 0))
    assert fill(trainer) == ["case_000"]


def test_a_copy_that_was_cut_short_is_made_again(trainer: Any) -> None:
    fill(trainer)
    file = filled_folder(Path(trainer.preprocessed_dataset_folder)) / "case_001.b2nd"
    file.write_bytes(file.read_bytes()[:40])
    assert fill(trainer) == ["case_000"]
    assert (stored(trainer, "case_001")[1] != IGNORE).all()


def test_each_process_of_a_ddp_training_fills_its_part(trainer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    waited: list[int] = []
    monkeypatch.setattr(dist, "get_world_size", lambda: 2)
    monkeypatch.setattr(dist, "barrier", lambda: waited.append(trainer.local_rank))
    trainer.is_ddp = True
    for rank in (0, 1):
        trainer.local_rank = rank
        trainer._fill_labels(CASES[1:])
        folder = filled_folder(Path(trainer.preprocessed_dataset_folder))
        assert len(list(folder.iterdir())) == rank + 1
    assert waited == [0, 1]


def test_a_label_without_an_ignored_voxel_is_not_copied(trainer: Any) -> None:
    write_guess(raw_folder(), "case_000", 1)
    assert fill(trainer) == ["case_000"]


def test_two_trainings_that_start_at_once_fill_the_same_cases(trainer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """The second one begins and ends while the first one has written, but not yet named, its file."""
    write = blosc2.asarray

    def interrupted(*arguments: Any, **options: Any) -> Any:
        written = write(*arguments, **options)
        monkeypatch.setattr(blosc2, "asarray", write)
        fill(trainer, "fold_1")
        return written

    monkeypatch.setattr(blosc2, "asarray", interrupted)
    assert fill(trainer) == ["case_000"]
    own, filled = stored(trainer, "case_001")
    assert (filled[own == IGNORE] == 1).mean() > 0.9
    folder = filled_folder(Path(trainer.preprocessed_dataset_folder))
    assert sorted(file.name for file in folder.iterdir()) == ["case_001.b2nd", "case_002.b2nd"]


def test_what_a_killed_training_left_half_written_goes_when_it_runs_again(
    trainer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    write = blosc2.asarray

    def killed(*arguments: Any, **options: Any) -> None:
        write(*arguments, **options)
        raise KeyboardInterrupt

    monkeypatch.setattr(blosc2, "asarray", killed)
    with pytest.raises(KeyboardInterrupt):
        fill(trainer)
    monkeypatch.setattr(blosc2, "asarray", write)
    folder = filled_folder(Path(trainer.preprocessed_dataset_folder))
    assert len(list(folder.iterdir())) == 1
    fill(trainer)
    assert sorted(file.name for file in folder.iterdir()) == ["case_001.b2nd", "case_002.b2nd"]


@pytest.mark.parametrize(("share", "ignored"), [(0.0, True), (1.0, False)])
def test_the_trainer_draws_guesses_as_its_settings_say(trainer: Any, share: float, ignored: bool) -> None:
    trainer.loss_settings = replace(LossSettings(), guess_share=share)
    trainer.initialize()
    loader, _ = trainer.get_dataloaders()
    targets = [batch for _ in range(8) for batch in drawn(loader)]
    assert any((target == IGNORE).any() for target in targets) is ignored


def drawn(loader: Any) -> list[torch.Tensor]:
    """The targets of a batch that pseudo-labelled cases gave."""
    batch = next(loader)
    return [target for target, case in zip(batch["target"][0], batch["keys"], strict=True) if case != "case_000"]


def test_without_best_guesses_divergence_stays_ignored(trainer: Any) -> None:
    for file in (raw_folder() / "pseudoTr" / "fused").iterdir():
        file.unlink()
    trainer.loss_settings = replace(LossSettings(), guess_share=1.0)
    trainer.initialize()
    trainer.get_dataloaders()
    assert "for 0 of 3 cases" in Path(trainer.log_file).read_text()
