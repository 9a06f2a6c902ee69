"""Facts about this machine and what is installed on it. A fact that the system does not tell is None.

Linux: ``/proc`` and ``/sys``; macOS: ``sysctl``; elsewhere what Python's standard library knows.
"""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
import time
from collections.abc import Sequence
from pathlib import Path

from edgeguard import __version__
from edgeguard.bench.records import Device
from edgeguard.engines.cpus import allowed_cpus, cpuinfo, physical_cores
from edgeguard.files import installed_version, read_or_none

__all__ = ["OtherWork", "clock_mhz", "commit", "cpu_name", "describe_device", "temperature_c", "versions"]

PACKAGES = (
    "numpy",
    "tokenizers",
    "onnxruntime",
    "llama-cpp-python",
    "torch",
    "transformers",
    "optimum",
    "optimum-onnx",
    "onnxruntime-genai",
)
# Instruction sets that matter to products of matrices, as Linux and macOS name them.
FEATURES = frozenset(
    """sse4_1 avx avx2 fma f16c avx_vnni avx_vnni_int8 avx512f avx512bw avx512vl avx512_vnni avx512_bf16 avx512_fp16
    amx_tile amx_int8 amx_bf16 asimd asimdhp asimddp i8mm bf16 sve sve2 svei8mm sme sme2 neon fp16 dotprod
    hw.optional.arm.FEAT_DotProd hw.optional.arm.FEAT_I8MM hw.optional.arm.FEAT_BF16 hw.optional.arm.FEAT_SME""".split()
)
CPU_ROOT = Path("/sys/devices/system/cpu")
THERMAL_ROOT = Path("/sys/class/thermal")
SUPPLY_ROOT = Path("/sys/class/power_supply")
MEMORY_LIMITS = (Path("/sys/fs/cgroup/memory.max"), Path("/sys/fs/cgroup/memory/memory.limit_in_bytes"))
NO_LIMIT = 2**60  # cgroup v1 states a huge number where there is none
HERE = Path(__file__).resolve().parent


def describe_device() -> Device:
    """This machine, as it is now; what other work took is left to the end of a run."""
    info = cpuinfo()
    flags = (info.get("flags") or info.get("features") or "").split() or _sysctl_flags()
    return Device(
        cpu=cpu_name(),
        architecture=platform.machine(),
        features=tuple(sorted(FEATURES.intersection(flags))),
        cpus_online=os.cpu_count() or 1,
        cores_physical=physical_cores(),
        cpus_allowed=allowed_cpus(),
        max_mhz=_khz(CPU_ROOT / "cpu0/cpufreq/cpuinfo_max_freq"),
        governor=read_or_none(CPU_ROOT / "cpu0/cpufreq/scaling_governor"),
        l3_bytes=_l3_bytes(),
        ram_bytes=_ram_bytes(),
        memory_limit_bytes=_memory_limit(),
        system=f"{_system_name()}, {platform.system()} {platform.release()}",
        virtual="hypervisor" in flags if flags and platform.machine() in ("x86_64", "AMD64") else None,
        on_battery=_on_battery(),
        load_before=os.getloadavg()[0] if hasattr(os, "getloadavg") else None,
        others_cpus=None,
    )


def cpu_name() -> str:
    """The name, and on x86 family and model: a cloud's machines often have no better name than the maker's."""
    info = cpuinfo()
    name = info.get("model name") or info.get("hardware") or _output(["sysctl", "-n", "machdep.cpu.brand_string"])
    name = name or platform.processor() or platform.machine()
    if "cpu family" in info and "model" in info:
        name += f" (family {info['cpu family']}, model {info['model']})"
    return name


def versions(packages: Sequence[str] = PACKAGES) -> dict[str, str | None]:
    """Versions of edgeguard, Python and ``packages``; None for one that is not installed."""
    found: dict[str, str | None] = {"edgeguard": __version__, "python": platform.python_version()}
    return found | {package: installed_version(package) for package in packages}


def commit() -> str | None:
    """The checkout's commit, with ``+`` when tracked files differ from it; None outside a checkout."""
    if not (HERE.parent.parent / "convert").is_dir() or shutil.which("git") is None:
        return None
    head = _output(["git", "-C", str(HERE), "rev-parse", "HEAD"])
    changed = _output(["git", "-C", str(HERE), "status", "--porcelain", "--untracked-files=no"])
    return f"{head}{'+' if changed else ''}" if head else None


class OtherWork:
    """How many CPUs others keep busy, on average from when this was made: other processes, and a hypervisor.

    What this process and its children use is told apart, the children's only once they have ended.
    """

    def __init__(self, stat: Path = Path("/proc/stat")) -> None:
        """Begin. ``stat``: the counters of Linux, see its ``Documentation/filesystems/proc.rst``."""
        self._stat = stat
        self._start, self._before = time.perf_counter(), self._others_s()

    def cpus(self) -> float | None:
        """Since this was made; None where the system does not tell."""
        seconds, now = time.perf_counter() - self._start, self._others_s()
        return None if now is None or self._before is None else max(0.0, (now - self._before) / seconds)

    def _others_s(self) -> float | None:
        """CPU seconds of all but us, since the machine started."""
        name, *ticks = (read_or_none(self._stat) or "").partition("\n")[0].split() or [""]
        if name != "cpu":
            return None
        user, nice, system, _idle, _iowait, irq, softirq, stolen, *_ = map(int, ticks)
        busy = user + nice + system + irq + softirq + stolen
        return busy / os.sysconf("SC_CLK_TCK") - sum(os.times()[:4])


def clock_mhz() -> float | None:
    """The clock of the cores now, their mean."""
    clocks = [_khz(file) for file in CPU_ROOT.glob("cpu[0-9]*/cpufreq/scaling_cur_freq")]
    known = [clock for clock in clocks if clock is not None]
    return sum(known) / len(known) if known else None


def temperature_c(root: Path = THERMAL_ROOT) -> float | None:
    """The hottest thermal sensor now, in degrees Celsius."""
    readings = [_number(file) for file in root.glob("thermal_zone*/temp")]
    return max((reading / 1000 for reading in readings if reading is not None), default=None)


def _sysctl_flags() -> list[str]:
    """Names of the optional features that macOS says are there."""
    lines = (_output(["sysctl", "hw.optional"]) or "").splitlines()
    return [line.split(":")[0] for line in lines if line.endswith(": 1")]


def _system_name() -> str:
    try:
        return platform.freedesktop_os_release()["PRETTY_NAME"]
    except (OSError, KeyError):
        return platform.platform(terse=True)


def _l3_bytes() -> int | None:
    size = read_or_none(CPU_ROOT / "cpu0/cache/index3/size")
    return 1024 * int(size[:-1]) if size and size.endswith("K") else None


def _ram_bytes() -> int | None:
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, ValueError, OSError):
        return None


def _memory_limit() -> int | None:
    limits = [_number(file) for file in MEMORY_LIMITS]
    return min((int(limit) for limit in limits if limit is not None and limit < NO_LIMIT), default=None)


def _on_battery(root: Path = SUPPLY_ROOT) -> bool | None:
    """Whether every mains supply that the system knows is off."""
    online = [_number(file) for file in root.glob("*/online")]
    return None if not online else not any(online)


def _khz(file: Path) -> float | None:
    value = _number(file)
    return None if value is None else value / 1000


def _number(file: Path) -> float | None:
    try:
        return float(read_or_none(file) or "")
    except ValueError:  # "max", or no such file
        return None


def _output(command: Sequence[str]) -> str | None:
    """What a command prints; None where there is no such command or it fails."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=10, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() or None if done.returncode == 0 else None
