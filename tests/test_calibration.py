"""Calibration: a stable sigmoid, a fit that finds the truth, operating points that keep their promises."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st
from numpy.typing import NDArray
from scipy.optimize import minimize

from edgeguard.calibration import Calibration, choose_operating_points, fit_calibration, sigmoid
from edgeguard.errors import BundleError
from edgeguard.metrics import confusion

POINTS = ("balanced", "low_fpr", "high_recall")
ROWS = st.lists(st.tuples(st.integers(0, 20).map(lambda i: i / 20), st.booleans()), min_size=2, max_size=80)


def draw(
    n: int, temperature: float = 1.7, bias: float = -0.6, seed: int = 0
) -> tuple[NDArray[np.float64], NDArray[np.bool_]]:
    """Margins, and labels drawn from the probabilities that the calibration gives them."""
    rng = np.random.default_rng(seed)
    margins = rng.normal(0, 4, n)
    return margins, rng.random(n) < sigmoid(margins / temperature + bias)


@given(x=st.floats(-700, 700))
def test_sigmoid_is_the_textbook_one(x: float) -> None:
    assert float(sigmoid(x)) == pytest.approx(1 / (1 + math.exp(-x)), rel=1e-12)


def test_sigmoid_is_stable_at_both_ends() -> None:
    with np.errstate(over="raise", invalid="raise", divide="raise"):
        ends = sigmoid([-1e308, -800, 0, 800, 1e308])
    assert ends.tolist() == [0, 0, 0.5, 1, 1]


@given(a=st.floats(-50, 50), b=st.floats(-50, 50))
def test_a_higher_margin_is_never_less_unsafe(a: float, b: float) -> None:
    calibration = Calibration(temperature=1.3, bias=-0.2)
    assert (calibration.probability(a) <= calibration.probability(b)) or a > b


def test_probability_and_probabilities_agree() -> None:
    calibration = Calibration(temperature=0.7, bias=0.3)
    margins = [-9.0, 0.0, 2.5]
    assert calibration.probabilities(margins).tolist() == [calibration.probability(m) for m in margins]
    assert Calibration(1.0, 0.0).probability(math.log(3)) == pytest.approx(0.75)


def test_the_fit_finds_the_truth() -> None:
    temperature, bias = fit_calibration(*draw(40_000))
    assert temperature == pytest.approx(1.7, rel=0.05)
    assert bias == pytest.approx(-0.6, abs=0.06)


@pytest.mark.parametrize(("n", "scale", "shift"), [(50, 1, 0), (400, 100, 30), (400, 0.001, -0.002), (1000, 5, -40)])
def test_the_fit_is_the_optimum(n: int, scale: float, shift: float) -> None:
    base, labels = draw(n, seed=n)
    margins = base * scale + shift
    temperature, bias = fit_calibration(margins, labels)
    target = np.where(labels, (labels.sum() + 1) / (labels.sum() + 2), 1 / ((~labels).sum() + 2))

    def loss(parameters: NDArray[np.float64]) -> float:
        z = parameters[0] * base + parameters[1]
        return float(np.mean(np.logaddexp(0, z) - target * z))

    best = minimize(loss, np.array([0.1, 0.0]), method="Nelder-Mead", options={"xatol": 1e-8, "fatol": 1e-12})
    found = loss(np.array([scale / temperature, shift / temperature + bias]))
    assert found == pytest.approx(best.fun, abs=1e-8)


def test_the_fit_stays_finite_when_classes_are_apart() -> None:
    temperature, bias = fit_calibration([-3.0, -2.0, 2.0, 3.0], [False, False, True, True])
    assert 0 < temperature < math.inf and math.isfinite(bias)


@pytest.mark.parametrize(
    ("margins", "labels", "message"),
    [
        ([1.0, 2.0], [True, True], "found 0 safe and 2 unsafe"),
        ([1.0, 2.0], [False, False], "found 2 safe and 0 unsafe"),
        ([3.0, 2.0, 1.0, 0.0], [False, False, True, True], "do not have the higher margins"),
        ([0.0, 0.0], [False, True], "do not have the higher margins"),
        ([1.0, math.nan], [True, False], "expected finite values"),
        ([1.0], [True, False], r"found \(1,\) and \(2,\)"),
    ],
)
def test_what_cannot_be_fitted(margins: list[float], labels: list[bool], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        fit_calibration(margins, labels)


@given(rows=ROWS)
def test_operating_points_are_the_best_of_all_thresholds(rows: list[tuple[float, bool]]) -> None:
    p, labels = np.array([r[0] for r in rows]), np.array([r[1] for r in rows])
    assume(labels.any() and not labels.all())
    tables = [confusion(labels, p >= t) for t in [*np.unique(p), 1.5]]
    try:
        points = choose_operating_points(p, labels)
    except ValueError:
        assert p[~labels].max() == 1.0  # no threshold in [0, 1] can spare that row
        return
    assert tuple(points) == POINTS
    for point in points.values():
        counts = confusion(labels, p >= point.threshold)
        assert 0 <= point.threshold <= 1
        assert point.measured.n == len(rows)
        found = (point.measured.f1, point.measured.precision, point.measured.recall, point.measured.fpr)
        assert found == (counts.f1, counts.precision, counts.recall, counts.fpr)
    assert (points["balanced"].measured.fpr or 0) <= 0.1
    assert (points["balanced"].measured.f1 or 0) == max(t.f1 or 0 for t in tables if (t.fpr or 0) <= 0.1)
    assert (points["low_fpr"].measured.fpr or 0) <= 0.02
    assert points["low_fpr"].measured.recall == max(t.recall or 0 for t in tables if (t.fpr or 0) <= 0.02)
    assert (points["high_recall"].measured.recall or 0) >= 0.95
    assert points["high_recall"].measured.fpr == min(t.fpr or 0 for t in tables if (t.recall or 0) >= 0.95)


def test_thresholds_lie_between_probabilities() -> None:
    points = choose_operating_points([0.1, 0.2, 0.6, 0.8], [False, False, True, True])
    assert {name: point.threshold for name, point in points.items()} == pytest.approx(dict.fromkeys(POINTS, 0.4))


def test_neighbouring_floats_are_told_apart() -> None:
    low = 0.5
    high = math.nextafter(low, 1)
    points = choose_operating_points([low, high], [False, True])
    assert points["balanced"].threshold == high


def test_safe_rows_at_the_top_leave_nothing_to_flag() -> None:
    point = choose_operating_points([0.9, 0.1, 0.2], [False, True, True])["low_fpr"]
    assert (point.measured.recall, point.measured.precision, point.measured.fpr) == (0, None, 0)
    assert point.threshold > 0.9


@pytest.mark.parametrize(
    ("p", "labels", "message"),
    [
        ([1.0, 0.5], [False, True], "no threshold has FPR at most 0.02"),
        ([0.1, 0.5], [True, True], "both safe and unsafe rows"),
        ([0.1, 1.5], [False, True], "probabilities from 0 to 1"),
    ],
)
def test_what_has_no_operating_points(p: list[float], labels: list[bool], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        choose_operating_points(p, labels)


def test_calibration_from_json() -> None:
    assert Calibration.from_dict({"temperature": 2, "bias": 0}, "x").to_dict() == {"temperature": 2.0, "bias": 0.0}
    with pytest.raises(BundleError, match="x.temperature: expected a finite number above 0"):
        Calibration.from_dict({"temperature": 0, "bias": 0}, "x")
