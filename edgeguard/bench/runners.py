"""What a worker holds: something that judges samples and says how long that took.

An engine is measured through the public API, :meth:`edgeguard.Guard.classify` (``classify_many`` for a batch), as
loaded by :meth:`edgeguard.Guard.load`. The shares of engine and tokenizer are taken by a stopwatch around both, inside
that call.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from edgeguard.errors import EngineError
from edgeguard.guard import Guard
from edgeguard.prompt import Message
from edgeguard.verdict import Verdict

__all__ = ["Facts", "GuardRunner", "Reading", "Runner", "Sample"]

# Facts of Guard.info()["engine"] that have a place of their own in the record.
KNOWN_FACTS = ("name", "version", "providers", "providers_asked", "threads")


@dataclass(frozen=True)
class Sample:
    """A conversation to judge: its turns (role, text), oldest first, and the token ids that it becomes."""

    messages: tuple[Message, ...]
    ids: tuple[int, ...]

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Sample:
        """Read what the parent's ``asdict`` wrote."""
        return cls(tuple((role, text) for role, text in data["messages"]), tuple(data["ids"]))


@dataclass(frozen=True)
class Facts:
    """What was loaded; the fields are those of :class:`edgeguard.bench.records.Result`."""

    used: str
    version: str
    settings: str | None
    providers_asked: tuple[str, ...]
    providers_used: tuple[str, ...]
    threads_used: int
    details: Mapping[str, Any]


@dataclass(frozen=True)
class Reading:
    """One call; the fields are those of :class:`edgeguard.bench.records.Trial`."""

    latency_ms: float
    engine_ms: float | None
    tokenizer_ms: float | None
    margin: float | None


class Runner(Protocol):
    """An engine or a peer, loaded."""

    @property
    def facts(self) -> Facts:
        """What was loaded."""

    def call(self, samples: Sequence[Sample]) -> Reading:
        """Judge ``samples``, all of one length, in one call."""


class Stopwatch:
    """Stands in for ``inner`` and adds up the time that its methods take."""

    def __init__(self, inner: Any) -> None:  # noqa: ANN401 - an engine or a tokenizer
        """Start at 0."""
        self._inner = inner
        self.ms = 0.0

    def __getattr__(self, name: str) -> Any:  # noqa: ANN401 - whatever ``inner`` has
        """An attribute of ``inner``; a method comes with the watch around it."""
        found = getattr(self._inner, name)
        if not callable(found):
            return found

        def timed(*args: Any, **kwargs: Any) -> Any:  # noqa: ANN401 - as ``inner`` takes them
            start = time.perf_counter()
            try:
                return found(*args, **kwargs)
            finally:
                self.ms += 1000 * (time.perf_counter() - start)

        return timed


class GuardRunner:
    """An engine, through a Guard."""

    def __init__(self, engine: str, bundle: Path, threads: int) -> None:
        """Load the guard, self-test included. Raises what ``Guard.load`` raises."""
        self._guard = Guard.load(bundle, engine=engine, threads=threads)
        told = self._guard.info()["engine"]
        self.facts = Facts(
            used=told["name"],
            version=told["version"],
            settings=None,
            providers_asked=tuple(told["providers_asked"]),
            providers_used=tuple(told["providers"]),
            threads_used=told["threads"],
            details={key: value for key, value in told.items() if key not in KNOWN_FACTS},
        )
        # Guard has no place for a stopwatch, and needs none but for this: its parts are exchanged after loading.
        self._engine = self._guard._engine = Stopwatch(self._guard._engine)
        self._tokenizer = Stopwatch(self._guard._tokenizer)
        self._guard._tokenizer = self._tokenizer  # type: ignore[assignment, unused-ignore]

    def call(self, samples: Sequence[Sample]) -> Reading:
        """See :meth:`Runner.call`. Raises EngineError when a text was not as long as it should be."""
        self._engine.ms = self._tokenizer.ms = 0.0
        items = [_item(sample) for sample in samples]
        start = time.perf_counter()
        verdicts = [self._guard.classify(**items[0])] if len(items) == 1 else self._many(items)
        latency_ms = 1000 * (time.perf_counter() - start)
        for sample, verdict in zip(samples, verdicts, strict=True):
            _check_length(sample, verdict)
        return Reading(latency_ms, self._engine.ms, self._tokenizer.ms, verdicts[0].margin)

    def turn(self, sample: Sample) -> float:
        """Milliseconds of the last message of ``sample``, those before it having been judged one after the other.

        Through ``Guard.conversation``, which need not read them again.
        """
        *earlier, last = sample.messages
        conversation = self._guard.conversation()
        for role, text in earlier:
            conversation.classify(role, text)
        start = time.perf_counter()
        verdict = conversation.classify(*last)
        latency_ms = 1000 * (time.perf_counter() - start)
        _check_length(sample, verdict)
        return latency_ms

    def scratch(self, sample: Sample, other: Sample) -> float:
        """Milliseconds of ``sample`` as a whole, after the earlier messages of ``other`` were judged one by one.

        So caches and clock are as they are for :meth:`turn`, and another conversation is all that is remembered.
        """
        for count in range(1, len(other.messages)):
            self._guard.classify(messages=_dialogue(other.messages[:count]))
        start = time.perf_counter()
        verdict = self._guard.classify(messages=_dialogue(sample.messages))
        latency_ms = 1000 * (time.perf_counter() - start)
        _check_length(sample, verdict)
        return latency_ms

    def _many(self, items: Sequence[Mapping[str, Any]]) -> list[Verdict]:
        return self._guard.classify_many(items, batch_size=len(items))


def _item(sample: Sample) -> dict[str, Any]:
    if len(sample.messages) == 1:
        return {"text": sample.messages[0][1]}
    return {"messages": _dialogue(sample.messages)}


def _dialogue(messages: Sequence[Message]) -> list[dict[str, str]]:
    return [{"role": role, "content": text} for role, text in messages]


def _check_length(sample: Sample, verdict: Verdict) -> None:
    if verdict.tokens != len(sample.ids):
        raise EngineError(f"expected a verdict on {len(sample.ids)} tokens, found one on {verdict.tokens}.")
