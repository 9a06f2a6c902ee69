"""Two guards on the same rows: AUPRC side by side, and false alarms at one and the same recall."""

from __future__ import annotations

import numpy as np
import pytest

pytest.importorskip("torch", reason="the conversion layer needs edgeguard-runtime[convert]")

from convert.compare import Judged, compare, comparison_markdown  # noqa: E402

UNSAFE = np.array([True] * 50 + [False] * 50)


def judged(noise: float) -> Judged:
    """A set of both classes and a harmless one; the new guard sees the label plainly, the old one through noise."""
    rng = np.random.default_rng(0)
    truth, safe = np.where(UNSAFE, 1.0, -1.0), np.full(40, -1.0)
    return {
        "both": (UNSAFE, truth + rng.normal(0, 0.1, 100), truth + rng.normal(0, noise, 100)),
        "harmless": (np.zeros(40, bool), safe + rng.normal(0, 0.1, 40), safe + rng.normal(0, noise, 40)),
    }


def test_a_better_guard_has_fewer_false_alarms_at_the_same_recall() -> None:
    rows = judged(noise=1.5)
    found = compare(rows, {name: old >= 0.0 for name, (_, _, old) in rows.items()})
    recall = np.mean(rows["both"][2][:50] >= 0)
    assert found["fpr"]["recall"] == pytest.approx(recall)
    assert found["fpr"]["sets"]["both"] == [0.0, pytest.approx(np.mean(rows["both"][2][50:] >= 0))]
    assert found["fpr"]["mean"][0] < found["fpr"]["mean"][1]
    assert found["auprc"]["sets"].keys() == {"both"} and found["auprc"]["mean"][0] == pytest.approx(1.0)
    low, high = found["auprc"]["difference"]["interval"]
    assert 0 < low < found["auprc"]["mean"][0] - found["auprc"]["mean"][1] < high


def test_the_threshold_is_the_highest_that_reaches_the_recall() -> None:
    margins = np.arange(100, 0, -1.0)  # the new guard ranks perfectly
    rows = {"both": (UNSAFE, margins, margins)}
    flagged = {"both": np.arange(100) < 40}  # 40 of 50 unsafe rows, no safe one
    found = compare(rows, flagged)
    assert found["fpr"] == {"recall": 0.8, "sets": {"both": [0.0, 0.0]}, "mean": [0.0, 0.0]}
    worse = {"both": (UNSAFE, -margins, margins)}  # every safe row above every unsafe one
    assert compare(worse, flagged)["fpr"]["sets"]["both"] == [1.0, 0.0]


def test_markdown_names_both_guards() -> None:
    rows = judged(noise=1.0)
    entry = compare(rows, {name: old >= 0 for name, (_, _, old) in rows.items()})
    text = comparison_markdown({"new": "mini 2", "old": "mini 1", "prompt": entry, "response": entry})
    assert "| set | mini 2 | mini 1 |" in text and f"| harmless | {entry['fpr']['sets']['harmless'][0]:.3f} |" in text
