"""Results of devices: dataclasses, one to one with the JSON that ``schema.json`` describes.

Words and units are those of ``edgeguard bench`` (milliseconds, bytes, every trial kept, null for "not measured"); a
schema of its own, because a device's runtime is not ours and a phone cannot simply be measured again when ours changes.
``python -m device_tests.records`` prints the schema.
"""

from __future__ import annotations

import dataclasses
import json
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from edgeguard.bench.typed import JsonShapeError, from_json, json_schema
from edgeguard.errors import EdgeguardError

__all__ = [
    "FORMAT",
    "SCHEMA_FILE",
    "SCHEMA_VERSION",
    "Agreement",
    "Compute",
    "Conditions",
    "Device",
    "DeviceTestError",
    "GoldenResult",
    "Measured",
    "Model",
    "Plan",
    "Record",
    "Summary",
    "Timing",
    "load_measured",
    "load_plan",
    "load_record",
    "summarize",
    "to_json",
]

FORMAT = "edgeguard-device-test"
SCHEMA_VERSION = 1
SCHEMA_FILE = Path(__file__).with_name("schema.json")
UNITS = ("cpu", "gpu", "npu")


class DeviceTestError(EdgeguardError):
    """A device test could not be run, or a result of one not be read."""


@dataclass(frozen=True)
class Plan:
    """What the driver asks of a device, in `plan.json`.

    `device`: its id, None for the only one. `unit`: cpu, gpu or npu. `tokens`: lengths to time, template included; none
    for golden vectors alone.
    """

    device: str | None
    unit: str
    tokens: tuple[int, ...]
    warmup: int
    trials: int


@dataclass(frozen=True)
class Device:
    """Where it ran.

    `emulated_by`: what stood in for the chip (qemu-user, an emulator, an NPU's simulation); None for the real one.
    `virtual`: a virtual machine on real silicon of that kind.
    """

    name: str
    chip: str
    architecture: str
    system: str
    ram_bytes: int | None
    emulated_by: str | None
    virtual: bool | None


@dataclass(frozen=True)
class Compute:
    """The unit asked for and the units that computed.

    `used`: none where the runtime does not tell. `nodes`: of the graph, by unit, where it tells. `evidence`: how that
    is known.
    """

    asked: str
    used: tuple[str, ...]
    nodes: Mapping[str, int] | None
    evidence: str


@dataclass(frozen=True)
class Timing:
    """Texts of `tokens` tokens, from token ids to the margin. `warmup` calls were discarded, all others are kept."""

    tokens: int
    warmup: int
    trials_ms: tuple[float, ...]


@dataclass(frozen=True)
class Conditions:
    """Of the device at one moment. `load_average`: of the last minute."""

    load_average: float | None
    battery_percent: float | None
    temperature_c: float | None


@dataclass(frozen=True)
class Measured:
    """What a device tells of itself and its run, in `measured.json`.

    `load_ms`: until texts can be judged. `peak_bytes`: of resident memory, of the process that judged.
    """

    device: Device
    runtime: str
    runtime_version: str
    threads: int | None
    compute: Compute
    load_ms: float | None
    peak_bytes: int | None
    timings: tuple[Timing, ...]
    before: Conditions
    after: Conditions


@dataclass(frozen=True)
class Summary:
    """Percentiles of a length's trials, linearly interpolated; tokens/s at the median."""

    tokens: int
    p50_ms: float
    p95_ms: float
    tokens_per_s: float


@dataclass(frozen=True)
class Model:
    """The export.

    `manifest_sha256`: of its manifest, which lists all files; `size_bytes`: of what the device's runtime loads.
    """

    bundle: str
    manifest_sha256: str
    size_bytes: int
    max_tokens: int
    reference_engine: str


@dataclass(frozen=True)
class GoldenResult:
    """Golden vectors.

    `passed`: same token ids, same verdict of the golden margin, a margin within `tolerance`; differences in logits.
    """

    vectors: int
    passed: int
    tolerance: float
    largest_difference: float | None
    mean_difference: float | None


@dataclass(frozen=True)
class Agreement:
    """Public rows judged by the device and by the reference, at `balanced`.

    `sets`: rows of each. `agree`: rows with the same action; `same_ids`: with the same token ids; `differing`: ids of
    the rows with another action.
    """

    rows: int
    agree: int
    share: float
    same_ids: int
    largest_difference: float
    mean_difference: float
    sets: Mapping[str, int]
    seed: int
    differing: tuple[str, ...]


@dataclass(frozen=True)
class Record:
    """One run on one device.

    `measured`: None when it ended before it could tell. `fell_back`: another unit than the one asked for computed, or
    helped; None when that is not known. `agreement_skipped`: why it was not measured. `failures`: why the run counts as
    failed; none for a good one.
    """

    format: str
    schema_version: int
    created: str
    command: str
    commit: str | None
    target: str
    model: Model
    plan: Plan
    measured: Measured | None
    summaries: tuple[Summary, ...]
    fell_back: bool | None
    golden: GoldenResult | None
    agreement: Agreement | None
    agreement_skipped: str | None
    failures: tuple[str, ...]


def summarize(timing: Timing) -> Summary:
    """Percentiles of at least one trial."""
    p50, p95 = (float(p) for p in np.percentile(timing.trials_ms, (50, 95)))
    return Summary(timing.tokens, p50, p95, 1000 * timing.tokens / p50)


def fell_back(compute: Compute) -> bool | None:
    """Whether anything but the unit asked for computed."""
    return set(compute.used) != {compute.asked} if compute.used else None


def to_json(value: Any) -> bytes:  # noqa: ANN401 - a dataclass of this file
    """Readable JSON, UTF-8. Raises ValueError for numbers that are not finite."""
    return (json.dumps(dataclasses.asdict(value), indent=1, ensure_ascii=False, allow_nan=False) + "\n").encode()


def load_record(file: Path) -> Record:
    """Read a result. Raises DeviceTestError for a file that is none, or of another schema version."""
    data = _read(file)
    if not isinstance(data, dict) or data.get("format") != FORMAT:
        raise DeviceTestError(f"{file}: expected a result of device_tests, found no {FORMAT!r} as its format.")
    if data.get("schema_version") != SCHEMA_VERSION:
        found = repr(data.get("schema_version"))
        raise DeviceTestError(f"{file}: expected schema version {SCHEMA_VERSION}, found {found:.20}. Measure again.")
    record: Record = _parse(Record, data, file)
    return record


def load_measured(file: Path) -> Measured:
    """Read a device's `measured.json`. Raises DeviceTestError, for values that cannot be as well."""
    measured: Measured = _parse(Measured, _read(file), file)
    units = {measured.compute.asked, *measured.compute.used, *(measured.compute.nodes or {})}
    if unknown := sorted(units - set(UNITS)):
        raise DeviceTestError(f"{file}: compute: expected units of {', '.join(UNITS)}, found {unknown[0]!r:.40}.")
    for timing in measured.timings:
        if timing.tokens < 1 or not timing.trials_ms or min(timing.trials_ms) <= 0:
            raise DeviceTestError(f"{file}: timings: expected trials above 0 ms of at least a token, found {timing}.")
    return measured


def load_plan(file: Path) -> Plan:
    """Read a `plan.json`. Raises DeviceTestError."""
    plan: Plan = _parse(Plan, _read(file), file)
    return plan


def _read(file: Path) -> Any:  # noqa: ANN401 - any JSON value
    try:
        return json.loads(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise DeviceTestError(f"{file}: expected a JSON file, found {error.strerror}.") from error
    except (ValueError, RecursionError) as error:
        raise DeviceTestError(f"{file}: expected JSON, found none ({error}).") from error


def _parse(kind: Any, data: Any, file: Path) -> Any:  # noqa: ANN401 - a dataclass of this file, and its JSON
    try:
        return from_json(kind, data, str(file))
    except JsonShapeError as error:
        raise DeviceTestError(str(error)) from error


if __name__ == "__main__":
    sys.stdout.write(json.dumps(json_schema(Record), indent=1) + "\n")
