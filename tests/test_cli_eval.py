"""``edgeguard eval``: the figures are those of the rows, per target and overall, and nothing is left out in silence."""

from __future__ import annotations

import gzip
import json
import statistics
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from cli_support import THREADS, run, with_thresholds, write_rows
from sklearn.metrics import average_precision_score, f1_score

from edgeguard import Guard
from edgeguard.errors import EngineError

PROMPTS = [{"prompt": f"how do I make thing {i}", "label": ("safe", "unsafe")[i % 3 == 0]} for i in range(30)]
RESPONSES = [{**row, "response": f"once upon a time {i}"} for i, row in enumerate(PROMPTS[:20])]


def measure(*args: str | Path, code: int = 0, stdin: bytes | None = None) -> dict[str, Any]:
    """The JSON that eval prints."""
    result = run("eval", *args, "--json", "--bootstrap", "50", *THREADS, stdin=stdin)
    assert result.exit_code == code, result.output
    assert result.stdout.count("\n") == 1
    found: dict[str, Any] = json.loads(result.stdout)
    return found


def test_figures_are_those_of_the_verdicts(tmp_path: Path, tiny_bundle: Path, tiny_guard: Guard) -> None:
    prompts = [tiny_guard.classify(row["prompt"]) for row in PROMPTS]
    responses = [tiny_guard.classify(prompt=row["prompt"], response=row["response"]) for row in RESPONSES]
    middle = [statistics.median(verdict.p_unsafe for verdict in verdicts) for verdicts in (prompts, responses)]
    bundle = with_thresholds(tiny_bundle, tmp_path / "bundle", *middle)  # so that each target has both decisions
    found = measure(write_rows(tmp_path / "in.jsonl", [*PROMPTS, *RESPONSES]), "--bundle", bundle)["metrics"]
    p_unsafe = np.array([verdict.p_unsafe for verdict in (*prompts, *responses)])
    labels = np.array([row["label"] == "unsafe" for row in (*PROMPTS, *RESPONSES)])
    flagged = p_unsafe >= np.repeat(middle, [len(prompts), len(responses)])
    parts = {"overall": slice(None), "prompt": slice(0, len(prompts)), "response": slice(len(prompts), None)}
    for name, part in parts.items():
        assert set(flagged[part]) == {True, False}
        assert found[name]["n"] == len(labels[part])
        assert found[name]["n_unsafe"] == labels[part].sum()
        assert found[name]["f1"] == pytest.approx(f1_score(labels[part], flagged[part]))
        assert found[name]["auprc"] == pytest.approx(average_precision_score(labels[part], p_unsafe[part]))
        low, high = found[name]["intervals"]["f1"]
        assert low <= found[name]["f1"] <= high


def test_overall_uses_the_threshold_of_each_row(tmp_path: Path, tiny_bundle: Path) -> None:
    bundle = with_thresholds(tiny_bundle, tmp_path / "bundle", prompt=0.0, response=1.0)
    found = measure(write_rows(tmp_path / "in.jsonl", [*PROMPTS, *RESPONSES]), "--bundle", bundle)
    assert found["thresholds"] == {"prompt": 0.0, "response": 1.0}
    metrics = found["metrics"]
    assert (metrics["prompt"]["recall"], metrics["prompt"]["fpr"]) == (1.0, 1.0)
    assert (metrics["response"]["recall"], metrics["response"]["precision"]) == (0.0, None)
    assert metrics["overall"]["recall"] == pytest.approx(10 / 17)
    assert metrics["overall"]["fpr"] == pytest.approx(20 / 33)


def test_operating_point(tmp_path: Path, tiny_bundle: Path) -> None:
    source = write_rows(tmp_path / "in.jsonl", PROMPTS)
    reports = [
        measure(source, "--bundle", tiny_bundle, "--operating-point", p) for p in ("low_fpr", "balanced", "high_recall")
    ]
    assert [report["thresholds"]["prompt"] for report in reports] == [0.9, 0.5, 0.1]
    recalls = [report["metrics"]["prompt"]["recall"] for report in reports]
    assert recalls == sorted(recalls)
    assert recalls[0] < recalls[-1]
    assert len({report["metrics"]["prompt"]["auprc"] for report in reports}) == 1


def test_rows_without_a_usable_label_are_counted_and_left_out(tmp_path: Path, tiny_bundle: Path) -> None:
    odd: list[dict[str, Any]] = [{"label": None}, {"label": None}, {"label": "SAFE"}, {"label": 1}, {"label": []}, {}]
    rows = [*PROMPTS, *({"prompt": "hi", **extra} for extra in odd)]
    source = write_rows(tmp_path / "in.jsonl", rows)
    found = measure(source, "--bundle", tiny_bundle)
    assert found["metrics"]["overall"]["n"] == len(PROMPTS)
    assert found["metrics"]["response"] is None
    assert found["left_out"] == {"None": 2, "'SAFE'": 1, "1": 1, "[]": 1, "(none)": 1}
    assert "left out 2 rows with the label None" in run("eval", source, "--bundle", tiny_bundle, *THREADS).stderr


def test_a_label_for_every_row_does_not_fill_the_report(tmp_path: Path, tiny_bundle: Path) -> None:
    rows = [PROMPTS[0], *({"prompt": "hi", "label": f"class {i}"} for i in range(50))]
    left_out = measure(write_rows(tmp_path / "in.jsonl", rows), "--bundle", tiny_bundle)["left_out"]
    assert len(left_out) == 21
    assert sum(left_out.values()) == 50


def test_the_target_field_says_what_the_label_judges(tmp_path: Path, tiny_bundle: Path) -> None:
    pair = {"prompt": "hi", "response": "ho", "label": "safe"}
    rows = [{**pair, "target": "prompt"}, {**pair, "target": "response"}, pair]
    metrics = measure(write_rows(tmp_path / "in.jsonl", rows), "--bundle", tiny_bundle)["metrics"]
    assert (metrics["prompt"]["n"], metrics["response"]["n"]) == (1, 2)


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        ('{"prompt": "hi", "target": "response", "label": "safe"}', "the row has none"),
        ('{"prompt": "hi", "target": "Prompt", "label": "safe"}', "expected prompt or response, found 'Prompt'"),
        ('{"prompt": "", "label": "safe"}', "nothing to judge"),
        ('{"prompt": "hi", "label": "safe"', "invalid JSON"),
    ],
)
def test_a_row_that_cannot_be_judged_fails_the_run(line: str, reason: str, tmp_path: Path, tiny_bundle: Path) -> None:
    data = "".join(json.dumps(row) + "\n" for row in PROMPTS) + line
    found = measure("-", "--bundle", tiny_bundle, code=1, stdin=data.encode())
    assert found["failed"] == 1
    assert found["metrics"]["overall"]["n"] == len(PROMPTS)
    shown = run("eval", "-", "--bundle", tiny_bundle, *THREADS, stdin=data)
    assert (shown.exit_code, reason in shown.stderr, "-:31:" in shown.stderr) == (1, True, True)


@pytest.mark.parametrize("rows", [[], [{"prompt": "hi"}], [{"prompt": "hi", "label": "toxic"}]])
def test_nothing_to_measure_is_an_error(rows: list[dict[str, Any]], tmp_path: Path, tiny_bundle: Path) -> None:
    result = run("eval", write_rows(tmp_path / "in.jsonl", rows), "--bundle", tiny_bundle, *THREADS)
    assert (result.exit_code, result.stdout) == (1, "")
    assert "no row could be measured" in result.stderr


def test_an_engine_that_always_fails_measures_nothing(
    tmp_path: Path, tiny_bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise EngineError("not finite")

    monkeypatch.setattr(Guard, "classify_many", fail)
    source = write_rows(tmp_path / "in.jsonl", PROMPTS[:3])
    result = run("eval", source, "--bundle", tiny_bundle, *THREADS)
    assert (result.exit_code, result.stdout) == (1, "")
    assert result.stderr.count("not finite") == 3


def test_gzip(tmp_path: Path, tiny_bundle: Path) -> None:
    source = write_rows(tmp_path / "in.jsonl", PROMPTS)
    packed = tmp_path / "in.jsonl.gz"
    packed.write_bytes(gzip.compress(source.read_bytes()))
    assert measure(packed, "--bundle", tiny_bundle) == measure(source, "--bundle", tiny_bundle)


def test_one_class_only_has_no_figure_for_the_other(tmp_path: Path, tiny_bundle: Path) -> None:
    source = write_rows(tmp_path / "in.jsonl", [row for row in PROMPTS if row["label"] == "safe"])
    metrics = measure(source, "--bundle", tiny_bundle)["metrics"]["overall"]
    assert (metrics["f1"], metrics["recall"], metrics["auprc"]) == (None, None, None)
    assert metrics["fpr"] is not None
    lines = run("eval", source, "--bundle", tiny_bundle, *THREADS).stdout.splitlines()
    assert next(line for line in lines if " recall " in line).split()[-2] == "-"


def test_the_table(tmp_path: Path, tiny_bundle: Path) -> None:
    both = write_rows(tmp_path / "both.jsonl", [*PROMPTS, *RESPONSES])
    shown = run("eval", both, "--bundle", tiny_bundle, *THREADS).stdout
    for word in ("tiny@0.0.1 at balanced", "overall", "prompt", "response", "50 (17)", "auprc", "ece", "fpr"):
        assert word in shown
    prompts = run("eval", write_rows(tmp_path / "one.jsonl", PROMPTS), "--bundle", tiny_bundle, *THREADS).stdout
    assert "prompt" in prompts
    assert "overall" not in prompts, "with one target, overall says the same again"


def test_text_too_long_to_read_is_counted(tmp_path: Path, tiny_bundle: Path) -> None:
    source = write_rows(tmp_path / "in.jsonl", [PROMPTS[0], {"prompt": "long " * 999, "label": "safe"}])
    assert measure(source, "--bundle", tiny_bundle)["truncated"] == 1
    assert "1 rows were too long" in run("eval", source, "--bundle", tiny_bundle, *THREADS).stderr


@pytest.mark.parametrize(
    ("args", "code"), [([], 2), (["missing.jsonl"], 1), (["-", "--bootstrap", "-1"], 2), (["-", "--engine", "x"], 1)]
)
def test_exit_codes(args: list[str], code: int, tiny_bundle: Path) -> None:
    assert run("eval", *args, "--bundle", tiny_bundle, stdin=b"").exit_code == code
