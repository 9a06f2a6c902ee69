"""Latency against tokens as a PNG: medians, a band from there to p95, and the machine's own limit.

matplotlib is imported here alone, and only when a plot is wanted.
"""

from __future__ import annotations

import io
from typing import Any

from edgeguard.bench.records import BenchError, Record

__all__ = ["draw", "require_matplotlib"]

# Okabe and Ito's colours, which colour-blind readers tell apart; a marker each, for print.
STYLES = (
    ("#0072B2", "o"),
    ("#D55E00", "s"),
    ("#009E73", "^"),
    ("#CC79A7", "v"),
    ("#E69F00", "D"),
    ("#56B4E9", "P"),
    ("#000000", "X"),
    ("#999999", "*"),
)
SIZE_INCHES, DPI = (8, 5), 150
BAND = 0.15  # opacity


def require_matplotlib() -> None:
    """Raise BenchError where matplotlib is missing: before anything is measured, not after."""
    try:
        import matplotlib  # noqa: F401
    except ImportError as error:
        raise BenchError(
            f"--plot needs matplotlib, which is not installed ({error}): pip install 'edgeguard-runtime[bench]'"
        ) from error


def draw(record: Record) -> bytes:
    """The PNG. Raises BenchError without matplotlib."""
    require_matplotlib()
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=SIZE_INCHES, dpi=DPI, layout="constrained")
    axes = figure.add_subplot()
    for number, result in enumerate(record.results):
        colour, marker = STYLES[number % len(STYLES)]
        tokens = [length.tokens for length in result.lengths]
        medians = [length.summary.p50_ms for length in result.lengths]
        tails = [length.summary.p95_ms for length in result.lengths]
        axes.plot(tokens, medians, color=colour, marker=marker, label=result.name)
        axes.fill_between(tokens, medians, tails, color=colour, alpha=BAND, linewidth=0)
    if record.limits.int8 is not None and record.work:
        least = [1000 * work.macs * record.plan.batch / record.limits.int8.macs_per_s for work in record.work]
        axes.plot([work.tokens for work in record.work], least, "--", color="#555555", label="INT8 peak of the machine")
    _label(axes, record)
    buffer = io.BytesIO()
    FigureCanvasAgg(figure).print_png(buffer)
    return buffer.getvalue()


def _label(axes: Any, record: Record) -> None:  # noqa: ANN401 - matplotlib has no types
    untrained = " (UNTRAINED: random weights)" if record.bundle.untrained else ""
    setting = f"{record.device.cpu}, {record.plan.threads} threads, batch {record.plan.batch}"
    axes.set_title(f"{record.bundle.label}{untrained}\n{setting}", fontsize="medium")
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    axes.set_xticks(record.plan.tokens, [str(tokens) for tokens in record.plan.tokens])
    axes.set_xlabel("tokens, template included")
    axes.set_ylabel("latency of a call, ms: median, and band up to p95")
    axes.grid(visible=True, which="both", alpha=0.3)
    axes.legend()
