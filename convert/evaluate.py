"""Measuring a stage: calibrate its margins, choose its operating points, and report every test set.

One policy for all stages, so that their figures may share a table: each stage is calibrated on the calibration split
with its own margins, its thresholds are chosen there, and the tests only report.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from convert.corpora.registry import Row
from edgeguard.calibration import Calibration, ChosenPoint, choose_operating_points, fit_calibration, sigmoid
from edgeguard.errors import EdgeguardError
from edgeguard.metrics import evaluate, expected_calibration_error
from edgeguard.prompt import TARGETS
from edgeguard.taxonomy import HAZARDS

if TYPE_CHECKING:
    from convert.scores import Stage, TeacherStage
    from edgeguard.manifest import Manifest

__all__ = [
    "POLICY",
    "Fitted",
    "MeasuredStage",
    "StageError",
    "fit_stage",
    "hazard_recall",
    "label_calibration",
    "margins_of",
    "mean_lost",
    "measure_set",
    "measure_stage",
    "parity_rows",
    "verdict_parity",
    "worst_mistakes",
]

POLICY = (
    "Each stage is calibrated on the calibration split (temperature and bias per target); its operating points are "
    "thresholds on p_unsafe chosen there (balanced: highest F1 with FPR at most 10 %; low_fpr: FPR at most 2 %; "
    "high_recall: recall at least 95 %) and are applied unchanged to the test sets."
)
PARITY_ROWS = 1000
WORST = 50
# A temperature and a bias fitted to fewer rows than this that name a hazard would be noise.
LEAST_POSITIVES = 20
# A threshold of exactly 0 or 1 has no log-odds.
LEAST_ODDS = 1e-9

Bools = NDArray[np.bool_]
Floats = NDArray[np.float64]


class StageError(EdgeguardError):
    """A stage whose margins say nothing."""


@dataclass(frozen=True)
class Fitted:
    """Calibration and operating points of one stage, by target."""

    calibration: Mapping[str, Calibration]
    points: Mapping[str, Mapping[str, ChosenPoint]]  # target -> point name -> threshold and figures

    @classmethod
    def of_manifest(cls, manifest: Manifest) -> Fitted:
        """What a bundle ships with."""
        points = manifest.operating_points.items()
        return cls(
            manifest.calibration,
            {t: {name: ChosenPoint(p.thresholds[t], p.measured[t]) for name, p in points} for t in TARGETS},
        )

    def log_odds(self, margins: NDArray[Any], targets: Sequence[str]) -> Floats:
        """Calibrated log-odds of unsafe [n] of ``margins`` [n]."""
        fits = [self.calibration[target] for target in targets]
        return np.asarray(margins, np.float64) / [f.temperature for f in fits] + [f.bias for f in fits]

    def probabilities(self, margins: NDArray[Any], targets: Sequence[str]) -> Floats:
        """Calibrated p_unsafe [n] of ``margins`` [n]."""
        return sigmoid(self.log_odds(margins, targets))

    def thresholds(self, point: str, targets: Sequence[str]) -> Floats:
        """The threshold [n] that each row's target has at ``point``."""
        return np.array([self.points[target][point].threshold for target in targets])

    def to_dict(self) -> dict[str, Any]:
        """``calibration`` and ``operating_points`` as a manifest has them."""
        names = self.points[TARGETS[0]]
        return {
            "calibration": {target: c.to_dict() for target, c in self.calibration.items()},
            "operating_points": {
                name: {
                    "thresholds": {t: self.points[t][name].threshold for t in TARGETS},
                    "measured": {t: self.points[t][name].measured.to_dict() for t in TARGETS},
                }
                for name in names
            },
        }


@dataclass(frozen=True, eq=False)
class MeasuredStage:
    """What a stage said and what it is worth.

    ``held_back``: logits [n, K] of the calibration split; ``logits``: of each test set measured; ``sets``: its figures.
    """

    name: str
    key: str
    fitted: Fitted
    held_back: NDArray[Any]
    logits: Mapping[str, NDArray[Any]]
    sets: Mapping[str, dict[str, Any]]


def margins_of(logits: NDArray[Any]) -> Floats:
    """logit(unsafe) - logit(safe) [n] of logits [n, K]."""
    return np.asarray(logits[:, 1], np.float64) - np.asarray(logits[:, 0], np.float64)


def measure_stage(
    stage: Stage | TeacherStage,
    tests: Mapping[str, Sequence[Row]],
    calibration: Sequence[Row],
    score: Callable[[Stage | TeacherStage, str, Sequence[Row]], NDArray[Any]],
) -> MeasuredStage:
    """Fit a stage on the calibration split, then measure it on those of ``tests`` that it covers.

    ``score``: (stage, name of the set, rows) -> logits [n, K]. Raises StageError for a stage that tells no unsafe row
    from a safe one.
    """
    held_back = score(stage, "calibration", calibration)
    try:
        fitted = fit_stage(calibration, held_back)
    except ValueError as error:
        raise StageError(f"{stage.name}: the calibration split cannot be fitted: {error}") from error
    covered = {name: rows for name, rows in tests.items() if stage.covers(name, rows)}
    logits = {name: score(stage, name, rows) for name, rows in covered.items()}
    sets = {name: measure_set(rows, logits[name], fitted) for name, rows in covered.items()}
    return MeasuredStage(stage.name, stage.key, fitted, held_back, logits, sets)


def fit_stage(rows: Sequence[Row], logits: NDArray[Any]) -> Fitted:
    """Fit calibration and operating points to the calibration split."""
    margins, labels = margins_of(logits), _unsafe(rows)
    calibration, points = {}, {}
    for target in TARGETS:
        chosen = np.array([row.target == target for row in rows])
        calibration[target] = Calibration(*fit_calibration(margins[chosen], labels[chosen]))
        p_unsafe = calibration[target].probabilities(margins[chosen])
        points[target] = choose_operating_points(p_unsafe, labels[chosen])
    return Fitted(calibration, points)


def measure_set(rows: Sequence[Row], logits: NDArray[Any], fitted: Fitted) -> dict[str, Any]:
    """Figures of one test set at every operating point; what a one-class set does not define is null."""
    targets = [row.target for row in rows]
    labels = _unsafe(rows)
    p_unsafe = fitted.probabilities(margins_of(logits), targets)
    figures = {}
    for point in fitted.points[TARGETS[0]]:
        metrics = evaluate(labels, p_unsafe, fitted.thresholds(point, targets)).to_dict()
        if labels.all():  # F1 and precision of a set without safe rows say nothing that recall does not
            metrics["f1"] = metrics["precision"] = metrics["intervals"]["f1"] = None
        if not labels.any():  # every alarm is a false one there: the FPR says it
            metrics["precision"] = None
        figures[point] = metrics
    return {"target": targets[0], "n": len(rows), "points": figures}


def hazard_recall(rows: Sequence[Row], logits: NDArray[Any], fitted: Fitted, point: str) -> dict[str, dict[str, Any]]:
    """By hazard: rows, share flagged unsafe, and share whose highest hazard logit is the row's own."""
    targets = [row.target for row in rows]
    flagged = fitted.probabilities(margins_of(logits), targets) >= fitted.thresholds(point, targets)
    codes = list(HAZARDS)
    highest = np.argmax(logits[:, 2:], axis=1)
    result: dict[str, dict[str, Any]] = {}
    for code in codes:
        chosen = np.array([code in row.hazards for row in rows])
        if chosen.any():
            named = np.mean([codes[i] == code for i in highest[chosen]])
            result[code] = {"n": int(chosen.sum()), "recall": float(flagged[chosen].mean()), "named": float(named)}
    return result


def label_calibration(rows: Sequence[Row], logits: NDArray[Any], fitted: Fitted) -> dict[str, Any]:
    """How far every label of the head can be taken at its word, on the calibration split.

    ``verdict``: by target, the fit that ships; ``hazards``: by code, a temperature and a bias of its own, fitted where
    at least 20 rows name the hazard, against safe rows and rows that name other hazards only. ``ece_before`` is the
    error of sigmoid(logit), ``ece_after`` that of the fit; both halves of the rows are measured with the fit of the
    other, so that no row is measured with what it was fitted to. The runtime reports the hazards uncalibrated.
    """
    labels, margins = _unsafe(rows), margins_of(logits)
    verdict = {}
    for target in TARGETS:
        chosen = np.array([row.target == target for row in rows])
        shipped = fitted.calibration[target]
        verdict[target] = {**_calibration_of(margins[chosen], labels[chosen]), **shipped.to_dict()}
    known = np.array([row.label == "safe" or bool(row.hazards) for row in rows])
    hazards = {}
    for column, code in enumerate(HAZARDS, start=2):
        named = np.array([row.label == "unsafe" and code in row.hazards for row in rows])
        hazards[code] = _calibration_of(np.asarray(logits[known, column], np.float64), named[known])
    return {"verdict": verdict, "hazards": hazards}


def _calibration_of(logits: Floats, truth: Bools) -> dict[str, Any]:
    """Rows, positives, fit and calibration error before and after it; nulls and ``why`` where no fit can be had."""
    n, positives = int(truth.size), int(truth.sum())
    counts = {"n": n, "positives": positives}
    nothing = {"temperature": None, "bias": None, "ece_before": None, "ece_after": None}
    if min(positives, n - positives) < LEAST_POSITIVES:
        return {**counts, **nothing, "why": f"fewer than {LEAST_POSITIVES} rows of one kind"}
    half = np.zeros(n, dtype=np.bool_)
    for value in (True, False):  # every other row of each kind, so that both halves have both
        half[np.flatnonzero(truth == value)[::2]] = True
    before = expected_calibration_error(truth, sigmoid(logits))
    try:
        after = np.empty(n)
        for part in (half, ~half):
            after[part] = Calibration(*fit_calibration(logits[~part], truth[~part])).probabilities(logits[part])
        fit = Calibration(*fit_calibration(logits, truth))
    except ValueError as error:
        return {**counts, **nothing, "ece_before": before, "why": str(error)}
    return {**counts, **fit.to_dict(), "ece_before": before, "ece_after": expected_calibration_error(truth, after)}


def worst_mistakes(
    sets: Mapping[str, Sequence[Row]],
    logits: Mapping[str, NDArray[Any]],
    fitted: Fitted,
    point: str,
    count: int = WORST,
) -> list[dict[str, Any]]:
    """The mistakes furthest on the wrong side of their threshold, worst first, by id: no text.

    ``off``: distance from the threshold in calibrated log-odds, so that mistakes on prompts and on responses compare.
    """
    mistakes: list[tuple[float, str, dict[str, Any]]] = []
    for name, rows in sets.items():
        targets = [row.target for row in rows]
        odds, thresholds = fitted.log_odds(margins_of(logits[name]), targets), fitted.thresholds(point, targets)
        p_unsafe, off = sigmoid(odds), np.abs(odds - _logit(thresholds))
        for i in map(int, np.flatnonzero((p_unsafe >= thresholds) != _unsafe(rows))):
            row, figures = rows[i], {"p_unsafe": p_unsafe[i], "threshold": thresholds[i], "off": off[i]}
            entry = {"id": row.id, "set": name, "target": row.target, "label": row.label}
            mistakes.append((-off[i], row.id, {**entry, **{key: float(value) for key, value in figures.items()}}))
    return [mistake for _, _, mistake in sorted(mistakes, key=lambda m: m[:2])[:count]]


def parity_rows(sets: Mapping[str, Sequence[Row]], count: int = PARITY_ROWS) -> list[Row]:
    """``count`` rows of all test sets, drawn by the hash of their ids: the same rows for every container."""
    rows = [row for rows in sets.values() for row in rows]
    return sorted(rows, key=lambda row: hashlib.sha256(row.id.encode()).digest())[:count]


def verdict_parity(
    rows: Sequence[Row], reference: NDArray[Any], found: NDArray[Any], fitted: Fitted, point: str
) -> dict[str, Any]:
    """How a container's verdicts differ from a reference's; ``reference``, ``found``: logits [n, K] of ``rows``.

    Margins are compared as they are; decisions under ``fitted``, the one calibration and threshold that both ship with.
    """
    targets = [row.target for row in rows]
    margins = [margins_of(logits) for logits in (reference, found)]
    difference = np.abs(margins[0] - margins[1])
    thresholds = fitted.thresholds(point, targets)
    flagged = [fitted.probabilities(margin, targets) >= thresholds for margin in margins]
    return {
        "rows": len(rows),
        "max_abs_diff": float(difference.max()),
        "mean_abs_diff": float(difference.mean()),
        "agreement": float(np.mean(flagged[0] == flagged[1])),
    }


def mean_lost(
    before: Mapping[str, Any],
    after: Mapping[str, Any],
    point: str,
    figure: str = "f1",
    names: Sequence[str] | None = None,
) -> dict[str, Any]:
    """``figure`` of ``before`` minus that of ``after``, in points (0.01), on every common set that defines it.

    ``names``: of these sets only. The mean is over ``sets`` sets, null when there are none.
    """
    lost = {}
    for name in [name for name in before if name in after and (names is None or name in names)]:
        a, b = before[name]["points"][point][figure], after[name]["points"][point][figure]
        if a is not None and b is not None:
            lost[name] = 100 * (a - b)
    return {"by_set": lost, "mean": float(np.mean(list(lost.values()))) if lost else None, "sets": len(lost)}


def _unsafe(rows: Sequence[Row]) -> Bools:
    return np.array([row.label == "unsafe" for row in rows])


def _logit(p: Floats) -> Floats:
    clipped = np.clip(p, LEAST_ODDS, 1 - LEAST_ODDS)
    return np.log(clipped) - np.log1p(-clipped)
