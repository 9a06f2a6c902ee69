"""The target ``qnn``: quantized graphs of fixed lengths, and real runs on Qualcomm's library where it is installed."""

from __future__ import annotations

import importlib.util
import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from cli_support import run

pytest.importorskip("onnx", reason="onnx is not installed: pip install 'edgeguard-runtime[test]'")

import onnx  # noqa: E402
import onnxruntime  # noqa: E402
from export_support import CONFIG, MAX_TOKENS, read_lines, tiny_weights, write_lines  # noqa: E402
from numpy.typing import NDArray  # noqa: E402
from onnx import numpy_helper  # noqa: E402
from tiny import edit_manifest, refresh_files  # noqa: E402

from device_tests.drive import Wanted, run_on_device  # noqa: E402
from device_tests.matrix import matrix  # noqa: E402
from device_tests.qnn.measure import compute_of, emulated_by  # noqa: E402
from device_tests.records import Plan, fell_back  # noqa: E402
from device_tests.targets import TARGETS  # noqa: E402
from edgeguard.bundle import Bundle  # noqa: E402
from edgeguard.export import ExportError  # noqa: E402
from edgeguard.export.make import Export, export_bundle, open_export  # noqa: E402
from edgeguard.export.qnn import family  # noqa: E402
from edgeguard.export.qnn_graph import Prefix, Range, build_qnn_graph, key_and_value, quantize_weights  # noqa: E402

LENGTHS = (64, MAX_TOKENS)
needs_qnn = pytest.mark.skipif(
    importlib.util.find_spec("onnxruntime_qnn") is None,
    reason="needs onnxruntime-qnn: pip install 'edgeguard-runtime[qnn]'",
)
PLAN = Plan(device=None, unit="npu", tokens=(), warmup=0, trials=1)


@pytest.fixture(scope="module")
def export(int4_bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> Export:
    """That bundle for the NPU. Read only: tests that change it copy it."""
    return export_bundle("qnn", int4_bundle, tmp_path_factory.mktemp("exports") / "qnn")


# The graph


def float_logits(ids: list[int], length: int, prefix: Prefix | None = None) -> NDArray[np.float32]:
    """Of the float32 graph, padded with another token than any text has."""
    graph, _ = build_qnn_graph(tiny_weights(), CONFIG, length, prefix)
    session = onnxruntime.InferenceSession(graph.SerializeToString(), providers=["CPUExecutionProvider"])
    row = np.full((1, length), 3, np.int32)
    row[0, : len(ids)] = ids
    logits: NDArray[np.float32] = session.run(None, {"input_ids": row, "last": np.array([len(ids) - 1], np.int32)})[0]
    return logits


def prefix_of(ids: list[int]) -> Prefix:
    graph, _ = build_qnn_graph(tiny_weights(), CONFIG, len(ids))
    names = [name for layer in range(CONFIG.num_layers) for name in key_and_value(layer)]
    graph.graph.output.extend(onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, None) for name in names)
    session = onnxruntime.InferenceSession(graph.SerializeToString(), providers=["CPUExecutionProvider"])
    found = session.run(names, {"input_ids": np.array([ids], np.int32), "last": np.array([0], np.int32)})
    return Prefix(found[0::2], found[1::2])


def test_lengths_and_padding_do_not_change_the_logits() -> None:
    ids = [1, 11, 40, 50, 60, 2, 20]
    wanted = float_logits(ids, len(ids))
    assert np.abs(wanted).max() > 0.5
    for length in (8, 32, 64):
        assert np.abs(float_logits(ids, length) - wanted).max() < 1e-4


@pytest.mark.parametrize("known", [1, 2])
def test_a_prefix_that_is_not_computed_changes_nothing(known: int) -> None:
    ids = [1, 11, 40, 50, 60, 2, 20]
    prefix = prefix_of(ids[:known])
    assert prefix.length == known
    wanted = float_logits(ids, 16)
    assert np.abs(float_logits(ids, 16, prefix) - wanted).max() < 1e-4
    assert np.abs(float_logits([5, 6, *ids[2:]], 16, prefix_of([5, 6])) - wanted).max() > 1e-2


def test_a_range_holds_zero_and_its_ends() -> None:
    found = Range.of(0.5, 3.0)
    assert (found.low, found.zero_point) == (0.0, 0)
    assert list(found.quantize(np.array([-1.0, 0.0, 3.0, 9.0], np.float32))) == [0, 0, 65535, 65535]
    both = Range.symmetric(-2.0, 1.0)
    assert (both.zero_point, both.high) == (32768, 2.0)
    assert Range.of(0.0, 0.0).scale > 0


def test_weights_are_rounded_by_channel() -> None:
    weights = tiny_weights()
    found = quantize_weights(weights, CONFIG)
    name = "model.layers.0.mlp.down_proj.weight"
    held, wanted = found[name], weights[name].dequantize().T  # type: ignore[union-attr]
    assert held.integers.dtype == np.int8
    assert (held.integers.shape, held.scales.shape) == (wanted.shape, wanted.shape[1:])
    assert (np.abs(held.integers * held.scales - wanted) <= held.scales / 2 + 1e-6).all()
    query = found["model.layers.0.self_attn.q_proj.weight"]
    wanted = weights["model.layers.0.self_attn.q_proj.weight"].dequantize().T / 4  # type: ignore[union-attr]
    assert np.abs(query.integers * query.scales - wanted).max() < 0.01


def test_lengths_of_the_family() -> None:
    assert [family(limit) for limit in (512, 200, 64, 40)] == [(64, 128, 256, 512), (64, 128, 200), (64,), (40,)]


# The export


def test_an_export_holds_graphs_that_share_their_weights(export: Export) -> None:
    folder = export.bundle.path
    assert export.facts.model_files == (*(f"model.{length}.onnx" for length in LENGTHS), "weights.bin")
    assert export.facts.check.vectors >= 12 and (export.facts.check.largest_difference or 0) < 1.0
    assert "no NPU" in export.facts.check.not_verified[0]
    for length in LENGTHS:
        model = onnx.load(folder / f"model.{length}.onnx", load_external_data=False)
        assert {node.domain for node in model.graph.node} == {""}
        assert [d.dim_value for d in model.graph.input[0].type.tensor_type.shape.dim] == [1, length]
        outside = [t for t in model.graph.initializer if t.data_location == onnx.TensorProto.EXTERNAL]
        assert len(outside) == 7 * CONFIG.num_layers + 2
        assert {entry.value for t in outside for entry in t.external_data if entry.key == "location"} == {"weights.bin"}
    onnx.checker.check_model(str(folder / "model.64.onnx"), full_check=True)


def test_every_tensor_between_operators_is_quantized(export: Export) -> None:
    model = onnx.load(export.bundle.path / "model.64.onnx")
    readers = {name: node for node in model.graph.node for name in node.input}
    for node in model.graph.node:
        if node.op_type not in ("QuantizeLinear", "DequantizeLinear", "Slice"):
            assert all(readers[name].op_type == "QuantizeLinear" for name in node.output), node.name
    scales = {t.name: numpy_helper.to_array(t) for t in model.graph.initializer if t.name.endswith(".scale")}
    assert all(scale.shape == () and scale > 0 for scale in scales.values())
    mask = numpy_helper.to_array(next(t for t in model.graph.initializer if t.name == "mask.uint16"))
    assert 20 < 65535 * scales["mask.scale"] < 1000  # not -10,000: that would take all steps of the scores
    assert mask.shape == (1, 1, 2 * 63, 64) and set(np.unique(mask)) == {0, 65535}


def test_check_takes_the_shortest_graph(export: Export) -> None:
    code = (
        "import check\n"
        "loaded = []\n"
        "wrapped = check.session\n"
        "check.session = lambda length: loaded.append(length) or wrapped(length)\n"
        "margins = [check.margin_of([1, 11] + [40] * n + [2, 1, 20]) for n in (3, 59, 60)]\n"
        "print(loaded, margins[0] != margins[1])\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=export.bundle.path,
        env={"UNIT": "cpu"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.stdout.strip() == f"[64, 64, {MAX_TOKENS}] True", done.stderr


def test_texts_for_calibration_widen_the_ranges(int4_bundle: Path, export: Export, tmp_path: Path) -> None:
    texts = tmp_path / "texts.jsonl"
    texts.write_text("".join(json.dumps({"prompt": f"the thing {i} @#~{{}}" * 3}) + "\n" for i in range(8)))
    out = tmp_path / "made"
    result = run("export", "--target", "qnn", "--bundle", int4_bundle, "--calibration", texts, "-o", out)
    assert result.exit_code == 0, result.stderr

    def scales(folder: Path) -> dict[str, float]:
        held = onnx.load(folder / "model.64.onnx", load_external_data=False).graph.initializer
        return {t.name: float(numpy_helper.to_array(t)) for t in held if t.name.endswith(".scale")}

    before, after = scales(export.bundle.path), scales(out)
    assert before.keys() == after.keys()
    assert all(after[name] >= before[name] * 0.999 for name in before)
    assert sum(after[name] > before[name] for name in before) > 3


@pytest.mark.parametrize(
    ("text", "target", "code", "says"),
    [
        ("{}\n", "qnn", 2, "line 1: nothing to judge"),
        ("", "qnn", 2, "no rows in it"),
        ('{"prompt": "Hi"}\n', "onnx", 1, "the target 'onnx' calibrates nothing"),
    ],
)
def test_texts_that_cannot_be_used_are_refused(
    text: str, target: str, code: int, says: str, int4_bundle: Path, tmp_path: Path
) -> None:
    (tmp_path / "texts.jsonl").write_text(text)
    arguments = ("--calibration", tmp_path / "texts.jsonl", "-o", tmp_path / "made")
    result = run("export", "--target", target, "--bundle", int4_bundle, *arguments)
    assert result.exit_code == code and says in " ".join(result.stderr.split())
    assert not (tmp_path / "made").exists()


def test_a_bundle_without_onnx_is_refused(int4_bundle: Path, tmp_path: Path) -> None:
    other = Path(shutil.copytree(int4_bundle, tmp_path / "other"))
    edit_manifest(other, lambda manifest: manifest["files"]["model.onnx"].update(engine="gguf"))
    with pytest.raises(ExportError, match="expected a file for the engine 'onnx'"):
        from edgeguard.export.qnn import TARGET

        TARGET.make(Bundle.open(other), tmp_path)


def test_the_extra_that_is_missing_is_named(int4_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "edgeguard.export.qnn_graph", None)
    with pytest.raises(ExportError, match=r"edgeguard-runtime\[qnn\]"):
        export_bundle("qnn", int4_bundle, tmp_path / "made")


# On Qualcomm's library


@pytest.mark.device
@needs_qnn
def test_all_nodes_run_on_the_npu_backend(int4_bundle: Path, export: Export) -> None:
    record = run_on_device(TARGETS["qnn"], export, Bundle.open(int4_bundle), Wanted(PLAN, 0, 0, 300.0))
    assert (record.failures, record.fell_back) == ((), False)
    assert record.golden is not None and record.golden.passed == record.golden.vectors >= 12
    assert record.measured is not None and record.measured.compute.used == ("npu",)
    assert record.measured.compute.nodes is not None and record.measured.compute.nodes["npu"] > 600
    if record.measured.device.architecture == "x86_64":
        assert record.measured.device.emulated_by == "Qualcomm's HTP library on x86_64"
        assert "emulated by Qualcomm's HTP library" in matrix([record], 64)


@pytest.mark.device
@needs_qnn
def test_nodes_that_the_npu_does_not_take_are_marked(int4_bundle: Path, export: Export, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(export.bundle.path, tmp_path / "export"))
    model = onnx.load(folder / "model.64.onnx", load_external_data=False)
    # A detour through an operator that the provider does not know.
    model.graph.node[-1].output[0] = "before"
    model.graph.node.append(onnx.helper.make_node("Det", ["squares"], ["dets"]))
    shape = numpy_helper.from_array(np.array([-1, 1, 1], np.int64), "squares.shape")
    model.graph.initializer.append(shape)
    model.graph.node.insert(
        len(model.graph.node) - 1, onnx.helper.make_node("Reshape", ["before", shape.name], ["squares"])
    )
    back = numpy_helper.from_array(np.array([1, -1], np.int64), "back.shape")
    model.graph.initializer.append(back)
    model.graph.node.append(onnx.helper.make_node("Reshape", ["dets", back.name], ["logits"]))
    (folder / "model.64.onnx").write_bytes(model.SerializeToString())
    refresh_files(folder)
    record = run_on_device(TARGETS["qnn"], open_export(folder), Bundle.open(int4_bundle), Wanted(PLAN, 0, 0, 300.0))
    assert record.failures == () and record.fell_back is True
    assert record.measured is not None and record.measured.compute.used == ("cpu", "npu")
    assert "**partly fell back**" in matrix([record], 64)


@pytest.mark.device
@needs_qnn
def test_a_wrong_golden_vector_fails(int4_bundle: Path, export: Export, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(export.bundle.path, tmp_path / "export"))
    lines = read_lines(folder / "golden.jsonl")
    lines[0]["margin"] += 9
    write_lines(folder / "golden.jsonl", lines)
    refresh_files(folder)
    record = run_on_device(TARGETS["qnn"], open_export(folder), Bundle.open(int4_bundle), Wanted(PLAN, 0, 0, 300.0))
    assert record.failures and all(failure.startswith("golden vector 1 ") for failure in record.failures)


@pytest.mark.device
@needs_qnn
@pytest.mark.parametrize("name", ["model.64.onnx", "weights.bin"])
def test_a_missing_model_fails(name: str, int4_bundle: Path, export: Export, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(export.bundle.path, tmp_path / "export"))
    opened = open_export(folder)
    (folder / name).unlink()  # as on a device that lost it
    record = run_on_device(TARGETS["qnn"], opened, Bundle.open(int4_bundle), Wanted(PLAN, 0, 0, 300.0))
    assert record.golden is None or record.golden.passed == 0
    assert any("run.sh ended with exit code" in failure and name in failure for failure in record.failures)


def test_a_crash_fails(int4_bundle: Path, export: Export, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(export.bundle.path, tmp_path / "export"))
    opened = open_export(folder)
    (folder / "check.py").write_text("import os\nos.kill(os.getpid(), 9)\n")
    record = run_on_device(TARGETS["qnn"], opened, Bundle.open(int4_bundle), Wanted(PLAN, 0, 0, 300.0))
    assert any("run.sh ended with exit code 1" in failure for failure in record.failures), record.failures
    assert record.measured is None and "**failed**" in matrix([record], 64)


def test_a_fall_back_to_the_cpu_is_marked() -> None:
    whole = compute_of("npu", {64: {"npu": 10}, 128: {"npu": 10}})
    assert (whole.used, whole.nodes, fell_back(whole)) == (("npu",), {"npu": 20}, False)
    partly = compute_of("npu", {64: {"npu": 10}, 128: {"cpu": 3, "npu": 7}})
    assert (partly.nodes, fell_back(partly)) == ({"cpu": 3, "npu": 17}, True)
    assert fell_back(compute_of("npu", {64: {"cpu": 10}})) is True
    assert fell_back(compute_of("npu", {64: {}})) is None
    assert compute_of("cpu", {64: {}}).used == ("cpu",)


def test_what_stands_in_for_the_npu_is_named() -> None:
    assert emulated_by("npu", "x86_64") == "Qualcomm's HTP library on x86_64"
    assert emulated_by("npu", "aarch64") is None and emulated_by("npu", "ARM64") is None
    assert emulated_by("cpu", "x86_64") is None
