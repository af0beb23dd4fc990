"""The built wheel: what it carries, and that nnU-Net finds our trainers with it and with nothing else."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import sysconfig
import venv
import zipfile
from collections.abc import Callable, Sequence
from importlib.util import find_spec
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parent.parent
PROBE = """
import inspect, json, os, sys
import nnunetv2
from nnunetv2.utilities.find_objects import recursive_find_trainer_class_by_name
names = sys.argv[1:]
result = {
    "nnunetv2": nnunetv2.__file__,
    "ext": os.environ["nnUNet_extTrainer"],
    "found": {n: inspect.getfile(recursive_find_trainer_class_by_name(n).__init__) for n in names},
}
print("\\n" + json.dumps(result))
"""


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("wheel")
    _run([sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(folder)], cwd=ROOT)
    return next(folder.glob("*.whl"))


@pytest.fixture
def environment(tmp_path: Path) -> Path:
    """A virtual environment of its own that sees the running one's packages, without their .pth files."""
    folder = tmp_path / "environment"
    venv.create(folder, with_pip=False, symlinks=True)
    site = Path(sysconfig.get_path("purelib", vars={"base": str(folder), "platbase": str(folder)}))
    (site / "zz_running_environment.pth").write_text(sysconfig.get_path("purelib") + "\n")
    return folder


def test_wheel_carries_trainers_and_the_built_in_checkpoint(wheel: Path) -> None:
    names = set(zipfile.ZipFile(wheel).namelist())
    assert "nnunet_oneshot.pth" in names
    assert {f"nnunet_oneshot_trainers/{p.name}" for p in (ROOT / "trainers").glob("*.py")} <= names
    builtin = ROOT / "sam2_propagation" / "builtin"
    assert {f"sam2_propagation/builtin/{p.name}" for p in builtin.iterdir()} <= names
    assert {f"sam2_propagation/builtin/builtin.{kind}" for kind in ("safetensors", "sha256", "yaml")} <= names
    assert not any(name.startswith(("nnunetv2/", "tests/", "benchmarks/")) for name in names)


def test_found_beside_a_plain_nnunet(wheel: Path, environment: Path) -> None:
    _install(environment, [str(wheel)])
    result = _probe(environment, ["OneShotTrainer", "OneShotTrainer_small", "nnUNetTrainer_tiny"])
    folders = {Path(file).parent.name for file in list(result["found"].values())[:2]}
    assert folders == {"nnunet_oneshot_trainers"}
    assert result["nnunetv2"] == find_spec("nnunetv2").origin  # type: ignore[union-attr]


def test_found_beside_an_editable_nnunet(wheel: Path, environment: Path, tmp_path: Path) -> None:
    checkout = _nnunet_checkout(tmp_path / "checkout")
    _install(environment, ["-e", str(checkout), "--no-build-isolation"])
    _install(environment, [str(wheel)])
    result = _probe(environment, ["OneShotTrainer"])
    assert result["nnunetv2"] == str(checkout / "nnunetv2" / "__init__.py")
    assert Path(result["found"]["OneShotTrainer"]).parent.name == "nnunet_oneshot_trainers"


def test_the_users_own_trainers_stay_first(wheel: Path, environment: Path, tmp_path: Path) -> None:
    own = tmp_path / "own"
    own.mkdir()
    trainer = "from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer\n\n"
    for name in ("MyTrainer", "OneShotTrainer_small"):
        trainer += f"class {name}(nnUNetTrainer):\n    def __init__(self):\n        pass\n\n"
    (own / "own_trainer.py").write_text(trainer)
    _install(environment, [str(wheel)])
    result = _probe(environment, ["MyTrainer", "OneShotTrainer_small", "OneShotTrainer"], str(own))
    assert result["ext"].split(os.pathsep)[0] == str(own)
    assert [Path(file).parent.name for file in result["found"].values()] == ["own", "own", "nnunet_oneshot_trainers"]


def test_an_editable_install_finds_the_trainers_of_the_checkout(environment: Path) -> None:
    _install(environment, ["-e", str(ROOT), "--no-build-isolation"])
    result = _probe(environment, ["OneShotTrainer"])
    assert Path(result["found"]["OneShotTrainer"]).parent == ROOT / "trainers"


def _nnunet_checkout(folder: Path) -> Path:
    source = Path(find_spec("nnunetv2").origin).parent  # type: ignore[union-attr, arg-type]
    shutil.copytree(source, folder / "nnunetv2", ignore=shutil.ignore_patterns("__pycache__", "tests"))
    (folder / "pyproject.toml").write_text(
        '[build-system]\nrequires = ["hatchling"]\nbuild-backend = "hatchling.build"\n'
        '[project]\nname = "nnunetv2"\nversion = "2.8.1"\n'
        '[tool.hatch.build]\ndev-mode-dirs = ["."]\n'
        '[tool.hatch.build.targets.wheel]\npackages = ["nnunetv2"]\n'
    )
    return folder


def _install(environment: Path, arguments: Sequence[str]) -> None:
    pip = [sys.executable, "-m", "pip", "--python", str(_python(environment)), "install"]
    _run([*pip, "--no-deps", "--no-index", "--quiet", "--disable-pip-version-check", *arguments])


def _probe(environment: Path, names: Sequence[str], ext_trainer: str | None = None) -> dict:
    clean = {key: value for key, value in os.environ.items() if key not in ("nnUNet_extTrainer", "PYTHONPATH")}
    if ext_trainer is not None:
        clean["nnUNet_extTrainer"] = ext_trainer
    output = _run([str(_python(environment)), "-c", PROBE, *names], cwd=environment, env=clean)
    return json.loads(output.splitlines()[-1])


def _python(environment: Path) -> Path:
    return next(path for path in (environment / "bin/python", environment / "Scripts/python.exe") if path.exists())


def _run(command: Sequence[str], **options: object) -> str:
    run: Callable[..., subprocess.CompletedProcess[str]] = subprocess.run
    done = run(command, capture_output=True, encoding="utf-8", **options)
    assert done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"
    return done.stdout
