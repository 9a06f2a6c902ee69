"""The student's INT4 files, and GPTQ's weights to compare with them."""

from __future__ import annotations

from pathlib import Path

from convert.files import write_json
from convert.recipe import Recipe
from convert.steps.data import read_examples, sample_batches, spread, text_side, trimmed_base
from convert.steps.kept import is_made
from convert.steps.training import qat, smoothing, train
from edgeguard.bundle import sha256_of

__all__ = ["export", "roads"]


def roads(recipe: Recipe) -> Path:
    """Step ``roads``: the float32 student rounded with GPTQ, for the comparison of the roads to INT4."""
    from convert.gptq import gptq, load_int4
    from convert.student import Student

    folder = recipe.build / "gptq"
    source = trimmed_base(recipe)
    inputs = {"roads": recipe.roads, "student_sha256": sha256_of(train(recipe) / "student.safetensors")}
    if recipe.roads and not is_made(folder / "student.safetensors", inputs, folder):
        rows = read_examples(recipe, "train", recipe.train["max_tokens"], source)[:: recipe.roads["every"]]
        rounded = Student.load(train(recipe))
        load_int4(rounded, gptq(rounded, sample_batches(rows, source))).save(folder)
    return folder


def export(recipe: Recipe) -> Path:
    """Step ``export``: ``model.onnx`` in INT4, and the other containers that the recipe names."""
    from convert.export.containers import export_containers
    from convert.student import Student

    path = recipe.build / "export" / "model.onnx"
    source, folder = qat(recipe) / "student.safetensors", trimmed_base(recipe)
    record = path.with_name("parity.json")
    if not is_made(record, {"student_sha256": sha256_of(source), "export": recipe.export}, path.parent):
        template, tokenizer = text_side(folder)
        max_tokens = recipe.student["max_tokens"]
        figures = export_containers(
            Student.load(source.parent),
            spread(read_examples(recipe, "validation", max_tokens, folder), recipe.export["samples"]),
            path.parent,
            pad_id=template.pad_id,
            max_tokens=max_tokens,
            tokenizer_json=tokenizer.to_str(),
            control_ids=template.reserved,
            about={"name": recipe.name, "version": recipe.version, "license": recipe.license},
            also=recipe.export.get("also", []),
            tolerance=recipe.export["tolerance"],
            shifts=smoothing(recipe),
        )
        write_json(record, {"tolerance": recipe.export["tolerance"], **figures})
    return path
