"""The student as an ONNX graph, built from numpy arrays. Never imports torch.

A Llama (pre-norm RMSNorm, rotate-half RoPE, grouped-query attention, SiLU gate) that reads one conversation a row and
returns the head's logits of each row's last real token. Padding is on the right and attention is causal, so real tokens
never see padding. The last layer computes keys and values for every token and all else for the last real token only.

INT4 weights stand in the file as nibbles and fp16 scales; a Cast to float32 in the graph, which onnxruntime folds when
it loads the model, saves 6 % of the file. Operators of the com.microsoft domain: MatMulNBits, GatherBlockQuantized,
GroupQueryAttention, RotaryEmbedding, SkipSimplifiedLayerNormalization, QuickGelu (with alpha 1 it is SiLU).

Sources: transformers ``models/llama/modeling_llama.py`` (names, semantics), onnxruntime ``docs/ContribOperators.md``.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

from convert.quantize import GROUP_SIZE, Int4Weight, as_int4
from edgeguard.engines.gguf_source import LABELS_KEY, ROPE_FACTORS_KEY
from edgeguard.engines.int4_weights import StudentConfig, Weights, as_float32, check_weights

__all__ = [
    "LABELS_KEY",
    "ROPE_FACTORS_KEY",
    "GuardGraph",
    "StudentConfig",
    "Weights",
    "build_guard_graph",
    "check_weights",
    "with_metadata",
]

OPSET = 21  # the first with INT4 tensors
IR_VERSION = 10  # the one of that opset; onnxruntime 1.20 reads it
CONTRIB = "com.microsoft"
ROPE_TABLES = ("rope_cos", "rope_sin")
MASKED = -1e9  # added to the score of a padded key; finite, so that no row can become NaN


def build_guard_graph(
    weights: Weights, config: StudentConfig, *, int4: bool = True, accuracy_level: int = 4, labels: Sequence[str] = ()
) -> onnx.ModelProto:
    """Build the graph of a student.

    ``weights``: float arrays with the names and shapes of ``config.shapes()``; a matrix may be an Int4Weight, whose
    integers are then kept. Inputs of the graph: ``input_ids`` and
    ``attention_mask``, int64 [batch, length], 1 = token, padding on the right, length at most ``config.max_tokens``.
    Output: ``logits`` float32 [batch, head_size] of each row's last real token; every row needs one.

    ``int4=False`` keeps float32 weights, for checks. ``accuracy_level``: of MatMulNBits; 4 rounds its input to INT8 in
    blocks (fast), 1 computes in float32. ``labels``: names of the head's rows, kept in the file's metadata. Raises
    ValueError for a missing, unknown or misshapen weight, or another number of labels.
    """
    check_weights(weights, config)
    graph = GuardGraph(weights, config, int4=int4, accuracy_level=accuracy_level)
    graph.build()
    return with_metadata(graph.model(), labels, config)


def with_metadata(model: onnx.ModelProto, labels: Sequence[str], config: StudentConfig) -> onnx.ModelProto:
    """Keep what the graph cannot say in the metadata of ``model``: the names of the head's rows, and RoPE factors.

    Neither: leave it as it is. Raises ValueError for another number of labels.
    """
    if labels and len(labels) != config.head_size:
        raise ValueError(f"expected {config.head_size} labels, one a row of the head, got {list(labels)}.")
    props: dict[str, list[Any]] = {LABELS_KEY: list(labels)} if labels else {}
    if config.rope_factors is not None:
        props[ROPE_FACTORS_KEY] = list(config.rope_factors)
    if props:
        helper.set_model_props(model, {key: json.dumps(value) for key, value in props.items()})
    return model


def _value_info(name: str, element_type: int, shape: list[str | int]) -> onnx.ValueInfoProto:
    return helper.make_tensor_value_info(name, element_type, shape)


class GuardGraph:
    """Nodes and initializers of one student. Every method that adds nodes returns the name of the result."""

    past = False
    """Whether tokens read before come in as ``past.LAYER.key`` and ``.value`` [batch, kv_heads, past, head_dim].

    ``present.LAYER.key`` and ``.value`` then give those of all tokens. A past of 0 tokens reads from scratch; another
    one needs a batch of 1. ``attention_mask`` is that of the new tokens.
    """

    def __init__(self, weights: Weights, config: StudentConfig, *, int4: bool, accuracy_level: int) -> None:
        """Arguments: see :func:`build_guard_graph`."""
        self.weights, self.config, self.int4, self.accuracy_level = weights, config, int4, accuracy_level
        self.nodes: list[onnx.NodeProto] = []
        self.initializers: dict[str, onnx.TensorProto] = {}

    def build(self) -> None:
        """Add the whole forward pass."""
        cfg = self.config
        self._shared_inputs()
        hidden = self._embedding("input_ids")
        normed = self._node(
            "SimplifiedLayerNormalization",
            [hidden, self._float("model.layers.0.input_layernorm.weight")],
            "layers.0.input_norm",
            axis=-1,
            epsilon=cfg.rms_norm_eps,
        )
        for layer in range(cfg.num_layers):
            last = layer == cfg.num_layers - 1
            attended, hidden = (self._last_row_attention if last else self._attention)(layer, normed, hidden)
            normed, hidden = self._add_and_norm(
                attended, hidden, f"model.layers.{layer}.post_attention_layernorm.weight", f"layers.{layer}.mlp_norm"
            )
            following = "model.norm.weight" if last else f"model.layers.{layer + 1}.input_layernorm.weight"
            name = "final_norm" if last else f"layers.{layer + 1}.input_norm"
            normed, hidden = self._add_and_norm(self._mlp(layer, normed), hidden, following, name)
        row = self._node("Squeeze", [normed, self._constant("axis_1", [1])], "last_hidden")
        head = [self._float("head.weight"), self._float("head.bias")]
        self._node("Gemm", [row, *head], "logits", transB=1)

    def model(self) -> onnx.ModelProto:
        """Wrap what was built; the order of everything is fixed, so equal weights give equal bytes."""
        inputs = [_value_info(name, TensorProto.INT64, ["batch", "length"]) for name in ("input_ids", "attention_mask")]
        outputs = [_value_info("logits", TensorProto.FLOAT, ["batch", self.config.head_size])]
        if self.past:
            inputs += self._caches("past", "past_length")
            outputs += self._caches("present", "total_length")
        graph = helper.make_graph(self.nodes, "guard", inputs, outputs, list(self.initializers.values()))
        opsets = [helper.make_opsetid("", OPSET), helper.make_opsetid(CONTRIB, 1)]
        return helper.make_model(graph, producer_name="edgeguard", opset_imports=opsets, ir_version=IR_VERSION)

    def _caches(self, when: str, length: str) -> list[onnx.ValueInfoProto]:
        shape: list[str | int] = ["batch", self.config.num_kv_heads, length, self.config.head_dim]
        names = [f"{when}.{layer}.{part}" for layer in range(self.config.num_layers) for part in ("key", "value")]
        return [_value_info(name, TensorProto.FLOAT, shape) for name in names]

    def _shared_inputs(self) -> None:
        """What every layer reads: lengths, the place of the last token, the bias of padded keys, the RoPE tables."""
        for name, table in zip(ROPE_TABLES, self._rope_tables(), strict=True):
            self._initializer(name, table)
        count = self._node("ReduceSum", ["attention_mask", self._constant("axis_1", [1])], "token_count", keepdims=1)
        self._node("Sub", [count, self._constant("one", [1])], "last_index")  # [batch, 1], position of the last token
        self._node("Unsqueeze", ["last_index", self._constant("axis_2", [2])], "last_row")  # [batch, 1, 1] for GatherND
        length = self._dimension("input_ids", 1, "length")
        start = self._dimension("past.0.key", 2, "past_length") if self.past else self._scalar("zero", 0)
        if self.past:
            length = self._node("Add", [length, start], "end_position")
            self._node("Add", ["last_index", start], "last_position")
        self._node("Cast", [length], "total_length", to=TensorProto.INT32)
        # GroupQueryAttention is told that padding is text: causal attention hides it from real tokens all the same, and
        # told the truth, onnxruntime 1.20 leaves the padded rows unwritten, whose NaN the last layer would read.
        batch = self._node("Shape", ["input_ids"], "batch", start=0, end=1)
        end = self._node("Sub", ["total_length", self._initializer("one_32", np.array(1, np.int32))], "end")
        self._node("Expand", [end, batch], "seqlens_k")
        positions = [start, length, self._scalar("range_step", 1)]
        positions = [self._node("Range", positions, "range"), self._constant("axis_0", [0])]
        positions = [self._node("Unsqueeze", positions, "range_row"), self._node("Shape", ["input_ids"], "ids_shape")]
        self._node("Expand", positions, "position_ids")
        real = self._node("Cast", ["attention_mask"], "mask_real", to=TensorProto.BOOL)
        bias = self._node(
            "Where", [real, self._scalar("bias_0", 0.0), self._scalar("bias_masked", MASKED)], "mask_bias"
        )
        if self.past:
            size = [batch, self._node("Unsqueeze", [start, self._constant("axis_0", [0])], "past_length_1")]
            size = [self._node("Concat", size, "past_size", axis=0)]
            seen = self._node("Expand", [self._scalar("bias_0", 0.0), *size], "past_bias")
            bias = self._node("Concat", [seen, bias], "all_bias", axis=1)
        self._node("Unsqueeze", [bias, self._constant("axes_1_2", [1, 2])], "key_bias")  # [batch, 1, 1, all keys]

    def _rope_tables(self) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
        """Cosines and sines [max_tokens, head_dim / 2]; their last bit depends on the CPU that computes them."""
        cfg = self.config
        steps = np.arange(0, cfg.head_dim, 2, dtype=np.float32) / np.float32(cfg.head_dim)
        divisors = np.float32(cfg.rope_theta) ** steps
        if cfg.rope_factors is not None:
            divisors *= np.array(cfg.rope_factors, np.float32)
        angles = np.arange(cfg.max_tokens, dtype=np.float32)[:, None] / divisors
        return np.cos(angles), np.sin(angles)

    def _dimension(self, x: str, axis: int, name: str) -> str:
        """A scalar: the size of ``x`` along ``axis``."""
        return self._node("Squeeze", [self._node("Shape", [x], f"{name}_1d", start=axis, end=axis + 1)], name)

    def _embedding(self, ids: str) -> str:
        name = "model.embed_tokens.weight"
        if not self.int4:
            return self._node("Gather", [self._initializer("embedding", self._array(name)), ids], "embedded")
        quantized = as_int4(self.weights[name])
        # INT4 is two's complement: nibble - 8 is the nibble with its highest bit turned over, in both halves of a byte.
        packed = (quantized.pack_matmulnbits() ^ np.uint8(0x88)).tobytes()
        data = helper.make_tensor("embedding.int4", TensorProto.INT4, quantized.shape, packed, raw=True)
        self.initializers[data.name] = data
        return self._node(
            "GatherBlockQuantized",
            [data.name, ids, self._scales("embedding", quantized)],
            "embedded",
            domain=CONTRIB,
            gather_axis=0,
            quantize_axis=1,
            block_size=GROUP_SIZE,
        )

    def _attention(self, layer: int, normed: str, hidden: str) -> tuple[str, str]:
        """Attention of all tokens: (output of o_proj, residual), both [batch, length, hidden]."""
        cfg, name = self.config, f"layers.{layer}.attention"
        qkv = self._linear(f"layers.{layer}.qkv", normed, *self._projections(layer, "q", "k", "v"))
        past, present = ["", ""], (f"{name}.key", f"{name}.value")
        if self.past:
            past, present = (
                [f"past.{layer}.key", f"past.{layer}.value"],
                (f"present.{layer}.key", f"present.{layer}.value"),
            )
        context = self._node(
            "GroupQueryAttention",
            [qkv, "", "", *past, "seqlens_k", "total_length", "rope_cos", "rope_sin"],
            name,
            domain=CONTRIB,
            more_outputs=present,
            num_heads=cfg.num_heads,
            kv_num_heads=cfg.num_kv_heads,
            do_rotary=1,
        )
        return self._linear(f"layers.{layer}.o", context, *self._projections(layer, "o")), hidden

    def _last_row_attention(self, layer: int, normed: str, hidden: str) -> tuple[str, str]:
        """Attention of each row's last real token: (output of o_proj, residual), both [batch, 1, hidden].

        The query heads of one key-value head are rows of one product, so keys and values are never repeated.
        """
        cfg, name = self.config, f"layers.{layer}.attention"
        kv = self._linear(f"layers.{layer}.kv", normed, *self._projections(layer, "k", "v"))
        sizes = self._constant("kv_sizes", [cfg.kv_size, cfg.kv_size])
        key, value = self._split(kv, sizes, f"{name}.key", f"{name}.value")
        query = self._linear(f"layers.{layer}.q", self._take_last(normed, name), *self._projections(layer, "q"))
        query = self._rope(query, "last_position" if self.past else "last_index", cfg.num_heads, f"{name}.query_rope")
        key = self._rope(key, "position_ids", cfg.num_kv_heads, f"{name}.key_rope")
        groups = [0, cfg.num_kv_heads, cfg.num_heads // cfg.num_kv_heads, cfg.head_dim]
        query = self._node("Reshape", [query, self._constant("query_groups", groups)], f"{name}.query_groups")
        heads = self._constant("kv_heads", [0, 0, cfg.num_kv_heads, cfg.head_dim])
        key = self._node("Reshape", [key, heads], f"{name}.key_heads")
        value = self._node("Reshape", [value, heads], f"{name}.value_heads")
        value = self._node("Transpose", [value], f"{name}.value_t", perm=[0, 2, 1, 3])
        if self.past:
            key = self._node("Transpose", [key], f"{name}.key_rows", perm=[0, 2, 1, 3])
            key = self._node("Concat", [f"past.{layer}.key", key], f"present.{layer}.key", axis=2)
            value = self._node("Concat", [f"past.{layer}.value", value], f"present.{layer}.value", axis=2)
            key = self._node("Transpose", [key], f"{name}.key_t", perm=[0, 1, 3, 2])
        else:
            key = self._node("Transpose", [key], f"{name}.key_t", perm=[0, 2, 3, 1])
        scores = self._node("MatMul", [query, key], f"{name}.scores")
        scores = self._node("Mul", [scores, self._scalar("score_scale", cfg.head_dim**-0.5)], f"{name}.scaled")
        scores = self._node("Add", [scores, "key_bias"], f"{name}.masked")
        shares = self._node("Softmax", [scores], f"{name}.shares", axis=-1)
        context = self._node("MatMul", [shares, value], f"{name}.context")
        context = self._node("Reshape", [context, self._constant("one_row", [0, 1, cfg.query_size])], f"{name}.row")
        output = self._linear(f"layers.{layer}.o", context, *self._projections(layer, "o"))
        return output, self._take_last(hidden, f"{name}.hidden")

    def _mlp(self, layer: int, normed: str) -> str:
        name, prefix = f"layers.{layer}.mlp", f"model.layers.{layer}.mlp."
        inner = self.config.intermediate_size
        both = self._linear(f"{name}.gate_up", normed, f"{prefix}gate_proj.weight", f"{prefix}up_proj.weight")
        gate, up = self._split(both, self._constant("mlp_sizes", [inner, inner]), f"{name}.gate", f"{name}.up")
        gate = self._node("QuickGelu", [gate], f"{name}.silu", domain=CONTRIB, alpha=1.0)
        product = self._node("Mul", [gate, up], f"{name}.product")
        return self._linear(f"{name}.down", product, f"{prefix}down_proj.weight")

    def _add_and_norm(self, x: str, residual: str, weight: str, name: str) -> tuple[str, str]:
        """(RMSNorm of x + residual, x + residual)."""
        total = f"{name}.sum"
        normed = self._node(
            "SkipSimplifiedLayerNormalization",
            [x, residual, self._float(weight)],
            name,
            domain=CONTRIB,
            more_outputs=("", "", total),
            epsilon=self.config.rms_norm_eps,
        )
        return normed, total

    def _take_last(self, x: str, name: str) -> str:
        """[batch, length, width] -> [batch, 1, width], the row of the last real token."""
        return self._node("GatherND", [x, "last_row"], f"{name}.last", batch_dims=1)

    def _rope(self, x: str, positions: str, heads: int, name: str) -> str:
        inputs = [x, positions, "rope_cos", "rope_sin"]
        return self._node("RotaryEmbedding", inputs, name, domain=CONTRIB, num_heads=heads)

    def _linear(self, name: str, x: str, *weights: str) -> str:
        """``x`` times the transposed weights, side by side: several that read the same input are one product."""
        if not self.int4:
            weight = np.concatenate([self._array(w) for w in weights])
            return self._node("MatMul", [x, self._initializer(f"{name}.weight", weight.T)], name)
        quantized = Int4Weight.stack([as_int4(self.weights[w]) for w in weights])
        inputs = [x, self._initializer(f"{name}.int4", quantized.pack_matmulnbits()), self._scales(name, quantized)]
        rows, columns = quantized.shape
        return self._node(
            "MatMulNBits",
            inputs,
            name,
            domain=CONTRIB,
            N=rows,
            K=columns,
            bits=4,
            block_size=GROUP_SIZE,
            accuracy_level=self.accuracy_level,
        )

    def _scales(self, name: str, quantized: Int4Weight) -> str:
        stored = self._initializer(f"{name}.scales", quantized.scales)
        return self._node("Cast", [stored], f"{name}.scales_fp32", to=TensorProto.FLOAT)

    def _split(self, x: str, sizes: str, first: str, second: str) -> tuple[str, str]:
        self.nodes.append(helper.make_node("Split", [x, sizes], [first, second], name=f"{first}.split", axis=-1))
        return first, second

    def _node(
        self,
        op: str,
        inputs: list[str],
        name: str,
        *,
        domain: str = "",
        more_outputs: tuple[str, ...] = (),
        **attributes: Any,  # noqa: ANN401 - whatever the operator takes
    ) -> str:
        """Add a node whose first output is ``name``; an empty input or output name means: left out."""
        outputs = [name, *more_outputs]
        self.nodes.append(helper.make_node(op, inputs, outputs, name=f"{name}/{op}", domain=domain, **attributes))
        return name

    def _projections(self, layer: int, *letters: str) -> list[str]:
        return [f"model.layers.{layer}.self_attn.{letter}_proj.weight" for letter in letters]

    def _array(self, name: str) -> NDArray[np.float32]:
        return as_float32(self.weights[name])

    def _float(self, name: str) -> str:
        return self._initializer(name, self._array(name))

    def _constant(self, name: str, values: list[int]) -> str:
        return self._initializer(name, np.array(values, dtype=np.int64))

    def _scalar(self, name: str, value: float) -> str:
        return self._initializer(name, np.array(value, dtype=np.int64 if isinstance(value, int) else np.float32))

    def _initializer(self, name: str, array: NDArray[Any]) -> str:
        if name not in self.initializers:
            self.initializers[name] = numpy_helper.from_array(np.ascontiguousarray(array).reshape(array.shape), name)
        return name
