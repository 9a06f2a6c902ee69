"""The INT4 grid of every bundle, in numpy. Never imports torch.

Symmetric [-8, 7], groups of 32 along the input axis, one fp16 scale a group, exactly the rule of GGUF's Q4_0:

    d = the group's value of largest magnitude / -8      (so d is negative where that value is positive)
    nibble = clip(trunc(x / d + 8.5), 0, 15)             (d unrounded here)
    value = (nibble - 8) * fp16(d)                       (d rounded here)

The sign of d puts the largest value on -8, the end of the grid that has no mirror image. The same nibbles and scales go
into GGUF (18 bytes a group: scale, then elements i and i + 16 in one byte) and into ONNX MatMulNBits (16 bytes a group:
elements 2i and 2i + 1 in one byte; scales apart), so the containers differ in byte order only. Quantizing the values
of a quantized weight again gives the same values.

Sources: gguf-py 0.19 ``gguf/quants.py`` (class Q4_0), llama.cpp ``ggml-quants.c`` (quantize_row_q4_0_ref);
onnxruntime ``docs/ContribOperators.md`` (com.microsoft.MatMulNBits).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

__all__ = ["GROUP_SIZE", "Q4_0_GROUP_BYTES", "Int4Weight", "as_int4", "quantize_int4"]

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
        _check_shape(self.nibbles.shape)
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


def quantize_int4(weight: NDArray[Any]) -> Int4Weight:
    """Round a weight [N, K] (float32; others are converted) to the INT4 grid, group by group along K.

    Raises ValueError when K is not a multiple of 32, a value is not finite, or a scale does not fit in fp16.
    """
    _check_shape(weight.shape)
    groups = np.ascontiguousarray(weight, dtype=np.float32).reshape(weight.shape[0], -1, GROUP_SIZE)
    if not np.isfinite(groups).all():
        raise ValueError("the weight has values that are not finite: training diverged, or the file is damaged.")
    # argmax takes the first of equal magnitudes: with +a and -a in one group, the first one decides the sign.
    largest = np.take_along_axis(groups, np.abs(groups).argmax(axis=-1, keepdims=True), axis=-1)
    step = largest / np.float32(-8)
    with np.errstate(over="ignore"):
        scales = step[..., 0].astype(np.float16)
    if not np.isfinite(scales).all():
        raise ValueError(f"a value of {np.abs(largest).max():.3g} needs a scale beyond fp16 (at most {65504 * 8}).")
    nibbles = np.trunc(groups * _inverse(step) + np.float32(8.5)).astype(np.uint8).clip(0, 15)
    return Int4Weight(nibbles=nibbles.reshape(weight.shape), scales=scales)


def as_int4(weight: Int4Weight | NDArray[Any]) -> Int4Weight:
    """``weight`` itself where it is on the grid already, else rounded by :func:`quantize_int4`."""
    return weight if isinstance(weight, Int4Weight) else quantize_int4(weight)


def _inverse(step: NDArray[np.float32]) -> NDArray[np.float32]:
    """1 / step, and 0 where there is no finite one: such a group (zeros, or below 1e-37) is zero in fp16 anyway."""
    with np.errstate(divide="ignore", over="ignore"):
        inverse: NDArray[np.float32] = np.float32(1) / step
    return np.where(np.isfinite(inverse), inverse, np.float32(0))


def _check_shape(shape: tuple[int, ...]) -> None:
    if len(shape) != 2 or shape[1] == 0 or shape[1] % GROUP_SIZE:
        raise ValueError(f"expected a weight [N, K] with K a multiple of {GROUP_SIZE}, got {shape}.")
