"""The target ``android``: the bundle's ONNX, a ``.pte`` on ExecuTorch's own runtime, a phone behind adb."""

from __future__ import annotations

import importlib.util
import os
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("onnx", reason="onnx is not installed: pip install 'edgeguard-runtime[test]'")
pytest.importorskip("torch", reason="torch is not installed: pip install 'edgeguard-runtime[convert]'")

from export_support import CONFIG, TOLERANCE, read_lines, tiny_weights, write_lines  # noqa: E402
from tiny import refresh_files  # noqa: E402

from device_tests.drive import Wanted, run_on_device  # noqa: E402
from device_tests.matrix import matrix  # noqa: E402
from device_tests.records import DeviceTestError, Plan, Record  # noqa: E402
from device_tests.targets import TARGETS  # noqa: E402
from edgeguard.bundle import Bundle  # noqa: E402
from edgeguard.errors import ParityError  # noqa: E402
from edgeguard.export import pte  # noqa: E402
from edgeguard.export.golden import read_golden  # noqa: E402
from edgeguard.export.make import Export, export_bundle, open_export  # noqa: E402
from edgeguard.export.target import SAMPLES  # noqa: E402

needs_torch = pytest.mark.skipif(importlib.util.find_spec("torch") is None, reason="torch is not installed")
needs_executorch = pytest.mark.skipif(
    importlib.util.find_spec("executorch") is None, reason=f"executorch is not installed ({pte.INSTALL})"
)
needs_arm64 = pytest.mark.skipif(
    "EDGEGUARD_ARM64" not in os.environ, reason="EDGEGUARD_ARM64 names no folder of device_tests/android/arm64.sh"
)
PLAN = Plan(device=None, unit="cpu", tokens=(24,), warmup=1, trials=2)


@pytest.fixture(scope="module")
def export(int4_bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> Export:
    """That bundle for Android, without a ``.pte``. Read only."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pte, "_missing", lambda: ["executorch"])
        return export_bundle("android", int4_bundle, tmp_path_factory.mktemp("exports") / "android")


@pytest.fixture(scope="module")
def with_pte(int4_bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> Export:
    """That bundle for Android, with a ``.pte``. Read only."""
    return export_bundle("android", int4_bundle, tmp_path_factory.mktemp("exports") / "pte")


# The export


def test_without_executorch_the_export_says_what_was_left_out(export: Export, int4_bundle: Path) -> None:
    check, folder = export.facts.check, export.bundle.path
    assert export.facts.model_files == ("model.onnx",) and not (folder / "model.pte").exists()
    assert (folder / "model.onnx").read_bytes() == (int4_bundle / "model.onnx").read_bytes()
    assert check.vectors >= 12 and check.runtime is not None and check.runtime.startswith("onnxruntime ")
    assert check.not_verified[0].startswith("model.pte was left out: executorch is not installed here")
    assert "nothing ran on Android" in check.not_verified[1]
    assert (folder / "EdgeGuard.kt").read_bytes() == (SAMPLES / "android" / "EdgeGuard.kt").read_bytes()
    readme = (folder / "README.md").read_text()
    assert "**Not verified:** model.pte was left out" in readme and "{{" not in readme


@needs_executorch
def test_executorch_reproduces_the_golden_vectors(with_pte: Export) -> None:
    check = with_pte.facts.check
    assert with_pte.facts.model_files == ("model.onnx", "model.pte")
    assert check.runtime is not None and "executorch 1." in check.runtime
    assert sum("golden vectors in" in line for line in check.verified) == 2
    assert len(check.not_verified) == 1 and (check.largest_difference or 0) <= TOLERANCE


@pytest.mark.slow
@needs_executorch
def test_another_model_is_found(with_pte: Export, tmp_path: Path) -> None:
    other = Path(shutil.copytree(with_pte.bundle.path, tmp_path / "export"))
    from convert.export.pte import write_pte

    write_pte(tiny_weights(seed=1), CONFIG, other / "model.pte", {})
    with pytest.raises(ParityError, match="executorch .* does not reproduce the bundle"):
        pte.check_pte(other)


@needs_torch
def test_the_programs_model_is_the_bundles(export: Export) -> None:
    """In torch, before anything is lowered; smoothed by any powers of two it stays the same."""
    import torch

    from convert.export.pte import Guard

    rng = np.random.default_rng(0)
    shifts = {
        f"layers.{i}.{kind}": rng.integers(-1, 2, CONFIG.hidden_size).astype(np.int8)
        for i in range(CONFIG.num_layers)
        for kind in ("attention", "mlp")
    }
    plain, smoothed = (Guard(tiny_weights(), CONFIG, given).eval() for given in ({}, shifts))
    for line in read_golden(export.bundle.path / "golden.jsonl"):
        with torch.no_grad():
            logits = [guard(torch.tensor([line.ids]))[0] for guard in (plain, smoothed)]
        margins = [float(found[1] - found[0]) for found in logits]
        assert margins == pytest.approx([line.margin] * 2, abs=TOLERANCE)


def test_rows_are_smoothed_as_the_plan_says(tmp_path: Path) -> None:
    pytest.importorskip("onnx", reason="the INT8 graph is written by edgeguard-runtime[convert]")
    pytest.importorskip("torch", reason="the INT8 graph is written by edgeguard-runtime[convert]")
    from tiny_llama import write_llama_bundle

    wanted = {"layers.0.mlp": np.array([1, -1] * 32, np.int8), "layers.1.attention": np.array([2, 0] * 32, np.int8)}
    bundle = Bundle.open(write_llama_bundle(tmp_path / "bundle", shifts=wanted))
    found = pte._shifts(bundle, *pte.student_of(bundle))
    assert {row: shift.tolist() for row, shift in found.items()} == {r: s.tolist() for r, s in wanted.items()}


# A phone: adb, gradle and the app stand here as scripts, run.sh is the real one

ADB = """#!/usr/bin/env bash
# Files go to PHONE; "am instrument" computes with the pushed export's check.py, as the app does with its Kotlin.
set -eu
if [ "$1" = -s ]; then shift 2; fi
case "$1 ${2:-}" in
  "devices ") printf 'List of devices attached\\nPHONE01\\tdevice\\n' ;;
  "push "*) mkdir -p "$PHONE/$(basename "$4")" && cp -R "$3" "$PHONE/$(basename "$4")" ;;
  "shell rm") rm -rf "$PHONE" ;;
  "shell am") mkdir -p "$PHONE/files" && "$PYTHON" "$APP" "$PHONE" ;;
  "exec-out run-as") cat "$PHONE/${5}" ;;
  *) ;;
esac
"""
APP = """
import contextlib, json, pathlib, runpy, subprocess, sys
phone = pathlib.Path(sys.argv[1])
plan = json.loads((phone / "job" / "plan.json").read_text())
command = [sys.executable, phone / "export" / "check.py", phone / "job" / "golden.jsonl"]
done = subprocess.run(command, capture_output=True)
if done.returncode not in (0, 2) or CRASH:
    print("INSTRUMENTATION_CODE: 0\\nProcess crashed.")  # am itself exits with 0
    sys.exit(0)
(phone / "files" / "golden.jsonl.answers").write_bytes(done.stdout)
now = {"load_average": None, "battery_percent": 80.0, "temperature_c": 30.0}
measured = {
    "device": {"name": "Phone", "chip": "Chip 9", "architecture": "arm64-v8a", "system": "Android 16", "ram_bytes": 8,
               "emulated_by": None, "virtual": False},
    "runtime": "onnxruntime-android", "runtime_version": "1.22.0", "threads": 4,
    "compute": {"asked": plan["unit"], "used": ["cpu"], "nodes": None, "evidence": "none other was asked for"},
    "load_ms": 80.0, "peak_bytes": 150000000,
    "timings": [{"tokens": n, "warmup": plan["warmup"], "trials_ms": [40.0] * plan["trials"]} for n in plan["tokens"]],
    "before": now, "after": now,
}
(phone / "files" / "measured.json").write_text(json.dumps(measured))
print("OK (1 test)")
"""


def run_on_phone(
    export: Export, bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, *, crash: bool = False
) -> Record:
    programs = tmp_path / "programs"
    programs.mkdir()
    for name, text in {"adb": ADB, "gradle": "#!/bin/sh\nexit 0\n"}.items():
        (programs / name).write_text(text)
        (programs / name).chmod(0o755)
    (tmp_path / "app.py").write_text(f"CRASH = {crash}\n{APP}")
    monkeypatch.setenv("PATH", f"{programs}:{os.environ['PATH']}")
    monkeypatch.setenv("PHONE", str(tmp_path / "phone"))
    monkeypatch.setenv("APP", str(tmp_path / "app.py"))
    return run_on_device(TARGETS["android"], export, Bundle.open(bundle), Wanted(PLAN, 0, 0, 120.0))


def test_a_phone_that_does_all_right_passes(
    export: Export, int4_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    record = run_on_phone(export, int4_bundle, tmp_path, monkeypatch)
    assert (record.failures, record.fell_back) == ((), False)
    assert record.golden is not None and record.golden.passed == record.golden.vectors >= 12
    assert record.model.size_bytes == (export.bundle.path / "model.onnx").stat().st_size
    assert "| Chip 9 | onnxruntime-android 1.22.0 | cpu |" in matrix([record], 24)


def test_a_wrong_golden_vector_fails(
    export: Export, int4_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    changed = Path(shutil.copytree(export.bundle.path, tmp_path / "export"))
    lines = read_lines(changed / "golden.jsonl")
    lines[0]["margin"] += 3
    lines[1]["ids"][3] += 1
    write_lines(changed / "golden.jsonl", lines)
    refresh_files(changed)
    record = run_on_phone(open_export(changed), int4_bundle, tmp_path, monkeypatch)
    assert any("golden vector 1" in failure and "expected a margin" in failure for failure in record.failures)
    assert any("golden vector 2" in failure and "other token ids" in failure for failure in record.failures)


def test_a_model_that_is_missing_on_the_phone_fails(
    export: Export, int4_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened = open_export(Path(shutil.copytree(export.bundle.path, tmp_path / "export")))
    (opened.bundle.path / "model.onnx").unlink()
    record = run_on_phone(opened, int4_bundle, tmp_path, monkeypatch)
    assert "run.sh ended with exit code 1" in record.failures[0] and "Process crashed" in record.failures[0]


def test_a_crash_of_the_app_fails(
    export: Export, int4_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    record = run_on_phone(export, int4_bundle, tmp_path, monkeypatch, crash=True)
    assert record.measured is None and "Process crashed" in record.failures[0]


def test_without_phone_and_emulator_the_run_says_so(
    export: Export, int4_bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if shutil.which("adb"):
        pytest.skip("adb is installed here")
    monkeypatch.delenv("EDGEGUARD_ARM64", raising=False)
    record = run_on_device(TARGETS["android"], export, Bundle.open(int4_bundle), Wanted(PLAN, 0, 0, 60.0))
    assert "adb sees no Android device" in record.failures[0] and "arm64.sh" in record.failures[0]


def test_an_export_without_the_pte_is_refused(export: Export, int4_bundle: Path) -> None:
    with pytest.raises(DeviceTestError, match=r"expected model.pte, found model.onnx"):
        run_on_device(TARGETS["executorch"], export, Bundle.open(int4_bundle), Wanted(PLAN, 0, 0, 60.0))


# Real runs


@needs_executorch
def test_executorch_on_this_machine(with_pte: Export, int4_bundle: Path) -> None:
    record = run_on_device(TARGETS["executorch"], with_pte, Bundle.open(int4_bundle), Wanted(PLAN, 0, 0, 300.0))
    assert record.failures == () and record.measured is not None
    assert record.measured.runtime == "executorch" and record.measured.device.emulated_by is None
    assert record.model.size_bytes == (with_pte.bundle.path / "model.pte").stat().st_size


@pytest.mark.device
@needs_arm64
def test_arm_kernels_under_qemu(export: Export, int4_bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHON", sys.executable)
    record = run_on_device(TARGETS["android"], export, Bundle.open(int4_bundle), Wanted(PLAN, 0, 0, 600.0))
    assert record.failures == () and record.measured is not None
    assert record.measured.device.architecture == "aarch64"
    assert str(record.measured.device.emulated_by).startswith("qemu-user ")
    assert record.measured.compute.nodes is not None and record.measured.compute.nodes["cpu"] > 20
    table = matrix([record], 24)
    assert "emulated by qemu-user" in table and "| - | - | - | - |" in table
