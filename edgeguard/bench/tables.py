"""A record as tables, for the terminal and for Markdown: the same rows in both, nothing that is not in the record."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from edgeguard.bench.records import Length, Limits, Record, Result
from edgeguard.bench.stats import median

if TYPE_CHECKING:
    from rich.console import Console

__all__ = ["Table", "heading", "print_record", "print_tables", "table_to_markdown", "tables_of", "to_markdown"]

NONE = "-"  # not measured, or not told
UNTRAINED_NOTE = "UNTRAINED: the weights are random. Speed, memory and size are real; the verdicts mean nothing."


@dataclass(frozen=True)
class Table:
    """A title, column names, rows; the first ``left`` columns are text, the others numbers."""

    title: str
    columns: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    left: int = 1


def heading(record: Record) -> list[str]:
    """What was measured where, line by line; a bundle of random weights says so first."""
    device, plan = record.device, record.plan
    lines = [UNTRAINED_NOTE] if record.bundle.untrained else []
    lines.append(f"{record.bundle.label}{_untrained(record)}, {_megabytes(record.bundle.size_bytes)}")
    lines.append(f"{device.cpu}, {device.architecture}, {' '.join(device.features) or 'no features told'}")
    cores = f"{device.cores_physical} cores, {device.cpus_allowed} of {device.cpus_online} CPUs allowed"
    ram = NONE if device.ram_bytes is None else f"{device.ram_bytes / 2**30:.1f} GiB"
    virtual = ", virtual machine" if device.virtual else ""
    lines.append(f"{cores}, RAM {ram}, governor {device.governor or NONE}, {device.system}{virtual}")
    lines.append(
        f"threads {plan.threads}, batch {plan.batch}, {plan.trials} trials a length after {plan.warmup} discarded, "
        f"seed {plan.seed}"
    )
    before, others = _figure(device.load_before), _figure(device.others_cpus)
    lines.append(f"load average {before} before the run, {others} CPUs busy with other work during it")
    known = ", ".join(f"{name} {version}" for name, version in record.versions.items() if version is not None)
    lines.append(f"{known}, commit {(record.commit or NONE)[:12]}, {record.created}")
    return lines


def tables_of(record: Record) -> list[Table]:
    """All tables that the record has something for; a column in which nothing was measured is left out."""
    makers: tuple[Callable[[Record], Table], ...] = (
        *(_latencies, _speeds, _starts, _costs, _memory, _limits),
        *(_agreement, _turns, _sustained, _settings, _absent),
    )
    return [_without_empty(table) for table in (make(record) for make in makers) if table.rows]


def print_record(record: Record, console: Console) -> None:
    """Heading and tables on a terminal."""
    from rich.text import Text

    for number, line in enumerate(heading(record)):
        console.print(Text(line, style="bold red" if record.bundle.untrained and number == 0 else ""))
    print_tables(tables_of(record), console)


def print_tables(tables: Sequence[Table], console: Console) -> None:
    """Tables on a terminal."""
    from rich.table import Table as RichTable

    for table in tables:
        shown = RichTable(title=table.title, title_justify="left")
        for index, column in enumerate(table.columns):
            left = index < table.left
            shown.add_column(column, justify="left" if left else "right", overflow="fold", no_wrap=index == 0)
        for row in table.rows:
            shown.add_row(*row)
        console.print(shown)


def to_markdown(record: Record) -> str:
    """The record for a folder of documents: the command first, then what the terminal shows."""
    lines = [f"# {record.bundle.label}{_untrained(record)}", "", "```bash", record.command, "```", ""]
    lines += [f"- {line}" for line in heading(record)]
    for table in tables_of(record):
        lines += table_to_markdown(table)
    return "\n".join(lines) + "\n"


def table_to_markdown(table: Table) -> list[str]:
    """Lines: a heading, then the table."""
    alignment = _markdown_row("---" if i < table.left else "---:" for i in range(len(table.columns)))
    return ["", f"## {table.title}", "", _markdown_row(table.columns), alignment, *map(_markdown_row, table.rows)]


def _latencies(record: Record) -> Table:
    """Milliseconds of a call by length."""
    rows = []
    for result, length in _by_length(record):
        found = length.summary
        figures = map(_figure, (found.p50_ms, found.p95_ms, found.p99_ms, found.slowest_ms))
        rows.append((result.name, str(length.tokens), *figures, f"{found.tokens_per_s:,.0f}"))
    columns = ("", "tokens", "p50 ms", "p95 ms", "p99 ms", "slowest ms", "tokens/s")
    return Table(f"Latency of a call{_untrained(record)}", columns, tuple(rows))


def _speeds(record: Record) -> Table:
    """Where the time goes, what share of the machine is used, and how the engines compare."""
    ratios = {(ratio.name, ratio.tokens): ratio for ratio in record.ratios}
    rows = []
    for result, length in _by_length(record):
        found, share, ratio = length.summary, length.share, ratios.get((result.name, length.tokens))
        shares = (NONE,) * 3
        if share is not None:
            shares = (f"{share.int8_peak:.0%}", f"{share.fp32_peak:.0%}", f"{share.bandwidth:.0%}")
        spread = NONE if ratio is None else f"{ratio.ratio:.2f} [{ratio.low:.2f}, {ratio.high:.2f}]"
        times = map(_figure, (found.engine_p50_ms, found.tokenizer_p50_ms))
        rows.append((result.name, str(length.tokens), *times, *shares, spread))
    against = next((ratio.against for ratio in record.ratios), "")
    columns = (
        "",
        "tokens",
        "in engine, p50 ms",
        "in tokenizer, p50 ms",
        "of INT8 peak",
        "of fp32 peak",
        "of bandwidth",
    )
    return Table(f"Shares{_untrained(record)}", (*columns, f"times as fast as {against}"), tuple(rows))


def _starts(record: Record) -> Table:
    """From a new process to its first verdict; medians, of all but the first load where there are several."""
    rows = []
    for result in record.results:
        later = result.loads[1:] or result.loads
        times = ("import_ms", "load_ms", "first_verdict_ms", "start_to_verdict_ms")
        medians = (median([getattr(load, name) for load in later]) for name in times)
        rows.append((result.name, _figure(result.loads[0].load_ms), *map(_figure, medians)))
    columns = ("", "very first load ms", "import ms", "load ms", "first verdict ms", "process start to verdict ms")
    return Table(f"Start{_untrained(record)}", columns, tuple(rows))


def _costs(record: Record) -> Table:
    """What an engine takes besides time."""
    rows = []
    for result in record.results:
        memory, energy = result.memory, result.energy
        at_load = max((load.peak_bytes for load in result.loads if load.peak_bytes is not None), default=None)
        sizes = (at_load, memory.peak_bytes, memory.steady_bytes, memory.steady_private_bytes, result.file_bytes)
        joules = NONE if energy is None else f"{energy.joules_per_call:.3f}"
        rows.append((result.name, *map(_megabytes, sizes), joules))
    columns = ("", "peak at load", "peak", "steady", "of it private", "files", "J a call")
    return Table(f"Memory of the process, size, energy{_untrained(record)}", columns, tuple(rows))


def _memory(record: Record) -> Table:
    """How memory grows with the length."""
    rows = tuple(
        (result.name, *(_megabytes(at.peak_bytes) for at in result.memory.by_tokens)) for result in record.results
    )
    columns = ("", *(f"{tokens} tokens" for tokens in record.plan.tokens))
    return Table(f"Peak memory as texts grow longer{_untrained(record)}", columns, rows)


def _limits(record: Record) -> Table:
    """The machine's own limit, and what the model needs of it."""
    found: Limits = record.limits
    rows = []
    for product in (found.int8, found.fp32):
        if product is not None:
            what = f"{product.operator} [{product.m}, {product.k}] x [{product.k}, {product.n}]"
            rows.append((what, f"{product.macs_per_s / 1e9:.1f} GMAC/s"))
    if found.copy is not None:
        rows.append((f"copy of {_megabytes(found.copy.size_bytes)}", f"{found.copy.bytes_per_s / 1e9:.1f} GB/s"))
    for work in record.work:
        least = NONE if found.int8 is None else f", {1000 * work.macs / found.int8.macs_per_s:.1f} ms at the INT8 peak"
        rows.append((f"a verdict on {work.tokens} tokens", f"{work.macs / 1e9:.2f} GMAC{least}"))
    return Table(f"The machine's limit (threads: {record.plan.threads})", ("", "best"), tuple(rows))


def _turns(record: Record) -> Table:
    rows = []
    for result in record.results:
        turn = result.turn
        if turn is not None:
            scratch, added = median(turn.scratch_ms), median(turn.turn_ms)
            conversation = f"{turn.conversation_tokens} + {turn.tokens - turn.conversation_tokens}"
            rows.append((result.name, conversation, _figure(scratch), _figure(added), f"{turn.ratio:.2f}"))
    columns = ("", "tokens", "from scratch, p50 ms", "new turn, p50 ms", "times as fast")
    return Table(f"A new turn on a conversation that was judged just before{_untrained(record)}", columns, tuple(rows))


def _sustained(record: Record) -> Table:
    rows = []
    for result in record.results:
        sustain = result.sustain
        if sustain is not None and sustain.windows:
            rates = [window.tokens_per_s for window in sustain.windows]
            kept = NONE if sustain.kept is None else f"{sustain.kept:.0%}"
            figures = (_figure(median(sustain.latencies_ms)), f"{median(rates):,.0f}", f"{min(rates):,.0f}", kept)
            clocks = [window.mhz for window in sustain.windows if window.mhz is not None]
            heats = [window.temperature_c for window in sustain.windows if window.temperature_c is not None]
            sensors = (_figure(min(clocks, default=None)), _figure(max(heats, default=None)))
            rows.append((result.name, str(sustain.tokens), str(len(rates)), *figures, *sensors))
    columns = (
        *("", "tokens", "seconds", "p50 ms", "tokens/s", "slowest second", "last quarter of first"),
        *("slowest clock, MHz", "hottest sensor, °C"),
    )
    return Table(f"Calls without pause{_untrained(record)}", columns, tuple(rows))


def _agreement(record: Record) -> Table:
    """Do they compute the same? Margins of the same texts, against the first result that has them."""
    margins = {
        result.name: [trial.margin for length in result.lengths for trial in length.trials if trial.margin is not None]
        for result in record.results
    }
    known = {name: found for name, found in margins.items() if found}  # a peer without our head has none
    reference, *others = known or [""]
    rows = []
    for name in others:
        pairs = list(zip(known[reference], known[name], strict=True))
        differences, same = [abs(a - b) for a, b in pairs], [a * b > 0 for a, b in pairs]
        mean = sum(differences) / len(pairs)
        rows.append((name, f"{mean:.4f}", f"{max(differences):.4f}", f"{sum(same) / len(pairs):.0%}"))
    columns = ("", "mean difference", "largest", "same sign")
    return Table(f"Margins (logits) against {reference}{_untrained(record)}", columns, tuple(rows))


def _settings(record: Record) -> Table:
    """What ran, and how."""
    rows = []
    for result in record.results:
        details = ", ".join(f"{key} {value}" for key, value in result.details.items() if value is not None)
        threads = f"{result.threads_used} of {result.threads_asked} threads"
        used, asked = ", ".join(result.providers_used), ", ".join(result.providers_asked)
        runs = f"{result.used} {result.version}; {used} (asked: {asked}); {threads}"
        how = result.settings or f"Guard.classify{f'; {details}' if details else ''}"
        rows.append((result.name, runs, how))
    return Table("Settings", ("", "runs", "how"), tuple(rows), left=3)


def _absent(record: Record) -> Table:
    rows = tuple((absent.name, absent.reason) for absent in record.absent)
    return Table("Not measured", ("", "why"), rows, left=2)


def _by_length(record: Record) -> Iterator[tuple[Result, Length]]:
    """All results of the shortest length first."""
    for tokens in record.plan.tokens:
        for result in record.results:
            yield result, next(length for length in result.lengths if length.tokens == tokens)


def _without_empty(table: Table) -> Table:
    kept = [i for i in range(len(table.columns)) if any(row[i] != NONE for row in table.rows)]
    rows = tuple(tuple(row[i] for i in kept) for row in table.rows)
    return Table(table.title, tuple(table.columns[i] for i in kept), rows, sum(i < table.left for i in kept))


def _untrained(record: Record) -> str:
    """Stands in every title with figures: whoever takes a table along takes the word along."""
    return " (untrained: random weights)" if record.bundle.untrained else ""


def _figure(value: float | None) -> str:
    """Three digits where they mean something; a dash for what was not measured."""
    if value is None:
        return NONE
    return f"{value:.2f}" if value < 10 else f"{value:.1f}" if value < 100 else f"{value:,.0f}"


def _megabytes(size_bytes: int | None) -> str:
    return NONE if size_bytes is None else f"{size_bytes / 1e6:,.1f} MB"


def _markdown_row(cells: Sequence[str] | Iterator[str]) -> str:
    return f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in cells)} |"
