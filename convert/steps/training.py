"""The student: cut out of its base, trained, and made to survive INT4."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
import numpy as np

from convert.base import target_token
from convert.corpora.mix import MixedRow, check_no_test_rows, leak_keys
from convert.files import write_arrays
from convert.recipe import Recipe, RecipeError
from convert.steps.data import (
    data_sha256,
    encode_mixed,
    read_examples,
    read_mix,
    sample_batches,
    spread,
    text_side,
    trimmed_base,
)
from convert.steps.kept import is_made
from convert.steps.runs import run_training
from convert.steps.teaching import label, rows_to_judge, rows_without_label
from edgeguard.bundle import Bundle, sha256_of
from edgeguard.engines.gguf_source import read_onnx
from edgeguard.errors import BundleError
from edgeguard.hub import HUB_PREFIX, resolve_bundle
from edgeguard.manifest import MANIFEST_NAME

if TYPE_CHECKING:
    from convert.batches import Example
    from convert.student import Student

__all__ = ["SMOOTHING_ROWS", "blend_targets", "qat", "smoothing", "student", "train", "train_towards"]

SMOOTHING_ROWS = 300  # of the mix, whose activations are measured


def student(recipe: Recipe) -> Path:
    """Step ``student``: the untrained one, cut out of its base; or a trained one, of a recipe or bundle to start from.

    Raises RecipeError for a bundle that is not the recipe's, StudentError for one of another shape or vocabulary.
    """
    if recipe.start:
        return train(recipe.start)
    folder, table = recipe.build / "student", recipe.student
    source = trimmed_base(recipe)
    inputs = {"student": _settings(table), "base": recipe.base, "data": data_sha256(recipe)}
    if not is_made(folder / "student.safetensors", inputs, folder):
        made = _of_start_bundle(recipe, source) if "start_bundle" in table else _cut(recipe, source)
        made.save(folder)
    return folder


def _settings(table: dict[str, Any]) -> dict[str, Any]:
    """What decides the student: of a bundle to start from its manifest's checksum, and not where it lies."""
    if start := table.get("start_bundle"):
        return {**table, "start_bundle": {"manifest_sha256": start["manifest_sha256"]}}
    return table


def _cut(recipe: Recipe, source: Path) -> Student:
    """The base in ``source`` with fewer layers and neurons, as [student] says."""
    from convert.prune import block_importance, keep_layers, keep_neurons, neuron_importance
    from convert.student import HEAD, Student, StudentError

    table = recipe.student
    by_importance = table.get("choose_layers", "lowest") == "importance"
    ids = {label: target_token(source, text) for label, text in table.get("target_tokens", {}).items()}
    made = Student.from_base(source, None if by_importance else table["layers"], HEAD, ids)
    shape = made.onnx_config(table["max_tokens"])  # what no container can hold is refused before training
    for name, there in (("layers", shape.num_layers), ("intermediate_size", shape.intermediate_size)):
        if table.get(name, 0) > there:
            raise StudentError(f"[student] {name} = {table[name]}: the base has {there}. Take as many, or fewer.")
    if by_importance or "intermediate_size" in table:
        rows = read_examples(recipe, "train", table["max_tokens"], source)
        calibration = sample_batches(spread(rows, table["samples"]), source)
    if by_importance:
        importance = block_importance(made, calibration)
        keep_layers(made, importance.topk(table["layers"]).indices.tolist())
    if "intermediate_size" in table:
        keep_neurons(made, neuron_importance(made, calibration), table["intermediate_size"])
    return made


def _of_start_bundle(recipe: Recipe, source: Path) -> Student:
    """The student in the bundle that [student] names, its INT4 weights as float32, to be trained on."""
    from convert.gptq import load_weights
    from convert.student import Student, StudentError

    wanted = recipe.student["start_bundle"]
    spec = wanted["bundle"]
    try:
        bundle = Bundle.open(resolve_bundle(spec if spec.startswith(HUB_PREFIX) else recipe.path.parent / spec))
    except BundleError as error:
        raise RecipeError(f"{recipe.path.name}: [student] start_bundle: {error}") from error
    found = sha256_of(bundle.path / MANIFEST_NAME)
    if found != wanted["manifest_sha256"]:
        raise RecipeError(
            f"{recipe.path.name}: [student] start_bundle: the manifest in {bundle.path} ({bundle.label}) has the "
            f"SHA-256 {found}, the recipe names {wanted['manifest_sha256']}. Fetch that bundle, or name this one."
        )
    if bundle.load_tokenizer().to_str() != text_side(source)[1].to_str():
        raise StudentError(f"{bundle.label} has another tokenizer than the base {recipe.base['model']}.")
    held, max_tokens = read_onnx(bundle.file_for("onnx")), recipe.student["max_tokens"]
    made = Student.from_base(source, recipe.student["layers"], held.labels or bundle.manifest.head)
    if (shape := made.onnx_config(max_tokens)) != replace(held.config, max_tokens=max_tokens):
        raise StudentError(f"{bundle.label} holds {held.config}, [base] and [student] say {shape}.")
    return load_weights(made, held.weights)


def train(recipe: Recipe) -> Path:
    """Step ``train``: the float32 student, from the teacher's scores and the labels, or from labels alone."""
    from convert.distill import label_loss, teacher_loss
    from convert.student import Student
    from convert.teachers.trained import add_adapter, merge_adapter

    folder, table = recipe.build / "train", recipe.train
    inputs: dict[str, Any] = {"train": table, "distill": recipe.distill, "data": data_sha256(recipe)}
    inputs["student_sha256"] = sha256_of(student(recipe) / "student.safetensors")
    if recipe.distill:
        inputs["scores_sha256"] = sha256_of(label(recipe))
    if not is_made(folder / "final" / "student.safetensors", inputs, folder):
        pupil, source = Student.load(student(recipe)), trimmed_base(recipe)
        rows = _taught_examples(recipe, table["max_tokens"], source)
        if share := recipe.distill.get("start_share"):
            rows = blend_targets(pupil, rows, text_side(source)[0].pad_id, share, folder / "start_margins.npz")
        if "lora" in table:
            add_adapter(pupil, table["lora"], table.get("freeze_layers", 0), seed=table["seed"])
        loss = label_loss(table["hazard_weight"])
        if recipe.distill:
            weights = ("temperature", "label_weight", "benign_weight")
            loss = teacher_loss(
                hazard_weight=table["hazard_weight"], **{name: recipe.distill[name] for name in weights}
            )
        run_training(recipe, table, pupil, loss, folder, source, rows)
        (merge_adapter(pupil) if "lora" in table else pupil).save(folder / "final")
    return folder / "final"


def qat(recipe: Recipe) -> Path:
    """Step ``qat``: the student whose weights survive INT4, with the float32 student as its target."""
    from convert.fake_quant import enable_qat
    from convert.student import Student

    folder = recipe.build / "qat"
    inputs = {"qat": recipe.qat, "student_sha256": sha256_of(train(recipe) / "student.safetensors")}
    if recipe.qat and not is_made(folder / "final" / "student.safetensors", inputs, folder):
        target, pupil = Student.load(train(recipe)), Student.load(train(recipe))
        enable_qat(pupil.model, shifts=smoothing(recipe, train(recipe)))
        train_towards(target, recipe, recipe.qat, pupil, folder)
        pupil.save(folder / "final")
    return folder / "final"


def train_towards(target: Student, recipe: Recipe, table: dict[str, Any], pupil: Student, folder: Path) -> None:
    """Train ``pupil``, which INT4 holds in part or whole, to answer as the float32 ``target`` does; [qat] or [tune]."""
    from convert.distill import qat_loss

    source, max_tokens = trimmed_base(recipe), recipe.train["max_tokens"]
    settings = {"head_learning_rate": table["learning_rate"], **table, "max_tokens": max_tokens}
    loss = qat_loss(
        target,
        hidden_weight=table["hidden_weight"],
        label_weight=table["label_weight"],
        hazard_weight=recipe.train["hazard_weight"],
    )
    run_training(recipe, settings, pupil, loss, folder, source, _taught_examples(recipe, max_tokens, source))


def smoothing(recipe: Recipe, source: Path) -> dict[str, np.ndarray]:
    """How the rows that INT8 rounds are smoothed: measured once on the student in ``source``, and kept there."""
    from convert.smoothing import inputs_of, smoothing_shifts
    from convert.student import Student

    folder, inputs = source / "smoothing", {"student_sha256": sha256_of(source / "student.safetensors")}
    kept = folder / "shifts.npz"
    if not is_made(kept, inputs, folder):
        student, base = Student.load(source), trimmed_base(recipe)
        rows = spread(read_examples(recipe, "train", recipe.train["max_tokens"], base), SMOOTHING_ROWS)
        shifts = smoothing_shifts(inputs_of(student, sample_batches(rows, base)), student.numpy_weights())
        write_arrays(kept, **shifts)
    with np.load(kept) as stored:
        return {name: stored[name] for name in stored.files}


def _taught_examples(recipe: Recipe, max_tokens: int, source: Path) -> list[Example]:
    """The training rows, with the teacher's scores of them and the rows that it alone labels, where there is one."""
    from convert.teachers.formats import TeacherError
    from convert.teachers.score_file import read_scores

    if not recipe.distill:
        return read_examples(recipe, "train", max_tokens, source)
    scores, weight = read_scores(label(recipe)), recipe.distill["unlabelled_weight"]
    if recipe.teacher["kind"] == "scores":
        unlabelled = [row for row in rows_without_label(recipe) if row.id in scores]
    else:  # a file that grows may hold more than the recipe asks for by now
        judged = rows_to_judge(recipe)
        scores = {row.id: scores[row.id] for row in judged}
        unlabelled = [row for row in judged if row.label is None]
    mixed = [m for m in read_mix(recipe) if m.split == "train"]
    mixed += [MixedRow(row, "train", weight) for row in unlabelled]
    if not any(m.row.id in scores for m in mixed):
        raise TeacherError(f"{label(recipe)}: has a score of none of the {len(mixed)} rows to learn from.")
    check_no_test_rows((m.row for m in mixed), leak_keys(recipe.evaluate["sets"]))
    return encode_mixed(mixed, max_tokens, source, scores)


def blend_targets(pupil: Student, rows: list[Example], pad_id: int, share: float, kept: Path) -> list[Example]:
    """The teacher's margins, drawn by ``share`` towards those of the student that training starts from.

    Two judges that err in different places teach more together than either alone. The student's margins are kept in the
    file ``kept``, so that a resumed run has the very same targets.
    """
    from convert.distill import score
    from convert.student import best_device

    judged = [i for i, row in enumerate(rows) if row.teacher is not None]
    if not kept.is_file():
        click.echo(f"the student to start from judges {len(judged)} rows", err=True)
        logits = score(pupil.to(best_device()), [rows[i] for i in judged], pad_id, bf16=True)
        write_arrays(kept, margins=logits[:, 1] - logits[:, 0])
    blended = list(rows)
    with np.load(kept) as stored:
        margins = stored["margins"]
    for i, own in zip(judged, margins, strict=True):
        blended[i] = replace(rows[i], teacher=(1 - share) * float(rows[i].teacher or 0.0) + share * float(own))
    return blended
