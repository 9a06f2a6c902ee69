"""Recipes: every shipped one loads as it stands, and whatever no step could use is refused when it is loaded."""

from __future__ import annotations

import re
import sys
from pathlib import Path
from typing import Any

import pytest
from convert_support import write_recipe

from convert.recipe import RecipeError, load_recipe
from convert.recipe_tables import RECIPE

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

SHIPPED = sorted((Path(__file__).resolve().parent.parent / "convert" / "recipes").glob("*.toml"))
# A teacher of each kind in the place of the one that the tiny recipe trains.
JUDGE = '[teacher]\nkind = "transformers"\nmodel = "meta-llama/Llama-Guard-3-8B"\n'
GGUF = '[teacher]\nkind = "gguf"\nfile = "a.gguf"\nguard = "llama-guard-3-8b"\n'
SCORES = '[teacher]\nkind = "scores"\nfile = "scores.jsonl"\n'


@pytest.fixture
def text(tmp_path: Path) -> str:
    """The recipe of the conversion tests, which trains a teacher."""
    return write_recipe(tmp_path / "right.toml", tmp_path / "base").read_text()


def load(folder: Path, text: str) -> Any:
    (folder / "tiny.toml").write_text(text)
    return load_recipe(folder / "tiny.toml")


def changed(text: str, old: str, new: str) -> str:
    assert text.count(old) >= 1, old
    return text.replace(old, new, 1)


def with_teacher(text: str, table: str) -> str:
    return re.sub(r"\[teacher\].*?(?=\[distill\])", f"{table}\n", text, flags=re.DOTALL)


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.stem)
def test_every_shipped_recipe_loads_as_it_stands(path: Path) -> None:
    """The steps keep these tables in `inputs.json` and compare them: nothing may be filled in or turned into others."""
    recipe, tables = load_recipe(path), tomllib.loads(path.read_text())
    for name in (*RECIPE.required, *RECIPE.optional):
        table = tables.get(name, {})
        if isinstance(table, dict) and "like" in table:
            table = tomllib.loads(path.with_name(table["like"]).read_text())[name]
        assert repr(getattr(recipe, name)) == repr(table)


@pytest.mark.parametrize("table", [JUDGE, GGUF, SCORES])
def test_every_kind_of_teacher_loads(tmp_path: Path, text: str, table: str) -> None:
    assert load(tmp_path, with_teacher(text, table)).teacher["kind"] in table


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("[export]", "[exports]", "tiny.toml: [export] is missing; expected a table with samples, "),
        ("[qat]", "[quat]", "tiny.toml: [quat]: no such key, found with the value {'tokens_per_step': 512, "),
        ("[qat]", "[quat]", "; the nearest is qat."),
        ('license = "Apache-2.0"', "license = 2", "tiny.toml: license: expected a text that is not empty, found 2."),
        ('"tiny-guard"', '"../tiny"', "tiny.toml: name: expected a plain name of letters"),
        ('["en"]', "[]", "tiny.toml: languages: expected a list of at least 1"),
        (
            "learning_rate = 3e-3",
            'learning_rate = "3e-3"',
            "[train] learning_rate: expected a number above 0, at most 1",
        ),
        ("passes = 7.0\nlearning_rate = 3e-3", "pases = 7.0\nlearning_rate = 3e-3", "[train] pases: no such key"),
        ("steps = 20", "steps = 20\npasses = 1.0", "[qat]: expected `passes` or `steps`, found both."),
        ("hidden_weight = 0.1", "", "[qat] hidden_weight is missing; expected a number from 0."),
        ("hidden_weight = 0.1", "hidden_weight = 0.1\nmax_tokens = 9", "[qat] max_tokens: no such key"),
        ("rank = 8", "rank = 0", "[teacher.train.lora] rank: expected a whole number from 1, found 0."),
        ("dropout = 0.0", "dropout = 2", "[teacher.train.lora] dropout: expected a number from 0, at most 1, found 2."),
        ('kind = "trained"', 'kind = "trainde"', "[teacher] kind: expected one of transformers, gguf, trained, scores"),
        ("folder =", "floder =", "[base]: expected one of the keys wheels, hub, folder, found only model, floder."),
        ("temperature = 2.0", "temperature = 0", "[distill] temperature: expected a number above 0, found 0."),
        (
            "tiny_unlabelled = 40",
            "tiny_unlabelled = -1",
            "[distill.unlabelled] tiny_unlabelled: expected a whole number",
        ),
        ('"importance"', '"best"', "[student] choose_layers: expected one of lowest, importance, found 'best'."),
        ("samples = 64", "", "[student]: samples is missing; importances are measured on so many rows"),
        ("intermediate_size = 64", "intermediate_size = 65", "[student] intermediate_size: expected a multiple of 32"),
        (
            "samples = 64",
            "samples = 64\ntarget_tokens = { S15 = '1' }",
            "[student.target_tokens]: expected every key to be",
        ),
        (
            "samples = 64",
            "samples = 64\nstart_from = '../a.toml'",
            "[student] start_from: expected the name of a recipe",
        ),
        (
            "samples = 64",
            f"samples = 64\nstart_bundle = {{ bundle = 'x', manifest_sha256 = '{'0' * 64}' }}",
            "[student]: start_bundle is a student that is cut already: choose_layers, intermediate_size, trim",
        ),
        (
            '"gguf", "standard"',
            '"gguf", "coreml"',
            "[export] also: expected a list, none twice, each one of onnx, gguf",
        ),
        ("tolerance = 0.5", "tolerance = -1", "[export] tolerance: expected a number from 0, found -1."),
        ("every = 8", "every = 0", "[gptq] every: expected a whole number from 1, found 0."),
        ("rotate = true", "rotate = 1", "[gptq] rotate: expected true or false, found 1."),
        (
            'compare = ["tiny_test"]',
            'compare = ["tiny"]',
            "[evaluate]: compare: expected sets that `sets` names too, found",
        ),
        (
            'hazards = "tiny_unsafe"',
            'hazards = "x"',
            "[evaluate]: hazards: expected sets that `sets` names too, found x.",
        ),
        ("creative = 10", "creatives = 10", "[corpus.constructed] creatives: no such key"),
        ("{ safe = 250, unsafe = 250 }", "250", "[corpus.sets.tiny_train]: expected a table, found 250."),
        ("{ safe = 250, unsafe = 250 }", "{ save = 250 }", "[corpus.sets.tiny_train] save: no such key"),
        ("{ safe = 250, unsafe = 250 }", "{ weight = 1 }", "[corpus.sets.tiny_train]: expected how many rows to take"),
        ("unsafe = 250 }", "unsafe = 250, weight = 0 }", "[corpus.sets.tiny_train] weight: expected a number above 0"),
        ("layers = 3", "layers = 3\nthreads = 2", "[teacher] threads: no such key"),
        (
            "freeze_layers = 0",
            "freeze_layers = 3",
            "[teacher.train] freeze_layers: expected at most 2, found 3 of 3 layers.",
        ),
        (
            "[gptq]\nevery = 8\nrotate = true",
            "[gptq]\nlike = 'right.toml'\nevery = 8",
            "tiny.toml: [gptq] every: no such key",
        ),
        (
            "[gptq]\nevery = 8\nrotate = true",
            "[gptq]\nlike = 3",
            "tiny.toml: [gptq] like: expected the name of a recipe beside this",
        ),
        ("[gptq]\nevery = 8\nrotate = true", "[gptq]\nlike = 'none.toml'", "no recipe at "),
        (
            "[export]",
            "[export]\nroad = 'rounding'",
            "[export] road: expected one of qat, gptq, tune, found 'rounding'.",
        ),
        (
            "[gptq]\nevery = 8\nrotate = true\n\n[export]",
            "[export]\nroad = 'gptq'",
            "of [export], gptq, needs a table [gptq].",
        ),
        (
            "[gptq]\nevery = 8\nrotate = true\n",
            "",
            "[tune] trains the scales of GPTQ's integers, so it needs a table [gptq].",
        ),
        ("tokens_per_step = 512\nsteps = 10", "steps = 10", "[tune] tokens_per_step is missing"),
        (
            "[gptq]\nevery = 8\nrotate = true",
            "[shape]\nlike = 'right.toml'",
            "[shape] like: expected a recipe with [shape], found right",
        ),
    ],
)
def test_what_no_step_could_use_is_named(tmp_path: Path, text: str, old: str, new: str, message: str) -> None:
    with pytest.raises(RecipeError, match=re.escape(message)):
        load(tmp_path, changed(text, old, new))


@pytest.mark.parametrize(
    ("table", "message"),
    [
        ('[teacher]\nkind = "transformers"\n', "[teacher] model is missing"),
        ('[teacher]\nkind = "transformers"\nmodel = "a/b"\n', "[teacher]: no template known for 'a/b'. Name one of "),
        ('[teacher]\nkind = "transformers"\nmodel = "a/b"\nguard = "x"\nfile = "y"\n', "[teacher] file: no such key"),
        ('[teacher]\nkind = "gguf"\nguard = "llama-guard-3-8b"\n', "[teacher] file is missing"),
        ('[teacher]\nkind = "gguf"\nfile = "a.gguf"\n', "[teacher]: no template known for ''. Name one of "),
        ('[teacher]\nkind = "gguf"\nfile = "a.gguf"\nguard = "best"\n', "[teacher]: no template known for 'best'."),
        (f"{GGUF}revision = 'v1'\n", "[teacher]: revision needs a model, whose it is."),
        (f"{SCORES}guard = 'llama-guard-3-8b'\n", "[teacher] guard: no such key"),
        ("[teacher]\n", "[teacher] kind is missing; expected one of transformers, gguf, trained, scores."),
        ("", "tiny.toml: [distill] needs a [teacher]."),
    ],
)
def test_teachers_that_could_not_judge_are_named(tmp_path: Path, text: str, table: str, message: str) -> None:
    with pytest.raises(RecipeError, match=re.escape(message)):
        load(tmp_path, with_teacher(text, table))


def test_a_teacher_is_asked_for_and_used(tmp_path: Path, text: str) -> None:
    alone = re.sub(r"\[distill\].*?(?=\[student\])", "", text, flags=re.DOTALL)
    assert load(tmp_path, alone).evaluate["teacher_sets"]  # measured beside the student
    unread = changed(alone, 'teacher_sets = ["tiny_test"]\n', "")
    with pytest.raises(RecipeError, match=r"\[teacher\] is read by nothing"):
        load(tmp_path, unread)
    none = re.sub(r"\[teacher\].*?(?=\[student\])", "", alone, flags=re.DOTALL)
    with pytest.raises(RecipeError, match=r"teacher_sets of \[evaluate\] needs a \[teacher\]"):
        load(tmp_path, none)
    assert load(tmp_path, re.sub("teacher_sets = .*", "", none)).teacher == {}


def test_the_road_that_ships_needs_its_table(tmp_path: Path, text: str) -> None:
    without = re.sub(r"\[qat\].*?(?=\[gptq\])", "", text, flags=re.DOTALL)
    with pytest.raises(RecipeError, match=r"the road to INT4 of \[export\], qat, needs a table \[qat\]"):
        load(tmp_path, without)
    assert load(tmp_path, changed(without, "[export]", "[export]\nroad = 'gptq'")).road == "gptq"


def test_every_fault_is_told_with_its_file(tmp_path: Path, text: str) -> None:
    wrong = changed(changed(text, "judged = 400", "judged = 0"), "samples = 20", "samples = 2.5")
    with pytest.raises(RecipeError) as caught:
        load(tmp_path, wrong)
    assert str(caught.value).splitlines() == [
        "tiny.toml: [distill] judged: expected a whole number from 1, found 0.",
        "tiny.toml: [export] samples: expected a whole number from 1, found 2.5.",
    ]
    (tmp_path / "other.toml").write_text(changed(text, "every = 8", "evry = 8"))
    with pytest.raises(RecipeError, match=r"other\.toml: \[gptq\] every is missing"):
        load(tmp_path, changed(text, "every = 8\nrotate = true", 'like = "other.toml"'))


def test_a_table_like_another_is_that_one(tmp_path: Path, text: str) -> None:
    alike = changed(text, "every = 8\nrotate = true", 'like = "right.toml"')
    assert load(tmp_path, alike).gptq == {"every": 8, "rotate": True}


def test_a_file_that_is_no_toml_is_refused(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=r"tiny\.toml: "):
        load(tmp_path, "[train\n")
    (tmp_path / "bytes.toml").write_bytes(b"name = '\xff'")
    with pytest.raises(RecipeError, match=r"bytes\.toml: 'utf-8' codec"):
        load_recipe(tmp_path / "bytes.toml")


def test_a_start_is_one_that_starts_from_its_base(tmp_path: Path, text: str) -> None:
    following = changed(text, "[student]", '[student]\nstart_from = "right.toml"')
    assert load(tmp_path, following).start.path.name == "right.toml"
    with pytest.raises(
        RecipeError, match=r"start_share of \[distill\] needs start_from or start_bundle in \[student\]"
    ):
        load(tmp_path, changed(text, "judged = 400", "judged = 400\nstart_share = 0.5"))
    (tmp_path / "second.toml").write_text(following)
    with pytest.raises(RecipeError, match=r"expected a recipe that starts from its base, found second\.toml"):
        load(tmp_path, changed(following, "right.toml", "second.toml"))
    with pytest.raises(RecipeError, match=r"found tiny\.toml, which starts from tiny\.toml"):
        load(tmp_path, changed(following, "right.toml", "tiny.toml"))
    with pytest.raises(RecipeError, match=r"\[base\] and \[student\] must be as there"):
        load(tmp_path, changed(following, "layers = 2", "layers = 1"))


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        (
            "vocab_size = [128256, 48000, 36000]",
            "vocab_size = 128256",
            "[shape] vocab_size: expected a list of at least 1",
        ),
        (
            "hidden_size = 2048",
            "hidden_size = 2050",
            "[shape] hidden_size: expected a multiple of 32 from 32, found 2050.",
        ),
        ("num_kv_heads = 8", "num_kv_heads = 7", "[shape]: expected num_heads to be a multiple of num_kv_heads"),
        (
            "head_size = 16",
            "head_size = 16\nrope_factors = [1.0]",
            "[shape]: rope_factors: expected 32, half of head_dim",
        ),
    ],
)
def test_shapes_that_no_file_can_have_are_named(tmp_path: Path, text: str, old: str, new: str, message: str) -> None:
    shape = (SHIPPED[0].parent / "llama-guard-3-1b.toml").read_text().split("[shape]")[1].split("[train]")[0]
    right = f"{text}\n[shape]{shape}"
    assert load(tmp_path, right).shape["num_layers"] == 12
    with pytest.raises(RecipeError, match=re.escape(message)):
        load(tmp_path, changed(right, old, new))
