"""Meta's path to a 1B guard, end to end on tiny models of the same architectures: a Llama Guard 3 8B as the teacher."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

pytest.importorskip("torch", reason="the conversion layer needs edgeguard-runtime[convert]")
pytest.importorskip("transformers", reason="the conversion layer needs edgeguard-runtime[convert]")

from convert import steps  # noqa: E402
from convert.recipe import Recipe, load_recipe  # noqa: E402
from convert.smoke import shrink  # noqa: E402
from convert.student import HEAD, Student  # noqa: E402
from convert.teachers.score_file import read_scores  # noqa: E402
from edgeguard import Guard  # noqa: E402


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Recipe:
    """The recipe made small, after its whole chain."""
    root = tmp_path_factory.mktemp("llama_guard")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("EDGEGUARD_DATA", str(root))  # shrink sets it; this puts it back
        small = shrink(load_recipe(Path("recipes/llama-guard-3-1b.toml"), root / "build"))
        steps.run(small)
    return small


def test_the_teacher_is_the_judge_read_as_llama_guard_is(recipe: Recipe) -> None:
    scores = read_scores(recipe.build / "scores.jsonl")
    assert len(scores) == recipe.distill["judged"]
    assert all(len(score.hazards) == 14 for score in scores.values())
    assert len({round(score.margin, 3) for score in scores.values()}) > 100


def test_the_student_is_cut_out_of_its_base(recipe: Recipe) -> None:
    student = Student.load(recipe.build / "student")
    config = student.model.config
    base = json.loads((recipe.build / "base" / "config.json").read_text())
    assert (config.num_hidden_layers, config.intermediate_size) == (2, 64)
    assert (base["num_hidden_layers"], base["intermediate_size"]) == (3, 96)
    assert config.vocab_size < base["vocab_size"]
    started = [label for label, row in zip(HEAD, student.head.weight, strict=True) if bool(row.any())]
    assert started == list(HEAD)


def test_the_bundle_and_every_container_are_there(recipe: Recipe) -> None:
    verdict = Guard.load(recipe.models / recipe.name).classify("How do I bake the red cake?")
    assert 0 <= verdict.p_unsafe <= 1
    report = json.loads((recipe.models / recipe.name / "report.json").read_text())
    assert {"student-fp32", "student-int4-gptq", "student-int4-onnx", "student-onnx-standard"} <= set(report["stages"])
    assert {"onnx", "gguf", "standard"} <= set(report["export"])
