"""`propagate -propagator sam2` from the command line: what users get wrong, work shared by processes, shards."""

from __future__ import annotations

import multiprocessing
import os
import pickle
import shutil
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from conftest import Answer
from counted_sam2 import COUNT, CountedSam2, counting, passes
from raw_datasets import LABELS, SHAPE, Roots, edit_json, image_array, make_sparse, read, write_image, write_raw
from safetensors.torch import load_file, save_file
from sam2_tiny import tiny_config, tiny_model
from tqdm import tqdm

from nnunet_oneshot import cli, propagators
from nnunet_oneshot import propagate as module
from nnunet_oneshot.propagate import propagate
from nnunet_oneshot.propagators import PropagatorOptions
from nnunet_oneshot.store import read_manifest
from sam2_propagation import checkpoints
from sam2_propagation.architecture import build_sam2, known_configurations
from sam2_propagation.checkpoint_catalog import PUBLISHED
from sam2_propagation.sam2 import Sam2Propagator

pytestmark = pytest.mark.slow

Call = Callable[..., Answer]
SAM2 = ("-d", 501, "-o", 601, "-np", 1, "-propagator", "sam2")
CPU = (*SAM2, "-device", "cpu")


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model with random weights, its configuration beside it."""
    folder = tmp_path_factory.mktemp("checkpoint")
    torch.save({"model": tiny_model(seed=1).state_dict()}, folder / "tiny.pt")
    (folder / "tiny.yaml").write_text(yaml.safe_dump(tiny_config()))
    return folder / "tiny.pt"


def refused(answer: Answer, *words: object) -> None:
    assert answer.code == 2, answer
    assert answer.out == ""
    assert "Traceback" not in answer.err
    assert "expected" in answer.error
    assert "found" in answer.error
    assert ";" in answer.error, "no word of what to do"
    for word in words:
        assert str(word) in answer.error


def _cut(whole: Path, path: Path) -> Path:
    path.write_bytes(whole.read_bytes()[:-3000])
    return path


class _Code:
    def __reduce__(self) -> tuple[Any, tuple[str, int]]:
        return os.mkdir, ("was_run", 0o777)


def _weights(name: str, checkpoint: Path, folder: Path) -> tuple[tuple[object, ...], tuple[str, ...]]:
    """Arguments with a mistake in the weights, and words of the answer."""
    file = folder / "own.pt"
    file.with_suffix(".yaml").write_text(yaml.safe_dump(tiny_config()))
    match name:
        case "unknown name":
            return ("sam9",), ("sam9", "medsam2_latest", "builtin")
        case "corrupt":
            file.write_bytes(b"PK" + bytes(500))
        case "not a checkpoint":
            file.write_text("hello")
        case "truncated":
            return (_cut(checkpoint, file),), ("truncated", file.name)
        case "pickle with code":
            torch.save({"model": _Code()}, file)
            return (file,), ("refused",)
        case "legacy pickle with code":
            file.write_bytes(pickle.dumps({"model": _Code()}, protocol=2))
            return (file,), ("refused",)
        case "other configuration":
            torch.save({"model": build_sam2(known_configurations()["sam2_hiera_tiny"]).state_dict()}, file)
            return (file, "-sam2_cfg", "sam2.1_hiera_tiny"), ("-sam2_cfg sam2_hiera_tiny",)
        case "known name, other configuration":
            file = folder / "MedSAM2_latest.pt"
            torch.save({"model": tiny_model().state_dict()}, file)
            return (file, "-sam2_cfg", "sam2.1_hiera_tiny"), ("-sam2_cfg medsam2", "leave -sam2_cfg out")
        case "no such configuration":
            return (checkpoint, "-sam2_cfg", "nowhere.yaml"), ("nowhere.yaml", "medsam2")
        case "builtin, other configuration":
            return ("builtin", "-sam2_cfg", "medsam2"), ("leave -sam2_cfg out",)
    return (file,), (file.name,)


@pytest.mark.parametrize(
    "name",
    [
        "unknown name",
        "corrupt",
        "not a checkpoint",
        "truncated",
        "pickle with code",
        "legacy pickle with code",
        "other configuration",
        "known name, other configuration",
        "no such configuration",
        "builtin, other configuration",
    ],
)
def test_bad_weights_are_refused_before_anything_is_written(
    toy: Path, roots: Roots, call: Call, checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    monkeypatch.chdir(tmp_path)
    given, words = _weights(name, checkpoint, tmp_path)
    before = roots.snapshot()
    refused(call(cli.propagate, *CPU, "-sam2_chk", *given), *words)
    assert roots.snapshot() == before
    assert not (tmp_path / "was_run").exists()


def _damage(folder: Path, how: str) -> None:
    """Damage a copy of the built-in checkpoint's folder."""
    weights, configuration = folder / "builtin.safetensors", folder / "builtin.yaml"
    match how:
        case "no weights":
            weights.unlink()
        case "cut weights":
            _cut(weights, weights)
        case "weights of other shapes":
            save_file(tiny_model().state_dict(), weights)
        case "other weights of these shapes":
            save_file({name: tensor + 1 for name, tensor in load_file(weights).items()}, weights)
        case "no sum":
            (folder / "builtin.sha256").unlink()
        case "empty sum":
            (folder / "builtin.sha256").write_text("")
        case "no configuration":
            configuration.unlink()
        case "no YAML":
            configuration.write_bytes(b"model: {\xff\xfe")
        case "cut configuration":
            configuration.write_text(configuration.read_text().partition("memory_encoder:")[0])
        case "another configuration":
            configuration.write_text(yaml.safe_dump(tiny_config()))


@pytest.mark.parametrize(
    ("how", "words"),
    [
        ("no weights", "no builtin.safetensors"),
        ("cut weights", "sha256"),
        ("weights of other shapes", "sha256"),
        ("other weights of these shapes", "sha256"),
        ("no sum", "builtin.sha256"),
        ("empty sum", "sha256"),
        ("no configuration", "no builtin.yaml"),
        ("no YAML", "damaged builtin.yaml"),
        ("cut configuration", "builtin.yaml that does not fit"),
        ("another configuration", "builtin.yaml that does not fit"),
    ],
)
def test_a_damaged_built_in_checkpoint_asks_for_a_new_installation(
    toy: Path, roots: Roots, call: Call, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, how: str, words: str
) -> None:
    folder = tmp_path / "builtin"
    shutil.copytree(checkpoints._builtin_folder(), folder)
    monkeypatch.setattr(checkpoints, "_builtin_folder", lambda: folder)
    _damage(folder, how)
    before = roots.snapshot()
    answer = call(cli.propagate, *CPU)
    refused(answer, words, folder)
    assert answer.error.endswith("; reinstall nnunet-oneshot"), "no flag mends an installation"
    assert "-sam2_cfg" not in answer.error
    assert roots.snapshot() == before


def _published(monkeypatch: pytest.MonkeyPatch, **changes: object) -> None:
    entry = PUBLISHED["sam2_hiera_tiny"]
    monkeypatch.setitem(PUBLISHED, "sam2_hiera_tiny", type(entry)(**{**vars(entry), **changes}))


def test_offline_is_told_address_file_and_folder(
    toy: Path, roots: Roots, call: Call, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("nnUNet_oneshot_checkpoints", str(tmp_path / "cache"))
    address = "http://127.0.0.1:9/sam2_hiera_tiny.pt"
    _published(monkeypatch, url=address)
    before = roots.snapshot()
    answer = call(cli.propagate, *CPU, "-sam2_chk", "sam2_hiera_tiny")
    refused(answer, address, "sam2_hiera_tiny.pt", tmp_path / "cache")
    assert roots.snapshot() == before


def test_a_folder_that_cannot_be_made_is_told_too(
    toy: Path, call: Call, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("nnUNet_oneshot_checkpoints", str(tmp_path / "file" / "cache"))
    refused(call(cli.propagate, *CPU, "-sam2_chk", "sam2_hiera_tiny"), tmp_path / "file" / "cache")


def test_wrong_hash_is_refused(
    toy: Path, roots: Roots, call: Call, checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("nnUNet_oneshot_checkpoints", str(tmp_path / "cache"))
    _published(monkeypatch, url=checkpoint.as_uri())
    before = roots.snapshot()
    refused(call(cli.propagate, *CPU, "-sam2_chk", "sam2_hiera_tiny"), "sha256", "the file was removed")
    (tmp_path / "cache" / "sam2_hiera_tiny.pt").write_bytes(checkpoint.read_bytes())
    refused(call(cli.propagate, *CPU, "-sam2_chk", "sam2_hiera_tiny"), "sha256", "remove it")
    assert roots.snapshot() == before


@pytest.mark.parametrize(
    ("more", "words"),
    [
        (("-mode", "sequence"), ("2D images", "case_0")),
        (("-mode", "slice"), ("sparse label of case_1", "retrieve")),
        (("-recipe", "yoloseg"), ("2D images", "case_0")),
        (("-recipe", "telepathy"), ("telepathy", "ssl_medsam2")),
        (("-views", "inside_out"), ("inside_out",)),
        (("-window", "fog"), ("fog", "abdomen")),
        (("-window", "240", "-160"), ("lower first", "240 -160")),
        (("-window", "a", "b"), ("-window", "a b")),
        (("-channels", "1"), ("channel", "case_0", "1")),
        (("-channels", "red"), ("mean", "red")),
        (("-sam2_batch", "0"), ("-sam2_batch",)),
    ],
)
def test_what_does_not_fit_is_refused_before_anything_is_written(
    toy: Path, roots: Roots, call: Call, checkpoint: Path, more: tuple[str, ...], words: tuple[str, ...]
) -> None:
    before = roots.snapshot()
    refused(call(cli.propagate, *CPU, "-sam2_chk", checkpoint, *more), *words)
    assert roots.snapshot() == before


@pytest.mark.parametrize("overwrite", [(), ("--overwrite",)])
@pytest.mark.parametrize(
    ("scores", "voxels", "steps", "words"),
    [
        (False, 3, 9, ("16 pixels", "leave -adapt out")),
        (True, 40, 9, ("without object scores", "use builtin")),
        (False, 40, -1, ("-adapt of 0 or more", "-1")),
    ],
)
def test_adaptation_that_cannot_be_done_is_refused_before_anything_is_written_or_removed(
    toy: Path,
    roots: Roots,
    call: Call,
    tmp_path: Path,
    overwrite: tuple[str, ...],
    scores: bool,
    voxels: int,
    steps: int,
    words: tuple[str, ...],
) -> None:
    torch.save(tiny_model(scores=scores, multimask=False).state_dict(), tmp_path / "own.pt")
    (tmp_path / "own.yaml").write_text(yaml.safe_dump(tiny_config(scores=scores, multimask=False)))
    label = np.zeros((3, 80, 80), np.uint8)
    label[1, 20 : 20 + voxels, 20 : 20 + voxels] = 1
    write_image(toy / "labelsTr/case_0.nii.gz", label)
    write_image(toy / "imagesTr/case_0_0000.nii.gz", (100 + 50 * label).astype(np.int16))
    if overwrite:
        assert call(cli.propagate, "-d", 501, "-o", 601, "-np", 1, "-propagator", "registration").code == 0
    before = roots.snapshot()
    # Registration, too, would have written labels by the time that adaptation begins.
    both = ("-propagator", "registration", "sam2", "-sam2_chk", tmp_path / "own.pt", "-adapt", steps)
    refused(call(cli.propagate, "-d", 501, "-o", 601, "-np", 1, "-device", "cpu", *both, *overwrite), *words)
    assert roots.snapshot() == before


def test_a_plane_across_pixels_is_refused(roots: Roots, call: Call, checkpoint: Path) -> None:
    write_raw(roots.raw, ending=".png")
    before = roots.snapshot()
    refused(call(cli.propagate, *CPU, "-sam2_chk", checkpoint, "-views", "coronal"), "coronal", "2D")
    assert roots.snapshot() == before


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
def test_no_gpu_is_said(toy: Path, roots: Roots, call: Call) -> None:
    before = roots.snapshot()
    refused(call(cli.propagate, *SAM2, "-device", "cuda"), "CUDA", "-device cpu")
    assert roots.snapshot() == before


def test_a_support_without_foreground_is_refused_unless_another_has_some(
    roots: Roots, call: Call, checkpoint: Path
) -> None:
    folder = write_raw(roots.raw, annotated=("case_0", "case_1"))
    write_image(folder / "labelsTr/case_1.nii.gz", np.zeros(SHAPE, np.uint8))
    answer = call(cli.propagate, *CPU, "-sam2_chk", checkpoint)
    assert answer.code == 0, answer.err
    assert "warning: annotated case case_1" in answer.out
    write_image(folder / "labelsTr/case_0.nii.gz", np.zeros(SHAPE, np.uint8))
    before = roots.snapshot()
    refused(call(cli.propagate, *CPU, "-o", 602, "-sam2_chk", checkpoint), "foreground", "case_0")
    assert roots.snapshot() == before


def test_a_sparse_label_without_foreground_is_no_slice_to_carry(
    toy: Path, roots: Roots, call: Call, checkpoint: Path
) -> None:
    write_image(toy / "labelsTr/case_1.nii.gz", np.full(SHAPE, 3, np.uint8))
    write_image(toy / "labelsTr/case_2.nii.gz", np.full(SHAPE, 3, np.uint8))
    make_sparse(toy)
    before = roots.snapshot()
    answer = call(cli.propagate, *CPU, "-sam2_chk", checkpoint, "-mode", "slice")
    refused(answer, "case_1", "foreground", "retrieve")
    assert roots.snapshot() == before


@pytest.mark.slow
@pytest.mark.parametrize("more", [("-propagator", "sam2"), ()], ids=["alone", "default"])
def test_an_annotated_slice_of_another_plane_is_carried(
    toy: Path, call: Call, checkpoint: Path, monkeypatch: pytest.MonkeyPatch, more: tuple[str, ...]
) -> None:
    """The slices of these volumes lie across z; a person drew one across x."""
    monkeypatch.setattr(propagators, "RECIPE", replace(propagators.RECIPE, steps=2))
    label, shown = read(toy / "labelsTr/case_0.nii.gz"), np.arange(SHAPE[2]) == 3
    edit_json(toy, labels={**LABELS, "ignore": 3})
    write_image(toy / "labelsTr/case_0.nii.gz", np.where(shown, label, 3).astype(np.uint8))
    answer = call(cli.propagate, "-d", 501, "-o", 601, "-np", 1, "-device", "cpu", *more, "-sam2_chk", checkpoint)
    assert answer.code == 0, answer.err
    made = toy.parent / "Dataset601_toy_oneshot"
    views = read_manifest(made / "oneshot.json").cases["case_0"].views
    assert sum(name.startswith("sam2/") for name in views) == 3, answer.out
    np.testing.assert_array_equal(read(made / "labelsTr/case_0.nii.gz")[..., shown], label[..., shown])


def test_too_little_memory_keeps_what_is_done_and_says_what_to_lower(
    toy: Path, call: Call, checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The second query is too large; with a smaller batch the run goes on, and does not do the first one again."""
    carry, asked = Sam2Propagator._one, []

    def fail_at_the_second(self: Sam2Propagator, engine: Any, supports: Any, query: Any, *more: Any) -> Any:
        asked.append(query.case)
        if query.case == "case_2" and len(asked) == 2:
            torch.empty(1 << 56)
        return carry(self, engine, supports, query, *more)

    monkeypatch.setattr(Sam2Propagator, "_one", fail_at_the_second)
    answer = call(cli.propagate, *CPU, "-sam2_chk", checkpoint)
    refused(answer, "-sam2_batch (it is 8)", "-np", "kept")
    assert call(cli.propagate, *CPU, "-sam2_chk", checkpoint, "-sam2_batch", 2).code == 0
    assert asked == ["case_1", "case_2", "case_2"]


def test_channels_and_windows_reach_the_model(
    roots: Roots, call: Call, checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_raw(roots.raw, channels=2)
    seen: list[float] = []
    scale = module.Sam2Propagator._one.__globals__["scale"]

    def spy(image: Any, how: Any) -> Any:
        scaled = scale(image, how)
        if image.case == "case_1":
            seen.append(float(scaled.mean()))
        return scaled

    monkeypatch.setattr("sam2_propagation.sam2.scale", spy)
    more = ("-channels", "1", "-window", "100", "140")
    assert call(cli.propagate, *CPU, "-sam2_chk", checkpoint, *more).code == 0
    expected = np.clip((image_array(1, 1) - 100.0) / 40, 0, 1).mean()
    assert seen == [pytest.approx(expected, abs=1e-5)]
    assert call(cli.propagate, *CPU, "-sam2_chk", checkpoint, *more).error.count("--overwrite"), "the same settings"


@pytest.fixture
def counted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Encoder passes of this process and of workers are written there."""
    monkeypatch.setenv(COUNT, str(tmp_path / "passes"))
    monkeypatch.setattr(propagators, "Sam2Propagator", CountedSam2)
    with counting():
        yield tmp_path / "passes"


def _run(checkpoint: Path, **options: Any) -> Any:
    return propagate(
        501,
        601,
        propagators=("sam2",),
        num_processes=options.pop("num_processes", 1),
        views=options.pop("views", ("identity", "coronal")),
        options=PropagatorOptions(checkpoint=str(checkpoint), **options),
    )


@pytest.mark.parametrize("mode", ["insert", "retrieve", "self"])
def test_processes_together_encode_each_slice_of_each_view_once(
    roots: Roots, checkpoint: Path, counted: Path, mode: str
) -> None:
    cases = tuple(f"case_{i}" for i in range(6))
    write_raw(roots.raw, cases=cases, annotated=("case_0", "case_3"))
    _run(checkpoint, mode=mode, num_processes=2)
    distinct = len(cases) * (SHAPE[0] + SHAPE[2])  # as it is stored, coronal slices lie along x
    by_process = passes(counted)
    assert len(by_process) == 2, "two workers, and nothing in the parent"
    # `self` segments queries that registration prompted without a look at a support; others need each slice once.
    assert sum(by_process.values()) <= distinct
    assert mode == "self" or sum(by_process.values()) == distinct
    assert not list((roots.raw / "Dataset601_toy_oneshot/.oneshot/tmp").iterdir()), "shared embeddings are gone"


@pytest.mark.parametrize("processes", [1, 2])
def test_a_sparse_case_that_others_draw_on_is_encoded_once(
    toy: Path, checkpoint: Path, counted: Path, processes: int
) -> None:
    make_sparse(toy)
    _run(checkpoint, num_processes=processes, views=("identity",))
    assert sum(passes(counted).values()) == 3 * SHAPE[0]


def test_a_sequence_is_encoded_once_and_its_bar_moves_by_slices(
    roots: Roots, checkpoint: Path, counted: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    write_raw(roots.raw, cases=tuple(f"case_{i}" for i in range(5)), ending=".png")
    monkeypatch.setattr(module, "tqdm", lambda **more: tqdm(**more, mininterval=0, miniters=0))
    _run(checkpoint, recipe="yoloseg", views=None, batch_size=2)
    assert sum(passes(counted).values()) == 5 * 3
    shown = capsys.readouterr().err
    assert "0.27/4" in shown, "the first batch of two, of five images in three views, encoded and tracked"
    assert "4/4" in shown


def test_processes_and_one_process_label_alike(toy: Path, checkpoint: Path) -> None:
    one = _run(checkpoint, mode="retrieve").store
    first = {c: read(one.fused_path(c)) for c in ("case_1", "case_2")}
    module.propagate(
        501, 601, propagators=("sam2",), num_processes=2, views=("identity", "coronal"), overwrite=True,
        options=PropagatorOptions(checkpoint=str(checkpoint), mode="retrieve"),
    )  # fmt: skip
    for case, label in first.items():
        assert np.mean(read(one.fused_path(case)) != label) < 0.01


def _shard(part: int, checkpoint: str, start: Any) -> None:
    start.wait()
    argv = ["-d", "501", "-o", "601", "-np", "1", "-propagator", "sam2", "-device", "cpu", "-views", "identity"]
    cli.propagate([*argv, "-sam2_chk", checkpoint, "-num_parts", "2", "-part_id", str(part)])


def test_shards_at_once_make_what_one_run_makes(roots: Roots, checkpoint: Path) -> None:
    write_raw(roots.raw, cases=tuple(f"case_{i}" for i in range(5)))
    context = multiprocessing.get_context("spawn")
    start = context.Barrier(2)
    shards = [context.Process(target=_shard, args=(part, str(checkpoint), start)) for part in range(2)]
    for shard in shards:
        shard.start()
    for shard in shards:
        shard.join()
    assert [shard.exitcode for shard in shards] == [0, 0]
    alone = propagate(
        501, 602, propagators=("sam2",), num_processes=1, views=("identity",),
        options=PropagatorOptions(checkpoint=str(checkpoint)),
    ).store  # fmt: skip
    together = roots.raw / "Dataset601_toy_oneshot"
    for label in sorted((alone.folder / "labelsTr").iterdir()):
        assert np.array_equal(read(label), read(together / "labelsTr" / label.name))
    assert (together / "oneshot.json").is_file()
