"""Scoring rows with a stage: logits are kept by stage and set, and read back when nothing changed.

A stage is the student as it stands after a step, or the teacher as its score file has it.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import click
import numpy as np

from convert.corpora.registry import Row
from convert.files import write_arrays
from edgeguard.bundle import sha256_of
from edgeguard.engines.byte_products import byte_products_are_exact
from edgeguard.errors import EdgeguardError
from edgeguard.prompt import Template
from edgeguard.taxonomy import HAZARDS

if TYPE_CHECKING:
    from tokenizers import Tokenizer

    from convert.batches import Example

__all__ = [
    "ScoresError",
    "Stage",
    "TeacherStage",
    "gguf_stage",
    "int4_stage",
    "int8_stage",
    "onnx_stage",
    "score_rows",
    "teacher_stage",
    "torch_stage",
]


class ScoresError(EdgeguardError):
    """Scores that a stage should have are not there."""


@dataclass(frozen=True)
class Stage:
    """A model as it stands after a step. ``logits``: examples -> float32 [n, K]; ``key``: changes with its weights.

    ``sets``: the test sets that it is measured on, None for all: a slow stage may leave some out.
    """

    name: str
    key: str
    logits: Callable[[Sequence[Example]], np.ndarray]
    sets: tuple[str, ...] | None = None

    def covers(self, name: str, rows: Sequence[Row]) -> bool:
        """Whether the set ``name`` is to be measured."""
        return bool(rows) and (self.sets is None or name in self.sets)


@dataclass(frozen=True)
class TeacherStage:
    """A teacher as its score file has it. ``margins``: log-odds of unsafe by row id; ``key``: the file's sha256."""

    name: str
    key: str
    margins: Mapping[str, float]

    def covers(self, name: str, rows: Sequence[Row]) -> bool:
        """Whether the teacher judged the set ``name``: any row of it, since a part is refused when it is read."""
        return any(row.id in self.margins for row in rows)

    def logits_of(self, name: str, rows: Sequence[Row]) -> np.ndarray:
        """Logits float32 [n, K]: 0 for safe, the margin for unsafe, NaN for the hazards, which a margin does not tell.

        Raises ScoresError when the file lacks a row: figures over a part of a set may not stand beside the others.
        """
        missing = [row.id for row in rows if row.id not in self.margins]
        if missing:
            raise ScoresError(
                f"{self.name}: no score for {len(missing)} of the {len(rows)} rows of {name} ({missing[0]}, ...). "
                "Judge all rows of a set, or none, and all of the calibration split."
            )
        logits = np.full((len(rows), 2 + len(HAZARDS)), np.nan, dtype=np.float32)
        logits[:, 0], logits[:, 1] = 0, [self.margins[row.id] for row in rows]
        return logits


def torch_stage(name: str, folder: Path, pad_id: int, sets: tuple[str, ...] | None = None) -> Stage:
    """The float32 student in ``folder``, computed in float32."""

    def logits(examples: Sequence[Example]) -> np.ndarray:
        from convert.distill import score
        from convert.student import Student, best_device

        student = Student.load(folder).to(best_device())
        return score(student, examples, pad_id, bf16=False)

    return Stage(name, sha256_of(folder / "student.safetensors"), logits, sets)


def int4_stage(name: str, folder: Path, pad_id: int, sets: tuple[str, ...] | None = None) -> Stage:
    """The student in ``folder`` with its weights rounded to the INT4 grid, computed in float32 by torch.

    Rounding leaves weights that are on the grid already as they are. So this is all three roads: the float32 student's
    folder gives plain rounding, GPTQ's and QAT's folders give what those left.
    """

    def logits(examples: Sequence[Example]) -> np.ndarray:
        from convert.distill import score
        from convert.fake_quant import bake_int4
        from convert.student import Student, best_device

        student = Student.load(folder)
        bake_int4(student.to(best_device()).model)
        return score(student, examples, pad_id, bf16=False)

    return Stage(name, sha256_of(folder / "student.safetensors"), logits, sets)


def onnx_stage(name: str, path: Path, pad_id: int, sets: tuple[str, ...] | None = None) -> Stage:
    """An exported ONNX file, on onnxruntime's CPU provider."""

    def logits(examples: Sequence[Example]) -> np.ndarray:
        import onnxruntime

        from convert.batches import CPU_TOKENS, batches
        from edgeguard.engines.onnx import empty_past, past_shapes

        session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
        past = past_shapes(session)
        rows: dict[int, np.ndarray] = {}
        for indices, batch in batches(examples, CPU_TOKENS, pad_id):
            feeds = {"input_ids": batch.ids.numpy(), "attention_mask": batch.mask.numpy()}
            feeds |= empty_past(past, len(indices))
            rows.update(zip(indices, session.run(["logits"], feeds)[0], strict=True))
        return np.stack([rows[i] for i in range(len(examples))])

    return Stage(name, sha256_of(path), logits, sets)


def int8_stage(name: str, graph: Path, pad_id: int) -> Stage:
    """The INT8 graph ``graph``, or its twin, and the plan beside it, with weights made for this run alone."""

    def logits(examples: Sequence[Example]) -> np.ndarray:
        from convert.export.int8_graph import int8_model

        with int8_model(graph, unsigned=not byte_products_are_exact()) as made:
            return onnx_stage(name, made, pad_id).logits(examples)

    return Stage(name, f"{sha256_of(graph)} {sha256_of(graph.with_suffix('.json'))}", logits)


def gguf_stage(name: str, path: Path, sets: tuple[str, ...] | None = None) -> Stage:
    """An exported GGUF file, on llama.cpp's CPU backend."""

    def logits(examples: Sequence[Example]) -> np.ndarray:
        from convert.export.gguf_run import gguf_logits

        return gguf_logits(path, examples)

    return Stage(name, sha256_of(path), logits, sets)


def teacher_stage(name: str, path: Path) -> TeacherStage:
    """The teacher whose scores of test and calibration rows are in ``path`` (see convert.teachers.score_file)."""
    from convert.teachers.score_file import read_scores

    return TeacherStage(name, sha256_of(path), {id_: score.margin for id_, score in read_scores(path).items()})


def score_rows(
    stage: Stage | TeacherStage,
    name: str,
    rows: Sequence[Row],
    template: Template,
    tokenizer: Tokenizer,
    max_tokens: int,
    cache: Path,
) -> np.ndarray:
    """Logits [n, K] of ``rows`` (the set ``name``), from ``cache`` when stage, rows and template are the same."""
    from convert.batches import encode_rows

    if isinstance(stage, TeacherStage):
        return stage.logits_of(name, rows)
    key = _key(stage, rows, template, max_tokens)
    path = cache / stage.name / f"{name}.npz"
    if path.is_file():
        with np.load(path) as stored:
            if str(stored["key"]) == key:
                return np.asarray(stored["logits"])
    started = time.monotonic()
    examples = encode_rows(rows, template, tokenizer, max_tokens)
    logits = stage.logits(examples)
    seconds, tokens = time.monotonic() - started, sum(len(e.ids) for e in examples)
    click.echo(f"{stage.name} {name}: {len(rows)} rows, {tokens / seconds:.0f} tokens/s", err=True)
    write_arrays(path, logits=logits, key=np.array(key))
    return logits


def _key(stage: Stage, rows: Sequence[Row], template: Template, max_tokens: int) -> str:
    digest = hashlib.sha256(f"{stage.key} {max_tokens} {json.dumps(template.to_dict(), sort_keys=True)}".encode())
    for row in rows:
        digest.update(repr((row.id, row.messages())).encode("utf-8", "replace"))
    return digest.hexdigest()
