"""Metrics: equal to scikit-learn where it defines them, None where nothing does."""

from __future__ import annotations

import json
import time
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray
from sklearn import metrics as reference

from edgeguard.errors import InputError
from edgeguard.metrics import evaluate, expected_calibration_error

# Few distinct values, so that ties and values at the threshold and at bin edges are common.
ROWS = st.lists(st.tuples(st.booleans(), st.integers(0, 15).map(lambda i: i / 15)), min_size=1, max_size=60)


def arrays(rows: list[tuple[bool, float]]) -> tuple[NDArray[np.bool_], NDArray[np.float64]]:
    return np.array([r[0] for r in rows], dtype=np.bool_), np.array([r[1] for r in rows])


def sample(n: int = 500, seed: int = 0) -> tuple[NDArray[np.bool_], NDArray[np.float64]]:
    rng = np.random.default_rng(seed)
    labels = rng.random(n) < 0.4
    return labels, np.round(1 / (1 + np.exp(-(rng.normal(0, 1, n) + 1.5 * labels - 0.5))), 2)


@given(rows=ROWS, threshold=st.sampled_from([0.0, 0.2, 7 / 15, 0.5, 1.0]))
def test_equal_to_scikit_learn(rows: list[tuple[bool, float]], threshold: float) -> None:
    labels, p = arrays(rows)
    found = evaluate(labels, p, threshold, bootstrap=0)
    flagged = p >= threshold
    assert found.accuracy == pytest.approx(reference.accuracy_score(labels, flagged))
    if labels.any():
        assert found.recall == pytest.approx(reference.recall_score(labels, flagged))
        assert found.f1 == pytest.approx(reference.f1_score(labels, flagged, zero_division=0))
    if flagged.any():
        assert found.precision == pytest.approx(reference.precision_score(labels, flagged))
    if not labels.all():
        assert found.fpr == pytest.approx(reference.recall_score(~labels, flagged))
        if labels.any():
            assert found.auprc == pytest.approx(reference.average_precision_score(labels, p))


@given(rows=ROWS)
def test_what_is_undefined_is_none(rows: list[tuple[bool, float]]) -> None:
    labels, p = arrays(rows)
    found = evaluate(labels, p, 0.5, bootstrap=20)
    assert (found.f1 is None) == (found.recall is None) == (not labels.any())
    assert (found.fpr is None) == labels.all()
    assert (found.auprc is None) == (labels.all() or not labels.any())
    assert (found.precision is None) == (not (p >= 0.5).any())
    for name in ("f1", "recall", "fpr", "auprc"):
        if getattr(found, name) is None:
            assert found.intervals[name] is None


@given(rows=ROWS)
def test_calibration_error_against_a_plain_loop(rows: list[tuple[bool, float]]) -> None:
    labels, p = arrays(rows)
    bins = np.minimum((p * 15).astype(int), 14)
    expected = sum(
        abs(p[bins == b].mean() - labels[bins == b].mean()) * (bins == b).mean() for b in range(15) if (bins == b).any()
    )
    assert expected_calibration_error(labels, p) == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize(("rate", "p", "expected"), [(0.25, 0.25, 0.0), (0.0, 1.0, 1.0), (0.5, 0.9, 0.4)])
def test_calibration_error_by_hand(rate: float, p: float, expected: float) -> None:
    labels = np.arange(100) < 100 * rate
    assert expected_calibration_error(labels, np.full(100, p)) == pytest.approx(expected)


def test_intervals_match_a_plain_bootstrap() -> None:
    labels, p = sample()
    found = evaluate(labels, p, 0.5, bootstrap=2000, seed=1)
    rng = np.random.default_rng(2)
    draws = []
    for _ in range(400):
        i = rng.integers(0, labels.size, labels.size)
        f1, fpr = reference.f1_score(labels[i], p[i] >= 0.5), (p[i] >= 0.5)[~labels[i]].mean()
        draws.append((f1, reference.recall_score(labels[i], p[i] >= 0.5), fpr, average_precision(labels[i], p[i])))
    for column, name in enumerate(("f1", "recall", "fpr", "auprc")):
        expected = np.percentile([draw[column] for draw in draws], [2.5, 97.5])
        assert found.intervals[name] == pytest.approx(tuple(expected), abs=0.015)


def average_precision(labels: NDArray[np.bool_], p: NDArray[np.float64]) -> float:
    return float(reference.average_precision_score(labels, p))


def test_intervals_surround_the_figure_and_repeat_by_seed() -> None:
    labels, p = sample()
    one, again, other = (evaluate(labels, p, 0.5, bootstrap=300, seed=s) for s in (0, 0, 1))
    assert one == again
    assert one.intervals != other.intervals
    for name, interval in one.intervals.items():
        assert interval is not None
        assert interval[0] < getattr(one, name) < interval[1]


def test_no_bootstrap_no_intervals() -> None:
    assert set(evaluate(*sample(), 0.5, bootstrap=0).intervals.values()) == {None}


def test_blocks_do_not_change_the_kind_of_result(monkeypatch: pytest.MonkeyPatch) -> None:
    labels, p = sample(200)
    whole = evaluate(labels, p, 0.5, bootstrap=400)
    monkeypatch.setattr("edgeguard.metrics.BLOCK_CELLS", 1000)
    blocks = evaluate(labels, p, 0.5, bootstrap=400)
    assert blocks.intervals["f1"] == pytest.approx(whole.intervals["f1"], abs=0.03)


def test_a_threshold_for_each_row() -> None:
    labels = np.array([True, True, False, False])
    p = np.array([0.6, 0.6, 0.6, 0.6])
    found = evaluate(labels, p, [0.5, 0.7, 0.5, 0.7], bootstrap=0)
    assert (found.recall, found.fpr, found.precision) == (0.5, 0.5, 0.5)


@pytest.mark.parametrize(
    ("labels", "p", "threshold", "message"),
    [
        ([], [], 0.5, "one length above 0"),
        ([True], [0.1, 0.2], 0.5, r"found \(1,\) and \(2,\)"),
        ([[True]], [[0.1]], 0.5, "one length above 0"),
        ([1, 0], [0.1, 0.2], 0.5, "labels of type bool"),
        (["safe"], [0.1], 0.5, "labels of type bool"),
        ([True], [1.1], 0.5, "probabilities from 0 to 1"),
        ([True], [float("nan")], 0.5, "probabilities from 0 to 1"),
        ([True], [0.5], [0.5, 0.6], "threshold: expected one value or 1 values"),
    ],
)
def test_wrong_input(labels: Any, p: Any, threshold: Any, message: str) -> None:
    with pytest.raises(InputError, match=message):
        evaluate(labels, p, threshold)


def test_to_dict_is_json() -> None:
    data = json.loads(json.dumps(evaluate(np.array([True, True]), [0.2, 0.9], 0.5, bootstrap=10).to_dict()))
    assert data["n"] == data["n_unsafe"] == 2
    assert data["fpr"] is data["auprc"] is data["intervals"]["fpr"] is None
    assert isinstance(data["intervals"]["recall"], list)


def test_thousands_of_rows_take_seconds() -> None:
    start = time.process_time()
    evaluate(*sample(10_000), 0.5)
    assert time.process_time() - start < 5
