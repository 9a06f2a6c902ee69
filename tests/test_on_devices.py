"""The shipped guard on every target that this machine reaches: phones, NPUs and their emulators (``-m device``)."""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
from pathlib import Path

import pytest
from click.testing import CliRunner

pytest.importorskip("onnx", reason="onnx is not installed: pip install 'edgeguard-runtime[test]'")

from device_tests.__main__ import main  # noqa: E402
from device_tests.targets import TARGETS, missing_here  # noqa: E402

pytestmark = pytest.mark.device
# What no run can do without, where a device may be absent but its emulator here.
EXTRA = {
    "android": ("EDGEGUARD_ARM64" in os.environ or shutil.which("adb"), "a phone (adb), or EDGEGUARD_ARM64"),
    "executorch": (importlib.util.find_spec("executorch"), "executorch"),
    "ios": (importlib.util.find_spec("coremltools"), "coremltools"),
}


@pytest.mark.parametrize("name", sorted(TARGETS))
def test_the_shipped_guard_gives_its_golden_verdicts(name: str, tmp_path: Path) -> None:
    there, what = EXTRA.get(name, (True, ""))
    if missing := missing_here(TARGETS[name]) + ([] if there else [what]):
        pytest.skip(f"{name} needs {', '.join(missing)}")
    arguments = ["run", name, "--rows", "0", "--no-timing", "--within", "7200", "--results", str(tmp_path)]
    result = CliRunner().invoke(main, arguments, catch_exceptions=False)
    assert result.exit_code == 0, result.output
    (file,) = tmp_path.glob("*.json")
    golden = json.loads(file.read_text())["golden"]
    assert golden["passed"] == golden["vectors"] >= 10
