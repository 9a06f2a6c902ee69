"""``edgeguard scan``: judge the rows of a JSON Lines file, in constant memory, and go on where a run was stopped."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from edgeguard.cli.journal import Journal, check_output, kept_fields
from edgeguard.cli.options import guard_options, load_guard
from edgeguard.cli.output import dump_json, write_bytes
from edgeguard.cli.progress import RowProgress
from edgeguard.cli.rows import Row, RowFile, chunks, judge
from edgeguard.errors import EdgeguardError

if TYPE_CHECKING:
    from edgeguard.guard import Guard
    from edgeguard.verdict import Verdict

__all__ = ["scan_command"]

STDOUT = "-"


@dataclass
class Tally:
    """What the rows came to; rows done before a --resume included."""

    rows: int = 0
    failed: int = 0
    flagged: int = 0

    def add(self, row: Mapping[str, Any]) -> None:
        """Count one row of the output."""
        self.rows += 1
        verdict = row.get("verdict")
        if not isinstance(verdict, Mapping):
            self.failed += 1
        elif verdict.get("action") != "allow":
            self.flagged += 1

    def __str__(self) -> str:
        judged = self.rows - self.failed
        return f"{judged:,} rows judged, {self.flagged:,} of them flagged, {self.failed:,} could not be judged"


@dataclass(frozen=True)
class Scan:
    """One run: where the rows come from, how many are judged at once, and what they came to."""

    source: str
    batch_size: int
    tally: Tally

    def judge(self, guard: Guard, rows: RowFile, left: Iterator[Row], write: Callable[[bytes], None]) -> None:
        """Judge the rows ``left`` of ``rows``, chunk by chunk; ``write`` gets whole lines of output."""
        with RowProgress(rows, "scan") as progress:
            for chunk in chunks(left, self.batch_size):
                results = judge(guard, chunk, self.batch_size)
                done = [self._output(row, result, progress) for row, result in zip(chunk, results, strict=True)]
                write(b"".join(dump_json(row).encode() + b"\n" for row in done))
                for row in done:
                    self.tally.add(row)
                progress.advance(len(done))

    def _output(self, row: Row, result: Verdict | EdgeguardError, progress: RowProgress) -> dict[str, Any]:
        """The row of the output; one that could not be judged is reported as well."""
        if not isinstance(result, EdgeguardError):
            return {**kept_fields(row), "verdict": result.to_dict()}
        progress.warn(f"{self.source}:{row.line}: {result}")
        return {**kept_fields(row), "error": str(result)}


@click.command("scan", short_help="Judge every row of a JSON Lines file.")
@click.argument("source", metavar="IN.jsonl")
@click.option("-o", "--output", metavar="OUT.jsonl", default=STDOUT, help="Where to write. Default: stdout.")
@click.option("--resume", is_flag=True, help="Go on where an interrupted scan with the same -o was stopped.")
@click.option("--force", is_flag=True, help="Start from the first row and replace OUT.jsonl.")
@click.option("--batch-size", type=click.IntRange(1, 1024), default=16, show_default=True, help="Rows judged at once.")
@guard_options
@click.pass_context
def scan_command(
    ctx: click.Context,
    /,
    source: str,
    output: str,
    resume: bool,
    force: bool,
    batch_size: int,
    **guard_settings: Any,  # noqa: ANN401 - checked by click, passed to load_guard
) -> None:
    """Judge every row of a JSON Lines file and add a "verdict" to it.

    A row is an object with "prompt", with "prompt" and "response" (then the response is judged), with "messages" (the
    last one is judged) or with "text". All its fields are kept. IN.jsonl may be gzip, or - for stdin.

    A line that cannot be judged (no JSON, nothing to judge...) is reported with its number and kept with an "error" in
    place of the "verdict"; the scan goes on.

    With -o the rows are collected in OUT.jsonl.part and renamed when all are in. Stopped by Ctrl-C, a crash or a full
    disk, the same command with --resume goes on: no row is lost or doubled. It refuses when the input, the bundle or
    the operating point is not the same.

    \b
    edgeguard scan chats.jsonl -o judged.jsonl
    edgeguard scan chats.jsonl -o judged.jsonl --resume
    zcat chats.jsonl.gz | edgeguard scan - | grep '"unsafe": true'

    Exit codes: 0 every row was judged, 1 an error or a row that could not be judged, 2 wrong usage, 130 Ctrl-C.
    """  # noqa: D301 - click reads \b
    if output == STDOUT and (resume or force):
        raise click.UsageError("--resume and --force need -o OUT.jsonl.")
    if resume and force:
        raise click.UsageError("--resume goes on, --force starts again: give one of them.")
    if output.endswith(".gz"):
        raise click.UsageError("the output is not compressed. Leave .gz out of its name, or pipe stdout to gzip.")
    run = Scan(source, batch_size, Tally())
    with RowFile(source) as rows:
        if output == STDOUT:
            run.judge(load_guard(**guard_settings), rows, iter(rows), write_bytes)
        else:
            _scan_to_file(run, rows, Path(output).resolve(), resume, force, guard_settings)
    click.echo(f"{source}: {run.tally}", err=True)
    ctx.exit(1 if run.tally.failed else 0)


def _scan_to_file(
    run: Scan, rows: RowFile, out: Path, resume: bool, force: bool, guard_settings: Mapping[str, Any]
) -> None:
    """Judge what the journal does not hold yet, then put the output in its place."""
    # ``out`` is resolved: a link is followed, not replaced by the rename.
    check_output(run.source, out, resume=resume, force=force)
    guard = load_guard(**guard_settings)
    with Journal(out, fresh=force) as journal:
        journal.bind(_judged_by(guard, guard_settings["operating_point"]))
        left = iter(rows)
        journal.replay(left, run.tally.add)
        if run.tally.rows:
            click.echo(f"{journal.part}: {run.tally.rows:,} rows are done, going on", err=True)
        try:
            run.judge(guard, rows, left, journal.write)
        except KeyboardInterrupt:
            click.echo(f"{run.tally.rows:,} rows are in {journal.part}. Go on with --resume.", err=True)
            raise
        journal.finish()


def _judged_by(guard: Guard, operating_point: str) -> dict[str, str]:
    """What a verdict depends on: the manifest holds the checksum of every other file of the bundle."""
    manifest = guard.bundle.path / "manifest.json"
    return {
        "bundle": guard.bundle.label,
        "manifest_sha256": hashlib.sha256(manifest.read_bytes()).hexdigest(),
        "operating_point": operating_point,
    }
