"""``edgeguard eval``: measure the guard on rows with a known label."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import click

from edgeguard.cli.options import guard_options, json_option, load_guard, threshold_of
from edgeguard.cli.output import console, emit_json, figure
from edgeguard.cli.progress import RowProgress
from edgeguard.cli.rows import Row, RowFile, chunks, judge, target_of
from edgeguard.errors import EdgeguardError, InputError
from edgeguard.prompt import TARGETS
from edgeguard.taxonomy import SAFE, UNSAFE

if TYPE_CHECKING:
    from edgeguard.guard import Guard
    from edgeguard.metrics import Metrics
    from edgeguard.verdict import Verdict

__all__ = ["eval_command"]

LABELS = (SAFE, UNSAFE)
OVERALL = "overall"
# Other labels are counted by name up to here; a field that only happens to be called "label" may hold anything.
MAX_LABELS_NAMED = 20
COLUMNS = ("f1", "precision", "recall", "fpr", "auprc", "ece", "accuracy")


@dataclass
class Sample:
    """Labels and probabilities in the order judged, with the target and the threshold of each row."""

    unsafe: list[bool] = field(default_factory=list)
    p_unsafe: list[float] = field(default_factory=list)
    thresholds: list[float] = field(default_factory=list)
    targets: list[str] = field(default_factory=list)

    def add(self, row: Row, verdict: Verdict, target: str, threshold: float) -> None:
        """Add one judged row."""
        assert row.data is not None  # a bad line has no verdict
        self.unsafe.append(row.data["label"] == UNSAFE)
        self.p_unsafe.append(verdict.p_unsafe)
        self.thresholds.append(threshold)
        self.targets.append(target)

    def measure(self, target: str | None, bootstrap: int) -> Metrics | None:
        """Metrics of one target, or of all rows by their own thresholds when None; None without rows."""
        import numpy as np

        from edgeguard.metrics import evaluate

        keep = np.array([target is None or found == target for found in self.targets], dtype=np.bool_)
        if not keep.any():
            return None
        labels = np.array(self.unsafe, dtype=np.bool_)[keep]
        return evaluate(labels, np.array(self.p_unsafe)[keep], np.array(self.thresholds)[keep], bootstrap=bootstrap)


@dataclass
class Counts:
    """What became of the rows; ``left_out``: label as found -> rows."""

    failed: int = 0
    truncated: int = 0
    left_out: dict[str, int] = field(default_factory=dict)


@click.command("eval", short_help="Measure the guard on labelled rows.")
@click.argument("source", metavar="IN.jsonl")
@click.option("--batch-size", type=click.IntRange(1, 1024), default=16, show_default=True, help="Rows judged at once.")
@click.option(
    "--bootstrap", type=click.IntRange(0, 100_000), default=1000, show_default=True, help="Resamples for intervals."
)
@guard_options
@json_option
@click.pass_context
def eval_command(
    ctx: click.Context,
    /,
    source: str,
    batch_size: int,
    bootstrap: int,
    as_json: bool,
    **guard_settings: Any,  # noqa: ANN401 - checked by click, passed to load_guard
) -> None:
    """Measure F1, precision, recall, FPR, AUPRC and ECE on rows with a "label" of "safe" or "unsafe".

    Rows are as for scan. A "target" of "prompt" or "response" says what the label judges; without it, a response is
    judged where there is one. Rows with any other label (or null) are counted and left out. "Positive" is unsafe; a
    row counts as flagged when its p_unsafe reaches the operating point's threshold for its target. AUPRC and ECE do
    not depend on thresholds. Intervals are 95 % bootstrap. IN.jsonl may be gzip, or - for stdin.

    \b
    edgeguard eval labelled.jsonl
    edgeguard eval labelled.jsonl.gz --operating-point low_fpr --json

    Exit codes: 0 measured, 1 an error or a labelled row that could not be judged, 2 wrong usage.
    """  # noqa: D301 - click reads \b
    with RowFile(source) as rows:
        guard = load_guard(**guard_settings)
        sample, counts = _judge_all(guard, rows, batch_size, guard_settings["operating_point"])
    for label, number in counts.left_out.items():
        click.echo(f"{source}: left out {number:,} rows with the label {label}", err=True)
    if not sample.unsafe:
        raise InputError(f'{source}: no row could be measured. Rows need a "label" of "safe" or "unsafe".')
    metrics = {target: sample.measure(target, bootstrap) for target in TARGETS}
    metrics = {OVERALL: sample.measure(None, bootstrap), **metrics}
    report = _report(guard, guard_settings["operating_point"], counts, metrics)
    if as_json:
        emit_json(report)
    else:
        _show(report)
    ctx.exit(1 if counts.failed else 0)


def _judge_all(guard: Guard, rows: RowFile, batch_size: int, operating_point: str) -> tuple[Sample, Counts]:
    sample, counts = Sample(), Counts()
    with RowProgress(rows, "eval") as progress:
        for chunk in chunks(_labelled(rows, counts), batch_size):
            for row, result in zip(chunk, judge(guard, chunk, batch_size, _labelled_item), strict=True):
                if isinstance(result, EdgeguardError):
                    counts.failed += 1
                    progress.warn(f"{rows.path}:{row.line}: {result}")
                    continue
                target = target_of(_labelled_item(row))
                counts.truncated += result.truncated
                sample.add(row, result, target, threshold_of(guard, operating_point, target))
            progress.advance(len(chunk))
    return sample, counts


def _labelled(rows: RowFile, counts: Counts) -> Iterator[Row]:
    """Rows to measure. A bad line is passed on too: it may have had a label, so it counts as a failure."""
    for row in rows:
        label = None if row.data is None else row.data.get("label")
        if row.data is None or (isinstance(label, str) and label in LABELS):
            yield row
        else:
            name = repr(label)[:40] if "label" in row.data else "(none)"
            if name not in counts.left_out and len(counts.left_out) >= MAX_LABELS_NAMED:
                name = "(others)"
            counts.left_out[name] = counts.left_out.get(name, 0) + 1


def _labelled_item(row: Row) -> Mapping[str, Any]:
    """What the label judges: its "target" decides where the row has one."""
    item = row.item()
    target = row.data.get("target") if row.data is not None else None
    if target is not None and target not in TARGETS:
        raise InputError(f"target: expected {' or '.join(TARGETS)}, found {target!r:.40}")
    if target == "prompt" and "prompt" in item:
        item.pop("response", None)
    if target in TARGETS and target_of(item) != target:
        raise InputError(f"the label judges the {target}, but the row has none")
    return item


def _report(
    guard: Guard, operating_point: str, counts: Counts, metrics: Mapping[str, Metrics | None]
) -> dict[str, Any]:
    """The JSON answer; null for a target without rows."""
    return {
        "bundle": guard.bundle.label,
        "operating_point": operating_point,
        "thresholds": {target: threshold_of(guard, operating_point, target) for target in TARGETS},
        "failed": counts.failed,
        "truncated": counts.truncated,
        "left_out": counts.left_out,
        "metrics": {name: None if found is None else found.to_dict() for name, found in metrics.items()},
    }


def _show(report: Mapping[str, Any]) -> None:
    """A table for people: a column per target, each figure with its interval where there is one."""
    from rich.table import Table

    shown = {name: found for name, found in report["metrics"].items() if found is not None}
    if len(shown) == 2:  # one target only: overall would say the same again
        del shown[OVERALL]
    table = Table(title=f"{report['bundle']} at {report['operating_point']}", title_justify="left")
    table.add_column("")
    for name in shown:
        table.add_column(name, justify="right")
    table.add_row("rows (unsafe)", *(f"{found['n']:,} ({found['n_unsafe']:,})" for found in shown.values()))
    thresholds = (figure(report["thresholds"].get(name)) for name in shown)
    table.add_row("threshold", *thresholds)
    for column in COLUMNS:
        table.add_row(column, *(_with_interval(found, column) for found in shown.values()))
    console().print(table)
    if report["truncated"]:
        click.echo(f"{report['truncated']:,} rows were too long to be read whole; a guard escalates those.", err=True)


def _with_interval(found: Mapping[str, Any], column: str) -> str:
    interval = found["intervals"].get(column)
    return figure(found[column]) + (f" [{figure(interval[0])}, {figure(interval[1])}]" if interval else "")
