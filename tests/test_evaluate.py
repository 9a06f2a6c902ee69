"""Measuring stages: one policy for all, thresholds from the calibration split, nothing undefined shown as a number."""

from __future__ import annotations

import numpy as np
import pytest
from numpy.typing import NDArray

from convert.corpora.registry import Row
from convert.evaluate import (
    Fitted,
    fit_stage,
    hazard_recall,
    label_calibration,
    margins_of,
    mean_lost,
    measure_set,
    parity_rows,
    verdict_parity,
    worst_mistakes,
)
from convert.report import comparison_table, figure
from edgeguard.calibration import Calibration, ChosenPoint, Measured, sigmoid
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


def test_what_is_lost_is_counted_in_points_over_sets_that_have_it() -> None:
    def entry(f1: float | None, auprc: float) -> dict[str, dict[str, dict[str, float | None]]]:
        return {"points": {"balanced": {"f1": f1, "auprc": auprc}}}

    before = {"a": entry(0.80, 0.9), "b": entry(0.60, 0.9), "c": entry(None, 0.9), "only before": entry(0.9, 0.9)}
    after = {"a": entry(0.79, 0.8), "b": entry(0.63, 0.8), "c": entry(None, 0.8), "only after": entry(0.1, 0.1)}
    lost = mean_lost(before, after, "balanced")
    assert lost["by_set"] == pytest.approx({"a": 1.0, "b": -3.0})
    assert lost["mean"] == pytest.approx(-1.0) and lost["sets"] == 2
    assert mean_lost(before, after, "balanced", "auprc", ["a", "c"])["by_set"] == pytest.approx({"a": 10.0, "c": 10.0})
    assert mean_lost(before, after, "balanced", names=["c"]) == {"by_set": {}, "mean": None, "sets": 0}


def _fixed(threshold: float) -> Fitted:
    """p_unsafe = sigmoid(margin / 2 + 1) for prompts, sigmoid(margin) for responses; one threshold."""
    point = {"balanced": ChosenPoint(threshold, Measured(n=1, f1=None, precision=None, recall=None, fpr=None))}
    fits = {"prompt": Calibration(2.0, 1.0), "response": Calibration(1.0, 0.0)}
    return Fitted(fits, {"prompt": point, "response": point})


def _with_margins(margins: list[float]) -> NDArray[np.float32]:
    logits = np.zeros((len(margins), K), dtype=np.float32)
    logits[:, 0], logits[:, 1] = 7.0, np.array(margins) + 7.0
    return logits


def test_worst_mistakes_come_by_distance_from_their_own_threshold_without_text() -> None:
    prompts, answers = _rows(4), _rows(3, "response")
    sets = {"p": prompts, "r": [Row(f"r:{i}", "r", *_judged(row)) for i, row in enumerate(answers)]}
    # log-odds of prompts 4, -1, -3 (right), 3 (right); of responses -5 (right), -6, 1
    logits = {"p": _with_margins([6.0, -4.0, -8.0, 4.0]), "r": _with_margins([-5.0, -6.0, 1.0])}
    worst = worst_mistakes(sets, logits, _fixed(0.5), "balanced")
    assert [(m["id"], m["label"], round(m["off"], 4)) for m in worst] == [
        ("r:1", "unsafe", 6.0),
        ("t:0", "safe", 4.0),
        ("r:2", "safe", 1.0),
        ("t:1", "unsafe", 1.0),
    ]
    assert worst[1]["p_unsafe"] == pytest.approx(float(sigmoid(4.0))) and worst[1]["threshold"] == 0.5
    assert set(worst[0]) == {"id", "set", "target", "label", "p_unsafe", "threshold", "off"}
    assert not any("Text" in str(m) or "answer" in str(m) for m in worst)
    assert worst_mistakes(sets, logits, _fixed(0.5), "balanced", 2) == worst[:2]
    strict = worst_mistakes(sets, logits, _fixed(float(sigmoid(2.0))), "balanced")
    assert [(m["id"], round(m["off"], 4)) for m in strict] == [("r:1", 8.0), ("t:1", 3.0), ("t:0", 2.0)]


def _judged(row: Row) -> tuple[str, str | None, str, str | None]:
    return row.target, row.label, row.prompt, row.response


def test_parity_by_hand() -> None:
    rows = _rows(4)  # prompts: flagged from log-odds 0, that is from a margin of -2
    found = verdict_parity(
        rows, _with_margins([-1.5, 3.0, -2.5, 0.0]), _with_margins([-2.5, 3.0, -2.75, 0.25]), _fixed(0.5), "balanced"
    )
    assert found == pytest.approx({"rows": 4, "max_abs_diff": 1.0, "mean_abs_diff": 1.5 / 4, "agreement": 0.75})


def test_parity_rows_are_the_same_whatever_the_order() -> None:
    sets = {"a": [Row(f"a:{i}", "a", "prompt", "safe", "x", None) for i in range(30)], "t": _rows(30)}
    drawn = parity_rows(sets, 20)
    assert drawn == parity_rows({name: rows[::-1] for name, rows in reversed(sets.items())}, 20)
    assert len(set(row.id for row in drawn)) == 20 and {row.set for row in drawn} == {"a", "t"}
    assert len(parity_rows(sets)) == 60


def test_a_hazard_is_calibrated_where_enough_rows_name_it(
    calibration: tuple[list[Row], NDArray[np.float32]],
) -> None:
    rng = np.random.default_rng(5)
    odds = rng.normal(-1, 2, 4000)
    drawn = rng.random(4000) < sigmoid(odds)
    rows = [
        Row(f"c:{i}", "c", "prompt", "unsafe" if hit else "safe", "x", None, ("S1",) if hit else ())
        for i, hit in enumerate(drawn)
    ]
    rows += [Row(f"u:{i}", "u", "prompt", "unsafe", "x", None) for i in range(50)]  # which hazard is not known
    rows += [Row(f"v:{i}", "v", "prompt", "unsafe", "x", None, ("S2",)) for i in range(19)]
    logits = np.zeros((len(rows), K), dtype=np.float32)
    logits[:, 1], logits[:4000, 2] = rng.normal(0, 1, len(rows)), 3 * odds + 2  # overconfident and shifted
    logits[4000:, 2] = -20
    rows, logits = rows + calibration[0], np.concatenate([logits, calibration[1]])
    logits[-800:, 2] = -20
    logits[-800:, 2][[row.label == "unsafe" for row in calibration[0]]] = 20
    table = label_calibration(rows, logits, fit_stage(*calibration))
    s1, s2 = table["hazards"]["S1"], table["hazards"]["S2"]
    assert s1["n"] == 4000 + 19 + 800 and s1["positives"] == int(drawn.sum()) + 400
    assert s1["temperature"] == pytest.approx(3, abs=0.7)
    assert s1["ece_after"] < 0.03 < s1["ece_before"]
    assert s2["positives"] == 19 and s2["temperature"] is None and s2["ece_after"] is None
    assert "fewer than 20" in s2["why"]
    assert list(table["hazards"]) == list(HAZARDS)


def test_a_hazard_logit_that_says_nothing_gets_no_fit(calibration: tuple[list[Row], NDArray[np.float32]]) -> None:
    rows, logits = calibration
    unsafe = np.array([row.label == "unsafe" for row in rows])
    logits[:, 2] = np.where(unsafe, -3.0, 3.0)
    entry = label_calibration(rows, logits, fit_stage(rows, logits))["hazards"]["S1"]
    assert entry["temperature"] is None and entry["ece_before"] > 0.9
    assert "do not have the higher margins" in entry["why"]


def test_the_verdict_is_recorded_with_the_fit_that_ships(calibration: tuple[list[Row], NDArray[np.float32]]) -> None:
    fitted = fit_stage(*calibration)
    verdict = label_calibration(*calibration, fitted)["verdict"]
    assert verdict["prompt"]["temperature"] == fitted.calibration["prompt"].temperature
    assert verdict["response"]["n"] == 400 and verdict["response"]["positives"] == 200
    assert verdict["prompt"]["ece_before"] > 0


def test_an_undefined_figure_is_a_dash() -> None:
    assert figure(None) == "–"
    assert figure(0.0) == "0.000"
    assert figure(0.5, [0.4, 0.6]) == "0.500 [0.400, 0.600]"
