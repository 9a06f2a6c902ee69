"""A run on a device: ask its ``run.sh``, look at what came back, say what failed.

A device is not believed: margins are compared here, answers counted, and whatever is missing is a failure. What ``JOB``
holds is in README.md.
"""

from __future__ import annotations

import contextlib
import os
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from convert.corpora.registry import CorpusError, Row
from device_tests.records import (
    FORMAT,
    SCHEMA_VERSION,
    Agreement,
    DeviceTestError,
    GoldenResult,
    Measured,
    Model,
    Plan,
    Record,
    fell_back,
    load_measured,
    summarize,
    to_json,
)
from device_tests.rows import agreement_of, draw_rows, reference_lines
from device_tests.targets import DeviceTarget
from edgeguard.bench.device import commit
from edgeguard.bundle import Bundle, sha256_of
from edgeguard.errors import EdgeguardError
from edgeguard.export.golden import (
    GOLDEN_NAME,
    Golden,
    compare,
    read_answers,
    read_golden,
    verdict_faults,
    write_golden,
)
from edgeguard.export.make import Export, reference_guard
from edgeguard.manifest import MANIFEST_NAME, Manifest

__all__ = ["Wanted", "run_on_device"]

ROWS_NAME = "rows.jsonl"
QUOTED_CHARS = 600
SHOWN_FAULTS = 10  # of public rows


@dataclass(frozen=True)
class Wanted:
    """What to run: the plan for the device, ``rows`` public rows drawn by ``seed``; given up after ``within_s``.

    ``keep``: a new folder for the job with all that the device left there (a log, pictures), None for none.
    """

    plan: Plan
    rows: int
    seed: int
    within_s: float
    keep: Path | None = None


@dataclass(frozen=True)
class _Rows:
    """Rows with what the reference made of them, or why there are none."""

    rows: list[Row]
    golden: list[Golden]
    skipped: str | None


def run_on_device(
    target: DeviceTarget,
    export: Export,
    source: Bundle,
    wanted: Wanted,
    say: Callable[[str], None] = lambda _: None,
) -> Record:
    """Run the export on the device; ``source``: the bundle that it was made from, as the reference of the rows.

    What goes wrong on the device is a failure in the record, never an exception. Raises DeviceTestError for an export
    of another target or bundle.
    """
    _check_export(target, export, source)
    golden = read_golden(export.bundle.path / GOLDEN_NAME)
    say(f"{target.name}: the reference judges {wanted.rows} public rows ...")
    rows = _rows(export, source, wanted)
    with tempfile.TemporaryDirectory(prefix="edgeguard-device-") as scratch:
        job = Path(scratch)
        (job / "plan.json").write_bytes(to_json(wanted.plan))
        write_golden(job / GOLDEN_NAME, golden)
        if rows.rows:
            write_golden(job / ROWS_NAME, rows.golden)
        say(f"{target.name}: {target.script} ...")
        failures = _run_script(target, export, job, wanted.within_s)
        measured = _collect(failures, lambda: load_measured(job / "measured.json"))
        manifest = export.bundle.manifest
        answered = _collect(failures, lambda: _judge_golden(golden, job, manifest, failures))
        agreement = _collect(failures, lambda: _judge_rows(rows, job, wanted.seed, manifest, failures))
        if wanted.keep is not None:
            shutil.copytree(job, wanted.keep)
    return Record(
        format=FORMAT,
        schema_version=SCHEMA_VERSION,
        created=time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        command=shlex.join(["python", "-m", "device_tests", *sys.argv[1:]]),
        commit=commit(),
        target=target.name,
        model=Model(
            bundle=export.facts.bundle,
            manifest_sha256=sha256_of(export.bundle.path / MANIFEST_NAME),
            size_bytes=_size(target, export),
            max_tokens=export.facts.max_tokens,
            reference_engine=export.facts.reference_engine,
        ),
        plan=wanted.plan,
        measured=measured,
        summaries=() if measured is None else tuple(map(summarize, measured.timings)),
        fell_back=None if measured is None else fell_back(measured.compute),
        golden=answered,
        agreement=agreement,
        agreement_skipped=rows.skipped,
        failures=tuple(failures) + _contradictions(measured, wanted.plan),
    )


def _check_export(target: DeviceTarget, export: Export, source: Bundle) -> None:
    facts = export.facts
    if facts.target != target.export:
        raise DeviceTestError(
            f"{export.bundle.path}: expected an export for {target.export}, found one for {facts.target}."
        )
    if target.model is not None and target.model not in facts.model_files:
        raise DeviceTestError(
            f"{export.bundle.path}: expected {target.model}, found {', '.join(facts.model_files)}. Export again where "
            "its packages are installed; the export's README.md names them."
        )
    if facts.bundle_manifest_sha256 != sha256_of(source.path / MANIFEST_NAME):
        raise DeviceTestError(
            f"{export.bundle.path}: was made from another bundle ({facts.bundle}) than {source.path} ({source.label}). "
            "Pass that one with --bundle, or export again."
        )


def _size(target: DeviceTarget, export: Export) -> int:
    """Of what the device's runtime loads."""
    return export.model_bytes if target.model is None else export.bundle.manifest.files[target.model].bytes


def _rows(export: Export, source: Bundle, wanted: Wanted) -> _Rows:
    if wanted.rows == 0:
        return _Rows([], [], "no rows were asked for")
    try:
        rows = draw_rows(wanted.rows, wanted.seed)
    except CorpusError as error:
        return _Rows([], [], str(error))
    guard = reference_guard(source, export.facts.max_tokens)
    return _Rows(rows, reference_lines(guard, rows, export.facts.tolerance), None)


def _run_script(target: DeviceTarget, export: Export, job: Path, within_s: float) -> list[str]:
    """Run it; returns how it failed, if it did. What it started ends with it."""
    command = [str(target.script), str(export.bundle.path.resolve()), str(job)]
    log = job / "run.log"
    try:
        with log.open("wb") as output:
            process = subprocess.Popen(
                command,
                env={**os.environ, "PYTHON": sys.executable},
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                start_new_session=True,
            )
    except OSError as error:
        return [f"{target.script}: could not be started ({error.strerror})"]
    try:
        code = process.wait(within_s)
    except subprocess.TimeoutExpired:
        return [f"{target.script.name} did not end within {within_s:g} seconds"]
    finally:
        with contextlib.suppress(ProcessLookupError):  # all of them are gone
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    words = " ".join(log.read_text(encoding="utf-8", errors="replace").split())[-QUOTED_CHARS:]
    return [] if code == 0 else [f"{target.script.name} ended with exit code {code}: {words or 'no words'}"]


def _collect(failures: list[str], get: Callable[[], Any]) -> Any:  # noqa: ANN401 - what ``get`` returns, or None
    """What ``get`` returns; its error becomes a failure."""
    try:
        return get()
    except EdgeguardError as error:
        failures.append(str(error))
        return None


def _judge_golden(golden: list[Golden], job: Path, manifest: Manifest, failures: list[str]) -> GoldenResult:
    answers = read_answers(job / f"{GOLDEN_NAME}.answers")
    found = compare(golden, answers)
    failures += [*found.faults, *verdict_faults(golden, answers, manifest)]
    wrong = sum(bool(compare([line], [answer]).faults) for line, answer in zip(golden, answers, strict=False))
    return GoldenResult(
        vectors=len(golden),
        passed=min(len(golden), len(answers)) - wrong,
        tolerance=golden[0].tolerance,
        largest_difference=found.largest_difference if answers else None,
        mean_difference=found.mean_difference if answers else None,
    )


def _judge_rows(rows: _Rows, job: Path, seed: int, manifest: Manifest, failures: list[str]) -> Agreement | None:
    if not rows.rows:
        return None
    answers = read_answers(job / f"{ROWS_NAME}.answers")
    failures += verdict_faults(rows.golden, answers, manifest)[:SHOWN_FAULTS]
    return agreement_of(rows.rows, rows.golden, answers, seed)


def _contradictions(measured: Measured | None, plan: Plan) -> tuple[str, ...]:
    """What a device says it was asked for, or did, against the plan."""
    if measured is None:
        return ()
    found = []
    if measured.compute.asked != plan.unit:
        found.append(
            f"the device says it was asked for the {measured.compute.asked}, the plan asks for the {plan.unit}"
        )
    timed = [timing.tokens for timing in measured.timings]
    if timed != list(plan.tokens) or any(len(timing.trials_ms) != plan.trials for timing in measured.timings):
        found.append(f"expected {plan.trials} trials of each of {list(plan.tokens)} tokens, found those of {timed}")
    return tuple(found)
