"""Tokens a second against batch and threads, from several records: ``throughput.py OUT RECORD...``.

Writes ``OUT-throughput.md`` and ``OUT-throughput.png``. Every record has one length; what is shown is the median.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from edgeguard.bench.records import Record, load_record
from edgeguard.bench.tables import Table, table_to_markdown
from edgeguard.files import write_whole

Rates = dict[tuple[str, int], dict[int, float]]  # engine, threads -> batch -> tokens/s


def rates_of(records: Sequence[Record]) -> Rates:
    """The medians of all records, smallest batch first."""
    found: Rates = {}
    for record in sorted(records, key=lambda record: (record.plan.threads, record.plan.batch)):
        for result in record.results:
            (length,) = result.lengths
            found.setdefault((result.name, record.plan.threads), {})[record.plan.batch] = length.summary.tokens_per_s
    return found


def to_markdown(records: Sequence[Record], rates: Rates) -> str:
    """The commands, then a table with a row an engine and number of threads."""
    batches = sorted({record.plan.batch for record in records})
    rows = tuple(
        (name, str(threads), *(f"{found[batch]:,.0f}" if batch in found else "-" for batch in batches))
        for (name, threads), found in sorted(rates.items())
    )
    (label,) = {record.bundle.label for record in records}
    (tokens,) = {record.plan.tokens for record in records}
    title = f"Tokens/s of {label} in texts of {tokens[0]} tokens"
    table = Table(title, ("", "threads", *(f"batch {batch}" for batch in batches)), rows)
    commands = [record.command for record in records]
    return "\n".join([f"# {records[0].device.cpu}", "", "```bash", *commands, "```", *table_to_markdown(table), ""])


def to_png(rates: Rates) -> Figure:
    """A line an engine and number of threads."""
    figure = Figure(figsize=(8, 5), dpi=150, layout="constrained")
    axes = figure.add_subplot()
    for (name, threads), found in sorted(rates.items()):
        axes.plot(list(found), list(found.values()), marker="o", label=f"{name}, threads {threads}")
    axes.set(xlabel="texts a call", ylabel="tokens/s, median", ylim=(0, None))
    axes.legend()
    return figure


def main(out: str, *files: str) -> None:
    """Read ``files``, write both outputs."""
    records = [load_record(Path(file)) for file in files]
    rates = rates_of(records)
    markdown, figure = to_markdown(records, rates), to_png(rates)
    write_whole(Path(f"{out}-throughput.md"), lambda part: part.write_text(markdown, encoding="utf-8"))
    write_whole(Path(f"{out}-throughput.png"), lambda part: FigureCanvasAgg(figure).print_png(part))


if __name__ == "__main__":
    main(*sys.argv[1:])
