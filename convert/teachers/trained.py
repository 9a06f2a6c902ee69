"""A teacher made here: a language model fine-tuned on labels with LoRA (arXiv 2106.09685), read like a student.

It is a :class:`convert.student.Student` with all layers of its base: the margin and the hazards come from one forward
pass and a head on the last token. Only the adapter and the head are kept, beside the name of the base.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from convert.batches import Example, encode_rows
from convert.corpora.registry import Row
from convert.distill import score
from convert.files import read_json, write_json, write_whole
from convert.student import Student, best_device
from convert.teachers.formats import TeacherError
from convert.teachers.judge import Judgement
from edgeguard.bundle import sha256_of
from edgeguard.prompt import Template
from edgeguard.taxonomy import HAZARDS

if TYPE_CHECKING:
    from tokenizers import Tokenizer

__all__ = ["TrainedTeacher", "add_adapter", "load_adapter", "merge_adapter", "save_adapter"]


def add_adapter(student: Student, lora: dict[str, Any], freeze_layers: int = 0, *, seed: int = 0) -> Student:
    """Freeze the body of ``student`` and put a LoRA adapter on the linears above ``freeze_layers``, in place.

    ``lora``: ``rank``, ``alpha``, ``dropout``; ``seed`` decides the adapter's first weights. The head stays trainable.
    """
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(
        r=lora["rank"],
        lora_alpha=lora["alpha"],
        lora_dropout=lora["dropout"],
        target_modules=sorted({name.split(".")[-1] for name, m in student.model.named_modules() if _is_linear(m)}),
        layers_to_transform=list(range(freeze_layers, student.model.config.num_hidden_layers)),
        layers_pattern="layers",
        bias="none",
    )
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        student.model = get_peft_model(student.model, config)
    return student


def _is_linear(module: nn.Module) -> bool:
    return isinstance(module, nn.Linear)


def merge_adapter(student: Student) -> Student:
    """The adapter's product added to the weights it stands beside, in place: a plain student again."""
    student.model = student.model.merge_and_unload()
    return student


def save_adapter(student: Student, folder: Path) -> None:
    """Write ``adapter/``, ``head.safetensors`` and, last, ``teacher.json``."""
    student.model.save_pretrained(folder / "adapter")
    head = {name: tensor.detach().cpu().contiguous() for name, tensor in student.head.state_dict().items()}
    write_whole(folder / "head.safetensors", lambda path: save_file(head, path))
    layers = student.model.config.num_hidden_layers
    write_json(folder / "teacher.json", {"labels": list(student.labels), "layers": layers})


def load_adapter(base: Path, folder: Path) -> Student:
    """The base with the adapter merged into it, and the head."""
    from peft import PeftModel

    if not (folder / "teacher.json").is_file():
        raise TeacherError(f"{folder}: no trained teacher there. Run the step that trains it.")
    record = read_json(folder / "teacher.json")
    student = Student.from_base(base, record["layers"])
    student.labels = tuple(record["labels"])
    student.model = PeftModel.from_pretrained(student.model, folder / "adapter")
    merge_adapter(student)
    student.head.load_state_dict(load_file(folder / "head.safetensors"))
    return student


class TrainedTeacher:
    """Judges rows with a fine-tuned model: see :class:`convert.teachers.score_file.Teacher`."""

    def __init__(self, base: Path, folder: Path, template: Template, tokenizer: Tokenizer, max_tokens: int) -> None:
        """Load the adapter in ``folder`` onto ``base``; rows are encoded with ``template`` and ``tokenizer``."""
        self._student = load_adapter(base, folder).to(best_device())
        self._template, self._tokenizer, self._max_tokens = template, tokenizer, max_tokens
        sums = [sha256_of(folder / name) for name in ("adapter/adapter_model.safetensors", "head.safetensors")]
        self.name = f"trained@{'+'.join(s[:12] for s in sums)}"
        asked = json.dumps([template.to_dict(), tokenizer.to_str(), max_tokens])
        self.template_hash = hashlib.sha256(asked.encode()).hexdigest()

    def length(self, row: Row) -> int:
        """Tokens of a row."""
        return len(self._encode([row])[0].ids)

    def judge(self, rows: Sequence[Row]) -> list[Judgement]:
        """One judgement a row."""
        # bf16, as in training: twice as fast as float32 on a CPU that has it.
        logits = score(self._student, self._encode(rows), self._template.pad_id, bf16=True)
        margins = logits[:, 1] - logits[:, 0]
        hazards = 1 / (1 + np.exp(-logits[:, 2:]))
        return [
            Judgement(float(margin), dict(zip(HAZARDS, map(float, row), strict=True)), 1.0)
            for margin, row in zip(margins, hazards, strict=True)
        ]

    def _encode(self, rows: Sequence[Row]) -> list[Example]:
        return encode_rows(rows, self._template, self._tokenizer, self._max_tokens)
