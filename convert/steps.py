"""The steps of a recipe, in order; each reads what the one before wrote and is skipped when its own result is there."""

from __future__ import annotations

import gzip
import importlib.util
import json
import shutil
from collections.abc import Callable, Sequence
from dataclasses import asdict, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
import numpy as np

from convert.base import chat_template, fetch_base, plain_tokenizer_json, target_token
from convert.corpora.mix import (
    HELD_OUT_NAME,
    MixedRow,
    build_mix,
    check_no_test_rows,
    held_out_rows,
    is_noisy,
    leak_keys,
    row_keys,
    shuffled_by_text,
    unlabelled_rows,
)
from convert.corpora.registry import CorpusError, Row, get_set, read_set
from convert.files import read_json, write_json, write_whole
from convert.recipe import Recipe, RecipeError
from edgeguard.bundle import sha256_of
from edgeguard.prompt import Template

if TYPE_CHECKING:
    from tokenizers import Tokenizer

    from convert.batches import Example
    from convert.distill import Loss
    from convert.evaluate import MeasuredStage
    from convert.scores import Stage, TeacherStage
    from convert.student import Student
    from convert.teachers.score_file import Teacher

__all__ = [
    "ORDER",
    "base",
    "corpus",
    "evaluate",
    "export",
    "label",
    "package",
    "qat",
    "roads",
    "student",
    "teacher",
    "train",
]

ORDER = ("base", "corpus", "teacher", "label", "student", "train", "qat", "roads", "export", "evaluate", "package")
SHIFTS = "shifts.npz"
SMOOTHING_ROWS = 300  # of the mix, whose activations are measured
TEACHER_BASE = "teacher_base"
SAMPLE_TOKENS = 4096  # of one batch that pruning looks at


def _made(result: Path, inputs: dict[str, Any], folder: Path) -> bool:
    """Whether ``result`` is there. What it is made from is kept in ``folder`` beside everything else of the step.

    Raises RecipeError when something in the folder, a checkpoint for one, was made from other settings.
    """
    record = folder / "inputs.json"
    inputs = json.loads(json.dumps(inputs))
    if record.is_file() and read_json(record) != inputs:
        raise RecipeError(f"{folder} was made from other settings than the recipe has now. Remove it, or pass --build.")
    if not record.is_file():
        write_json(record, inputs)
    return result.exists()


def base(recipe: Recipe) -> Path:
    """Step ``base``: the base model as a transformers folder."""
    return fetch_base(recipe.base, recipe.build / "base")


def corpus(recipe: Recipe) -> Path:
    """Step ``corpus``: ``mix.jsonl.gz`` and ``data_manifest.json``."""
    folder = recipe.build / "corpus"
    path = folder / "mix.jsonl.gz"
    if not _made(path, {"corpus": recipe.corpus}, folder):
        keys = leak_keys(recipe.evaluate["sets"])
        sets, constructed = recipe.corpus["sets"], recipe.corpus["constructed"]
        mix = build_mix(sets, constructed, seed=recipe.corpus["seed"], keys=keys)
        lines = [json.dumps({**asdict(m.row), "split": m.split, "weight": m.weight}) for m in mix.rows]
        write_json(folder / "data_manifest.json", mix.manifest)
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


def trimmed_base(recipe: Recipe) -> Path:
    """The student's base: with the tokens alone that the mix uses, where the recipe says so."""
    from convert.trim import trim_base

    least = recipe.student.get("trim_min_count")
    if not least:
        return base(recipe)
    folder = recipe.build / "trimmed"
    record = folder / "trimmed.json"
    inputs = {"base": recipe.base, "trim_min_count": least, "data": _data_sha256(recipe)}
    inputs["target_tokens"] = recipe.student.get("target_tokens")
    if not _made(record, inputs, folder):
        texts = [text for m in read_mix(recipe) if m.split == "train" for _, text in m.row.messages()]
        texts += [text for text in recipe.student.get("target_tokens", {}).values() for _ in range(least)]
        write_json(record, trim_base(base(recipe), folder, texts, min_count=least))
    return folder


def text_side(folder: Path) -> tuple[Template, Tokenizer]:
    """Template and tokenizer of the base in ``folder``; those of the student's base are what the bundle carries."""
    from tokenizers import Tokenizer

    return chat_template(folder), Tokenizer.from_str(plain_tokenizer_json(folder))


def _data_sha256(recipe: Recipe) -> str:
    """The hash of the mix, over every row."""
    return str(read_json(corpus(recipe).with_name("data_manifest.json"))["sha256"])


def _examples(recipe: Recipe, split: str, max_tokens: int, source: Path, *, taught: bool = True) -> list[Example]:
    """The rows of a split, encoded for the base in ``source``; ``taught``: training rows with the teacher's scores."""
    from convert.batches import encode_rows
    from convert.teachers.score_file import read_scores

    mixed = [m for m in read_mix(recipe) if m.split == split]
    rows, weights, scores = [m.row for m in mixed], [m.weight for m in mixed], {}
    if split == "train":
        keys = leak_keys(recipe.evaluate["sets"])
        if recipe.distill and taught:
            scores = read_scores(label(recipe))
            judged = [row for row in _unlabelled(recipe) if row.id in scores]
            rows += judged
            weights += [recipe.distill["unlabelled_weight"]] * len(judged)
        check_no_test_rows(rows, keys)
    return encode_rows(rows, *text_side(source), max_tokens, weights, scores)


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
    if not _made(done, {**settings, "data": _data_sha256(recipe)}, folder):
        student = Student.from_base(source, table["layers"])
        add_adapter(student, table["train"]["lora"], table["train"]["freeze_layers"])
        loss = label_loss(table["train"]["hazard_weight"])
        rows = _examples(recipe, "train", table["train"]["max_tokens"], source, taught=False)
        _run(recipe, table["train"], student, loss, folder, source, rows)
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
        _judge(recipe, lambda: rows_to_judge(recipe), path, {**asked, "data": _data_sha256(recipe)})
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


def _spread(examples: list[Example], count: int) -> list[Example]:
    """About ``count`` examples from all over the mix, whose sets follow one another."""
    return examples[:: max(1, len(examples) // count)]


def rows_to_judge(recipe: Recipe) -> list[Row]:
    """At most ``judged`` rows, shuffled: those without a label, those labelled by construction, then the others."""
    rows = _unlabelled(recipe)
    mixed = shuffled_by_text([m.row for m in read_mix(recipe) if m.split == "train"], recipe.corpus["seed"])
    noisy = [row for row in mixed if is_noisy(row)]
    return [*rows, *noisy, *(row for row in mixed if not is_noisy(row))][: recipe.distill["judged"]]


def _unlabelled(recipe: Recipe) -> list[Row]:
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


def student(recipe: Recipe) -> Path:
    """Step ``student``: the untrained student, cut out of its base; or the trained one of the recipe to start from."""
    from convert.batches import batches
    from convert.prune import block_importance, keep_layers, keep_neurons, neuron_importance
    from convert.student import HEAD, Student

    if recipe.start:
        return train(recipe.start)
    folder, table = recipe.build / "student", recipe.student
    source = trimmed_base(recipe)
    inputs = {"student": table, "base": recipe.base, "data": _data_sha256(recipe)}
    if not _made(folder / "student.safetensors", inputs, folder):
        by_importance = table.get("choose_layers", "lowest") == "importance"
        ids = {label: target_token(source, text) for label, text in table.get("target_tokens", {}).items()}
        made = Student.from_base(source, None if by_importance else table["layers"], HEAD, ids)
        made.onnx_config(table["max_tokens"])  # a shape that no container can hold is refused before training
        if by_importance or "intermediate_size" in table:
            rows = _spread(_examples(recipe, "train", table["max_tokens"], source, taught=False), table["samples"])
            calibration = [batch for _, batch in batches(rows, SAMPLE_TOKENS, text_side(source)[0].pad_id)]
        if by_importance:
            importance = block_importance(made, calibration)
            keep_layers(made, importance.topk(table["layers"]).indices.tolist())
        if "intermediate_size" in table:
            keep_neurons(made, neuron_importance(made, calibration), table["intermediate_size"])
        made.save(folder)
    return folder


def train(recipe: Recipe) -> Path:
    """Step ``train``: the float32 student, from the teacher's scores and the labels, or from labels alone."""
    from convert.distill import label_loss, teacher_loss
    from convert.student import Student
    from convert.teachers.trained import add_adapter, merge_adapter

    folder, table = recipe.build / "train", recipe.train
    inputs: dict[str, Any] = {"train": table, "distill": recipe.distill, "data": _data_sha256(recipe)}
    inputs["student_sha256"] = sha256_of(student(recipe) / "student.safetensors")
    if recipe.distill:
        inputs["scores_sha256"] = sha256_of(label(recipe))
    if not _made(folder / "final" / "student.safetensors", inputs, folder):
        pupil, source = Student.load(student(recipe)), trimmed_base(recipe)
        rows = _examples(recipe, "train", table["max_tokens"], source)
        if share := recipe.distill.get("start_share"):
            rows = _blended(pupil, rows, text_side(source)[0].pad_id, share, folder / "start_margins.npy")
        if "lora" in table:
            add_adapter(pupil, table["lora"], table["freeze_layers"])
        loss = label_loss(table["hazard_weight"])
        if recipe.distill:
            weights = ("temperature", "label_weight", "benign_weight")
            loss = teacher_loss(
                hazard_weight=table["hazard_weight"], **{name: recipe.distill[name] for name in weights}
            )
        _run(recipe, table, pupil, loss, folder, source, rows)
        (merge_adapter(pupil) if "lora" in table else pupil).save(folder / "final")
    return folder / "final"


def _blended(pupil: Student, rows: list[Example], pad_id: int, share: float, kept: Path) -> list[Example]:
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
        write_whole(kept, lambda path: _save_array(path, logits[:, 1] - logits[:, 0]))
    blended = list(rows)
    for i, own in zip(judged, np.load(kept), strict=True):
        blended[i] = replace(rows[i], teacher=(1 - share) * float(rows[i].teacher or 0.0) + share * float(own))
    return blended


def _save_array(path: Path, array: np.ndarray) -> None:
    with path.open("wb") as stream:  # given a name, numpy would append its own suffix
        np.save(stream, array)


def qat(recipe: Recipe) -> Path:
    """Step ``qat``: the student whose weights survive INT4, with the float32 student as its target."""
    from convert.distill import qat_loss
    from convert.fake_quant import enable_qat
    from convert.student import Student

    folder = recipe.build / "qat"
    inputs = {"qat": recipe.qat, "student_sha256": sha256_of(train(recipe) / "student.safetensors")}
    if not _made(folder / "final" / "student.safetensors", inputs, folder):
        target, pupil = Student.load(train(recipe)), Student.load(train(recipe))
        enable_qat(pupil.model, shifts=_shifts(recipe, target))
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
        source = trimmed_base(recipe)
        _run(recipe, table, pupil, loss, folder, source, _examples(recipe, "train", table["max_tokens"], source))
        pupil.save(folder / "final")
    return folder / "final"


def _shifts(recipe: Recipe, target: Student) -> dict[str, np.ndarray]:
    """How the rows that INT8 rounds are smoothed: measured on the float32 student once, kept beside the QAT student."""
    from convert.batches import batches
    from convert.smoothing import input_magnitudes, smoothing_shifts

    kept, source = recipe.build / "qat" / SHIFTS, trimmed_base(recipe)
    if not kept.is_file():
        rows = _examples(recipe, "train", recipe.train["max_tokens"], source, taught=False)
        sample = batches(_spread(rows, SMOOTHING_ROWS), SAMPLE_TOKENS, text_side(source)[0].pad_id)
        shifts = smoothing_shifts(input_magnitudes(target, [batch for _, batch in sample]), target.numpy_weights())
        write_whole(kept, lambda path: _save_arrays(path, shifts))
    with np.load(kept) as stored:
        return {name: stored[name] for name in stored.files}


def _save_arrays(path: Path, arrays: dict[str, np.ndarray]) -> None:
    with path.open("wb") as stream:  # given a name, numpy would append its own suffix
        np.savez(stream, **arrays)  # type: ignore[arg-type]


def _run(
    recipe: Recipe,
    table: dict[str, Any],
    student: Student,
    loss: Loss,
    folder: Path,
    source: Path,
    rows: list[Example],
) -> None:
    """Train a student of the base in ``source`` with a recipe's table of settings; the run is kept in ``folder``."""
    from convert.distill import Settings, Trainer

    names = {f.name for f in fields(Settings)}
    settings = Settings(**{name: value for name, value in table.items() if name in names})
    validation = _examples(recipe, "validation", table["max_tokens"], source)
    Trainer(student, loss, rows, validation, text_side(source)[0].pad_id, settings, folder).run()


def roads(recipe: Recipe) -> Path:
    """Step ``roads``: the float32 student rounded with GPTQ, for the comparison of the roads to INT4."""
    from convert.batches import batches
    from convert.gptq import gptq, load_int4
    from convert.student import Student

    folder = recipe.build / "gptq"
    source = trimmed_base(recipe)
    inputs = {"roads": recipe.roads, "student_sha256": sha256_of(train(recipe) / "student.safetensors")}
    if recipe.roads and not _made(folder / "student.safetensors", inputs, folder):
        rows = _examples(recipe, "train", recipe.train["max_tokens"], source, taught=False)[:: recipe.roads["every"]]
        sample = [batch for _, batch in batches(rows, SAMPLE_TOKENS, text_side(source)[0].pad_id)]
        rounded = Student.load(train(recipe))
        load_int4(rounded, gptq(rounded, sample)).save(folder)
    return folder


def export(recipe: Recipe) -> Path:
    """Step ``export``: ``model.onnx`` in INT4, and the other containers that the recipe names."""
    from convert.export.containers import export_containers
    from convert.student import Student

    path = recipe.build / "export" / "model.onnx"
    source, folder = qat(recipe) / "student.safetensors", trimmed_base(recipe)
    record = path.with_name("parity.json")
    if not _made(record, {"student_sha256": sha256_of(source), "export": recipe.export}, path.parent):
        template, tokenizer = text_side(folder)
        max_tokens = recipe.student["max_tokens"]
        figures = export_containers(
            Student.load(source.parent),
            _spread(_examples(recipe, "validation", max_tokens, folder), recipe.export["samples"]),
            path.parent,
            pad_id=template.pad_id,
            max_tokens=max_tokens,
            tokenizer_json=tokenizer.to_str(),
            control_ids=template.reserved,
            about={"name": recipe.name, "version": recipe.version, "license": recipe.license},
            also=recipe.export.get("also", []),
            tolerance=recipe.export["tolerance"],
            shifts=_shifts(recipe, Student.load(train(recipe))),
        )
        write_json(record, {"tolerance": recipe.export["tolerance"], **figures})
    return path


def evaluation_rows(recipe: Recipe) -> dict[str, list[Row]]:
    """The labelled rows of every test set that the recipe names, in its order."""
    names = recipe.evaluate["sets"]
    rows = {name: held_out_rows() if name == HELD_OUT_NAME else read_set(name) for name in names}
    return {name: [row for row in rows[name] if row.label] for name in names}


def calibration_rows(recipe: Recipe) -> list[Row]:
    """The split put aside before training, and the recipe's calibration sets, clear of the tests' texts."""
    tests = leak_keys(recipe.evaluate["sets"])
    rows = [m.row for m in read_mix(recipe) if m.split == "calibration"]
    for name in recipe.calibrate["sets"]:
        if get_set(name).role != "calibration":
            raise CorpusError(f"{name}: role {get_set(name).role}; only calibration sets may be named in [calibrate].")
        rows += [row for row in read_set(name) if row.label and tests.isdisjoint(row_keys(row))]
    return rows


def judge_tests(recipe: Recipe) -> Path:
    """The teacher's scores of the calibration split and of the test sets that it is measured on."""
    if recipe.teacher["kind"] == "scores":
        return label(recipe)
    path = recipe.build / "scores_of_tests.jsonl"
    tests = evaluation_rows(recipe)
    rows = [*calibration_rows(recipe), *(row for name in recipe.evaluate["teacher_sets"] for row in tests[name])]
    _judge(recipe, lambda: rows, path, {"rows": [row.id for row in rows]})
    return path


def stages(recipe: Recipe) -> list[Stage | TeacherStage]:
    """What is measured: the shipped file first, then what it came from, and what is compared with it on fewer sets."""
    from convert.export.containers import FILES
    from convert.export.int8_graph import INT8_GRAPH
    from convert.record import GGUF, GPTQ, INT8, REFERENCE, ROUNDED, SHIPPED, STANDARD, TEACHER, TORCH_INT4
    from convert.scores import gguf_stage, int4_stage, int8_stage, onnx_stage, teacher_stage, torch_stage

    pad_id = text_side(trimmed_base(recipe))[0].pad_id
    some, shipped = tuple(recipe.evaluate.get("compare", ())), export(recipe)
    measured: list[Stage | TeacherStage] = [
        onnx_stage(SHIPPED, shipped, pad_id),
        torch_stage(REFERENCE, train(recipe), pad_id),
    ]
    if some:
        measured.append(int4_stage(TORCH_INT4, qat(recipe), pad_id, some))
        measured.append(int8_stage(INT8, shipped.with_name(INT8_GRAPH), pad_id, some))
    if some and recipe.roads:
        # GPTQ's values are on the grid already, and not where rounding would put them: they are run as they are.
        measured.append(int4_stage(ROUNDED, train(recipe), pad_id, some))
        measured.append(torch_stage(GPTQ, roads(recipe), pad_id, some))
    also = recipe.export.get("also", []) if some else []
    if "gguf" in also and importlib.util.find_spec("llama_cpp"):
        measured.append(gguf_stage(GGUF, shipped.with_name(FILES["gguf"]), some))
    if "standard" in also:
        measured.append(onnx_stage(STANDARD, shipped.with_name(FILES["standard"]), pad_id, some))
    if recipe.evaluate.get("teacher_sets"):
        measured.append(teacher_stage(TEACHER, judge_tests(recipe)))
    return measured


def measure(recipe: Recipe, tests: dict[str, list[Row]], held_back: list[Row]) -> tuple[dict[str, Any], MeasuredStage]:
    """The report over all stages, and the shipped one. Scores are kept and read back."""
    from convert.evaluate import measure_stage, parity_rows, verdict_parity
    from convert.record import CONTAINERS, POINT, SHIPPED, TORCH_INT4, make_report
    from convert.scores import int4_stage, score_rows

    template, tokenizer = text_side(trimmed_base(recipe))
    max_tokens, cache = recipe.student["max_tokens"], recipe.build / "scores"

    def score(stage: Stage | TeacherStage, name: str, rows: Sequence[Row]) -> np.ndarray:
        return score_rows(stage, name, rows, template, tokenizer, max_tokens, cache)

    kinds = stages(recipe)
    measured = {stage.name: measure_stage(stage, tests, held_back, score) for stage in kinds}
    report = make_report(list(measured.values()), tests, held_back, hazard_set=recipe.evaluate["hazards"])
    sample, fitted = parity_rows(tests), measured[SHIPPED].fitted
    reference = score(int4_stage(TORCH_INT4, qat(recipe), template.pad_id), "parity", sample)
    report["parity"] = {
        stage.name: {
            "reference": TORCH_INT4,
            **verdict_parity(sample, reference, score(stage, "parity", sample), fitted, POINT),
        }
        for stage in kinds
        if stage.name in CONTAINERS
    }
    report["export"] = read_json(export(recipe).with_name("parity.json"))
    return report, measured[SHIPPED]


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


def package(recipe: Recipe) -> Path:
    """Step ``package``: the bundle in ``models/``, opened and self-tested by the runtime before it gets there."""
    from convert.export.containers import FILES
    from convert.export.int8_graph import INT8_GRAPH, INT8_PLAN
    from convert.package import SELF_TEST_TEXTS, make_manifest, put_in_place
    from convert.report import SHIPPED, model_card

    report_path = evaluate(recipe)
    report = read_json(report_path)
    staged = recipe.build / "package"
    shutil.rmtree(staged, ignore_errors=True)
    staged.mkdir(parents=True)
    for name in (FILES["onnx"], INT8_GRAPH, INT8_PLAN):
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
        teacher=_teacher_name(recipe),
        data_sha256=_data_sha256(recipe),
    )
    data = _with_unlabelled(recipe, read_json(corpus(recipe).with_name("data_manifest.json")))
    write_json(staged / "manifest.json", manifest)
    write_json(staged / "data_manifest.json", data)
    for record in ("RECORD.md", "record.png", "curves.png", "reliability.png"):
        shutil.copy(report_path.with_name(record), staged / record)
    for run in ("train", "qat"):
        shutil.copy(recipe.build / run / "loss.png", staged / f"{run}_loss.png")
        shutil.copy(recipe.build / run / "log.jsonl", staged / f"{run}_log.jsonl")
    shutil.copy(report_path, staged / "report.json")
    (staged / "MODEL_CARD.md").write_text(model_card(recipe, manifest, report, data), encoding="utf-8")
    put_in_place(staged, recipe.models / recipe.name, recipe.export.get("max_bytes"))
    return recipe.models / recipe.name


def _teacher_name(recipe: Recipe) -> str | None:
    """What the student learned from beside labels: the teacher's model, and its weights as its scores name them."""
    from convert.teachers.score_file import read_scores

    if not recipe.distill:
        return None
    scored = next(iter(read_scores(label(recipe)).values())).teacher
    model = recipe.teacher.get("base", recipe.teacher).get("model")
    return f"{model}, {scored}" if model and model not in scored else scored


def _with_unlabelled(recipe: Recipe, manifest: dict[str, Any]) -> dict[str, Any]:
    """The data manifest with the sets that only the teacher labelled."""
    if recipe.distill:
        rows = _unlabelled(recipe)
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


def run(recipe: Recipe) -> Path:
    """All steps in order; what is there already is kept."""
    result = recipe.build
    for name in ORDER:
        click.echo(f"== {name}", err=True)
        result = globals()[name](recipe)
    return result
