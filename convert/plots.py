"""The plots of a record: precision and recall, reliability per target, and every stage on every set."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from convert.corpora.registry import Row
from convert.evaluate import Fitted, MeasuredStage, margins_of
from convert.files import write_whole
from convert.record import POINT, SHIPPED, STAGES, check_comparable, set_title, stage_title
from edgeguard.prompt import TARGETS

__all__ = ["draw_curves", "draw_plots", "draw_record", "draw_reliability"]

BINS = 10
LEAST_IN_BIN = 10
PANELS = {
    "f1": "F1 (more is better)",
    "recall": "recall (more is better)",
    "fpr": "false-positive rate (less is better)",
}
# Okabe and Ito's colours and Tol's wine, which colour-blind readers tell apart; a marker each, for print.
STYLES = dict(
    zip(
        STAGES,
        (
            ("#000000", "*"),
            ("#0072B2", "o"),
            ("#E69F00", "^"),
            ("#CC79A7", "v"),
            ("#882255", "<"),
            ("#56B4E9", "P"),
            ("#D55E00", "D"),
            ("#F0E442", "h"),
            ("#009E73", "s"),
            ("#999999", "X"),
        ),
        strict=True,
    )
)

Curve = tuple[NDArray[np.bool_], NDArray[np.float64]]
"""Labels (True = unsafe) [n] and p_unsafe [n]."""


def draw_plots(
    report: Mapping[str, Any],
    shipped: MeasuredStage,
    tests: Mapping[str, Sequence[Row]],
    calibration: Sequence[Row],
    names: Sequence[str],
    folder: Path,
) -> None:
    """``curves.png``, ``reliability.png`` and ``record.png`` in ``folder``; ``names``: the sets to draw curves of."""
    curves = {name: _curve(tests[name], shipped.logits[name], shipped.fitted) for name in names}
    held_back = {}
    for target in TARGETS:
        chosen = [i for i, row in enumerate(calibration) if row.target == target]
        held_back[target] = _curve([calibration[i] for i in chosen], shipped.held_back[chosen], shipped.fitted)
    draw_curves(report, curves, folder / "curves.png")
    draw_reliability(report, curves, held_back, folder / "reliability.png")
    draw_record(report, folder / "record.png")


def _curve(rows: Sequence[Row], logits: NDArray[Any], fitted: Fitted) -> Curve:
    labels = np.array([row.label == "unsafe" for row in rows])
    return labels, fitted.probabilities(margins_of(logits), [row.target for row in rows])


def draw_curves(report: Mapping[str, Any], curves: Mapping[str, Curve], path: Path) -> None:
    """Precision against recall of the shipped stage. ``curves``: by set."""
    figure, (axes,) = _figure(1, (6.5, 5))
    for name, (labels, p_unsafe) in curves.items():
        order = np.argsort(-p_unsafe, kind="stable")
        hits = np.cumsum(labels[order])
        area = report["stages"][SHIPPED]["sets"][name]["points"][POINT]["auprc"]
        axes.plot(hits / hits[-1], hits / np.arange(1, len(hits) + 1), label=f"{set_title(name)} ({area:.3f})")
    axes.set(xlabel="recall", ylabel="precision", ylim=(0, 1.02), title=f"{stage_title(SHIPPED)} (AUPRC)")
    axes.legend(fontsize=8)
    axes.grid(alpha=0.3)
    _save(figure, path)


def draw_reliability(
    report: Mapping[str, Any], curves: Mapping[str, Curve], held_back: Mapping[str, Curve], path: Path
) -> None:
    """Observed share of unsafe rows against the predicted one, a panel a target, the calibration split in black.

    ``curves``: by set; ``held_back``: by target. Bins of fewer than 10 rows are left out.
    """
    sets = report["stages"][SHIPPED]["sets"]
    figure, panels = _figure(len(TARGETS), (11, 5))
    for axes, target in zip(panels, TARGETS, strict=True):
        axes.plot([0, 1], [0, 1], color="gray", linestyle=":")
        axes.plot(*_reliability(*held_back[target]), color="black", marker="o", linewidth=2, label="calibration split")
        for name, (labels, p_unsafe) in curves.items():
            if sets[name]["target"] == target:
                ece = sets[name]["points"][POINT]["ece"]
                axes.plot(*_reliability(labels, p_unsafe), marker="o", label=f"{set_title(name)} (ECE {ece:.3f})")
        axes.set(xlabel="predicted p_unsafe", ylabel="observed share unsafe", title=f"{target}s", ylim=(-0.02, 1.02))
        axes.legend(fontsize=8)
        axes.grid(alpha=0.3)
    figure.suptitle(f"Reliability of the {stage_title(SHIPPED)}, bins of {LEAST_IN_BIN} rows and more")
    _save(figure, path)


def _reliability(labels: NDArray[np.bool_], p_unsafe: NDArray[np.float64]) -> tuple[list[float], list[float]]:
    bins = np.minimum((p_unsafe * BINS).astype(int), BINS - 1)
    filled = [bins == b for b in range(BINS) if (bins == b).sum() >= LEAST_IN_BIN]
    return [float(p_unsafe[b].mean()) for b in filled], [float(labels[b].mean()) for b in filled]


def draw_record(report: Mapping[str, Any], path: Path) -> None:
    """F1, recall and FPR at ``balanced``: a row a set, a mark a stage, 95 % intervals as lines.

    Raises RecordError when the stages were not measured alike.
    """
    stages = report["stages"]
    check_comparable(stages)
    names = list(dict.fromkeys(name for stage in stages.values() for name in stage["sets"]))
    row_height = 0.22 + 0.07 * len(stages)
    figure, panels = _figure(len(PANELS), (13, 2 + row_height * len(names)), sharey=True)
    for axes, (key, title) in zip(panels, PANELS.items(), strict=True):
        for i, (stage, found) in enumerate(stages.items()):
            colour, marker = STYLES[stage]
            offset = 0.7 * ((i + 0.5) / len(stages) - 0.5)
            for name, entry in found["sets"].items():
                metrics, y = entry["points"][POINT], names.index(name) + offset
                if metrics[key] is not None:
                    interval = metrics["intervals"][key] or [metrics[key]] * 2
                    axes.plot(interval, [y, y], color=colour, linewidth=1.2, alpha=0.6)
                    axes.plot([metrics[key]], [y], color=colour, marker=marker, markersize=6, linestyle="none")
        axes.set(xlim=(-0.02, 1.02), title=title)
        axes.set_yticks(range(len(names)), [set_title(name) for name in names])
        axes.grid(axis="x", alpha=0.3)
        for y in range(0, len(names), 2):
            axes.axhspan(y - 0.5, y + 0.5, color="#f2f2f2", zorder=0)
    panels[0].set_ylim(len(names) - 0.5, -0.5)
    figure.supxlabel(f"at {POINT}; lines: 95 % intervals; empty: not measured, or not defined by a set of one class")
    _legend(figure, list(stages))
    _save(figure, path)


def _legend(figure: Any, stages: Sequence[str]) -> None:  # noqa: ANN401 - a matplotlib Figure
    from matplotlib.lines import Line2D

    marks = [
        Line2D([], [], color=STYLES[s][0], marker=STYLES[s][1], linestyle="none", label=stage_title(s)) for s in stages
    ]
    figure.legend(handles=marks, loc="outside upper center", ncols=len(marks), frameon=False)


def _figure(panels: int, size: tuple[float, float], **options: Any) -> tuple[Any, list[Any]]:  # noqa: ANN401
    """A figure and its axes, drawn without a screen."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=size, layout="constrained")
    FigureCanvasAgg(figure)
    return figure, list(figure.subplots(1, panels, squeeze=False, **options)[0])


def _save(figure: Any, path: Path) -> None:  # noqa: ANN401 - a matplotlib Figure
    write_whole(path, lambda p: figure.savefig(p, dpi=110, format="png"))
