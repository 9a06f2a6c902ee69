"""Files that are made once a machine and can be made again: in the user's cache folder, each whole or not there."""

from __future__ import annotations

import os
import shutil
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

from edgeguard.errors import EngineError

__all__ = ["CACHE_VARIABLE", "cache_folder", "cached"]

CACHE_VARIABLE = "EDGEGUARD_CACHE"


def cache_folder() -> Path:
    """``$EDGEGUARD_CACHE``, else ``edgeguard`` in the platform's cache folder; not made here."""
    chosen = os.environ.get(CACHE_VARIABLE)
    if chosen:
        return Path(chosen)
    if sys.platform == "win32":
        return Path(os.environ.get("LOCALAPPDATA") or Path.home() / "AppData" / "Local") / "edgeguard" / "cache"
    if sys.platform == "darwin":
        return Path.home() / "Library" / "Caches" / "edgeguard"
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "edgeguard"


def cached(name: str, make: Callable[[Path], None]) -> Path:
    """The folder ``name`` of the cache; ``make`` fills it the first time.

    It is made under another name and moved into place in one step, so a process that dies leaves no half of it, and of
    two that make it at once one wins. Raises EngineError when the cache cannot be written.
    """
    target = cache_folder() / name
    if target.is_dir():
        return target
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        part = Path(tempfile.mkdtemp(prefix=f".{target.name}.", dir=target.parent))
    except OSError as error:
        raise EngineError(f"{target.parent}: the cache cannot be written ({error}). Set {CACHE_VARIABLE}.") from error
    try:
        make(part)
        try:
            part.rename(target)
        except OSError:
            if not target.is_dir():  # else another process was faster
                raise
    finally:
        shutil.rmtree(part, ignore_errors=True)
    return target
