"""Files that edgeguard makes once on a machine and uses again: whole, checked, or made anew.

They stand in the folder of the environment variable ``EDGEGUARD_CACHE``, else in the platform's cache folder for
``edgeguard``; each has its SHA-256 beside it (``NAME.sha256``), which is compared before the file is used. Nothing in
the folder is needed: it may be deleted at any time.

Sources: XDG Base Directory Specification 0.8 (``XDG_CACHE_HOME``); Apple, File System Programming Guide
(``Library/Caches``); Microsoft, Known Folders (``LocalAppData``).
"""

from __future__ import annotations

import contextlib
import functools
import os
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from edgeguard.bundle import sha256_of
from edgeguard.errors import EngineError
from edgeguard.files import write_whole

__all__ = ["CACHE_VARIABLE", "cache_folder", "cached"]

CACHE_VARIABLE = "EDGEGUARD_CACHE"
ABANDONED_SECONDS = 3600  # a part that old is what a killed process left


def cache_folder() -> Path:
    """The folder, made if need be; a temporary one, gone with the process, where the platform's cannot be written.

    Raises EngineError when ``EDGEGUARD_CACHE`` names a folder that cannot be written.
    """
    named = os.environ.get(CACHE_VARIABLE)
    try:
        folder = Path(named).expanduser().absolute() if named else _platform_folder()
        folder.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=folder).close()  # asks the file system itself: it may be read-only, or full
    except (OSError, ValueError, RuntimeError) as error:  # RuntimeError: a user without a home
        if named:
            raise EngineError(
                f"{CACHE_VARIABLE}={named}: expected a folder that can be written, found {error}. Name another one."
            ) from error
        return Path(_temporary_folder().name)
    return folder


def cached(name: str, make: Callable[[Path], None]) -> Path:
    """The file ``name`` of the cache folder, made by ``make`` where it is missing or not what it was.

    ``name``: of one file, maybe in a folder; whatever the content depends on belongs into it. ``make`` writes the path
    that it is given, a temporary neighbour which then takes its place in one step: processes that make the same file
    at once each end up with a whole one, and what a killed one left is never used. Raises EngineError when the file
    cannot be written, and whatever ``make`` raises.
    """
    file = cache_folder() / name
    if _is_sound(file):
        return file
    try:
        file.parent.mkdir(exist_ok=True)
        _remove_abandoned(file)
        write_whole(file, make)
        # After the file: killed in between, the next process finds a file without its sum, and makes it again.
        digest = sha256_of(file)
        write_whole(_sum_of(file), lambda part: part.write_text(digest, encoding="ascii"))
    except OSError as error:
        if _is_sound(file):  # another process was first, and has it open: Windows then refuses to replace it
            return file
        raise EngineError(
            f"{file}: expected to write it into the cache folder, found {error}. Make room, or set {CACHE_VARIABLE}."
        ) from error
    return file


def _is_sound(file: Path) -> bool:
    """Whether the file is there and what was written."""
    try:
        return _sum_of(file).read_text(encoding="ascii") == sha256_of(file)
    except (OSError, ValueError):
        return False


def _sum_of(file: Path) -> Path:
    return file.with_name(f"{file.name}.sha256")


def _remove_abandoned(file: Path) -> None:
    for part in file.parent.glob(f".{file.name}.*.part"):
        with contextlib.suppress(FileNotFoundError):  # another process removes them too
            if time.time() - part.stat().st_mtime > ABANDONED_SECONDS:
                part.unlink()


def _platform_folder() -> Path:
    if sys.platform == "win32":
        local = os.environ.get("LOCALAPPDATA")
        return (Path(local) if local else Path.home() / "AppData" / "Local") / "edgeguard" / "Cache"
    if sys.platform == "darwin":
        return Path.home() / "Library" / "Caches" / "edgeguard"
    stated = os.environ.get("XDG_CACHE_HOME", "")
    base = Path(stated) if Path(stated).is_absolute() else Path.home() / ".cache"
    return base / "edgeguard"


@functools.cache
def _temporary_folder() -> tempfile.TemporaryDirectory[str]:
    """One a process; removed when it ends."""
    return tempfile.TemporaryDirectory(prefix="edgeguard-")
