"""The INT8 files of a packaged bundle, made and measured anew: its weights, calibration and other figures stay.

How INT8 is computed improves with edgeguard, while the student that a bundle came from may be gone from the build
folder. Those files are made of the bundle's INT4 integers alone.
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

from convert.corpora.registry import Row
from convert.files import read_json, write_json, write_whole
from convert.recipe import Recipe
from convert.steps.data import calibration_rows, evaluation_rows, read_examples, sample_batches, spread, trimmed_base
from convert.steps.training import SMOOTHING_ROWS
from edgeguard.bundle import Bundle, sha256_of
from edgeguard.engines.gguf_source import read_onnx
from edgeguard.manifest import MANIFEST_NAME

if TYPE_CHECKING:
    from convert.scores import Stage
    from convert.student import Student

__all__ = ["renew"]


def renew(recipe: Recipe) -> Path:
    """The bundle of ``recipe``, with new INT8 files and their figures; what was scored already is kept.

    Raises BundleError, ParityError when the files compute something else, RecordError when the bundle's report was made
    on other rows.
    """
    from convert.export.int8_graph import INT8_FILES
    from convert.package import put_in_place
    from convert.plots import draw_record
    from convert.record import check_rows
    from convert.report import model_card, record_markdown
    from convert.student import Student

    held, staged = Bundle.open(recipe.models / recipe.name), recipe.build / "renew"
    shutil.rmtree(staged, ignore_errors=True)
    shutil.copytree(held.path, staged)
    report, manifest = read_json(staged / "report.json"), read_json(staged / MANIFEST_NAME)
    tests, held_back = evaluation_rows(recipe), calibration_rows(recipe)
    check_rows(report, tests, held_back)
    with TemporaryDirectory(dir=recipe.build) as folder:
        reference = _in_torch(recipe, held, Path(folder))
        report["export"]["int8"] = _write_int8(recipe, held, staged, reference, Student.load(Path(folder)))
        _measure(recipe, held, staged, reference, report, tests, held_back)
    manifest["version"] = recipe.version
    for name in INT8_FILES:
        entry = manifest["files"].setdefault(name, {"engine": None})
        entry.update(sha256=sha256_of(staged / name), bytes=(staged / name).stat().st_size)
    draw_record(report, staged / "record.png")
    record = record_markdown(
        report, f"{recipe.name} {recipe.version}", f"python -m convert evaluate recipes/{recipe.path.name}"
    )
    card = model_card(recipe, manifest, report, read_json(staged / "data_manifest.json"))
    for name, text in (("RECORD.md", record), ("MODEL_CARD.md", card)):
        write_whole(staged / name, lambda path, text=text: path.write_text(text, encoding="utf-8"))  # type: ignore[misc]
    write_json(staged / "report.json", report)
    write_json(staged / MANIFEST_NAME, manifest)
    put_in_place(staged, recipe.models / recipe.name, recipe.export.get("max_bytes"))
    return recipe.models / recipe.name


def _in_torch(recipe: Recipe, bundle: Bundle, folder: Path) -> Stage:
    """The model of the bundle's INT4 weights, which all is compared with; it is written into ``folder``."""
    from convert.gptq import load_weights
    from convert.record import ROADS
    from convert.scores import torch_stage
    from convert.student import Student

    held = read_onnx(bundle.file_for("onnx"))
    load_weights(Student.of_shape(held.config, bundle.manifest.head), held.weights).save(folder)
    return torch_stage(ROADS[recipe.road], folder, bundle.manifest.template.pad_id)


def _write_int8(recipe: Recipe, bundle: Bundle, staged: Path, reference: Stage, student: Student) -> dict[str, float]:
    """The INT8 files in ``staged``, smoothed and checked as :func:`convert.steps.containers.export` does it."""
    from convert.batches import collate
    from convert.export.int8_graph import export_int8
    from convert.smoothing import inputs_of, smoothing_shifts

    source, max_tokens = trimmed_base(recipe), bundle.manifest.max_tokens
    rows = spread(read_examples(recipe, "train", recipe.train["max_tokens"], source), SMOOTHING_ROWS)
    shifts = smoothing_shifts(inputs_of(student, sample_batches(rows, source)), student.numpy_weights())
    samples = spread(read_examples(recipe, "validation", max_tokens, source), recipe.export["samples"])
    batch = collate(samples, bundle.manifest.template.pad_id)
    return export_int8(
        staged / bundle.file_for("onnx").name,
        reference.logits(samples),
        batch.ids.numpy(),
        batch.mask.numpy(),
        tolerance=recipe.export["tolerance"],
        shifts=shifts,
    )


def _measure(
    recipe: Recipe,
    bundle: Bundle,
    staged: Path,
    reference: Stage,
    report: dict[str, Any],
    tests: Mapping[str, Sequence[Row]],
    held_back: Sequence[Row],
) -> None:
    """Put the figures of INT8 compute into ``report``: of its own, and against INT4, judged on the same machine."""
    from convert.evaluate import Fitted, measure_stage, parity_rows, verdict_parity
    from convert.export.int8_graph import INT8_GRAPH
    from convert.record import INT8, POINT, ROADS, SHIPPED, renew_int8
    from convert.scores import int8_stage, onnx_stage, score_rows

    manifest = bundle.manifest
    score = partial(
        score_rows,
        template=manifest.template,
        tokenizer=bundle.load_tokenizer(),
        max_tokens=manifest.max_tokens,
        cache=recipe.build / "scores",
    )
    int8 = int8_stage(INT8, staged / INT8_GRAPH, manifest.template.pad_id)
    int4 = onnx_stage(SHIPPED, bundle.file_for("onnx"), manifest.template.pad_id)
    measured = measure_stage(int8, tests, held_back, score)
    logits, fitted = {name: score(int4, name, rows) for name, rows in tests.items()}, Fitted.of_manifest(manifest)
    renew_int8(report, measured, logits, fitted, tests, road=ROADS[recipe.road])
    report["int8"]["command"] = f"python -m convert renew recipes/{recipe.path.name}"
    sample = parity_rows(tests)
    report["parity"][INT8] = {
        "reference": reference.name,
        **verdict_parity(sample, score(reference, "parity", sample), score(int8, "parity", sample), fitted, POINT),
    }
