"""``python -m device_tests``: which devices there are, runs on them, and their results as a table."""

from __future__ import annotations

import dataclasses
import json
import re
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import click

from device_tests.devices import find_devices
from device_tests.drive import Wanted, run_on_device
from device_tests.matrix import load_results, matrix
from device_tests.records import Plan, Record, to_json
from device_tests.targets import ROOT, TARGETS, DeviceTarget, find_target, missing_here
from edgeguard.bundle import Bundle, default_bundle_path
from edgeguard.errors import EdgeguardError
from edgeguard.export.make import Export, export_bundle, open_export
from edgeguard.files import write_whole
from edgeguard.hub import resolve_bundle

__all__ = ["main"]

RESULTS = ROOT / "results"
TOKENS = (16, 32, 64, 128, 256, 512)
SHOWN_TOKENS = 64


class Group(click.Group):
    """Turns our errors into one line on stderr and exit code 1."""

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except (EdgeguardError, OSError) as error:
            raise click.ClickException(" ".join(str(error).split())) from error


@click.group(cls=Group, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
def main() -> None:
    """Run exports of edgeguard on devices: golden vectors, public rows, timings.

    \b
    python -m device_tests list
    python -m device_tests run gguf
    python -m device_tests agreement onnx --rows 500
    python -m device_tests matrix

    Exit codes: 0 fine, 1 a run failed or could not be made, 2 wrong usage.
    """  # noqa: D301 - click reads \b


@main.command("list")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
def list_command(as_json: bool) -> None:
    """Show connected devices, and which targets can run on them."""
    found = find_devices()
    targets = {name: _ready(target) for name, target in TARGETS.items()}
    if as_json:
        print(json.dumps({**dataclasses.asdict(found), "targets": targets}, ensure_ascii=False))
        return
    for device in found.devices:
        note = ", emulated" if device.emulated else ""
        print(f"{device.kind:<8}{device.id:<24}{device.state:<14}{device.name}{note}")
    for line in found.absent:
        print(f"absent  {line}")
    for name, state in targets.items():
        print(f"target  {name:<24}{state}")


def _ready(target: DeviceTarget) -> str:
    missing = missing_here(target)
    needs = f"needs {', '.join(missing)}, not installed" if missing else "ready"
    return f"{needs} ({target.kind}, {' or '.join(target.units)})"


def run_options(function: Any) -> Any:
    """What `run` and `agreement` share."""
    options = (
        click.argument("target", type=click.Choice(list(TARGETS))),
        click.option("--bundle", metavar="DIR", help="The bundle that is exported. Default: the shipped one."),
        click.option("--export", "folder", metavar="DIR", help="An export of it. Default: made anew."),
        click.option("--device", metavar="ID", help="As `list` names it. Default: the only one."),
        click.option("--unit", type=click.Choice(["cpu", "gpu", "npu"]), help="Compute unit to ask for."),
        click.option("--seed", type=int, default=0, show_default=True, help="Of the rows."),
        click.option("--keep", metavar="DIR", help="Keep the job there: plan, answers, log, pictures. A new folder."),
        click.option(
            "--within", "within_s", type=click.FloatRange(1), default=7200, show_default=True, help="Seconds."
        ),
    )
    for option in reversed(options):
        function = option(function)
    return function


@main.command("run")
@run_options
@click.option("--rows", type=click.IntRange(0), default=500, show_default=True, help="Public rows for agreement.")
@click.option("--tokens", default=",".join(map(str, TOKENS)), show_default=True, help="Lengths to time.")
@click.option("--trials", type=click.IntRange(1), default=20, show_default=True, help="Calls of each length.")
@click.option("--warmup", type=click.IntRange(0), default=3, show_default=True, help="Calls of each length to discard.")
@click.option("--no-timing", is_flag=True, help="Golden vectors and rows alone, where timings would mean nothing.")
@click.option("--results", metavar="DIR", default=str(RESULTS), show_default=True, help="Folder of the result.")
@click.pass_context
def run_command(
    ctx: click.Context,
    /,
    target: str,
    tokens: str,
    trials: int,
    warmup: int,
    no_timing: bool,
    results: str,
    **rest: Any,
) -> None:
    """Run golden vectors, public rows and timings of TARGET, and write one JSON into the results.

    A failed run is written as well, says why, and exits with 1. Without the public data (EDGEGUARD_DATA), agreement is
    skipped, and the result says so.
    """
    lengths = () if no_timing else _lengths(ctx, tokens)
    record = _run(find_target(target), lengths, trials, warmup, **rest)
    file = Path(results) / _file_name(record)
    file.parent.mkdir(parents=True, exist_ok=True)
    write_whole(file, lambda part: part.write_bytes(to_json(record)))
    print(matrix([record], SHOWN_TOKENS), end="")
    if record.agreement_skipped:
        click.echo(f"agreement was skipped: {record.agreement_skipped}", err=True)
    click.echo(str(file), err=True)
    _end(ctx, record)


@main.command("agreement")
@run_options
@click.option("--rows", type=click.IntRange(1), default=500, show_default=True, help="Public rows.")
@click.pass_context
def agreement_command(ctx: click.Context, /, target: str, **rest: Any) -> None:
    """Measure verdict agreement of TARGET with the reference on public rows; prints JSON, writes nothing."""
    record = _run(find_target(target), (), 1, 0, **rest)
    if record.agreement is None:
        click.echo(f"skipped: {record.agreement_skipped}", err=True)
    else:
        print(json.dumps(dataclasses.asdict(record.agreement), ensure_ascii=False))
    _end(ctx, record)


@main.command("matrix")
@click.option("--results", metavar="DIR", default=str(RESULTS), show_default=True, help="Folder of the results.")
@click.option("--tokens", type=click.IntRange(1), default=SHOWN_TOKENS, show_default=True, help="Length to show.")
def matrix_command(results: str, tokens: int) -> None:
    """Print all results as one Markdown table."""
    print(matrix(load_results(Path(results)), tokens), end="")


def _run(
    target: DeviceTarget,
    lengths: tuple[int, ...],
    trials: int,
    warmup: int,
    *,
    bundle: str | None,
    folder: str | None,
    device: str | None,
    unit: str | None,
    rows: int,
    seed: int,
    within_s: float,
    keep: str | None,
) -> Record:
    if missing := missing_here(target):
        raise click.ClickException(f"{target.name} needs {', '.join(missing)}, which is not installed here.")
    if unit is not None and unit not in target.units:
        raise click.UsageError(f"{target.name} runs on {' or '.join(target.units)}, not on {unit}.")
    if keep is not None and Path(keep).exists():
        raise click.UsageError(f"--keep: {keep} exists already.")
    source = Bundle.open(default_bundle_path() if bundle is None else resolve_bundle(bundle))
    with _export(target, source, folder) as export:
        plan = Plan(
            device=device,
            unit=unit or target.units[0],
            tokens=tuple(length for length in lengths if length <= export.facts.max_tokens),
            warmup=warmup,
            trials=trials,
        )
        return run_on_device(
            target, export, source, Wanted(plan, rows, seed, within_s, None if keep is None else Path(keep)), _say
        )


@contextmanager
def _export(target: DeviceTarget, source: Bundle, folder: str | None) -> Iterator[Export]:
    """The export in ``folder``, or a new one that is gone afterwards."""
    if folder is not None:
        yield open_export(Path(folder))
        return
    with tempfile.TemporaryDirectory(prefix="edgeguard-export-") as scratch:
        yield export_bundle(target.export, source.path, Path(scratch) / target.export, say=_say)


def _lengths(ctx: click.Context, text: str) -> tuple[int, ...]:
    try:
        lengths = tuple(sorted({int(part) for part in text.split(",")}))
    except ValueError:
        lengths = ()
    if not lengths or min(lengths) < 1:
        raise click.UsageError(f"--tokens: expected numbers of tokens like 16,64,256, found {text!r}.", ctx)
    return lengths


def _file_name(record: Record) -> str:
    """One file a target, chip and unit: a new run takes the place of the last."""
    chip = "unknown" if record.measured is None else record.measured.device.chip
    emulated = "" if record.measured is None or record.measured.device.emulated_by is None else "-emulated"
    slug = re.sub(r"[^a-z0-9]+", "-", chip.lower()).strip("-")
    return f"{record.target}-{slug}-{record.plan.unit}{emulated}.json"


def _end(ctx: click.Context, record: Record) -> None:
    for failure in record.failures:
        click.echo(f"failed: {failure}", err=True)
    ctx.exit(1 if record.failures else 0)


def _say(line: str) -> None:
    click.echo(line, err=True)


if __name__ == "__main__":
    sys.exit(main(prog_name="python -m device_tests"))
