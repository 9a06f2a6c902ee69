"""The INT4 grid of every bundle, in numpy. Never imports torch.

Symmetric [-8, 7], groups of 32 along the input axis, one fp16 scale a group, exactly the rule of GGUF's Q4_0:

    d = the group's value of largest magnitude / -8      (so d is negative where that value is positive)
    nibble = clip(trunc(x / d + 8.5), 0, 15)             (d unrounded here)
    value = (nibble - 8) * fp16(d)                       (d rounded here)

The sign of d puts the largest value on -8, the end of the grid that has no mirror image. Quantizing the values of a
quantized weight again gives the same values. How the containers hold them: :mod:`edgeguard.engines.int4_weights`.

Sources: gguf-py 0.19 ``gguf/quants.py`` (class Q4_0), llama.cpp ``ggml-quants.c`` (quantize_row_q4_0_ref).
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from convert.files import write_arrays
from edgeguard.engines.int4_weights import GROUP_SIZE, Q4_0_GROUP_BYTES, Int4Weight, check_shape
from edgeguard.errors import EdgeguardError

__all__ = [
    "GROUP_SIZE",
    "Q4_0_GROUP_BYTES",
    "Int4Weight",
    "QuantizeError",
    "as_int4",
    "quantize_int4",
    "read_int4",
    "write_int4",
]


class QuantizeError(EdgeguardError):
    """Values that the INT4 grid cannot hold."""


def quantize_int4(weight: NDArray[Any]) -> Int4Weight:
    """Round a weight [N, K] (float32; others are converted) to the INT4 grid, group by group along K.

    Raises ValueError when K is not a multiple of 32; QuantizeError for a value that is not finite, and for one whose
    scale does not fit in fp16.
    """
    check_shape(weight.shape)
    groups = np.ascontiguousarray(weight, dtype=np.float32).reshape(weight.shape[0], -1, GROUP_SIZE)
    if not np.isfinite(groups).all():
        raise QuantizeError("the weight has values that are not finite: training diverged, or the file is damaged.")
    # argmax takes the first of equal magnitudes: with +a and -a in one group, the first one decides the sign.
    largest = np.take_along_axis(groups, np.abs(groups).argmax(axis=-1, keepdims=True), axis=-1)
    step = largest / np.float32(-8)
    with np.errstate(over="ignore"):
        scales = step[..., 0].astype(np.float16)
    if not np.isfinite(scales).all():
        raise QuantizeError(f"a value of {np.abs(largest).max():.3g} needs a scale beyond fp16 (at most {65504 * 8}).")
    nibbles = np.trunc(groups * _inverse(step) + np.float32(8.5)).astype(np.uint8).clip(0, 15)
    return Int4Weight(nibbles=nibbles.reshape(weight.shape), scales=scales)


def as_int4(weight: Int4Weight | NDArray[Any]) -> Int4Weight:
    """``weight`` itself where it is on the grid already, else rounded by :func:`quantize_int4`."""
    return weight if isinstance(weight, Int4Weight) else quantize_int4(weight)


def write_int4(path: Path, weights: Mapping[str, Int4Weight]) -> None:
    """Keep integers and scales by name (``.npz``), whole or not at all."""
    nibbles = {f"{name}/nibbles": weight.pack_matmulnbits() for name, weight in weights.items()}
    write_arrays(path, **nibbles, **{f"{name}/scales": weight.scales for name, weight in weights.items()})


def read_int4(path: Path) -> dict[str, Int4Weight]:
    """Read what :func:`write_int4` wrote."""
    with np.load(path) as stored:
        names = [key.removesuffix("/nibbles") for key in stored.files if key.endswith("/nibbles")]
        return {n: Int4Weight.unpack_matmulnbits(stored[f"{n}/nibbles"], stored[f"{n}/scales"]) for n in names}


def _inverse(step: NDArray[np.float32]) -> NDArray[np.float32]:
    """1 / step, and 0 where there is no finite one: such a group (zeros, or below 1e-37) is zero in fp16 anyway."""
    with np.errstate(divide="ignore", over="ignore"):
        inverse: NDArray[np.float32] = np.float32(1) / step
    return np.where(np.isfinite(inverse), inverse, np.float32(0))
