"""Measuring a stage: calibrate its margins, choose its operating points, and report every test set.

One policy for all stages, so that their figures may share a table: each stage is calibrated on the calibration split
with its own margins, its thresholds are chosen there, and the tests only report.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from convert.corpora.registry import Row
from edgeguard.calibration import Calibration, ChosenPoint, choose_operating_points, fit_calibration
from edgeguard.metrics import evaluate
from edgeguard.prompt import TARGETS
from edgeguard.taxonomy import HAZARDS

__all__ = ["POLICY", "Fitted", "fit_stage", "hazard_recall", "mean_f1_lost", "measure_set"]

POLICY = (
    "Each stage is calibrated on the calibration split (temperature and bias per target); its operating points are "
    "thresholds on p_unsafe chosen there (balanced: highest F1; low_fpr: FPR at most 2 %; high_recall: recall at least "
    "95 %) and are applied unchanged to the test sets."
)


@dataclass(frozen=True)
class Fitted:
    """Calibration and operating points of one stage, by target."""

    calibration: Mapping[str, Calibration]
    points: Mapping[str, Mapping[str, ChosenPoint]]  # target -> point name -> threshold and figures

    def probabilities(self, margins: NDArray[Any], targets: Sequence[str]) -> NDArray[np.float64]:
        """Calibrated p_unsafe [n] of ``margins`` [n]."""
        pairs = zip(margins, targets, strict=True)
        return np.array([self.calibration[target].probability(float(margin)) for margin, target in pairs])

    def thresholds(self, point: str, targets: Sequence[str]) -> NDArray[np.float64]:
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


def margins_of(logits: NDArray[Any]) -> NDArray[np.float64]:
    """logit(unsafe) - logit(safe) [n] of logits [n, K]."""
    return np.asarray(logits[:, 1], np.float64) - np.asarray(logits[:, 0], np.float64)


def fit_stage(rows: Sequence[Row], logits: NDArray[Any]) -> Fitted:
    """Fit calibration and operating points to the calibration split."""
    margins, labels = margins_of(logits), np.array([row.label == "unsafe" for row in rows])
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
    labels = np.array([row.label == "unsafe" for row in rows])
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


def mean_f1_lost(before: Mapping[str, Any], after: Mapping[str, Any], point: str) -> dict[str, Any]:
    """F1 of ``before`` minus F1 of ``after`` on every common set that defines it, and the mean, in points (0.01 F1)."""
    lost = {}
    for name in [name for name in before if name in after]:
        a, b = before[name]["points"][point]["f1"], after[name]["points"][point]["f1"]
        if a is not None and b is not None:
            lost[name] = 100 * (a - b)
    return {"by_set": lost, "mean": float(np.mean(list(lost.values())))}
