"""Output of the commands: JSON lines or rich text on stdout, warnings on stderr.

rich honours ``NO_COLOR`` and drops colour when stdout is not a terminal. No text from a user or a model is ever
printed as markup.
"""

from __future__ import annotations

import io
import json
import math
import sys
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import click

if TYPE_CHECKING:
    from rich.console import Console

__all__ = ["console", "dump_json", "emit_json", "figure", "one_line", "size", "warn", "write_bytes"]

NOT_MEASURED = "-"
# Width of tables in a pipe or a file, where there is no terminal to ask.
PIPE_WIDTH = 120


def console() -> Console:
    """A console on stdout as it is now (tests replace it); plain and of fixed width when it is no terminal.

    What stdout's encoding does not have, in a Windows pipe say, is escaped instead of ending the command.
    """
    from rich.console import Console

    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")
    width = None if sys.stdout.isatty() else PIPE_WIDTH
    return Console(file=sys.stdout, width=width, highlight=False, markup=False, emoji=False, soft_wrap=True)


def dump_json(value: Mapping[str, Any]) -> str:
    """One line of strict JSON: readable UTF-8, or escapes when a lone surrogate has no UTF-8 form.

    Raises ValueError for NaN and infinities, which JSON does not have.
    """
    line = json.dumps(value, ensure_ascii=False, allow_nan=False)
    try:
        line.encode()
    except UnicodeEncodeError:
        return json.dumps(value, allow_nan=False)
    return line


def emit_json(value: Mapping[str, Any]) -> None:
    """Print one object as one line of UTF-8 on stdout, whatever the locale's encoding."""
    write_bytes(dump_json(value).encode() + b"\n")


def write_bytes(data: bytes) -> None:
    """Write to stdout at once: a reader may be waiting, and a full disk must show while it can set the exit code."""
    sys.stdout.buffer.write(data)
    sys.stdout.buffer.flush()


def one_line(message: object) -> str:
    """A message with its line breaks folded, so that one fault is one line."""
    return " ".join(str(message).split()) or type(message).__name__


def warn(message: str) -> None:
    """A warning on stderr, so that stdout stays clean for the answer."""
    click.echo(f"warning: {message}", err=True)


def figure(value: float | None, digits: int = 3) -> str:
    """A measured figure; a dash when it was not measured or is not defined, never 0."""
    return NOT_MEASURED if value is None or math.isnan(value) else f"{value:.{digits}f}"


def size(size_bytes: int) -> str:
    """Bytes for people, in decimal units (1 MB = 1,000,000 bytes)."""
    for unit, factor in (("GB", 10**9), ("MB", 10**6), ("kB", 10**3)):
        if size_bytes >= factor:
            return f"{size_bytes / factor:.1f} {unit}"
    return f"{size_bytes} bytes"
