"""INT4 on the disk, INT8 in compute: the file of INT8 weights that a bundle's plan describes.

A CPU with INT8 dot products (VNNI, AMX, i8mm) multiplies bytes faster than any kernel unpacks nibbles. A bundle may
hold a graph for that, ``model.int8.onnx``, without weights, and a plan, ``model.int8.json``: where the INT4 integers of
every matrix stand in ``model.onnx``, and where their INT8 copy goes in the file that is made once a machine, in the
cache. Where a CPU's fast kernel cuts sums (:mod:`edgeguard.engines.byte_products`), the same graph with unsigned
weights, ``model.int8.unsigned.onnx``, takes their place: slower there than the kernel that cuts, and exact.

What ``down_proj`` reads has outliers in a few channels of a token. So the graph turns that row, block by block, with a
Hadamard matrix, which spreads them over the block, and the matrix is turned alike: the product is the same. Source: the
online rotation of QuaRot (Ashkboos et al. 2024, arXiv 2404.00456), in blocks.
"""

from __future__ import annotations

import base64
import hashlib
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
    "TURNED_BLOCK",
    "Matrix",
    "Plan",
    "hadamard",
    "int8_files",
    "to_int8",
    "unsigned_graph",
    "write_int8_weights",
]

INT8_ENGINE = "onnx-int8"
PLAN_FORMAT = 2
STEPS = 127  # of the INT8 grid on each side of zero
SIGN = np.uint8(0x80)  # the bit in which x and x + 128 differ
TURNED_BLOCK = 16  # columns; a power of two that divides a group of INT4, so that turning is sums alone
ALIGNMENT = 64  # bytes, of every tensor in the file: a cache line
CHUNK_ROWS = 2048  # unpacked at a time, so that the memory stays small
MAX_BYTES = 2**40


@dataclass(frozen=True)
class Matrix:
    """How one INT4 matrix [N, K] becomes INT8. All places are offsets in bytes.

    ``nibbles``, ``scales``: in the source; ``to``, ``channel_scales``: where INT8 [K, N] and float32 scales [N] go.
    ``columns``: exponents of two, int8 [K], that columns are multiplied by; None for none. ``turned``: whether what it
    reads comes turned by :func:`hadamard` in blocks of 16, so that its columns are, too.
    """

    nibbles: int
    scales: int
    shape: tuple[int, int]
    to: int
    channel_scales: int
    columns: NDArray[np.int8] | None = None
    turned: bool = False

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
            turned=schema.boolean(fields["turned"], f"{where}.turned"),
            **{name: schema.integer(fields[name], f"{where}.{name}", low=0, high=MAX_BYTES) for name in places},
        )

    def to_dict(self) -> dict[str, object]:
        """The object that :meth:`from_dict` reads; exponents as base64."""
        columns = None if self.columns is None else base64.b64encode(self.columns.tobytes()).decode()
        return {**vars(self), "columns": columns}


@dataclass(frozen=True)
class Plan:
    """How the file ``weights`` of ``size`` bytes is made from the file ``source``.

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
    plan = Plan.from_json(file.read_bytes(), str(file))
    if plan.source not in bundle.manifest.files:
        raise BundleError(f"{file}: source: expected a file that the manifest lists, found {plan.source!r}.")
    unsigned = not byte_products_are_exact()
    if unsigned and (graph := unsigned_graph(graph)).name not in bundle.manifest.files:
        raise BundleError(f"{bundle.path}: expected {graph.name}, which this CPU needs, found no such file listed.")
    # A graph looks for its file by the name in the plan, which a bundle may choose: the folder tells contents apart.
    made_of = f"{bundle.manifest.files[file.name].sha256} {bundle.manifest.files[plan.source].sha256} {unsigned}"
    folder = f"int8-{hashlib.sha256(made_of.encode()).hexdigest()[:32]}"
    return graph, cached(f"{folder}/{plan.weights}", lambda path: _carry_out(plan, file, path, unsigned=unsigned))


def unsigned_graph(graph: Path) -> Path:
    """Where the graph of unsigned weights stands that belongs to the INT8 graph ``graph``."""
    return graph.with_suffix(".unsigned.onnx")


def write_int8_weights(file: Path, folder: Path, *, unsigned: bool) -> Path:
    """Carry out the plan in ``file``, whose source stands beside it; returns the file of weights, in ``folder``.

    ``unsigned``: uint8 with the zero point 128 instead of int8. Raises BundleError for a damaged plan, or one that its
    source does not fit.
    """
    plan = Plan.from_json(file.read_bytes(), str(file))
    _carry_out(plan, file, folder / plan.weights, unsigned=unsigned)
    return folder / plan.weights


def _carry_out(plan: Plan, file: Path, target: Path, *, unsigned: bool) -> None:
    try:
        source = np.memmap(file.with_name(plan.source), np.uint8, "r")
        with target.open("wb") as output:
            output.truncate(plan.size)
            for matrix in plan.matrices:
                _write_matrix(source, matrix, output, unsigned=unsigned)
            for place, size, to in plan.copies:
                _write(output, to, _cut(source, place, size))
            written = output.seek(0, os.SEEK_END)
    except ValueError as error:
        raise BundleError(f"{file}: expected places within {plan.source}, found {error}.") from error
    if written != plan.size:
        raise BundleError(f"{file}: expected {plan.size} bytes of weights, found {written}.")


def _write_matrix(source: NDArray[np.uint8], matrix: Matrix, output: BinaryIO, *, unsigned: bool) -> None:
    rows, columns = matrix.shape
    groups = columns // GROUP_SIZE
    packed = _cut(source, matrix.nibbles, rows * columns // 2).reshape(rows, groups, GROUP_SIZE // 2)
    scales = _cut(source, matrix.scales, 2 * rows * groups).view(np.float16).reshape(rows, groups)
    weight, channel = np.empty((columns, rows), np.int8), np.empty(rows, np.float32)
    for start in range(0, rows, CHUNK_ROWS):
        chunk = slice(start, start + CHUNK_ROWS)
        int4 = Int4Weight.unpack_matmulnbits(packed[chunk], scales[chunk])
        values, channel[chunk] = to_int8(int4, matrix.columns, turned=matrix.turned)
        weight[:, chunk] = values.T
    _write(output, matrix.to, weight.view(np.uint8) ^ SIGN if unsigned else weight)
    _write(output, matrix.channel_scales, channel)


def to_int8(
    weight: Int4Weight, columns: NDArray[np.int8] | None = None, *, turned: bool = False
) -> tuple[NDArray[np.int8], NDArray[np.float32]]:
    """INT4 [N, K] -> (int8 [N, K], float32 channel scales [N]).

    ``columns``: exponents of two, int8 [K], that columns are multiplied by first; ``turned``: then blocks of 16 columns
    are multiplied by :func:`hadamard` / 16, its inverse. A channel's scale is its largest magnitude / 127, so a
    value is at most half of it away from what it stands for.
    """
    values = weight.dequantize()
    if columns is not None:
        values *= np.ldexp(np.float32(1), columns)
    if turned:
        blocks = values.reshape(len(values), -1, TURNED_BLOCK)
        values = (blocks @ (hadamard() / np.float32(TURNED_BLOCK))).reshape(values.shape)
    channel = np.abs(values).max(axis=1) / np.float32(STEPS)
    channel[channel == 0] = 1  # a channel of zeros
    return np.rint(values / channel[:, None]).astype(np.int8), channel


def hadamard(size: int = TURNED_BLOCK) -> NDArray[np.float32]:
    """Sylvester's Hadamard matrix, float32 [size, size] of +1 and -1, for a power of two; times itself: size * I."""
    matrix = np.ones((1, 1), np.float32)
    while len(matrix) < size:
        matrix = np.block([[matrix, matrix], [matrix, -matrix]])
    return matrix


def _cut(source: NDArray[np.uint8], place: int, size: int) -> NDArray[np.uint8]:
    if place + size > source.size:
        raise ValueError(f"{size} bytes from {place} on, of {source.size}")
    return np.array(source[place : place + size])  # a copy: any place is aligned enough for it


def _write(output: BinaryIO, to: int, array: NDArray[Any]) -> None:
    output.seek(to)
    output.write(np.ascontiguousarray(array).data)
