"""Resident memory of this process: its peak and what it holds now, in bytes; None where the system does not tell.

Linux tells all of it in ``/proc/self/status``. Its peak is that of the program that runs now; ``ru_maxrss`` is not, it
begins with the memory of the process that started this one.
"""

from __future__ import annotations

import importlib
import sys
from pathlib import Path
from typing import Any

from edgeguard.files import read_or_none

__all__ = ["peak_bytes", "private_bytes", "resident_bytes"]

STATUS = Path("/proc/self/status")


def peak_bytes() -> int | None:
    """The most that was resident at any time."""
    found = _status("VmHWM")
    if found is not None or sys.platform == "linux":
        return found
    if sys.platform == "win32":
        memory = _psutil_memory()
        return None if memory is None else int(memory.peak_wset)
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def resident_bytes() -> int | None:
    """What is resident now."""
    found = _status("VmRSS")
    if found is not None:
        return found
    memory = _psutil_memory()
    return None if memory is None else int(memory.rss)


def private_bytes() -> int | None:
    """What is resident now and backed by no file, so that the system cannot simply drop it."""
    return _status("RssAnon")


def _status(key: str) -> int | None:
    lines = (read_or_none(STATUS) or "").splitlines()
    values = [line.split()[1] for line in lines if line.startswith(f"{key}:")]
    return 1024 * int(values[0]) if values else None


def _psutil_memory() -> Any:  # noqa: ANN401 - psutil has no types
    try:
        return importlib.import_module("psutil").Process().memory_info()
    except ImportError:
        return None
