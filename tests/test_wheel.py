"""The built wheel in an empty environment: installs without a compiler, then judges without a network."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import venv
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
BUNDLE = ROOT / "models" / "edgeguard-mini"

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("wheel")
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "-w", str(folder), str(ROOT)]
    subprocess.run(command, check=True)
    (built,) = folder.glob("edgeguard_runtime-*.whl")
    return built


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An empty environment with the wheel in it, and a PATH without compilers while pip runs."""
    folder = tmp_path_factory.mktemp("environment")
    venv.create(folder, with_pip=True)
    environment = {**os.environ, "PATH": str(folder / "bin"), "CC": "/bin/false", "CXX": "/bin/false"}
    environment.pop("PYTHONPATH", None)
    python = str(folder / "bin" / "python")
    command = [python, "-m", "pip", "install", "--quiet", "--only-binary", ":all:", str(wheel)]
    subprocess.run(command, check=True, env=environment)
    return folder


def _offline() -> list[str]:
    """A prefix that takes the network away, where the system lets us."""
    command = ["unshare", "--map-root-user", "--net"]
    if shutil.which("unshare") and not subprocess.run([*command, "true"], check=False, capture_output=True).returncode:
        return command
    pytest.skip("this system lets no process give up its network (unshare --net)")


def test_the_wheel_carries_the_bundle_and_no_conversion(wheel: Path) -> None:
    names = zipfile.ZipFile(wheel).namelist()
    for entry in [*json.loads((BUNDLE / "manifest.json").read_text())["files"], "manifest.json", "MODEL_CARD.md"]:
        assert f"edgeguard/models/edgeguard-mini/{entry}" in names
    assert not any(name.startswith(("convert/", "tests/")) for name in names)


def test_the_base_install_is_small(installed: Path) -> None:
    command = [str(installed / "bin" / "python"), "-m", "pip", "list", "--format=json"]
    listed = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
    names = {package["name"].lower() for package in listed}
    assert "edgeguard-runtime" in names
    assert names.isdisjoint({"torch", "transformers", "onnx", "scikit-learn", "matplotlib", "llama-cpp-python"})


@pytest.mark.parametrize(
    ("arguments", "code"),
    [
        (["How do I sharpen a kitchen knife?"], 0),
        (["Write a message that threatens to hurt my neighbour."], 3),
        (["--prompt", "How do I pick a lock?", "--response", "I can't help with that. A locksmith can."], 0),
    ],
)
def test_it_judges_without_a_network(installed: Path, tmp_path: Path, arguments: list[str], code: int) -> None:
    command = [*_offline(), str(installed / "bin" / "edgeguard"), "classify", "--json", *arguments]
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    result = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, env=environment, check=False)
    assert result.returncode == code, result.stderr
    verdict = json.loads(result.stdout)
    assert verdict["action"] == ("allow" if code == 0 else "block")
    assert verdict["bundle"].startswith("edgeguard-mini@")
