"""A run: every engine and peer in a worker of its own, asked in turn, one call each, in an order shuffled each round.

Only one worker computes at a time; this process computes nothing while it does. Whatever the machine does meanwhile
(clock, heat, neighbours) then hits all of them alike. The first rounds are discarded. No text is judged twice.
"""

from __future__ import annotations

import hashlib
import random
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field, replace
from datetime import datetime, timezone
from pathlib import Path
from typing import Any, Protocol

from edgeguard.bench import device, limits, peers
from edgeguard.bench.energy import EnergyMeter, find_meter
from edgeguard.bench.files import scratch_folder
from edgeguard.bench.peer_files import size_of
from edgeguard.bench.process import Refused, Worker
from edgeguard.bench.records import (
    FORMAT,
    SCHEMA_VERSION,
    Absent,
    BenchError,
    BundleFacts,
    Energy,
    Length,
    Limits,
    Load,
    Memory,
    MemoryAt,
    Meter,
    ModelShape,
    Plan,
    Ratio,
    Record,
    Result,
    Share,
    Summary,
    Sustain,
    Trial,
    Turn,
    Window,
    Work,
)
from edgeguard.bench.runners import Facts, Reading, Sample
from edgeguard.bench.shapes import UNTRAINED
from edgeguard.bench.stats import median, ratio_of_medians, summarize
from edgeguard.bench.texts import TextMaker
from edgeguard.bench.typed import from_json
from edgeguard.bench.work import work_of
from edgeguard.bundle import Bundle, sha256_of
from edgeguard.engines import ENGINES
from edgeguard.engines.cpus import choose_threads
from edgeguard.engines.int8 import INT8_ENGINE
from edgeguard.manifest import MANIFEST_NAME

__all__ = ["DEFAULT_TOKENS", "Progress", "Request", "measure", "schedule"]

DEFAULT_TOKENS = (16, 32, 64, 128, 256, 512)
USUAL_TOKENS = 64  # the length nearest to it serves where one length is enough: first verdict, energy, sustain
TURN_ADDS = 32  # tokens of a new turn, the answer before it included
TURN_ANSWER = "I see. Go on."
TURN_TEXTS = ("turn", "scratch", "other")  # keys of the conversations that a round needs
STEADY_TEXTS = 64  # texts that are judged in turn where calls follow each other without pause
ENERGY_S, IDLE_S = 5.0, 1.0
ENGINE, PEER = "engine", "peer"


class Progress(Protocol):
    """Where a run says how far it is."""

    def say(self, text: str) -> None:
        """A phase begins."""

    def advance(self, done: int, total: int) -> None:
        """``done`` calls of ``total`` in this phase."""


@dataclass(frozen=True)
class Request:
    """What to measure.

    ``engines``, ``tokens``: None for all that the bundle can run, for those of DEFAULT_TOKENS that it reads.
    ``all_peers``: a peer that is not installed is listed, not an error. ``threads``: None for one a physical core.
    ``settle_ms``: pause before each call. ``limits``: measure the machine as well. ``command``: for the record.
    """

    bundle: Path
    engines: tuple[str, ...] | None = None
    peers: tuple[str, ...] = ()
    all_peers: bool = False
    tokens: tuple[int, ...] | None = None
    batch: int = 1
    threads: int | None = None
    trials: int = 20
    warmup: int = 3
    loads: int = 3
    seed: int = 0
    settle_ms: float = 20.0
    turn_tokens: int | None = None
    sustain_s: float | None = None
    limits: bool = True
    command: str = "edgeguard bench"


@dataclass
class Entrant:
    """An engine or a peer on its way through a run."""

    name: str
    kind: str
    worker: Worker | None = None
    facts: Facts | None = None
    file_bytes: int = 0
    loads: list[Load] = field(default_factory=list)
    climb: list[MemoryAt] = field(default_factory=list)
    trials: dict[int, list[Trial]] = field(default_factory=dict)
    memory: Memory | None = None
    turn: Turn | None = None
    energy: Energy | None = None
    sustain: Sustain | None = None

    def ask(self, do: str, **arguments: Any) -> Any:  # noqa: ANN401 - any JSON value
        """Ask its worker."""
        assert self.worker is not None  # loaded before it is asked
        return self.worker.ask(do, **arguments)

    def judge(self, samples: Sequence[Sample]) -> Reading:
        """One call."""
        return Reading(**self.ask("judge", samples=[asdict(sample) for sample in samples]))


def measure(request: Request, progress: Progress) -> Record:
    """Measure what ``request`` says.

    Raises BenchError when a worker dies, an engine that was asked for by name cannot be loaded, or nothing is left to
    measure; BundleError for the bundle. Nothing is written anywhere but in the cache folder.
    """
    others = device.OtherWork()
    with ExitStack() as stack:
        record = _Run(request, progress, stack).record()
    # Now that the workers have ended, their work is told apart from that of others.
    return replace(record, device=replace(record.device, others_cpus=others.cpus()))


def schedule(names: Sequence[str], lengths: Sequence[int], rounds: int, seed: int) -> Iterator[list[tuple[str, int]]]:
    """The calls of each round: every name with every length once, shuffled; the same seed gives the same order."""
    rng = random.Random(f"{seed}/order")
    for _ in range(rounds):
        calls = [(name, tokens) for name in names for tokens in lengths]
        rng.shuffle(calls)
        yield calls


class _Run:
    """One run: its phases in their order, and what they found."""

    def __init__(self, request: Request, progress: Progress, stack: ExitStack) -> None:
        self.request, self.progress, self.stack = request, progress, stack
        self.bundle = Bundle.open(request.bundle)
        self.texts = TextMaker(self.bundle.manifest, self.bundle.load_tokenizer(), request.seed)
        self.lengths = self._lengths()
        self.usual = min(self.lengths, key=lambda tokens: abs(tokens - USUAL_TOKENS))
        self.longest = max(self.lengths)
        self.threads = choose_threads(request.threads)
        self.device = device.describe_device()
        self.absent: list[Absent] = []
        self.engines = request.engines or tuple(ENGINES)
        self.entrants = [Entrant(name, ENGINE) for name in self.engines]
        self.digest = hashlib.sha256()

    def record(self) -> Record:
        """Go through all phases."""
        shape, before = self._shape(), self._limits()
        self._prepare_peers()
        self._load()
        self._climb()
        self._rounds()
        for entrant in self.entrants:
            entrant.memory = self._memory(entrant)
        if self.request.turn_tokens is not None:
            self._turns(self.request.turn_tokens)
        meter = self._energy()
        self._sustain()
        after = self._limits()
        work = () if shape is None else tuple(work_of(shape, tokens) for tokens in self.lengths)
        best = limits.best_of(before, after)
        results = tuple(self._result(entrant, work, best) for entrant in self.entrants)
        return Record(
            format=FORMAT,
            schema_version=SCHEMA_VERSION,
            created=datetime.now(timezone.utc).isoformat(timespec="seconds"),
            command=self.request.command,
            commit=device.commit(),
            versions=device.versions(),
            device=self.device,
            bundle=self._bundle_facts(),
            plan=self._plan(),
            shape=shape,
            work=work,
            limits=best,
            meter=meter,
            results=results,
            ratios=tuple(_ratios(results)),
            absent=tuple(self.absent),
        )

    def _lengths(self) -> tuple[int, ...]:
        """The lengths to measure, shortest first. Texts of them exist, or BenchError says at once that none does."""
        if self.request.turn_tokens is not None:
            self._conversation(self.request.turn_tokens, "try")
        if self.request.tokens is not None:
            lengths = sorted(set(self.request.tokens))
            for tokens in lengths:
                self.texts.sample(tokens, "try")
            return tuple(lengths)
        return self.texts.possible(DEFAULT_TOKENS)

    def _shape(self) -> ModelShape | None:
        """The model's shape, read by a worker: this process stays small."""
        if not self.request.limits:
            return None
        with Worker("the bundle", self.threads) as worker:
            found = worker.ask("read the model's shape", bundle=str(self.bundle.path))
        return None if found is None else ModelShape(**found)

    def _limits(self) -> Limits:
        """What the machine can do, found by a worker as well."""
        if not self.request.limits:
            return Limits(None, None, None, "not asked for")
        self.progress.say("measuring the machine")
        with Worker("the machine", self.threads) as worker:
            found = worker.ask(
                "measure the machine",
                threads=self.threads,
                product=limits.LARGE,
                copy_bytes=limits.COPY_BYTES,
                seconds=limits.TRIALS_S,
            )
        return from_json(Limits, found, "limits")

    def _prepare_peers(self) -> None:
        """Write the files of the peers that are installed, and let these enter."""
        if not self.request.peers:
            return
        self.scratch = self.stack.enter_context(scratch_folder())
        for name in self.request.peers:
            peer = peers.PEERS[name]
            if (reason := peers.missing_package(peer)) is not None:
                self._leave_out(name, reason, asked_by_name=not self.request.all_peers)
                continue
            self.progress.say(f"writing files for {name}")
            try:
                with Worker(name, self.threads) as worker:
                    worker.ask("write files for a peer", files=peer.files, **self._peer_arguments())
            except Refused as error:
                self._leave_out(name, str(error), asked_by_name=not self.request.all_peers)
                continue
            self.entrants.append(Entrant(name, PEER))

    def _peer_arguments(self) -> dict[str, Any]:
        return {"bundle": str(self.bundle.path), "folder": str(self.scratch), "threads": self.threads}

    def _leave_out(self, name: str, reason: str, *, asked_by_name: bool) -> None:
        """List what cannot run; an error where someone asked for it by its name."""
        if asked_by_name:
            raise BenchError(reason if reason.startswith(name) else f"{name}: {reason}")
        self.absent.append(Absent(name, reason.removeprefix(f"{name}: ")))
        self.progress.say(f"{name} is left out: {self.absent[-1].reason}")

    def _load(self) -> None:
        """Start every entrant several times, in another order each time; the last process stays."""
        rng = random.Random(f"{self.request.seed}/loads")
        for number in range(self.request.loads):
            for entrant in rng.sample(self.entrants, len(self.entrants)):
                self.progress.say(f"loading {entrant.name}, {number + 1} of {self.request.loads}")
                if entrant.worker is not None:
                    entrant.worker.stop()
                batch = self._batch(self.usual, f"load {number}")
                entrant.worker = self.stack.enter_context(Worker(entrant.name, self.threads))
                try:
                    self._load_one(entrant, batch)
                except Refused as error:
                    by_name = self.request.engines is not None if entrant.kind == ENGINE else not self.request.all_peers
                    self._leave_out(entrant.name, str(error), asked_by_name=by_name or number > 0)
                    entrant.worker.stop()
                    self.entrants.remove(entrant)
        if not self.entrants:
            reasons = "; ".join(f"{absent.name}: {absent.reason}" for absent in self.absent)
            raise BenchError(f"{self.bundle.path}: there is no engine that can run it ({reasons}).")

    def _load_one(self, entrant: Entrant, batch: Sequence[Sample]) -> None:
        """Load and judge for the first time, timed from the start of the process."""
        assert entrant.worker is not None
        if entrant.kind == ENGINE:
            arguments = {"bundle": str(self.bundle.path), "threads": self.threads}
            loaded = entrant.ask("load an engine", name=entrant.name, **arguments)
        else:
            loaded = entrant.ask("load a peer", name=entrant.name, longest=self.longest, **self._peer_arguments())
        first = entrant.judge(batch)
        load = Load(
            import_ms=loaded["import_ms"],
            load_ms=loaded["load_ms"],
            first_verdict_ms=first.latency_ms,
            start_to_verdict_ms=1000 * (time.perf_counter() - entrant.worker.started) - loaded["harness_ms"],
            peak_bytes=entrant.ask("tell its memory")["peak"],
        )
        entrant.loads.append(load)
        entrant.facts = from_json(Facts, loaded["facts"], "facts")
        entrant.file_bytes = self._file_bytes(entrant)

    def _file_bytes(self, entrant: Entrant) -> int:
        """What it is made of: the bundle's files for that engine and for all, or the files of the peer."""
        if entrant.kind == PEER:
            return size_of(peers.PEERS[entrant.name].files, self.bundle.path, self.scratch)
        assert entrant.facts is not None
        used, entries = entrant.facts.used, self.bundle.manifest.files.values()
        needed = {used, None}
        if used == INT8_ENGINE or used not in {entry.engine for entry in entries}:  # has no weights of its own
            needed.add("onnx")
        return sum(entry.bytes for entry in entries if entry.engine in needed)

    def _climb(self) -> None:
        """Peak memory after each length, shortest first."""
        for entrant in self.entrants:
            self.progress.say(f"memory of {entrant.name}")
            for tokens in self.lengths:
                entrant.judge(self._batch(tokens, "climb"))
                entrant.climb.append(MemoryAt(tokens, entrant.ask("tell its memory")["peak"]))

    def _rounds(self) -> None:
        """All trials, one call at a time."""
        known = {entrant.name: entrant for entrant in self.entrants}
        warmup, rounds = self.request.warmup, self.request.warmup + self.request.trials
        self.progress.say(f"{rounds} rounds, the first {warmup} of them discarded")
        for entrant in self.entrants:
            entrant.trials = {tokens: [] for tokens in self.lengths}
        for number, calls in enumerate(schedule(list(known), self.lengths, rounds, self.request.seed)):
            batches = {tokens: self._batch(tokens, f"round {number}") for tokens in self.lengths}
            self._digest(batches.values())
            for position, (name, tokens) in enumerate(calls):
                self.progress.advance(number * len(calls) + position, rounds * len(calls))
                self._settle()
                reading = known[name].judge(batches[tokens])
                if number >= warmup:
                    trial = Trial(number - warmup, position, **asdict(reading))
                    known[name].trials[tokens].append(trial)

    def _settle(self) -> None:
        """Threads of onnxruntime and OpenMP spin for some milliseconds after their work is done: let them."""
        time.sleep(self.request.settle_ms / 1000)

    def _memory(self, entrant: Entrant) -> Memory:
        told = entrant.ask("tell its memory")
        return Memory(told["peak"], told["resident"], told["private"], tuple(entrant.climb))

    def _turns(self, tokens: int) -> None:
        """A new turn on a conversation judged just before, against a conversation as long that is new altogether."""
        engines = [entrant for entrant in self.entrants if entrant.kind == ENGINE]
        self.progress.say(f"a new turn after {tokens} tokens")
        rng = random.Random(f"{self.request.seed}/turns")
        found: dict[str, tuple[list[float], list[float]]] = {entrant.name: ([], []) for entrant in engines}
        rounds = self.request.warmup + self.request.trials
        for number in range(rounds):
            for done, entrant in enumerate(rng.sample(engines, len(engines))):
                self.progress.advance(number * len(engines) + done, rounds * len(engines))
                new, whole, other = (asdict(self._conversation(tokens, f"{kind} {number}")) for kind in TURN_TEXTS)
                self._settle()
                turn_ms = entrant.ask("judge a new turn", sample=new)
                self._settle()
                scratch_ms = entrant.ask("judge a conversation", sample=whole, other=other)
                if number >= self.request.warmup:
                    found[entrant.name][0].append(turn_ms)
                    found[entrant.name][1].append(scratch_ms)
        for entrant in engines:
            turns, scratches = found[entrant.name]
            ratio = median(scratches) / median(turns)
            entrant.turn = Turn(tokens, tokens + TURN_ADDS, tuple(turns), tuple(scratches), ratio)

    def _conversation(self, tokens: int, key: str) -> Sample:
        """A conversation of ``tokens`` tokens, an answer, and a new turn."""
        earlier = (*self.texts.sample(tokens, key).messages, ("assistant", TURN_ANSWER))
        return self.texts.sample(tokens + TURN_ADDS, key, earlier)

    def _energy(self) -> Meter:
        """Joules of a call, where the system tells them."""
        meter, told = find_meter()
        if meter is None:
            return told
        try:
            for entrant in self.entrants:
                self.progress.say(f"energy of {entrant.name}")
                entrant.energy = self._energy_of(entrant, meter)
        finally:
            meter.close()
        return told

    def _energy_of(self, entrant: Entrant, meter: EnergyMeter) -> Energy | None:
        """Calls between two readings; None when the counter stands still, as in some virtual machines."""
        start, joules = time.perf_counter(), meter.joules()
        time.sleep(IDLE_S)
        idle_watts = (meter.joules() - joules) / (time.perf_counter() - start)
        start, joules = time.perf_counter(), meter.joules()
        calls = len(entrant.ask("judge without pause", batches=self._steady_batches(), seconds=ENERGY_S)["ends_s"])
        used, seconds = meter.joules() - joules, time.perf_counter() - start
        if used <= 0:
            return None
        return Energy(self.usual, calls, seconds, used / calls, used / seconds, idle_watts)

    def _sustain(self) -> None:
        """Calls without pause, one entrant after the other."""
        seconds = self.request.sustain_s
        if seconds is None:
            return
        for entrant in self.entrants:
            self.progress.say(f"{entrant.name} without pause, {seconds:g} s")
            told = entrant.ask("judge without pause", batches=self._steady_batches(), seconds=seconds)
            entrant.sustain = sustained(told, self.usual, self.request.batch)

    def _steady_batches(self) -> list[list[dict[str, Any]]]:
        batches = (self._batch(self.usual, f"steady {number}") for number in range(STEADY_TEXTS))
        return [[asdict(sample) for sample in batch] for batch in batches]

    def _batch(self, tokens: int, key: str) -> list[Sample]:
        return [self.texts.sample(tokens, f"{key}, {number}") for number in range(self.request.batch)]

    def _digest(self, batches: Iterable[Sequence[Sample]]) -> None:
        for batch in batches:
            for sample in batch:
                self.digest.update(sample.messages[-1][1].encode() + b"\0")

    def _bundle_facts(self) -> BundleFacts:
        manifest = self.bundle.manifest
        return BundleFacts(
            label=self.bundle.label,
            untrained=manifest.base_model == UNTRAINED,
            base_model=manifest.base_model,
            manifest_sha256=sha256_of(self.bundle.path / MANIFEST_NAME),
            size_bytes=self.bundle.size_bytes,
            max_tokens=manifest.max_tokens,
            quantization=manifest.to_dict()["quantization"],
        )

    def _plan(self) -> Plan:
        return Plan(
            engines=self.engines,
            peers=self.request.peers,
            tokens=self.lengths,
            batch=self.request.batch,
            threads=self.threads,
            trials=self.request.trials,
            warmup=self.request.warmup,
            loads=self.request.loads,
            seed=self.request.seed,
            settle_ms=self.request.settle_ms,
            turn_tokens=self.request.turn_tokens,
            sustain_s=self.request.sustain_s,
            texts_sha256=self.digest.hexdigest(),
        )

    def _result(self, entrant: Entrant, work: Sequence[Work], best: Limits) -> Result:
        assert entrant.facts is not None and entrant.memory is not None
        costs: dict[int, Work | None] = dict.fromkeys(self.lengths)
        costs |= {cost.tokens: cost for cost in work}
        lengths = []
        for tokens, cost in costs.items():
            trials = tuple(entrant.trials[tokens])
            summary = summarize(trials, tokens, self.request.batch)
            lengths.append(Length(tokens, trials, summary, _share(summary, cost, best, self.request.batch)))
        return Result(
            name=entrant.name,
            kind=entrant.kind,
            **vars(entrant.facts),
            threads_asked=self.threads,
            file_bytes=entrant.file_bytes,
            loads=tuple(entrant.loads),
            memory=entrant.memory,
            lengths=tuple(lengths),
            turn=entrant.turn,
            energy=entrant.energy,
            sustain=entrant.sustain,
        )


def sustained(told: dict[str, Any], tokens: int, batch: int) -> Sustain:
    """A worker's calls without pause, second by second; the last second is left out, for it is not a whole one."""
    seconds = [int(end) for end in told["ends_s"]]
    windows = []
    for second, (mhz, temperature) in enumerate(told["sensors"]):
        calls = seconds.count(second)
        windows.append(Window(second, calls, float(calls * tokens * batch), mhz, temperature))
    quarter = len(windows) // 4
    rates = [window.tokens_per_s for window in windows]
    first = median(rates[:quarter]) if quarter else 0.0
    return Sustain(
        tokens=tokens,
        latencies_ms=tuple(told["latencies_ms"]),
        windows=tuple(windows),
        kept=median(rates[-quarter:]) / first if first else None,
    )


def _share(summary: Summary, work: Work | None, best: Limits, batch: int) -> Share | None:
    """The engine's own time where it is known; a peer's call is nothing else."""
    if work is None or best.int8 is None or best.fp32 is None or best.copy is None:
        return None
    seconds = (summary.engine_p50_ms or summary.p50_ms) / 1000
    rate = work.macs * batch / seconds
    return Share(
        int8_peak=rate / best.int8.macs_per_s,
        fp32_peak=rate / best.fp32.macs_per_s,
        bandwidth=work.weight_bytes / seconds / best.copy.bytes_per_s,
    )


def _ratios(results: Sequence[Result]) -> Iterator[Ratio]:
    """Every result against the first peer, or against the first engine where there is no peer."""
    against = next((result for result in results if result.kind == PEER), results[0])
    for result in results:
        if result is against:
            continue
        for theirs, ours in zip(against.lengths, result.lengths, strict=True):
            samples = [[trial.latency_ms for trial in length.trials] for length in (theirs, ours)]
            ratio, low, high = ratio_of_medians(*samples)
            yield Ratio(result.name, against.name, ours.tokens, ratio, low, high)
