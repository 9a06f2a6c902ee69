"""The record of a run: dataclasses, one to one with the JSON that ``schema.json`` describes.

Times are milliseconds, sizes bytes. None (null) means "not measured" or "the system does not tell", never 0. A field
that is added, renamed or gone is another SCHEMA_VERSION; ``python -m edgeguard.bench.records`` prints the schema.
"""

from __future__ import annotations

import dataclasses
import json
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from edgeguard.bench.typed import JsonShapeError, from_json, json_schema
from edgeguard.errors import EdgeguardError

__all__ = [
    "FORMAT",
    "SCHEMA_FILE",
    "SCHEMA_VERSION",
    "Absent",
    "BenchError",
    "BundleFacts",
    "Copy",
    "Device",
    "Energy",
    "Length",
    "Limits",
    "Load",
    "Memory",
    "MemoryAt",
    "Meter",
    "ModelShape",
    "Plan",
    "Product",
    "Ratio",
    "Record",
    "Result",
    "Share",
    "Summary",
    "Sustain",
    "Trial",
    "Turn",
    "Window",
    "Work",
    "load_record",
    "record_to_json",
]

FORMAT = "edgeguard-bench"
SCHEMA_VERSION = 2
SCHEMA_FILE = Path(__file__).with_name("schema.json")


class BenchError(EdgeguardError):
    """A measurement could not be made, or a record of one not be read. There is no partial result."""


@dataclass(frozen=True)
class Plan:
    """What was asked for.

    `engines` and `peers`: in the order of the tables, those that turned out absent included. `tokens`: lengths,
    template included. `batch`: texts a call. `warmup`: calls of each length that were discarded. `loads`: processes
    started anew for each engine; the last one measured the lengths. `settle_ms`: pause before each call, for the
    threads of the one before to go to sleep. `turn_tokens`: length of a conversation that a new turn was added to.
    `texts_sha256`: of all texts that were judged in the rounds.
    """

    engines: tuple[str, ...]
    peers: tuple[str, ...]
    tokens: tuple[int, ...]
    batch: int
    threads: int
    trials: int
    warmup: int
    loads: int
    seed: int
    settle_ms: float
    turn_tokens: int | None
    sustain_s: float | None
    texts_sha256: str


@dataclass(frozen=True)
class BundleFacts:
    """What was measured. `untrained`: its weights are random, so only its speed and size mean anything."""

    label: str
    untrained: bool
    base_model: str
    manifest_sha256: str
    size_bytes: int
    max_tokens: int
    quantization: Mapping[str, Any] | None


@dataclass(frozen=True)
class Device:
    """The machine.

    `cpus_allowed`: what affinity and container quota leave of `cpus_online`. `features`: instruction sets that matter
    to products. `virtual`: a virtual machine. `load_before`: the 1-minute load average. `others_cpus`: CPUs that other
    processes (and a hypervisor, with other machines) kept busy while the run lasted, on average; 0 where it was quiet.
    """

    cpu: str
    architecture: str
    features: tuple[str, ...]
    cpus_online: int
    cores_physical: int
    cpus_allowed: int
    max_mhz: float | None
    governor: str | None
    l3_bytes: int | None
    ram_bytes: int | None
    memory_limit_bytes: int | None
    system: str
    virtual: bool | None
    on_battery: bool | None
    load_before: float | None
    others_cpus: float | None


@dataclass(frozen=True)
class ModelShape:
    """Shape of a Llama with a head of `head_size` rows."""

    layers: int
    hidden_size: int
    intermediate_size: int
    heads: int
    kv_heads: int
    head_dim: int
    vocabulary: int
    head_size: int


@dataclass(frozen=True)
class Work:
    """What one text of `tokens` costs at least.

    `macs`: multiply-accumulates that the last token's verdict needs (linears and causal attention of all layers, of the
    last one keys and values alone for all tokens but the last; head). `macs_all_tokens`: without that saving in the
    last layer. `weight_bytes`: the INT4 linears, read once.
    """

    tokens: int
    macs: int
    macs_all_tokens: int
    weight_bytes: int


@dataclass(frozen=True)
class Product:
    """A large matrix product [m, k] x [k, n] in onnxruntime: every trial, and the rate of the fastest."""

    operator: str
    m: int
    k: int
    n: int
    trials_ms: tuple[float, ...]
    macs_per_s: float


@dataclass(frozen=True)
class Copy:
    """A large copy in memory by all threads; bytes read plus bytes written, at the rate of the fastest trial."""

    size_bytes: int
    trials_ms: tuple[float, ...]
    bytes_per_s: float


@dataclass(frozen=True)
class Limits:
    """What the machine can do at best, as far as such products show, with the threads that the engines had.

    `reason`: why nothing was measured.
    """

    int8: Product | None
    fp32: Product | None
    copy: Copy | None
    reason: str | None


@dataclass(frozen=True)
class Load:
    """One process, from its start to its first verdict.

    `import_ms`: the library; `load_ms`: until texts can be judged (checksums and self-test included for an engine);
    `start_to_verdict_ms`: from starting the process. The first of several loads may have had a cache to fill.
    """

    import_ms: float
    load_ms: float
    first_verdict_ms: float
    start_to_verdict_ms: float
    peak_bytes: int | None


@dataclass(frozen=True)
class MemoryAt:
    """Peak of the process when it had judged nothing longer than `tokens`, but for its very first text."""

    tokens: int
    peak_bytes: int | None


@dataclass(frozen=True)
class Memory:
    """Resident memory of the engine's own process: its peak, and what was left after the rounds.

    `steady_private_bytes`: without pages of files, which the system can take back.
    """

    peak_bytes: int | None
    steady_bytes: int | None
    steady_private_bytes: int | None
    by_tokens: tuple[MemoryAt, ...]


@dataclass(frozen=True)
class Trial:
    """One call.

    `position`: its place among the calls of its round, which were shuffled. `latency_ms`: the public call; `engine_ms`
    and `tokenizer_ms`: of it, inside the engine and the tokenizer (None for a peer, which takes token ids). `margin`:
    logit(unsafe) - logit(safe) of the first text, where there is one.
    """

    round: int
    position: int
    latency_ms: float
    engine_ms: float | None
    tokenizer_ms: float | None
    margin: float | None


@dataclass(frozen=True)
class Summary:
    """Percentiles of a length's trials, linearly interpolated. `tokens_per_s`: of the whole batch, at the median."""

    p50_ms: float
    p95_ms: float
    p99_ms: float
    slowest_ms: float
    tokens_per_s: float
    engine_p50_ms: float | None
    tokenizer_p50_ms: float | None


@dataclass(frozen=True)
class Share:
    """The work needed, done in the engine's median time, as a share of what the machine can do."""

    int8_peak: float
    fp32_peak: float
    bandwidth: float


@dataclass(frozen=True)
class Length:
    """Texts of `tokens` tokens, template included."""

    tokens: int
    trials: tuple[Trial, ...]
    summary: Summary
    share: Share | None


@dataclass(frozen=True)
class Energy:
    """Calls without pause between two readings of the meter.

    It counts the whole processor, other processes included. `idle_watts`: of the second before.
    """

    tokens: int
    calls: int
    seconds: float
    joules_per_call: float
    watts: float
    idle_watts: float


@dataclass(frozen=True)
class Window:
    """One second of `Sustain`: calls that ended in it, clock (mean of the cores) and hottest sensor at its end."""

    second: int
    calls: int
    tokens_per_s: float
    mhz: float | None
    temperature_c: float | None


@dataclass(frozen=True)
class Sustain:
    """Calls without pause.

    `kept`: tokens/s of the last quarter of the seconds by that of the first, medians; below 1 the machine slowed down.
    """

    tokens: int
    latencies_ms: tuple[float, ...]
    windows: tuple[Window, ...]
    kept: float | None


@dataclass(frozen=True)
class Turn:
    """A new turn on a conversation that was judged just before, and a conversation as long that was not.

    `tokens`: of the conversation with the new turn. Before the latter, the earlier messages of a third one are judged.
    Only the new turn is timed, through `Guard.conversation`. `ratio`: median of `scratch_ms` / median of `turn_ms`.
    """

    conversation_tokens: int
    tokens: int
    turn_ms: tuple[float, ...]
    scratch_ms: tuple[float, ...]
    ratio: float


@dataclass(frozen=True)
class Result:
    """One engine or peer.

    `kind`: engine (through Guard) or peer. `settings`: how a peer was called. `used`: what ran, as verdicts name it.
    `details`: what the engine tells about itself. `providers_asked`, `providers_used`: what was asked to compute, and
    what did, where the library tells it.
    """

    name: str
    kind: str
    used: str
    version: str
    settings: str | None
    providers_asked: tuple[str, ...]
    providers_used: tuple[str, ...]
    threads_asked: int
    threads_used: int
    details: Mapping[str, Any]
    file_bytes: int
    loads: tuple[Load, ...]
    memory: Memory
    lengths: tuple[Length, ...]
    turn: Turn | None
    energy: Energy | None
    sustain: Sustain | None


@dataclass(frozen=True)
class Ratio:
    """How many times as fast as `against` an engine was in this run.

    Median of `against` / its median; `low`, `high`: the 95 % bootstrap interval of that quotient.
    """

    name: str
    against: str
    tokens: int
    ratio: float
    low: float
    high: float


@dataclass(frozen=True)
class Absent:
    """An engine or peer that was not measured, and why."""

    name: str
    reason: str


@dataclass(frozen=True)
class Meter:
    """What tells energy here; `reason`: why nothing does."""

    source: str | None
    reason: str | None


@dataclass(frozen=True)
class Record:
    """A whole run of `edgeguard bench`, every trial included."""

    format: str
    schema_version: int
    created: str
    command: str
    commit: str | None
    versions: Mapping[str, str | None]
    device: Device
    bundle: BundleFacts
    plan: Plan
    shape: ModelShape | None
    work: tuple[Work, ...]
    limits: Limits
    meter: Meter
    results: tuple[Result, ...]
    ratios: tuple[Ratio, ...]
    absent: tuple[Absent, ...]


def record_to_json(record: Record) -> dict[str, Any]:
    """The JSON object of a record, as :func:`load_record` reads it."""
    return dataclasses.asdict(record)


def load_record(file: Path) -> Record:
    """Read a record. Raises BenchError for a file that is none, or of another schema version."""
    try:
        data = json.loads(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise BenchError(f"{file}: expected a record of edgeguard bench, found {error.strerror}.") from error
    except (ValueError, RecursionError) as error:
        raise BenchError(f"{file}: expected a record of edgeguard bench, found no JSON ({error}).") from error
    if not isinstance(data, dict) or data.get("format") != FORMAT:
        raise BenchError(f"{file}: expected a record of edgeguard bench, found no {FORMAT!r} as its format.")
    if data.get("schema_version") != SCHEMA_VERSION:
        raise BenchError(
            f"{file}: expected schema version {SCHEMA_VERSION}, found {data.get('schema_version')!r:.20}. "
            "Measure again with this version of edgeguard."
        )
    try:
        return from_json(Record, data, str(file))
    except JsonShapeError as error:
        raise BenchError(f"{error} Measure again; records are not meant to be edited.") from error


if __name__ == "__main__":
    sys.stdout.write(json.dumps(json_schema(Record), indent=1) + "\n")
