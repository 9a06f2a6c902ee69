"""From rows to batches: encode with the runtime's own template, bucket by length, pad little."""

from __future__ import annotations

import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from convert.corpora.mix import is_noisy
from convert.corpora.registry import Row
from edgeguard.prompt import Template
from edgeguard.taxonomy import HAZARDS

if TYPE_CHECKING:
    from tokenizers import Tokenizer

    from convert.teachers.score_file import Score

__all__ = ["CPU_TOKENS", "Batch", "Example", "batches", "encode_rows", "training_batches"]

POOL_BATCHES = 40
CPU_TOKENS = 512  # of a batch to score: a CPU is slower with more, which its caches do not hold (docs/log.md)
UNKNOWN = -1.0  # of a hazard that the teacher does not know


@dataclass(frozen=True)
class Example:
    """An encoded row. ``hazards``: 1 where one of the named hazards is meant; ``hazards_known``: else no loss.

    ``teacher``: the teacher's margin, or None; ``teacher_hazards``: its probabilities, or none. ``trusted``: the label
    counts beside a teacher (see :func:`convert.corpora.mix.is_noisy`).
    """

    ids: list[int]
    target: str
    unsafe: bool
    hazards: tuple[int, ...]
    hazards_known: bool
    weight: float
    teacher: float | None = None
    teacher_hazards: tuple[float, ...] = ()
    trusted: bool = True


@dataclass(frozen=True)
class Batch:
    """Tensors of B rows padded to the longest: ids, mask [B, L]; hazards, teacher_hazards [B, 14]; all others [B].

    ``teacher``: margins, 0 where ``taught`` is 0; ``teacher_hazards`` count where ``hazards_taught`` is 1.
    """

    ids: Tensor
    mask: Tensor
    unsafe: Tensor
    hazards: Tensor
    hazards_known: Tensor
    weight: Tensor
    teacher: Tensor
    taught: Tensor
    teacher_hazards: Tensor
    hazards_taught: Tensor
    trusted: Tensor

    def to(self, device: torch.device) -> Batch:
        """The same batch on ``device``."""
        return Batch(**{name: tensor.to(device) for name, tensor in vars(self).items()})


def encode_rows(
    rows: Sequence[Row],
    template: Template,
    tokenizer: Tokenizer,
    max_tokens: int,
    weights: Sequence[float] | None = None,
    scores: Mapping[str, Score] | None = None,
) -> list[Example]:
    """Encode labelled rows. Hazards count as known for safe rows (none) and for unsafe rows that name some.

    ``scores``: a teacher's, by row id; a row without a label takes the teacher's.
    """
    examples = []
    for i, row in enumerate(rows):
        encoded = template.encode(tokenizer, row.messages(), max_tokens)
        score = (scores or {}).get(row.id)
        unsafe = score.margin > 0 if row.label is None and score else row.label == "unsafe"
        flags = tuple(int(unsafe and code in row.hazards) for code in HAZARDS)
        known = row.label is not None and (not unsafe or any(flags))
        examples.append(
            Example(
                encoded.ids,
                encoded.target,
                unsafe,
                flags,
                known,
                weight=weights[i] if weights else 1.0,
                teacher=score.margin if score else None,
                teacher_hazards=tuple(score.hazards.get(code, UNKNOWN) for code in HAZARDS)
                if score and score.hazards
                else (),
                trusted=row.label is not None and not is_noisy(row),
            )
        )
    return examples


def collate(examples: Sequence[Example], pad_id: int) -> Batch:
    """Pad on the right and stack."""
    length = max(len(e.ids) for e in examples)
    ids = np.full((len(examples), length), pad_id, dtype=np.int64)
    mask = np.zeros_like(ids)
    for i, example in enumerate(examples):
        ids[i, : len(example.ids)] = example.ids
        mask[i, : len(example.ids)] = 1
    return Batch(
        ids=torch.from_numpy(ids),
        mask=torch.from_numpy(mask),
        unsafe=torch.tensor([e.unsafe for e in examples]),
        hazards=torch.tensor([e.hazards for e in examples], dtype=torch.float32),
        hazards_known=torch.tensor([e.hazards_known for e in examples], dtype=torch.float32),
        weight=torch.tensor([e.weight for e in examples], dtype=torch.float32),
        teacher=torch.tensor([e.teacher or 0.0 for e in examples], dtype=torch.float32),
        taught=torch.tensor([e.teacher is not None for e in examples], dtype=torch.float32),
        teacher_hazards=torch.tensor([e.teacher_hazards or (0.0,) * len(HAZARDS) for e in examples]),
        hazards_taught=torch.tensor([bool(e.teacher_hazards) for e in examples], dtype=torch.float32),
        trusted=torch.tensor([e.trusted for e in examples], dtype=torch.float32),
    )


def batches(examples: Sequence[Example], tokens: int, pad_id: int) -> Iterator[tuple[list[int], Batch]]:
    """All examples once, by length, with their indices: for scoring."""
    order = sorted(range(len(examples)), key=lambda i: len(examples[i].ids))
    for chunk in _chunks([len(examples[i].ids) for i in order], tokens):
        indices = [order[i] for i in chunk]
        yield indices, collate([examples[i] for i in indices], pad_id)


def training_batches(examples: Sequence[Example], tokens: int, seed: int) -> list[list[int]]:
    """The batches of one pass, as indices: shuffled, bucketed by length within a pool, batches shuffled again.

    The seed decides everything, so a resumed run continues the very same sequence.
    """
    rng = random.Random(seed)
    order = list(range(len(examples)))
    rng.shuffle(order)
    mean = sum(len(e.ids) for e in examples) / len(examples)
    pool = max(1, int(POOL_BATCHES * tokens / mean))
    result: list[list[int]] = []
    for start in range(0, len(order), pool):
        part = sorted(order[start : start + pool], key=lambda i: len(examples[i].ids))
        result += [[part[i] for i in chunk] for chunk in _chunks([len(examples[i].ids) for i in part], tokens)]
    rng.shuffle(result)
    return result


def _chunks(lengths: Sequence[int], tokens: int) -> Iterator[list[int]]:
    """Runs of positions of ascending lengths whose padded size stays within ``tokens``."""
    chunk: list[int] = []
    for i, length in enumerate(lengths):
        if chunk and (len(chunk) + 1) * length > tokens:
            yield chunk
            chunk = []
        chunk.append(i)
    if chunk:
        yield chunk
