"""Files that are written whole or not at all; files of the system, and packages, that may not be there."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

__all__ = ["installed_version", "read_or_none", "write_whole"]


def write_whole(file: Path, write: Callable[[Path], object]) -> None:
    """Let ``write`` make a temporary neighbour of ``file``, then move it into place in one step.

    Processes that write one file at once each leave a whole one; a killed one leaves ``.NAME.RANDOM.part``. Raises
    OSError, and what ``write`` raises: then ``file`` is as it was.
    """
    part = file.with_name(f".{file.name}.{os.urandom(8).hex()}.part")
    try:
        write(part)
        part.replace(file)
    finally:
        part.unlink(missing_ok=True)


def read_or_none(file: Path) -> str | None:
    """The text of a file of the system, stripped; None where there is none, or it may not be read."""
    try:
        return file.read_text(encoding="utf-8", errors="replace").strip()
    except OSError:
        return None


def installed_version(distribution: str) -> str | None:
    """The version of a package, by its name on the package index; None where it is not installed."""
    from importlib import metadata  # takes tens of milliseconds, and most commands need none of it

    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return None
