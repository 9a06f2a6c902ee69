"""INT4 on the disk, INT8 in compute: the file of INT8 weights that a bundle's plan describes.

A CPU with INT8 dot products (VNNI, AMX, i8mm) multiplies bytes faster than any kernel unpacks nibbles. A bundle may
hold a graph for that, ``model.int8.onnx``, without weights, and a plan, ``model.int8.json``: where the INT4 integers of
every matrix stand in ``model.onnx``, and where their INT8 copy goes in the file that is made once a machine, in the
cache.

Weights take fewer steps where sums of products are cut (:mod:`edgeguard.engines.byte_products`): smaller numbers reach
the limit less often. How many was measured on the verdicts of the shipped guard (docs/log.md, 2026-11-22).
"""

from __future__ import annotations

import base64
import os
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

import numpy as np
from numpy.typing import NDArray

from edgeguard import schema
from edgeguard.cache import cached
from edgeguard.engines.byte_products import byte_products_are_exact
from edgeguard.engines.int4_weights import GROUP_SIZE, Int4Weight
from edgeguard.errors import BundleError
from edgeguard.manifest import NAME_CALLED, NAME_PATTERN

if TYPE_CHECKING:
    from edgeguard.bundle import Bundle

__all__ = [
    "ALIGNMENT",
    "INT8_ENGINE",
    "PLAN_FORMAT",
    "STEPS",
    "STEPS_WHERE_CUT",
    "Matrix",
    "Plan",
    "int8_files",
    "to_int8",
    "write_int8_weights",
]

INT8_ENGINE = "onnx-int8"
PLAN_FORMAT = 1
STEPS = 127  # of the INT8 grid on each side of zero
STEPS_WHERE_CUT = 100
ALIGNMENT = 64  # bytes, of every tensor in the file: a cache line
CHUNK_ROWS = 2048  # unpacked at a time, so that the memory stays small
MAX_BYTES = 2**40


@dataclass(frozen=True)
class Matrix:
    """How one INT4 matrix [N, K] becomes INT8. All places are offsets in bytes.

    ``nibbles``, ``scales``: in the source; ``to``, ``channel_scales``: where INT8 [K, N] and float32 scales [N] go.
    ``columns``, ``rows``: exponents of two, int8 [K] and [N], that columns and channel scales are multiplied by; None
    for none.
    """

    nibbles: int
    scales: int
    shape: tuple[int, int]
    to: int
    channel_scales: int
    columns: NDArray[np.int8] | None = None
    rows: NDArray[np.int8] | None = None

    @classmethod
    def from_dict(cls, data: object, where: str) -> Matrix:
        """Read an entry of ``matrices``."""
        fields = schema.record(data, where, list(cls.__dataclass_fields__))
        shape = fields["shape"]
        if not isinstance(shape, list) or len(shape) != 2:
            schema.fail(f"{where}.shape", "two whole numbers", shape)
        rows, columns = (schema.integer(size, f"{where}.shape", low=1, high=MAX_BYTES) for size in shape)
        places = ("nibbles", "scales", "to", "channel_scales")
        return cls(
            shape=(rows, columns),
            columns=_shifts(fields["columns"], f"{where}.columns", columns),
            rows=_shifts(fields["rows"], f"{where}.rows", rows),
            **{name: schema.integer(fields[name], f"{where}.{name}", low=0, high=MAX_BYTES) for name in places},
        )

    def to_dict(self) -> dict[str, object]:
        """The object that :meth:`from_dict` reads; exponents as base64."""
        shifts = {"columns": self.columns, "rows": self.rows}
        encoded = {n: None if a is None else base64.b64encode(a.tobytes()).decode() for n, a in shifts.items()}
        return {**vars(self), **encoded}


@dataclass(frozen=True)
class Plan:
    """How the file ``weights`` of ``size`` bytes is made from the file ``source``.

    The name ``weights`` is that of one content, since all bundles share a cache.

    ``copies``: (place in the source, bytes, place in the weights).
    """

    source: str
    weights: str
    size: int
    matrices: tuple[Matrix, ...]
    copies: tuple[tuple[int, int, int], ...]

    @classmethod
    def from_json(cls, raw: bytes, where: str) -> Plan:
        """Read a plan. Raises BundleError for one of another format, or with values out of range."""
        fields = ["format", "source", "weights", "size", "matrices", "copies"]
        data = schema.record(schema.json_object(raw, where), where, fields)
        schema.integer(data["format"], f"{where}: format", low=PLAN_FORMAT, high=PLAN_FORMAT)
        for name in ("matrices", "copies"):
            if not isinstance(data[name], list):
                schema.fail(f"{where}: {name}", "a list", data[name])
        return cls(
            source=schema.text(data["source"], f"{where}: source", pattern=NAME_PATTERN, called=NAME_CALLED),
            weights=schema.text(data["weights"], f"{where}: weights", pattern=NAME_PATTERN, called=NAME_CALLED),
            size=schema.integer(data["size"], f"{where}: size", low=1, high=MAX_BYTES),
            matrices=tuple(Matrix.from_dict(m, f"{where}: matrices[{i}]") for i, m in enumerate(data["matrices"])),
            copies=tuple(_copy(copy, f"{where}: copies[{i}]") for i, copy in enumerate(data["copies"])),
        )

    def to_dict(self) -> dict[str, object]:
        """The object that :meth:`from_json` reads."""
        return {"format": PLAN_FORMAT, **vars(self), "matrices": [matrix.to_dict() for matrix in self.matrices]}


def _shifts(value: object, where: str, size: int) -> NDArray[np.int8] | None:
    if value is None:
        return None
    try:
        raw = base64.b64decode(schema.text(value, where), validate=True)
    except ValueError:
        raw = b""
    if len(raw) != size:
        schema.fail(where, f"null or base64 of {size} bytes", value)
    return np.frombuffer(raw, np.int8)


def _copy(value: object, where: str) -> tuple[int, int, int]:
    if not isinstance(value, list) or len(value) != 3:
        schema.fail(where, "three whole numbers", value)
    place, size, to = (schema.integer(number, where, low=0, high=MAX_BYTES) for number in value)
    return place, size, to


def int8_files(bundle: Bundle) -> tuple[Path, Path]:
    """The bundle's INT8 graph, and its file of INT8 weights in the cache, which is made the first time.

    Raises BundleError when the bundle has no such graph, or a plan that its weights do not fit; EngineError when
    the cache cannot be written.
    """
    graph = bundle.file_for(INT8_ENGINE)
    file = graph.with_suffix(".json")
    if file.name not in bundle.manifest.files:
        raise BundleError(f"{bundle.path}: expected {file.name} beside {graph.name}, found no such file listed.")
    plan, steps = Plan.from_json(file.read_bytes(), str(file)), _steps_here()
    # The graph looks for the file by its name, so other contents of that name stand in a folder of their own.
    name = plan.weights if steps == STEPS else f"steps-{steps}/{plan.weights}"
    return graph, cached(name, lambda path: _carry_out(plan, file, path, steps))


def write_int8_weights(file: Path, folder: Path, steps: int | None = None) -> Path:
    """Carry out the plan in ``file``, whose source stands beside it; returns the file of weights, in ``folder``.

    ``steps``: of the INT8 grid on each side of zero, at most 127; None for as many as this CPU should have.

    Raises BundleError for a damaged plan, or one that its source does not fit.
    """
    plan = Plan.from_json(file.read_bytes(), str(file))
    _carry_out(plan, file, folder / plan.weights, steps or _steps_here())
    return folder / plan.weights


def _steps_here() -> int:
    return STEPS if byte_products_are_exact() else STEPS_WHERE_CUT


def _carry_out(plan: Plan, file: Path, target: Path, steps: int) -> None:
    try:
        source = np.memmap(file.with_name(plan.source), np.uint8, "r")
        with target.open("wb") as output:
            output.truncate(plan.size)
            for matrix in plan.matrices:
                _write_matrix(source, matrix, output, steps)
            for place, size, to in plan.copies:
                _write(output, to, _cut(source, place, size))
            written = output.seek(0, os.SEEK_END)
    except ValueError as error:
        raise BundleError(f"{file}: expected places within {plan.source}, found {error}.") from error
    if written != plan.size:
        raise BundleError(f"{file}: expected {plan.size} bytes of weights, found {written}.")


def _write_matrix(source: NDArray[np.uint8], matrix: Matrix, output: BinaryIO, steps: int) -> None:
    rows, columns = matrix.shape
    groups = columns // GROUP_SIZE
    packed = _cut(source, matrix.nibbles, rows * columns // 2).reshape(rows, groups, GROUP_SIZE // 2)
    scales = _cut(source, matrix.scales, 2 * rows * groups).view(np.float16).reshape(rows, groups)
    weight, channel = np.empty((columns, rows), np.int8), np.empty(rows, np.float32)
    for start in range(0, rows, CHUNK_ROWS):
        chunk = slice(start, start + CHUNK_ROWS)
        int4 = Int4Weight.unpack_matmulnbits(packed[chunk], scales[chunk])
        values, channel[chunk] = to_int8(int4, matrix.columns, steps)
        weight[:, chunk] = values.T
    _write(output, matrix.to, weight)
    _write(output, matrix.channel_scales, channel if matrix.rows is None else np.ldexp(channel, matrix.rows))


def to_int8(
    weight: Int4Weight, columns: NDArray[np.int8] | None = None, steps: int = STEPS
) -> tuple[NDArray[np.int8], NDArray[np.float32]]:
    """INT4 [N, K] -> (int8 [N, K], float32 channel scales [N]).

    ``columns``: exponents of two, int8 [K], that columns are multiplied by first. A channel's scale is its largest
    magnitude / ``steps`` (at most 127), so a value is at most half of it away from what it stands for.
    """
    values = weight.dequantize()
    if columns is not None:
        values *= np.ldexp(np.float32(1), columns)
    channel = np.abs(values).max(axis=1) / np.float32(steps)
    channel[channel == 0] = 1  # a channel of zeros
    return np.rint(values / channel[:, None]).astype(np.int8), channel


def _cut(source: NDArray[np.uint8], place: int, size: int) -> NDArray[np.uint8]:
    if place + size > source.size:
        raise ValueError(f"{size} bytes from {place} on, of {source.size}")
    return np.array(source[place : place + size])  # a copy: any place is aligned enough for it


def _write(output: BinaryIO, to: int, array: NDArray[Any]) -> None:
    output.seek(to)
    output.write(np.ascontiguousarray(array).data)
