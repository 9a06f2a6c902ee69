"""An estimate of what this machine can do at best: two large matrix products and a large copy.

The products run in onnxruntime, the library that the engines have: uint8 x int8 through ``MatMulIntegerToFloat`` (its
only fast INT8 kernel on x86), and float32 through ``MatMul``. The fastest of several trials counts, so a share of the
peak is rather too low than too high. Never imported by the parent process.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np

from edgeguard.bench.records import Copy, Limits, Product

__all__ = ["best_of", "measure_limits"]

# Rows, inner width, columns: large enough that the product is all arithmetic, small enough for a phone.
LARGE = (1024, 2048, 4096)
COPY_BYTES = 2**28
LEAST_TRIALS, MOST_TRIALS = 4, 40
TRIALS_S = 1.0
CONTRIB = "com.microsoft"
OPSET, IR_VERSION = 17, 8


def measure_limits(
    threads: int, product: tuple[int, int, int] = LARGE, copy_bytes: int = COPY_BYTES, seconds: float = TRIALS_S
) -> Limits:
    """Run both products [m, k] x [k, n] and the copy with ``threads`` threads, ``seconds`` each."""
    copy = _copy(threads, copy_bytes, seconds)
    try:
        import onnx  # noqa: F401 - the graphs are built with it
    except ImportError:
        return Limits(None, None, copy, "onnx is not installed: pip install 'edgeguard-runtime[bench]'")
    rng = np.random.default_rng(0)
    m, k, n = product
    a8, b8 = rng.integers(0, 256, (m, k), np.uint8), rng.integers(-127, 128, (k, n), np.int8)
    scale = np.array(1 / 127, np.float32)
    constants = {"b": b8, "a_scale": scale, "b_scale": scale, "a_zero": np.array(128, np.uint8)}
    int8 = _product("MatMulIntegerToFloat", CONTRIB, a8, constants, threads, seconds)
    a32, b32 = rng.standard_normal((m, k), np.float32), rng.standard_normal((k, n), np.float32)
    fp32 = _product("MatMul", "", a32, {"b": b32}, threads, seconds)
    return Limits(int8, fp32, copy, None)


def best_of(first: Limits, second: Limits) -> Limits:
    """Two measurements as one: all trials, and the better rate."""

    def product(a: Product | None, b: Product | None) -> Product | None:
        if a is None or b is None:
            return a or b
        rate = max(a.macs_per_s, b.macs_per_s)
        return Product(a.operator, a.m, a.k, a.n, a.trials_ms + b.trials_ms, rate)

    def copy(a: Copy | None, b: Copy | None) -> Copy | None:
        if a is None or b is None:
            return a or b
        return Copy(a.size_bytes, a.trials_ms + b.trials_ms, max(a.bytes_per_s, b.bytes_per_s))

    return Limits(
        product(first.int8, second.int8), product(first.fp32, second.fp32), copy(first.copy, second.copy), first.reason
    )


def _product(
    operator: str, domain: str, a: np.ndarray, constants: dict[str, np.ndarray], threads: int, seconds: float
) -> Product:
    """Time ``a`` times the constant ``b`` in a graph of one node."""
    session = _session(operator, domain, a, constants, threads)
    trials = _trials(lambda: session.run(None, {"a": a}), seconds)
    (m, k), n = a.shape, constants["b"].shape[1]
    return Product(operator, m, k, n, trials, 1000 * m * k * n / min(trials))


def _session(operator: str, domain: str, a: np.ndarray, constants: dict[str, np.ndarray], threads: int) -> Any:  # noqa: ANN401
    import onnxruntime
    from onnx import TensorProto, helper, numpy_helper

    graph = helper.make_graph(
        [helper.make_node(operator, ["a", *constants], ["y"], domain=domain)],
        "product",
        [helper.make_tensor_value_info("a", helper.np_dtype_to_tensor_dtype(a.dtype), a.shape)],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, (a.shape[0], constants["b"].shape[1]))],
        [numpy_helper.from_array(value, name) for name, value in constants.items()],
    )
    opsets = [helper.make_opsetid("", OPSET), helper.make_opsetid(CONTRIB, 1)]
    model = helper.make_model(graph, opset_imports=opsets, ir_version=IR_VERSION)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    return onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])


def _copy(threads: int, size_bytes: int, seconds: float) -> Copy:
    """Time copying ``size_bytes``, a part in each thread; numpy lets go of the interpreter's lock while it copies."""
    ram = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") if hasattr(os, "sysconf") else 0
    size = min(size_bytes, ram // 16 or size_bytes)
    sources = np.array_split(np.ones(size, np.uint8), threads)
    targets = np.array_split(np.zeros(size, np.uint8), threads)
    with ThreadPoolExecutor(threads) as pool:
        trials = _trials(lambda: list(pool.map(np.copyto, targets, sources)), seconds)
    return Copy(size, trials, 1000 * 2 * size / min(trials))


def _trials(call: Callable[[], object], seconds: float) -> tuple[float, ...]:
    """Milliseconds of each call, the first one discarded."""
    call()
    found: list[float] = []
    until = time.perf_counter() + seconds
    while len(found) < LEAST_TRIALS or (len(found) < MOST_TRIALS and time.perf_counter() < until):
        start = time.perf_counter()
        call()
        found.append(1000 * (time.perf_counter() - start))
    return tuple(found)
