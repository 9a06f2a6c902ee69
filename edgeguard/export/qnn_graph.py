"""A guard as a graph for Qualcomm's NPU (HTP): one fixed length, quantized tensors between all operators (QDQ).

The same code makes the float32 graph that is calibrated and the quantized graphs of all lengths, so names and ranges
are theirs alike. What the NPU wants:

- Fixed shapes. Texts are padded on the right: attention is causal, so nothing after a text is seen by it, and padding
  needs no mask; the input ``last`` says which row is read.
- 16-bit activations (uint16, one scale a tensor), because residual streams of language models have channels hundreds of
  times larger than others; INT8 weights with a scale for each output channel.
- The tokens that every text begins with are not computed. Their residuals are the largest of all by far (26,000 against
  100 in edgeguard-mini), and would leave the others a few steps. What later tokens see of them, keys and values, never
  changes, and is a constant (PrefixQuant, arXiv 2410.05265).
- Operators that only move data keep the scale of what they move.
- A masked score is not -10,000, which would take all steps of its tensor, but a little less than any real score of the
  layer.

Sources: onnxruntime-qnn ``docs/execution_providers/QNN-ExecutionProvider.md`` and
``onnxruntime.quantization.execution_providers.qnn`` (types and fixed scales); transformers ``modeling_llama.py``.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

from edgeguard.engines.int4_weights import StudentConfig, Weights, as_float32

__all__ = [
    "Prefix",
    "Quantized",
    "QuantizedWeights",
    "Range",
    "Ranges",
    "build_qnn_graph",
    "integers_name",
    "key_and_value",
    "quantize_weights",
]

OPSET, IR_VERSION = 23, 11  # the first with RMSNormalization; 21 has uint16 in QuantizeLinear
STEPS_16, STEPS_8 = 65535, 127
LEAST_WIDTH = 1e-4  # of a range: a tensor of zeros has a scale too
MASKED_BELOW = 20.0  # under the smallest score of a layer: e^-20 of the share that it would have had


@dataclass(frozen=True)
class Range:
    """The values of a tensor, zero among them; ``symmetric``: the same to both sides."""

    low: float
    high: float

    @property
    def scale(self) -> float:
        """Of a step of uint16."""
        return max(self.high - self.low, LEAST_WIDTH) / STEPS_16

    @property
    def zero_point(self) -> int:
        """The integer that is 0.0."""
        return min(STEPS_16, max(0, round(-self.low / self.scale)))

    def quantize(self, values: NDArray[np.float32]) -> NDArray[np.uint16]:
        """Nearest steps, cut to the range."""
        steps: NDArray[np.uint16] = np.clip(np.rint(values / self.scale) + self.zero_point, 0, STEPS_16).astype(
            np.uint16
        )
        return steps

    @classmethod
    def of(cls, low: float, high: float) -> Range:
        """The range from ``low`` to ``high``, and 0."""
        return cls(min(0.0, low), max(0.0, high))

    @classmethod
    def symmetric(cls, low: float, high: float) -> Range:
        """The same to both sides of 0, which is step 32768."""
        largest = max(-low, high, LEAST_WIDTH)
        return cls(-largest * 32768 / 32767, largest)


Ranges = Mapping[str, Range]


@dataclass(frozen=True, eq=False)
class Quantized:
    """Integers with their scales: [K, N] int8 and [N], or a table of uint16 and its one range."""

    integers: NDArray[Any]
    scales: NDArray[np.float32]
    zero_point: int = 0


QuantizedWeights = Mapping[str, Quantized]


@dataclass(frozen=True, eq=False)
class Prefix:
    """The first tokens of all texts: for each layer keys (turned) and values, float32 [1, key-value heads, n, dim]."""

    keys: Sequence[NDArray[np.float32]]
    values: Sequence[NDArray[np.float32]]

    @property
    def length(self) -> int:
        """How many tokens."""
        return int(self.keys[0].shape[2])


def quantize_weights(weights: Weights, config: StudentConfig) -> dict[str, Quantized]:
    """INT8 matrices, transposed to [K, N], with a scale for each of N channels; the embedding in uint16.

    The scores' factor ``head_dim ** -0.5`` goes into the queries' scales.
    """
    quantized = {}
    for name in config.shapes():
        if len(config.shapes()[name]) == 1:
            continue
        values = as_float32(weights[name])
        if name == "model.embed_tokens.weight":
            table = Range.of(float(values.min()), float(values.max()))
            quantized[name] = Quantized(table.quantize(values), np.array(table.scale, np.float32), table.zero_point)
            continue
        scales = np.maximum(np.abs(values).max(axis=1), LEAST_WIDTH) / STEPS_8
        integers = np.rint(values / scales[:, None]).astype(np.int8).T
        if name.endswith("q_proj.weight"):
            scales = scales * config.head_dim**-0.5
        quantized[name] = Quantized(np.ascontiguousarray(integers), scales.astype(np.float32))
    return quantized


def integers_name(weight: str) -> str:
    """The initializer that holds the integers of a weight."""
    return f"{weight}.integers"


def key_and_value(layer: int) -> tuple[str, str]:
    """The tensors that a :class:`Prefix` is made of, in a graph without one."""
    return f"layers.{layer}.attention.key_rope", f"layers.{layer}.attention.value_heads"


def build_qnn_graph(
    weights: Weights,
    config: StudentConfig,
    length: int,
    prefix: Prefix | None = None,
    quantized: tuple[Ranges, QuantizedWeights] | None = None,
) -> tuple[onnx.ModelProto, list[str]]:
    """The graph for rows of ``length`` tokens, and the names of its tensors that have ranges.

    Inputs: ``input_ids`` int32 [1, length], ``last`` int32 [1], the place of the last token; output: ``logits`` float32
    [1, K]. ``prefix``: of the tokens that every row begins with; None to compute them too. ``quantized``: ranges of all
    those tensors and the weights of :func:`quantize_weights`; None for the float32 graph, which has the names alone.
    """
    graph = _QnnGraph(weights, config, length, prefix, quantized)
    graph.build()
    return graph.model(), graph.ranged


class _QnnGraph:
    """The graph as it grows."""

    def __init__(
        self,
        weights: Weights,
        config: StudentConfig,
        length: int,
        prefix: Prefix | None,
        quantized: tuple[Ranges, QuantizedWeights] | None,
    ) -> None:
        self.weights, self.config, self.length = weights, config, length
        self.prefix, self.known = prefix, 0 if prefix is None else prefix.length
        self.ranges: Ranges | None = None if quantized is None else quantized[0]
        self.quantized: QuantizedWeights = {} if quantized is None else quantized[1]
        self.nodes: list[onnx.NodeProto] = []
        self.initializers: dict[str, onnx.TensorProto] = {}
        self.ranged: list[str] = []
        self.range_of: dict[str, str] = {}  # tensor -> the tensor whose range it has
        self.placed: dict[str, Range] = {}  # that tensor -> its range

    def model(self) -> onnx.ModelProto:
        """Wrap what was built."""
        inputs = [
            helper.make_tensor_value_info("input_ids", TensorProto.INT32, [1, self.length]),
            helper.make_tensor_value_info("last", TensorProto.INT32, [1]),
        ]
        logits = helper.make_tensor_value_info("logits", TensorProto.FLOAT, [1, self.config.head_size])
        graph = helper.make_graph(self.nodes, "guard", inputs, [logits], list(self.initializers.values()))
        opsets = [helper.make_opsetid("", OPSET)]
        return helper.make_model(graph, producer_name="edgeguard", opset_imports=opsets, ir_version=IR_VERSION)

    def build(self) -> None:
        """From token ids to logits."""
        cfg = self.config
        self._tables()
        x = self._embedding()
        for layer in range(cfg.num_layers):
            name, prefix = f"layers.{layer}", f"model.layers.{layer}"
            normed = self._norm(x, f"{prefix}.input_layernorm.weight", f"{name}.attention.normed")
            attended = self._attention(layer, f"{name}.attention", f"{prefix}.self_attn", normed)
            x = self._node("Add", [x, attended], f"{name}.attended")
            if layer == cfg.num_layers - 1:  # from here on, only one row is read
                x = self._last_row(x)
            normed = self._norm(x, f"{prefix}.post_attention_layernorm.weight", f"{name}.mlp.normed")
            x = self._node("Add", [x, self._mlp(f"{name}.mlp", f"{prefix}.mlp", normed)], f"{name}.out")
        x = self._norm(x, "model.norm.weight", "normed")
        x = self._move("Reshape", [x, self._shape("row", [1, cfg.hidden_size])], "row")
        x = self._linear(x, "head.weight", "head.product")
        self._node("Add", [x, self._constant("head.bias", as_float32(self.weights["head.bias"]))], "logits")

    def _tables(self) -> None:
        """Cosine, sine [1, 1, n, head_dim / 2] of the n tokens that are computed; mask [1, 1, groups * n, length]."""
        cfg, length = self.config, self.length
        steps = np.arange(0, cfg.head_dim, 2, dtype=np.float32) / np.float32(cfg.head_dim)
        divisors = np.float32(cfg.rope_theta) ** steps
        if cfg.rope_factors is not None:
            divisors *= np.array(cfg.rope_factors, np.float32)
        angles = np.arange(self.known, length, dtype=np.float32)[:, None] / divisors
        self._constant("cos", np.cos(angles)[None, None], Range(-1.0, 1.0))
        self._constant("sin", np.sin(angles)[None, None], Range(-1.0, 1.0))
        depth = np.float32(self._mask_depth())
        mask = np.triu(np.full((length, length), -depth, np.float32), k=1)[self.known :]
        groups = cfg.num_heads // cfg.num_kv_heads
        self._constant("mask", np.tile(mask, (groups, 1))[None, None], Range(-float(depth), 0.0))

    def _mask_depth(self) -> float:
        """More than the scores of any layer spread, so that a masked one is under every other."""
        if self.ranges is None:
            return 1e4
        spread = [r.high - r.low for name, r in self.ranges.items() if name.endswith(".scores")]
        return max(spread) + MASKED_BELOW

    def _embedding(self) -> str:
        name = "model.embed_tokens.weight"
        if self.ranges is None:
            self._initializer(name, as_float32(self.weights[name]))
        else:
            table = self.quantized[name]
            steps = [self._initializer(f"{name}.scale", table.scales), self._zero(name, table.zero_point)]
            self._add("DequantizeLinear", [self._initializer(integers_name(name), table.integers), *steps], name)
            self.range_of[name] = name
        ids = "input_ids"
        if self.known:
            ends = [self._shape("known", [self.known]), self._shape("length", [self.length]), self._shape("axis", [1])]
            ids = self._add("Slice", [ids, *ends], "computed_ids")
        return self._move("Gather", [name, ids], "embedded")

    def _last_row(self, x: str) -> str:
        """[1, n, hidden] -> [1, 1, hidden]; ``last`` counts the tokens that were not computed."""
        if self.known:
            zeros = np.zeros((1, self.known, self.config.hidden_size), np.float32)
            zeros_name = self._constant("not_computed", zeros, self.placed.get(self.range_of.get(x, x)))
            x = self._move("Concat", [zeros_name, x], "all_rows", axis=1)
        return self._move("Gather", [x, "last"], "last_row", axis=1)

    def _norm(self, x: str, weight: str, name: str) -> str:
        gamma = as_float32(self.weights[weight])
        scale = self._constant(weight, gamma, Range.of(float(gamma.min()), float(gamma.max())))
        return self._node("RMSNormalization", [x, scale], name, axis=-1, epsilon=self.config.rms_norm_eps)

    def _attention(self, layer: int, name: str, prefix: str, normed: str) -> str:
        """Grouped queries: the heads of one key-value head stand below each other, so no key is repeated."""
        cfg = self.config
        heads, kv_heads, dim = cfg.num_heads, cfg.num_kv_heads, cfg.head_dim
        if self.prefix is not None:  # what is put together has one range
            self.range_of |= {f"{name}.key_rope": f"{name}.keys", f"{name}.value": f"{name}.values"}
        query = self._heads(self._linear(normed, f"{prefix}.q_proj.weight", f"{name}.query"), heads)
        key = self._heads(self._linear(normed, f"{prefix}.k_proj.weight", f"{name}.key"), kv_heads)
        value = self._linear(normed, f"{prefix}.v_proj.weight", f"{name}.value", symmetric=True)
        value = self._heads(value, kv_heads)
        query = self._rope(query, f"{name}.query_rope")
        key = self._rope(key, f"{name}.key_rope", symmetric=True)
        if self.prefix is not None:
            key = self._after(self.prefix.keys[layer], key, f"{name}.keys")
            value = self._after(self.prefix.values[layer], value, f"{name}.values")
        query = self._move("Reshape", [query, self._shape("grouped", [0, kv_heads, -1, dim])], f"{name}.query_grouped")
        key = self._move("Transpose", [key], f"{name}.key_columns", perm=[0, 1, 3, 2])
        scores = self._node("MatMul", [query, key], f"{name}.scores")
        masked = self._node("Add", [scores, "mask"], f"{name}.masked")
        shares = self._node("Softmax", [masked], f"{name}.shares", axis=-1)
        context = self._node("MatMul", [shares, value], f"{name}.context")
        context = self._move("Reshape", [context, self._shape("heads", [0, heads, -1, dim])], f"{name}.context_heads")
        context = self._move("Transpose", [context], f"{name}.context_rows", perm=[0, 2, 1, 3])
        context = self._move("Reshape", [context, self._shape("flat", [0, 0, cfg.query_size])], f"{name}.context_flat")
        return self._linear(context, f"{prefix}.o_proj.weight", f"{name}.output")

    def _after(self, known: NDArray[np.float32], x: str, name: str) -> str:
        """What the prefix holds, and ``x`` after it."""
        found = None if self.ranges is None else Range.symmetric(self.ranges[name].low, self.ranges[name].high)
        return self._node("Concat", [self._constant(f"{name}.known", known, found), x], name, symmetric=True, axis=2)

    def _heads(self, x: str, heads: int) -> str:
        """[1, length, heads * dim] -> [1, heads, length, dim]."""
        shape = self._shape(f"heads_{heads}", [0, 0, heads, self.config.head_dim])
        parted = self._move("Reshape", [x, shape], f"{x}_parted")
        return self._move("Transpose", [parted], f"{x}_heads", perm=[0, 2, 1, 3])

    def _rope(self, x: str, name: str, *, symmetric: bool = False) -> str:
        """Turn the halves of each head's rows by the angles of their places."""
        first, second = f"{name}.first", f"{name}.second"
        self._move("Split", [x], first, second, axis=-1, num_outputs=2)
        turned = [
            self._node("Mul", [half, table], f"{half}_{table}") for half in (first, second) for table in ("cos", "sin")
        ]
        owner = self.range_of.get(name, name)
        self.range_of |= {f"{name}.turned_first": owner, f"{name}.turned_second": owner}
        left = self._node("Sub", [turned[0], turned[3]], f"{name}.turned_first", symmetric=symmetric)
        right = self._node("Add", [turned[1], turned[2]], f"{name}.turned_second", symmetric=symmetric)
        return self._node("Concat", [left, right], name, symmetric=symmetric, axis=-1)

    def _mlp(self, name: str, prefix: str, normed: str) -> str:
        gate = self._linear(normed, f"{prefix}.gate_proj.weight", f"{name}.gate")
        share = self._node("Sigmoid", [gate], f"{name}.sigmoid")
        gate = self._node("Mul", [gate, share], f"{name}.silu")
        up = self._linear(normed, f"{prefix}.up_proj.weight", f"{name}.up")
        both = self._node("Mul", [gate, up], f"{name}.both")
        return self._linear(both, f"{prefix}.down_proj.weight", f"{name}.down")

    def _linear(self, x: str, weight: str, name: str, *, symmetric: bool = False) -> str:
        return self._node("MatMul", [x, self._matrix(weight)], name, symmetric=symmetric)

    def _matrix(self, name: str) -> str:
        """[K, N]: float32, or INT8 with its scales."""
        if self.ranges is None:
            values = as_float32(self.weights[name]).T
            factor = np.float32(self.config.head_dim**-0.5 if name.endswith("q_proj.weight") else 1)
            return self._initializer(name, values * factor)
        held = self.quantized[name]
        integers = self._initializer(integers_name(name), held.integers)
        scales = self._initializer(f"{name}.scales", held.scales)
        zeros = self._initializer(f"{name}.zeros", np.zeros(held.scales.shape, np.int8))
        return self._add("DequantizeLinear", [integers, scales, zeros], name, axis=1)

    def _node(
        self,
        op: str,
        inputs: list[str],
        name: str,
        *,
        symmetric: bool = False,
        **attributes: Any,  # noqa: ANN401 - whatever the operator takes
    ) -> str:
        """An operator that computes: its output has a range of its own."""
        self.ranged.append(name)
        if self.ranges is None:
            return self._add(op, inputs, name, **attributes)
        owner = self.range_of.setdefault(name, name)
        found = self.ranges[owner]
        if symmetric:
            found = Range.symmetric(found.low, found.high)
        self._put_range(owner, self._fixed_range(op, name, found))
        return self._requantized(self._add(op, inputs, f"{name}.raw", **attributes), name)

    def _fixed_range(self, op: str, name: str, found: Range) -> Range:
        """What an operator's output must or may have instead of what was seen."""
        if op == "Sigmoid":
            return Range(0.0, STEPS_16 / 65536)  # the NPU's own scale, 1 / 65536
        if op == "Softmax":
            return Range(0.0, 1.0)
        if name.endswith(".masked"):
            assert self.ranges is not None
            scores = self.ranges[name.removesuffix("masked") + "scores"]
            return Range.of(scores.low - MASKED_BELOW, scores.high)  # what is under it is cut to it
        return found

    def _move(self, op: str, inputs: list[str], *names: str, **attributes: Any) -> str:  # noqa: ANN401 - as above
        """An operator that moves its first input: what comes out has the same range. Returns the first name."""
        if self.ranges is None:
            return self._add(op, inputs, *names, **attributes)
        owner = self.range_of[inputs[0]]
        self._add(op, inputs, *(f"{name}.raw" for name in names), **attributes)
        for name in names:
            self.range_of[name] = owner
            self._requantized(f"{name}.raw", name)
        return names[0]

    def _requantized(self, raw: str, name: str) -> str:
        """Round to the steps of the tensor's range, and say what they are."""
        owner = self.range_of[name]
        steps = [f"{owner}.scale", f"{owner}.zero"]
        self._add("QuantizeLinear", [raw, *steps], f"{name}.uint16")
        return self._add("DequantizeLinear", [f"{name}.uint16", *steps], name)

    def _put_range(self, owner: str, found: Range) -> None:
        self.placed[owner] = found
        self._initializer(f"{owner}.scale", np.array(found.scale, np.float32))
        self._zero(owner, found.zero_point)

    def _zero(self, owner: str, value: int) -> str:
        return self._initializer(f"{owner}.zero", np.array(value, np.uint16))

    def _constant(self, name: str, values: NDArray[np.float32], found: Range | None = None) -> str:
        """A float32 tensor, or its steps of uint16."""
        if name in self.initializers or name in self.range_of:
            return name
        if self.ranges is None:
            return self._initializer(name, values.astype(np.float32))
        found = Range.of(float(values.min()), float(values.max())) if found is None else found
        self.range_of[name] = name
        self._put_range(name, found)
        integers = self._initializer(f"{name}.uint16", found.quantize(values))
        return self._add("DequantizeLinear", [integers, f"{name}.scale", f"{name}.zero"], name)

    def _shape(self, name: str, sizes: list[int]) -> str:
        return self._initializer(f"shape.{name}", np.array(sizes, np.int64))

    def _initializer(self, name: str, array: NDArray[Any]) -> str:
        if name not in self.initializers:
            self.initializers[name] = numpy_helper.from_array(np.ascontiguousarray(array).reshape(array.shape), name)
        return name

    def _add(self, op: str, inputs: list[str], *names: str, **attributes: Any) -> str:  # noqa: ANN401 - as above
        self.nodes.append(helper.make_node(op, inputs, list(names), name=f"{names[0]}/{op}", **attributes))
        return names[0]
