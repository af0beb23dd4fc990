"""nnU-Net's networks in bfloat16 on processors that multiply its matrices (AMX), where they are much faster.

nnU-Net computes in half precision on a GPU and in float32 on the CPU, where half precision is slow; on processors with
units for it, it is not (benchmarks/precision.py). Without any instruction for it, it takes twice as long as float32.
"""

from __future__ import annotations

import os
from collections.abc import Mapping

import torch
from torch import Tensor, nn

VARIABLE = "nnUNet_oneshot_bfloat16"
"""Environment variable that decides by itself where it is set: 1, true or t for bfloat16, anything else for float32."""


def pays(device: torch.device) -> bool:
    """Whether networks are to compute in bfloat16 on a device: a CPU with AMX, if nothing else is asked for.

    Other devices never: nnU-Net itself chooses what they compute in. PyTorch must be one that tells what the processor
    has (`torch.cpu.get_capabilities`): older ones need the environment variable.
    """
    if device.type != "cpu":
        return False
    if (asked := os.environ.get(VARIABLE)) is not None:
        return asked.lower() in ("1", "true", "t")
    capabilities: Mapping[str, object] = getattr(torch.cpu, "get_capabilities", dict)()
    return bool(capabilities.get("amx_bf16", False))


def compute_in_bfloat16(network: nn.Module) -> None:
    """Have a network compute under autocast; its weights, and what comes out of it, stay float32.

    Args:
        network: one whose output is a tensor, or a list of them where it is supervised deeply. It keeps its names and
            weights: checkpoints are those of the network as it was. It may be compiled, but not have run yet.
    """
    network = getattr(network, "_orig_mod", network)
    kind: type[nn.Module] = type(network)

    class InBfloat16(kind):  # type: ignore[misc, valid-type]
        def forward(self, data: Tensor) -> Tensor | list[Tensor]:
            with torch.autocast("cpu", torch.bfloat16):
                found = super().forward(data)
            return [level.float() for level in found] if isinstance(found, (list, tuple)) else found.float()

    # As nnU-Net's logs should name it.
    InBfloat16.__name__ = kind.__name__
    # A wrapper would put its name before that of every weight.
    network.__class__ = InBfloat16
