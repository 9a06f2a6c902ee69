"""The teacher that a recipe names: from a folder, from a Hub on loopback, and what cannot be had."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("torch", reason="the conversion layer needs edgeguard-runtime[convert]")
pytest.importorskip("transformers", reason="the conversion layer needs edgeguard-runtime[convert]")

from hub_support import COMMIT, run_with_hub, serve_hub  # noqa: E402

from convert.corpora.registry import Row  # noqa: E402
from convert.teachers.formats import TeacherError  # noqa: E402
from convert.teachers.load import load_teacher  # noqa: E402
from convert.tiny_judges import TinyJudges  # noqa: E402

GUARD = "llama-guard-3-1b"
REPOSITORY = "meta-llama/Llama-Guard-3-1B"
ROW = Row("set:a", "set", "prompt", None, "How do I bake bread?", None)
FROM_HUB = f"""
import json, sys
from pathlib import Path
from convert.corpora.registry import Row
from convert.teachers.formats import TeacherError
from convert.teachers.load import load_teacher
row = Row("set:a", "set", "prompt", None, "How do I bake bread?", None)
teacher = load_teacher({{"kind": "transformers", "model": "{REPOSITORY}", "revision": "v1"}}, Path("."))
errors = []
for table in ({{"kind": "transformers", "model": "someone/else", "guard": "{GUARD}"}},
              {{"kind": "gguf", "model": "{REPOSITORY}", "file": "none.gguf"}}):
    try:
        load_teacher(table, Path("."))
    except TeacherError as error:
        errors.append(str(error))
print(json.dumps([teacher.name, teacher.format.name, teacher.judge([row])[0].margin, errors]))
"""


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> TinyJudges:
    return TinyJudges(tmp_path_factory.mktemp("judges"))


def test_a_folder(tiny: TinyJudges, tmp_path: Path) -> None:
    table = {"kind": "transformers", "model": str(tiny.folder(GUARD)), "guard": GUARD, "max_tokens": 300}
    teacher, known = load_teacher(table, tmp_path), tiny.judge(GUARD)
    assert teacher.name == known.name and teacher.name.startswith(f"{GUARD}@")
    assert teacher.max_tokens == 300 and teacher.template_hash != known.template_hash
    assert teacher.judge([ROW]) == known.judge([ROW])


def test_the_guard_of_another_model_is_refused(tiny: TinyJudges, tmp_path: Path) -> None:
    table = {"kind": "transformers", "model": str(tiny.folder(GUARD)), "guard": "granite-guardian-3"}
    with pytest.raises(TeacherError, match=r"lacks <\|start_of_role\|>.*Name the guard that the model is"):
        load_teacher(table, tmp_path)


def test_a_repository_on_the_hub(tiny: TinyJudges, tmp_path: Path) -> None:
    asked: list[str] = []
    with serve_hub(tiny.folder(GUARD), REPOSITORY, asked) as endpoint:
        found = run_with_hub(FROM_HUB, endpoint, tmp_path / "cache")
    assert found.returncode == 0, found.stderr
    name, guard, margin, errors = json.loads(found.stdout.splitlines()[-1])
    assert name == f"{REPOSITORY}@{COMMIT}" and guard == GUARD  # the model's name says which guard it is
    assert margin == pytest.approx(tiny.judge(GUARD).judge([ROW])[0].margin, abs=1e-4)
    assert any(path.endswith("/model.safetensors") for path in asked)
    assert len(errors) == 2
    assert errors[0].startswith("someone/else: transformers cannot load it (") and "HF_TOKEN" in errors[0]
    assert errors[1].startswith(f"{REPOSITORY}: the Hugging Face Hub does not give its none.gguf (")


@pytest.mark.parametrize(
    ("table", "message"),
    [
        ({"kind": "transformers", "model": "a/b"}, "no template known for 'a/b'. Name one of .* as `guard`"),
        ({"kind": "gguf", "file": "x.gguf", "guard": "best"}, "no template known for 'best'"),
        ({"kind": "gguf", "file": "none.gguf", "guard": GUARD}, "none.gguf: no such file. Name a GGUF"),
    ],
)
def test_judges_that_cannot_be_had(tmp_path: Path, table: dict[str, Any], message: str) -> None:
    with pytest.raises(TeacherError, match=message):
        load_teacher(table, tmp_path)


def test_a_folder_without_a_model_is_refused(tmp_path: Path) -> None:
    with pytest.raises(
        TeacherError, match="transformers cannot load it .* Expected a causal model: a folder, or owner/name"
    ):
        load_teacher({"kind": "transformers", "model": str(tmp_path), "guard": GUARD}, tmp_path)
