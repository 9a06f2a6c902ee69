"""The student as an ONNX file of standard operators only: for CoreML, QNN, browsers, whatever knows no com.microsoft.

optimum-onnx traces transformers' own Llama. What it traces has stand-ins for weights, one number each, so the shape may
be as large as it likes; then the INT4 integers take their places, the very ones of the other containers:

- a linear is DequantizeLinear (opset 21, INT4, blocks of 32 along the input axis) before its MatMul;
- the embedding, which no standard operator looks up in INT4, is gathered as bytes and scales, and the looked-up rows
  are unpacked by arithmetic, so the whole table is never expanded;
- the last token's row is taken and multiplied by the head.

Batch and length are free. A compiler that wants fixed ones gets them from onnxruntime's ``make_dynamic_shape_fixed``.
Scales are fp16 behind a Cast, which folds away when the file is loaded; where the group's largest value is positive the
scale is negative, as in the other containers.

Sources: optimum-onnx 0.1 (``optimum.exporters.onnx.export``), onnx ``docs/Operators.md`` (DequantizeLinear 21).
"""

from __future__ import annotations

import contextlib
import tempfile
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

from convert.export.onnx import save_checked
from convert.export.onnx_graph import StudentConfig, Weights, check_weights, with_metadata
from convert.quantize import GROUP_SIZE, Int4Weight, as_int4
from edgeguard.bench.peer_files import transformers_config
from edgeguard.engines.int4_weights import as_float32
from edgeguard.errors import EdgeguardError

if TYPE_CHECKING:
    from torch import Tensor, nn

__all__ = ["StandardOnnxError", "build_standard_graph", "export_standard"]

TRACE_OPSET = 18  # what optimum exports a Llama at
OPSET, IR_VERSION = 21, 10  # the first with INT4 tensors
STANDARD_DOMAINS = {"", "ai.onnx"}
TRACED_VOCABULARY = 32  # rows of the embedding that is traced; its table is replaced


class StandardOnnxError(EdgeguardError):
    """The traced graph is not as expected: another version of optimum-onnx or transformers."""


def export_standard(
    weights: Weights,
    config: StudentConfig,
    path: str | Path,
    reference_logits: NDArray[np.floating[Any]],
    sample_ids: NDArray[np.int64],
    sample_mask: NDArray[np.int64],
    *,
    tolerance: float,
    labels: Sequence[str] = (),
) -> dict[str, float]:
    """Build the graph, check it against torch and save it as ``path``; all as in convert.export.onnx.export_onnx.

    Raises StandardOnnxError as well, see :func:`build_standard_graph`.
    """
    model = build_standard_graph(weights, config, labels=labels).SerializeToString()
    return save_checked(model, path, reference_logits, sample_ids, sample_mask, tolerance=tolerance)


def build_standard_graph(weights: Weights, config: StudentConfig, *, labels: Sequence[str] = ()) -> onnx.ModelProto:
    """The graph of a student in standard operators; ``weights``, inputs, output and ValueError as build_guard_graph.

    Raises StandardOnnxError when the traced graph has an operator of another domain or lacks a weight's place;
    ImportError without optimum-onnx.
    """
    check_weights(weights, config)
    traced = onnx.version_converter.convert_version(_traced(config), OPSET)
    others = sorted({f"{n.domain}.{n.op_type}" for n in traced.graph.node if n.domain not in STANDARD_DOMAINS})
    if others:
        raise StandardOnnxError(f"the traced graph has operators of other domains: {others}.")
    graph = _Graph(traced.graph)
    for name in config.shapes():
        traced_name = name.removeprefix("model.")
        if name.endswith("_proj.weight"):
            graph.replace_linear(traced_name, as_int4(weights[name]))
        elif name.endswith("norm.weight"):
            graph.replace_norm(traced_name, as_float32(weights[name]))
    graph.replace_embedding("embed_tokens.weight", as_int4(weights["model.embed_tokens.weight"]))
    graph.add_head(as_float32(weights["head.weight"]), as_float32(weights["head.bias"]))
    return with_metadata(graph.model(config.head_size), labels, config)


def _traced(config: StudentConfig) -> onnx.ModelProto:
    """The Llama of transformers, as optimum-onnx traces it: input_ids, attention_mask -> last_hidden_state."""
    from optimum.exporters.onnx import export
    from optimum.exporters.onnx.model_configs import LlamaOnnxConfig

    class WithoutPositions(LlamaOnnxConfig):  # type: ignore[misc]
        """Padding is on the right: positions are counted from the left, and need no input."""

        @property
        def inputs(self) -> dict[str, dict[int, str]]:
            return {name: {0: "batch", 1: "length"} for name in ("input_ids", "attention_mask")}

    model = _stand_in(config)
    with tempfile.TemporaryDirectory() as folder, _quiet():
        path = Path(folder) / "traced.onnx"
        # Unfolded: stand-ins must be found again by name.
        description = WithoutPositions(model.config, task="feature-extraction")
        export(model=model, config=description, output=path, opset=TRACE_OPSET, do_constant_folding=False)
        return onnx.load(path)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Tracing warns of every branch it takes; what it made is compared with torch instead."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def _stand_in(config: StudentConfig) -> nn.Module:
    """A LlamaModel of this shape whose linears hold one number each; every number is another, so none are merged."""
    import torch
    from torch import nn
    from transformers import LlamaConfig, LlamaModel

    class StandIn(nn.Module):
        """``x`` [..., K] -> [..., N] with a weight [1, 1] that the graph expands to [K, N]."""

        def __init__(self, linear: nn.Linear, value: float) -> None:
            super().__init__()
            self.shape = (linear.in_features, linear.out_features)
            self.weight = nn.Parameter(torch.full((1, 1), value))

        def forward(self, x: Tensor) -> Tensor:
            return x @ self.weight.expand(*self.shape)

    # Factors of a scaled RoPE divide the frequencies below: as a kind of scaling, they would be traced as branches.
    plain = replace(config, vocab_size=TRACED_VOCABULARY, rope_factors=None)
    shape = LlamaConfig(**transformers_config(plain, labels=(), pad_id=0), use_cache=False)
    shape._attn_implementation = "eager"  # half the nodes of the fused kernel's decomposition
    with torch.device("meta"):
        model = LlamaModel(shape)
    linears = [(name, module) for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    for number, (name, linear) in enumerate(linears):
        model.set_submodule(name, StandIn(linear, 1.0 + number))
    model.embed_tokens = nn.Embedding(TRACED_VOCABULARY, config.hidden_size)
    for number, module in enumerate(m for m in model.modules() if type(m).__name__ == "LlamaRMSNorm"):
        module.weight = nn.Parameter(torch.full((config.hidden_size,), 1.0 + number))
    model.rotary_emb = type(model.rotary_emb)(shape)
    if config.rope_factors is not None:
        model.rotary_emb.inv_freq /= torch.tensor(config.rope_factors)
    made: nn.Module = model.eval()
    return made


class _Graph:
    """A traced graph whose stand-ins are replaced by the student's weights."""

    def __init__(self, traced: onnx.GraphProto) -> None:
        self.inputs, self.hidden = list(traced.input), traced.output[0].name
        self.nodes: list[onnx.NodeProto] = list(traced.node)
        self.initializers: dict[str, onnx.TensorProto] = {t.name: t for t in traced.initializer}

    def model(self, head_size: int) -> onnx.ModelProto:
        """Wrap what was built."""
        logits = helper.make_tensor_value_info("logits", TensorProto.FLOAT, ["batch", head_size])
        graph = helper.make_graph(self.nodes, "guard", self.inputs, [logits], list(self.initializers.values()))
        opsets = [helper.make_opsetid("", OPSET)]
        return helper.make_model(graph, producer_name="edgeguard", opset_imports=opsets, ir_version=IR_VERSION)

    def replace_linear(self, name: str, weight: Int4Weight) -> None:
        """The expanded stand-in becomes DequantizeLinear of ``weight``, stored as [K, N] since MatMul reads that."""
        expand = self._reader(name, "Expand")
        self.initializers[f"{name}.int4"] = _int4_tensor(f"{name}.int4", weight.nibbles.T)
        self._put(f"{name}.scales", weight.scales.T)
        scales = _node("Cast", [f"{name}.scales"], f"{name}.scales_fp32", to=TensorProto.FLOAT)
        inputs = [f"{name}.int4", f"{name}.scales_fp32"]
        values = _node("DequantizeLinear", inputs, expand.output[0], axis=0, block_size=GROUP_SIZE)
        self._replace(name, expand, [scales, values])

    def replace_norm(self, name: str, weight: NDArray[np.float32]) -> None:
        """The stand-in becomes the weight itself."""
        if name not in self.initializers:
            raise StandardOnnxError(f"{name}: the traced graph has no such weight.")
        self._put(name, weight)

    def replace_embedding(self, name: str, weight: Int4Weight) -> None:
        """Gather of the stand-in becomes: gather bytes and scales, part each byte into two elements, multiply."""
        gather = self._reader(name, "Gather")
        ids, rows, width = gather.input[1], weight.shape[0], weight.shape[1]
        self._put("embed.int4", weight.pack_matmulnbits().reshape(rows, width // 2))
        self._put("embed.scales", weight.scales)
        for key, number in {"sixteenth": 1 / 16, "sixteen": 16.0, "eight": 8.0}.items():
            self._put(f"embed.{key}", np.array(number, np.float32))
        self._put("embed.last_axis", np.array([-1], np.int64))
        self._put("embed.groups_shape", np.array([0, 0, width // GROUP_SIZE, GROUP_SIZE], np.int64))
        self._put("embed.row_shape", np.array([0, 0, width], np.int64))
        nodes = [
            _node("Gather", ["embed.int4", ids], "embed.bytes"),
            _node("Cast", ["embed.bytes"], "embed.pairs", to=TensorProto.FLOAT),
            _node("Mul", ["embed.pairs", "embed.sixteenth"], "embed.shifted"),
            _node("Floor", ["embed.shifted"], "embed.odd"),
            _node("Mul", ["embed.odd", "embed.sixteen"], "embed.odd_share"),
            _node("Sub", ["embed.pairs", "embed.odd_share"], "embed.even"),
            _node("Unsqueeze", ["embed.even", "embed.last_axis"], "embed.even_column"),
            _node("Unsqueeze", ["embed.odd", "embed.last_axis"], "embed.odd_column"),
            _node("Concat", ["embed.even_column", "embed.odd_column"], "embed.columns", axis=-1),
            _node("Reshape", ["embed.columns", "embed.groups_shape"], "embed.nibbles"),
            _node("Sub", ["embed.nibbles", "embed.eight"], "embed.integers"),
            _node("Gather", ["embed.scales", ids], "embed.row_scales"),
            _node("Cast", ["embed.row_scales"], "embed.row_scales_fp32", to=TensorProto.FLOAT),
            _node("Unsqueeze", ["embed.row_scales_fp32", "embed.last_axis"], "embed.group_scales"),
            _node("Mul", ["embed.integers", "embed.group_scales"], "embed.values"),
            _node("Reshape", ["embed.values", "embed.row_shape"], gather.output[0]),
        ]
        self._replace(name, gather, nodes)

    def add_head(self, weight: NDArray[np.float32], bias: NDArray[np.float32]) -> None:
        """The final hidden state of each row's last real token, times the head."""
        self._put("head.weight", weight)
        self._put("head.bias", bias)
        self._put("head.one", np.array([1], np.int64))
        self._put("head.two", np.array([2], np.int64))
        self.nodes += [
            _node("ReduceSum", ["attention_mask", "head.one"], "head.count", keepdims=1),
            _node("Sub", ["head.count", "head.one"], "head.last"),
            _node("Unsqueeze", ["head.last", "head.two"], "head.index"),
            _node("GatherND", [self.hidden, "head.index"], "head.row", batch_dims=1),
            _node("Squeeze", ["head.row", "head.one"], "head.hidden"),
            _node("Gemm", ["head.hidden", "head.weight", "head.bias"], "logits", transB=1),
        ]

    def _reader(self, name: str, op: str) -> onnx.NodeProto:
        """The one node that reads the stand-in ``name``."""
        readers = [node for node in self.nodes if name in node.input]
        if [node.op_type for node in readers] != [op]:
            found = [node.op_type for node in readers]
            raise StandardOnnxError(f"{name}: expected one {op} to read it in the traced graph, found {found}.")
        return readers[0]

    def _replace(self, name: str, node: onnx.NodeProto, nodes: Sequence[onnx.NodeProto]) -> None:
        """Put ``nodes`` where ``node`` stands, and forget the stand-in ``name`` that it read."""
        place = next(i for i, other in enumerate(self.nodes) if other is node)
        self.nodes[place : place + 1] = nodes
        del self.initializers[name]

    def _put(self, name: str, array: NDArray[Any]) -> None:
        self.initializers[name] = numpy_helper.from_array(np.ascontiguousarray(array).reshape(array.shape), name)


def _node(op: str, inputs: list[str], output: str, **attributes: Any) -> onnx.NodeProto:  # noqa: ANN401
    node: onnx.NodeProto = helper.make_node(op, inputs, [output], name=f"{output}/{op}", **attributes)
    return node


def _int4_tensor(name: str, nibbles: NDArray[np.uint8]) -> onnx.TensorProto:
    """``nibbles`` [K, N] as an INT4 tensor: two to a byte, the first one low, in two's complement."""
    pairs = np.ascontiguousarray(nibbles).reshape(-1, 2)
    packed = (pairs[:, 0] | (pairs[:, 1] << np.uint8(4))) ^ np.uint8(0x88)
    return helper.make_tensor(name, TensorProto.INT4, nibbles.shape, packed.tobytes(), raw=True)
