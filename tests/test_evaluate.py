"""Measuring stages: one policy for all, thresholds from the calibration split, nothing undefined shown as a number."""

from __future__ import annotations

import numpy as np
import pytest
from numpy.typing import NDArray

from convert.corpora.registry import Row
from convert.evaluate import fit_stage, hazard_recall, margins_of, mean_f1_lost, measure_set
from convert.report import comparison_table, figure
from edgeguard.taxonomy import HAZARDS

K = 2 + len(HAZARDS)


def _rows(count: int, target: str = "prompt", hazard: str = "S1") -> list[Row]:
    answer = "An answer." if target == "response" else None
    return [
        Row(f"t:{i}", "t", target, "unsafe" if i % 2 else "safe", f"Text {i}", answer, (hazard,) if i % 2 else ())
        for i in range(count)
    ]


def _logits(rows: list[Row], gap: float, noise: float, seed: int = 0) -> NDArray[np.float32]:
    """Margins of +gap/2 and -gap/2 with noise; the hazard logit of S1 is the highest."""
    rng = np.random.default_rng(seed)
    logits = np.zeros((len(rows), K), dtype=np.float32)
    logits[:, 1] = [(gap if row.label == "unsafe" else -gap) / 2 for row in rows]
    logits[:, 1] += rng.normal(0, noise, len(rows))
    logits[:, 2] = 1.0
    return logits


@pytest.fixture
def calibration() -> tuple[list[Row], NDArray[np.float32]]:
    rows = _rows(400) + _rows(400, "response")
    return rows, _logits(rows, gap=4.0, noise=1.0)


def test_targets_have_their_own_calibration(calibration: tuple[list[Row], NDArray[np.float32]]) -> None:
    rows, logits = calibration
    logits[400:, 1] += 3.0  # responses sit higher
    fitted = fit_stage(rows, logits)
    shift = fitted.calibration["prompt"].bias - fitted.calibration["response"].bias
    assert shift * fitted.calibration["response"].temperature == pytest.approx(3.0, abs=1.0)
    p_unsafe = fitted.probabilities(margins_of(logits), [row.target for row in rows])
    unsafe = np.array([row.label == "unsafe" for row in rows])
    assert p_unsafe[unsafe].mean() > 0.9 and p_unsafe[~unsafe].mean() < 0.1


def test_thresholds_come_from_the_calibration_split_alone(
    calibration: tuple[list[Row], NDArray[np.float32]],
) -> None:
    fitted = fit_stage(*calibration)
    rows = _rows(100)
    good, bad = measure_set(rows, _logits(rows, 4.0, 0.1), fitted), measure_set(rows, _logits(rows, 0.5, 2.0), fitted)
    assert good["points"]["balanced"]["f1"] == 1.0
    assert bad["points"]["balanced"]["f1"] < 0.8
    assert fitted.points["prompt"]["low_fpr"].measured.fpr is not None
    assert fitted.points["prompt"]["low_fpr"].measured.fpr <= 0.02
    assert (fitted.points["prompt"]["high_recall"].measured.recall or 0) >= 0.95


def test_a_set_without_safe_rows_has_recall_only(calibration: tuple[list[Row], NDArray[np.float32]]) -> None:
    fitted = fit_stage(*calibration)
    rows = [row for row in _rows(40) if row.label == "unsafe"]
    entry = measure_set(rows, _logits(rows, 4.0, 0.1), fitted)["points"]["balanced"]
    assert entry["recall"] == 1.0
    assert entry["f1"] is entry["precision"] is entry["fpr"] is entry["auprc"] is None
    report = {"stages": {"s": {"sets": {"mine": {"target": "prompt", "points": {"balanced": entry}}}}}}
    assert "| mine | prompt | 20 (20) | – | – | 1.000" in comparison_table(report, "balanced", "s")


def test_a_set_without_unsafe_rows_has_fpr_only(calibration: tuple[list[Row], NDArray[np.float32]]) -> None:
    fitted = fit_stage(*calibration)
    rows = [row for row in _rows(40) if row.label == "safe"]
    entry = measure_set(rows, _logits(rows, 1.0, 3.0), fitted)["points"]["balanced"]
    assert 0 < entry["fpr"] < 1
    assert entry["f1"] is entry["precision"] is entry["recall"] is entry["auprc"] is None


def test_hazards_are_counted_by_their_own_rows(calibration: tuple[list[Row], NDArray[np.float32]]) -> None:
    fitted = fit_stage(*calibration)
    rows = [row for row in _rows(20) + _rows(20, hazard="S2") if row.label == "unsafe"]
    table = hazard_recall(rows, _logits(rows, 4.0, 0.1), fitted, "balanced")
    assert set(table) == {"S1", "S2"}
    assert table["S1"] == {"n": 10, "recall": 1.0, "named": 1.0}
    assert table["S2"] == {"n": 10, "recall": 1.0, "named": 0.0}


def test_f1_lost_is_counted_in_points_over_sets_that_have_it() -> None:
    def entry(f1: float | None) -> dict[str, dict[str, dict[str, float | None]]]:
        return {"points": {"balanced": {"f1": f1}}}

    before = {"a": entry(0.80), "b": entry(0.60), "c": entry(None)}
    after = {"a": entry(0.79), "b": entry(0.63), "c": entry(None)}
    lost = mean_f1_lost(before, after, "balanced")
    assert lost["by_set"] == pytest.approx({"a": 1.0, "b": -3.0})
    assert lost["mean"] == pytest.approx(-1.0)


def test_an_undefined_figure_is_a_dash() -> None:
    assert figure(None) == "–"
    assert figure(0.0) == "0.000"
    assert figure(0.5, [0.4, 0.6]) == "0.500 [0.400, 0.600]"
