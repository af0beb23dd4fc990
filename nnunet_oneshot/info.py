"""Versions, devices, checkpoints and folders, for a bug report."""

from __future__ import annotations

import os
import platform
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch

from nnunet_oneshot.bfloat16 import pays
from nnunet_oneshot.consensus import PACKAGES
from nnunet_oneshot.output import NNUNET_ROOTS
from nnunet_oneshot.parallel import default_processes
from sam2_propagation.checkpoints import builtin_file, cache_folder, downloaded
from sam2_propagation.download import file_sum
from sam2_propagation.errors import PropagationError


def info() -> dict[str, Any]:
    """What a bug report needs, as a summary; environment variables are named, never their secrets."""
    figures: dict[str, Any] = {
        "python": platform.python_version(),
        "system": platform.platform(),
        "processors": default_processes(),
        "packages": {name: _version(name) for name in PACKAGES},
        "cuda": [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())],
        "mps": torch.backends.mps.is_available(),
        "bfloat16 on the CPU": pays(torch.device("cpu")),
        "checkpoints": _checkpoints(),
        "folders": {name: os.environ.get(name) for name in (*NNUNET_ROOTS, "nnUNet_extTrainer")},
    }
    return {**figures, "lines": _lines(figures)}


def _checkpoints() -> dict[str, Any]:
    try:
        builtin = {"name": builtin_file().name, "sha256": file_sum(builtin_file())}
    except PropagationError:
        builtin = {"name": "not installed", "sha256": "none"}
    return {"builtin": builtin, "cache": str(cache_folder()), "downloaded": downloaded()}


def _lines(figures: dict[str, Any]) -> list[str]:
    lines = []
    for key, value in figures.items():
        if key == "checkpoints":
            builtin = value["builtin"]
            lines += [f"builtin checkpoint: {builtin['name']}, sha256 {builtin['sha256']}"]
            lines += [f"checkpoint folder: {value['cache']}; in it: {', '.join(value['downloaded']) or 'none'}"]
        elif isinstance(value, dict):
            lines += [f"{name}: {'unset' if text is None else text}" for name, text in value.items()]
        else:
            lines.append(f"{key}: {value if value != [] else 'none'}")
    return lines


def _version(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        return "not installed"
