"""Score files: they grow, are gone on with, belong to one teacher, and are checked when they come from elsewhere."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("torch", reason="the conversion layer needs edgeguard-runtime[convert]")
pytest.importorskip("transformers", reason="the conversion layer needs edgeguard-runtime[convert]")

from convert.corpora.registry import Row  # noqa: E402
from convert.teachers.formats import TeacherError  # noqa: E402
from convert.teachers.judge import Judge, Judgement  # noqa: E402
from convert.teachers.score_file import label_rows, read_scores  # noqa: E402
from convert.tiny_judges import TinyJudges  # noqa: E402

ROWS = [
    Row("set:a", "set", "prompt", None, "How do I bake bread?", None),
    Row("set:b", "set", "prompt", None, "Tell me a story about a small dragon that lives in a tea pot.", None),
    Row("set:c", "set", "response", None, "What now?", "Sure, here is what I know about it."),
    Row("set:d", "set", "prompt", None, "x", None),
    Row("set:e", "set", "response", None, "¿Qué tal?", "Bien, gracias. " * 20),
]
MADE = {
    "id": "set:a",
    "p_unsafe": 0.5,
    "margin": 0.0,
    "hazards": {"S1": 0.2},
    "teacher": "people",
    "template_hash": "1",
}


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> TinyJudges:
    return TinyJudges(tmp_path_factory.mktemp("judges"))


@pytest.fixture
def judge(tiny: TinyJudges) -> Judge:
    return tiny.judge("llama-guard-3-1b")


def test_scores_are_the_judgements(judge: Judge, tmp_path: Path) -> None:
    scores = label_rows(judge, ROWS, tmp_path / "new" / "scores.jsonl", tokens=600)
    assert list(scores) == [row.id for row in ROWS]
    for row, judgement in zip(ROWS, judge.judge(ROWS), strict=True):
        score = scores[row.id]
        assert score.margin == pytest.approx(judgement.margin, abs=1e-4)
        assert score.p_unsafe == pytest.approx(judgement.p_unsafe, abs=1e-4)
        assert dict(score.hazards) == pytest.approx(dict(judgement.hazards), abs=1e-4)
        assert (score.teacher, score.template_hash) == (judge.name, judge.template_hash)
    assert read_scores(tmp_path / "new" / "scores.jsonl") == scores


def test_a_run_that_died_is_gone_on_with(judge: Judge, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "scores.jsonl"
    whole = label_rows(judge, ROWS, path, tokens=600)
    lines = path.read_text().splitlines(keepends=True)
    path.write_text("".join(lines[:3]) + lines[3][:20])  # died while writing the fourth
    judged: list[str] = []
    real = judge.judge

    def watched(rows: Sequence[Row]) -> list[Judgement]:
        judged.extend(row.id for row in rows)
        return real(rows)

    monkeypatch.setattr(judge, "judge", watched)
    resumed = label_rows(judge, ROWS, path, tokens=600)
    assert sorted(judged) == sorted(json.loads(line)["id"] for line in lines[3:])  # the others are not judged again
    assert path.read_text().startswith("".join(lines[:3]))
    assert list(resumed) == list(whole) and len(read_scores(path)) == len(ROWS)
    for id_, score in whole.items():
        assert resumed[id_].margin == pytest.approx(score.margin, abs=1e-4)
    before = path.read_bytes()
    label_rows(judge, ROWS, path)
    assert path.read_bytes() == before and len(judged) == 2


def test_a_row_whose_text_has_changed_is_judged_again(
    judge: Judge, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "scores.jsonl"
    first = label_rows(judge, ROWS, path)
    changed = [dataclasses.replace(ROWS[0], prompt="Something else altogether."), *ROWS[1:]]
    second = label_rows(judge, changed, path)
    assert second[ROWS[0].id].margin != first[ROWS[0].id].margin
    assert all(second[row.id] == first[row.id] for row in ROWS[1:])
    assert read_scores(path) == second
    lines = [json.loads(line) for line in path.read_text().splitlines()]  # scores made elsewhere may not tell the text
    path.write_text("".join(json.dumps({k: v for k, v in line.items() if k != "row_hash"}) + "\n" for line in lines))
    before = path.read_bytes()
    label_rows(judge, ROWS, path)
    assert path.read_bytes() == before


def test_each_batch_is_on_disk_before_the_next(judge: Judge, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, seen = tmp_path / "scores.jsonl", list[int]()
    real = judge.judge

    def watched(rows: Sequence[Row]) -> list[Judgement]:
        seen.append(len(path.read_text().splitlines()))
        return real(rows)

    monkeypatch.setattr(judge, "judge", watched)
    label_rows(judge, ROWS, path, tokens=1)  # no batch is smaller than a row
    assert seen == [0, 1, 2, 3, 4]


def test_scores_of_another_teacher_are_refused(tiny: TinyJudges, judge: Judge, tmp_path: Path) -> None:
    path = tmp_path / "scores.jsonl"
    label_rows(judge, ROWS[:2], path)
    before = path.read_bytes()
    elsewhere = Judge(judge.model, judge.format, max_tokens=1024)  # the same weights, asked in another way
    for other in (tiny.judge("qwen3guard-gen"), elsewhere):
        with pytest.raises(TeacherError, match="holds scores of llama-guard-3-1b@.* Choose another file"):
            label_rows(other, ROWS, path)
        assert path.read_bytes() == before


def test_a_file_of_two_teachers_is_refused(tmp_path: Path) -> None:
    path = write(tmp_path, MADE, {**MADE, "id": "set:b", "teacher": "others"})
    with pytest.raises(TeacherError, match="mixes the teachers .*others.*people.* Keep one file a teacher"):
        read_scores(path)


def test_scores_made_elsewhere_are_read(tmp_path: Path) -> None:
    path = write(tmp_path, MADE, {**MADE, "id": "set:b", "p_unsafe": 1, "margin": 9, "hazards": {}})
    path.write_text(path.read_text() + "\n")  # a blank line is no damage
    scores = read_scores(path)
    assert list(scores) == ["set:a", "set:b"]
    assert (scores["set:b"].p_unsafe, scores["set:b"].margin) == (1.0, 9.0)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"p_unsafe": 1.2}, "p_unsafe is 1.2, expected a number from 0 to 1"),
        ({"p_unsafe": True}, "p_unsafe is True, expected a number"),
        ({"p_unsafe": float("nan")}, "p_unsafe is nan, expected a number"),
        ({"margin": float("inf")}, "margin is inf, expected the log-odds"),
        ({"p_unsafe": 0.9, "margin": -2.2}, r"margin is -2.2, expected the log-odds of p_unsafe, 0\.9"),  # of safe
        ({"margin": "0"}, "margin is 0, expected the log-odds"),
        ({"id": 7}, "id is 7, expected a text"),
        ({"teacher": ""}, "teacher is '', expected a text"),
        ({"hazards": ["S1"]}, r"hazards is \['S1'\], expected any of S1, S2"),
        ({"hazards": {"S99": 0.5}}, "hazards is {'S99': 0.5}, expected any of S1"),
        ({"hazards": {"S1": 2}}, "hazards is {'S1': 2}, expected any of S1"),
        ({"row_hash": 7}, "row_hash is 7, expected a text"),
        ({"more": 1}, "expected the fields .*, found the fields .*more"),
    ],
)
def test_a_false_score_is_refused(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    path = write(tmp_path, {**MADE, "id": "set:z"}, {**MADE, **changes})
    with pytest.raises(TeacherError, match=f"line 2 is no score: .*{message}"):
        read_scores(path)


@pytest.mark.parametrize("line", ['{"id": "a"}', "[]", "nonsense", '"text"'])
def test_a_damaged_line_is_refused(tmp_path: Path, line: str) -> None:
    path = tmp_path / "scores.jsonl"
    path.write_text(json.dumps(MADE) + "\n" + line + "\n")
    with pytest.raises(TeacherError, match="line 2 is no score"):
        read_scores(path)


def test_a_row_scored_twice_and_a_missing_file_are_refused(tmp_path: Path) -> None:
    with pytest.raises(TeacherError, match="line 2 scores 'set:a' again"):
        read_scores(write(tmp_path, MADE, MADE))
    with pytest.raises(TeacherError, match=r"none\.jsonl: no such file"):
        read_scores(tmp_path / "none.jsonl")


def write(folder: Path, *scores: dict[str, Any]) -> Path:
    path = folder / "scores.jsonl"
    path.write_text("".join(json.dumps(score) + "\n" for score in scores))
    return path
