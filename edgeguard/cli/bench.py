"""``edgeguard bench``: latency, memory, size and energy of the engines on this machine, and two records compared."""

from __future__ import annotations

import shlex
import signal
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from edgeguard.cli.options import bundle_option, threads_option
from edgeguard.cli.output import console, dump_json, emit_json, warn
from edgeguard.files import write_whole

if TYPE_CHECKING:
    from rich.progress import Progress

    from edgeguard.bench.measure import Request
    from edgeguard.bench.records import Record

__all__ = ["bench_command"]

STDOUT = "-"
LINE_EVERY_S = 15.0
QUIET_CPUS = 0.2  # busy with other work


def _lengths(ctx: click.Context, param: click.Parameter, value: str | None) -> tuple[int, ...] | None:
    """``16,32,64`` as numbers; a usage error for anything else."""
    if value is None:
        return None
    try:
        lengths = tuple(int(part) for part in value.split(","))
    except ValueError:
        lengths = ()
    if not lengths or min(lengths) < 1:
        raise click.BadParameter(f"expected numbers of tokens like 16,64,256, found {value!r}.", ctx, param)
    return lengths


@click.command("bench", short_help="Measure speed, memory and energy on this machine.")
@bundle_option
@click.option("--shape", metavar="NAME", help="Measure a shape with untrained weights: llama-guard-3-1b-int4, tiny.")
@click.option("--engine", "engines", metavar="NAME", multiple=True, help="Repeatable. Default: all that can run.")
@click.option(
    "--peers", "all_peers", is_flag=True, help="Measure other libraries on the same weights, where installed."
)
@click.option("--peer", "peers", metavar="NAME", multiple=True, help="One of them, by its name. Repeatable.")
@click.option("--tokens", callback=_lengths, metavar="N,N", help="Lengths, template included. Default: 16 to 512.")
@threads_option
@click.option("--batch", type=click.IntRange(1, 1024), default=1, show_default=True, help="Texts a call.")
@click.option("--trials", type=click.IntRange(1), default=20, show_default=True, help="Calls of each length.")
@click.option("--warmup", type=click.IntRange(0), default=3, show_default=True, help="Calls of each length to discard.")
@click.option("--loads", type=click.IntRange(1), default=3, show_default=True, help="New processes an engine.")
@click.option("--seed", type=int, default=0, show_default=True, help="Of texts and order.")
@click.option(
    "--settle", "settle_ms", type=click.FloatRange(0), default=20, show_default=True, help="Pause before calls, ms."
)
@click.option("--turn", type=click.IntRange(1), metavar="N", help="Also a new turn on a conversation of N tokens.")
@click.option(
    "--sustain", type=click.FloatRange(1), metavar="SECONDS", help="Then call without pause, engine by engine."
)
@click.option("--limits/--no-limits", default=True, show_default=True, help="Measure the machine's own limit.")
@click.option("--json", "json_file", metavar="F", help="Write the record, every trial included; - for stdout.")
@click.option("--markdown", "markdown_file", metavar="F", help="Write the tables as Markdown.")
@click.option("--plot", "plot_file", metavar="F.png", help="Plot latency against tokens.")
@click.option("--compare", type=(str, str), metavar="A.json B.json", help="Compare two records; measures nothing.")
@click.pass_context
def bench_command(
    ctx: click.Context,
    /,
    shape: str | None,
    compare: tuple[str, str] | None,
    json_file: str | None,
    markdown_file: str | None,
    plot_file: str | None,
    **settings: Any,  # noqa: ANN401 - checked by click
) -> None:
    """Measure a bundle on this machine, through the public API, one process an engine.

    Engines take turns, one call each, in an order shuffled every round, so that drift hits all alike. Each text has
    exactly so many tokens and is judged once. The record (--json) holds every trial; docs/bench.md says what each
    figure means.

    --shape measures Llama Guard 3-1B-INT4's shape with random weights, which say nothing about its verdicts. --peers
    adds llama-cpp-python, plain onnxruntime, transformers (fp32 and bf16), onnxruntime-genai and optimum.

    \b
    edgeguard bench --json here.json --plot here.png
    edgeguard bench --engine onnx --peers --tokens 64,256 --threads 2
    edgeguard bench --shape llama-guard-3-1b-int4 --tokens 128 --peer llama-cpp-python
    edgeguard bench --compare before.json after.json

    Exit codes: 0 measured, 1 an error (then nothing is written), 2 wrong usage, 130 Ctrl-C.
    """  # noqa: D301 - click reads \b
    if STDOUT in (markdown_file, plot_file):
        raise click.UsageError("only --json writes to stdout: name a file for --markdown and --plot.")
    for name in (json_file, markdown_file, plot_file):
        if name is not None and name != STDOUT:
            _check_writable(Path(name))
    if compare is not None:
        _only_compare(ctx, {"compare", "json_file"})
        _compare(Path(compare[0]), Path(compare[1]), json_file)
        return
    if shape is not None and settings["bundle"] is not None:
        raise click.UsageError("--shape makes a bundle of its own: give --bundle or --shape.")
    if plot_file is not None:
        from edgeguard.bench.plot import require_matplotlib

        require_matplotlib()
    _check_names(settings["engines"], settings["peers"], shape)
    from edgeguard.bench.measure import measure

    with _leaving_tidily(), BenchProgress() as progress:
        request = _request(shape, progress, **settings)
        record = measure(request, progress)
    device = record.device
    busy = device.load_before if device.others_cpus is None else device.others_cpus
    if busy is not None and busy > QUIET_CPUS:
        warn(f"about {busy:.1f} CPUs were busy with other work, which disturbed the run: measure on a quiet machine.")
    _write(record, json_file, markdown_file, plot_file)


def _check_writable(file: Path) -> None:
    """Refuse now what could not be written after minutes of measuring."""
    if file.is_dir():
        raise click.UsageError(f"{file}: is a folder. Name a file.")
    try:
        tempfile.TemporaryFile(dir=file.absolute().parent).close()  # asks the file system itself
    except OSError as error:
        raise click.UsageError(f"{file}: cannot be written: {error.strerror}.") from error


@contextmanager
def _leaving_tidily() -> Iterator[None]:
    """On SIGTERM, leave through every ``finally``: workers end, and gigabytes of files for peers go."""

    def leave(number: int, _: object) -> None:
        raise SystemExit(128 + number)

    before = signal.signal(signal.SIGTERM, leave)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _only_compare(ctx: click.Context, allowed: set[str]) -> None:
    given = [name for name in ctx.params if ctx.get_parameter_source(name) == click.core.ParameterSource.COMMANDLINE]
    if set(given) - allowed:
        raise click.UsageError("--compare reads two records and measures nothing: it goes with --json alone.")


def _check_names(engines: tuple[str, ...], peers: tuple[str, ...], shape: str | None) -> None:
    """Before anything is loaded: are all names known?"""
    from edgeguard.bench.peers import PEERS
    from edgeguard.bench.shapes import SHAPES
    from edgeguard.engines import ENGINES

    for what, given, known in (
        ("engine", engines, ("auto", *ENGINES)),
        ("peer", peers, tuple(PEERS)),
        ("shape", (shape,) if shape is not None else (), tuple(SHAPES)),
    ):
        if unknown := [name for name in given if name not in known]:
            raise click.UsageError(f"unknown {what} {unknown[0]!r}. Known are: {', '.join(known)}.")


def _request(
    shape: str | None,
    progress: BenchProgress,
    *,
    bundle: str | None,
    engines: tuple[str, ...],
    peers: tuple[str, ...],
    all_peers: bool,
    turn: int | None,
    sustain: float | None,
    **settings: Any,  # noqa: ANN401 - fields of Request by their own names
) -> Request:
    from edgeguard.bench.measure import Request
    from edgeguard.bench.peers import PEERS
    from edgeguard.bundle import default_bundle_path
    from edgeguard.hub import resolve_bundle

    if shape is not None:
        folder = _shape_bundle(shape, progress)
    else:
        folder = default_bundle_path() if bundle is None else resolve_bundle(bundle)
    return Request(
        bundle=folder,
        engines=tuple(dict.fromkeys(engines)) or None,
        peers=tuple(PEERS) if all_peers else tuple(dict.fromkeys(peers)),
        all_peers=all_peers,
        turn_tokens=turn,
        sustain_s=sustain,
        command=shlex.join(["edgeguard", *_arguments()]),
        **settings,
    )


def _arguments() -> list[str]:
    """The command line as it was typed; of another program (a test runner), the command alone."""
    return sys.argv[1:] if sys.argv[1:2] == ["bench"] else ["bench"]


def _shape_bundle(shape: str, progress: BenchProgress) -> Path:
    """The untrained bundle of a shape, from the cache; written by a process of its own the first time."""
    from edgeguard.bench.files import cached_folder
    from edgeguard.bench.process import Worker
    from edgeguard.bench.shapes import SHAPE_SEED, shape_folder_name
    from edgeguard.engines.cpus import allowed_cpus

    def write(folder: Path) -> None:
        progress.say(f"writing {shape} with random weights (once)")
        with Worker(shape, allowed_cpus()) as worker:
            worker.ask("write a shape", name=shape, folder=str(folder), seed=SHAPE_SEED)

    return cached_folder(shape_folder_name(shape, SHAPE_SEED), write)


def _write(record: Record, json_file: str | None, markdown_file: str | None, plot_file: str | None) -> None:
    """All outputs; what can fail is made before the first of them is written."""
    from edgeguard.bench.plot import draw
    from edgeguard.bench.records import record_to_json
    from edgeguard.bench.tables import print_record, to_markdown

    data, outputs = record_to_json(record), {}
    if json_file is not None and json_file != STDOUT:
        outputs[json_file] = _json_line(data)
    if markdown_file is not None:
        outputs[markdown_file] = to_markdown(record).encode()
    if plot_file is not None:
        outputs[plot_file] = draw(record)
    for file, content in outputs.items():
        _write_bytes(file, content)
    if json_file == STDOUT:
        emit_json(data)
    else:
        print_record(record, console())


def _compare(a: Path, b: Path, json_file: str | None) -> None:
    from edgeguard.bench.compare import compare, comparison_table
    from edgeguard.bench.records import load_record
    from edgeguard.bench.tables import print_tables

    found = compare(load_record(a), load_record(b))
    for caution in found.cautions:
        warn(f"not the same in both: {caution}")
    for alone in found.alone:
        warn(f"in one of them only: {alone}")
    if json_file == STDOUT:
        emit_json(found.to_json())
        return
    if json_file is not None:
        _write_bytes(json_file, _json_line(found.to_json()))
    print_tables([comparison_table(found)], console())


def _json_line(data: Mapping[str, Any]) -> bytes:
    return dump_json(data).encode() + b"\n"


def _write_bytes(file: str, content: bytes) -> None:
    write_whole(Path(file), lambda part: part.write_bytes(content))


class BenchProgress:
    """Progress on stderr: a bar on a terminal, a line for each phase and now and then anywhere else."""

    def __init__(self) -> None:
        """Nothing is shown yet."""
        self._stack = ExitStack()
        self._bar: Progress | None = None
        self._phase = ""
        self._shown = time.monotonic()

    def __enter__(self) -> BenchProgress:
        """Start the bar, on a terminal."""
        if sys.stderr.isatty():
            from rich.console import Console
            from rich.progress import Progress

            self._bar = self._stack.enter_context(
                Progress(console=Console(file=sys.stderr, emoji=False), transient=True)
            )
            self._task = self._bar.add_task("bench", total=None)
        return self

    def __exit__(self, *_: object) -> None:
        """Stop the bar."""
        self._stack.close()

    def say(self, text: str) -> None:
        """See :class:`edgeguard.bench.measure.Progress`."""
        self._phase, self._shown = text, time.monotonic()
        if self._bar is not None:
            self._bar.update(self._task, description=text.replace("[", "\\["), completed=0, total=None)
        else:
            click.echo(f"bench: {text}", err=True)

    def advance(self, done: int, total: int) -> None:
        """See :class:`edgeguard.bench.measure.Progress`."""
        if self._bar is not None:
            self._bar.update(self._task, completed=done, total=total)
        elif time.monotonic() - self._shown >= LINE_EVERY_S:
            self._shown = time.monotonic()
            click.echo(f"bench: {self._phase}: {done:,} of {total:,} calls", err=True)
