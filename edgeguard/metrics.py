"""How well a guard separates: F1, precision, recall, FPR, average precision, calibration error, with intervals.

numpy only. A figure that the rows cannot define (no unsafe rows, no safe rows, nothing flagged) is None, never 0.
"Positive" means unsafe throughout.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from edgeguard.errors import InputError

__all__ = ["Confusion", "Metrics", "average_precision", "confusion", "evaluate", "expected_calibration_error"]

ECE_BINS = 15
INTERVAL_PERCENTILES = (2.5, 97.5)
# Resamples are drawn in blocks of about this many cells (64 MB of float64 each).
BLOCK_CELLS = 4_000_000

Floats = NDArray[np.float64]
Bools = NDArray[np.bool_]
Interval = tuple[float, float]


@dataclass(frozen=True)
class Confusion:
    """Counts of true and false positives and negatives, and the rates they define."""

    tp: int
    fp: int
    fn: int
    tn: int

    @property
    def precision(self) -> float | None:
        """Unsafe among the flagged; None when nothing was flagged."""
        return _ratio(self.tp, self.tp + self.fp)

    @property
    def recall(self) -> float | None:
        """Flagged among the unsafe; None without unsafe rows."""
        return _ratio(self.tp, self.tp + self.fn)

    @property
    def fpr(self) -> float | None:
        """Flagged among the safe; None without safe rows."""
        return _ratio(self.fp, self.fp + self.tn)

    @property
    def f1(self) -> float | None:
        """Harmonic mean of precision and recall; None without unsafe rows, 0 when none of them was flagged."""
        return _ratio(2 * self.tp, 2 * self.tp + self.fp + self.fn) if self.tp + self.fn else None

    @property
    def accuracy(self) -> float | None:
        """Right decisions among all rows."""
        return _ratio(self.tp + self.tn, self.tp + self.fp + self.fn + self.tn)


@dataclass(frozen=True)
class Metrics:
    """Figures of one set of rows; ``intervals``: 95 % bootstrap percentile interval per figure."""

    n: int
    n_unsafe: int
    f1: float | None
    precision: float | None
    recall: float | None
    fpr: float | None
    auprc: float | None
    ece: float
    accuracy: float | None
    intervals: Mapping[str, Interval | None]

    def to_dict(self) -> dict[str, Any]:
        """A JSON-ready dict; intervals as [low, high]."""
        intervals = {name: None if pair is None else list(pair) for name, pair in self.intervals.items()}
        return {**asdict(self), "intervals": intervals}


def evaluate(
    labels: ArrayLike, p_unsafe: ArrayLike, threshold: ArrayLike, *, bootstrap: int = 1000, seed: int = 0
) -> Metrics:
    """Measure probabilities against labels.

    ``labels``: bool [N], True = unsafe; ``p_unsafe``: [N] in [0, 1]; ``threshold``: one for all rows or one a row
    (prompts and responses have their own); ``bootstrap``: resamples of the rows, 0 for no intervals.
    Raises InputError for no rows, shapes that differ or probabilities outside [0, 1].
    """
    y, p = _checked(labels, p_unsafe)
    try:
        flagged = p >= np.broadcast_to(np.asarray(threshold, dtype=np.float64), p.shape)
    except ValueError as error:
        raise InputError(f"threshold: expected one value or {p.size} values, found {np.shape(threshold)}.") from error
    counts = confusion(y, flagged)
    return Metrics(
        n=int(y.size),
        n_unsafe=int(y.sum()),
        f1=counts.f1,
        precision=counts.precision,
        recall=counts.recall,
        fpr=counts.fpr,
        auprc=average_precision(y, p),
        ece=expected_calibration_error(y, p),
        accuracy=counts.accuracy,
        intervals=_intervals(y, p, flagged, bootstrap, seed),
    )


def confusion(labels: Bools, flagged: Bools) -> Confusion:
    """Count decisions. ``labels`` and ``flagged``: bool [N]."""
    tp = int(np.count_nonzero(labels & flagged))
    fp = int(np.count_nonzero(flagged)) - tp
    fn = int(np.count_nonzero(labels)) - tp
    return Confusion(tp=tp, fp=fp, fn=fn, tn=int(labels.size) - tp - fp - fn)


def average_precision(labels: Bools, p_unsafe: Floats) -> float | None:
    """Area under precision-recall as scikit-learn's average_precision_score: the sum of (R_i - R_{i-1}) P_i.

    Equal probabilities are one step. None unless there are both safe and unsafe rows: without safe rows every order
    scores 1.
    """
    if labels.all() or not labels.any():
        return None
    order, ends = _descending(p_unsafe)
    return float(_weighted_ap(labels[order], ends, np.ones((1, labels.size)))[0])


def expected_calibration_error(labels: Bools, p_unsafe: Floats) -> float:
    """Mean gap between predicted and observed unsafe rate over 15 equal-width bins, weighted by rows (Naeini 2015)."""
    bins = np.minimum((p_unsafe * ECE_BINS).astype(np.int64), ECE_BINS - 1)
    gaps = np.bincount(bins, weights=p_unsafe - labels, minlength=ECE_BINS)
    return float(np.abs(gaps).sum() / labels.size)


def _checked(labels: ArrayLike, p_unsafe: ArrayLike) -> tuple[Bools, Floats]:
    y = np.asarray(labels)
    p = np.asarray(p_unsafe, dtype=np.float64)
    if y.ndim != 1 or y.shape != p.shape or y.size == 0:
        raise InputError(f"expected labels and probabilities of one length above 0, found {y.shape} and {p.shape}.")
    if y.dtype != np.bool_:
        raise InputError(f"expected labels of type bool (True = unsafe), found {y.dtype}.")
    if not np.all((p >= 0) & (p <= 1)):
        raise InputError("expected probabilities from 0 to 1, found one outside or not a number.")
    return y, p


def _ratio(part: float, whole: float) -> float | None:
    return part / whole if whole else None


def _descending(p_unsafe: Floats) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """The order from most to least unsafe, and the last position of each run of equal values in it."""
    order = np.argsort(-p_unsafe, kind="stable")
    ranked = p_unsafe[order]
    return order, np.append(np.flatnonzero(ranked[1:] != ranked[:-1]), ranked.size - 1)


def _weighted_ap(labels: Bools, ends: NDArray[np.int64], weights: Floats) -> Floats:
    """Average precision per row of ``weights`` [B, N], ranked as ``labels`` [N]; NaN without both classes."""
    hits = np.cumsum(weights * labels, axis=1)[:, ends]
    seen = np.cumsum(weights, axis=1)[:, ends]
    total = hits[:, -1]
    with np.errstate(divide="ignore", invalid="ignore"):
        precision = np.where(seen > 0, hits / seen, 0.0)
        ap = (np.diff(hits, axis=1, prepend=0.0) * precision).sum(axis=1) / total
    return np.where((total > 0) & (total < seen[:, -1]), ap, np.nan)


def _intervals(labels: Bools, p: Floats, flagged: Bools, bootstrap: int, seed: int) -> dict[str, Interval | None]:
    """Percentile intervals over resampled rows; resamples that do not define a figure are left out of it."""
    rng = np.random.default_rng(seed)
    order, ends = _descending(p)
    y, hit = labels[order], flagged[order]
    draws: dict[str, list[Floats]] = {"f1": [], "recall": [], "fpr": [], "auprc": []}
    block = max(1, BLOCK_CELLS // y.size)
    for start in range(0, bootstrap, block):
        weights = _resample_counts(rng, min(block, bootstrap - start), y.size)
        tp, fp = weights @ (y & hit), weights @ (~y & hit)
        unsafe, safe = weights @ y, weights @ ~y
        with np.errstate(divide="ignore", invalid="ignore"):
            draws["f1"].append(np.where(unsafe > 0, 2 * tp / (tp + fp + unsafe), np.nan))
            draws["recall"].append(tp / unsafe)
            draws["fpr"].append(fp / safe)
        draws["auprc"].append(_weighted_ap(y, ends, weights))
    return {name: _percentiles(values) for name, values in draws.items()}


def _resample_counts(rng: np.random.Generator, rows: int, n: int) -> Floats:
    """How often each of ``n`` items is drawn in each of ``rows`` resamples with replacement: [rows, n]."""
    picks = rng.integers(0, n, size=(rows, n)) + np.arange(rows)[:, None] * n
    return np.bincount(picks.ravel(), minlength=rows * n).reshape(rows, n).astype(np.float64)


def _percentiles(blocks: list[Floats]) -> Interval | None:
    values = np.concatenate(blocks) if blocks else np.empty(0)
    values = values[np.isfinite(values)]
    if not values.size:
        return None
    low, high = np.percentile(values, INTERVAL_PERCENTILES)
    return float(low), float(high)
