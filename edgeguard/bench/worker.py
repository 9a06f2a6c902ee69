"""A worker's side: one engine or peer in a process of its own, asked through stdin, answering on stdout.

Nothing is imported that the engine does not need, so that the memory of the process is the engine's. Never run by hand.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from edgeguard.bench.memory import peak_bytes, private_bytes, resident_bytes
from edgeguard.bench.runners import GuardRunner, Runner, Sample
from edgeguard.errors import EdgeguardError

__all__ = ["main"]


def main(import_ms: float) -> None:
    """Answer requests until stdin closes. ``import_ms``: what ``import edgeguard`` took."""
    answers = os.fdopen(os.dup(sys.stdout.fileno()), "wb")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())  # what a library prints must not stand between answers
    session = Session(import_ms)
    try:
        for line in sys.stdin.buffer:
            answers.write(json.dumps(_answer(session, json.loads(line))).encode() + b"\n")
            answers.flush()
    except (KeyboardInterrupt, BrokenPipeError):  # the parent says what happened
        return


def _answer(session: Session, request: dict[str, Any]) -> dict[str, Any]:
    todo = session.tasks[request.pop("do")]
    try:
        return {"answer": todo(**request)}
    except EdgeguardError as error:
        return {"error": str(error)}
    except MemoryError:
        return {"error": "out of memory"}
    except Exception as error:  # noqa: BLE001 - peers raise whatever they like; the parent decides what it means
        return {"error": f"{type(error).__name__}: {error}"}


class Session:
    """What this process can be asked; every answer is JSON-ready."""

    def __init__(self, import_ms: float) -> None:
        """Nothing is loaded yet."""
        self._import_ms = import_ms
        self._runner: Runner | None = None
        self.tasks: Mapping[str, Callable[..., Any]] = {
            "load an engine": self.load_engine,
            "load a peer": self.load_peer,
            "judge": self.judge,
            "judge a new turn": self.turn,
            "judge a conversation": self.scratch,
            "judge without pause": self.sustain,
            "tell its memory": self.memory,
            "write files for a peer": self.prepare,
            "write a shape": self.write_shape,
            "read the model's shape": self.shape,
            "measure the machine": self.limits,
        }

    def load_engine(self, name: str, bundle: str, threads: int) -> dict[str, Any]:
        """Load an engine through ``Guard.load``."""
        start = time.perf_counter()
        self._runner = runner = GuardRunner(name, Path(bundle), threads)
        return {
            "import_ms": self._import_ms,
            "load_ms": 1000 * (time.perf_counter() - start),
            "harness_ms": 0.0,
            "facts": asdict(runner.facts),
        }

    def load_peer(self, name: str, bundle: str, folder: str, threads: int, longest: int) -> dict[str, Any]:
        """Load a peer from the files that were prepared in ``folder``."""
        from edgeguard.bench.peers import PEERS, PeerRunner, import_peer

        start = time.perf_counter()
        import_peer(PEERS[name])
        imported = time.perf_counter()
        self._runner = runner = PeerRunner(PEERS[name], Path(bundle), Path(folder), threads, longest)
        return {
            "import_ms": 1000 * (imported - start),
            "load_ms": 1000 * (time.perf_counter() - imported),
            "harness_ms": self._import_ms,
            "facts": asdict(runner.facts),
        }

    def judge(self, samples: Sequence[Any]) -> dict[str, Any]:
        """One call with ``samples`` as its batch."""
        return asdict(self._loaded.call([Sample.from_json(sample) for sample in samples]))

    def turn(self, sample: Any) -> float:  # noqa: ANN401 - a sample as JSON
        """Milliseconds of the last message of a conversation whose earlier ones were judged just before."""
        assert isinstance(self._runner, GuardRunner)  # peers have no conversations
        return self._runner.turn(Sample.from_json(sample))

    def scratch(self, sample: Any, other: Any) -> float:  # noqa: ANN401 - samples as JSON
        """Milliseconds of a conversation as a whole, just after the earlier messages of another one."""
        assert isinstance(self._runner, GuardRunner)
        return self._runner.scratch(Sample.from_json(sample), Sample.from_json(other))

    def sustain(self, batches: Sequence[Sequence[Any]], seconds: float) -> dict[str, Any]:
        """Call without pause, ``batches`` in turn, and look at clock and temperature once a second."""
        from edgeguard.bench.device import clock_mhz, temperature_c

        runner, rounds = self._loaded, [[Sample.from_json(sample) for sample in batch] for batch in batches]
        latencies: list[float] = []
        ends: list[float] = []
        sensors: list[tuple[float | None, float | None]] = []
        start = time.perf_counter()
        while (now := time.perf_counter() - start) < seconds:
            latencies.append(runner.call(rounds[len(latencies) % len(rounds)]).latency_ms)
            ends.append(time.perf_counter() - start)
            if int(ends[-1]) > int(now):
                sensors += [(clock_mhz(), temperature_c())] * (int(ends[-1]) - int(now))
        return {"latencies_ms": latencies, "ends_s": ends, "sensors": sensors}

    def memory(self) -> dict[str, int | None]:
        """Peak and present memory of this process."""
        resident, peak = resident_bytes(), peak_bytes()
        if resident is not None and peak is not None:
            peak = max(peak, resident)  # Linux counts in steps, and not both at the same moment
        return {"peak": peak, "resident": resident, "private": private_bytes()}

    def prepare(self, files: str, bundle: str, folder: str, threads: int) -> None:
        """Write what a peer reads into ``folder``."""
        from edgeguard.bench.peer_files import prepare

        prepare(files, Path(bundle), Path(folder), threads)

    def write_shape(self, name: str, folder: str, seed: int) -> None:
        """Write an untrained bundle of a shape into ``folder``."""
        from edgeguard.bench.shapes import SHAPES, write_shape

        write_shape(name, SHAPES[name], Path(folder), seed)

    def shape(self, bundle: str) -> dict[str, int] | None:
        """The model's shape, None where it is not known."""
        from edgeguard.bench.work import bundle_shape

        found = bundle_shape(Path(bundle))
        return None if found is None else asdict(found)

    def limits(self, threads: int, product: Sequence[int], copy_bytes: int, seconds: float) -> dict[str, Any]:
        """What the machine can do at best."""
        from edgeguard.bench.limits import measure_limits

        m, k, n = product
        return asdict(measure_limits(threads, (m, k, n), copy_bytes, seconds))

    @property
    def _loaded(self) -> Runner:
        assert self._runner is not None  # the parent loads first
        return self._runner
