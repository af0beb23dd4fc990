"""OneShotTrainer inside nnU-Net, on tiny random data: what it trains on, and that it is nnU-Net where it should be."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from batchgenerators.utilities.file_and_folder_operations import load_pickle, save_pickle
from nnunetv2.run.run_training import get_trainer_from_args
from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer
from tiny_dataset import LABELS, preprocess_in_process, write_dataset
from torch._dynamo import OptimizedModule

from nnunet_oneshot.case_selection import by_author, dealt_split, drawn_by_weight, usable_split
from nnunet_oneshot.errors import OneShotError
from nnunet_oneshot.losses import ramp
from nnunet_oneshot.settings import PRESETS, SMALL_PLANS, OneShotBlock, parse_block, preset, schedule_of

pytestmark = [
    pytest.mark.filterwarnings("ignore:Detected call of `lr_scheduler.step:UserWarning"),
    pytest.mark.filterwarnings("ignore:`torch.jit:FutureWarning"),
    pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning"),
]

Make = Callable[..., Any]


@pytest.fixture
def make(training_roots: Path, monkeypatch: pytest.MonkeyPatch) -> Make:
    """Makes a trainer on a new tiny dataset; keyword arguments are those of write_dataset."""

    def trainer(name: str = "OneShotTrainer_tiny", configuration: str = "2d", fold: Any = 0, **dataset: Any) -> Any:
        write_dataset(training_roots / "nnUNet_raw", "Dataset901_Tiny", **dataset)
        monkeypatch.setenv("nnUNet_n_proc_DA", "1")
        preprocess_in_process("Dataset901_Tiny", [configuration])
        monkeypatch.setenv("nnUNet_n_proc_DA", "0")
        return again(name, configuration, fold)

    return trainer


def again(name: str, configuration: str = "2d", fold: Any = 0) -> Any:
    """A trainer on the dataset that is there."""
    return get_trainer_from_args("901", configuration, fold, name, SMALL_PLANS, device=torch.device("cpu"))


def start(trainer: Any) -> Any:
    trainer.on_train_start()
    trainer.on_epoch_start()
    trainer.on_train_epoch_start()
    return trainer


def seeded_steps(trainer: Any, steps: int = 2) -> list[float]:
    """Losses of a few steps from fixed seeds, with augmentation in line."""
    np.random.seed(0)
    torch.manual_seed(0)
    trainer.initialize()
    start(trainer)
    return [float(trainer.train_step(next(trainer.dataloader_train))["loss"]) for _ in range(steps)]


@pytest.mark.parametrize("configuration", ["2d", "3d_fullres"])
def test_it_learns_from_consensus_and_compares_views_in_divergence(make: Make, configuration: str) -> None:
    trainer = start(make(configuration=configuration))
    trainer.current_epoch = 9
    outputs = [trainer.train_step(next(trainer.dataloader_train)) for _ in range(4)]
    assert all(np.isfinite(output["loss"]) for output in outputs)
    assert max(output["consistency"] for output in outputs) > 0
    assert max(output["divergence"] for output in outputs) > 0
    trainer.on_train_epoch_end(outputs)
    with torch.no_grad():
        trainer.on_validation_epoch_start()
        result = trainer.validation_step(next(trainer.dataloader_val))
    assert np.isfinite(result["loss"])
    assert "flips along axes" in Path(trainer.log_file).read_text()


def test_the_log_gives_both_parts_of_the_loss_and_how_much_has_no_label(make: Make) -> None:
    trainer = late(make(fold="all"))
    outputs = steps(trainer, 4)
    for number, output in enumerate(outputs):
        weight = ramp(0.9 + number / 200, trainer.loss_settings)
        assert output["loss"] == pytest.approx(output["supervised"] + weight * output["consistency"], rel=1e-4)
    trainer.on_train_epoch_end(outputs)
    said = r"supervised loss (\S+), consistency (\S+) \(weight (\S+)\), (\S+)% of voxels without a label"
    supervised, consistency, weight, share = map(float, *re.findall(said, Path(trainer.log_file).read_text()))
    means = {key: np.mean([output[key] for output in outputs]) for key in outputs[0]}
    assert supervised == pytest.approx(means["supervised"], abs=1e-4)
    assert consistency == pytest.approx(means["consistency"], abs=1e-4)
    assert weight == pytest.approx(ramp(0.9 + 4 / 200, trainer.loss_settings), abs=1e-3)
    assert share == pytest.approx(100 * means["divergence"], abs=0.01)
    assert share > 0


@pytest.mark.parametrize("configuration", ["2d", "3d_fullres"])
def test_cross_patches_bring_the_annotated_case_into_divergence(make: Make, configuration: str) -> None:
    trainer = make(configuration=configuration)
    shares = []
    for probability in (0.0, 1.0):
        settings = replace(trainer.loss_settings, guess_share=0.0, cross_patch=probability, cross_patch_labels=True)
        trainer.loss_settings = settings
        if not trainer.was_initialized:
            trainer.initialize()
        loader, _ = trainer.get_dataloaders()
        shares.append([ignored_share(loader, seed) for seed in range(10)])
    assert all(after <= before for before, after in zip(*shares, strict=True))
    assert 0 < sum(shares[1]) < sum(shares[0])
    trainer.dataloader_train = loader
    assert np.isfinite(trainer.train_step(next(loader))["loss"])


def ignored_share(loader: Any, seed: int) -> float:
    """Share of ignored voxels in the first sample of a batch, which is augmented before anything else draws."""
    np.random.seed(seed)
    torch.manual_seed(seed)
    return float((next(loader)["target"][0][0] == 3).float().mean())


@pytest.mark.parametrize("form", ["labels", "regions", "no deep supervision"])
def test_the_log_tells_annotated_from_pseudo_labels_and_the_sum_is_nnunets(make: Make, form: str) -> None:
    regions = {"labels": {"background": 0, "whole": [1, 2], "core": 2, "ignore": 3}, "regions_class_order": [1, 2]}
    trainer = make(fold="all", cases=3, **(regions if form == "regions" else {}))
    plain = again("nnUNetTrainer_tiny", fold="all")
    for one in (trainer, plain):
        one.enable_deep_supervision = form != "no deep supervision"
    start(trainer)
    plain.initialize()
    plain.network.load_state_dict(trainer.network.state_dict())
    batches = [next(trainer.dataloader_val) for _ in range(30)]
    assert any(len(by_author(batch["keys"], ["case_000"])) == 2 for batch in batches)
    with torch.no_grad():
        for one in (trainer, plain):
            one.on_validation_epoch_start()
        ours = [trainer.validation_step(copied(batch)) for batch in batches]
        nnunets = [plain.validation_step(copied(batch)) for batch in batches]
    for key in ("loss", "tp_hard", "fp_hard", "fn_hard"):
        assert np.allclose([result[key] for result in ours], [result[key] for result in nnunets])
    trainer.on_validation_epoch_end(ours)
    said = r"Pseudo dice against (annotated labels|pseudo labels \(not the truth\)): (\[.*\])"
    logged = dict(re.findall(said, Path(trainer.log_file).read_text()))
    for author, whose in (("annotated", "annotated labels"), ("pseudo", "pseudo labels (not the truth)")):
        assert json.loads(logged[whose]) == pytest.approx(dice_of(plain, batches, author), abs=1e-3)


def dice_of(plain: Any, batches: list[dict[str, Any]], author: str) -> list[float]:
    """nnU-Net's pseudo Dice over one author's samples alone."""
    counts = np.zeros((3, 2))
    for batch in batches:
        samples = by_author(batch["keys"], ["case_000"]).get(author, [])
        if samples:
            part = {"data": batch["data"][samples], "target": chosen(batch["target"], samples)}
            with torch.no_grad():
                result = plain.validation_step(part)
            counts += [result[key] for key in ("tp_hard", "fp_hard", "fn_hard")]
    tp, fp, fn = counts
    return list(2 * tp / (2 * tp + fp + fn))


def test_annotated_cases_have_the_share_of_draws_that_the_settings_give_them(make: Make) -> None:
    trainer = make(fold="all", cases=4)
    trainer.loss_settings = replace(trainer.loss_settings, annotated_share=0.6)
    trainer.initialize()
    loader, _ = trainer.get_dataloaders()
    drawn = list(loader.data_loader.indices)
    assert drawn.count("case_000") / len(drawn) == pytest.approx(5 / 8), "of whole cases, at least so many"


def test_images_without_foreground_train_where_nothing_is_ignored(make: Make) -> None:
    labels = {"background": 0, "ball": 1, "core": 2}
    trainer = make(cases=2, labels=labels, annotated=["case_000", "case_001"])
    for file in Path(trainer.preprocessed_dataset_folder).glob("*.pkl"):
        properties = load_pickle(str(file))
        properties["class_locations"] = {label: [] for label in properties["class_locations"]}
        save_pickle(properties, str(file))
    assert np.isfinite(seeded_steps(trainer, 1)).all()


def copied(batch: dict[str, Any]) -> dict[str, Any]:
    """nnU-Net's validation step changes the target."""
    return {**batch, "target": chosen(batch["target"], list(range(len(batch["keys"]))))}


def chosen(target: Any, samples: list[int]) -> Any:
    """A copy of some samples, at every level where there is deep supervision."""
    return [level[samples].clone() for level in target] if isinstance(target, list) else target[samples].clone()


def late(trainer: Any, **settings: Any) -> Any:
    """Started, near the end of its training, with cases whose batches all have divergence."""
    trainer.loss_settings = replace(trainer.loss_settings, **settings)
    start(trainer)
    trainer.current_epoch = 9
    return trainer


def steps(trainer: Any, count: int) -> list[dict[str, Any]]:
    return [trainer.train_step(next(trainer.dataloader_train)) for _ in range(count)]


def test_three_full_passes_learn_and_say_so(make: Make) -> None:
    trainer = late(make("OneShotTrainer_tiny", fold="all"), full_passes=3)
    seen: list[bool] = []
    trainer.network.register_forward_hook(lambda *_: seen.append(torch.is_grad_enabled()))
    outputs = steps(trainer, 4)
    due = sum(output["divergence"] > 0 for output in outputs)
    assert due > 0
    assert seen == [True] * (4 + 2 * due)
    assert all(output["consistency"] > 0 for output in outputs if output["divergence"] > 0)
    assert "consistency of 3 full passes" in trainer._introduction()


def test_views_are_compared_every_so_many_iterations(make: Make) -> None:
    trainer = late(make(annotated=[]), every=3)
    outputs = steps(trainer, 6)
    assert all(output["divergence"] > 0 for output in outputs)
    assert [output["consistency"] > 0 for output in outputs] == [False, False, True] * 2


def test_iterations_between_comparisons_may_be_more_than_an_epoch_has(make: Make) -> None:
    trainer = late(make(annotated=[]), every=4)
    trainer.num_iterations_per_epoch = 2
    compared = []
    for trainer.current_epoch in (7, 8, 9):
        trainer.on_train_epoch_start()
        compared += [output["consistency"] > 0 for output in steps(trainer, 2)]
    assert compared == [False, True] + [False] * 3 + [True]


@pytest.mark.parametrize(
    ("axes", "passes", "said"),
    [
        (None, 1, "nothing: this configuration has neither flips nor rotations"),
        ((0,), 3, "consistency of 2 full passes (3 asked for, there are no more views), weight"),
    ],
)
def test_the_log_promises_no_more_views_than_there_are(
    make: Make, monkeypatch: pytest.MonkeyPatch, axes: Any, passes: int, said: str
) -> None:
    """As in a trainer that switches mirroring off, or one axis of it."""
    hook = "configure_rotation_dummyDA_mirroring_and_inital_patch_size"
    nnunets = getattr(nnUNetTrainer, hook)
    monkeypatch.setattr(nnUNetTrainer, hook, lambda one: ((0.0, 0.0), *nnunets(one)[1:3], axes))
    trainer = late(make(annotated=[]), full_passes=passes)
    assert (steps(trainer, 1)[0]["consistency"] > 0) is (axes is not None)
    assert said in Path(trainer.log_file).read_text()


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor:UserWarning")
@pytest.mark.parametrize(
    "settings", [{}, {"full_passes": 3}, {"teacher_decay": 0.9}], ids=["view", "passes", "teacher"]
)
def test_a_compiled_network_learns_what_it_learns_otherwise(
    make: Make, monkeypatch: pytest.MonkeyPatch, settings: dict[str, Any]
) -> None:
    """nnU-Net compiles on CUDA alone; `eager` runs the same wrappers without a compiler."""
    plain = seeded_late(make("OneShotTrainer_tiny", annotated=[]), settings)
    expected = steps(plain, 2)
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="eager"))
    monkeypatch.setattr(nnUNetTrainer, "_do_i_compile", lambda _: True)
    compiled = seeded_late(again("OneShotTrainer_tiny"), settings)
    found = steps(compiled, 2)
    assert isinstance(compiled.network, OptimizedModule)
    for one, other in zip(found, expected, strict=True):
        assert one["consistency"] > 0
        assert {k: float(v) for k, v in one.items()} == pytest.approx({k: float(v) for k, v in other.items()}, rel=1e-3)


def seeded_late(trainer: Any, settings: dict[str, Any]) -> Any:
    np.random.seed(0)
    torch.manual_seed(0)
    return late(trainer, **settings)


def test_a_mean_teacher_is_asked_instead_and_follows_slowly(make: Make) -> None:
    trainer = late(make("OneShotTrainer_tiny", annotated=[]), teacher_decay=0.9)
    asked: list[Any] = []
    trainer.network.register_forward_hook(lambda network, *_: asked.append(network))
    assert steps(trainer, 1)[0]["consistency"] > 0
    first = [weight.clone() for weight in trainer.network.parameters()]
    steps(trainer, 1)
    assert [network is trainer.network for network in asked] == [False, True] * 2
    taught = trainer._teacher.module.parameters()
    for before, now, mean in zip(first, trainer.network.parameters(), taught, strict=True):
        assert torch.allclose(mean, 0.9 * before + 0.1 * now, atol=1e-6)
        assert not mean.requires_grad or mean.grad is None


@pytest.mark.parametrize(
    ("name", "settings"),
    [
        ("OneShotTrainerConsistency", {}),
        ("OneShotTrainerThreePasses", {"full_passes": 3}),
        ("OneShotTrainerYoloSeg", {"full_passes": 3, "cross_patch": 0.2}),
        ("OneShotTrainerMeanTeacher", {"teacher_decay": 0.99}),
    ],
)
def test_other_losses_are_trainers_that_nnunet_finds(make: Make, name: str, settings: dict[str, Any]) -> None:
    make()
    assert again(name).loss_settings == replace(again("OneShotTrainer").loss_settings, guess_share=0.0, **settings)


@pytest.mark.parametrize(
    "name",
    ["OneShotTrainerNoMirroring", "OneShotTrainerNoMirroring_small", "OneShotTrainerNoMirroring_tiny"],
)
def test_without_mirroring_neither_training_nor_prediction_nor_views_flip(make: Make, name: str) -> None:
    make()
    trainer, mirrored = again(name), again("OneShotTrainer_tiny")
    for one in (trainer, mirrored):
        one.initialize()
    assert trainer.configure_rotation_dummyDA_mirroring_and_inital_patch_size()[3] is None
    assert mirrored.configure_rotation_dummyDA_mirroring_and_inital_patch_size()[3]
    assert trainer.inference_allowed_mirroring_axes is None
    assert trainer.view_choice.mirror_axes == ()
    assert mirrored.view_choice.mirror_axes


@pytest.mark.parametrize("preset", ["small", "tiny"])
def test_nnunets_trainer_without_mirroring_has_a_schedule_of_ours(make: Make, preset: str) -> None:
    """Else a comparison of the two would be one of lengths."""
    make()
    trainer = again(f"nnUNetTrainerNoMirroring_{preset}")
    trainer.initialize()
    assert trainer.configure_rotation_dummyDA_mirroring_and_inital_patch_size()[3] is None
    assert trainer.inference_allowed_mirroring_axes is None
    assert trainer.schedule == again(f"OneShotTrainerNoMirroring_{preset}").schedule == PRESETS[preset].schedule


@pytest.mark.parametrize(
    ("content", "error", "word"),
    [
        ({"oneshot": {"schema": 2}}, OneShotError, "schema 2"),
        ({"oneshot": {"schema": 1, "annotated": ["ghost"]}}, OneShotError, "ghost"),
        ({"labels": {**LABELS, "ignore": 7}}, AssertionError, "highest"),
    ],
)
def test_a_dataset_json_that_cannot_be_trained_on_is_refused(
    make: Make, training_roots: Path, content: dict[str, Any], error: type[Exception], word: str
) -> None:
    make()
    path = training_roots / "nnUNet_preprocessed" / "Dataset901_Tiny" / "dataset.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **content}))
    with pytest.raises(error, match=word):
        again("OneShotTrainer_tiny").do_split()


def test_consistency_is_off_during_the_first_tenth(make: Make) -> None:
    trainer = start(make())
    assert trainer.train_step(next(trainer.dataloader_train))["consistency"] == 0.0


def seeded_validation(trainer: Any) -> torch.Tensor:
    """Data of a validation batch from a fixed seed."""
    np.random.seed(0)
    return next(trainer.dataloader_val)["data"]


@pytest.mark.parametrize(
    ("change", "fold"),
    [({}, 0), ({}, "all"), ({"oneshot": None}, 0), ({"labels": {"background": 0, "ball": 1, "core": 2}}, 0)],
)
def test_without_block_or_divergence_it_trains_exactly_as_nnunet(make: Make, change: dict[str, Any], fold: Any) -> None:
    """Also where `propagate` made the dataset, whose labels have an ignore value, of cases that are all annotated."""
    plain = make("nnUNetTrainer_tiny", fold=fold, cases=5, annotated=[f"case_{n:03d}" for n in range(5)], **change)
    losses, ours = seeded_steps(plain), again("OneShotTrainer_tiny", fold=fold)
    assert seeded_steps(ours) == losses
    assert torch.equal(seeded_validation(ours), seeded_validation(plain))
    trained, expected = ours.network.state_dict(), plain.network.state_dict()
    assert all(torch.equal(trained[key], expected[key]) for key in expected)
    assert "training" in ours._introduction()
    assert ours._introduction() in Path(ours.log_file).read_text()


def test_one_ignored_voxel_is_enough_for_the_dual_component_loss(make: Make) -> None:
    everyone = [f"case_{number:03d}" for number in range(4)]
    trainer = start(make(fold="all", drawn="scribbles", annotated=everyone))
    assert "best guess" in trainer._introduction()


def test_validation_that_is_left_out_says_nothing_of_its_labels(make: Make) -> None:
    trainer = start(make(fold="all"))
    trainer.perform_actual_validation()
    log = Path(trainer.log_file).read_text()
    assert "skipped" in log
    assert "cases have pseudo labels" not in log


@pytest.mark.parametrize("fold", [0, "all"])
@pytest.mark.parametrize("cases", [1, 2, 3])
def test_few_cases_train(make: Make, cases: int, fold: Any) -> None:
    trainer = make(cases=cases, fold=fold)
    train, validation = trainer.do_split()
    assert "case_000" in train
    assert set(train) | set(validation) <= {"case_000", "case_001", "case_002"}
    assert fold == "all" or cases == 1 or not set(train) & set(validation)
    trainer = start(trainer)
    assert np.isfinite(trainer.train_step(next(trainer.dataloader_train))["loss"])


@pytest.mark.parametrize("fold", [0, 1, "all"])
def test_left_out_cases_never_train_and_annotated_ones_always_do(make: Make, training_roots: Path, fold: Any) -> None:
    trainer = make(cases=6, left_out=["case_004"], fold=fold)
    train, validation = trainer.do_split()
    assert "case_000" in train
    assert "case_004" not in {*train, *validation}
    assert validation
    assert fold == "all" or "case_000" not in validation
    splits = [{"train": ["case_001", "case_004"], "val": ["case_000", "case_002"]}] * 2
    path = training_roots / "nnUNet_preprocessed" / "Dataset901_Tiny" / "splits_final.json"
    path.write_text(json.dumps(splits))
    train, validation = trainer.do_split()
    if fold != "all":
        assert (train, validation) == (["case_000", "case_001"], ["case_002"])


def test_weights_of_cases_are_how_often_they_are_drawn(make: Make) -> None:
    block = {"schema": 1, "annotated": ["case_000"], "left_out": [], "case_weight": {"case_001": 0.5, "case_002": 0}}
    training, _ = make(fold="all", oneshot=block).get_tr_and_val_datasets()
    counts = {case: training.identifiers.count(case) for case in ("case_000", "case_001", "case_002", "case_003")}
    assert counts == {"case_000": 2, "case_001": 1, "case_002": 0, "case_003": 2}


@pytest.mark.parametrize("drawn", ["one slice", "scribbles"])
@pytest.mark.parametrize("block", [True, False], ids=["block", "no block"])
def test_it_learns_from_the_few_voxels_that_a_person_drew(make: Make, drawn: str, block: bool) -> None:
    everyone = [f"case_{number:03d}" for number in range(4)]
    trainer = make(fold="all", drawn=drawn, annotated=everyone, **({} if block else {"oneshot": None}))
    losses = seeded_steps(trainer, 12)
    assert np.isfinite(losses).all()
    assert np.mean(losses[-4:]) < np.mean(losses[:4]) - 0.4


def test_a_set_without_a_labelled_voxel_is_refused(make: Make) -> None:
    trainer = make(cases=2, annotated=[], left_out=["case_000", "case_001"], oneshot={"schema": 1})
    with pytest.raises(OneShotError, match="labelled voxel"):
        trainer.get_tr_and_val_datasets()


def test_a_checkpoint_cut_short_never_takes_the_place_of_a_whole_one(
    make: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    trainer = make()
    trainer.initialize()
    path = Path(trainer.output_folder) / "checkpoint_latest.pth"
    trainer.save_checkpoint(str(path))
    whole = path.read_bytes()

    def cut_short(_: object, file: str) -> None:
        Path(file).write_bytes(b"half")
        raise KeyboardInterrupt

    monkeypatch.setattr(torch, "save", cut_short)
    with pytest.raises(KeyboardInterrupt):
        trainer.save_checkpoint(str(path))
    assert path.read_bytes() == whole


def test_a_checkpoint_of_another_trainer_is_refused(make: Make) -> None:
    other = make("nnUNetTrainer_tiny")
    other.initialize()
    path = Path(other.output_folder) / "checkpoint_latest.pth"
    other.save_checkpoint(str(path))
    with pytest.raises(OneShotError, match=r"checkpoint of OneShotTrainer_tiny, found one of nnUNetTrainer_tiny"):
        again("OneShotTrainer_tiny").load_checkpoint(str(path))
    other.load_checkpoint(str(path))


def test_presets_shorten_both_trainers_alike(make: Make) -> None:
    make()
    for name in ("small", "tiny"):
        schedule = PRESETS[name].schedule
        assert schedule is not None
        for base in ("OneShotTrainer", "nnUNetTrainer"):
            trainer = again(preset(name).trainer(base))
            assert (trainer.num_epochs, trainer.num_iterations_per_epoch) == (schedule.epochs, schedule.iterations)
            assert trainer.save_every == schedule.save_every < trainer.num_epochs
        assert schedule_of(f"OneShotTrainer_{name}") == schedule
    assert schedule_of("OneShotTrainer") is None


def test_the_trainers_network_is_nnunets_own(make: Make) -> None:
    trainer = make()
    assert "build_network_architecture" not in vars(type(trainer))
    assert type(trainer).build_network_architecture is again("nnUNetTrainer_tiny").build_network_architecture


def test_a_wholly_annotated_set_keeps_its_split() -> None:
    block = OneShotBlock(annotated=("a", "b", "c"), left_out=("d",))
    assert usable_split(["a", "b", "d"], ["c"], block) == (["a", "b"], ["c"])


def test_splits_of_a_few_cases_hold_out_pseudo_labels_first() -> None:
    assert dealt_split(["a", "b"], 3, annotated=["a"]) == (["a"], ["b"])
    assert dealt_split(["a"], 0, annotated=["a"]) == (["a"], ["a"])
    assert {dealt_split(["a", "b", "c"], fold)[1][0] for fold in range(3)} == {"a", "b", "c"}


def test_a_split_with_nothing_left_to_train_on_is_refused() -> None:
    with pytest.raises(OneShotError, match="left_out"):
        usable_split(["a"], ["a"], OneShotBlock(left_out=("a",)))
    with pytest.raises(OneShotError, match="case_weight"):
        drawn_by_weight(["a"], {"a": 0.0})


@pytest.mark.parametrize(
    ("block", "message"),
    [
        ({"schema": 2}, "schema 2"),
        ({}, "schema"),
        ([], "object"),
        ({"schema": 1, "annotated": "case_000"}, "annotated"),
        ({"schema": 1, "annotated": ["ghost"]}, "ghost"),
        ({"schema": 1, "left_out": ["a"], "annotated": ["a"]}, "left_out"),
        ({"schema": 1, "case_weight": {"a": -1}}, "case_weight"),
        ({"schema": 1, "case_weight": {"a": float("nan")}}, "case_weight"),
        ({"schema": 1, "case_weight": 3}, "case_weight"),
        ({"schema": 1, "round": True}, "round"),
    ],
)
def test_a_broken_block_is_refused_with_what_is_wrong(block: Any, message: str) -> None:
    with pytest.raises(OneShotError, match=message):
        parse_block({"labels": LABELS, "oneshot": block}, ["a", "b"])


def test_a_block_survives_writing_and_reading() -> None:
    block = OneShotBlock(2, ("a",), ("b",), {"c": 0.5})
    assert parse_block({"oneshot": block.to_json()}, ["a", "b", "c"]) == block
    assert parse_block({}) is None
    with pytest.raises(OneShotError, match="preset"):
        preset("huge")
