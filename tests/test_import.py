"""Importing edgeguard is cheap: no engine, no tokenizer, no network library, no training library."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

import edgeguard
from edgeguard.taxonomy import HAZARDS

HEAVY = "torch transformers onnxruntime tokenizers huggingface_hub onnx requests rich matplotlib sklearn scipy".split()


@pytest.mark.parametrize("module", ["edgeguard", "edgeguard.guard", "edgeguard.metrics", "edgeguard.hub"])
def test_importing_loads_nothing_heavy(module: str) -> None:
    code = f"import sys, {module}; print(sorted(set({HEAVY!r}) & set(sys.modules)))"
    environment = {**os.environ, "PYTHONPATH": str(Path(edgeguard.__file__).parents[1])}
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, check=True)
    assert found.stdout == "[]\n"


def test_numpy_comes_with_the_guard() -> None:
    code = "import sys, edgeguard; print('numpy' in sys.modules, edgeguard.Guard.__name__, 'numpy' in sys.modules)"
    environment = {**os.environ, "PYTHONPATH": str(Path(edgeguard.__file__).parents[1])}
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, check=True)
    assert found.stdout == "False Guard True\n"


def test_a_name_that_is_not_there_is_refused() -> None:
    with pytest.raises(AttributeError, match="no attribute 'Gaurd'"):
        edgeguard.Gaurd  # noqa: B018
    assert set(edgeguard.__all__) <= set(dir(edgeguard))


def test_public_names_exist() -> None:
    assert all(hasattr(edgeguard, name) for name in edgeguard.__all__)
    assert issubclass(edgeguard.BundleError, edgeguard.EdgeguardError)


def test_the_package_is_typed() -> None:
    assert (Path(edgeguard.__file__).parent / "py.typed").is_file()


def test_the_taxonomy_is_s1_to_s14() -> None:
    assert list(HAZARDS) == [f"S{i}" for i in range(1, 15)]
    assert len({hazard.name for hazard in HAZARDS.values()}) == 14
    assert all(hazard.definition.endswith(".") for hazard in HAZARDS.values())
