"""Models from configurations: what is built, what is refused, and what is left as it was."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from sam2_tiny import tiny_config

from sam2_propagation.architecture import at_size, build_sam2, known_configurations, read_configuration
from sam2_propagation.errors import PropagationError


def test_builds_in_evaluation_mode_at_the_size_asked_for() -> None:
    model = build_sam2(tiny_config(image_size=96))
    assert not model.training
    assert model.image_size == 96


def test_every_known_configuration_has_the_published_input_size() -> None:
    known = known_configurations()
    assert len(known) == 9
    assert known["medsam2"]["model"]["image_size"] == 512
    assert {c["model"]["image_size"] for name, c in known.items() if name != "medsam2"} == {1024}


def test_video_settings_are_those_of_the_stock_builder() -> None:
    model = build_sam2(tiny_config(), video_settings=True)
    assert model.binarize_mask_from_pts_for_mem_enc
    assert model.sam_mask_decoder.dynamic_multimask_via_stability


@pytest.mark.parametrize("target", ["os.system", "subprocess.run", "sam2.build_sam.build_sam2", "sam2_evil.x"])
def test_refuses_a_node_of_another_package(target: str) -> None:
    config = tiny_config()
    config["model"]["memory_encoder"]["fuser"]["layer"] = {"_target_": target, "command": "true"}
    with pytest.raises(PropagationError, match=r"sam2\.modeling"):
        build_sam2(config)


@pytest.mark.parametrize("config", [{}, {"model": {}}, {"model": 3}])
def test_refuses_what_is_no_configuration(config: dict[str, Any]) -> None:
    with pytest.raises(PropagationError, match="configuration"):
        build_sam2(config)


def test_refuses_arguments_that_do_not_fit() -> None:
    config = tiny_config()
    config["model"]["no_such_argument"] = 1
    with pytest.raises(PropagationError, match="cannot be built"):
        build_sam2(config)


def test_refuses_an_odd_size() -> None:
    with pytest.raises(PropagationError, match="multiple of 16"):
        at_size(tiny_config(), 100)


def test_reads_references_and_exponents(tmp_path: Path) -> None:
    path = tmp_path / "c.yaml"
    path.write_text(
        "scratch: {resolution: 512}\ntrainer:\n  model: {image_size: '${scratch.resolution}', scale: 1e-6}\n"
    )
    assert read_configuration(path)["model"] == {"image_size": 512, "scale": 1e-6}


def test_names_the_file_that_cannot_be_read(tmp_path: Path) -> None:
    (tmp_path / "broken.yaml").write_text("model: [")
    for name in ("absent.yaml", "broken.yaml"):
        with pytest.raises(PropagationError, match=name):
            read_configuration(tmp_path / name)


@pytest.mark.slow
def test_a_user_may_still_initialise_hydra_afterwards() -> None:
    code = (
        "import sam2_propagation.architecture\n"
        "from hydra import initialize_config_module\n"
        "initialize_config_module('sam2', version_base='1.2')\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, encoding="utf-8", check=False)
    assert done.returncode == 0, done.stderr
