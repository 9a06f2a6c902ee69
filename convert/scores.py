"""Scoring rows with a stage of the student: logits are kept by stage and set, and read back when nothing changed."""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import click
import numpy as np

from convert.corpora.registry import Row
from convert.files import write_whole
from edgeguard.bundle import sha256_of
from edgeguard.prompt import Template

if TYPE_CHECKING:
    from tokenizers import Tokenizer

    from convert.batches import Example

__all__ = ["Stage", "onnx_stage", "score_rows", "torch_stage"]

BATCH_TOKENS = 2048


@dataclass(frozen=True)
class Stage:
    """A model as it stands after a step. ``logits``: examples -> float32 [n, K]; ``key``: changes with its weights."""

    name: str
    key: str
    logits: Callable[[Sequence[Example]], np.ndarray]


def torch_stage(name: str, folder: Path, pad_id: int) -> Stage:
    """The float32 student in ``folder``, computed in float32."""

    def logits(examples: Sequence[Example]) -> np.ndarray:
        from convert.distill import score
        from convert.student import Student

        return score(Student.load(folder), examples, pad_id, bf16=False, tokens=BATCH_TOKENS)

    return Stage(name, sha256_of(folder / "student.safetensors"), logits)


def onnx_stage(name: str, path: Path, pad_id: int) -> Stage:
    """An exported ONNX file, on onnxruntime's CPU provider."""

    def logits(examples: Sequence[Example]) -> np.ndarray:
        import onnxruntime

        from convert.batches import batches

        session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
        rows: dict[int, np.ndarray] = {}
        for indices, batch in batches(examples, BATCH_TOKENS, pad_id):
            feeds = {"input_ids": batch.ids.numpy(), "attention_mask": batch.mask.numpy()}
            rows.update(zip(indices, session.run(["logits"], feeds)[0], strict=True))
        return np.stack([rows[i] for i in range(len(examples))])

    return Stage(name, sha256_of(path), logits)


def score_rows(
    stage: Stage, name: str, rows: Sequence[Row], template: Template, tokenizer: Tokenizer, max_tokens: int, cache: Path
) -> np.ndarray:
    """Logits [n, K] of ``rows`` (the set ``name``), from ``cache`` when stage, rows and template are the same."""
    from convert.batches import encode_rows

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
    write_whole(path, lambda p: _save(p, logits, key))
    return logits


def _save(path: Path, logits: np.ndarray, key: str) -> None:
    with path.open("wb") as stream:
        np.savez(stream, logits=logits, key=np.array(key))


def _key(stage: Stage, rows: Sequence[Row], template: Template, max_tokens: int) -> str:
    digest = hashlib.sha256(f"{stage.key} {max_tokens} {json.dumps(template.to_dict(), sort_keys=True)}".encode())
    for row in rows:
        digest.update(repr((row.id, row.messages())).encode("utf-8", "replace"))
    return digest.hexdigest()
