"""SAM2 models from configurations: sam2's own, MedSAM2's and any local one.

A configuration is a plain mapping in the form of sam2's YAML files (a `model:` tree of `_target_` nodes). Only classes
of `sam2.modeling` are ever instantiated from it, so a configuration file cannot name code of another package.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import cache
from importlib.resources import files
from pathlib import Path
from typing import Any

from hydra.core.global_hydra import GlobalHydra
from hydra.errors import InstantiationException
from hydra.utils import instantiate
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

from sam2_propagation.errors import PropagationError


@contextmanager
def _own_hydra_state() -> Iterator[None]:
    """Importing sam2 initialises hydra's global state; a user who initialises hydra later would meet an error."""
    was_initialised = GlobalHydra.instance().is_initialized()
    yield
    if not was_initialised:
        GlobalHydra.instance().clear()


with _own_hydra_state():
    import sam2
    from sam2.modeling.sam2_base import NO_OBJ_SCORE, SAM2Base

__all__ = ["NO_OBJ_SCORE", "SAM2Base", "at_size", "build_sam2", "known_configurations", "read_configuration"]

Config = Mapping[str, Any]
"""The `model:` tree of a configuration, or a mapping that holds one under "model"."""

_SIZES = {"tiny": "t", "small": "s", "base_plus": "b+", "large": "l"}
_STRIDE = 16

# What sam2's own builder of video predictors sets on top of every configuration file.
_VIDEO_SETTINGS: dict[str, Any] = {
    "binarize_mask_from_pts_for_mem_enc": True,
    "sam_mask_decoder_extra_args": {
        "dynamic_multimask_via_stability": True,
        "dynamic_multimask_stability_delta": 0.05,
        "dynamic_multimask_stability_thresh": 0.98,
    },
}


def build_sam2(config: Config, video_settings: bool = False) -> SAM2Base:
    """Build a SAM2 model with freshly drawn weights, on the CPU, in evaluation mode.

    Args:
        config: the `model:` tree, or a mapping with such a tree under "model".
        video_settings: add what sam2's own video predictor builder adds to every configuration (a dynamic choice of
            the mask by its stability, prompted masks binarised before they are remembered), as published procedures
            that use that builder have it.

    Raises:
        PropagationError: a node of the tree is not of `sam2.modeling`, or its arguments do not fit.
    """
    tree = dict(_model_tree(config))
    _check_targets(tree, "model")
    # Training and predictor classes extend SAM2Base by arguments and behaviour that are not used here.
    tree["_target_"] = "sam2.modeling.sam2_base.SAM2Base"
    tree["compile_image_encoder"] = False
    if video_settings:
        tree.update(copy.deepcopy(_VIDEO_SETTINGS))
    try:
        model = instantiate(OmegaConf.create(tree), _recursive_=True)
    except (InstantiationException, OmegaConfBaseException) as error:
        raise PropagationError(
            f"expected a SAM2 configuration, found one that cannot be built: {error}; correct -sam2_cfg"
        ) from error
    return model.eval()


def read_configuration(path: Path) -> dict[str, Any]:
    """Read a YAML configuration, with its references (`${...}`) resolved.

    Raises:
        PropagationError: missing file, not YAML, or no `model:` tree in it.
    """
    try:
        loaded = OmegaConf.load(path)
        # Only the model's own references are resolved: training files hold others that need their project's code.
        tree = OmegaConf.select(loaded, "trainer.model") or OmegaConf.select(loaded, "model")
        config = OmegaConf.to_container(tree, resolve=True) if tree is not None else None
    except (OSError, UnicodeDecodeError, YAMLError, OmegaConfBaseException) as error:
        raise PropagationError(
            f"expected a SAM2 configuration in YAML at {path}, found: {error}; correct -sam2_cfg"
        ) from error
    if not isinstance(config, dict):
        raise PropagationError(f"expected a `model:` tree in {path}, found none; write one in sam2's own form")
    return {"model": {str(key): value for key, value in config.items()}}


@cache
def _packaged(relative: str) -> dict[str, Any]:
    return read_configuration(Path(str(files(sam2).joinpath("configs", relative))))


def known_configurations() -> dict[str, dict[str, Any]]:
    """Every configuration known by name: sam2's eight and MedSAM2's (SAM2.1 tiny at 512 pixels)."""
    known = {}
    for version in ("sam2.1", "sam2"):
        for size, short in _SIZES.items():
            known[f"{version}_hiera_{size}"] = copy.deepcopy(_packaged(f"{version}/{version}_hiera_{short}.yaml"))
    known["medsam2"] = at_size(known["sam2.1_hiera_tiny"], 512)
    return known


def at_size(config: Config, image_size: int) -> dict[str, Any]:
    """The same model for square inputs of `image_size` pixels (a multiple of 16)."""
    if image_size <= 0 or image_size % _STRIDE:
        raise PropagationError(
            f"expected an image size that is a positive multiple of {_STRIDE}, found {image_size}; choose another"
        )
    tree = copy.deepcopy(dict(_model_tree(config)))
    tree["image_size"] = image_size
    layer = tree["memory_attention"]["layer"]
    for attention in ("self_attention", "cross_attention"):
        layer[attention]["feat_sizes"] = [image_size // _STRIDE] * 2
    return {"model": tree}


def _model_tree(config: Config) -> Mapping[str, Any]:
    tree = config.get("model", config)
    if not isinstance(tree, Mapping) or "image_encoder" not in tree:
        raise PropagationError("expected a SAM2 configuration with a `model:` tree, found none; see sam2's YAML files")
    return tree


def _check_targets(node: Any, where: str) -> None:
    if isinstance(node, Mapping):
        target = node.get("_target_")
        allowed = ("sam2.modeling.", "sam2.sam2_video_predictor.", "training.model.sam2.")
        # Only the root may be one of sam2's wrappers of SAM2Base; it is replaced by SAM2Base itself.
        if target is not None and not str(target).startswith(allowed if where == "model" else allowed[:1]):
            raise PropagationError(
                f"expected only classes of sam2.modeling in the configuration, found {target} at {where}; "
                "correct -sam2_cfg"
            )
        for key, child in node.items():
            _check_targets(child, f"{where}.{key}")
    elif isinstance(node, list | tuple):
        for index, child in enumerate(node):
            _check_targets(child, f"{where}[{index}]")
