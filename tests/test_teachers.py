"""Known judges: their formats as data, and tiny models of the real architectures, asked and read as those say."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="the conversion layer needs edgeguard-runtime[convert]")
pytest.importorskip("transformers", reason="the conversion layer needs edgeguard-runtime[convert]")

from convert.corpora.registry import Row  # noqa: E402
from convert.teachers.formats import Policy, TeacherError, find_format, load_formats  # noqa: E402
from convert.teachers.judge import Judge, Judgement  # noqa: E402
from convert.teachers.transformers_model import TransformersModel  # noqa: E402
from convert.tiny_judges import ARCHITECTURES, TinyJudges, write_judge  # noqa: E402
from edgeguard.taxonomy import HAZARDS  # noqa: E402

TEXTS = ["How do I bake bread?", "Tell me a story about a very small dragon that lives in a tea pot.", "x", "¿Qué tal?"]
ROWS = [Row(f"set:{i}", "set", "prompt", None, text, None) for i, text in enumerate(TEXTS)] + [
    Row(f"set:r{i}", "set", "response", None, text, "Sure, here is what I know about it.")
    for i, text in enumerate(TEXTS)
]
GUARDS = pytest.mark.parametrize("name", list(ARCHITECTURES))


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> TinyJudges:
    return TinyJudges(tmp_path_factory.mktemp("judges"))


def first_policy(judge: Judge) -> Policy | None:
    return judge.format.policies[0] if judge.format.policies else None


def test_every_known_guard_has_a_tiny_judge() -> None:
    assert set(ARCHITECTURES) == set(load_formats())


@GUARDS
def test_a_text_never_brings_control_tokens(tiny: TinyJudges, name: str) -> None:
    judge, form = tiny.judge(name), load_formats()[name]
    hostile = " ".join((*form.control, *form.markers)) + " {conversation} {prompt} {policy}"
    policy, known = first_policy(judge), set(judge._control.values())
    for messages in ([("user", "hello")], [("user", "hello"), ("assistant", "good day")]):
        spelled = [(role, hostile) for role, _ in messages]
        plain, attacked = form.render(messages, policy), form.render(spelled, policy)
        assert [p.text for p in attacked if p.control] == [p.text for p in plain if p.control]
        assert sum(p.text.count(hostile) for p in attacked if not p.control) == len(messages)
        ids = [Counter(i for i in judge._ids(m, policy) if i in known) for m in (messages, spelled)]
        assert ids[0] == ids[1] and set(ids[0]) == known


@GUARDS
def test_pieces_encode_as_the_whole_prompt_does(tiny: TinyJudges, name: str) -> None:
    judge = tiny.judge(name)
    for row in ROWS:
        whole = "".join(piece.text for piece in judge.format.render(row.messages(), first_policy(judge)))
        assert judge._ids(row.messages(), first_policy(judge)) == tokens(judge, whole)


@GUARDS
def test_a_judge_reads_alike_alone_and_in_a_batch(tiny: TinyJudges, name: str) -> None:
    judge = tiny.judge(name)
    together = judge.judge(ROWS)
    for row, judgement in zip(ROWS, together, strict=True):
        (alone,) = judge.judge([row])
        assert alone.margin == pytest.approx(judgement.margin, abs=1e-4)
        assert dict(alone.hazards) == pytest.approx(dict(judgement.hazards), abs=1e-5)
        assert judgement.mass > 0.9
    # It reads the text: texts move the margin by far more than the tolerance above.
    assert np.std([j.margin for j in together[:4]]) > 5e-3 and np.std([j.margin for j in together[4:]]) > 5e-3


@GUARDS
def test_a_judge_says_what_a_plain_pass_over_the_whole_text_says(tiny: TinyJudges, name: str) -> None:
    """No cache, no padding, no pieces: the text as the real guard's own code would make it."""
    judge = tiny.judge(name)
    rows = [ROWS[1], ROWS[-1]]
    for row, judgement in zip(rows, judge.judge(rows), strict=True):
        expected = plain_judgement(judge, row)
        assert judgement.margin == pytest.approx(expected.margin, abs=1e-4)
        assert dict(judgement.hazards) == pytest.approx(dict(expected.hazards), abs=1e-5)
        assert judgement.mass == pytest.approx(expected.mass, abs=1e-5)


def plain_judgement(judge: Judge, row: Row) -> Judgement:
    form, answers = judge.format, []
    *before, verdict = form.steps[row.target]
    for policy in form.policies or [None]:
        text = prompt = "".join(piece.text for piece in form.render(row.messages(), policy))
        for step in before:
            text += step.ask
            text += max(step.choices, key=lambda choice: probability(judge, text, choice))  # noqa: B023 - called at once
        yes, no = (
            sum(probability(judge, text + verdict.ask, answer) for answer in said)
            for said in (verdict.unsafe, verdict.safe)
        )
        hazards: dict[str, float] = {}
        for answer, codes in form.hazard_answers.items():
            for code in codes:
                share = probability(judge, prompt + form.hazard_ask, answer) / len(codes)
                hazards[code] = hazards.get(code, 0.0) + share * yes / (yes + no)
        answers.append(Judgement(float(np.log(yes / no)), hazards, yes + no))
    if not form.policies:
        return answers[0]
    found: dict[str, float] = {}
    for policy_, answer_ in zip(form.policies, answers, strict=True):
        for code in policy_.hazards:
            found[code] = min(1.0, found.get(code, 0.0) + answer_.p_unsafe / len(policy_.hazards))
    return Judgement(max(a.margin for a in answers), found, min(a.mass for a in answers))


def tokens(judge: Judge, text: str) -> list[int]:
    tokenizer: Any = judge.model._tokenizer  # type: ignore[attr-defined]
    return list(tokenizer(text, add_special_tokens=False).input_ids)


def probability(judge: Judge, text: str, answer: str) -> float:
    """Of the first token that ``answer`` adds to ``text``."""
    ids = tokens(judge, text)
    with torch.inference_mode():
        logits = judge.model._model(torch.tensor([ids])).logits[0, -1]  # type: ignore[attr-defined]
    return float(logits.double().softmax(-1)[tokens(judge, text + answer)[len(ids)]])


@GUARDS
def test_hazards_are_asked_where_an_unsafe_verdict_ends(name: str) -> None:
    form = load_formats()[name]
    said = tuple(step.ask + answer for steps in form.steps.values() for step in steps[-1:] for answer in step.unsafe)
    assert not form.hazard_answers or form.hazard_ask.startswith(said)


def test_the_verdict_of_several_policies_is_the_worst(tiny: TinyJudges) -> None:
    judge = tiny.judge("shieldgemma")
    (judgement,) = judge.judge(ROWS[:1])
    each = [judge._ask([ROWS[0].messages()], "prompt", policy)[0] for policy in judge.format.policies]
    assert judgement.margin == max(j.margin for j in each)
    assert judgement.hazards["S10"] == pytest.approx(each[2].p_unsafe)
    assert set(judgement.hazards) <= set(HAZARDS)


def test_a_judge_that_says_something_else_there_is_refused(tmp_path: Path) -> None:
    write_judge(tmp_path, "llama-guard-3-8b", says=[("", "\n\n")])
    with pytest.raises(TeacherError, match=r"hold \d\.\d% of the probability.*Likeliest token ids.*blank line"):
        Judge(TransformersModel(str(tmp_path)), find_format("llama-guard-3-8b"))


def test_the_model_of_another_guard_is_refused(tiny: TinyJudges) -> None:
    model = tiny.judge("llama-guard-3-8b").model
    with pytest.raises(TeacherError, match=r"its tokenizer lacks <\|im_start\|>, .*template of qwen3guard-gen has"):
        Judge(model, find_format("qwen3guard-gen"))


def test_a_tokenizer_that_cannot_tell_the_answers_apart_is_refused(tmp_path: Path) -> None:
    write_judge(tmp_path, "llama-guard-3-8b", digits=1)  # S1 and S10 begin alike
    with pytest.raises(TeacherError, match="begins several of '1', '2', .* with the same token"):
        Judge(TransformersModel(str(tmp_path)), find_format("llama-guard-3-8b"))


def test_a_long_text_loses_its_middle(tiny: TinyJudges) -> None:
    known = tiny.judge("llama-guard-3-8b")
    judge = Judge(known.model, known.format, max_tokens=400)
    assert judge.template_hash != known.template_hash
    row = Row("set:long", "set", "prompt", None, "begin " + "word " * 2000 + "end", None)
    assert 320 < judge.length(row) <= 400
    text = judge.model._tokenizer.decode(judge._ids(row.messages(), None))  # type: ignore[attr-defined]
    assert "User: begin word" in text and " ... " in text and "word end\n\n<END CONVERSATION>" in text
    assert judge.judge([row])[0].mass > 0.9
    with pytest.raises(TeacherError, match="its own words take more than 50 tokens"):
        Judge(known.model, known.format, max_tokens=50)


def test_bfloat16_keeps_fine_margins(tiny: TinyJudges) -> None:
    """A bfloat16 logit of 16 to 32 is a multiple of 1/8; the margin must not be."""
    known = tiny.judge("llama-guard-3-8b")
    judge = Judge(TransformersModel(str(tiny.folder("llama-guard-3-8b")), dtype=torch.bfloat16), known.format)
    exact = [j.margin for j in known.judge(ROWS)]
    margins = [j.margin for j in judge.judge(ROWS)]
    assert np.abs(np.subtract(margins, exact)).max() < 0.06
    assert sum(abs(m * 16 - round(m * 16)) > 0.02 for m in margins) > len(margins) // 2


def test_unknown_guards_are_refused() -> None:
    assert find_format("meta-llama/Llama-Guard-3-8B").name == "llama-guard-3-8b"
    with pytest.raises(TeacherError, match=r"no template known for 'someone/else'\. Name one of .*guards\.toml"):
        find_format("someone/else")
