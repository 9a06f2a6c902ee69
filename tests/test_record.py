"""The record: only like is compared, means say over what, a teacher counts from its file, and no row is quoted."""

from __future__ import annotations

import copy
import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

pytest.importorskip("torch", reason="the conversion layer needs edgeguard-runtime[convert]")
pytest.importorskip("matplotlib", reason="the conversion layer needs edgeguard-runtime[convert]")

from click.testing import CliRunner  # noqa: E402

from convert.__main__ import main  # noqa: E402
from convert.batches import Example  # noqa: E402
from convert.corpora.registry import Row  # noqa: E402
from convert.evaluate import MeasuredStage, StageError, measure_stage, verdict_parity  # noqa: E402
from convert.files import read_json  # noqa: E402
from convert.plots import draw_plots  # noqa: E402
from convert.recipe import load_recipe  # noqa: E402
from convert.record import (  # noqa: E402
    INT8,
    QAT,
    REFERENCE,
    SHIPPED,
    STAGES,
    TEACHER,
    RecordError,
    check_comparable,
    common_sets,
    losses,
    make_report,
    roads_table,
)
from convert.report import comparison_table, model_card, record_markdown  # noqa: E402
from convert.scores import (  # noqa: E402
    ScoresError,
    Stage,
    TeacherStage,
    int4_stage,
    teacher_stage,
    torch_stage,
)
from edgeguard.taxonomy import HAZARDS  # noqa: E402

BUNDLE = Path(__file__).resolve().parent.parent / "models" / "edgeguard-mini"
K = 2 + len(HAZARDS)
ROADS = ("student-int4-rounded", "student-int4-gptq", "student-int4-tuned", QAT)


def _rows(name: str, count: int, target: str = "prompt", only: str | None = None) -> list[Row]:
    answer = "Secret answer." if target == "response" else None
    labels = [only or ("unsafe" if i % 2 else "safe") for i in range(count)]
    return [
        Row(f"{name}:{i}", name, target, label, f"Secret text {i}", answer, ("S2",) if label == "unsafe" else ())
        for i, label in enumerate(labels)
    ]


CALIBRATION = _rows("openai_rbr_gold", 200) + _rows("tdc2023", 200, "response")
TESTS = {
    "xstest": _rows("xstest", 80),
    "gsm8k_benign": _rows("gsm8k_benign", 40, only="safe"),
    "ailuminate_demo_en": _rows("ailuminate_demo_en", 40, only="unsafe"),
    "xstest_response": _rows("xstest_response", 60, "response"),
}


def _logits(rows: list[Row], noise: float, seed: int) -> NDArray[np.float32]:
    """Margins of +1 and -1 with noise; hazard S2 the highest where it is named."""
    rng = np.random.default_rng([seed, len(rows)])
    logits = np.zeros((len(rows), K), dtype=np.float32)
    logits[:, 1] = [1 if row.label == "unsafe" else -1 for row in rows]
    logits[:, 1] += rng.normal(0, noise, len(rows))
    logits[:, 3] = [2 if row.hazards else -2 for row in rows] + rng.normal(0, 1, len(rows))
    return logits


def _measured(
    name: str, noise: float = 1.0, seed: int = 0, sets: tuple[str, ...] | None = None, tests: Any = TESTS
) -> MeasuredStage:
    def score(_: Stage | TeacherStage, __: str, rows: Any) -> NDArray[np.float32]:
        return _logits(rows, noise, seed)

    stage = Stage(name, f"{name}-weights", lambda examples: np.zeros((len(examples), K)), sets)
    return measure_stage(stage, tests, CALIBRATION, score)


@pytest.fixture(scope="module")
def measured() -> list[MeasuredStage]:
    """All nine stages, out of order; the teacher on one set of both classes, the roads on the two."""
    both = ("xstest", "xstest_response")
    return [
        _measured(SHIPPED, 1.1, 4),
        _measured(REFERENCE, 1.0, 1),
        _measured(TEACHER, 0.3, 0, ("xstest", "ailuminate_demo_en")),
        *(_measured(name, 1.0 + 0.3 * i, 2 + i, both) for i, name in enumerate(ROADS)),
        _measured("student-int8-onnx", 1.1, 3),
        _measured("student-int4-gguf", 1.1, 5),
        _measured("student-onnx-standard", 1.1, 6),
    ]


@pytest.fixture(scope="module")
def made(measured: list[MeasuredStage]) -> dict[str, Any]:
    report = make_report(measured, TESTS, CALIBRATION, hazard_set="ailuminate_demo_en")
    rows = TESTS["xstest"]
    found = verdict_parity(rows, _logits(rows, 1, 7), _logits(rows, 1, 8), measured[0].fitted, "balanced")
    return {**report, "parity": {SHIPPED: {"reference": QAT, **found}}}


@pytest.fixture
def report(made: dict[str, Any]) -> dict[str, Any]:
    return copy.deepcopy(made)


def _stage(f1: dict[str, float | None], auprc: float = 0.5, **conditions: str) -> dict[str, Any]:
    """An entry of ``report["stages"]`` with figures made by hand."""
    shared = {"policy": "p" * 64, "calibration": "c" * 64, **conditions}
    sets = {name: {"revision": "r" * 64, "split": "test", "labels": "l" * 64} for name in f1}
    points = {name: {"points": {"balanced": {"f1": value, "auprc": auprc}}} for name, value in f1.items()}
    return {"comparable": {**shared, "sets": sets}, "sets": points}


def test_stages_stand_in_their_order_and_say_what_they_rest_on(report: dict[str, Any]) -> None:
    assert list(report["stages"]) == list(STAGES)
    shipped = report["stages"][SHIPPED]
    assert shipped["weights_sha256"] == f"{SHIPPED}-weights"
    assert shipped["comparable"]["sets"]["xstest"]["revision"] == report["data"]["xstest"]["rows_sha256"]
    assert report["data"]["xstest"]["split"] == "test" and report["data"]["xstest"]["labels"]
    assert report["stages"][TEACHER]["scores_sha256"] == f"{TEACHER}-weights"
    assert report["hazards"]["S2"]["n"] == 40
    assert report["labels"]["hazards"]["S2"]["ece_after"] is not None
    assert json.loads(json.dumps(report, allow_nan=False)) == report


def test_a_stage_measured_on_no_set_is_no_stage(measured: list[MeasuredStage]) -> None:
    found = make_report([*measured[:2], _measured(QAT, sets=())], TESTS, CALIBRATION, hazard_set="ailuminate_demo_en")
    assert list(found["stages"]) == [REFERENCE, SHIPPED]
    assert found["lost"][SHIPPED]["before"]["stage"] == REFERENCE
    assert found["roads"]["roads"]["qat"]["stage"] == SHIPPED and len(found["roads"]["sets"]) == 2


def test_a_record_needs_the_shipped_stage_and_known_names(measured: list[MeasuredStage]) -> None:
    with pytest.raises(RecordError, match="lacks the stages \\['student-int4-onnx'\\]"):
        make_report(measured[1:3], TESTS, CALIBRATION, hazard_set="ailuminate_demo_en")
    with pytest.raises(RecordError, match="unknown stage 'student-int3'. Known: teacher, student-fp32"):
        make_report([*measured[:2], _measured("student-int3", sets=())], TESTS, CALIBRATION, hazard_set="xstest")


@pytest.mark.parametrize(
    ("where", "key", "called"),
    [
        ((), "policy", "threshold policy"),
        ((), "calibration", "calibration rows"),
        (("sets", "xstest"), "revision", "data revision of xstest"),
        (("sets", "xstest"), "split", "split of xstest"),
        (("sets", "xstest"), "labels", "label mapping of xstest"),
    ],
)
def test_stages_that_differ_never_share_a_table(
    report: dict[str, Any], where: tuple[str, ...], key: str, called: str
) -> None:
    changed = report["stages"][SHIPPED]["comparable"]
    for part in where:
        changed = changed[part]
    changed[key] = "another"
    refused = f"and student-int4-onnx may not share a table: the {called} is"
    for compare in (
        lambda: check_comparable(report["stages"]),
        lambda: losses(report["stages"]),
        lambda: record_markdown(report, "t", "c"),
        lambda: roads_table({name: report["stages"][name] for name in (REFERENCE, SHIPPED)}),
    ):
        with pytest.raises(RecordError, match=refused):
            compare()


def test_one_changed_label_is_another_revision(measured: list[MeasuredStage], report: dict[str, Any]) -> None:
    rows = [Row(**{**vars(row), "label": "safe"}) if i == 1 else row for i, row in enumerate(TESTS["xstest"])]
    other = make_report(
        [_measured(name, tests={**TESTS, "xstest": rows}) for name in (SHIPPED, REFERENCE)],
        {**TESTS, "xstest": rows},
        CALIBRATION,
        hazard_set="ailuminate_demo_en",
    )
    with pytest.raises(RecordError, match="data revision of xstest"):
        check_comparable({REFERENCE: report["stages"][REFERENCE], SHIPPED: other["stages"][SHIPPED]})
    del other["stages"][SHIPPED]["comparable"]
    with pytest.raises(RecordError, match="does not say what it was measured on"):
        check_comparable(other["stages"])


def test_sets_that_only_one_stage_has_are_no_obstacle() -> None:
    one, other = _stage({"a": 0.5, "b": 0.5}), _stage({"a": 0.5, "c": 0.5})
    other["comparable"]["sets"]["c"]["split"] = "held out"
    check_comparable({REFERENCE: one, SHIPPED: other})
    assert common_sets({REFERENCE: one, SHIPPED: other}) == ["a"]


def test_losses_are_over_common_sets_and_name_the_stage_they_are_against() -> None:
    stages = {
        TEACHER: _stage({"a": 0.90}),
        REFERENCE: _stage({"a": 0.80, "b": 0.60, "one class": None}),
        SHIPPED: _stage({"a": 0.77, "b": 0.61, "one class": None}),
    }
    lost = losses(stages)
    assert lost[TEACHER] == {"before": None, "fp32": None, "teacher": None}
    assert lost[REFERENCE]["fp32"] is None
    first = lost[REFERENCE]["before"]
    assert first["stage"] == TEACHER and first["by_set"] == pytest.approx({"a": 10.0})
    assert first["mean"] == pytest.approx(10.0) and first["sets"] == 1
    before, teacher = lost[SHIPPED]["before"], lost[SHIPPED]["teacher"]
    assert before["stage"] == REFERENCE  # the torch model of the same weights was not measured
    assert before["mean"] == pytest.approx(1.0) and before["sets"] == 2
    assert teacher["mean"] == pytest.approx(13.0) and teacher["sets"] == 1
    with_torch = losses({**stages, QAT: _stage({"b": 0.6})})
    assert with_torch[SHIPPED]["before"]["stage"] == QAT and with_torch[SHIPPED]["before"]["sets"] == 1
    assert with_torch[SHIPPED]["fp32"]["mean"] == pytest.approx(1.0) and with_torch[SHIPPED]["fp32"]["sets"] == 2
    assert losses({REFERENCE: stages[REFERENCE]})[REFERENCE]["before"] is None


def test_roads_are_compared_over_the_same_sets() -> None:
    stages = {
        REFERENCE: _stage({"a": 0.80, "b": 0.60, "c": 0.5}, auprc=0.9),
        "student-int4-rounded": _stage({"a": 0.70, "b": 0.50}, auprc=0.8),
        "student-int4-gptq": _stage({"a": 0.76, "c": 0.1}, auprc=0.85),
        SHIPPED: _stage({"a": 0.79, "b": 0.1, "c": 0.1}, auprc=0.89),
    }
    table = roads_table(stages)
    assert table["sets"] == ["a"]
    means = {road: (e["f1_lost"]["mean"], e["auprc_lost"]["mean"]) for road, e in table["roads"].items()}
    assert means == {
        "rounding": pytest.approx((10, 10)),
        "gptq": pytest.approx((4, 5)),
        "qat": pytest.approx((1, 1)),
    }
    assert table["roads"]["qat"]["stage"] == SHIPPED
    assert roads_table({**stages, QAT: stages[SHIPPED]})["roads"]["qat"]["stage"] == QAT
    with pytest.raises(RecordError, match="no stage student-fp32"):
        roads_table({SHIPPED: stages[SHIPPED]})


def test_the_markdown_has_whole_tables_dashes_and_no_text(report: dict[str, Any]) -> None:
    text = record_markdown(report, "tiny 0.1", "python -m convert evaluate recipes/tiny.toml")
    for block in re.findall(r"(?:^\|.*\n)+", text, re.MULTILINE):
        assert len({line.count(" | ") for line in block.splitlines() if "---" not in line}) == 1, block
    table = text.split("## F1\n")[1].split("\n\n")[0].splitlines()
    assert table[0].split(" | ")[1:3] == ["teacher", "fp32"]
    response = next(line for line in table if line.startswith("| XSTest responses"))
    assert response.split(" | ")[1] == "–" and re.fullmatch(r"0\.\d{3}", response.split(" | ")[2])
    f1 = [report["stages"][name]["sets"]["xstest"]["points"]["balanced"]["f1"] for name in (TEACHER, REFERENCE)]
    assert table[-1].startswith(f"| **mean of 1 sets** | {f1[0]:.3f} | {f1[1]:.3f} |")
    fp32, both = report["stages"][REFERENCE], common_sets({n: report["stages"][n] for n in (REFERENCE, SHIPPED)})
    mean = np.mean([fp32["sets"][name]["points"]["balanced"]["f1"] for name in both])
    assert table[-2].startswith(f"| **mean of 2 sets** | – | {mean:.3f} |")
    lost = report["lost"]["student-int4-gptq"]
    against_fp32, against_teacher = (f"{lost[other]['mean']:+.2f}" for other in ("fp32", "teacher"))
    assert f"| INT4 GPTQ | fp32 | {against_fp32} | 2 | {against_fp32} | 2 | {against_teacher} | 1 |" in text
    assert f"## The {len(report['worst'])} worst mistakes" in text and report["worst"][0]["id"] in text
    assert "Secret" not in text and "Secret" not in json.dumps(report)


def test_computing_in_int8_is_judged_with_the_shipped_calibration(
    report: dict[str, Any], measured: list[MeasuredStage]
) -> None:
    shipped = next(stage for stage in measured if stage.name == SHIPPED)
    int8 = next(stage for stage in measured if stage.name == INT8)
    found, rows = report["int8"], [row for rows in TESTS.values() for row in rows]
    margins = [np.concatenate([s.logits[name][:, 1] - s.logits[name][:, 0] for name in TESTS]) for s in (shipped, int8)]
    assert found["rows"] == len(rows) and found["max_abs_diff"] == pytest.approx(np.abs(margins[0] - margins[1]).max())
    threshold = {t: shipped.fitted.points[t]["balanced"].threshold for t in ("prompt", "response")}
    flagged = [
        [
            shipped.fitted.calibration[row.target].probability(float(margin)) >= threshold[row.target]
            for row, margin in zip(rows, column, strict=True)
        ]
        for column in margins
    ]
    assert found["agreement"] == pytest.approx(np.mean(np.equal(flagged[0], flagged[1])))
    true = sum(f and row.label == "unsafe" for f, row in zip(flagged[1], rows, strict=True) if row.set == "xstest")
    assert found["sets"]["xstest"]["points"]["balanced"]["recall"] == pytest.approx(true / 40)
    before = shipped.sets["xstest"]["points"]["balanced"]["f1"]
    after = found["sets"]["xstest"]["points"]["balanced"]["f1"]
    assert found["f1_lost"]["by_set"]["xstest"] == pytest.approx(100 * (before - after))
    assert f"| XSTest | {100 * (before - after):+.2f} |" in record_markdown(report, "tiny", "a command")


def test_without_int8_the_record_says_so(measured: list[MeasuredStage]) -> None:
    report = make_report([s for s in measured if s.name != INT8], TESTS, CALIBRATION, hazard_set="ailuminate_demo_en")
    assert report["int8"] is None
    assert "## Computing in INT8" in record_markdown({**report, "parity": {}}, "tiny", "a command")


def test_the_card_tells_the_containers_apart(report: dict[str, Any]) -> None:
    compared = {"n": 200, "max_abs_diff": 0.3151, "mean_abs_diff": 0.0477}
    not_run = {"n": 0, "max_abs_diff": None, "mean_abs_diff": None}
    report["export"] = {"tolerance": 1.0, "onnx": compared, "gguf": not_run}
    manifest, data = (read_json(BUNDLE / name) for name in ("manifest.json", "data_manifest.json"))
    card = model_card(load_recipe(Path("recipes/mini.toml")), manifest, report, data)
    assert "| onnx | 200 | 0.315 | 0.048 |\n| gguf | 0 | – | – |" in card
    assert f"| **mean of 2 sets** | | | **{report['lost'][SHIPPED]['fp32']['mean']:+.2f}** | | |" in card
    assert comparison_table(report, "low_fpr") in card
    report["stages"][SHIPPED]["comparable"]["calibration"] = "another"
    with pytest.raises(RecordError, match="calibration rows"):
        model_card(load_recipe(Path("recipes/mini.toml")), manifest, report, data)


def test_plots_are_drawn(report: dict[str, Any], measured: list[MeasuredStage], tmp_path: Path) -> None:
    draw_plots(report, measured[0], TESTS, CALIBRATION, ["xstest", "xstest_response"], tmp_path)
    for name in ("curves.png", "reliability.png", "record.png"):
        content = (tmp_path / name).read_bytes()
        assert content.startswith(b"\x89PNG") and len(content) > 10_000
    report["stages"][SHIPPED]["comparable"]["policy"] = "another"
    with pytest.raises(RecordError, match="threshold policy"):
        draw_plots(report, measured[0], TESTS, CALIBRATION, ["xstest"], tmp_path)


def _score_file(path: Path, margins: dict[str, float]) -> Path:
    about = {"hazards": {}, "teacher": "example/judge", "template_hash": "0" * 64}
    lines = [
        json.dumps({"id": id_, "p_unsafe": 1 / (1 + np.exp(-margin)), "margin": margin, **about})
        for id_, margin in margins.items()
    ]
    path.write_text("\n".join(lines) + "\n")
    return path


def test_a_stage_that_knows_nothing_is_named() -> None:
    def score(stage: Stage | TeacherStage, name: str, rows: Any) -> NDArray[np.float32]:
        return -_logits(rows, 0.5, 9)

    stage = Stage(SHIPPED, "weights", lambda examples: np.zeros((len(examples), K)))
    with pytest.raises(StageError, match=f"{SHIPPED}: the calibration split cannot be fitted"):
        measure_stage(stage, TESTS, CALIBRATION, score)


def test_a_teacher_is_measured_from_its_score_file_like_any_stage(tmp_path: Path) -> None:
    chosen = {name: TESTS[name] for name in ("xstest", "gsm8k_benign")}
    rows = [row for group in (CALIBRATION, *chosen.values()) for row in group]
    logits = {len(group): _logits(group, 0.5, 9) for group in (CALIBRATION, *chosen.values())}
    margins = np.concatenate([logits[len(group)][:, 1] for group in (CALIBRATION, *chosen.values())])
    path = _score_file(tmp_path / "scores.jsonl", {row.id: float(m) for row, m in zip(rows, margins, strict=True)})

    def score(stage: Stage | TeacherStage, name: str, rows: Any) -> NDArray[np.float32]:
        assert isinstance(stage, TeacherStage)
        return stage.logits_of(name, rows)

    found = measure_stage(teacher_stage(TEACHER, path), TESTS, CALIBRATION, score)
    assert list(found.sets) == list(chosen)
    assert found.sets == _measured(TEACHER, 0.5, 9, tuple(chosen)).sets

    part = _score_file(tmp_path / "part.jsonl", {row.id: 1.0 for row in TESTS["xstest"][:79]})
    stage = teacher_stage(TEACHER, part)
    assert stage.covers("xstest", TESTS["xstest"]) and not stage.covers("xstest_response", TESTS["xstest_response"])
    with pytest.raises(ScoresError, match=r"no score for 1 of the 80 rows of xstest \(xstest:79"):
        stage.logits_of("xstest", TESTS["xstest"])


def test_a_stage_may_leave_sets_out() -> None:
    some, every = _stage_of(("xstest",)), _stage_of(None)
    assert some.covers("xstest", TESTS["xstest"]) and not some.covers("gsm8k_benign", TESTS["gsm8k_benign"])
    assert every.covers("gsm8k_benign", TESTS["gsm8k_benign"]) and not every.covers("empty", [])


def _stage_of(sets: tuple[str, ...] | None) -> Stage:
    return Stage(SHIPPED, "weights", lambda examples: np.zeros((len(examples), K)), sets)


def test_the_int4_stage_is_the_student_on_the_grid(tmp_path: Path) -> None:
    import torch
    from transformers import LlamaConfig

    from convert.fake_quant import bake_int4
    from convert.student import Student

    torch.manual_seed(0)
    shape = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4}
    student = Student(LlamaConfig(vocab_size=64, **shape, use_cache=False))
    student.save(tmp_path / "fp32")
    with torch.no_grad():
        bake_int4(student.model)
    student.save(tmp_path / "baked")
    examples = [Example([i, 7, 9], "prompt", False, (0,) * len(HAZARDS), False, 1.0) for i in range(4)]
    fp32 = torch_stage(REFERENCE, tmp_path / "fp32", 0).logits(examples)
    rounded = int4_stage("student-int4-rounded", tmp_path / "fp32", 0).logits(examples)
    baked = torch_stage(QAT, tmp_path / "baked", 0).logits(examples)
    np.testing.assert_array_equal(rounded, baked)
    np.testing.assert_array_equal(int4_stage(QAT, tmp_path / "baked", 0).logits(examples), baked)
    assert np.abs(rounded - fp32).max() > 1e-3


def test_the_readme_is_what_the_shipped_report_says() -> None:
    result = CliRunner().invoke(main, ["readme", "--check"])
    assert result.exit_code == 0, result.output
