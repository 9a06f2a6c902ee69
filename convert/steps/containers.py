"""The student's integers, and the files that hold them."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from convert.files import write_json
from convert.quantize import read_int4, write_int4
from convert.recipe import Recipe
from convert.steps.data import read_examples, sample_batches, spread, text_side, trimmed_base
from convert.steps.kept import is_made
from convert.steps.training import qat, smoothing, train, train_towards
from edgeguard.bundle import sha256_of

if TYPE_CHECKING:
    from convert.student import Student

__all__ = ["export", "gptq", "tune"]

INTEGERS = "int4.npz"


def gptq(recipe: Recipe) -> Path:
    """Step ``gptq``: the float32 student, turned or as it is, rounded with GPTQ; and ``int4.npz``, its integers."""
    from convert.gptq import gptq as round_with_gptq
    from convert.gptq import load_weights

    folder, source = recipe.build / "gptq", trimmed_base(recipe)
    inputs = {"gptq": recipe.gptq, "student_sha256": sha256_of(train(recipe) / "student.safetensors")}
    if recipe.gptq and not is_made(folder / "student.safetensors", inputs, folder):
        rows = read_examples(recipe, "train", recipe.train["max_tokens"], source)[:: recipe.gptq["every"]]
        student = _before_rounding(recipe)
        integers = round_with_gptq(student, sample_batches(rows, source))
        write_int4(folder / INTEGERS, integers)
        load_weights(student, integers).save(folder)
    return folder


def tune(recipe: Recipe) -> Path:
    """Step ``tune``: GPTQ's integers with scales, norms and head trained towards the float32 student; ``int4.npz``."""
    from convert.student import Student
    from convert.tune import free_scales, tuned_weights

    folder, rounded = recipe.build / "tune", gptq(recipe)
    if not recipe.tune:
        return folder
    inputs = {"tune": recipe.tune, "student_sha256": sha256_of(rounded / "student.safetensors")}
    if not is_made(folder / "student.safetensors", inputs, folder):
        pupil = free_scales(Student.load(rounded), read_int4(rounded / INTEGERS))
        train_towards(_before_rounding(recipe), recipe, recipe.tune, pupil, folder)
        plain, integers = tuned_weights(pupil)
        write_int4(folder / INTEGERS, integers)
        plain.save(folder)
    return folder


def _before_rounding(recipe: Recipe) -> Student:
    """The float32 student, turned where [gptq] says so."""
    from convert.rotate import rotate_residual
    from convert.student import Student

    student = Student.load(train(recipe))
    if recipe.gptq.get("rotate"):
        rotate_residual(student)
    return student


def export(recipe: Recipe) -> Path:
    """Step ``export``: ``model.onnx`` in INT4, and the other containers that the recipe names."""
    from convert.export.containers import export_containers
    from convert.student import Student

    path = recipe.build / "export" / "model.onnx"
    source, folder = {"qat": qat, "gptq": gptq, "tune": tune}[recipe.road](recipe), trimmed_base(recipe)
    record, inputs = path.with_name("parity.json"), {"student_sha256": sha256_of(source / "student.safetensors")}
    if not is_made(record, {**inputs, "export": recipe.export}, path.parent):
        template, tokenizer = text_side(folder)
        max_tokens = recipe.student["max_tokens"]
        figures = export_containers(
            Student.load(source),
            spread(read_examples(recipe, "validation", max_tokens, folder), recipe.export["samples"]),
            path.parent,
            pad_id=template.pad_id,
            max_tokens=max_tokens,
            tokenizer_json=tokenizer.to_str(),
            control_ids=template.reserved,
            about={"name": recipe.name, "version": recipe.version, "license": recipe.license},
            also=recipe.export.get("also", []),
            tolerance=recipe.export["tolerance"],
            shifts=smoothing(recipe, source),
            integers=read_int4(source / INTEGERS) if recipe.road in ("gptq", "tune") else {},
        )
        write_json(record, {"tolerance": recipe.export["tolerance"], **figures})
    return path
