"""The parent's side of a worker: a process of its own that is asked one thing at a time.

Requests and answers are lines of JSON on the worker's stdin and stdout. What a library prints there goes to its stderr,
which is kept and quoted when the worker dies. A worker ends when its stdin closes, so none outlives its parent.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Mapping
from typing import Any

from edgeguard.bench.records import BenchError

__all__ = ["Refused", "Worker"]

# What stands in a new process first: the parent's own import path (nothing from the current folder), then the library,
# whose import is timed before anything else of it is used.
BOOT = """
import sys, time
sys.path[:] = sys.argv[1:]
start = time.perf_counter()
import edgeguard
import_ms = 1000 * (time.perf_counter() - start)
from edgeguard.bench.worker import main
main(import_ms)
"""
# Libraries that have threads of their own and are told their number by the environment.
THREAD_VARIABLES = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS", "VECLIB_MAXIMUM_THREADS")
OFFLINE = {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1"}
ANSWER_WITHIN_S = 1800.0
STOP_WITHIN_S = 5.0
SIGKILL = 9  # Windows has no name for it
QUOTED_CHARS = 400


class Refused(BenchError):
    """The worker lives and says why it cannot do what it was asked."""


class Worker:
    """One process. Use as a context manager, or call :meth:`stop`."""

    def __init__(self, name: str, threads: int, *, answer_within_s: float = ANSWER_WITHIN_S) -> None:
        """Start it. ``name``: for messages; ``threads``: of every library in it."""
        self.name = name
        self.started = time.perf_counter()
        self._answer_within_s = answer_within_s
        self._errors = tempfile.TemporaryFile()  # noqa: SIM115 - closed by stop()
        environment = {**os.environ, **OFFLINE, **dict.fromkeys(THREAD_VARIABLES, str(threads))}
        self._process = subprocess.Popen(
            [sys.executable, "-c", BOOT, *(path for path in sys.path if path)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._errors,
            env=environment,
        )

    def __enter__(self) -> Worker:
        """Return itself."""
        return self

    def __exit__(self, *_: object) -> None:
        """Stop the process."""
        self.stop()

    @property
    def pid(self) -> int:
        """The process's id."""
        return self._process.pid

    def ask(self, do: str, **arguments: Any) -> Any:  # noqa: ANN401 - any JSON value
        """Ask for ``do`` with ``arguments`` (JSON-ready) and wait for the answer.

        What is asked to take ``seconds`` has that much more time. Raises Refused with the worker's own reason,
        BenchError when it died or does not answer in time.
        """
        late = threading.Event()

        def give_up() -> None:
            late.set()
            self._process.kill()

        within_s = self._answer_within_s + arguments.get("seconds", 0.0)
        timer = threading.Timer(within_s, give_up)
        timer.start()
        try:
            reply = self._exchange(json.dumps({"do": do, **arguments}).encode() + b"\n")
        finally:
            timer.cancel()
        if reply is None and late.is_set():
            raise BenchError(f"{self.name}: gave no answer within {within_s:g} s to {do!r}; nothing was recorded.")
        if reply is None:
            raise BenchError(self._obituary(do))
        if "error" in reply:
            raise Refused(f"{self.name}: {reply['error']}")
        return reply["answer"]

    def stop(self) -> None:
        """End the process, by force if it does not go."""
        if self._process.stdin is not None:
            with contextlib.suppress(OSError):  # a dead process has closed its end
                self._process.stdin.close()
        try:
            self._process.wait(STOP_WITHIN_S)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        if self._process.stdout is not None:
            self._process.stdout.close()
        self._errors.close()

    def _exchange(self, line: bytes) -> Mapping[str, Any] | None:
        """Write a line and read one; None when the process is gone."""
        assert self._process.stdin is not None and self._process.stdout is not None
        try:
            self._process.stdin.write(line)
            self._process.stdin.flush()
            reply: Mapping[str, Any] = json.loads(self._process.stdout.readline())
        except (OSError, ValueError):  # a closed pipe; an empty line, or half of one
            return None
        return reply

    def _obituary(self, do: str) -> str:
        """How the process ended and its last words."""
        try:
            code = self._process.wait(STOP_WITHIN_S)
        except subprocess.TimeoutExpired:
            return f"{self.name}: its process answered {do!r} with something that is no answer. Nothing was recorded."
        how = f"killed by {signal.Signals(-code).name}" if code < 0 else f"exit code {code}"
        self._errors.seek(0)
        words = " ".join(self._errors.read().decode("utf-8", "replace").split())[-QUOTED_CHARS:]
        hint = " Too little memory is a usual reason: ask for fewer engines or peers." if code == -SIGKILL else ""
        return (
            f"{self.name}: its process ended while it was asked to {do} ({how}); nothing was recorded.{hint} "
            f"Its last words: {words or 'none'}"
        )
