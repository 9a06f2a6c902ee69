"""The student as an ExecuTorch program (``.pte``) for the XNNPACK delegate: INT8 weights, INT8 activations a token.

XNNPACK's INT4 kernels want positive scales, and a group of our grid ([-8, 7]) has a negative one where its largest
value is positive. So the linears hold what the engine ``onnx-int8`` computes with: the INT4 values on an INT8 grid, one
scale a channel, smoothed by the powers of two of the bundle's plan where it has one; what ``down_proj`` reads is turned
(:mod:`edgeguard.engines.int8`). The embedding stays INT4, with the scales of the bundle; looked-up rows are unpacked by
arithmetic, as in :mod:`convert.export.standard_onnx`.

Input: ids, int64 [1, length], 2 to ``max_tokens`` of them, no padding. Output: logits, float32 [1, K], of the last.

Sources: ExecuTorch 1.5 (``backends/xnnpack/partition/config/gemm_configs.py``: what a dynamically quantized linear
looks like; ``generic_node_configs.py``: no mean over the last axis alone, so it is a product with 1/n here),
transformers ``models/llama/modeling_llama.py`` (semantics).
"""

from __future__ import annotations

import contextlib
import io
import logging
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from convert.smoothing import row_of
from edgeguard.engines.int4_weights import GROUP_SIZE, Int4Weight, StudentConfig, Weights, check_weights
from edgeguard.engines.int8 import STEPS, TURNED_BLOCK, hadamard, to_int8

__all__ = ["Guard", "write_pte"]

LEAST_TOKENS = 2  # torch.export makes a graph of its own for one
MASKED = -1e9
Shifts = Mapping[str, NDArray[np.int8]]


def write_pte(weights: Weights, config: StudentConfig, path: Path, shifts: Shifts) -> int:
    """Lower the student to XNNPACK and write ``path``; returns how many operators stayed with portable kernels.

    ``weights``: matrices as Int4Weight, norms and head as float32; ``shifts``: see :mod:`convert.smoothing`, empty for
    none. Raises ValueError for a missing, unknown or misshapen weight, ImportError without executorch.
    """
    check_weights(weights, config)
    guard = Guard(weights, config, shifts).eval()
    length = torch.export.Dim("length", min=LEAST_TOKENS, max=config.max_tokens)
    sample = torch.arange(config.max_tokens // 2)[None] % config.vocab_size
    with torch.no_grad(), _quiet():
        from executorch.backends.xnnpack.partition.xnnpack_partitioner import XnnpackPartitioner
        from executorch.exir import EdgeCompileConfig, to_edge_transform_and_lower

        traced = torch.export.export(guard, (sample,), dynamic_shapes=({1: length},), strict=True)
        lowered = to_edge_transform_and_lower(
            traced, partitioner=[XnnpackPartitioner()], compile_config=EdgeCompileConfig(_check_ir_validity=False)
        )
        program = lowered.to_executorch()
    path.write_bytes(program.buffer)
    calls = [node for node in lowered.exported_program().graph.nodes if node.op == "call_function"]
    return sum(
        "executorch_call_delegate" not in str(node.target) and "getitem" not in str(node.target) for node in calls
    )


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Lowering logs every operator that it leaves; the result is run instead."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stderr(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)


class Guard(nn.Module):
    """ids int64 [1, length] -> logits float32 [1, K] of the last token."""

    cos: Tensor
    sin: Tensor
    bias: Tensor

    def __init__(self, weights: Weights, config: StudentConfig, shifts: Shifts) -> None:
        """Arguments: see :func:`write_pte`."""
        super().__init__()
        self.embedding = _Embedding(_int4(weights, "model.embed_tokens.weight"))
        self.layers = nn.ModuleList(_Layer(weights, config, shifts, index) for index in range(config.num_layers))
        self.norm = _Norm(weights, "model.norm.weight", config, shifts)
        self.head = nn.Linear(config.hidden_size, config.head_size)
        self.head.weight.data, self.head.bias.data = _tensor(weights["head.weight"]), _tensor(weights["head.bias"])
        cos, sin = _rope(config)
        self.register_buffer("cos", cos)
        self.register_buffer("sin", sin)
        rows = config.max_tokens + 1  # one more than is ever read: torch.export would part off the case of all
        self.register_buffer("bias", torch.full((rows, rows), MASKED).triu(1))

    def forward(self, ids: Tensor) -> Tensor:
        """See the class."""
        length = ids.shape[1]
        x = self.embedding(ids)
        tables = self.cos[:length], self.sin[:length], self.bias[:length, :length]
        for index, layer in enumerate(self.layers):
            x = layer(x, *tables, only_last=index == len(self.layers) - 1)
        logits: Tensor = self.head(self.norm(x)[:, 0])
        return logits


class _Layer(nn.Module):
    def __init__(self, weights: Weights, config: StudentConfig, shifts: Shifts, index: int) -> None:
        super().__init__()
        prefix = f"model.layers.{index}."
        self.heads, self.kv_heads, self.width = config.num_heads, config.num_kv_heads, config.head_dim
        self.attention_norm = _Norm(weights, prefix + "input_layernorm.weight", config, shifts)
        self.mlp_norm = _Norm(weights, prefix + "post_attention_layernorm.weight", config, shifts)
        self.q, self.k, self.v, self.o = (
            _Linear(weights, f"{prefix}self_attn.{name}_proj.weight", shifts) for name in ("q", "k", "v", "o")
        )
        self.gate, self.up = (_Linear(weights, f"{prefix}mlp.{name}_proj.weight", shifts) for name in ("gate", "up"))
        self.down = _Turned(weights, f"{prefix}mlp.down_proj.weight", shifts)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, bias: Tensor, *, only_last: bool) -> Tensor:
        """[1, length, hidden] -> the same, or [1, 1, hidden] for the last token alone."""
        normed = self.attention_norm(x)
        k, v = (self._split(project(normed), self.kv_heads) for project in (self.k, self.v))
        k = _turn(k, cos, sin)
        if only_last:
            x, normed, cos, sin, bias = x[:, -1:], normed[:, -1:], cos[-1:], sin[-1:], bias[-1:]
        q = _turn(self._split(self.q(normed), self.heads), cos, sin) * self.width**-0.5
        k, v = (t.repeat_interleave(self.heads // self.kv_heads, dim=1) for t in (k, v))
        mixed = torch.softmax(q @ k.transpose(2, 3) + bias, dim=-1) @ v
        x = x + self.o(mixed.transpose(1, 2).reshape(1, -1, self.heads * self.width))
        normed = self.mlp_norm(x)
        gate = self.gate(normed)
        result: Tensor = x + self.down(gate * torch.sigmoid(gate) * self.up(normed))
        return result

    def _split(self, x: Tensor, heads: int) -> Tensor:
        """[1, length, heads * width] -> [1, heads, length, width]."""
        return x.view(1, -1, heads, self.width).transpose(1, 2)


class _Linear(nn.Module):
    """INT8 weights with a scale a channel; what comes in is rounded to INT8 with a scale and zero point a token."""

    weight: Tensor
    scales: Tensor
    zeros: Tensor

    turned = False

    def __init__(self, weights: Weights, name: str, shifts: Shifts) -> None:
        super().__init__()
        values, scales = to_int8(_int4(weights, name), shifts.get(row_of(name)), turned=self.turned)
        self.register_buffer("weight", torch.from_numpy(values))
        self.register_buffer("scales", torch.from_numpy(scales.astype(np.float32)))
        self.register_buffer("zeros", torch.zeros(len(scales), dtype=torch.int64))

    def forward(self, x: Tensor) -> Tensor:
        """[..., K] -> [..., N]."""
        # Naming the module registers the operators quantized_decomposed.
        import torch.ao.quantization.fx._decomposed  # noqa: F401

        ops = torch.ops.quantized_decomposed
        scale, zero = ops.choose_qparams_per_token_asymmetric.default(x, torch.int8)
        rounded = ops.quantize_per_token.default(x, scale, zero, -128, 127, torch.int8)
        x = ops.dequantize_per_token.default(rounded, scale, zero, -128, 127, torch.int8, torch.float32)
        weight = ops.dequantize_per_channel.default(self.weight, self.scales, self.zeros, 0, -STEPS, STEPS, torch.int8)
        return nn.functional.linear(x, weight)


class _Turned(_Linear):
    """A linear whose rows are turned in blocks of 16 before they are rounded, and whose weights are turned alike."""

    turned = True
    matrix: Tensor

    def __init__(self, weights: Weights, name: str, shifts: Shifts) -> None:
        super().__init__(weights, name, shifts)
        self.register_buffer("matrix", torch.from_numpy(hadamard()))

    def forward(self, x: Tensor) -> Tensor:
        """[..., K] -> [..., N]."""
        blocks = x.reshape(1, -1, TURNED_BLOCK)
        return super().forward(nn.functional.linear(blocks, self.matrix).reshape(x.shape))  # symmetric: no transpose


class _Norm(nn.Module):
    """RMSNorm; the mean is a product, which XNNPACK takes."""

    weight: Tensor
    share: Tensor

    def __init__(self, weights: Weights, name: str, config: StudentConfig, shifts: Shifts) -> None:
        super().__init__()
        values, shift = np.asarray(weights[name], np.float32), shifts.get(row_of(name))
        values = values if shift is None else np.ldexp(values, -shift.astype(np.int32))
        self.register_buffer("weight", torch.from_numpy(values.copy()))
        self.register_buffer("share", torch.full((1, config.hidden_size), 1 / config.hidden_size))
        self.eps = config.rms_norm_eps

    def forward(self, x: Tensor) -> Tensor:
        """[..., hidden] -> the same."""
        mean = nn.functional.linear(x * x, self.share)
        result: Tensor = x * torch.rsqrt(mean + self.eps) * self.weight
        return result


class _Embedding(nn.Module):
    """INT4 rows, two elements a byte: gathered as bytes, parted, times the scales of their groups."""

    packed: Tensor
    scales: Tensor

    def __init__(self, weight: Int4Weight) -> None:
        super().__init__()
        rows, self.width = weight.shape
        packed = weight.nibbles[:, 0::2] | (weight.nibbles[:, 1::2] << np.uint8(4))
        self.register_buffer("packed", torch.from_numpy(np.ascontiguousarray(packed)))
        self.register_buffer("scales", torch.from_numpy(weight.scales.copy()))

    def forward(self, ids: Tensor) -> Tensor:
        """[1, length] -> [1, length, width]."""
        pairs = self.packed[ids].to(torch.float32)
        odd = torch.floor(pairs * (1 / 16))
        nibbles = torch.stack([pairs - odd * 16, odd], dim=-1)
        groups = nibbles.view(1, -1, self.width // GROUP_SIZE, GROUP_SIZE) - 8
        scales = self.scales[ids].to(torch.float32).unsqueeze(-1)
        return (groups * scales).view(1, -1, self.width)


def _turn(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """RoPE of [1, heads, length, width]; the tables are [length, width]."""
    half = x.shape[-1] // 2
    return x * cos + torch.cat([-x[..., half:], x[..., :half]], dim=-1) * sin


def _rope(config: StudentConfig) -> tuple[Tensor, Tensor]:
    """Cosines and sines [max_tokens + 1, head_dim], both halves alike."""
    steps = np.arange(0, config.head_dim, 2, dtype=np.float32) / np.float32(config.head_dim)
    divisors = np.float32(config.rope_theta) ** steps
    if config.rope_factors is not None:
        divisors *= np.array(config.rope_factors, np.float32)
    angles = np.tile(np.arange(config.max_tokens + 1, dtype=np.float32)[:, None] / divisors, 2)
    return torch.from_numpy(np.cos(angles)), torch.from_numpy(np.sin(angles))


def _int4(weights: Weights, name: str) -> Int4Weight:
    weight = weights[name]
    if not isinstance(weight, Int4Weight):
        raise ValueError(f"{name}: expected INT4 integers, found {weight.dtype}.")
    return weight


def _tensor(values: Any) -> Tensor:  # noqa: ANN401 - an array
    return torch.from_numpy(np.array(values, np.float32))
