"""The same student for fast INT8 dot products: a second, small graph beside ``model.onnx``.

The graph, ``model.int8.onnx``, holds no weights; it names a file of INT8 weights that no bundle carries.
``model.int8.json`` says how a machine makes that file once from the INT4 integers of ``model.onnx``
(:mod:`edgeguard.engines.int8`): INT4 lies on the disk, INT8 is computed with.

Activations are rounded to INT8 with one scale a token (with one a tensor, one outlier token would spoil all others): a
row is divided by its largest magnitude, rounded by a constant scale, and the product multiplied back. uint8 with the
zero point 128 times int8 is what MLAS has the fast kernel for; a twin of the graph, with weights in uint8, is for CPUs
on which that kernel is not exact. One rounding serves every product that reads the row, and the row scale of ``up``
passes through the gate's product to the end of the MLP. What ``down_proj`` reads is turned before it is rounded
(:mod:`edgeguard.engines.int8` says why).

Operators: onnxruntime ``docs/ContribOperators.md`` (MatMulIntegerToFloat).
"""

from __future__ import annotations

import hashlib
import json
import mmap
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from types import MappingProxyType
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import TensorProto, numpy_helper

from convert.export.onnx import compare_logits, run_onnx
from convert.export.onnx_graph import CONTRIB, ROPE_TABLES, GuardGraph, StudentConfig, Weights
from convert.files import write_whole
from convert.quantize import Int4Weight, as_int4
from convert.smoothing import row_of
from edgeguard.engines.byte_products import byte_products_are_exact
from edgeguard.engines.int8 import (
    ALIGNMENT,
    PLAN_FORMAT,
    STEPS,
    TURNED_BLOCK,
    Matrix,
    Plan,
    hadamard,
    unsigned_graph,
    write_int8_weights,
)
from edgeguard.errors import ParityError

Shifts = Mapping[str, NDArray[np.int8]]

__all__ = ["INT8_FILES", "INT8_GRAPH", "INT8_PLAN", "build_int8_graph", "export_int8", "int8_model"]

INT8_GRAPH, INT8_PLAN = "model.int8.onnx", "model.int8.json"
INT8_FILES = (INT8_GRAPH, unsigned_graph(Path(INT8_GRAPH)).name, INT8_PLAN)

PRODUCT = "MatMulIntegerToFloat"
ZERO_POINT, ZERO_POINT_NAME = 128, "zero_point"
LEAST = 1e-30  # of a row's magnitude: a row of zeros is divided by something
NAME_DIGITS = 16
INLINE_BYTES = 1024  # of a tensor that stands in the graph itself


def export_int8(
    source: Path,
    reference_logits: NDArray[np.floating[Any]],
    sample_ids: NDArray[np.int64],
    sample_mask: NDArray[np.int64],
    *,
    tolerance: float,
    shifts: Shifts = MappingProxyType({}),
) -> dict[str, float]:
    """Write the INT8 graph, its twin and their plan beside ``source``, a ``model.onnx`` of ours, and run them.

    ``reference_logits`` and the samples: see :func:`convert.export.onnx.export_onnx`, which also says what is returned
    and raised; ``shifts``: see :func:`build_int8_graph`. Nothing is kept of a graph that differs from the reference.
    """
    from edgeguard.engines.gguf_source import read_onnx

    student = read_onnx(source)
    model, plan = build_int8_graph(student.weights, student.config, source, _weights_name(source, shifts), shifts)
    twin = _unsigned_twin(model)
    raw_plan = (json.dumps(plan.to_dict()) + "\n").encode()
    for file, raw in zip(INT8_FILES, (model.SerializeToString(), twin.SerializeToString(), raw_plan), strict=True):
        write_whole(source.with_name(file), lambda path, raw=raw: path.write_bytes(raw))  # type: ignore[misc]
    try:
        # Both compute the same, where they are exact: the twin on every CPU.
        for unsigned in (False, True) if byte_products_are_exact() else (True,):
            with int8_model(source.with_name(INT8_GRAPH), unsigned=unsigned) as graph:
                logits = run_onnx(graph, sample_ids, sample_mask)
            figures = compare_logits(logits, reference_logits, tolerance=tolerance, name=graph.name)
        return figures
    except ParityError:
        for file in INT8_FILES:
            source.with_name(file).unlink()
        raise


@contextmanager
def int8_model(graph: Path, *, unsigned: bool) -> Iterator[Path]:
    """``graph``, or its twin if ``unsigned``, beside weights made by its plan: a model that runs, while this lasts."""
    with TemporaryDirectory(dir=graph.parent) as folder:  # on a disk: the system's own may be memory
        write_int8_weights(graph.with_suffix(".json"), Path(folder), unsigned=unsigned)
        yield Path(shutil.copy(unsigned_graph(graph) if unsigned else graph, folder))


def build_int8_graph(
    weights: Weights,
    config: StudentConfig,
    source: Path,
    weights_name: str,
    shifts: Shifts = MappingProxyType({}),
) -> tuple[onnx.ModelProto, Plan]:
    """The INT8 graph of the student in ``source``, and the plan by which its file of weights is made.

    ``weights``, ``config``: as :func:`~convert.export.onnx_graph.build_guard_graph` took them for ``source``;
    ``weights_name``: of the file that the graph will look for beside itself; ``shifts``: see :mod:`convert.smoothing`.
    Inputs and output are those of the INT4 graph, and the keys and values of earlier tokens. Raises ValueError when
    ``source`` does not hold the very bytes of a weight.
    """
    graph = _Int8Graph(weights, config, int4=True, accuracy_level=4)
    with source.open("rb") as stream, mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ) as held:
        graph.keep_weights(held, source, weights_name, shifts)
        graph.build()
        graph.move_large_ones()
    return graph.model(), Plan(source.name, weights_name, graph.end, tuple(graph.matrices), tuple(graph.copies))


def _unsigned_twin(model: onnx.ModelProto) -> onnx.ModelProto:
    """The same graph for weights in uint8, with the zero point that the rows have; the plan is the same."""
    twin = onnx.ModelProto()
    twin.CopyFrom(model)
    for tensor in twin.graph.initializer:
        if tensor.data_type == TensorProto.INT8:
            tensor.data_type = TensorProto.UINT8
    for node in twin.graph.node:
        if node.op_type == PRODUCT:
            node.input.append(ZERO_POINT_NAME)
    return twin


def _weights_name(source: Path, shifts: Shifts) -> str:
    """A name for one content alone."""
    digest = hashlib.sha256(source.read_bytes() + bytes([PLAN_FORMAT]))
    for name, shift in sorted(shifts.items()):
        digest.update(name.encode() + shift.tobytes())
    return f"edgeguard-int8-{digest.hexdigest()[:NAME_DIGITS]}.bin"


class _Int8Graph(GuardGraph):
    """The graph whose products are of INT8 rows with INT8 weights; ``matrices``, ``copies``: what the plan lists."""

    past = True

    def keep_weights(self, held: mmap.mmap, source: Path, weights_name: str, shifts: Shifts) -> None:
        """``held``: the bytes of the file ``source``; ``weights_name``: the file that the graph's weights are in."""
        self.held, self.source, self.weights_name, self.shifts = held, source, weights_name, shifts
        self.matrices: list[Matrix] = []
        self.copies: list[tuple[int, int, int]] = []
        self.end = 0
        self.rows: dict[str, tuple[str, str]] = {}

    def move_large_ones(self) -> None:
        """Let what is large and not INT8 (embedding, RoPE tables) be copied from the INT4 file."""
        for name, tensor in self.initializers.items():
            if len(tensor.raw_data) > INLINE_BYTES and not name.endswith("layernorm.weight"):
                size, offset = len(tensor.raw_data), self._find(name, tensor.raw_data)
                self.copies.append((offset, size, self.end))
                self.initializers[name] = self._external(name, tensor.data_type, tuple(tensor.dims), size)

    def _rope_tables(self) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
        """Those of the source, which another CPU may have computed."""
        tensors = {tensor.name: tensor for tensor in onnx.load(self.source).graph.initializer}
        cos, sin = (numpy_helper.to_array(tensors[name]) for name in ROPE_TABLES)
        return cos, sin

    def _float(self, name: str) -> str:
        """As in the INT4 graph; a norm's weights bear what its readers' columns were multiplied by."""
        shift = self.shifts.get(row_of(name))
        values = self._array(name)
        return self._initializer(name, values if shift is None else np.ldexp(values, -shift.astype(np.int32)))

    def _mlp(self, layer: int, normed: str) -> str:
        name, prefix = f"layers.{layer}.mlp", f"model.layers.{layer}.mlp."
        gate = self._linear(f"{name}.gate", normed, f"{prefix}gate_proj.weight")
        gate = self._node("QuickGelu", [gate], f"{name}.silu", domain=CONTRIB, alpha=1.0)
        up = self._product(f"{name}.up", normed, f"{prefix}up_proj.weight")
        both = self._node("Mul", [gate, up], f"{name}.both")
        turned = self._turned(both)
        down = self._product(f"{name}.down", turned, f"{prefix}down_proj.weight", turned=True)
        scale = self._node("Mul", [self._rounded(turned)[1], self._rounded(normed)[1]], f"{name}.down.magnitude")
        return self._node("Mul", [down, scale], f"{name}.down")

    def _turned(self, x: str) -> str:
        """Rows of ``x``, blocks of 16 times a Hadamard matrix: sums that spread a large value over its block."""
        inner = self.config.intermediate_size
        blocks = self._constant("turned_blocks", [0, 0, inner // TURNED_BLOCK, TURNED_BLOCK])
        x = self._node("Reshape", [x, blocks], f"{x}.blocks")
        x = self._node("MatMul", [x, self._initializer("hadamard", hadamard())], f"{x}.turned")
        return self._node("Reshape", [x, self._constant("turned_rows", [0, 0, inner])], f"{x}.rows")

    def _linear(self, name: str, x: str, *weights: str) -> str:
        return self._node("Mul", [self._product(name, x, *weights), self._rounded(x)[1]], name)

    def _product(self, name: str, x: str, *weights: str, turned: bool = False) -> str:
        """Rows of ``x``, each over its magnitude, times the weights; ``turned``: see :class:`Matrix`."""
        weight, scales = self._int8(name, weights, turned=turned)
        inputs = [self._rounded(x)[0], weight, self._step(), scales, self._zero_point()]
        return self._node(PRODUCT, inputs, f"{name}.product", domain=CONTRIB)

    def _rounded(self, x: str) -> tuple[str, str]:
        """(uint8 rows of ``x``, each over its magnitude; magnitudes [..., 1]): made once for all that read ``x``."""
        if x not in self.rows:
            largest = self._node("Abs", [x], f"{x}.abs")
            largest = self._node("ReduceMax", [largest, self._constant("axis_last", [-1])], f"{x}.largest")
            magnitude = self._node("Max", [largest, self._scalar("least", LEAST)], f"{x}.magnitude")
            share = self._node("Div", [x, magnitude], f"{x}.share")
            rounded = self._node("QuantizeLinear", [share, self._step(), self._zero_point()], f"{x}.uint8")
            self.rows[x] = (rounded, magnitude)
        return self.rows[x]

    def _step(self) -> str:
        return self._scalar("step", 1 / STEPS)

    def _zero_point(self) -> str:
        return self._initializer(ZERO_POINT_NAME, np.array(ZERO_POINT, np.uint8))

    def _int8(self, name: str, weights: Sequence[str], *, turned: bool) -> tuple[str, str]:
        """(int8 [K, N], float32 channel scales [N]) of INT4 weights, both in the file that the plan makes."""
        quantized = Int4Weight.stack([as_int4(self.weights[w]) for w in weights])
        rows, columns = quantized.shape
        nibbles = self._find(name, quantized.pack_matmulnbits().tobytes())
        scales = self._find(name, quantized.scales.tobytes())
        weight, channel = f"{name}.int8", f"{name}.channel_scales"
        to = self.end
        self.initializers[weight] = self._external(weight, TensorProto.INT8, (columns, rows), rows * columns)
        shift = self.shifts.get(row_of(weights[0]))
        self.matrices.append(Matrix(nibbles, scales, (rows, columns), to, self.end, shift, turned))
        self.initializers[channel] = self._external(channel, TensorProto.FLOAT, (rows,), 4 * rows)
        return weight, channel

    def _external(self, name: str, data_type: int, shape: tuple[int, ...], size: int) -> TensorProto:
        """A tensor of the file of weights, at its next free place."""
        tensor = TensorProto(name=name, data_type=data_type, dims=shape, data_location=TensorProto.EXTERNAL)
        for key, value in (("location", self.weights_name), ("offset", self.end), ("length", size)):
            tensor.external_data.add(key=key, value=str(value))
        self.end += -(-size // ALIGNMENT) * ALIGNMENT
        return tensor

    def _find(self, name: str, raw: bytes) -> int:
        """Where ``source`` holds these bytes; wherever equal bytes stand will do."""
        offset = self.held.find(raw)
        if offset < 0:
            raise ValueError(f"{self.source.name} does not hold {name}. Pass the weights that it was made of.")
        return offset
