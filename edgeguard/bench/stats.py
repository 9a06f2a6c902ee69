"""Percentiles and ratios of latencies, and how sure they are.

The interval of a ratio of medians is a percentile bootstrap (Efron 1979, "Bootstrap methods: another look at the
jackknife"): both samples are drawn again with replacement, 10,000 times, and the middle 95 % of the quotients is kept.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from edgeguard.bench.records import Summary, Trial

__all__ = ["median", "ratio_of_medians", "summarize"]

RESAMPLES = 10_000
INTERVAL = (2.5, 97.5)  # percent
BOOTSTRAP_SEED = 0


def median(values: Sequence[float]) -> float:
    """The median of at least one value."""
    return float(np.median(values))


def summarize(trials: Sequence[Trial], tokens: int, batch: int) -> Summary:
    """Percentiles of at least one trial of ``batch`` texts of ``tokens`` tokens."""
    latencies = [trial.latency_ms for trial in trials]
    p50, p95, p99 = (float(p) for p in np.percentile(latencies, (50, 95, 99)))
    return Summary(
        p50_ms=p50,
        p95_ms=p95,
        p99_ms=p99,
        slowest_ms=max(latencies),
        tokens_per_s=1000 * tokens * batch / p50,
        engine_p50_ms=_median_of_known([trial.engine_ms for trial in trials]),
        tokenizer_p50_ms=_median_of_known([trial.tokenizer_ms for trial in trials]),
    )


def ratio_of_medians(over: Sequence[float], under: Sequence[float]) -> tuple[float, float, float]:
    """median(over) / median(under), and the bounds of its 95 % bootstrap interval. The same input, the same bounds."""
    rng = np.random.default_rng(BOOTSTRAP_SEED)
    quotients = _resampled_medians(over, rng) / _resampled_medians(under, rng)
    low, high = (float(bound) for bound in np.percentile(quotients, INTERVAL))
    return median(over) / median(under), low, high


def _resampled_medians(values: Sequence[float], rng: np.random.Generator) -> NDArray[np.float64]:
    drawn = rng.choice(np.asarray(values, np.float64), size=(RESAMPLES, len(values)))
    medians: NDArray[np.float64] = np.median(drawn, axis=1)
    return medians


def _median_of_known(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return median(known) if known else None
