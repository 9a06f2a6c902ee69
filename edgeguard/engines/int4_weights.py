"""Weights of a student in numpy: matrices of INT4 integers, and the shape that they make. Never imports torch.

A group of 32 values along the input axis is 32 nibbles and one fp16 scale; a value is (nibble - 8) * scale. The same
nibbles and scales stand in GGUF (Q4_0, 18 bytes a group: scale, then elements i and i + 16 in one byte) and in ONNX
(MatMulNBits, 16 bytes a group: elements 2i and 2i + 1 in one byte; scales apart): the containers differ in byte order
only.

Sources: gguf-py 0.19 ``gguf/quants.py`` (class Q4_0); onnxruntime ``docs/ContribOperators.md``
(com.microsoft.MatMulNBits); transformers ``models/llama/modeling_llama.py`` (names of the weights).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgeguard.errors import EngineError, ParityError

__all__ = [
    "GROUP_SIZE",
    "Q4_0_GROUP_BYTES",
    "Int4Weight",
    "StudentConfig",
    "Weights",
    "as_float32",
    "check_shape",
    "check_weights",
    "require_head",
    "require_same_weights",
    "shortest",
]

GROUP_SIZE = 32
HALF_GROUP = GROUP_SIZE // 2
SCALE_BYTES = 2
Q4_0_GROUP_BYTES = SCALE_BYTES + HALF_GROUP
ZERO_NIBBLE = 8  # the nibble that stands for 0.0


@dataclass(frozen=True, eq=False)
class Int4Weight:
    """A weight on the INT4 grid.

    ``nibbles``: uint8 [N, K], values 0..15, the integer plus 8. ``scales``: float16 [N, K / 32], may be negative.
    Raises ValueError when shapes, types or values do not fit together.
    """

    nibbles: NDArray[np.uint8]
    scales: NDArray[np.float16]

    def __post_init__(self) -> None:
        """Check that the parts fit together."""
        if self.nibbles.dtype != np.uint8 or self.scales.dtype != np.float16:
            raise ValueError(
                f"expected uint8 nibbles and float16 scales, got {self.nibbles.dtype}, {self.scales.dtype}."
            )
        check_shape(self.nibbles.shape)
        rows, columns = self.nibbles.shape
        if self.scales.shape != (rows, columns // GROUP_SIZE):
            raise ValueError(
                f"nibbles {self.nibbles.shape} need scales {(rows, columns // GROUP_SIZE)}, got {self.scales.shape}."
            )
        if self.nibbles.size and int(self.nibbles.max()) > 15:
            raise ValueError(f"a nibble is 0..15, got {int(self.nibbles.max())}.")

    @property
    def shape(self) -> tuple[int, ...]:
        """[N, K], as the weight has it."""
        return self.nibbles.shape

    def dequantize(self) -> NDArray[np.float32]:
        """Values as float32 [N, K]: (nibble - 8) * scale, exact in float32 (4 bits times 11 bits)."""
        steps = self._grouped().astype(np.float32) - np.float32(ZERO_NIBBLE)
        values: NDArray[np.float32] = steps * self.scales.astype(np.float32)[..., None]
        return values.reshape(self.nibbles.shape)

    def pack_matmulnbits(self) -> NDArray[np.uint8]:
        """Bytes [N, K / 32, 16] as ONNX MatMulNBits reads them: elements 2i (low) and 2i + 1 share a byte."""
        pairs = self._grouped().reshape(*self.scales.shape, HALF_GROUP, 2)
        packed: NDArray[np.uint8] = pairs[..., 0] | (pairs[..., 1] << np.uint8(4))
        return packed

    @classmethod
    def unpack_matmulnbits(cls, packed: NDArray[np.uint8], scales: NDArray[np.float16]) -> Int4Weight:
        """Undo :meth:`pack_matmulnbits`: ``packed`` [N, K / 32, 16], ``scales`` [N, K / 32]. Raises ValueError."""
        if packed.ndim != 3 or packed.dtype != np.uint8 or packed.shape[2] != HALF_GROUP:
            raise ValueError(f"expected uint8 [N, K / 32, {HALF_GROUP}], got {packed.dtype} {packed.shape}.")
        pairs = np.stack([packed & np.uint8(15), packed >> np.uint8(4)], axis=-1)
        return cls(nibbles=pairs.reshape(packed.shape[0], -1), scales=scales)

    def pack_q4_0(self) -> NDArray[np.uint8]:
        """GGUF Q4_0 bytes [N, K / 32 * 18]: a group is its scale, then elements i (low) and i + 16 (high)."""
        low, high = np.split(self._grouped(), 2, axis=-1)
        scales = self.scales.astype("<f2")[..., None].view(np.uint8)
        return np.concatenate([scales, low | (high << np.uint8(4))], axis=-1).reshape(self.nibbles.shape[0], -1)

    @classmethod
    def unpack_q4_0(cls, packed: NDArray[np.uint8]) -> Int4Weight:
        """Undo :meth:`pack_q4_0`: ``packed`` [N, K / 32 * 18]. Raises ValueError for another type or row size."""
        if packed.ndim != 2 or packed.dtype != np.uint8 or packed.shape[1] == 0 or packed.shape[1] % Q4_0_GROUP_BYTES:
            raise ValueError(
                f"expected uint8 [N, a multiple of {Q4_0_GROUP_BYTES}], got {packed.dtype} {packed.shape}."
            )
        groups = packed.reshape(packed.shape[0], -1, Q4_0_GROUP_BYTES)
        scales = np.ascontiguousarray(groups[..., :SCALE_BYTES]).view("<f2")[..., 0].astype(np.float16)
        nibbles = np.concatenate(
            [groups[..., SCALE_BYTES:] & np.uint8(15), groups[..., SCALE_BYTES:] >> np.uint8(4)], axis=-1
        )
        return cls(nibbles=nibbles.reshape(packed.shape[0], -1), scales=scales)

    @classmethod
    def stack(cls, weights: Sequence[Int4Weight]) -> Int4Weight:
        """The rows of several weights of one width, one below the other."""
        return cls(np.concatenate([w.nibbles for w in weights]), np.concatenate([w.scales for w in weights]))

    def _grouped(self) -> NDArray[np.uint8]:
        return self.nibbles.reshape(*self.scales.shape, GROUP_SIZE)


Weights = Mapping[str, NDArray[Any] | Int4Weight]


def as_float32(weight: NDArray[Any] | Int4Weight) -> NDArray[np.float32]:
    """The values of a weight of any shape, in float32: an INT4 one is dequantized."""
    return weight.dequantize() if isinstance(weight, Int4Weight) else np.asarray(weight, np.float32)


@dataclass(frozen=True)
class StudentConfig:
    """Shape of a student, named as in transformers' LlamaConfig.

    ``max_tokens``: the longest row that the graph accepts; ``head_size``: the number of logits.
    ``rope_factors``: float32 divisors of the ``head_dim / 2`` frequencies of RoPE, fastest first;
    None for plain RoPE. Raises ValueError when the parts do not fit together.
    """

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    rms_norm_eps: float
    rope_theta: float
    max_tokens: int
    head_size: int
    rope_factors: tuple[float, ...] | None = None

    def __post_init__(self) -> None:
        """Check what the operators need."""
        if self.num_layers < 1 or self.num_heads % self.num_kv_heads or self.head_dim % 2:
            raise ValueError(
                "a student needs a layer, heads divisible by key-value heads and an even head width, got "
                f"{self.num_layers} layers, {self.num_heads} / {self.num_kv_heads} heads of {self.head_dim}."
            )
        factors = self.rope_factors
        if factors is not None and (len(factors) != self.head_dim // 2 or not all(0 < f < np.inf for f in factors)):
            raise ValueError(
                f"expected {self.head_dim // 2} RoPE factors above 0, half of a head's width, got {list(factors)}."
            )

    @property
    def query_size(self) -> int:
        """Width of all query heads together."""
        return self.num_heads * self.head_dim

    @property
    def kv_size(self) -> int:
        """Width of all key heads (or value heads) together."""
        return self.num_kv_heads * self.head_dim

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Name and shape of every weight."""
        hidden, inner = self.hidden_size, self.intermediate_size
        shapes: dict[str, tuple[int, ...]] = {
            "model.embed_tokens.weight": (self.vocab_size, hidden),
            "model.norm.weight": (hidden,),
            "head.weight": (self.head_size, hidden),
            "head.bias": (self.head_size,),
        }
        for layer in range(self.num_layers):
            prefix = f"model.layers.{layer}."
            shapes |= {
                prefix + "input_layernorm.weight": (hidden,),
                prefix + "self_attn.q_proj.weight": (self.query_size, hidden),
                prefix + "self_attn.k_proj.weight": (self.kv_size, hidden),
                prefix + "self_attn.v_proj.weight": (self.kv_size, hidden),
                prefix + "self_attn.o_proj.weight": (hidden, self.query_size),
                prefix + "post_attention_layernorm.weight": (hidden,),
                prefix + "mlp.gate_proj.weight": (inner, hidden),
                prefix + "mlp.up_proj.weight": (inner, hidden),
                prefix + "mlp.down_proj.weight": (hidden, inner),
            }
        return shapes


def check_weights(weights: Weights, config: StudentConfig) -> None:
    """Refuse what would otherwise be left out in silence: a layer too many, a bias, a missing name."""
    shapes = config.shapes()
    missing, unknown = sorted(shapes.keys() - weights.keys()), sorted(weights.keys() - shapes.keys())
    if missing or unknown:
        raise ValueError(
            f"the weights do not match the config: {len(missing)} missing {missing[:3]}, {len(unknown)} unknown "
            f"{unknown[:3]}. Pass exactly the names of StudentConfig.shapes()."
        )
    for name, shape in shapes.items():
        if weights[name].shape != shape:
            raise ValueError(f"{name}: expected the shape {shape}, found {weights[name].shape}.")


def require_head(config: StudentConfig, labels: Sequence[str], expected: Sequence[str], file: Path) -> None:
    """Raise EngineError unless the head of ``file`` has the rows ``expected``; ``labels``: () where it names none."""
    if tuple(labels) not in ((), tuple(expected)) or config.head_size != len(expected):
        raise EngineError(
            f"{file}: expected a head with the labels {list(expected)}, found {config.head_size} rows "
            f"{list(labels)}. Make the bundle again."
        )


def require_same_weights(found: Weights, expected: Weights, name: str) -> None:
    """Compare two sets of weights integer by integer and scale by scale. Raises ParityError that names the first."""
    if found.keys() != expected.keys():
        raise ParityError(f"{name}: other weights than it was made from: {sorted(found.keys() ^ expected.keys())[:3]}.")
    for key, weight in expected.items():
        pairs = [(a.nibbles, a.scales) if isinstance(a, Int4Weight) else (np.asarray(a),) for a in (found[key], weight)]
        same = len(pairs[0]) == len(pairs[1]) and all(
            a.dtype == b.dtype and a.shape == b.shape and a.tobytes() == b.tobytes()
            for a, b in zip(*pairs, strict=True)
        )
        if not same:
            raise ParityError(f"{name}: {key} is not what it was made from. Do not use the file.")


def check_shape(shape: tuple[int, ...]) -> None:
    """Refuse what has no groups: raises ValueError unless [N, K] with K a multiple of 32."""
    if len(shape) != 2 or shape[1] == 0 or shape[1] % GROUP_SIZE:
        raise ValueError(f"expected a weight [N, K] with K a multiple of {GROUP_SIZE}, got {shape}.")


def shortest(value: float) -> float:
    """The shortest decimal that is the same float32: 1e-05, where a file holds 9.99999974e-06."""
    return float(str(np.float32(value)))
