"""Progress of a run over rows, on stderr: a bar on a terminal, a line now and then anywhere else."""

from __future__ import annotations

import sys
import time
from contextlib import ExitStack
from typing import TYPE_CHECKING

import click

from edgeguard.cli.rows import RowFile

if TYPE_CHECKING:
    from rich.progress import Progress

__all__ = ["RowProgress"]

LINE_EVERY_S = 15.0


class RowProgress:
    """Counts rows and shows them with rows/s. Use as a context manager; call :meth:`advance` after each chunk."""

    def __init__(self, source: RowFile, verb: str) -> None:
        """``verb`` stands in front of every line."""
        self.rows = 0
        self._source = source
        self._verb = verb
        self._start = self._shown = time.monotonic()
        self._stack = ExitStack()
        self._bar: Progress | None = None

    def __enter__(self) -> RowProgress:
        """Start the bar, on a terminal."""
        if sys.stderr.isatty():
            self._bar = self._stack.enter_context(_bar())
            self._task = self._bar.add_task(self._verb, total=self._source.total, rows="")
        return self

    def __exit__(self, *_: object) -> None:
        """Stop the bar; without one, a last line."""
        self._stack.close()
        if self._bar is None and self.rows:
            click.echo(f"{self._verb}: {self.summary()}", err=True)

    def advance(self, rows: int) -> None:
        """``rows`` more are done."""
        self.rows += rows
        if self._bar is not None:
            self._bar.update(self._task, completed=self._source.position, rows=self.summary())
        elif time.monotonic() - self._shown >= LINE_EVERY_S:
            self._shown = time.monotonic()
            click.echo(f"{self._verb}: {self.summary()}{self._share()}", err=True)

    def summary(self) -> str:
        """For example ``1,680 rows, 24.1 rows/s``."""
        seconds = max(time.monotonic() - self._start, 1e-9)
        return f"{self.rows:,} rows, {self.rows / seconds:.1f} rows/s"

    def warn(self, message: str) -> None:
        """A line on stderr, above the bar where there is one."""
        if self._bar is not None:
            self._bar.console.print(message, markup=False, highlight=False)
        else:
            click.echo(message, err=True)

    def _share(self) -> str:
        return f", {self._source.position / self._source.total:.0%}" if self._source.total else ""


def _bar() -> Progress:
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn

    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        TaskProgressColumn(),
        TextColumn("{task.fields[rows]}"),
        TimeRemainingColumn(),
        console=Console(file=sys.stderr, emoji=False),
    )
