"""Percentiles and the spread of ratios."""

from __future__ import annotations

import numpy as np
import pytest

from edgeguard.bench.records import Trial
from edgeguard.bench.stats import ratio_of_medians, summarize


def trials(latencies: list[float], engine: list[float | None] | None = None) -> list[Trial]:
    inside = engine or [None] * len(latencies)
    return [Trial(i, 0, ms, e, None, None) for i, (ms, e) in enumerate(zip(latencies, inside, strict=True))]


def test_percentiles_are_interpolated() -> None:
    found = summarize(trials([float(value) for value in range(101, 0, -1)]), tokens=64, batch=2)
    assert (found.p50_ms, found.p95_ms, found.p99_ms, found.slowest_ms) == (51, 96, 100, 101)
    assert found.tokens_per_s == pytest.approx(1000 * 64 * 2 / 51)
    assert summarize(trials([1.0, 2.0]), tokens=1, batch=1).p95_ms == pytest.approx(1.95)


def test_one_trial_is_all_percentiles() -> None:
    found = summarize(trials([7.0]), tokens=7, batch=1)
    assert {found.p50_ms, found.p95_ms, found.p99_ms, found.slowest_ms} == {7.0}
    assert found.tokens_per_s == 1000


def test_shares_are_medians_of_what_is_known() -> None:
    found = summarize(trials([3.0, 4.0, 9.0], [1.0, 2.0, 8.0]), tokens=1, batch=1)
    assert (found.engine_p50_ms, found.tokenizer_p50_ms) == (2.0, None)


def test_the_ratio_lies_in_its_interval_and_repeats() -> None:
    rng = np.random.default_rng(3)
    slow, fast = (list(rng.normal(mean, 1.0, 30)) for mean in (40.0, 20.0))
    ratio, low, high = ratio_of_medians(slow, fast)
    assert low < ratio < high
    assert 1.9 < low < 2.0 < high < 2.1
    assert ratio_of_medians(slow, fast) == (ratio, low, high)
    inverse, inverse_low, inverse_high = ratio_of_medians(fast, slow)
    assert inverse == pytest.approx(1 / ratio)
    assert inverse_low < 1 / 2 < inverse_high


def test_more_trials_narrow_the_interval() -> None:
    rng = np.random.default_rng(4)
    few, many = (ratio_of_medians(list(rng.normal(20, 2, n)), list(rng.normal(20, 2, n))) for n in (8, 200))
    assert few[2] - few[1] > 2 * (many[2] - many[1])


def test_no_spread_no_interval() -> None:
    assert ratio_of_medians([6.0] * 5, [3.0] * 4) == (2.0, 2.0, 2.0)
