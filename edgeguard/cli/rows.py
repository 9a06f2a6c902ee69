"""Rows of JSON Lines files, read one line at a time: what `scan` and `eval` share.

Reads strictly, because two readers of one line must see the same text: UTF-8 only, no key twice in an object, no NaN.
A line that fails is a row with an ``error``, never an exception. Blank lines are no rows. Plain and gzip are told
apart by their first bytes, not by their names.
"""

from __future__ import annotations

import contextlib
import gzip
import io
import json
import math
import sys
import zlib
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import IO, TYPE_CHECKING, Any

from edgeguard.errors import EdgeguardError, EngineError, InputError
from edgeguard.prompt import as_messages

if TYPE_CHECKING:
    from edgeguard.guard import Guard
    from edgeguard.verdict import Verdict

__all__ = ["ITEM_KEYS", "Row", "RowFile", "chunks", "decode_json", "judge", "stdin_bytes", "target_of"]

ITEM_KEYS = ("prompt", "response", "messages", "text")
# A line above this is an error, not read into memory; the largest text edgeguard promises to take is 10 MB.
MAX_LINE_BYTES = 16 * 2**20
# How much of a bad line is kept.
RAW_CHARS = 2000
# Rows are judged in chunks of several engine batches, so that rows of like length can share one.
BATCHES_PER_CHUNK = 4
READ_BYTES = 2**16
# Deeper rows are refused, long before anything that walks them meets Python's recursion limit.
MAX_DEPTH = 100
TOO_DEEP = f"nested more than {MAX_DEPTH} levels deep"
GZIP_MAGIC = b"\x1f\x8b"


@dataclass(frozen=True)
class Row:
    """One line of the input: its number (from 1), and either ``data`` or an ``error`` with the ``raw`` text."""

    line: int
    size_bytes: int
    data: dict[str, Any] | None
    error: str | None = None
    raw: str = ""

    def item(self) -> dict[str, Any]:
        """The fields that the guard judges. Raises InputError when there are none, or the line was bad."""
        if self.data is None:
            raise InputError(self.error or "not read")
        item = {key: self.data[key] for key in ITEM_KEYS if self.data.get(key) is not None}
        if not item:
            raise InputError(f"nothing to judge: the row has none of the fields {', '.join(ITEM_KEYS)}")
        return item


def stdin_bytes() -> IO[bytes]:
    """The bytes on stdin. Raises InputError where it is closed (``<&-``, or a program without a console)."""
    if sys.stdin is None:
        raise InputError("stdin is closed. Name a file instead of -.")
    return sys.stdin.buffer


class RowFile:
    """An input of rows: iterate over it. ``position`` and ``total`` are in bytes on disk, for a progress bar."""

    def __init__(self, path: str) -> None:
        """Open ``path``, or stdin for ``-``. Raises OSError, and InputError where stdin is closed."""
        self.path = path
        self._file: IO[bytes] = stdin_bytes() if path == "-" else open(path, "rb")  # noqa: PTH123
        self._counted = _Counted(self._file)
        self._buffer = io.BufferedReader(self._counted, READ_BYTES)
        self.total = _size_of(self._file)
        self._lines_bytes = 0
        self._packed = self._buffer.peek(2)[:2] == GZIP_MAGIC
        self._stream: io.BufferedIOBase = gzip.GzipFile(fileobj=self._buffer) if self._packed else self._buffer

    @property
    def position(self) -> int:
        """Bytes of the file that were taken so far; for gzip, of the packed file, and a buffer ahead of the rows."""
        return self._counted.count if self._packed else self._lines_bytes

    def __enter__(self) -> RowFile:
        """Itself."""
        return self

    def __exit__(self, *_: object) -> None:
        """Close the file; stdin stays open."""
        if self.path != "-":
            self._file.close()

    def __iter__(self) -> Iterator[Row]:
        """Rows as they are read, once. Raises InputError when gzip data is damaged."""
        try:
            for number, line in enumerate(_lines(self._stream), start=1):
                self._lines_bytes += len(line)
                if line.strip():
                    yield parse(number, line)
        except (EOFError, zlib.error, gzip.BadGzipFile) as error:
            raise InputError(
                f"{self.path}: the gzip data is damaged or cut short ({error}). Get the file again."
            ) from error


class _Counted(io.RawIOBase):
    """Counts the bytes that pass, because a pipe has no position to ask for."""

    def __init__(self, file: IO[bytes]) -> None:
        self._file = file
        self.count = 0

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:  # noqa: ANN401 - any writable buffer
        read = getattr(self._file, "read1", self._file.read)  # read1: a slow pipe hands over what it has
        data = read(len(buffer))
        buffer[: len(data)] = data
        self.count += len(data)
        return len(data)


def _size_of(file: IO[bytes]) -> int | None:
    """Size in bytes, or None for what has no size before its end (a pipe)."""
    with contextlib.suppress(OSError, ValueError):
        start = file.tell()
        end = file.seek(0, io.SEEK_END)
        file.seek(start)
        return end
    return None


def _lines(stream: io.BufferedIOBase) -> Iterator[bytes]:
    """Lines of at most MAX_LINE_BYTES + 1 bytes; the rest of a longer one is skipped without being kept."""
    while line := stream.readline(MAX_LINE_BYTES + 1):
        rest = line
        while len(rest) > MAX_LINE_BYTES and not rest.endswith(b"\n"):
            rest = stream.readline(MAX_LINE_BYTES + 1)
        yield line


def parse(number: int, line: bytes) -> Row:
    """One line to a row; every fault becomes its ``error``."""
    text = line.removeprefix(b"\xef\xbb\xbf") if number == 1 else line  # the mark some editors put first
    error = None
    data: Any = None
    try:
        if len(line) > MAX_LINE_BYTES:
            raise ValueError(f"the line is longer than {MAX_LINE_BYTES:,} bytes")
        data = decode_json(text.decode())
        if not isinstance(data, dict):
            error = f"not a JSON object but {type(data).__name__}"
    except UnicodeDecodeError as fault:
        error = f"not UTF-8 (byte {fault.start + 1} of the line)"
    except ValueError as fault:
        error = f"invalid JSON: {fault}"
    if error is None:
        return Row(number, len(line), data)
    raw = text[: 4 * RAW_CHARS].decode("utf-8", "backslashreplace").rstrip("\r\n")[:RAW_CHARS]
    return Row(number, len(line), None, error, raw)


def decode_json(text: str) -> Any:  # noqa: ANN401 - any JSON value
    """Strict JSON: ValueError for a key twice in one object, NaN, numbers out of range, deep nesting."""
    try:
        value = _DECODER.decode(text)
    except RecursionError as error:
        raise ValueError(TOO_DEEP) from error
    if text.count("[") + text.count("{") > MAX_DEPTH and _depth(value) > MAX_DEPTH:
        raise ValueError(TOO_DEEP)
    return value


def _depth(value: Any) -> int:  # noqa: ANN401 - any JSON value
    """Levels of containers, counted level by level, without recursion."""
    depth = 0
    level = [value]
    while level := [item for item in level if isinstance(item, dict | list)]:
        depth += 1
        level = [child for item in level for child in (item.values() if isinstance(item, dict) else item)]
    return depth


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) != len(pairs):
        twice = Counter(key for key, _ in pairs).most_common(1)[0][0]
        raise ValueError(f"the key {twice[:40]!r} stands twice in one object")
    return result


def _refuse(constant: str) -> float:
    raise ValueError(f"{constant} is not JSON")


def _finite(digits: str) -> float:
    value = float(digits)
    if math.isinf(value):
        raise ValueError(f"the number {digits[:40]} is out of range")
    return value


_DECODER = json.JSONDecoder(object_pairs_hook=_unique, parse_constant=_refuse, parse_float=_finite)


def chunks(rows: Iterator[Row], batch_size: int) -> Iterator[list[Row]]:
    """Groups of rows: several batches, but no more text at once than one longest line, so memory stays bounded."""
    chunk: list[Row] = []
    total = 0
    for row in rows:
        chunk.append(row)
        total += row.size_bytes
        if len(chunk) >= batch_size * BATCHES_PER_CHUNK or total >= MAX_LINE_BYTES:
            yield chunk
            chunk, total = [], 0
    if chunk:
        yield chunk


def judge(
    guard: Guard, rows: Sequence[Row], batch_size: int, item_of: Callable[[Row], Mapping[str, Any]] = Row.item
) -> list[Verdict | EdgeguardError]:
    """Verdicts in order; an error stands where a row could not be judged. ``item_of`` picks the fields to judge."""
    results: list[Verdict | EdgeguardError | None] = []
    items: list[Mapping[str, Any]] = []
    for row in rows:
        try:
            items.append(item_of(row))
            results.append(None)
        except InputError as error:
            results.append(error)
    judged = iter(_judge_items(guard, items, batch_size))
    return [next(judged) if result is None else result for result in results]


def target_of(item: Mapping[str, Any]) -> str:
    """``prompt`` or ``response``: what the verdict on ``item`` is about. Raises InputError as the guard would."""
    return "response" if as_messages(**item)[-1][0] == "assistant" else "prompt"


def _judge_items(
    guard: Guard, items: Sequence[Mapping[str, Any]], batch_size: int
) -> Sequence[Verdict | EdgeguardError]:
    """An engine that fails on a batch is asked again row by row: one bad row does not take others with it."""
    if not items:
        return []
    try:
        return guard.classify_many(items, batch_size=batch_size, on_error="return")
    except EngineError as error:
        if len(items) == 1:
            return [error]
    return [result for item in items for result in _judge_items(guard, [item], 1)]
