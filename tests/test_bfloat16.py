"""bfloat16 on the CPU: where it is chosen, and that everything but the network's inside stays float32."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import torch
from dynamic_network_architectures.architectures.unet import PlainConvUNet
from nnunetv2.inference.predict_from_raw_data import nnUNetPredictor
from nnunetv2.run.run_training import get_trainer_from_args
from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer
from tiny_dataset import preprocess_in_process, write_dataset
from torch import nn

from nnunet_oneshot import nnunet_jobs
from nnunet_oneshot.bfloat16 import VARIABLE, compute_in_bfloat16, pays
from nnunet_oneshot.info import info
from nnunet_oneshot.settings import SMALL_PLANS

CPU = torch.device("cpu")


def unet(deep_supervision: bool = False) -> PlainConvUNet:
    return PlainConvUNet(
        1,
        3,
        (4, 8, 8),
        nn.Conv2d,
        3,
        (1, 2, 2),
        1,
        3,
        1,
        conv_bias=True,
        norm_op=nn.InstanceNorm2d,
        nonlin=nn.LeakyReLU,
        deep_supervision=deep_supervision,
    )


@contextmanager
def convolved(network: nn.Module) -> Iterator[set[torch.dtype]]:
    """The dtypes that a network's convolutions give meanwhile."""
    found: set[torch.dtype] = set()
    layers = [layer for layer in network.modules() if isinstance(layer, (nn.Conv2d, nn.Conv3d))]
    hooks = [layer.register_forward_hook(lambda _, __, result: found.add(result.dtype)) for layer in layers]
    yield found
    for hook in hooks:
        hook.remove()


@pytest.mark.parametrize(
    ("capabilities", "expected"), [({"amx_bf16": True}, True), ({"amx_bf16": False}, False), ({}, False)]
)
def test_a_processor_with_units_for_it_uses_it(
    monkeypatch: pytest.MonkeyPatch, capabilities: Mapping[str, bool], expected: bool
) -> None:
    monkeypatch.delenv(VARIABLE)
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: capabilities, raising=False)
    assert pays(CPU) is expected
    assert not pays(torch.device("cuda"))
    assert info()["bfloat16 on the CPU"] is expected
    monkeypatch.setenv(VARIABLE, "0" if expected else "1")
    assert pays(CPU) is not expected


def test_a_pytorch_that_does_not_tell_means_float32(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(VARIABLE)
    monkeypatch.delattr(torch.cpu, "get_capabilities", raising=False)
    assert not pays(CPU)


@pytest.mark.parametrize("deep_supervision", [False, True])
def test_what_comes_out_is_float32_and_nearly_the_same(deep_supervision: bool) -> None:
    network, data = unet(deep_supervision), torch.randn(2, 1, 32, 32)
    names, expected = list(network.state_dict()), network(data)
    compute_in_bfloat16(network)
    with convolved(network) as dtypes:
        found = network(data)
    assert dtypes == {torch.bfloat16}
    assert list(network.state_dict()) == names
    for level, as_before in zip(found, expected, strict=True) if deep_supervision else [(found, expected)]:
        assert level.dtype == torch.float32
        assert 0 < float((level - as_before).detach().abs().max()) < 0.05 * float(as_before.detach().abs().max())


def test_a_copy_has_its_own_weights_and_computes_alike() -> None:
    """A mean teacher is such a copy."""
    network, data = unet(), torch.randn(1, 1, 32, 32)
    compute_in_bfloat16(network)
    copied, expected = copy.deepcopy(network), network(data)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.zero_()
    with convolved(copied) as dtypes:
        assert torch.equal(copied(data), expected)
    assert dtypes == {torch.bfloat16}


def test_a_compiled_network_computes_in_it() -> None:
    """nnU-Net's predictor compiles where the user asks for it."""
    network = unet()
    compiled = torch.compile(network, backend="eager")
    compute_in_bfloat16(compiled)
    with convolved(network) as dtypes:
        assert compiled(torch.randn(1, 1, 32, 32)).dtype == torch.float32
    assert dtypes == {torch.bfloat16}


@pytest.mark.filterwarnings("ignore:Detected call of `lr_scheduler.step:UserWarning")
@pytest.mark.filterwarnings("ignore:`torch.jit:FutureWarning")
@pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")
def test_shortened_trainers_learn_in_it_and_nnunets_length_does_not(
    training_roots: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_dataset(training_roots / "nnUNet_raw", "Dataset901_Tiny")
    monkeypatch.setenv("nnUNet_n_proc_DA", "1")
    preprocess_in_process("Dataset901_Tiny", ["2d"])
    monkeypatch.setenv("nnUNet_n_proc_DA", "0")
    monkeypatch.setenv(VARIABLE, "1")
    for name, expected in (
        ("OneShotTrainer_tiny", torch.bfloat16),
        ("nnUNetTrainer_small", torch.bfloat16),
        ("OneShotTrainer", torch.float32),
    ):
        trainer = get_trainer_from_args("901", "2d", "all", name, SMALL_PLANS, device=CPU)
        trainer.initialize()
        trainer.on_train_start()
        trainer.on_epoch_start()
        trainer.on_train_epoch_start()
        before = {key: value.clone() for key, value in trainer.network.state_dict().items()}
        with convolved(trainer.network) as dtypes:
            loss = trainer.train_step(next(trainer.dataloader_train))["loss"]
        after = trainer.network.state_dict()
        assert dtypes == {expected}, name
        assert np.isfinite(loss)
        assert all(value.dtype == torch.float32 for value in after.values())
        assert any(not torch.equal(value, before[key]) for key, value in after.items())
        assert (VARIABLE in Path(trainer.log_file).read_text()) is (expected == torch.bfloat16)


def test_predictions_of_our_commands_use_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    network = unet()
    monkeypatch.setattr(nnunet_jobs, "check_trainer", lambda *_: None)
    monkeypatch.setattr(
        nnUNetPredictor, "initialize_from_trained_model_folder", lambda self, *_: setattr(self, "network", network)
    )
    options = {"checkpoint": "checkpoint_final.pth", "trainer": nnUNetTrainer.__name__, "mirroring": False, "batch": 1}
    for asked, expected in (("0", torch.float32), ("1", torch.bfloat16)):
        monkeypatch.setenv(VARIABLE, asked)
        nnunet_jobs.predict("model", ["all"], {}, str(tmp_path / asked), "cpu", **options)
        with convolved(network) as dtypes:
            network(torch.zeros(1, 1, 32, 32))
        assert dtypes == {expected}
