"""`export`: the zip predicts in a stock nnU-Net as the model did here, and tells nothing of where it was made."""

from __future__ import annotations

import json
import os
import pickle
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import SimpleITK as sitk
import torch
from nnunetv2.inference.predict_from_raw_data import nnUNetPredictor
from nnunetv2.postprocessing.remove_connected_components import remove_all_but_largest_component_from_segmentation
from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer
from scipy import ndimage

from nnunet_oneshot import cli
from nnunet_oneshot.container.predict import find_cases
from nnunet_oneshot.errors import OneShotError
from nnunet_oneshot.export import CHECKPOINT, export
from nnunet_oneshot.postprocessing import FILE as POSTPROCESSING
from nnunet_oneshot.refine_record import Plan

DATASET = "Dataset777_secret_oneshot"
CASE = "patient_mueller_1962"
CONVOLUTION = "torch.nn.modules.conv.Conv3d"
ARCHITECTURE = {
    "network_class_name": "dynamic_network_architectures.architectures.unet.PlainConvUNet",
    "arch_kwargs": {
        "n_stages": 2,
        "features_per_stage": [4, 8],
        "conv_op": CONVOLUTION,
        "kernel_sizes": [[3, 3, 3], [3, 3, 3]],
        "strides": [[1, 1, 1], [2, 2, 2]],
        "n_conv_per_stage": [1, 1],
        "n_conv_per_stage_decoder": [1],
        "conv_bias": True,
        "norm_op": "torch.nn.modules.instancenorm.InstanceNorm3d",
        "norm_op_kwargs": {"eps": 1e-05, "affine": True},
        "dropout_op": None,
        "dropout_op_kwargs": None,
        "nonlin": "torch.nn.LeakyReLU",
        "nonlin_kwargs": {"inplace": True},
    },
    "_kw_requires_import": ["conv_op", "norm_op", "dropout_op", "nonlin"],
}
RESAMPLING = {"is_seg": False, "order": 3, "order_z": 0, "force_separate_z": None}
CONFIGURATION = {
    "data_identifier": "nnUNetPlans_3d_fullres",
    "preprocessor_name": "DefaultPreprocessor",
    "batch_size": 2,
    "patch_size": [16, 16, 16],
    "median_image_size_in_voxels": [20.0, 24.0, 24.0],
    "spacing": [1.0, 1.0, 1.0],
    "normalization_schemes": ["ZScoreNormalization"],
    "use_mask_for_norm": [False],
    "resampling_fn_data": "resample_data_or_seg_to_shape",
    "resampling_fn_seg": "resample_data_or_seg_to_shape",
    "resampling_fn_data_kwargs": RESAMPLING,
    "resampling_fn_seg_kwargs": {**RESAMPLING, "is_seg": True, "order": 1},
    "resampling_fn_probabilities": "resample_data_or_seg_to_shape",
    "resampling_fn_probabilities_kwargs": {**RESAMPLING, "order": 1},
    "architecture": ARCHITECTURE,
    "batch_dice": False,
}
PLANS = {
    "dataset_name": DATASET,
    "plans_name": "nnUNetPlans",
    "original_median_spacing_after_transp": [1.0, 1.0, 1.0],
    "original_median_shape_after_transp": [20, 24, 24],
    "image_reader_writer": "SimpleITKIO",
    "transpose_forward": [0, 1, 2],
    "transpose_backward": [0, 1, 2],
    "configurations": {"3d_fullres": CONFIGURATION},
    "experiment_planner_used": "ExperimentPlanner",
    "label_manager": "LabelManager",
    "foreground_intensity_properties_per_channel": {"0": {"mean": 1.0, "std": 1.0}},
}
DATASET_JSON = {
    "channel_names": {"0": "MRI"},
    "labels": {"background": 0, "liver": 1, "kidney": 2, "ignore": 3},
    "numTraining": 2,
    "file_ending": ".nii.gz",
    "licence": "CC0",
    "description": f"scans of {CASE}",
    "dataset": {CASE: {"images": ["../elsewhere/imagesTr/x.nii.gz"], "label": "labelsTr/x.nii.gz"}},
    "oneshot": {"schema": 1, "round": 1, "annotated": [CASE], "left_out": [], "case_weight": {}},
}


class OneShotTrainer(nnUNetTrainer):
    """A trainer that a stock nnU-Net does not know."""


class OtherNetwork(nnUNetTrainer):
    """A trainer whose network does not follow from the plans."""

    @staticmethod
    def build_network_architecture(*_: Any, **__: Any) -> torch.nn.Module:
        return torch.nn.Conv3d(1, 3, 3)


def train(
    fold: str = "all", trainer: type[nnUNetTrainer] = OneShotTrainer, axes: tuple[int, ...] | None = (0, 1)
) -> Path:
    """What a training leaves in nnUNet_results, with random weights; the checkpoint is nnU-Net's own."""
    plans = {**json.loads(json.dumps(PLANS)), "continue_training": False}
    made = trainer(plans, "3d_fullres", fold, json.loads(json.dumps(DATASET_JSON)), torch.device("cpu"))
    torch.manual_seed(7)
    made.network = made.build_network_architecture(made.plans_manager, made.configuration_manager, 1, 3, True)
    made.optimizer = torch.optim.SGD(made.network.parameters(), 0.01, momentum=0.9)
    made.inference_allowed_mirroring_axes = axes
    fold_folder = Path(made.output_folder)
    made.save_checkpoint(str(fold_folder / CHECKPOINT))
    (fold_folder / "debug.json").write_text(json.dumps({"output_folder": made.output_folder}))
    (fold_folder.parent / "plans.json").write_text(json.dumps(PLANS))
    (fold_folder.parent / "dataset.json").write_text(json.dumps(DATASET_JSON))
    (fold_folder.parent / "dataset_fingerprint.json").write_text("{}")
    return fold_folder


@pytest.fixture
def results(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path / "results_of_this_machine"
    folder.mkdir()
    monkeypatch.setenv("nnUNet_results", str(folder))
    return folder


def write_image(path: Path) -> None:
    noise = np.random.default_rng(0).normal(100, 20, size=(18, 24, 22)).astype(np.float32)
    image = sitk.GetImageFromArray(noise)
    image.SetOrigin((3.0, -4.0, 5.0))
    path.parent.mkdir(parents=True, exist_ok=True)
    sitk.WriteImage(image, str(path))


def read(path: Path) -> np.ndarray:
    return sitk.GetArrayFromImage(sitk.ReadImage(str(path)))


def predict(model: Path, image: Path) -> np.ndarray:
    predictor = nnUNetPredictor(device=torch.device("cpu"), perform_everything_on_device=False, allow_tqdm=False)
    predictor.initialize_from_trained_model_folder(str(model), ("all",), CHECKPOINT)
    output = model / "predicted" / "case"
    output.parent.mkdir()
    predictor.predict_from_files_sequential([[str(image)]], [str(output)])
    return read(output.with_name("case.nii.gz"))


def test_zip_holds_what_prediction_needs_and_nothing_of_the_training(results: Path, tmp_path: Path) -> None:
    train()
    made = export(777, "3d_fullres", tmp_path / "model.zip")
    model = f"{DATASET}/nnUNetTrainer__nnUNetPlans__3d_fullres"
    assert made.models == (model,)
    assert made.trainer == "OneShotTrainer"
    with zipfile.ZipFile(made.zip) as archive:
        assert sorted(archive.namelist()) == [
            f"{model}/dataset.json",
            f"{model}/fold_all/{CHECKPOINT}",
            f"{model}/plans.json",
        ]
        archive.extractall(tmp_path / "out")
    everything = b"".join(p.read_bytes() for p in (tmp_path / "out").rglob("*") if p.is_file())
    for secret in (CASE, "results_of_this_machine", str(tmp_path), "OneShotTrainer", "oneshot_block", "case_weight"):
        assert secret.encode() not in everything
    assert json.loads((tmp_path / "out" / model / "dataset.json").read_text())["licence"] == "CC0"
    # The safe loader takes it, so nobody has to trust it.
    checkpoint = torch.load(tmp_path / "out" / model / "fold_all" / CHECKPOINT, weights_only=True)
    assert checkpoint["trainer_name"] == "nnUNetTrainer"
    assert checkpoint["inference_allowed_mirroring_axes"] == (0, 1)
    assert "optimizer_state" not in checkpoint


def test_an_export_says_that_a_model_was_trained_without_mirrored_images(results: Path, tmp_path: Path) -> None:
    train(axes=None)
    with zipfile.ZipFile(export(777, "3d_fullres", tmp_path / "model.zip").zip) as archive:
        archive.extractall(tmp_path / "out")
    [checkpoint] = (tmp_path / "out").rglob(CHECKPOINT)
    assert torch.load(checkpoint, weights_only=True)["inference_allowed_mirroring_axes"] is None


def test_same_prediction_as_the_model_that_was_trained(results: Path, tmp_path: Path) -> None:
    """The very model, stored under a trainer that a stock nnU-Net has, against its export."""
    fold = train()
    made = export(DATASET, "3d_fullres", tmp_path / "model.zip", trainer="OneShotTrainer", plans="nnUNetPlans")
    checkpoint = torch.load(fold / CHECKPOINT, weights_only=False)
    torch.save({**checkpoint, "trainer_name": "nnUNetTrainer"}, fold / CHECKPOINT)
    with zipfile.ZipFile(made.zip) as archive:
        archive.extractall(tmp_path / "out")
    image = tmp_path / "in" / "case_0000.nii.gz"
    write_image(image)
    before, after = predict(fold.parent, image), predict(tmp_path / "out" / made.models[0], image)
    assert len(np.unique(before)) > 1, "a constant label would prove nothing"
    np.testing.assert_array_equal(before, after)


def test_folds(results: Path, tmp_path: Path) -> None:
    for fold in ("0", "1"):
        train(fold)
    assert export(777, "3d_fullres", tmp_path / "numbered.zip").folds == ("0", "1")
    assert export(777, "3d_fullres", tmp_path / "one.zip", folds=[1]).folds == ("1",)
    train("all")
    made = export(777, "3d_fullres", tmp_path / "all.zip")
    assert made.folds == ("all",)
    assert made.commands[1].endswith(f"-d {DATASET} -c 3d_fullres -p nnUNetPlans -f all -i INPUT -o OUTPUT")
    with pytest.raises(OneShotError, match=rf"found no {CHECKPOINT} of 4"):
        export(777, "3d_fullres", tmp_path / "absent.zip", folds=[0, 4])


def test_same_bytes_twice(results: Path, tmp_path: Path) -> None:
    train()
    first, second = (export(777, "3d_fullres", tmp_path / name).zip for name in ("a.zip", "b.zip"))
    assert first.read_bytes() == second.read_bytes()


def test_bad_input_writes_nothing(results: Path, tmp_path: Path) -> None:
    target = tmp_path / "model.zip"
    with pytest.raises(OneShotError, match="train first"):
        export(777, "3d_fullres", target)
    (results / DATASET).mkdir()
    with pytest.raises(OneShotError, match="no model at all; train first"):
        export(777, "3d_fullres", target)
    train()
    with pytest.raises(OneShotError, match="OneShotTrainer__nnUNetPlans__3d_fullres; train first"):
        export(777, "2d", target)
    with pytest.raises(OneShotError, match=r"ends in \.zip"):
        export(777, "3d_fullres", tmp_path / "model")
    train(trainer=nnUNetTrainer)
    with pytest.raises(OneShotError, match="choose by -tr and -p"):
        export(777, "3d_fullres", target)
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").touch()
    with pytest.raises(OneShotError, match="empty folder for the container"):
        export(777, "3d_fullres", target, trainer="OneShotTrainer", container=tmp_path / "full")
    assert not target.exists()
    target.write_text("mine")
    with pytest.raises(OneShotError, match="exists already"):
        export(777, "3d_fullres", target, trainer="OneShotTrainer")
    assert target.read_text() == "mine"


def test_a_network_of_its_own_and_paths_in_plans_are_refused(results: Path, tmp_path: Path) -> None:
    fold = train(trainer=OtherNetwork)
    with pytest.raises(OneShotError, match="does OtherNetwork build a network of its own"):
        export(777, "3d_fullres", tmp_path / "model.zip")
    (fold.parent / "plans.json").write_text(json.dumps({**PLANS, "note": "/home/somebody/data"}))
    with pytest.raises(OneShotError, match=r"no file paths in plans\.json: note"):
        export(777, "3d_fullres", tmp_path / "model.zip")
    assert not (tmp_path / "model.zip").exists()


def test_container_files(results: Path, tmp_path: Path) -> None:
    train()
    made = export(777, "3d_fullres", tmp_path / "model.zip", container=tmp_path / "box")
    assert made.container == tmp_path / "box"
    texts = {p.name: p.read_text() for p in (tmp_path / "box").iterdir() if p.is_file()}
    assert set(texts) == {"Dockerfile", "run.sh", "README.md", "predict.py", "selftest.py"}
    assert "liver, kidney" in texts["README.md"]
    assert "+cpu" not in texts["Dockerfile"]
    assert "dataset777-secret-oneshot" in texts["run.sh"]
    assert "nnunet_oneshot" not in texts["predict.py"] + texts["selftest.py"] + texts["Dockerfile"]
    shell = shutil.which("sh")
    if shell:
        subprocess.run([shell, "-n", str(tmp_path / "box" / "run.sh")], check=True)
        refused = subprocess.run(
            [shell, str(tmp_path / "box" / "run.sh"), "only_one"], capture_output=True, encoding="utf-8"
        )
        assert refused.returncode == 2
        assert "INPUT OUTPUT" in refused.stderr


def test_container_finds_cases_by_channel_or_by_file(tmp_path: Path) -> None:
    for name in ("a_0000.nii.gz", "a_0001.nii.gz", "b_0000.nii.gz", "b_0001.nii.gz", "note.txt"):
        (tmp_path / name).touch()
    assert {c: len(f) for c, f in find_cases(tmp_path, ".nii.gz").items()} == {"a": 2, "b": 2}
    (tmp_path / "scan_2024.nii.gz").touch()
    assert set(find_cases(tmp_path, ".nii.gz")) == {"a_0000", "a_0001", "b_0000", "b_0001", "scan_2024"}


def without_this_package(code: str, *arguments: str, results: Path) -> subprocess.CompletedProcess[str]:
    """Run code where nothing of ours can be imported: no .pth files, no trainers, modules blocked."""
    site = Path(torch.__file__).resolve().parents[1]
    prelude = f"import sys; sys.path.append({str(site)!r}); " + "".join(
        f"sys.modules[{name!r}] = None; " for name in ("nnunet_oneshot", "sam2_propagation")
    )
    environment = {k: v for k, v in os.environ.items() if k not in ("nnUNet_extTrainer", "PYTHONPATH")}
    return subprocess.run(
        [sys.executable, "-I", "-S", "-c", prelude + code, *arguments],
        env={**environment, "nnUNet_results": str(results), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        encoding="utf-8",
    )


@pytest.mark.slow
def test_stock_nnunet_installs_and_predicts_without_this_package(results: Path, tmp_path: Path) -> None:
    train()
    made = export(777, "3d_fullres", tmp_path / "model.zip")
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    install = "from nnunetv2.model_sharing.entry_points import install_from_zip_entry_point as f; f()"
    done = without_this_package(install, str(made.zip), results=elsewhere)
    assert done.returncode == 0, done.stderr
    write_image(tmp_path / "in" / "case_0000.nii.gz")
    flags = made.commands[1].replace("INPUT", str(tmp_path / "in")).replace("OUTPUT", str(tmp_path / "out")).split()[1:]
    run = "from nnunetv2.inference.predict_from_raw_data import predict_entry_point as f; f()"
    done = without_this_package(run, *flags, "-device", "cpu", "-npp", "0", "-nps", "0", results=elsewhere)
    assert done.returncode == 0, done.stderr
    assert read(tmp_path / "out" / "case.nii.gz").shape == (18, 24, 22)


@pytest.mark.slow
def test_container_selftest_and_entry_run_without_docker(results: Path, tmp_path: Path) -> None:
    train()
    export(777, "3d_fullres", tmp_path / "model.zip", container=tmp_path / "box")
    done = subprocess.run(
        [sys.executable, str(tmp_path / "box" / "selftest.py")], capture_output=True, encoding="utf-8"
    )
    assert "selftest passed" in done.stdout, done.stderr
    write_image(tmp_path / "in" / "any name.nii.gz")
    entry = [sys.executable, str(tmp_path / "box" / "predict.py")]
    done = subprocess.run([*entry, str(tmp_path / "in"), str(tmp_path / "out")], capture_output=True, encoding="utf-8")
    assert done.returncode == 0, done.stderr
    assert [p.name for p in (tmp_path / "out").iterdir()] == ["any name.nii.gz"]
    done = subprocess.run(
        [*entry, str(tmp_path / "nowhere"), str(tmp_path / "out")], capture_output=True, encoding="utf-8"
    )
    assert done.returncode == 2
    assert "expected images" in done.stderr


@pytest.mark.slow
def test_what_is_one_piece_travels_with_the_model(results: Path, tmp_path: Path) -> None:
    fold = train()
    write_image(tmp_path / "in" / "case_0000.nii.gz")

    def answered(name: str) -> np.ndarray:
        made = export(777, "3d_fullres", tmp_path / f"{name}.zip", container=tmp_path / name)
        assert len(made.commands) == (3 if name == "after" else 2)
        with zipfile.ZipFile(made.zip) as archive:
            assert any(entry.endswith(POSTPROCESSING) for entry in archive.namelist()) == (name == "after")
        folders = [str(tmp_path / folder) for folder in ("in", f"{name}_out")]
        subprocess.run([sys.executable, str(tmp_path / name / "predict.py"), *folders], check=True, capture_output=True)
        return read(tmp_path / f"{name}_out" / "case.nii.gz")

    before = answered("before")
    pieces = {int(v): ndimage.label(before == v, np.ones((3, 3, 3)))[1] for v in np.unique(before) if v}
    most = max(pieces, key=lambda value: pieces[value])
    assert pieces[most] > 1, "one piece would prove nothing"
    steps = ([remove_all_but_largest_component_from_segmentation], [{"labels_or_regions": most}])
    (fold.parent / POSTPROCESSING).write_bytes(pickle.dumps(steps))
    after = answered("after")
    assert ndimage.label(after == most, np.ones((3, 3, 3)))[1] == 1
    np.testing.assert_array_equal(after[before != most], before[before != most])


def test_the_command_ends_with_the_model_and_what_to_type(results: Path, tmp_path: Path, call: Callable) -> None:
    train()
    answer = call(cli.export, "-d", 777, "-c", "3d_fullres", "-o", tmp_path / "a.zip", "--container", tmp_path / "box")
    assert answer.code == 0
    assert f"{DATASET}/nnUNetTrainer__nnUNetPlans__3d_fullres  all    OneShotTrainer" in answer.out
    assert f"container: {tmp_path / 'box'}" in answer.out
    assert answer.out.splitlines()[-2].startswith("nnUNetv2_install_pretrained_model_from_zip ")
    assert answer.out.splitlines()[-1].startswith(f"nnUNetv2_predict -d {DATASET} ")
    figures = json.loads(call(cli.export, "-d", 777, "-c", "3d_fullres", "-o", tmp_path / "b.zip", "-json").out)
    assert figures["commands"][1] == answer.out.splitlines()[-1]


def test_the_folds_of_the_refinement_are_packed(results: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A fold that somebody trained beside them is no part of its model; one that is not finished is said."""
    monkeypatch.setenv("nnUNet_raw", str(tmp_path / "raw"))
    train("all")
    train("0")
    plan = asdict(Plan("3d_fullres", "OneShotTrainer", "nnUNetPlans", "default", num_folds=2))
    record = tmp_path / "raw" / DATASET / ".oneshot" / "refine.json"
    record.parent.mkdir(parents=True)
    record.write_text(json.dumps({"plan": plan, "done": {}}))
    with pytest.raises(OneShotError, match=f"found no {CHECKPOINT} of 1; train them first"):
        export(777, "3d_fullres", tmp_path / "model.zip")
    train("1")
    assert export(777, "3d_fullres", tmp_path / "model.zip").folds == ("0", "1")
    assert export(777, "3d_fullres", tmp_path / "all.zip", folds=["all"]).folds == ("all",)


def test_the_model_of_the_refinement_is_taken_among_several(
    results: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("nnUNet_raw", str(tmp_path / "raw"))
    train()
    train(trainer=nnUNetTrainer)
    with pytest.raises(OneShotError, match="choose by -tr and -p"):
        export(777, "3d_fullres", tmp_path / "model.zip")
    record = tmp_path / "raw" / DATASET / ".oneshot" / "refine.json"
    record.parent.mkdir(parents=True)
    plan = asdict(Plan("3d_fullres", "OneShotTrainer", "nnUNetPlans", "default"))
    record.write_text(json.dumps({"plan": plan, "done": {}}))
    assert export(777, "3d_fullres", tmp_path / "model.zip").trainer == "OneShotTrainer"
    assert export(777, "3d_fullres", tmp_path / "other.zip", trainer="nnUNetTrainer").trainer == "nnUNetTrainer"
