"""This machine as a device: timings of an export's own ``check.py``, and what this machine is."""

from __future__ import annotations

import importlib
import os
import sys
import time
from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from typing import Any

from device_tests.records import Compute, Conditions, Device, Measured, Plan, Timing, load_plan, to_json
from edgeguard.bench.device import describe_device, temperature_c
from edgeguard.bench.memory import peak_bytes
from edgeguard.export.golden import GOLDEN_NAME, read_golden

__all__ = ["conditions", "measure_here", "this_machine", "timed_ids"]

SUPPLIES = Path("/sys/class/power_supply")


def measure_here(
    export: Path,
    job: Path,
    runtime: str,
    prepare: Callable[[Plan], None],
    compute: Callable[[Plan, Path, Path], Compute],
    threads: Callable[[Any], int | None],
    module: str = "check",
) -> None:
    """Time ``check.py`` of the export as the plan of ``job`` asks, or another ``module``, and write ``measured.json``.

    ``runtime``: its distribution; ``prepare`` is called before the runtime is loaded; ``compute`` tells what computed,
    after all timings; ``threads``: of the loaded ``check`` module.
    """
    plan = load_plan(job / "plan.json")
    before = conditions()
    prepare(plan)
    sys.path.insert(0, str(export))
    start = time.perf_counter()
    check = importlib.import_module(module)
    load_ms = 1000 * (time.perf_counter() - start)
    timings = tuple(_time(check.margin_of, timed_ids(export, tokens, check.manifest), plan) for tokens in plan.tokens)
    peak = peak_bytes()
    measured = Measured(
        device=this_machine("local"),
        runtime=runtime,
        runtime_version=metadata.version(runtime),
        threads=threads(check),
        compute=compute(plan, export, job),
        load_ms=load_ms,
        peak_bytes=peak,
        timings=timings,
        before=before,
        after=conditions(),
    )
    (job / "measured.json").write_bytes(to_json(measured))


def timed_ids(export: Path, tokens: int, manifest: dict[str, Any]) -> list[int]:
    """Exactly so many token ids: those of the longest golden prompt, its middle left out."""
    ids = max((line.ids for line in read_golden(export / GOLDEN_NAME) if line.target == "prompt"), key=len)
    template = manifest["template"]
    tail = len(template["closing"]) + len(template["read"]["prompt"])
    return [*ids[: tokens - tail], *ids[len(ids) - tail :]]


def _time(margin_of: Callable[[list[int]], float], ids: list[int], plan: Plan) -> Timing:
    trials = []
    for number in range(plan.warmup + plan.trials):
        start = time.perf_counter()
        margin_of(ids)
        if number >= plan.warmup:
            trials.append(1000 * (time.perf_counter() - start))
    return Timing(tokens=len(ids), warmup=plan.warmup, trials_ms=tuple(trials))


def this_machine(name: str) -> Device:
    """What this machine is; ``name``: what ran on it."""
    facts = describe_device()
    return Device(
        name=name,
        chip=facts.cpu,
        architecture=facts.architecture,
        system=facts.system,
        ram_bytes=facts.ram_bytes,
        emulated_by=None,
        virtual=facts.virtual,
    )


def conditions() -> Conditions:
    """Of this machine, now."""
    load = os.getloadavg()[0] if hasattr(os, "getloadavg") else None
    return Conditions(load_average=load, battery_percent=_battery(), temperature_c=temperature_c())


def _battery() -> float | None:
    for file in SUPPLIES.glob("BAT*/capacity"):
        try:
            return float(file.read_text())
        except (OSError, ValueError):
            continue
    return None
