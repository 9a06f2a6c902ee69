"""Results as one Markdown table. Emulated timings are never printed, and a fall-back to another unit is."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from device_tests.records import Compute, Measured, Record, load_record

__all__ = ["load_results", "matrix"]

COLUMNS = (
    "target",
    "bundle",
    "chip",
    "runtime",
    "compute unit",
    "size",
    "tokens",
    "p50 / p95 ms",
    "tokens/s",
    "peak memory",
    "golden vectors",
    "verdict agreement",
    "device",
)
MB = 10**6
QUIET_LOAD = 0.5  # of one CPU, over the minute before; more disturbs timings


def load_results(folder: Path) -> list[Record]:
    """All results of a folder, by file name. Raises DeviceTestError for a file that is none."""
    return [load_record(file) for file in sorted(folder.glob("*.json"))]


def matrix(records: Sequence[Record], tokens: int) -> str:
    """The table; timings of the length nearest to ``tokens``."""
    lines = ["| " + " | ".join(COLUMNS) + " |", "|" + "---|" * len(COLUMNS)]
    lines += [
        "| " + " | ".join(cell.replace("|", "\\|") for cell in _cells(record, tokens)) + " |" for record in records
    ]
    return "\n".join(lines) + "\n"


def _cells(record: Record, tokens: int) -> list[str]:
    measured, size = record.measured, f"{record.model.size_bytes / MB:.1f} MB"
    if measured is None:
        unknown = ["-", "-", f"{record.plan.unit} asked for", size, "-", "-", "-", "-"]
        return [record.target, record.model.bundle, *unknown, _golden(record), _agreement(record), "-"]
    return [
        record.target,
        record.model.bundle,
        measured.device.chip,
        f"{measured.runtime} {measured.runtime_version}",
        _compute(measured.compute),
        size,
        *_timed(record, measured, tokens),
        _golden(record),
        _agreement(record),
        _device(measured),
    ]


def _timed(record: Record, measured: Measured, tokens: int) -> list[str]:
    """Tokens, latency, tokens/s and memory: of a good run on a real device, else dashes."""
    found = min(record.summaries, key=lambda summary: abs(summary.tokens - tokens), default=None)
    if found is None or record.failures or measured.device.emulated_by is not None:
        return ["-"] * 4
    memory = "-" if measured.peak_bytes is None else f"{measured.peak_bytes / MB:.0f} MB"
    return [str(found.tokens), f"{found.p50_ms:.1f} / {found.p95_ms:.1f}", f"{found.tokens_per_s:,.0f}", memory]


def _compute(compute: Compute) -> str:
    if not compute.used:
        return f"{compute.asked} asked for, used: not told"
    used = ", ".join(compute.used)
    if compute.nodes is not None and len(compute.used) > 1:
        used = ", ".join(f"{unit} ({compute.nodes.get(unit, 0)} nodes)" for unit in compute.used)
    if set(compute.used) == {compute.asked}:
        return used
    return f"{compute.asked} asked for, **{'partly ' if compute.asked in compute.used else ''}fell back**: {used}"


def _golden(record: Record) -> str:
    if record.failures:
        more = f" (and {len(record.failures) - 1} more)" if len(record.failures) > 1 else ""
        return f"**failed**: {record.failures[0]}{more}"
    return "-" if record.golden is None else f"{record.golden.passed} of {record.golden.vectors}"


def _agreement(record: Record) -> str:
    found = record.agreement
    return "-" if found is None else f"{found.share:.1%} of {found.rows} rows"


def _device(measured: Measured) -> str:
    device, load = measured.device, measured.before.load_average
    if device.emulated_by is not None:
        return f"emulated by {device.emulated_by}"
    loud = bool(measured.timings) and load is not None and load > QUIET_LOAD
    noise = f", load average {load:.1f} before" if loud else ""
    return ("real, in a virtual machine" if device.virtual else "real") + noise
