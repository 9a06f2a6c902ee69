"""From a margin to a probability, and from probabilities to operating points.

p_unsafe = sigmoid(margin / temperature + bias), with one temperature and bias for prompts and one for responses. The
fit is Platt's (1999) with his smoothed targets, by Newton's method as in Lin, Lin and Weng (2007); numpy only.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from edgeguard import schema
from edgeguard.metrics import Confusion

__all__ = [
    "Calibration",
    "ChosenPoint",
    "Measured",
    "choose_operating_points",
    "fit_calibration",
    "sigmoid",
]

Floats = NDArray[np.float64]

# False alarms are what makes people switch a guard off: even the balanced point has few.
BALANCED_FPR = 0.10
MAX_FPR = 0.02
MIN_RECALL = 0.95
NEWTON_STEPS = 100
GRADIENT_TOLERANCE = 1e-10


@dataclass(frozen=True)
class Calibration:
    """Temperature (above 0) and bias of one target."""

    temperature: float
    bias: float

    @classmethod
    def from_dict(cls, data: object, where: str) -> Calibration:
        """Read ``{"temperature", "bias"}``. Raises BundleError naming ``where``."""
        fields = schema.record(data, where, ["temperature", "bias"])
        return cls(
            temperature=schema.number(fields["temperature"], f"{where}.temperature", low=0, above=True),
            bias=schema.number(fields["bias"], f"{where}.bias"),
        )

    def to_dict(self) -> dict[str, float]:
        """The object that :meth:`from_dict` reads."""
        return asdict(self)

    def probability(self, margin: float) -> float:
        """Probability of unsafe, in [0, 1]; no margin overflows."""
        return float(sigmoid(margin / self.temperature + self.bias))

    def probabilities(self, margins: ArrayLike) -> Floats:
        """As :meth:`probability`, for an array of any shape."""
        return sigmoid(np.asarray(margins, dtype=np.float64) / self.temperature + self.bias)


@dataclass(frozen=True)
class Measured:
    """What a threshold did on the calibration split; None where the rows do not define a figure."""

    n: int
    f1: float | None
    precision: float | None
    recall: float | None
    fpr: float | None

    @classmethod
    def from_counts(cls, counts: Confusion) -> Measured:
        """The figures of a confusion table."""
        n = counts.tp + counts.fp + counts.fn + counts.tn
        return cls(n=n, f1=counts.f1, precision=counts.precision, recall=counts.recall, fpr=counts.fpr)

    @classmethod
    def from_dict(cls, data: object, where: str) -> Measured:
        """Read ``{"n", "f1", "precision", "recall", "fpr"}``. Raises BundleError naming ``where``."""
        rates = ["f1", "precision", "recall", "fpr"]
        fields = schema.record(data, where, ["n", *rates])
        return cls(
            n=schema.integer(fields["n"], f"{where}.n", low=1, high=10**9),
            **{
                name: None if fields[name] is None else schema.number(fields[name], f"{where}.{name}", low=0, high=1)
                for name in rates
            },
        )

    def to_dict(self) -> dict[str, Any]:
        """The object that :meth:`from_dict` reads."""
        return asdict(self)


@dataclass(frozen=True)
class ChosenPoint:
    """A threshold on p_unsafe and what it did."""

    threshold: float
    measured: Measured


def sigmoid(x: ArrayLike) -> Floats:
    """1 / (1 + exp(-x)), without overflow at either end; any shape."""
    values = np.asarray(x, dtype=np.float64)
    small = np.exp(-np.abs(values))
    result: Floats = np.where(values >= 0, 1.0, small) / (1.0 + small)
    return result


def fit_calibration(margins: ArrayLike, labels: ArrayLike) -> tuple[float, float]:
    """Fit (temperature, bias) by maximum likelihood. ``margins``: [N]; ``labels``: bool [N], True = unsafe.

    Raises ValueError without both classes, with margins that are not finite, or when unsafe rows do not have the
    higher margins (no temperature above 0 fits).
    """
    x, y = _rows(margins, labels)
    n_unsafe, n_safe = int(y.sum()), int((~y).sum())
    if not n_unsafe or not n_safe:
        raise ValueError(f"expected safe and unsafe rows, found {n_safe} safe and {n_unsafe} unsafe.")
    # Smoothed targets keep the fit finite when one threshold separates the rows perfectly.
    target = np.where(y, (n_unsafe + 1) / (n_unsafe + 2), 1 / (n_safe + 2))
    scale = float(np.abs(x).max()) or 1.0
    slope, bias = _newton(x / scale, target)
    if slope <= 0:
        raise ValueError(
            f"unsafe rows do not have the higher margins (slope {slope / scale:.4g}): nothing to calibrate."
        )
    return scale / slope, bias


def choose_operating_points(
    p_unsafe: ArrayLike,
    labels: ArrayLike,
    *,
    balanced_fpr: float = BALANCED_FPR,
    max_fpr: float = MAX_FPR,
    min_recall: float = MIN_RECALL,
) -> dict[str, ChosenPoint]:
    """Choose thresholds for one target on its calibration split.

    ``balanced``: highest F1 with FPR at most ``balanced_fpr`` (not below ``max_fpr``); ``low_fpr``: most recall with
    FPR at most ``max_fpr``; ``high_recall``: least FPR with recall at least ``min_recall``. A threshold lies halfway
    between two probabilities that occurred, so that small numeric noise moves no decision. Raises ValueError without
    both classes or when no threshold is strict enough.
    """
    p, y = _rows(p_unsafe, labels)
    if p.min() < 0 or p.max() > 1 or y.all() or not y.any():
        raise ValueError("expected probabilities from 0 to 1 of both safe and unsafe rows.")
    thresholds, tables = _sweep(p, y)
    strict = [i for i, table in enumerate(tables) if (table.fpr or 0.0) <= max_fpr]
    if not strict:
        raise ValueError(
            f"no threshold has FPR at most {max_fpr}: safe rows are at the top, with p_unsafe {p.max():g}."
        )
    calm = [i for i, table in enumerate(tables) if (table.fpr or 0.0) <= balanced_fpr]
    chosen = {
        "balanced": max(calm, key=lambda i: (tables[i].f1 or 0.0, thresholds[i])),
        "low_fpr": max(strict, key=lambda i: (tables[i].recall or 0.0, thresholds[i])),
        "high_recall": next(i for i, table in enumerate(tables) if (table.recall or 0.0) >= min_recall),
    }
    return {name: ChosenPoint(thresholds[i], Measured.from_counts(tables[i])) for name, i in chosen.items()}


def _rows(values: ArrayLike, labels: ArrayLike) -> tuple[Floats, NDArray[np.bool_]]:
    x, y = np.asarray(values, dtype=np.float64), np.asarray(labels, dtype=np.bool_)
    if x.ndim != 1 or x.shape != y.shape or not x.size:
        raise ValueError(f"expected values and labels of one length above 0, found {x.shape} and {y.shape}.")
    if not np.isfinite(x).all():
        raise ValueError("expected finite values, found NaN or infinity.")
    return x, y


def _sweep(p: Floats, y: NDArray[np.bool_]) -> tuple[list[float], list[Confusion]]:
    """Every distinct decision rule, strictest first: thresholds and their counts."""
    levels, index = np.unique(p, return_inverse=True)
    unsafe_at = np.bincount(index, weights=y, minlength=levels.size)[::-1].astype(np.int64)
    safe_at = np.bincount(index, weights=~y, minlength=levels.size)[::-1].astype(np.int64)
    tops = levels[::-1]
    thresholds = [_between(low, high) for high, low in zip(tops, [*tops[1:], 0.0], strict=True)]
    tp, fp = np.cumsum(unsafe_at), np.cumsum(safe_at)
    tables = [Confusion(int(a), int(b), int(tp[-1] - a), int(fp[-1] - b)) for a, b in zip(tp, fp, strict=True)]
    if tops[0] < 1.0:  # a rule that flags nothing, for scores too mixed to allow any other at a low FPR
        thresholds.insert(0, _between(float(tops[0]), 1.0))
        tables.insert(0, Confusion(0, 0, int(tp[-1]), int(fp[-1])))
    return thresholds, tables


def _between(low: float, high: float) -> float:
    """A value in (low, high], halfway where floats allow."""
    middle = (float(low) + float(high)) / 2
    return middle if low < middle <= high else float(high)


def _newton(x: Floats, target: Floats) -> tuple[float, float]:
    """Minimise the mean cross-entropy of sigmoid(slope x + bias) against soft targets; halves steps that overshoot."""
    slope, bias = 0.0, math.log(target.mean() / (1 - target.mean()))
    for _ in range(NEWTON_STEPS):
        p = sigmoid(slope * x + bias)
        gradient = np.array([np.mean((p - target) * x), np.mean(p - target)])
        if np.abs(gradient).max() < GRADIENT_TOLERANCE:
            break
        w = p * (1 - p)
        hessian = np.array([[np.mean(w * x * x), np.mean(w * x)], [np.mean(w * x), np.mean(w)]]) + 1e-12 * np.eye(2)
        step = np.linalg.solve(hessian, gradient)
        before = _loss(x, target, slope, bias)
        while _loss(x, target, slope - step[0], bias - step[1]) > before and np.abs(step).max() > 1e-12:
            step = step / 2
        slope, bias = slope - float(step[0]), bias - float(step[1])
    return slope, bias


def _loss(x: Floats, target: Floats, slope: float, bias: float) -> float:
    z = slope * x + bias
    return float(np.mean(np.logaddexp(0.0, z) - target * z))
