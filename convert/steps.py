"""The steps of a recipe, in order; each reads what the one before wrote and is skipped when its own result is there."""

from __future__ import annotations

import gzip
import json
import shutil
from dataclasses import asdict, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
import numpy as np

from convert.base import chatml_template, fetch_base, plain_tokenizer_json
from convert.corpora.mix import HELD_OUT_NAME, MixedRow, build_mix, check_no_test_rows, held_out_rows, leak_keys
from convert.corpora.registry import CorpusError, Row, get_set, read_set
from convert.files import read_json, write_json, write_whole
from convert.recipe import Recipe, RecipeError
from edgeguard.bundle import sha256_of
from edgeguard.prompt import Template

if TYPE_CHECKING:
    from tokenizers import Tokenizer

    from convert.batches import Example
    from convert.distill import Loss
    from convert.evaluate import Fitted
    from convert.scores import Stage
    from convert.student import Student

__all__ = ["ORDER", "base", "corpus", "evaluate", "export", "package", "qat", "teacher", "train"]

ORDER = ("base", "corpus", "teacher", "train", "qat", "export", "evaluate", "package")


def _made(result: Path, inputs: dict[str, Any]) -> bool:
    """Whether ``result`` is there; its inputs are kept beside it. Raises RecipeError when it was made from others."""
    record = result.with_name(f"{result.name}.inputs.json")
    inputs = json.loads(json.dumps(inputs))
    if record.is_file() and read_json(record) != inputs:
        raise RecipeError(f"{result} was made from other settings than the recipe has now. Remove it, or pass --build.")
    if not record.is_file():
        write_json(record, inputs)
    return result.exists()


def base(recipe: Recipe) -> Path:
    """Step ``base``: the base model as a transformers folder."""
    return fetch_base(recipe.base, recipe.build / "base")


def corpus(recipe: Recipe) -> Path:
    """Step ``corpus``: ``mix.jsonl.gz`` and ``data_manifest.json``."""
    path = recipe.build / "mix.jsonl.gz"
    if not _made(path, {"corpus": recipe.corpus}):
        keys = leak_keys(recipe.evaluate["sets"])
        sets, constructed = recipe.corpus["sets"], recipe.corpus["constructed"]
        mix = build_mix(sets, constructed, seed=recipe.corpus["seed"], keys=keys)
        lines = [json.dumps({**asdict(m.row), "split": m.split, "weight": m.weight}) for m in mix.rows]
        write_json(recipe.build / "data_manifest.json", mix.manifest)
        write_whole(path, lambda p: p.write_bytes(gzip.compress(("\n".join(lines) + "\n").encode())))
    return path


def read_mix(recipe: Recipe) -> list[MixedRow]:
    """The rows that step ``corpus`` wrote."""
    rows = []
    for line in gzip.decompress(corpus(recipe).read_bytes()).decode().split("\n"):
        if line:
            data = json.loads(line)
            split, weight = data.pop("split"), data.pop("weight")
            data["hazards"], data["turns"] = tuple(data["hazards"]), tuple((r, t) for r, t in data["turns"])
            rows.append(MixedRow(Row(**data), split, weight))
    return rows


def text_side(folder: Path) -> tuple[Template, Tokenizer]:
    """Template and tokenizer of the base in ``folder``; those of the student's base are what the bundle carries."""
    from tokenizers import Tokenizer

    return chatml_template(folder), Tokenizer.from_str(plain_tokenizer_json(folder))


def _examples(recipe: Recipe, split: str, max_tokens: int, folder: Path) -> list[Example]:
    """The rows of a split, encoded for the base in ``folder``."""
    from convert.batches import encode_rows

    template, tokenizer = text_side(folder)
    mixed = [m for m in read_mix(recipe) if m.split == split]
    if split == "train":
        check_no_test_rows((m.row for m in mixed), leak_keys(recipe.evaluate["sets"]))
    return encode_rows([m.row for m in mixed], template, tokenizer, max_tokens, [m.weight for m in mixed])


def teacher(recipe: Recipe) -> Path:
    """Step ``teacher``: the teacher's weights; trained on labels where the recipe says so."""
    from convert.distill import label_loss
    from convert.student import Student
    from convert.teachers.trained import add_adapter, save_adapter

    folder = recipe.build / "teacher"
    table = recipe.teacher
    source = fetch_base(table["base"], folder / "base")
    data = read_json(corpus(recipe).with_name("data_manifest.json"))["sha256"]
    done = folder / "final" / "teacher.json"
    if not _made(done, {"teacher": table, "data": data}):
        student = Student.from_base(source, table["layers"])
        add_adapter(student, table["train"]["lora"], table["train"]["freeze_layers"])
        _run(recipe, table["train"], student, label_loss(table["train"]["hazard_weight"]), folder, source)
        save_adapter(student, done.parent)
    return done.parent


def train(recipe: Recipe) -> Path:
    """Step ``train``: the float32 student, from labels."""
    from convert.distill import label_loss
    from convert.student import Student

    folder = recipe.build / "train"
    data = read_json(corpus(recipe).with_name("data_manifest.json"))["sha256"]
    if not _made(folder / "final", {"train": recipe.train, "student": recipe.student, "data": data}):
        student = Student.from_base(base(recipe), recipe.student["layers"])
        _run(recipe, recipe.train, student, label_loss(recipe.train["hazard_weight"]), folder, base(recipe))
        student.save(folder / "final")
    return folder / "final"


def qat(recipe: Recipe) -> Path:
    """Step ``qat``: the student whose weights survive INT4, with the float32 student as its target."""
    from convert.distill import qat_loss
    from convert.fake_quant import enable_qat
    from convert.student import Student

    folder = recipe.build / "qat"
    source = sha256_of(train(recipe) / "student.safetensors")
    if not _made(folder / "final", {"qat": recipe.qat, "student_sha256": source}):
        target, student = Student.load(train(recipe)), Student.load(train(recipe))
        enable_qat(student.model)
        table = {
            "head_learning_rate": recipe.qat["learning_rate"],
            **recipe.qat,
            "max_tokens": recipe.train["max_tokens"],
        }
        loss = qat_loss(
            target,
            hidden_weight=recipe.qat["hidden_weight"],
            label_weight=recipe.qat["label_weight"],
            hazard_weight=recipe.train["hazard_weight"],
        )
        _run(recipe, table, student, loss, folder, base(recipe))
        student.save(folder / "final")
    return folder / "final"


def _run(
    recipe: Recipe, table: dict[str, Any], student: Student, loss: Loss, folder: Path, source: Path
) -> None:
    """Train a student of the base in ``source`` with the settings of a recipe's table; the run is kept in ``folder``."""
    from convert.distill import Settings, Trainer

    names = {f.name for f in fields(Settings)}
    settings = Settings(**{name: value for name, value in table.items() if name in names})
    train_rows = _examples(recipe, "train", table["max_tokens"], source)
    validation = _examples(recipe, "validation", table["max_tokens"], source)
    Trainer(student, loss, train_rows, validation, text_side(source)[0].pad_id, settings, folder).run()


def export(recipe: Recipe) -> Path:
    """Step ``export``: ``model.onnx`` in INT4, accepted only when it reproduces the torch model of the same weights."""
    from convert.batches import collate
    from convert.distill import score
    from convert.export.onnx import export_onnx
    from convert.fake_quant import bake_int4
    from convert.student import Student

    path = recipe.build / "export" / "model.onnx"
    source = qat(recipe) / "student.safetensors"
    record = path.with_name("parity.json")
    if not (path.is_file() and record.is_file() and read_json(record)["student_sha256"] == sha256_of(source)):
        student = Student.load(source.parent)
        samples = _examples(recipe, "validation", recipe.student["max_tokens"], base(recipe))[: recipe.export["samples"]]
        pad_id = text_side(base(recipe))[0].pad_id
        batch = collate(samples, pad_id)
        weights, tolerance = student.numpy_weights(), recipe.export["tolerance"]
        config = student.onnx_config(recipe.student["max_tokens"])
        bake_int4(student.model)
        reference = score(student, samples, pad_id, bf16=False)
        figures = export_onnx(
            weights,
            config,
            path,
            reference,
            batch.ids.numpy(),
            batch.mask.numpy(),
            tolerance=recipe.export["tolerance"],
        )
        write_json(record, {**figures, "tolerance": tolerance, "student_sha256": sha256_of(source)})
    return path


def evaluation_rows(recipe: Recipe) -> dict[str, list[Row]]:
    """The labelled rows of every test set that the recipe names, in its order."""
    names = recipe.evaluate["sets"]
    rows = {name: held_out_rows() if name == HELD_OUT_NAME else read_set(name) for name in names}
    return {name: [row for row in rows[name] if row.label] for name in names}


def calibration_rows(recipe: Recipe) -> list[Row]:
    """The split put aside before training, and the calibration sets that the recipe names."""
    rows = [m.row for m in read_mix(recipe) if m.split == "calibration"]
    for name in recipe.calibrate["sets"]:
        if get_set(name).role != "calibration":
            raise CorpusError(f"{name}: role {get_set(name).role}; only calibration sets may be named in [calibrate].")
        rows += [row for row in read_set(name) if row.label]
    return rows


def stages(recipe: Recipe) -> list[Stage]:
    """What is measured: the shipped file first, then the float32 student it came from."""
    from convert.report import REFERENCE, SHIPPED
    from convert.scores import onnx_stage, torch_stage

    pad_id = text_side(base(recipe))[0].pad_id
    return [onnx_stage(SHIPPED, export(recipe), pad_id), torch_stage(REFERENCE, train(recipe), pad_id)]


def measure(
    recipe: Recipe, stage: Stage, tests: dict[str, list[Row]]
) -> tuple[Fitted, dict[str, Any], dict[str, np.ndarray]]:
    """Fit a stage on the calibration split, then measure it on ``tests``. Scores are kept and read back."""
    from convert.evaluate import fit_stage, measure_set
    from convert.scores import score_rows

    template, tokenizer = text_side(base(recipe))
    max_tokens, cache = recipe.student["max_tokens"], recipe.build / "scores"

    def logits(name: str, rows: list[Row]) -> np.ndarray:
        return score_rows(stage, name, rows, template, tokenizer, max_tokens, cache)

    held_back = calibration_rows(recipe)
    fitted = fit_stage(held_back, logits("calibration", held_back))
    scores = {name: logits(name, rows) for name, rows in tests.items()}
    return fitted, {name: measure_set(rows, scores[name], fitted) for name, rows in tests.items()}, scores


def evaluate(recipe: Recipe) -> Path:
    """Step ``evaluate``: ``report.json`` over all stages, and the plots."""
    from convert.evaluate import POLICY, hazard_recall, margins_of, mean_f1_lost
    from convert.report import REFERENCE, SHIPPED, data_revisions, plot_report

    rows = evaluation_rows(recipe)
    report: dict[str, Any] = {"policy": POLICY, "data": data_revisions(list(rows)), "stages": {}}
    for stage in stages(recipe):
        fitted, sets, scores = measure(recipe, stage, rows)
        report["stages"][stage.name] = {"weights_sha256": stage.key, **fitted.to_dict(), "sets": sets}
        if stage.name == SHIPPED:
            prompts = recipe.evaluate["hazards"]
            report["hazards"] = hazard_recall(rows[prompts], scores[prompts], fitted, "balanced")
            curves = {
                name: (
                    np.array([row.label == "unsafe" for row in rows[name]]),
                    fitted.probabilities(margins_of(scores[name]), [row.target for row in rows[name]]),
                )
                for name in recipe.evaluate["curves"]
            }
    both = report["stages"]
    report["int4_loss"] = mean_f1_lost(both[REFERENCE]["sets"], both[SHIPPED]["sets"], "balanced")
    report["parity"] = read_json(export(recipe).with_name("parity.json"))
    folder = recipe.build / "evaluate"
    folder.mkdir(exist_ok=True)
    plot_report(report, curves, folder)
    write_json(folder / "report.json", report)
    return folder / "report.json"


def package(recipe: Recipe) -> Path:
    """Step ``package``: the bundle in ``models/``, opened and self-tested by the runtime before it gets there."""
    from convert.package import SELF_TEST_TEXTS, make_manifest, put_in_place
    from convert.report import SHIPPED, model_card

    report_path = evaluate(recipe)
    report = read_json(report_path)
    staged = recipe.build / "package"
    shutil.rmtree(staged, ignore_errors=True)
    staged.mkdir(parents=True)
    shutil.copy(export(recipe), staged / "model.onnx")
    (staged / "tokenizer.json").write_text(plain_tokenizer_json(base(recipe)), encoding="utf-8")
    shipped = report["stages"][SHIPPED]
    fitted = {name: shipped[name] for name in ("calibration", "operating_points")}
    vectors = [_vector(recipe, prompt, response) for prompt, response in SELF_TEST_TEXTS]
    manifest = make_manifest(recipe, text_side(base(recipe))[0], fitted, staged, vectors)
    data = read_json(recipe.build / "data_manifest.json")
    write_json(staged / "manifest.json", manifest)
    write_json(staged / "data_manifest.json", data)
    for picture in ("curves.png", "reliability.png"):
        shutil.copy(report_path.with_name(picture), staged / picture)
    for run in ("train", "qat"):
        shutil.copy(recipe.build / run / "loss.png", staged / f"{run}_loss.png")
        shutil.copy(recipe.build / run / "log.jsonl", staged / f"{run}_log.jsonl")
    shutil.copy(report_path, staged / "report.json")
    (staged / "MODEL_CARD.md").write_text(model_card(recipe, manifest, report, data), encoding="utf-8")
    put_in_place(staged, recipe.models / recipe.name)
    return recipe.models / recipe.name


def _vector(recipe: Recipe, prompt: str, response: str | None) -> dict[str, Any]:
    """A self-test vector: one text, judged alone by the exported file."""
    from convert.batches import encode_rows
    from convert.evaluate import margins_of

    target = "prompt" if response is None else "response"
    template, tokenizer = text_side(base(recipe))
    row = Row("self-test", "self-test", target, "safe", prompt, response)
    examples = encode_rows([row], template, tokenizer, recipe.student["max_tokens"])
    margin = float(margins_of(stages(recipe)[0].logits(examples))[0])
    return {"prompt": prompt, "response": response, "tokens": len(examples[0].ids), "margin": round(margin, 4)}


def run(recipe: Recipe) -> Path:
    """All steps in order; what is there already is kept."""
    result = recipe.build
    for name in ORDER:
        click.echo(f"== {name}", err=True)
        result = globals()[name](recipe)
    return result
