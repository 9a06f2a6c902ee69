"""How many threads are worth starting here: physical cores, within what this process is allowed.

A container's CPU quota and a process's affinity bind harder than the number of cores; more threads than that only
wait for each other. Linux tells all of it; elsewhere the operating system's count is taken.
"""

from __future__ import annotations

import os
from pathlib import Path

from edgeguard.errors import EngineError
from edgeguard.files import read_or_none

__all__ = ["allowed_cpus", "choose_threads", "cpuinfo", "physical_cores"]

CGROUP_ROOT = Path("/sys/fs/cgroup")
CPU_ROOT = Path("/sys/devices/system/cpu")
CPUINFO = Path("/proc/cpuinfo")


def choose_threads(threads: int | None) -> int:
    """Threads of one forward pass: the physical cores for None, never more than the CPUs this process may use.

    Raises EngineError for a number below 1.
    """
    if threads is None:
        return min(physical_cores(), allowed_cpus())
    if type(threads) is not int or threads < 1:
        raise EngineError(f"threads: expected a whole number of 1 and up, found {threads!r}.")
    return min(threads, allowed_cpus())


def allowed_cpus() -> int:
    """CPUs this process may use: its affinity and the quota of its control groups, at least 1."""
    count = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    quotas = [quota for quota in map(_quota, _cgroup_folders()) if quota is not None]
    return max(1, min([count, *map(int, quotas)]))


def physical_cores() -> int:
    """Cores among the CPUs this process may use, hardware threads of one core counted once."""
    if not hasattr(os, "sched_getaffinity"):
        return os.cpu_count() or 1
    cores = set()
    for cpu in os.sched_getaffinity(0):
        siblings = read_or_none(CPU_ROOT / f"cpu{cpu}" / "topology" / "thread_siblings_list")
        cores.add(siblings or str(cpu))
    return max(1, len(cores))


def cpuinfo() -> dict[str, str]:
    """The first processor of Linux's ``/proc/cpuinfo``, keys in lower case; empty elsewhere."""
    found: dict[str, str] = {}
    for line in (read_or_none(CPUINFO) or "").splitlines():
        key, _, value = line.partition(":")
        found.setdefault(key.strip().lower(), value.strip())
    return found


def _cgroup_folders() -> list[Path]:
    """Folders whose quota binds this process: its own groups and those above, cgroup v2 and v1."""
    folders = []
    for line in (read_or_none(Path("/proc/self/cgroup")) or "").splitlines():
        _, controllers, path = [*line.split(":", 2), "", ""][:3]
        if controllers and "cpu" not in controllers.split(","):
            continue
        root = CGROUP_ROOT / controllers if controllers else CGROUP_ROOT
        own = root / path.lstrip("/")
        folders += [own, *(parent for parent in own.parents if parent.is_relative_to(root))]
    return folders


def _quota(folder: Path) -> float | None:
    """CPUs that a control group grants, None for no limit."""
    both = (read_or_none(folder / "cpu.max") or "").split()
    if not both:
        both = [read_or_none(folder / f"cpu.cfs_{name}_us") or "" for name in ("quota", "period")]
    try:
        quota, period = float(both[0]), float(both[1])
    except (ValueError, IndexError):  # "max", or no such file
        return None
    return quota / period if quota > 0 and period > 0 else None
