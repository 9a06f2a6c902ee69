"""Two records side by side: how many times as fast the second one is, with the spread of that quotient."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any

from edgeguard.bench.records import BenchError, Length, Record
from edgeguard.bench.stats import ratio_of_medians
from edgeguard.bench.tables import Table

__all__ = ["Comparison", "Difference", "compare", "comparison_table"]


@dataclass(frozen=True)
class Difference:
    """One engine at one length.

    ``ratio``: median of A / median of B, above 1 where B is faster; ``low``, ``high``: its 95 % bootstrap interval.
    """

    name: str
    tokens: int
    a_p50_ms: float
    b_p50_ms: float
    ratio: float
    low: float
    high: float

    @property
    def clear(self) -> bool:
        """Whether the interval leaves out 1, no difference."""
        return not self.low <= 1 <= self.high


@dataclass(frozen=True)
class Comparison:
    """``cautions``: what else is not the same in both. ``alone``: what only one of them has."""

    differences: tuple[Difference, ...]
    cautions: tuple[str, ...]
    alone: tuple[str, ...]

    def to_json(self) -> dict[str, Any]:
        """A JSON object."""
        return asdict(self)


def compare(a: Record, b: Record) -> Comparison:
    """Match engines by name and lengths by tokens.

    Raises BenchError when the records share no engine and length, when batches differ, or when one of them has random
    weights and the other has not.
    """
    if a.plan.batch != b.plan.batch:
        raise BenchError(
            f"expected one batch size, found {a.plan.batch} and {b.plan.batch}: a call is not the same work."
        )
    if a.bundle.untrained != b.bundle.untrained:
        raise BenchError(
            f"{a.bundle.label} and {b.bundle.label}: one of them is untrained, so they are not the same model."
        )
    ours, theirs = _lengths(a), _lengths(b)
    shared = [key for key in ours if key in theirs]
    if not shared:
        raise BenchError(f"the records share no engine and length: {_names(a)} and {_names(b)}.")
    alone = [f"{name} at {tokens} tokens" for name, tokens in sorted(ours.keys() ^ theirs.keys())]
    differences = tuple(_difference(key, ours[key], theirs[key]) for key in shared)
    return Comparison(differences, tuple(_cautions(a, b)), tuple(alone))


def comparison_table(comparison: Comparison) -> Table:
    """A row an engine and length."""
    rows = tuple(
        (
            difference.name,
            str(difference.tokens),
            f"{difference.a_p50_ms:.2f}",
            f"{difference.b_p50_ms:.2f}",
            f"{difference.ratio:.3f}",
            f"[{difference.low:.3f}, {difference.high:.3f}]",
            ("B" if difference.ratio > 1 else "A") if difference.clear else "no clear difference",
        )
        for difference in comparison.differences
    )
    columns = ("", "tokens", "A p50 ms", "B p50 ms", "A / B", "95 % of resamples", "faster")
    return Table("Medians of A by medians of B", columns, rows)


def _difference(key: tuple[str, int], a: Length, b: Length) -> Difference:
    times = [[trial.latency_ms for trial in length.trials] for length in (a, b)]
    return Difference(*key, a.summary.p50_ms, b.summary.p50_ms, *ratio_of_medians(*times))


def _lengths(record: Record) -> dict[tuple[str, int], Length]:
    return {(result.name, length.tokens): length for result in record.results for length in result.lengths}


def _cautions(a: Record, b: Record) -> Iterator[str]:
    """What differs besides what is compared."""
    pairs = {
        "bundle": (a.bundle.label, b.bundle.label),
        "manifest": (a.bundle.manifest_sha256[:12], b.bundle.manifest_sha256[:12]),
        "CPU": (a.device.cpu, b.device.cpu),
        "system": (a.device.system, b.device.system),
        "threads": (a.plan.threads, b.plan.threads),
        "texts": (a.plan.texts_sha256[:12], b.plan.texts_sha256[:12]),
        "commit": (a.commit, b.commit),
    }
    versions = a.versions.keys() | b.versions.keys()
    pairs |= {name: (a.versions.get(name), b.versions.get(name)) for name in sorted(versions)}
    for name, (left, right) in pairs.items():
        if left != right:
            yield f"{name}: {left} in A, {right} in B"


def _names(record: Record) -> str:
    return ", ".join(result.name for result in record.results)
