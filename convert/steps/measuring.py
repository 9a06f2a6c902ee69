"""The record: every stage measured on the test sets."""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from convert.corpora.mix import check_no_test_rows, leak_keys
from convert.corpora.registry import Row
from convert.files import read_json, write_json, write_whole
from convert.recipe import Recipe
from convert.steps.containers import export, gptq, tune
from convert.steps.data import calibration_rows, evaluation_rows, read_mix, text_side, trimmed_base
from convert.steps.teaching import judge_tests
from convert.steps.training import qat, train

if TYPE_CHECKING:
    from convert.evaluate import MeasuredStage
    from convert.scores import Stage, TeacherStage

__all__ = ["evaluate", "measure", "stages"]


def evaluate(recipe: Recipe) -> Path:
    """Step ``evaluate``: ``report.json`` over all stages, ``RECORD.md`` and the plots."""
    from convert.plots import draw_plots
    from convert.report import record_markdown

    tests, held_back = evaluation_rows(recipe), calibration_rows(recipe)
    # A test set may have been named after training.
    check_no_test_rows((m.row for m in read_mix(recipe)), leak_keys(recipe.evaluate["sets"]))
    report, shipped = measure(recipe, tests, held_back)
    folder = recipe.build / "evaluate"
    folder.mkdir(exist_ok=True)
    draw_plots(report, shipped, tests, held_back, recipe.evaluate["curves"], folder)
    command = f"python -m convert evaluate recipes/{recipe.path.name}"
    text = record_markdown(report, f"{recipe.name} {recipe.version}", command)
    write_whole(folder / "RECORD.md", lambda path: path.write_text(text, encoding="utf-8"))
    write_json(folder / "report.json", report)
    return folder / "report.json"


def measure(recipe: Recipe, tests: dict[str, list[Row]], held_back: list[Row]) -> tuple[dict[str, Any], MeasuredStage]:
    """The report over all stages, and the shipped one. Scores are kept and read back."""
    from convert.evaluate import measure_stage, parity_rows, verdict_parity
    from convert.record import CONTAINERS, POINT, ROADS, SHIPPED, make_report
    from convert.scores import score_rows

    template, tokenizer = text_side(trimmed_base(recipe))
    max_tokens, cache = recipe.student["max_tokens"], recipe.build / "scores"

    def score(stage: Stage | TeacherStage, name: str, rows: Sequence[Row]) -> np.ndarray:
        return score_rows(stage, name, rows, template, tokenizer, max_tokens, cache)

    kinds = stages(recipe, tests)
    measured = {stage.name: measure_stage(stage, tests, held_back, score) for stage in kinds}
    report = make_report(
        list(measured.values()), tests, held_back, hazard_set=recipe.evaluate["hazards"], road=ROADS[recipe.road]
    )
    sample, fitted = parity_rows(tests), measured[SHIPPED].fitted
    in_torch = _roads(recipe)[recipe.road]
    reference = score(in_torch, "parity", sample)
    report["parity"] = {
        stage.name: {
            "reference": in_torch.name,
            **verdict_parity(sample, reference, score(stage, "parity", sample), fitted, POINT),
        }
        for stage in kinds
        if stage.name in CONTAINERS
    }
    report["export"] = read_json(export(recipe).with_name("parity.json"))
    return report, measured[SHIPPED]


def stages(recipe: Recipe, tests: Mapping[str, Sequence[Row]]) -> list[Stage | TeacherStage]:
    """What is measured: the shipped file, in INT8 compute as well, and what it came from, where F1 is defined.

    On the sets that ``compare`` names also the roads to INT4 and the other containers; and the teacher where it judged.
    """
    from convert.export.containers import FILES
    from convert.export.int8_graph import INT8_GRAPH
    from convert.record import GGUF, INT8, REFERENCE, SHIPPED, STANDARD, TEACHER
    from convert.scores import gguf_stage, int8_stage, onnx_stage, teacher_stage, torch_stage

    pad_id = text_side(trimmed_base(recipe))[0].pad_id
    some, shipped = tuple(recipe.evaluate.get("compare", ())), export(recipe)
    measured: list[Stage | TeacherStage] = [
        onnx_stage(SHIPPED, shipped, pad_id),
        int8_stage(INT8, shipped.with_name(INT8_GRAPH), pad_id),
        torch_stage(REFERENCE, train(recipe), pad_id, _of_both_classes(tests)),
    ]
    if some:
        measured += _roads(recipe, some).values()
    also = recipe.export.get("also", []) if some else []
    if "gguf" in also and importlib.util.find_spec("llama_cpp"):
        measured.append(gguf_stage(GGUF, shipped.with_name(FILES["gguf"]), some))
    if "standard" in also:
        measured.append(onnx_stage(STANDARD, shipped.with_name(FILES["standard"]), pad_id, some))
    if recipe.evaluate.get("teacher_sets"):
        measured.append(teacher_stage(TEACHER, judge_tests(recipe)))
    return measured


def _of_both_classes(tests: Mapping[str, Sequence[Row]]) -> tuple[str, ...]:
    """The sets that define an F1."""
    return tuple(name for name, rows in tests.items() if len({row.label for row in rows}) > 1)


def _roads(recipe: Recipe, sets: tuple[str, ...] | None = None) -> dict[str, Stage]:
    """The student by every road to INT4 that the recipe has, in torch."""
    from convert.record import ROADS
    from convert.scores import int4_stage, torch_stage

    pad_id = text_side(trimmed_base(recipe))[0].pad_id
    found = {"rounding": int4_stage(ROADS["rounding"], train(recipe), pad_id, sets)}
    # GPTQ's values are on the grid already, and not where rounding would put them: they are run as they are.
    for name, step in (("gptq", gptq), ("tune", tune)):
        if getattr(recipe, name):
            found[name] = torch_stage(ROADS[name], step(recipe), pad_id, sets)
    if recipe.qat:
        found["qat"] = int4_stage(ROADS["qat"], qat(recipe), pad_id, sets)
    return found
