"""The labelled sets and the training mix: what is read, what is refused, what is put aside."""

from __future__ import annotations

import gzip
import json
import os
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from convert.corpora.augment import constructed_answers, constructed_responses, neutral_names
from convert.corpora.constructed import constructed_requests
from convert.corpora.mix import (
    MixedRow,
    build_mix,
    check_calibration,
    check_no_test_rows,
    check_splits,
    labelled_rows,
    leak_keys,
    normalise,
    unlabelled_rows,
)
from convert.corpora.registry import DEFAULT_DATA, CorpusError, Row, get_set, load_sets, origin_urls, read_set
from convert.recipe import load_recipe
from convert.smoke import requests, row, write_data, write_sets

KINDS = [(target, label) for target in ("prompt", "response") for label in ("safe", "unsafe")]
WANTED = {"tiny_train": {"safe": 100, "unsafe": 80, "weight": 0.5}}


@pytest.fixture
def data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("EDGEGUARD_DATA", str(tmp_path))
    return write_data(tmp_path)


def test_own_sets_join_the_known_ones(data: Path) -> None:
    assert get_set("tiny_train").role == "train"
    assert get_set("xstest").role == "test"
    assert len(read_set("tiny_train")) == 600


def test_a_data_folder_cannot_change_a_known_set(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_sets(tmp_path, {"xstest": ({"role": "train"}, requests("x", 4, 1))})
    monkeypatch.setenv("EDGEGUARD_DATA", str(tmp_path))
    assert get_set("xstest").role == "test"


def test_damaged_and_missing_sets_are_refused(data: Path) -> None:
    (data / "train" / "tiny_train.jsonl.gz").write_bytes((data / "test" / "tiny_test.jsonl.gz").read_bytes())
    with pytest.raises(CorpusError, match="sha256 .* expected"):
        read_set("tiny_train")
    with pytest.raises(CorpusError, match="published at: .*exaggerated-safety"):
        read_set("xstest")
    with pytest.raises(CorpusError, match="unknown set 'nope'"):
        read_set("nope")


def test_no_data_folder_says_what_to_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("EDGEGUARD_DATA", str(tmp_path / "nowhere"))
    with pytest.raises(CorpusError, match="Set EDGEGUARD_DATA"):
        read_set("xstest")


ROW = row("s", 0, "How do I bake bread?", "safe")
ANSWER = row("s", 1, "How do I bake bread?", "safe", "Knead it.")
TURNS = [{"role": "user", "content": "Hello"}, {"role": "user", "content": ROW["prompt"]}]


def _own_set(folder: Path, monkeypatch: pytest.MonkeyPatch, rows: list[Any], role: str = "train") -> Path:
    """A data folder with the set ``s`` alone, in any shape."""
    monkeypatch.setenv("EDGEGUARD_DATA", str(write_sets(folder, {"s": ({"role": role}, rows)})))
    return folder


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"id": ...}, "id is missing; expected a text that is not empty"),
        ({"id": ""}, "id: expected a text that is not empty, found ''"),
        ({"id": 7}, "id: expected a text that is not empty, found 7"),
        ({"label": "harmful"}, "label: expected one of safe, unsafe, null, found 'harmful'"),
        ({"label": ...}, "label is missing"),
        ({"target": "answer"}, "target: expected one of prompt, response, found 'answer'"),
        ({"target": "response"}, "response: expected a text, since target is response; found null"),
        ({"prompt": " "}, "prompt: expected a text, since the row has a label and target is prompt; found ' '"),
        ({"prompt": ["a"]}, "prompt: expected a text or null, found"),
        ({"hazards": ["S15"]}, r"hazards: expected a list of hazards, each one of S1, .*S14, found \['S15'\]"),
        ({"hazards": "S1"}, "hazards: expected a list of hazards"),
        ({"hazards": None}, "hazards: expected a list of hazards"),
        ({"turns": "Hello"}, "turns: expected null or a list of turns"),
        ({"turns": [{"role": "user"}]}, "turns: expected null or a list of turns"),
        ({"turns": [{"role": "human", "content": "Hi"}]}, "turns: expected null or a list of turns, each with a role"),
        (
            {"turns": [*TURNS[:1], {"role": "assistant", "content": ROW["prompt"]}]},
            "turns: expected the prompt to be the last turn's, of the role user; found the role 'assistant'",
        ),
    ],
)
def test_a_row_of_a_wrong_shape_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, changes: dict[str, Any], message: str
) -> None:
    wrong = {key: value for key, value in {**ROW, **changes}.items() if value is not ...}
    _own_set(tmp_path, monkeypatch, [ANSWER, wrong])
    with pytest.raises(CorpusError, match=rf"s\.jsonl\.gz: line 2: {message}"):
        read_set("s")


def test_rows_may_say_more_and_have_turns(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _own_set(tmp_path, monkeypatch, [{**ROW, "turns": TURNS, "annotator": 3}, {**ANSWER, "turns": None, "lang": None}])
    first, second = read_set("s")
    assert first.messages() == [("user", "Hello"), ("user", ROW["prompt"])]
    assert second.messages()[-1] == ("assistant", "Knead it.") and second.lang == "en"


def test_lines_and_files_that_are_none_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _own_set(tmp_path, monkeypatch, [ROW, [1]])
    with pytest.raises(CorpusError, match=r"line 2: expected a table, found \[1\]"):
        read_set("s")
    _own_set(tmp_path, monkeypatch, [ROW, ROW])
    with pytest.raises(CorpusError, match="s: expected ids of which none stands twice, found 's:0' twice"):
        read_set("s")
    (tmp_path / "train" / "s.jsonl.gz").write_bytes(b"no gzip")
    with pytest.raises(CorpusError, match=r"s\.jsonl\.gz: expected a gzip file"):
        read_set("s")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"rows": 3},
            r"s\.jsonl\.gz: 2 rows, expected 3\. Fetch the set again; where it is your own, correct sets\.json",
        ),
        ({"sha256": "0" * 64}, r"sha256 [0-9a-f]{64}, expected 0{64}\. Fetch"),
        (
            {"sha256": "of the text"},
            r"sets\.json: \[s\] sha256: expected 64 lower-case hex digits, found 'of the text'",
        ),
        ({"license": ...}, r"sets\.json: \[s\] license is missing"),
        ({"role": "training"}, r"sets\.json: \[s\] role: expected one of train, calibration, test, .*found 'training'"),
        ({"commercial": True}, r"sets\.json: \[s\] commercial: expected one of yes, no, verify, found True"),
        ({"rows": "2"}, r"sets\.json: \[s\] rows: expected a whole number from 0, found '2'"),
    ],
)
def test_an_entry_that_is_wrong_or_of_another_file_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, changes: dict[str, Any], message: str
) -> None:
    _own_set(tmp_path, monkeypatch, [ROW, ANSWER])
    assert len(read_set("s")) == 2
    entry = {**json.loads((tmp_path / "sets.json").read_text())["s"], **changes}
    (tmp_path / "sets.json").write_text(json.dumps({"s": {key: v for key, v in entry.items() if v is not ...}}))
    with pytest.raises(CorpusError, match=message):
        read_set("s")


def test_a_table_of_sets_that_is_no_json_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _own_set(tmp_path, monkeypatch, [ROW])
    (tmp_path / "sets.json").write_text("{'s': 1}")
    with pytest.raises(CorpusError, match=r"sets\.json: expected JSON, found Expecting property name"):
        load_sets()


def test_what_is_measured_has_labels_and_texts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _own_set(tmp_path, monkeypatch, [{**ROW, "label": None}, ANSWER], "test")
    assert [r.id for r in labelled_rows("s")] == ["s:1"]
    _own_set(tmp_path, monkeypatch, [{**ROW, "label": None}], "test")
    with pytest.raises(CorpusError, match="s: expected rows with a label, found none"):
        labelled_rows("s")
    _own_set(tmp_path, monkeypatch, [ROW, {**ANSWER, "response": ""}], "test")
    with pytest.raises(CorpusError, match="s: s:1: expected a text to judge, found none"):
        labelled_rows("s")


def test_rows_without_an_answer_to_judge_are_left_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _own_set(tmp_path, monkeypatch, [ROW, {**ANSWER, "response": ""}])
    assert [m.row.id for m in build_mix({"s": {"safe": 9}}, {}, seed=1, keys=set()).rows] == ["s:0"]


def test_two_sets_with_the_same_ids_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    other = {**ROW, "prompt": "How do I paint a fence?"}
    sets = {"s": ({"role": "train"}, [ROW]), "t": ({"role": "train"}, [other])}
    monkeypatch.setenv("EDGEGUARD_DATA", str(write_sets(tmp_path, sets)))
    with pytest.raises(CorpusError, match="s and t: expected ids of which none stands twice, found 's:0' twice"):
        build_mix({"s": {"safe": 1}, "t": {"safe": 1}}, {}, seed=1, keys=set())


def test_a_mix_needs_rows_to_train_on_to_validate_with_and_to_calibrate_on() -> None:
    rows = [Row(f"r:{i}", "r", t, label, "Q", "A") for i, (t, label) in enumerate(KINDS)]
    check_splits([MixedRow(rows[0], split, 1.0) for split in ("train", "validation")])
    with pytest.raises(CorpusError, match="expected rows in its validation split, found none among 1 rows"):
        check_splits([MixedRow(rows[0], "train", 1.0)])
    with pytest.raises(CorpusError, match="expected rows in its train split, found none among 0 rows"):
        check_splits([])
    check_calibration(rows)
    with pytest.raises(CorpusError, match="expected safe prompts, found no rows"):
        check_calibration([])
    with pytest.raises(
        CorpusError, match="expected unsafe responses, found 1 safe prompts, 1 safe responses, 1 unsafe"
    ):
        check_calibration(rows[:3])


def test_the_keys_of_the_tests_are_read_again_only_when_a_file_has_changed(
    data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from convert.corpora import mix

    read: list[str] = []

    def counted(name: str) -> list[Row]:
        read.append(name)
        return read_set(name)

    monkeypatch.setattr(mix, "read_set", counted)
    first = leak_keys(["tiny_test"])
    first_read = list(read)
    first.add("a caller's own")
    assert "a caller's own" not in leak_keys(["tiny_test"]) and read == first_read == ["tiny_test", "tiny_unsafe"]
    path = data / "test" / "tiny_test.jsonl.gz"
    os.utime(path, ns=(1, 1))
    assert leak_keys(["tiny_test"]) == first - {"a caller's own"} and len(read) == 4
    rows = gzip.decompress(path.read_bytes())
    path.write_bytes(gzip.compress(rows + b"\n"))
    with pytest.raises(CorpusError, match="sha256"):
        leak_keys(["tiny_test"])


def test_every_known_set_states_licence_rule_and_origin() -> None:
    for entry in load_sets().values():
        assert entry.role in {"train", "test", "calibration", "unlabelled", "injection"}
        assert entry.commercial in {"yes", "no", "verify"}
        assert entry.license and entry.source and list(origin_urls(entry))


def test_the_mix_is_capped_split_and_repeatable(data: Path) -> None:
    keys = leak_keys(["tiny_test"])
    mix, again = (build_mix(WANTED, {}, seed=1, keys=keys) for _ in range(2))
    assert mix.manifest == again.manifest
    own = [m for m in mix.rows if m.row.set == "tiny_train"]
    assert sum(m.row.label == "safe" for m in own) == 100
    assert sum(m.row.label == "unsafe" for m in own) == 80
    assert {m.weight for m in own} == {0.5}
    assert {m.split for m in own} == {"train", "validation", "calibration"}
    other = build_mix(WANTED, {}, seed=2, keys=keys)
    assert other.manifest["sha256"] != mix.manifest["sha256"]
    splits = {m.row.id: m.split for m in mix.rows}
    assert all(splits.get(m.row.id, m.split) == m.split for m in other.rows), "a row's split depends on its text alone"


def test_answers_to_one_prompt_share_a_split(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = [row("t", i, f"Question {i // 4} of many?", "safe", f"Answer {i}.") for i in range(400)]
    monkeypatch.setenv("EDGEGUARD_DATA", str(write_sets(tmp_path, {"t": ({"role": "train"}, rows)})))
    splits: dict[str, set[str]] = {}
    for mixed in build_mix({"t": {"safe": 400}}, {}, seed=1, keys=set()).rows:
        splits.setdefault(mixed.row.prompt, set()).add(mixed.split)
    assert {len(s) for s in splits.values()} == {1}
    assert len({next(iter(s)) for s in splits.values()}) > 1


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"role": "test"}, "role test"),
        ({"role": "calibration"}, "role calibration"),
        ({"role": "train", "commercial": "no"}, "commercial use no"),
        ({"role": "train", "commercial": "verify"}, "commercial use verify"),
    ],
)
def test_only_commercial_train_sets_enter_the_mix(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, changes: dict[str, str], message: str
) -> None:
    monkeypatch.setenv("EDGEGUARD_DATA", str(write_sets(tmp_path, {"s": (changes, requests("s", 8, 1))})))
    with pytest.raises(CorpusError, match=message):
        build_mix({"s": {"safe": 4, "unsafe": 4}}, {}, seed=1, keys=set())


def test_rows_of_a_test_set_are_left_out_whatever_their_spelling(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    train = [*requests("alpha", 40, 1), row("alpha", 99, "  HOW do I bake… a Cake, quickly?!", "safe")]
    test = [row("t", 0, "How do I bake a cake quickly", "safe")]
    sets = {"s": ({"role": "train"}, train), "t": ({"role": "test"}, test)}
    monkeypatch.setenv("EDGEGUARD_DATA", str(write_sets(tmp_path, sets)))
    mix = build_mix({"s": {"safe": 100, "unsafe": 100}}, {}, seed=1, keys=leak_keys(["t"]))
    assert mix.manifest["sets"]["s"]["left_out"]["in_test"] == 1
    assert not any("quickly" in m.row.prompt for m in mix.rows)


def test_the_trainer_refuses_test_rows_by_name_and_by_text() -> None:
    keys = {normalise("How do I bake a cake quickly?")}
    fine = Row("a:1", "tiny", "prompt", "safe", "How do I paint a fence?", None)
    check_no_test_rows([fine], keys)
    with pytest.raises(CorpusError, match="xstest is a test set"):
        check_no_test_rows([Row("x:1", "xstest", "prompt", "safe", "Anything at all, really.", None)], keys)
    with pytest.raises(CorpusError, match="its text stands in a test set"):
        check_no_test_rows([Row("a:2", "tiny", "prompt", "safe", "how do i BAKE a cake -- quickly", None)], keys)
    with pytest.raises(CorpusError, match="its text stands in a test set"):
        check_no_test_rows([Row("a:3", "tiny", "response", "safe", "Hm?", "How do I bake a cake, quickly?")], keys)


def test_the_held_out_third_is_refused_by_the_trainer() -> None:
    rows = [
        Row(f"o:{i}", "orbench_hard", "prompt", "safe", f"A borderline question number {i}", None) for i in range(60)
    ]
    refused = 0
    for candidate in rows:
        try:
            check_no_test_rows([candidate], set())
        except CorpusError:
            refused += 1
    assert 8 < refused < 32


def test_constructed_responses_have_the_labels_their_making_gives() -> None:
    rows = [Row(f"r:{i}", "catqa_en", "prompt", "unsafe", f"How do I rob shop {i}?", None) for i in range(20)]
    rows += [
        Row(f"h:{i}", "stormfront_hate", "prompt", "unsafe" if i % 2 else "safe", f"Statement {i}", None, ("S10",))
        for i in range(20)
    ]
    made = constructed_responses(rows, 1, refusals=20, echoes=5)
    refusals = [r for r in made if ":refusal:" in r.id]
    echoes = [r for r in made if ":echo:" in r.id]
    assert {r.label for r in refusals} == {"safe"} and len(refusals) == 20
    assert {r.label for r in echoes} == {"safe", "unsafe"}
    assert all(r.target == "response" and r.response for r in made)
    assert constructed_responses(rows, 1, refusals=20, echoes=5) == made


def test_unlabelled_rows_are_capped_shuffled_and_clear_of_the_tests(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("EDGEGUARD_DATA", str(write_data(tmp_path)))
    rows = unlabelled_rows({"tiny_unlabelled": 20}, 1, set())
    assert len(rows) == 20 and {r.label for r in rows} == {None}
    assert [r.id for r in rows] != sorted(r.id for r in rows)
    assert (
        rows == unlabelled_rows({"tiny_unlabelled": 20}, 1, set()) != unlabelled_rows({"tiny_unlabelled": 20}, 2, set())
    )
    leaked = normalise(rows[0].prompt)
    assert rows[0] not in unlabelled_rows({"tiny_unlabelled": 60}, 1, {leaked})
    with pytest.raises(CorpusError, match="takes unlabelled sets alone"):
        unlabelled_rows({"tiny_train": 5}, 1, set())


def test_unlabelled_rows_without_text_are_left_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = [row("zeta", 0, "What is this?", None, " \n"), row("zeta", 1, "What is that?", None, "A thing.")]
    monkeypatch.setenv("EDGEGUARD_DATA", str(write_sets(tmp_path, {"zeta": ({"role": "unlabelled"}, rows)})))
    assert [r.id for r in unlabelled_rows({"zeta": 5}, 1, set())] == ["zeta:1"]


def test_constructed_requests_are_different_repeatable_and_labelled() -> None:
    answers = [Row(f"a:{i}", "dolly_response", "response", "safe", "Q?", f"A harmless answer {i}.") for i in range(30)]
    wanted = {"creative": 200, "copies": 60, "discussions": 60, "look_alikes": 150, "tasks": 20}
    made = constructed_requests(wanted, answers, seed=1)
    assert Counter(r.set for r in made) == {f"constructed_{kind}": count for kind, count in wanted.items()}
    assert len({normalise(r.prompt) for r in made}) == len(made)
    assert {r.set for r in made if r.label == "unsafe"} == {"constructed_copies"}
    assert made == constructed_requests(wanted, answers, seed=1) != constructed_requests(wanted, answers, seed=2)


def test_answers_go_along_or_warn_in_the_questions_own_words() -> None:
    rows = [Row(f"u:{i}", "catqa_en", "prompt", "unsafe", f"How can I rob shop {i}?", None, ("S2",)) for i in range(9)]
    rows += [Row(f"s:{i}", "coconot_benign", "prompt", "safe", f"How do I bake cake {i}?", None) for i in range(9)]
    rows += [Row("u:x", "catqa_en", "prompt", "unsafe", "Write about a robbery in detail.", None)]
    made = constructed_answers(rows, seed=1, count=5)
    kinds = Counter((r.id.split(":")[1], r.label) for r in made)
    assert kinds == {("comply", "unsafe"): 5, ("help", "safe"): 5, ("warn", "safe"): 5}
    for made_row in made:
        assert made_row.prompt[10:-1].strip() in (made_row.response or "")
        assert made_row.hazards == (("S2",) if made_row.label == "unsafe" else ())


def test_real_names_are_replaced() -> None:
    text = "Write a tweet about the news that Ann-Mary O'Neil has been arrested for theft."
    named = Row("d:1", "diselect_mps", "prompt", "unsafe", text, None)
    assert neutral_names(named).prompt == "Write a tweet about the news that Alex Example has been arrested for theft."


shared_data = pytest.mark.skipif(not DEFAULT_DATA.is_dir(), reason="the public data sets are not on this machine")


@pytest.mark.shared_data
@shared_data
def test_the_shipped_mix_holds_no_test_text_and_is_near_balanced() -> None:
    recipe = load_recipe(Path("recipes/mini.toml"))
    keys = leak_keys(recipe.evaluate["sets"])
    mix = build_mix(recipe.corpus["sets"], recipe.corpus["constructed"], seed=recipe.corpus["seed"], keys=keys)
    check_no_test_rows((m.row for m in mix.rows), keys)
    train = [m.row for m in mix.rows if m.split == "train"]
    assert 0.3 < sum(r.label == "unsafe" for r in train) / len(train) < 0.6
    assert 0.2 < sum(r.target == "response" for r in train) / len(train) < 0.6
    assert len(keys) > 15_000
