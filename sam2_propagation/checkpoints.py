"""Trained SAM2 weights by name or file, loaded without ever running code that a file brings along.

A checkpoint is named `builtin` (the package's own), by a published name (`sam2.1_hiera_tiny`, `medsam2_latest`, ...),
`random:<configuration>` (for tests and timings; `@<pixels>` behind it sets the input size), or is any local file.
"""

from __future__ import annotations

import os
import pickle
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from sam2_propagation.architecture import (
    Config,
    SAM2Base,
    at_size,
    build_sam2,
    known_configurations,
    read_configuration,
)
from sam2_propagation.checkpoint_catalog import PUBLISHED, Published, by_file_name, by_sum
from sam2_propagation.download import download, file_sum
from sam2_propagation.errors import PropagationError

CACHE_VARIABLE = "nnUNet_oneshot_checkpoints"
"""Environment variable that sets the folder of downloaded checkpoints."""

_BUILTIN = "builtin"
_RANDOM = "random:"
# What sam2's Hiera has where a configuration is silent.
_HIERA_WIDTH, _HIERA_STAGES = 96, (2, 3, 16, 3)


@dataclass(frozen=True, eq=False)
class LoadedCheckpoint:
    """A model ready to be used.

    Attributes:
        model: in evaluation mode, on the device asked for.
        name: as the user named it.
        sha256: of the file, or None for random weights.
        image_size: side of the model's square input, in pixels.
    """

    model: SAM2Base
    name: str
    sha256: str | None
    image_size: int


Named = str | Path | Config
"""A configuration: a known one's name, a YAML file or a mapping."""


@dataclass(frozen=True)
class _Source:
    """Where weights come from: a file (None for random weights) and, where it is settled, the configuration."""

    file: Path | None
    config: Config | None
    sha256: str | None
    video_settings: bool


def load_checkpoint(
    name_or_path: str | Path, config: Named | None = None, device: str = "cpu", cache: Path | None = None
) -> LoadedCheckpoint:
    """Load a checkpoint.

    Args:
        name_or_path: see the module's head.
        config: a known configuration's name, a YAML file or a mapping, for a file that nothing else identifies. The
            configuration is settled by the file's sha256, then its name, then this, then a YAML file beside it; a YAML
            file or mapping also changes what a known file is used with (a name can only contradict it).
        device: "cpu", "cuda", "cuda:1", "mps".
        cache: folder of downloaded files; by default `$nnUNet_oneshot_checkpoints`, else the user's cache folder.

    Raises:
        PropagationError: unknown name, unreadable, damaged or refused file, wrong sum, a configuration that does not
            fit the tensors, a device that is not there, or a download that fails.
    """
    target = check_device(device)
    name = str(name_or_path)
    source = _locate(name, config, cache)
    model = _builtin_model(source) if name == _BUILTIN else _model(source)
    return LoadedCheckpoint(model.to(target).eval(), name, source.sha256, model.image_size)


def prepare_checkpoint(name_or_path: str | Path, cache: Path | None = None) -> None:
    """Download a published checkpoint now, so that workers started afterwards all find it.

    Raises:
        PropagationError: as `load_checkpoint`.
    """
    published = PUBLISHED.get(str(name_or_path).lower())
    if published is not None:
        _fetched(published, cache)


def cache_folder(cache: Path | None = None) -> Path:
    """The folder of downloaded checkpoints."""
    if cache is not None:
        return Path(cache)
    own = os.environ.get(CACHE_VARIABLE)
    base = os.environ.get("XDG_CACHE_HOME")
    return Path(own) if own else Path(base or Path.home() / ".cache") / "nnunet-oneshot" / "checkpoints"


def builtin_file() -> Path:
    """The built-in weights; PropagationError where the installation lacks them."""
    path = _builtin_folder() / "builtin.safetensors"
    if not path.is_file():
        raise _not_as_packaged(f"no {path.name}")
    return path


def downloaded(cache: Path | None = None) -> list[str]:
    """Names of the published checkpoints whose files lie in the cache folder; their sums are not looked at."""
    folder = cache_folder(cache)
    return [name for name, published in PUBLISHED.items() if os.path.isfile(folder / published.file_name)]


def check_device(device: str) -> torch.device:
    """The device, if it is there.

    Raises:
        PropagationError: a device unknown to torch, or not on this machine.
    """
    try:
        found = torch.device(device)
    except RuntimeError as error:
        raise PropagationError(f"expected cpu, cuda or mps as device, found {device!r}; use -device cpu") from error
    if found.type == "cuda" and not torch.cuda.is_available():
        raise PropagationError(f"expected a CUDA device for {device!r}, found none; use -device cpu")
    if found.type == "mps" and not torch.backends.mps.is_available():
        raise PropagationError(f"expected an Apple GPU for {device!r}, found none; use -device cpu")
    return found


def read_tensors(path: Path) -> dict[str, Tensor]:
    """The state dict in a safetensors file or in a file of torch.save, loaded with weights-only unpickling.

    Raises:
        PropagationError: damaged file, a pickle that would run code, or a file without tensors.
    """
    loaded = _read_safetensors(path) if path.suffix == ".safetensors" else _read_torch(path)
    for key in ("model", "state_dict"):
        if isinstance(loaded.get(key), Mapping):
            loaded = loaded[key]
    tensors = {key: value for key, value in loaded.items() if isinstance(value, Tensor)}
    if not tensors:
        raise PropagationError(f"expected tensors by name in {path}, found none; is it a SAM2 checkpoint?")
    return tensors


def _read_safetensors(path: Path) -> dict[str, Any]:
    try:
        return load_file(path)
    except (SafetensorError, OSError) as error:
        raise PropagationError(f"expected a whole safetensors file at {path}, found: {error}; get it anew") from error


def _read_torch(path: Path) -> dict[str, Any]:
    damaged = f"expected a whole checkpoint file at {path}, found a truncated or damaged one; get it anew"
    with path.open("rb") as stream:
        looks_zipped = stream.read(2) == b"PK"
    if looks_zipped and not zipfile.is_zipfile(path):
        raise PropagationError(damaged)
    try:
        loaded = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise PropagationError(
            f"expected only tensors in {path}, found a damaged pickle or one that would run code; it was refused, "
            "use a file from a source you trust, best as safetensors"
        ) from error
    except (RuntimeError, EOFError, KeyError, ValueError, zipfile.BadZipFile) as error:
        raise PropagationError(damaged) from error
    if not isinstance(loaded, dict):
        raise PropagationError(
            f"expected tensors by name in {path}, found {type(loaded).__name__}; is it a SAM2 checkpoint?"
        )
    return loaded


def _configuration(config: Named) -> Config:
    if isinstance(config, Mapping):
        return config
    known = known_configurations()
    if str(config) in known:
        return known[str(config)]
    if not Path(config).is_file():
        raise PropagationError(
            f"expected a YAML file or one of {', '.join(known)} as configuration, found {config}; correct -sam2_cfg"
        )
    return read_configuration(Path(config))


def _locate(name: str, config: Named | None, cache: Path | None) -> _Source:
    if name.startswith(_RANDOM):
        own = _named(name.removeprefix(_RANDOM)) if config is None else _configuration(config)
        return _Source(None, own, None, False)
    if name == _BUILTIN:
        return _builtin(config)
    published = PUBLISHED.get(name.lower())
    if published is not None:
        path = _fetched(published, cache)
        return _Source(path, _settled(published, config, path), file_sum(path), True)
    if Path(name).is_file():
        return _local(Path(name), config)
    raise PropagationError(
        f"expected a checkpoint file or one of builtin, {', '.join(PUBLISHED)}, random:<configuration>, found "
        f"{name!r}; correct -sam2_chk"
    )


def _settled(published: Published, config: Named | None, path: Path) -> Config:
    """The configuration of a known file. Tensors cannot tell MedSAM2 from SAM2.1 tiny; the hash and the name can."""
    known = published.configuration
    if config is None:
        return _configuration(known)
    if not isinstance(config, Mapping) and str(config) in known_configurations() and str(config) != known:
        raise PropagationError(
            f"expected -sam2_cfg {known}, the configuration of {path}, found {config}; leave -sam2_cfg out"
        )
    return _configuration(config)


def _named(text: str) -> Config:
    """`<configuration>` or `<configuration>@<pixels>`."""
    name, _, pixels = text.partition("@")
    if pixels and not pixels.isdigit():
        raise PropagationError(f"expected a number of pixels behind @, found {pixels!r}; correct -sam2_chk")
    config = _builtin_configuration() if name == _BUILTIN else _configuration(name)
    return at_size(config, int(pixels)) if pixels else config


def _builtin_folder() -> Path:
    return Path(str(files("sam2_propagation").joinpath("builtin")))


def _builtin(config: Named | None) -> _Source:
    if config is not None:
        raise PropagationError(f"expected no configuration for builtin, found {config}; leave -sam2_cfg out")
    return _Source(builtin_file(), _builtin_configuration(), _builtin_sum(), False)


def _builtin_configuration() -> Config:
    path = _builtin_folder() / "builtin.yaml"
    if not path.is_file():
        raise _not_as_packaged(f"no {path.name}")
    try:
        return read_configuration(path)
    except PropagationError as error:
        raise _not_as_packaged(f"a damaged {path.name}") from error


def _builtin_sum() -> str:
    """The sha256 of the built-in weights, which must be the one that was packaged beside them."""
    path = builtin_file()
    try:
        wanted, found = path.with_suffix(".sha256").read_text(encoding="ascii").split()[:1], file_sum(path)
    except (OSError, UnicodeDecodeError) as error:
        raise _not_as_packaged(f"no readable {path.name} with its builtin.sha256") from error
    if wanted != [found]:
        raise _not_as_packaged(f"a {path.name} whose sha256 is not that of builtin.sha256")
    return found


def _builtin_model(source: _Source) -> SAM2Base:
    try:
        return _model(source)
    except PropagationError as error:
        # The weights are whole, as their sum says: it is the configuration that is not theirs.
        raise _not_as_packaged("a builtin.yaml that does not fit its weights") from error


def _not_as_packaged(found: str) -> PropagationError:
    return PropagationError(
        f"expected the built-in checkpoint in {_builtin_folder()} as it was packaged, found {found}; reinstall "
        "nnunet-oneshot"
    )


def _fetched(published: Published, cache: Path | None) -> Path:
    path = cache_folder(cache) / published.file_name
    if not path.is_file():
        download(published.url, path, published.sha256)
    elif published.sha256 is not None and (found := file_sum(path)) != published.sha256:
        raise PropagationError(
            f"expected sha256 {published.sha256} of {path}, found {found}; remove it, and it is downloaded again"
        )
    return path


def _local(path: Path, config: Named | None) -> _Source:
    try:
        sha256 = file_sum(path)
    except OSError as error:
        raise PropagationError(f"expected to read {path}, found {error.strerror}; change its permissions") from error
    published = by_sum(sha256) or by_file_name(path.name)
    beside = path.with_suffix(".yaml")
    if published is not None:
        return _Source(path, _settled(published, config, path), sha256, True)
    if config is None and beside.is_file():
        config = beside
    return _Source(path, None if config is None else _configuration(config), sha256, False)


def _model(source: _Source) -> SAM2Base:
    return _random_model(source) if source.file is None else _trained_model(source, source.file)


def _random_model(source: _Source) -> SAM2Base:
    """Weights from a fixed seed, so that two runs agree; the caller's random state is left as it was."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return build_sam2(source.config or {}, source.video_settings)


def _trained_model(source: _Source, path: Path) -> SAM2Base:
    tensors = read_tensors(path)
    if source.config is None:
        raise PropagationError(f"expected a configuration for {path}, found none; {_advice(tensors)}")
    model = build_sam2(source.config, source.video_settings)
    if not fits(model, tensors):
        raise PropagationError(
            f"expected tensors of {path} that fit the configuration, found others; {_advice(tensors)}"
        )
    model.load_state_dict(tensors)
    return model


def fits(model: SAM2Base, tensors: Mapping[str, Tensor]) -> bool:
    """Whether a model has tensors of just these names and shapes."""
    shapes = {key: value.shape for key, value in model.state_dict().items()}
    return shapes == {key: value.shape for key, value in tensors.items()}


def _advice(tensors: Mapping[str, Tensor]) -> str:
    fitting = [
        name
        for name, config in known_configurations().items()
        if _could_fit(config["model"], tensors) and fits(build_sam2(config), tensors)
    ]
    if not fitting:
        return "no known configuration fits it, so pass its own YAML with -sam2_cfg"
    return f"what fits it is -sam2_cfg {' or '.join(fitting)}"


def _could_fit(tree: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> bool:
    """Cheap test before a whole model is built: width and depth of the encoder."""
    trunk = tree["image_encoder"]["trunk"]
    width = tensors.get("image_encoder.trunk.patch_embed.proj.bias")
    depth = sum(trunk.get("stages", _HIERA_STAGES))
    last, beyond = (f"image_encoder.trunk.blocks.{i}.norm1.weight" for i in (depth - 1, depth))
    return (
        width is not None
        and len(width) == trunk.get("embed_dim", _HIERA_WIDTH)
        and last in tensors
        and beyond not in tensors
    )
