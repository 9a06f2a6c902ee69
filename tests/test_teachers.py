"""Teachers: known formats, judges of the real architectures, score files, and a teacher trained here."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="the conversion layer needs edgeguard-runtime[convert]")
pytest.importorskip("transformers", reason="the conversion layer needs edgeguard-runtime[convert]")

from tiny_judges import ARCHITECTURES, write_judge  # noqa: E402

from convert.corpora.registry import Row  # noqa: E402
from convert.teachers.formats import TeacherError, find_format, load_formats  # noqa: E402
from convert.teachers.judge import Judge  # noqa: E402
from convert.teachers.score_file import label_rows, read_scores  # noqa: E402
from convert.teachers.transformers_model import TransformersModel  # noqa: E402

TEXTS = ["How do I bake bread?", "Tell me a story about a very small dragon that lives in a tea pot.", "x", "¿Qué tal?"]
ROWS = [Row(f"set:{i}", "set", "prompt", None, text, None) for i, text in enumerate(TEXTS)] + [
    Row(f"set:r{i}", "set", "response", None, text, "Sure, here is what I know about it.") for i, text in enumerate(TEXTS)
]


@pytest.fixture(scope="module")
def judges(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A tiny judge of every known format."""
    root = tmp_path_factory.mktemp("judges")
    return {name: write_judge(root / name, name) for name in ARCHITECTURES}


@pytest.mark.parametrize("name", list(load_formats()))
def test_a_text_never_brings_control_tokens(name: str) -> None:
    form = load_formats()[name]
    policy = form.policies[0] if form.policies else None
    hostile = " ".join(form.control) + " {conversation} {prompt} {policy}"
    for messages in ([("user", "hello")], [("user", "hello"), ("assistant", "good day")]):
        plain = form.render(messages, policy)
        attacked = form.render([(role, hostile) for role, _ in messages], policy)
        assert [p.text for p in attacked if p.control] == [p.text for p in plain if p.control]
        assert sum(p.text.count(hostile) for p in attacked if not p.control) == len(messages)


@pytest.mark.parametrize("name", list(load_formats()))
def test_pieces_encode_as_the_whole_prompt_does(judges: dict[str, Path], name: str) -> None:
    form = load_formats()[name]
    model = TransformersModel(str(judges[name]))
    judge = Judge(model, form)
    policy = form.policies[0] if form.policies else None
    for row in ROWS:
        whole = "".join(piece.text for piece in form.render(row.messages(), policy))
        assert judge._ids(row.messages(), policy) == model._tokenizer(whole, add_special_tokens=False).input_ids


@pytest.mark.parametrize("name", list(load_formats()))
def test_a_judge_reads_alike_alone_and_in_a_batch(judges: dict[str, Path], name: str) -> None:
    judge = Judge(TransformersModel(str(judges[name])), find_format(name))
    assert judge.mass > 0.9
    together = judge.judge(ROWS)
    for row, judgement in zip(ROWS, together, strict=True):
        (alone,) = judge.judge([row])
        assert alone.margin == pytest.approx(judgement.margin, abs=1e-3)
        assert dict(alone.hazards) == pytest.approx(dict(judgement.hazards), abs=1e-4)
        assert 0 < judgement.p_unsafe < 1 and judgement.mass > 0.9
    assert len({round(j.margin, 3) for j in together}) > len(TEXTS)  # it depends on the text
    named = bool(find_format(name).hazard_answers or find_format(name).policies)
    assert bool(together[0].hazards) == named


def test_the_cache_gives_what_a_whole_pass_gives(judges: dict[str, Path]) -> None:
    model = TransformersModel(str(judges["wildguard"]))
    form = find_format("wildguard")
    row = ROWS[-1]
    (judgement,) = Judge(model, form).judge([row])
    ids = model.encode("".join(piece.text for piece in form.render(row.messages())))
    ids = Judge(model, form)._ids(row.messages(), None)
    for step in form.steps["response"][:-1]:
        logp = model.start([ids + model.encode(step.ask)])[0]
        firsts = [model.encode(step.ask + c)[len(model.encode(step.ask))] for c in step.choices]
        ids += model.encode(step.ask + step.choices[int(np.argmax(logp[firsts]))])
    ask = form.steps["response"][-1].ask
    logp = model.start([ids + model.encode(ask)])[0]
    no, yes = (model.encode(ask + word)[len(model.encode(ask))] for word in (" no", " yes"))
    assert judgement.margin == pytest.approx(float(logp[yes] - logp[no]), abs=1e-3)


def test_hazards_come_from_what_follows_unsafe(judges: dict[str, Path]) -> None:
    model, form = TransformersModel(str(judges["llama-guard-3-8b"])), find_format("llama-guard-3-8b")
    judge = Judge(model, form)
    (judgement,) = judge.judge(ROWS[:1])
    ids = judge._ids(ROWS[0].messages(), None) + model.encode("unsafe\nS")
    probabilities = np.exp(model.start([ids])[0])
    for code, p in judgement.hazards.items():
        first = model.encode(f"unsafe\n{code}")[len(model.encode("unsafe\nS"))]
        assert p == pytest.approx(float(probabilities[first]), abs=1e-5)


def test_a_judge_that_says_something_else_there_is_refused(tmp_path: Path) -> None:
    write_judge(tmp_path, "llama-guard-3-8b", says=[("", "\n\n")])
    with pytest.raises(TeacherError, match=r"hold 0\.0% of the probability.*Likeliest token ids.*blank line"):
        Judge(TransformersModel(str(tmp_path)), find_format("llama-guard-3-8b"))


def test_a_long_text_loses_its_middle(judges: dict[str, Path]) -> None:
    judge = Judge(TransformersModel(str(judges["llama-guard-3-8b"])), find_format("llama-guard-3-8b"), max_tokens=1500)
    row = Row("set:long", "set", "prompt", None, "begin " + "word " * 5000 + "end", None)
    assert 800 < judge.length(row) <= 1500
    text = judge.model._tokenizer.decode(judge._ids(row.messages(), None))  # type: ignore[attr-defined]
    assert "User: begin" in text and "end\n\n<END CONVERSATION>" in text
    with pytest.raises(TeacherError, match="its own words take more than 50 tokens"):
        Judge(judge.model, judge.format, max_tokens=50)


def test_scores_grow_and_resume(judges: dict[str, Path], tmp_path: Path) -> None:
    judge = Judge(TransformersModel(str(judges["llama-guard-3-8b"])), find_format("llama-guard-3-8b"))
    path = tmp_path / "scores.jsonl"
    whole = label_rows(judge, ROWS, path, tokens=2048)
    lines = path.read_text().splitlines()
    assert {json.loads(line)["id"] for line in lines} == {row.id for row in ROWS}
    path.write_text("\n".join(lines[:3]) + "\n" + lines[3][:20])  # died while writing the fourth
    resumed = label_rows(judge, ROWS, path, tokens=2048)
    assert list(resumed) == list(whole)
    for id_, score in whole.items():
        assert resumed[id_].margin == pytest.approx(score.margin, abs=1e-3)
    assert len(path.read_text().splitlines()) == len(ROWS) == len(read_scores(path))


def test_scores_of_another_teacher_are_refused(judges: dict[str, Path], tmp_path: Path) -> None:
    first = Judge(TransformersModel(str(judges["llama-guard-3-8b"])), find_format("llama-guard-3-8b"))
    other = Judge(TransformersModel(str(judges["llama-guard-3-1b"])), find_format("llama-guard-3-1b"))
    path = tmp_path / "scores.jsonl"
    label_rows(first, ROWS[:2], path)
    before = path.read_bytes()
    with pytest.raises(TeacherError, match="holds scores of llama-guard-3-8b@"):
        label_rows(other, ROWS, path)
    assert path.read_bytes() == before
    mixed = tmp_path / "mixed.jsonl"
    label_rows(other, ROWS[2:3], mixed)
    mixed.write_bytes(before + mixed.read_bytes())
    with pytest.raises(TeacherError, match="mixes the teachers"):
        read_scores(mixed)


@pytest.mark.parametrize("line", ['{"id": "a"}', "[]", "nonsense", '{"id": "a", "p_unsafe": 2}'])
def test_a_damaged_score_is_refused(tmp_path: Path, line: str) -> None:
    path = tmp_path / "scores.jsonl"
    path.write_text(line + "\n")
    with pytest.raises(TeacherError, match="line 1 is no score"):
        read_scores(path)


def test_unknown_formats_are_refused() -> None:
    assert find_format("meta-llama/Llama-Guard-3-8B").name == "llama-guard-3-8b"
    with pytest.raises(TeacherError, match=r"no template known for 'someone/else'.*guards\.toml"):
        find_format("someone/else")
