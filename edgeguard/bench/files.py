"""Folders of a run: what can be made again in the user's cache folder, what nobody needs afterwards beside it."""

from __future__ import annotations

import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from edgeguard.cache import cache_folder

__all__ = ["cached_folder", "scratch_folder"]

SCRATCH_PREFIX = "bench-"
STALE_S = 24 * 3600.0


def cached_folder(name: str, make: Callable[[Path], None]) -> Path:
    """The folder ``name`` of the cache; ``make`` fills it the first time.

    It is made beside its place and moved there in one step, so whoever dies leaves no half of it, and of two that make
    it at once one wins. Raises EngineError when the cache cannot be written.
    """
    target = cache_folder() / name
    if target.is_dir():
        return target
    with scratch_folder() as scratch:
        part = scratch / name
        part.mkdir()
        make(part)
        try:
            part.rename(target)
        except OSError:
            if not target.is_dir():  # else another process was faster
                raise
    return target


@contextmanager
def scratch_folder() -> Iterator[Path]:
    """A folder beside the cached ones (on a disk: the system's temporary folder may be memory), gone afterwards.

    One that a killed run left behind goes when it is a day old.
    """
    place = cache_folder()
    for left in place.glob(f"{SCRATCH_PREFIX}*"):
        with suppress(FileNotFoundError):  # its own run was faster
            if time.time() - left.stat().st_mtime > STALE_S:
                shutil.rmtree(left, ignore_errors=True)
    folder = Path(tempfile.mkdtemp(prefix=SCRATCH_PREFIX, dir=place))
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)
