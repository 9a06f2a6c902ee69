"""Products of bytes: whether a CPU's kernels cut them is found by computing, and decides which INT8 graph runs."""

from __future__ import annotations

import base64

import numpy as np
import pytest

onnx = pytest.importorskip("onnx", reason="onnx is not installed: pip install 'edgeguard-runtime[test]'")

import onnxruntime  # noqa: E402
from onnx import TensorProto, helper  # noqa: E402

from edgeguard.engines import byte_products  # noqa: E402


def test_the_model_is_one_product_of_bytes() -> None:
    graph = helper.make_graph(
        [helper.make_node("MatMulInteger", ["x", "w"], ["y"])],
        "g",
        [
            helper.make_tensor_value_info("x", TensorProto.UINT8, [None, None]),
            helper.make_tensor_value_info("w", TensorProto.INT8, [None, None]),
        ],
        [helper.make_tensor_value_info("y", TensorProto.INT32, [None, None])],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 13)], ir_version=8, producer_name="")
    assert base64.b64decode(byte_products.MODEL) == model.SerializeToString()


def test_random_bytes_are_multiplied_as_the_largest_ones_say() -> None:
    rng = np.random.default_rng(0)
    x = rng.integers(0, 256, (64, 512), dtype=np.uint8)
    w = rng.integers(-127, 128, (512, 64), dtype=np.int8)
    session = onnxruntime.InferenceSession(base64.b64decode(byte_products.MODEL), providers=["CPUExecutionProvider"])
    exact = (session.run(None, {"x": x, "w": w})[0] == x.astype(np.int64) @ w.astype(np.int64)).all()
    assert byte_products.byte_products_are_exact() == exact
