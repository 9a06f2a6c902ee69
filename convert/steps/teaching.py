"""The teacher: trained here where the recipe says so, and the scores that it gives."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from convert.base import fetch_base
from convert.corpora.mix import is_noisy, leak_keys, row_keys, shuffled_by_text, unlabelled_rows
from convert.corpora.registry import Row, check_ids
from convert.files import read_json, write_json
from convert.recipe import Recipe
from convert.steps.data import (
    calibration_rows,
    data_sha256,
    evaluation_rows,
    files_of,
    read_examples,
    read_mix,
    text_side,
)
from convert.steps.kept import is_made
from convert.steps.runs import run_training
from edgeguard.bundle import sha256_of

if TYPE_CHECKING:
    from convert.teachers.score_file import Teacher

__all__ = ["judge_tests", "label", "rows_to_judge", "rows_without_label", "teacher", "teacher_name"]

TEACHER_BASE = "teacher_base"


def teacher(recipe: Recipe) -> Path:
    """Step ``teacher``: trains the teacher where the recipe says so; the others come from the Hub or a file."""
    from convert.distill import label_loss
    from convert.student import Student
    from convert.teachers.trained import add_adapter, save_adapter

    folder, table = recipe.build / "teacher", recipe.teacher
    if table.get("kind") != "trained":
        return folder
    source = fetch_base(table["base"], recipe.build / TEACHER_BASE)
    done = folder / "final" / "teacher.json"
    settings = {name: table[name] for name in ("base", "layers", "train")}
    if not is_made(done, {**settings, "data": data_sha256(recipe)}, folder):
        student = Student.from_base(source, table["layers"])
        training = table["train"]
        add_adapter(student, training["lora"], training.get("freeze_layers", 0), seed=training["seed"])
        rows = read_examples(recipe, "train", training["max_tokens"], source)
        run_training(recipe, training, student, label_loss(training["hazard_weight"]), folder, source, rows)
        save_adapter(student, done.parent)
    return done.parent


def label(recipe: Recipe) -> Path:
    """Step ``label``: the teacher's scores of the rows that the student learns from; one file, which grows."""
    from convert.teachers.score_file import read_scores

    if recipe.teacher.get("kind") == "scores":
        path = Path(recipe.teacher["file"])
        read_scores(path)
        return path
    path = recipe.build / "scores.jsonl"
    if recipe.distill:
        asked = {name: recipe.distill[name] for name in ("unlabelled", "judged")}
        asked |= {"data": data_sha256(recipe), "files": files_of(asked["unlabelled"])}
        _judge(recipe, lambda: rows_to_judge(recipe), path, asked)
    return path


def judge_tests(recipe: Recipe) -> Path:
    """The teacher's scores of the calibration split and of the test sets that it is measured on."""
    if recipe.teacher["kind"] == "scores":
        return label(recipe)
    from convert.teachers.score_file import row_hash

    path = recipe.build / "scores_of_tests.jsonl"
    tests = evaluation_rows(recipe)
    rows = [*calibration_rows(recipe), *(row for name in recipe.evaluate["teacher_sets"] for row in tests[name])]
    check_ids(rows)
    _judge(recipe, lambda: rows, path, {"rows": [(row.id, row_hash(row)) for row in rows]})
    return path


def _judge(recipe: Recipe, rows: Callable[[], list[Row]], path: Path, asked: dict[str, Any]) -> None:
    """Let the teacher score rows into ``path``, unless all that ``asked`` stands for is there from the same teacher.

    Another teacher's scores are refused; more rows of the same one join those that are there.
    """
    from convert.teachers.score_file import label_rows

    done = path.with_suffix(".done.json")
    wanted: dict[str, Any] = {"asked": asked, "teacher": recipe.teacher}
    if recipe.teacher["kind"] == "trained":
        names = ("adapter/adapter_model.safetensors", "head.safetensors")
        wanted["weights"] = [sha256_of(teacher(recipe) / name) for name in names]
    wanted = json.loads(json.dumps(wanted))
    if not (path.is_file() and done.is_file() and read_json(done) == wanted):
        label_rows(_load_teacher(recipe), rows(), path)
        write_json(done, wanted)


def rows_to_judge(recipe: Recipe) -> list[Row]:
    """At most ``judged`` rows, shuffled: those without a label, those labelled by construction, then the others."""
    rows = rows_without_label(recipe)
    mixed = shuffled_by_text([m.row for m in read_mix(recipe) if m.split == "train"], recipe.corpus["seed"])
    check_ids([*rows, *mixed])
    noisy = [row for row in mixed if is_noisy(row)]
    return [*rows, *noisy, *(row for row in mixed if not is_noisy(row))][: recipe.distill["judged"]]


def rows_without_label(recipe: Recipe) -> list[Row]:
    """The rows that only the teacher labels; none shares a text with a row that has a label, or with a test."""
    known = leak_keys(recipe.evaluate["sets"])
    known.update(*(row_keys(row) for row in [*(m.row for m in read_mix(recipe)), *calibration_rows(recipe)]))
    return unlabelled_rows(recipe.distill["unlabelled"], recipe.corpus["seed"], known)


def _load_teacher(recipe: Recipe) -> Teacher:
    """The teacher that the recipe names, ready to judge."""
    from convert.teachers.load import load_teacher
    from convert.teachers.trained import TrainedTeacher

    if recipe.teacher["kind"] != "trained":
        return load_teacher(recipe.teacher, recipe.build / "teacher")
    final = teacher(recipe)
    source = recipe.build / TEACHER_BASE
    return TrainedTeacher(source, final, *text_side(source), recipe.teacher["max_tokens"])


def teacher_name(recipe: Recipe) -> str | None:
    """What the student learned from beside labels: the teacher's model, and its weights as its scores name them."""
    from convert.teachers.score_file import read_scores

    if not recipe.distill:
        return None
    scored = next(iter(read_scores(label(recipe)).values())).teacher
    model = recipe.teacher.get("base", recipe.teacher).get("model")
    return f"{model}, {scored}" if model and model not in scored else scored
