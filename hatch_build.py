"""What an editable install carries: the .pth line alone, so that nnU-Net finds the trainers in the checkout itself."""

from __future__ import annotations

from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface


class EditableTrainers(BuildHookInterface):
    """Keeps copies of the trainers, which would go stale, out of an editable install."""

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        build_data["force_include_editable"] = {"nnunet_oneshot.pth": "nnunet_oneshot.pth"}
