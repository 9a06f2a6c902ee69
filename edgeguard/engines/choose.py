"""Which engine is fastest here: measured the first time a bundle is used on a machine, and remembered.

Only an engine that reproduces the bundle's self-test is a candidate, so speed never buys another verdict.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import platform
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import TYPE_CHECKING, Any

import numpy as np

from edgeguard.cache import cache_folder
from edgeguard.engines.cpus import cpuinfo
from edgeguard.errors import BundleError, EngineError
from edgeguard.files import installed_version, write_whole

if TYPE_CHECKING:
    from edgeguard.bundle import Bundle
    from edgeguard.engines import Engine

__all__ = ["choose_engine"]

LOG = logging.getLogger(__name__)
TRIALS = 7  # of each candidate, after one that warms up
# What a guard mostly reads: a message of about sixty tokens.
TEXT = (
    "Could you please help me to write a friendly letter to the people who live next door? We are planning a small "
    "party on Saturday evening, there will be some music, and I would like to invite them and let them know that it "
    "ends before midnight."
)
KEY_DIGITS = 16


def choose_engine(
    bundle: Bundle, names: Sequence[str], threads: int | None, make: Callable[[str], Engine]
) -> tuple[Engine, dict[str, Any]]:
    """The fastest of the engines ``names`` that reproduce the bundle's self-test, and the record of the choice.

    ``make``: loads an engine. The record holds ``chosen``, ``latency_ms`` (median, by engine) and ``refused`` (why, by
    engine); it is kept in the cache by bundle, machine, versions and threads, unless an engine was refused for what may
    pass, a full disk for one. Raises EngineError when none is left.
    """
    name = f"engine-{_key(bundle, names, threads)}.json"
    # Nothing remembered, or no record, or its engine no longer loads.
    with suppress(OSError, ValueError, KeyError, TypeError, EngineError, BundleError):
        record = json.loads((cache_folder() / name).read_text(encoding="utf-8"))
        return make(record["chosen"]), record
    engine, record, lasts = _measure(bundle, names, make)
    with suppress(OSError, EngineError):  # no cache: measured again the next time
        if lasts:
            write_whole(cache_folder() / name, lambda part: part.write_text(json.dumps(record), encoding="utf-8"))
    LOG.info("%s: chose the engine %s", bundle.label, record)
    return engine, record


def _measure(
    bundle: Bundle, names: Sequence[str], make: Callable[[str], Engine]
) -> tuple[Engine, dict[str, Any], bool]:
    """The engine, the record, and whether it would be the same the next time."""
    from edgeguard.guard import Guard

    tokenizer, manifest = bundle.load_tokenizer(), bundle.manifest
    ids = manifest.template.encode(tokenizer, [("user", TEXT)], manifest.max_tokens).ids
    fastest: Engine | None = None
    latency_ms: dict[str, float] = {}
    refused: dict[str, str] = {}
    lasts = True
    for name in names:
        try:
            engine = make(name)
            Guard(bundle, engine, tokenizer).self_test()
            latency_ms[name] = _latency_ms(engine, ids)
        except (EngineError, BundleError) as error:
            refused[name] = str(error)
            lasts &= not isinstance(error.__cause__, OSError)
            continue
        if latency_ms[name] == min(latency_ms.values()):
            fastest = engine
    if fastest is None:
        raise EngineError(f"{bundle.path}: no engine can run it here: {refused}.")
    return fastest, {"chosen": fastest.name, "latency_ms": latency_ms, "refused": refused}, lasts


def _latency_ms(engine: Engine, row: Sequence[int]) -> float:
    ids = np.array([row], dtype=np.int64)
    times = []
    for _ in range(TRIALS + 1):
        started = time.perf_counter()
        engine.logits(ids, np.ones_like(ids))
        times.append(1000 * (time.perf_counter() - started))
    return float(np.median(times[1:]))


def _key(bundle: Bundle, names: Sequence[str], threads: int | None) -> str:
    """What the choice depends on: bundle, candidates, threads, processor and the versions of what computes."""
    import onnxruntime

    from edgeguard import __version__

    hashes = sorted(entry.sha256 for entry in bundle.manifest.files.values())
    llama_cpp = installed_version("llama-cpp-python") if "gguf" in names else None
    versions = (__version__, onnxruntime.__version__, llama_cpp, platform.python_version())
    info = cpuinfo()  # on Linux, of whose processor ``platform`` tells nothing
    processor = [info.get(key) for key in ("model name", "flags", "cpu part", "features")]
    machine = (platform.node(), platform.machine(), platform.processor(), processor, os.cpu_count())
    facts = (bundle.label, hashes, tuple(names), threads, versions, machine)
    return hashlib.sha256(repr(facts).encode()).hexdigest()[:KEY_DIGITS]
