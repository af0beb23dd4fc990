"""Checkpoints: every official format is read, and nothing else."""

from __future__ import annotations

import hashlib
import io
import pickle
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import save_file
from sam2_tiny import tiny_config, tiny_model

from sam2_propagation import checkpoints
from sam2_propagation.architecture import build_sam2, known_configurations
from sam2_propagation.checkpoint_catalog import PUBLISHED
from sam2_propagation.checkpoints import cache_folder, load_checkpoint
from sam2_propagation.download import download, file_sum
from sam2_propagation.errors import PropagationError


@pytest.fixture(scope="module")
def weights() -> dict[str, torch.Tensor]:
    return tiny_model(seed=3).state_dict()


def _same(model: torch.nn.Module, weights: dict[str, torch.Tensor]) -> bool:
    return all(torch.equal(value, weights[key]) for key, value in model.state_dict().items())


@pytest.mark.parametrize("wrap", [lambda w: {"model": w}, lambda w: {"state_dict": w, "epoch": 3}, lambda w: w])
def test_reads_every_layout_of_torch_files(tmp_path: Path, weights: dict[str, torch.Tensor], wrap: Any) -> None:
    path = tmp_path / "own.pt"
    torch.save(wrap(weights), path)
    loaded = load_checkpoint(path, tiny_config())
    assert _same(loaded.model, weights)
    assert (loaded.sha256, loaded.image_size, loaded.model.training) == (file_sum(path), 64, False)


def test_reads_half_precision_safetensors_with_the_yaml_beside(
    tmp_path: Path, weights: dict[str, torch.Tensor]
) -> None:
    save_file({key: value.half().contiguous() for key, value in weights.items()}, tmp_path / "own.safetensors")
    (tmp_path / "own.yaml").write_text(yaml.safe_dump(tiny_config()))
    model = load_checkpoint(tmp_path / "own.safetensors").model
    assert next(model.parameters()).dtype == torch.float32
    assert _same(model, {key: value.half().float() for key, value in weights.items()})


class _Code:
    def __reduce__(self) -> tuple[Any, tuple[str]]:
        return Path.touch, (Path("was_run"),)  # type: ignore[return-value]


def test_refuses_a_pickle_with_code_and_does_not_run_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    torch.save({"model": _Code()}, tmp_path / "evil.pt")
    (tmp_path / "evil_legacy.pt").write_bytes(pickle.dumps({"model": _Code()}, protocol=2))
    for name in ("evil.pt", "evil_legacy.pt"):
        with pytest.raises(PropagationError, match="refused"):
            load_checkpoint(tmp_path / name, tiny_config())
    assert not (tmp_path / "was_run").exists()


@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
def test_a_truncated_file_is_called_so(tmp_path: Path, weights: dict[str, torch.Tensor], suffix: str) -> None:
    path = tmp_path / f"cut{suffix}"
    if suffix == ".pt":
        torch.save({"model": weights}, path)
    else:
        save_file({key: value.contiguous() for key, value in weights.items()}, path)
    path.write_bytes(path.read_bytes()[:-5000])
    with pytest.raises(PropagationError, match="expected a whole"):
        load_checkpoint(path, tiny_config())


def test_a_file_without_tensors_is_no_checkpoint(tmp_path: Path) -> None:
    torch.save({"model": {"epoch": 3}}, tmp_path / "empty.pt")
    with pytest.raises(PropagationError, match="tensors by name"):
        load_checkpoint(tmp_path / "empty.pt", tiny_config())


def test_an_unknown_name_lists_the_known_ones() -> None:
    with pytest.raises(PropagationError, match=r"builtin, sam2\.1_hiera_tiny.*found 'sam9'"):
        load_checkpoint("sam9")


@pytest.mark.slow
def test_a_mismatch_names_the_configurations_that_fit(tmp_path: Path) -> None:
    path = tmp_path / "unnamed.pt"
    torch.save({"model": build_sam2(known_configurations()["sam2.1_hiera_tiny"]).state_dict()}, path)
    # SAM2.1 tiny and MedSAM2 hold tensors of the same shapes: both are named, none is guessed.
    for config in (None, tiny_config(), "sam2_hiera_tiny"):
        with pytest.raises(PropagationError, match=r"-sam2_cfg sam2\.1_hiera_tiny or medsam2$"):
            load_checkpoint(path, config)


def test_the_file_name_settles_what_shapes_cannot(tmp_path: Path) -> None:
    path = tmp_path / "MedSAM2_US_Heart.pt"
    torch.save({"model": build_sam2(known_configurations()["medsam2"]).state_dict()}, path)
    loaded = load_checkpoint(path)
    assert loaded.image_size == 512
    assert loaded.model.binarize_mask_from_pts_for_mem_enc


QUICK = ("sam2.1_hiera_tiny",)


@pytest.mark.parametrize(
    "name", [*QUICK, *(pytest.param(name, marks=pytest.mark.slow) for name in PUBLISHED if name not in QUICK)]
)
def test_random_weights_in_each_official_format_are_read(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    published = PUBLISHED[name]
    own = build_sam2(known_configurations()[published.configuration])
    path = tmp_path / published.file_name
    torch.save({"model": own.state_dict()}, path)
    monkeypatch.setitem(PUBLISHED, name, replace(published, sha256=file_sum(path)))
    # By its name in the cache folder, and as a local file that only its hash tells.
    loaded = load_checkpoint(name, cache=tmp_path)
    assert _same(loaded.model, own.state_dict())
    assert loaded.image_size == (512 if name.startswith("medsam2") else 1024)
    renamed = path.rename(tmp_path / "renamed.pt")
    assert load_checkpoint(renamed).image_size == loaded.image_size


def test_a_known_file_contradicted_by_name_is_refused_and_changed_by_yaml(
    tmp_path: Path, weights: dict[str, torch.Tensor]
) -> None:
    path = tmp_path / "MedSAM2_latest.pt"
    torch.save({"model": weights}, path)
    with pytest.raises(PropagationError, match=r"expected -sam2_cfg medsam2.*found sam2_hiera_tiny"):
        load_checkpoint(path, "sam2_hiera_tiny")
    assert load_checkpoint(path, tiny_config()).image_size == 64


def test_a_known_hash_settles_the_configuration_under_any_name(
    tmp_path: Path, weights: dict[str, torch.Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "renamed.pt"
    torch.save({"model": weights}, path)
    entry = replace(PUBLISHED["sam2_hiera_tiny"], sha256=file_sum(path))
    monkeypatch.setitem(PUBLISHED, "sam2_hiera_tiny", entry)
    monkeypatch.setattr(checkpoints, "known_configurations", lambda: {"sam2_hiera_tiny": tiny_config()})
    assert _same(load_checkpoint(path).model, weights)


def test_random_weights_are_the_same_every_time_at_the_size_asked_for() -> None:
    state = torch.random.get_rng_state()
    first, second = (load_checkpoint("random:sam2.1_hiera_tiny@128") for _ in range(2))
    assert first.image_size == 128
    assert first.sha256 is None
    assert _same(first.model, second.model.state_dict())
    assert torch.equal(torch.random.get_rng_state(), state)


@pytest.mark.parametrize("name", ["random:nothing", "random:sam2.1_hiera_tiny@x", "random:sam2.1_hiera_tiny@100"])
def test_bad_random_names(name: str) -> None:
    with pytest.raises(PropagationError, match="expected"):
        load_checkpoint(name)


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
def test_no_gpu_is_said() -> None:
    with pytest.raises(PropagationError, match="-device cpu"):
        load_checkpoint("random:sam2.1_hiera_tiny@128", device="cuda")


def _publish(monkeypatch: pytest.MonkeyPatch, source: Path, sha256: str | None) -> None:
    entry = replace(PUBLISHED["sam2_hiera_tiny"], url=source.as_uri(), sha256=sha256)
    monkeypatch.setitem(PUBLISHED, "sam2_hiera_tiny", entry)
    monkeypatch.setattr(checkpoints, "known_configurations", lambda: {"sam2_hiera_tiny": tiny_config()})


def test_a_published_checkpoint_is_downloaded_once(
    tmp_path: Path, weights: dict[str, torch.Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    source = tmp_path / "there.pt"
    torch.save({"model": weights}, source)
    _publish(monkeypatch, source, file_sum(source))
    assert _same(load_checkpoint("sam2_hiera_tiny", cache=tmp_path / "cache").model, weights)
    source.unlink()
    assert _same(load_checkpoint("sam2_hiera_tiny", cache=tmp_path / "cache").model, weights)
    assert [p.name for p in (tmp_path / "cache").glob("[!.]*")] == ["sam2_hiera_tiny.pt"]


def test_a_wrong_hash_leaves_nothing_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = tmp_path / "there.pt"
    source.write_bytes(b"not what it should be")
    _publish(monkeypatch, source, "0" * 64)
    with pytest.raises(PropagationError, match="expected sha256 0000"):
        load_checkpoint("sam2_hiera_tiny", cache=tmp_path / "cache")
    assert list((tmp_path / "cache").glob("[!.]*")) == []


def test_offline_names_address_file_and_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = tmp_path / "absent.pt"
    _publish(monkeypatch, source, None)
    with pytest.raises(PropagationError) as caught:
        load_checkpoint("sam2_hiera_tiny", cache=tmp_path / "cache")
    for part in (source.as_uri(), "sam2_hiera_tiny.pt", str(tmp_path / "cache")):
        assert part in str(caught.value)


def test_the_cache_folder_can_be_set(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("nnUNet_oneshot_checkpoints", str(tmp_path))
    assert cache_folder() == tmp_path
    monkeypatch.delenv("nnUNet_oneshot_checkpoints")
    monkeypatch.setenv("XDG_CACHE_HOME", "/somewhere")
    assert cache_folder() == Path("/somewhere/nnunet-oneshot/checkpoints")


@pytest.fixture
def server() -> Iterator[tuple[str, bytes, list[int]]]:
    """A server that knows ranges: its address, the file it holds, and the offsets it was asked for."""
    content, asked = bytes(range(256)) * 64, []

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            start = int(self.headers.get("Range", "bytes=0-").removeprefix("bytes=").rstrip("-"))
            asked.append(start)
            code = 200 if start == 0 else 206 if start < len(content) else 416
            self.send_response(code)
            self.send_header("Content-Length", str(max(0, len(content) - start)))
            self.end_headers()
            self.wfile.write(content[start:])

        def log_message(self, *_: Any) -> None:
            pass

    with HTTPServer(("127.0.0.1", 0), Handler) as running:
        thread = threading.Thread(target=running.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{running.server_port}/file", content, asked
        running.shutdown()
        thread.join()


def test_an_interrupted_download_is_continued(tmp_path: Path, server: tuple[str, bytes, list[int]]) -> None:
    url, content, asked = server
    (tmp_path / "file.part").write_bytes(content[:1000])
    download(url, tmp_path / "file", hashlib.sha256(content).hexdigest())
    assert (tmp_path / "file").read_bytes() == content
    assert asked == [1000]


def test_downloads_at_once_fetch_once(tmp_path: Path, server: tuple[str, bytes, list[int]]) -> None:
    """As shards do that are started together."""
    url, content, asked = server
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(lambda _: download(url, tmp_path / "file", hashlib.sha256(content).hexdigest()), range(4)))
    assert (tmp_path / "file").read_bytes() == content
    assert asked == [0]


def test_a_partial_file_that_is_too_long_is_begun_again(tmp_path: Path, server: tuple[str, bytes, list[int]]) -> None:
    url, content, asked = server
    (tmp_path / "file.part").write_bytes(content + b"more")
    download(url, tmp_path / "file")
    assert (tmp_path / "file").read_bytes() == content
    assert asked[-1] == 0


def test_a_connection_that_breaks_can_be_resumed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Broken(io.BytesIO):
        headers = {"Content-Length": "100"}  # noqa: RUF012

    monkeypatch.setattr("urllib.request.urlopen", lambda *_, **__: Broken(b"x" * 40))
    with pytest.raises(PropagationError, match="40 of 100 bytes"):
        download("http://example.org/file", tmp_path / "file")
    assert (tmp_path / "file.part").stat().st_size == 40
    assert not (tmp_path / "file").exists()
