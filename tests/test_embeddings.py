"""Every slice is encoded once, and keeping it changes nothing."""

from __future__ import annotations

import gc
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from sam2_tiny import tiny_model
from torch import Tensor

from sam2_propagation.embeddings import Encoder, SplicedFrames
from sam2_propagation.errors import PropagationError


class _Noise:
    def __init__(self, count: int, seed: int = 0) -> None:
        self.data = torch.randn(count, 3, 64, 64, generator=torch.Generator().manual_seed(seed))

    def __len__(self) -> int:
        return len(self.data)

    def batch(self, indices: Sequence[int]) -> Tensor:
        return self.data[list(indices)]


@pytest.fixture(scope="module")
def model() -> Any:
    return tiny_model()


def test_each_slice_is_encoded_once(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[int] = []
    forward = model.forward_image
    monkeypatch.setattr(model, "forward_image", lambda batch: seen.append(len(batch)) or forward(batch))
    stack = Encoder(model, batch_size=4).encode(_Noise(10))
    for _ in range(3):
        stack.features([0, 5, 9])
    assert seen == [4, 4, 2]
    assert len(stack) == 10


def test_features_are_those_of_the_model(model: Any) -> None:
    slices = _Noise(5)
    stack = Encoder(model, batch_size=2).encode(slices)
    with torch.inference_mode():
        _, maps, positions, sizes = model._prepare_backbone_features(model.forward_image(slices.batch([3, 1])))
    features = stack.features([3, 1])
    assert features.sizes == sizes
    assert features.count == 2
    for found, expected in zip([*features.maps, *features.positions], [*maps, *positions], strict=True):
        torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)


def test_beyond_the_budget_a_file_holds_the_same(model: Any, tmp_path: Path) -> None:
    slices = _Noise(6)
    in_ram = Encoder(model, folder=tmp_path).encode(slices)
    assert list(tmp_path.iterdir()) == []
    on_disk = Encoder(model, budget=0, folder=tmp_path).encode(slices)
    assert len(list(tmp_path.iterdir())) == 1
    for a, b in zip(in_ram.features([5, 0]).maps, on_disk.features([5, 0]).maps, strict=True):
        assert torch.equal(a, b)
    assert torch.equal(in_ram.descriptors(), on_disk.descriptors())
    del on_disk, b
    gc.collect()
    assert list(tmp_path.iterdir()) == []


def test_the_budget_is_shared_and_given_back(model: Any, tmp_path: Path) -> None:
    size = Encoder(model).encode(_Noise(2)).nbytes
    encoder = Encoder(model, budget=size, folder=tmp_path)
    first = encoder.encode(_Noise(2))
    second = encoder.encode(_Noise(2))
    assert len(list(tmp_path.iterdir())) == 1
    del first, second
    gc.collect()
    third = encoder.encode(_Noise(2))
    assert list(tmp_path.iterdir()) == []
    assert len(third) == 2


def test_a_disk_without_room_is_said_before_it_is_written(
    model: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("shutil.disk_usage", lambda _: SimpleNamespace(free=1000))
    with pytest.raises(PropagationError, match="TMPDIR"):
        Encoder(model, budget=0, folder=tmp_path).encode(_Noise(2))
    assert list(tmp_path.iterdir()) == []


def test_spliced_frames_are_the_frames_they_name(model: Any) -> None:
    encoder = Encoder(model)
    first, second = encoder.encode(_Noise(2, seed=1)), encoder.encode(_Noise(3, seed=2))
    spliced = SplicedFrames([first, second], [(0, 0), (1, 2), (1, 0), (0, 1)])
    both = spliced.features([1, 3]).maps
    for level, a, b in zip(both, second.features([2]).maps, first.features([1]).maps, strict=True):
        assert torch.equal(level, torch.cat([a, b], dim=1))


def test_descriptors_tell_slices_apart(model: Any) -> None:
    found = Encoder(model).encode(_Noise(4)).descriptors()
    assert found.shape == (4, 32 * 16)
    assert torch.cdist(found, found).fill_diagonal_(1).min() > 1e-4
