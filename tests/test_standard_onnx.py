"""The export in standard operators: no operator of another domain, the same integers, the logits of torch."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("optimum.exporters.onnx", reason="optimum-onnx is not installed: pip install optimum-onnx")
pytest.importorskip("torch", reason="the conversion layer needs edgeguard-runtime[convert]")

import onnx  # noqa: E402
import onnxruntime  # noqa: E402
from numpy.typing import NDArray  # noqa: E402
from onnx import numpy_helper  # noqa: E402
from test_onnx_graph import BASE, LENGTHS, changed, random_weights, rounded, sample, torch_logits  # noqa: E402

from convert.export.onnx_graph import LABELS_KEY, StudentConfig  # noqa: E402
from convert.export.standard_onnx import build_standard_graph, export_standard  # noqa: E402
from convert.quantize import Int4Weight, quantize_int4  # noqa: E402
from edgeguard.errors import ParityError  # noqa: E402

LABELS = tuple(f"label{i}" for i in range(BASE.head_size))
STRUCTURE_TOLERANCE = 1e-4  # the same arithmetic in float32; differences seen are about 1e-6


def unoptimized(model: onnx.ModelProto, ids: NDArray[np.int64], mask: NDArray[np.int64]) -> NDArray[np.float32]:
    """Every node as it stands: no fusion into INT8 kernels, so differences are faults."""
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    logits: NDArray[np.float32] = session.run(["logits"], {"input_ids": ids, "attention_mask": mask})[0]
    return logits


@pytest.fixture(scope="module")
def model() -> onnx.ModelProto:
    return build_standard_graph(random_weights(BASE), BASE, labels=LABELS)


def test_only_standard_operators_and_the_guards_inputs(model: onnx.ModelProto) -> None:
    onnx.checker.check_model(model, full_check=True)
    assert {node.domain for node in model.graph.node} == {""}
    assert [(opset.domain, opset.version) for opset in model.opset_import] == [("", 21)]
    assert [value.name for value in model.graph.input] == ["input_ids", "attention_mask"]
    assert [value.name for value in model.graph.output] == ["logits"]
    assert [prop.key for prop in model.metadata_props] == [LABELS_KEY]


def test_logits_are_those_of_torch(model: onnx.ModelProto) -> None:
    ids, mask = sample(LENGTHS)
    logits = unoptimized(model, ids, mask)
    assert np.abs(logits - torch_logits(rounded(random_weights(BASE)), BASE, ids, mask)).max() < STRUCTURE_TOLERANCE
    for row, length in enumerate(LENGTHS):
        alone = unoptimized(model, ids[row : row + 1, :length], mask[row : row + 1, :length])
        assert np.abs(alone[0] - logits[row]).max() < STRUCTURE_TOLERANCE


@pytest.mark.parametrize(
    "config",
    [changed(num_kv_heads=1), changed(num_heads=6, num_kv_heads=3, head_dim=32), changed(num_layers=1)],
    ids=["one key-value head", "heads wider than hidden", "one layer"],
)
def test_other_shapes(config: StudentConfig) -> None:
    weights = random_weights(config)
    ids, mask = sample(LENGTHS)
    logits = unoptimized(build_standard_graph(weights, config), ids, mask)
    assert np.abs(logits - torch_logits(rounded(weights), config, ids, mask)).max() < STRUCTURE_TOLERANCE


def test_integers_and_scales_are_the_same(model: onnx.ModelProto) -> None:
    stored = {tensor.name: tensor for tensor in model.graph.initializer}
    found = 0
    for name, weight in random_weights(BASE).items():
        if not name.endswith("_proj.weight"):
            continue
        expected, key = quantize_int4(weight), name.removeprefix("model.")
        integers = numpy_helper.to_array(stored[f"{key}.int4"]).astype(np.int8)
        assert np.array_equal(integers.T + 8, expected.nibbles), name
        assert np.array_equal(numpy_helper.to_array(stored[f"{key}.scales"]).T, expected.scales), name
        found += 1
    assert found == 7 * BASE.num_layers
    embedding = Int4Weight.unpack_matmulnbits(
        numpy_helper.to_array(stored["embed.int4"]).reshape(BASE.vocab_size, -1, 16),
        numpy_helper.to_array(stored["embed.scales"]),
    )
    assert np.array_equal(embedding.nibbles, quantize_int4(random_weights(BASE)["model.embed_tokens.weight"]).nibbles)


def test_the_file_holds_four_bits_and_a_half_a_weight(model: onnx.ModelProto) -> None:
    quantized = sum(int(np.prod(s)) for n, s in BASE.shapes().items() if len(s) == 2 and n != "head.weight")
    stored = [t for t in model.graph.initializer if t.name.endswith((".int4", ".scales"))]
    assert sum(len(t.raw_data) for t in stored) == quantized * 18 // 32
    floats = sum(len(t.raw_data) for t in model.graph.initializer if t.data_type == onnx.TensorProto.FLOAT)
    assert floats < 4 * sum(int(np.prod(s)) for n, s in BASE.shapes().items() if len(s) == 1 or n[0] == "h") + 200


def test_export_saves_what_it_checked_and_nothing_else(tmp_path: Path) -> None:
    weights = random_weights(BASE)
    ids, mask = sample(LENGTHS)
    expected = torch_logits(rounded(weights), BASE, ids, mask)
    path = tmp_path / "model.standard.onnx"
    # onnxruntime fuses DequantizeLinear and MatMul into its INT8 kernel, whose rounding is seen up to 0.3 here.
    figures = export_standard(weights, BASE, path, expected, ids, mask, tolerance=0.5, labels=LABELS)
    assert figures["n"] == len(LENGTHS) and figures["max_abs_diff"] <= 0.5
    assert [p.name for p in tmp_path.iterdir()] == [path.name]
    with pytest.raises(ParityError, match="does not reproduce the model"):
        export_standard(weights, BASE, tmp_path / "other.onnx", expected + 1, ids, mask, tolerance=0.5)
    assert [p.name for p in tmp_path.iterdir()] == [path.name]


def test_another_number_of_labels_is_refused() -> None:
    with pytest.raises(ValueError, match="expected 16 labels"):
        build_standard_graph(random_weights(BASE), BASE, labels=LABELS[:2])
