"""The target ``ios``: a Core ML package read back and computed by numpy, a GGUF, a Mac behind xcodebuild."""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("onnx", reason="onnx is not installed: pip install 'edgeguard-runtime[test]'")

from cli_support import run  # noqa: E402
from export_support import CONFIG, TOLERANCE, read_lines, tiny_weights, write_lines  # noqa: E402
from tiny import refresh_files  # noqa: E402

from device_tests.drive import Wanted, run_on_device  # noqa: E402
from device_tests.ios.attachments import collect  # noqa: E402
from device_tests.matrix import matrix  # noqa: E402
from device_tests.records import DeviceTestError, Plan  # noqa: E402
from device_tests.targets import TARGETS  # noqa: E402
from edgeguard.bundle import Bundle  # noqa: E402
from edgeguard.engines.int4_weights import Int4Weight  # noqa: E402
from edgeguard.errors import ParityError  # noqa: E402
from edgeguard.export import coreml, coreml_numpy, ios, pte  # noqa: E402
from edgeguard.export.make import Export, export_bundle, open_export  # noqa: E402

needs_coremltools = pytest.mark.skipif(
    importlib.util.find_spec("coremltools") is None, reason=f"coremltools is not installed ({ios.INSTALL})"
)
PLAN = Plan(device=None, unit="npu", tokens=(), warmup=0, trials=1)
HELD = ("model.mlpackage.zip", "model.gguf")


@pytest.fixture(scope="module")
def export(int4_bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> Export:
    """That bundle for iOS, without a ``.pte``. Read only."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pte, "_missing", lambda: ["executorch"])
        return export_bundle("ios", int4_bundle, tmp_path_factory.mktemp("exports") / "ios")


def test_without_coremltools_the_export_is_refused(
    int4_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "coremltools" else find(name))
    result = run("export", "--target", "ios", "--bundle", int4_bundle, "-o", tmp_path / "ios")
    assert result.exit_code == 1 and "needs coremltools, which is not installed" in result.stderr
    assert not (tmp_path / "ios").exists()


@needs_coremltools
def test_the_export_is_verified_as_far_as_it_can_be_here(export: Export) -> None:
    check = export.facts.check
    assert export.facts.model_files[0] == HELD[0]
    assert check.verified[0].endswith("in the functions of [64, 96] tokens")
    assert "it is not Core ML" in check.verified[1]
    assert check.vectors >= 12 and (check.largest_difference or 0) <= TOLERANCE
    assert any("Core ML did not run the package" in line for line in check.not_verified)
    config = json.loads((export.bundle.path / "tokenizer_config.json").read_text())
    model = json.loads((export.bundle.path / "tokenizer.json").read_text())["model"]
    assert config["tokenizer_class"] == "GPT2Tokenizer" and config.get("unk_token") == model["unk_token"]
    readme = (export.bundle.path / "README.md").read_text()
    assert "**Not verified:** Core ML did not run" in readme and "{{" not in readme
    # A package alone has no engine of ours, and the GGUF beside it needs llama.cpp to be judged.
    runs = HELD[1] in export.facts.model_files and importlib.util.find_spec("llama_cpp") is not None
    result = run("verify", export.bundle.path, "--threads", "1")
    assert result.exit_code == 0 and ("skip" in result.stdout) != runs


@needs_coremltools
def test_the_package_states_what_the_swift_code_asks_for(export: Export) -> None:
    with coreml.open_package(export.bundle.path / HELD[0]) as path:
        spec = coreml_numpy.Package(path).spec
    assert spec.specificationVersion == 9  # iOS 18
    assert spec.description.defaultFunctionName == "tokens_96"
    functions = {function.name: function for function in spec.description.functions}
    assert set(functions) == {"tokens_64", "tokens_96"}
    for name, function in functions.items():
        shapes = {one.name: list(one.type.multiArrayType.shape) for one in function.input}
        assert shapes == {"input_ids": [1, int(name.removeprefix("tokens_"))], "last": [1]}
        assert [(one.name, list(one.type.multiArrayType.shape)) for one in function.output] == [
            ("logits", [1, CONFIG.head_size])
        ]


@needs_coremltools
def test_functions_share_their_weights(export: Export) -> None:
    """Four bits and a half a weight, once; a function has its own mask and RoPE tables alone."""
    shapes = CONFIG.shapes().items()
    int4 = sum(int(np.prod(shape)) for name, shape in shapes if len(shape) == 2 and name != "head.weight") * 9 // 16
    with zipfile.ZipFile(export.bundle.path / HELD[0]) as archive:
        (weights,) = [entry for entry in archive.infolist() if entry.filename.endswith("weight.bin")]
        assert archive.testzip() is None and all(entry.date_time[0] == 1980 for entry in archive.infolist())
    tables = sum(2 * length * length + 4 * length * CONFIG.head_dim for length in (64, 96))
    assert int4 < weights.file_size - tables < int4 * 1.25


@needs_coremltools
def test_another_models_package_is_found(export: Export, int4_bundle: Path, tmp_path: Path) -> None:
    changed = tmp_path / "export"
    shutil.copytree(export.bundle.path, changed)
    coreml.write_package(tiny_weights(seed=1), CONFIG, changed / HELD[0], about="another")
    with pytest.raises(ParityError, match="golden vector 1: expected a margin of"):
        ios._check_package(changed)
    with coreml.open_package(changed / HELD[0]) as path:
        package = coreml_numpy.Package(path)
        with pytest.raises(ParityError, match=r"tokens_\d+ has other weights than the bundle"):
            ios._require_same_weights(package, tiny_weights())
        ios._require_same_weights(package, tiny_weights(seed=1))


@needs_coremltools
def test_values_that_fp16_cannot_square_do_no_harm(tmp_path: Path) -> None:
    """A residual stream of thousands, as Llamas have: its squares are beyond FP16."""
    weights, name = dict(tiny_weights()), "model.layers.0.mlp.down_proj.weight"
    down = weights[name]
    assert isinstance(down, Int4Weight)
    weights[name] = Int4Weight(down.nibbles, (down.scales * np.float16(200)).astype(np.float16))
    coreml.write_package(weights, CONFIG, tmp_path / "p.zip", about="large", lengths=(64,))
    ids = np.arange(3, 67, dtype=np.int32)[None]
    with coreml.open_package(tmp_path / "p.zip") as path:
        logits = coreml_numpy.Package(path).run("tokens_64", {"input_ids": ids, "last": np.array([20], np.int32)})
    assert logits.dtype == np.float16 and np.isfinite(logits).all()


# Devices


@needs_coremltools
def test_without_a_mac_numpy_computes(export: Export, int4_bundle: Path) -> None:
    if shutil.which("xcodebuild"):
        pytest.skip("xcodebuild is installed here: run.sh asks Core ML")
    record = run_on_device(TARGETS["ios"], export, Bundle.open(int4_bundle), Wanted(PLAN, 0, 0, 300.0))
    assert record.failures == () and record.golden is not None and record.golden.passed == record.golden.vectors
    assert record.fell_back is True  # the Neural Engine was asked for
    table = matrix([record], 64)
    assert "emulated by numpy" in table and "npu asked for, **fell back**: cpu" in table


@needs_coremltools
def test_a_wrong_golden_vector_and_a_missing_model_fail(export: Export, int4_bundle: Path, tmp_path: Path) -> None:
    if shutil.which("xcodebuild"):
        pytest.skip("xcodebuild is installed here: run.sh asks Core ML")
    changed = Path(shutil.copytree(export.bundle.path, tmp_path / "export"))
    lines = read_lines(changed / "golden.jsonl")
    lines[0]["margin"] += 3
    write_lines(changed / "golden.jsonl", lines)
    refresh_files(changed)
    opened, wanted = open_export(changed), Wanted(PLAN, 0, 0, 300.0)
    record = run_on_device(TARGETS["ios"], opened, Bundle.open(int4_bundle), wanted)
    assert any("golden vector 1" in failure and "expected a margin" in failure for failure in record.failures)
    (changed / HELD[0]).unlink()
    record = run_on_device(TARGETS["ios"], opened, Bundle.open(int4_bundle), wanted)
    assert "run.sh ended with exit code 1" in record.failures[0] and HELD[0] in record.failures[0]


@needs_coremltools
def test_a_crash_of_the_test_fails(
    export: Export, int4_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A script stands for xcodebuild, that ends as the real one does when the test crashes."""
    for name, text in {
        "xcodebuild": 'echo "** TEST FAILED **" >&2; exit 65',
        "xcodegen": "exit 0",
        "xcrun": "exit 0",
    }.items():
        (tmp_path / name).write_text(f"#!/bin/sh\n{text}\n")
        (tmp_path / name).chmod(0o755)
    if not shutil.which("unzip"):
        (tmp_path / "unzip").write_text("#!/bin/sh\nexit 0\n")
        (tmp_path / "unzip").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    record = run_on_device(TARGETS["ios"], export, Bundle.open(int4_bundle), Wanted(PLAN, 0, 0, 60.0))
    shutil.rmtree(TARGETS["ios"].script.parent / "project" / "payload", ignore_errors=True)
    assert record.measured is None and "ended with exit code 65: ** TEST FAILED **" in record.failures[0]


def attached(job: Path, *names: str) -> None:
    folder = job / "attachments"
    folder.mkdir()
    entries: list[dict[str, Any]] = []
    for number, name in enumerate(names):
        (folder / f"{number}.bin").write_text(name)
        entries.append({"exportedFileName": f"{number}.bin", "suggestedHumanReadableName": name})
    (folder / "manifest.json").write_text(json.dumps([{"testIdentifier": "DeviceTest", "attachments": entries}]))


def test_attachments_get_their_names_back(tmp_path: Path) -> None:
    ending = "_0_3F2504E0-4F89-11D3-9A0C-0305E82C3301"
    attached(tmp_path, f"golden.jsonl{ending}.answers", f"measured{ending}.json", f"screen{ending}.png")
    assert collect(tmp_path) == ["golden.jsonl.answers", "measured.json"]
    assert (tmp_path / "measured.json").read_text() == f"measured{ending}.json"


def test_a_test_that_attached_nothing_fails(tmp_path: Path) -> None:
    with pytest.raises(DeviceTestError, match="expected the list of attachments"):
        collect(tmp_path)
    attached(tmp_path, "golden.jsonl.answers")
    with pytest.raises(DeviceTestError, match="expected measured.json among the attachments"):
        collect(tmp_path)
