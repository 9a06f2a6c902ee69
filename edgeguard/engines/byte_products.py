"""Whether onnxruntime multiplies bytes exactly on this CPU.

On x86-64 without VNNI its kernels of uint8 by int8 add neighbouring products in 16 bits, and cut what does not fit
(the instruction PMADDUBSW, "packed unsigned saturated" in Intel's manual; onnxruntime's page on quantization,
"saturation"). Asked by computing, since the instruction sets of a CPU do not say which kernel is used.
"""

from __future__ import annotations

import base64
import functools

import numpy as np

__all__ = ["byte_products_are_exact"]

# y = MatMulInteger(x, w): uint8 [M, K] by int8 [K, N] gives int32 [M, N]; tests/test_byte_products.py writes it.
MODEL = (
    "CAgSADpQChgKAXgKAXcSAXkiDU1hdE11bEludGVnZXISAWdaDwoBeBIKCggIAhIECgAKAFoPCgF3EgoKCAgDEgQKAAoAYg8KAXkSCgoICAYSBAoA"
    "CgBCBAoAEA0="
)
SHAPE = (8, 64, 16)  # M, K, N
LARGEST = (255, 127)


@functools.cache
def byte_products_are_exact() -> bool:
    """Whether products of the largest bytes are what they should be. Takes some milliseconds, once a process."""
    import onnxruntime

    rows, inner, columns = SHAPE
    x, w = np.full((rows, inner), LARGEST[0], np.uint8), np.full((inner, columns), LARGEST[1], np.int8)
    session = onnxruntime.InferenceSession(base64.b64decode(MODEL), providers=["CPUExecutionProvider"])
    (found,) = session.run(None, {"x": x, "w": w})
    return bool((found == inner * LARGEST[0] * LARGEST[1]).all())
