"""The bundle, put together from what the other steps made."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

from convert.base import plain_tokenizer_json
from convert.corpora.registry import Row, get_set
from convert.files import read_json, write_json
from convert.recipe import Recipe
from convert.steps.containers import export
from convert.steps.data import corpus, data_sha256, text_side, trimmed_base
from convert.steps.measuring import evaluate
from convert.steps.teaching import rows_without_label, teacher_name

__all__ = ["package"]


def package(recipe: Recipe) -> Path:
    """Step ``package``: the bundle in ``models/``, opened and self-tested by the runtime before it gets there."""
    from convert.export.containers import FILES
    from convert.export.int8_graph import INT8_FILES
    from convert.package import SELF_TEST_TEXTS, make_manifest, put_in_place
    from convert.report import SHIPPED, model_card

    report_path = evaluate(recipe)
    report = read_json(report_path)
    staged = recipe.build / "package"
    shutil.rmtree(staged, ignore_errors=True)
    staged.mkdir(parents=True)
    for name in (FILES["onnx"], *INT8_FILES):
        shutil.copy(export(recipe).with_name(name), staged / name)
    (staged / "tokenizer.json").write_text(plain_tokenizer_json(trimmed_base(recipe)), encoding="utf-8")
    shipped = report["stages"][SHIPPED]
    fitted = {name: shipped[name] for name in ("calibration", "operating_points")}
    vectors = [_vector(recipe, prompt, response) for prompt, response in SELF_TEST_TEXTS]
    manifest = make_manifest(
        recipe,
        text_side(trimmed_base(recipe))[0],
        fitted,
        staged,
        vectors,
        teacher=teacher_name(recipe),
        data_sha256=data_sha256(recipe),
    )
    data = _with_unlabelled(recipe, read_json(corpus(recipe).with_name("data_manifest.json")))
    write_json(staged / "manifest.json", manifest)
    write_json(staged / "data_manifest.json", data)
    for record in ("RECORD.md", "record.png", "curves.png", "reliability.png"):
        shutil.copy(report_path.with_name(record), staged / record)
    for run in ("train", *([recipe.road] if recipe.road in ("qat", "tune") else [])):
        shutil.copy(recipe.build / run / "loss.png", staged / f"{run}_loss.png")
        shutil.copy(recipe.build / run / "log.jsonl", staged / f"{run}_log.jsonl")
    shutil.copy(report_path, staged / "report.json")
    (staged / "MODEL_CARD.md").write_text(model_card(recipe, manifest, report, data), encoding="utf-8")
    put_in_place(staged, recipe.models / recipe.name, recipe.export.get("max_bytes"))
    return recipe.models / recipe.name


def _with_unlabelled(recipe: Recipe, manifest: dict[str, Any]) -> dict[str, Any]:
    """The data manifest with the sets that only the teacher labelled."""
    if recipe.distill:
        rows = rows_without_label(recipe)
        manifest["unlabelled"] = {
            name: {
                "rows": sum(row.set == name for row in rows),
                "license": get_set(name).license,
                "source": get_set(name).source,
            }
            for name in recipe.distill["unlabelled"]
        }
    return manifest


def _vector(recipe: Recipe, prompt: str, response: str | None) -> dict[str, Any]:
    """A self-test vector: one text, judged alone by the exported file."""
    from convert.batches import encode_rows
    from convert.evaluate import margins_of
    from convert.record import SHIPPED
    from convert.scores import onnx_stage

    target = "prompt" if response is None else "response"
    template, tokenizer = text_side(trimmed_base(recipe))
    row = Row("self-test", "self-test", target, "safe", prompt, response)
    examples = encode_rows([row], template, tokenizer, recipe.student["max_tokens"])
    stage = onnx_stage(SHIPPED, export(recipe), template.pad_id)
    margin = float(margins_of(stage.logits(examples))[0])
    return {"prompt": prompt, "response": response, "tokens": len(examples[0].ids), "margin": round(margin, 4)}
