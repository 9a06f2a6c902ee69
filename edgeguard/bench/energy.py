"""Energy, where the operating system tells it: RAPL on Linux, powermetrics on macOS.

Both count the whole processor, whatever runs on it. RAPL is a counter (microjoules) that wraps around; powermetrics
states a mean power (milliwatts) for each interval, which is added up here.

Sources: Linux ``Documentation/power/powercap/powercap.rst``; macOS ``man powermetrics``.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Protocol

from edgeguard.bench.records import Meter
from edgeguard.files import read_or_none

__all__ = ["EnergyMeter", "PowerMetrics", "Rapl", "find_meter"]

POWERCAP_ROOT = Path("/sys/class/powercap")
INTERVAL_MS = 100
POWER_LINE = re.compile(r"Combined Power \(.*\): (\d+) mW")


class EnergyMeter(Protocol):
    """A counter of joules."""

    @property
    def source(self) -> str:
        """What is read, for the record."""

    def joules(self) -> float:
        """Energy since the meter was made."""

    def close(self) -> None:
        """Stop reading."""


def find_meter(root: Path | None = None) -> tuple[EnergyMeter | None, Meter]:
    """A meter that works here, or None, and what the record says about it. ``root``: None for POWERCAP_ROOT."""
    root = POWERCAP_ROOT if root is None else root
    if sys.platform == "darwin":
        return _find_powermetrics()
    # "intel-rapl-mmio:*" are the same packages, read another way.
    packages = sorted(zone for zone in root.glob("intel-rapl:*") if _name(zone).startswith("package"))
    if not packages:
        return None, Meter(None, f"{root} has no package counter (RAPL)")
    try:
        meter = Rapl(packages)
    except OSError as error:
        return None, Meter(None, f"{packages[0]}/energy_uj cannot be read ({error.strerror}); root can")
    return meter, Meter(meter.source, None)


class Rapl:
    """The packages' counters of RAPL, summed."""

    def __init__(self, zones: Iterable[Path]) -> None:
        """``zones``: folders with ``energy_uj``. Raises OSError when one cannot be read."""
        self._zones = {zone: _microjoules(zone) for zone in zones}
        self._total = 0

    @property
    def source(self) -> str:
        """Names of the counters."""
        return f"RAPL {', '.join(_name(zone) for zone in self._zones)}"

    def joules(self) -> float:
        """Since this was made. To be asked at least once a minute: a counter that wrapped twice looks like once."""
        for zone, before in self._zones.items():
            now = _microjoules(zone)
            self._total += now - before if now >= before else now - before + _range(zone)
            self._zones[zone] = now
        return self._total / 1e6

    def close(self) -> None:
        """Nothing is open."""


class PowerMetrics:
    """``powermetrics`` running beside the measurement, its power added up interval by interval."""

    def __init__(self) -> None:
        """Start it; it needs root."""
        command = ["powermetrics", "--samplers", "cpu_power", "-i", str(INTERVAL_MS)]
        self._process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
        self._millijoules = 0.0
        threading.Thread(target=self._read, daemon=True).start()

    source = "powermetrics cpu_power"

    def joules(self) -> float:
        """Since this was made, up to the last whole interval."""
        return self._millijoules / 1000

    def close(self) -> None:
        """Stop powermetrics."""
        self._process.terminate()
        self._process.wait()

    def _read(self) -> None:
        for watts in milliwatts(self._process.stdout or ()):
            self._millijoules += watts * INTERVAL_MS / 1000


def milliwatts(lines: Iterable[str]) -> Iterable[float]:
    """The combined power of each interval in powermetrics' output."""
    for line in lines:
        if match := POWER_LINE.match(line):
            yield float(match[1])


def _find_powermetrics() -> tuple[EnergyMeter | None, Meter]:
    if shutil.which("powermetrics") is None or os.geteuid() != 0:
        return None, Meter(None, "powermetrics can be called by root only")
    meter = PowerMetrics()
    time.sleep(3 * INTERVAL_MS / 1000)  # its first interval is begun
    return meter, Meter(meter.source, None)


def _name(zone: Path) -> str:
    return read_or_none(zone / "name") or ""


def _microjoules(zone: Path) -> int:
    return int((zone / "energy_uj").read_text())


def _range(zone: Path) -> int:
    return int((zone / "max_energy_range_uj").read_text())
