"""The same student for fast INT8 dot products: a second, small graph beside ``model.onnx``.

The graph, ``model.int8.onnx``, holds no weights; it names a file of INT8 weights that no bundle carries.
``model.int8.json`` says how a machine makes that file once from the INT4 integers of ``model.onnx``
(:mod:`edgeguard.engines.int8`): INT4 lies on the disk, INT8 is computed with.

Activations are rounded to INT8 with one scale a token (with one a tensor, one outlier token would spoil all others): a
row is divided by its largest magnitude, rounded by a constant scale, and the product multiplied back. uint8 with the
zero point 128 times int8 is what MLAS has the fast kernel for. One rounding serves every product that reads the row,
and the row scale of ``up`` passes through the gate's product to the end of the MLP.

Operators: onnxruntime ``docs/ContribOperators.md`` (MatMulIntegerToFloat).
"""

from __future__ import annotations

import hashlib
import json
import mmap
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from types import MappingProxyType
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import TensorProto

from convert.export.onnx import compare_logits, run_onnx
from convert.export.onnx_graph import CONTRIB, GuardGraph, StudentConfig, Weights
from convert.files import write_whole
from convert.quantize import Int4Weight, as_int4
from convert.smoothing import row_of
from edgeguard.engines.int8 import ALIGNMENT, STEPS, Matrix, Plan, write_int8_weights
from edgeguard.errors import ParityError

Shifts = Mapping[str, NDArray[np.int8]]

__all__ = ["INT8_GRAPH", "INT8_PLAN", "build_int8_graph", "export_int8"]

INT8_GRAPH, INT8_PLAN = "model.int8.onnx", "model.int8.json"

ZERO_POINT = 128
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
    """Write the INT8 graph and its plan beside ``source``, a ``model.onnx`` of ours; run them against the reference.

    ``reference_logits`` and the samples: see :func:`convert.export.onnx.export_onnx`, which also says what is returned
    and raised; ``shifts``: see :func:`build_int8_graph`. Nothing is kept of a graph that differs.
    """
    from convert.export.transcode import read_onnx

    student = read_onnx(source)
    model, plan = build_int8_graph(student.weights, student.config, source, _weights_name(source, shifts), shifts)
    written = {INT8_GRAPH: model.SerializeToString(), INT8_PLAN: (json.dumps(plan.to_dict()) + "\n").encode()}
    for name, raw in written.items():
        write_whole(source.with_name(name), lambda path, raw=raw: path.write_bytes(raw))  # type: ignore[misc]
    try:
        with TemporaryDirectory(dir=source.parent) as folder:  # on a disk: the system's own may be memory
            graph = Path(shutil.copy(source.with_name(INT8_GRAPH), folder))
            write_int8_weights(source.with_name(INT8_PLAN), Path(folder))
            logits = run_onnx(graph, sample_ids, sample_mask)
        return compare_logits(logits, reference_logits, tolerance=tolerance, name=INT8_GRAPH)
    except ParityError:
        for name in written:
            source.with_name(name).unlink()
        raise


def build_int8_graph(
    weights: Weights,
    config: StudentConfig,
    source: Path,
    weights_name: str,
    shifts: Shifts = MappingProxyType({}),
) -> tuple[onnx.ModelProto, Plan]:
    """The INT8 graph of the student in ``source``, and the plan by which its file of weights is made.

    ``weights``, ``config``: as :func:`~convert.export.onnx_graph.build_guard_graph` took them for ``source``;
    ``weights_name``: of the file that the graph will look for beside itself; ``shifts``: see
    :mod:`convert.smoothing`. Inputs and output are those of the INT4 graph, and the keys and values of earlier
    tokens. Raises ValueError when ``source`` does not hold the very bytes of a weight.
    """
    graph = _Int8Graph(weights, config, int4=True, accuracy_level=4)
    with source.open("rb") as stream, mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ) as held:
        graph.keep_weights(held, source.name, weights_name, shifts)
        graph.build()
        graph.move_large_ones()
    return graph.model(), Plan(source.name, weights_name, graph.end, tuple(graph.matrices), tuple(graph.copies))


def _weights_name(source: Path, shifts: Shifts) -> str:
    """A name for one content alone."""
    digest = hashlib.sha256(source.read_bytes())
    for name, shift in sorted(shifts.items()):
        digest.update(name.encode() + shift.tobytes())
    return f"edgeguard-int8-{digest.hexdigest()[:NAME_DIGITS]}.bin"


class _Int8Graph(GuardGraph):
    """The graph whose products are of INT8 rows with INT8 weights; ``matrices``, ``copies``: what the plan lists."""

    past = True

    def keep_weights(self, held: mmap.mmap, source: str, weights_name: str, shifts: Shifts) -> None:
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
        down = self._product(f"{name}.down", both, f"{prefix}down_proj.weight")
        scale = self._node("Mul", [self._rounded(both)[1], self._rounded(normed)[1]], f"{name}.down.magnitude")
        return self._node("Mul", [down, scale], f"{name}.down")

    def _linear(self, name: str, x: str, *weights: str) -> str:
        return self._node("Mul", [self._product(name, x, *weights), self._rounded(x)[1]], name)

    def _product(self, name: str, x: str, *weights: str) -> str:
        """Rows of ``x``, each over its magnitude, times the weights."""
        weight, scales = self._int8(name, weights)
        inputs = [self._rounded(x)[0], weight, self._step(), scales, self._zero_point()]
        return self._node("MatMulIntegerToFloat", inputs, f"{name}.product", domain=CONTRIB)

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
        return self._initializer("zero_point", np.array(ZERO_POINT, np.uint8))

    def _int8(self, name: str, weights: Sequence[str]) -> tuple[str, str]:
        """(int8 [K, N], float32 channel scales [N]) of INT4 weights, both in the file that the plan makes."""
        quantized = Int4Weight.stack([as_int4(self.weights[w]) for w in weights])
        rows, columns = quantized.shape
        nibbles = self._find(name, quantized.pack_matmulnbits().tobytes())
        scales = self._find(name, quantized.scales.tobytes())
        weight, channel = f"{name}.int8", f"{name}.channel_scales"
        to = self.end
        self.initializers[weight] = self._external(weight, TensorProto.INT8, (columns, rows), rows * columns)
        shifts = self.shifts.get(row_of(weights[0])), self._row_shifts(weights[0])
        self.matrices.append(Matrix(nibbles, scales, (rows, columns), to, self.end, *shifts))
        self.initializers[channel] = self._external(channel, TensorProto.FLOAT, (rows,), 4 * rows)
        return weight, channel

    def _row_shifts(self, weight: str) -> NDArray[np.int8] | None:
        """``up`` bears what the columns of ``down`` were multiplied by."""
        prefix, _, reader = weight.partition("up_proj")
        shift = self.shifts.get(row_of(f"{prefix}down_proj{reader}")) if reader else None
        return None if shift is None else -shift

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
            raise ValueError(f"{self.source} does not hold {name}. Pass the weights that it was made of.")
        return offset
