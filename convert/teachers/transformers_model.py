"""A causal model run by transformers, on a CPU, CUDA or Apple's MPS: rows in one batch, padded on the left."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from convert.student import best_device
from edgeguard.bundle import sha256_of

__all__ = ["TransformersModel"]


class TransformersModel:
    """See :class:`convert.teachers.judge.LanguageModel`."""

    def __init__(self, source: str, *, revision: str | None = None) -> None:
        """Load a Hub id or a folder; in bfloat16 on an accelerator, in float32 on a CPU."""
        from transformers import AutoModelForCausalLM, AutoTokenizer

        self.device = best_device()
        dtype = torch.float32 if self.device.type == "cpu" else torch.bfloat16
        self._tokenizer = AutoTokenizer.from_pretrained(source, revision=revision)
        self._model = AutoModelForCausalLM.from_pretrained(source, revision=revision, dtype=dtype).to(self.device).eval()
        self.name = _identity(source, self._model)
        self._vocabulary = self._tokenizer.get_vocab()
        self._mask = torch.zeros(0, 0)
        self._cache: Any = None
        self._started: Any = None

    def encode(self, text: str) -> list[int]:
        """Token ids of plain text."""
        ids: list[int] = self._tokenizer(text, add_special_tokens=False, split_special_tokens=True).input_ids
        return ids

    def control_id(self, token: str) -> int | None:
        """The id of a control token, or None."""
        return self._vocabulary.get(token)

    def start(self, rows: Sequence[Sequence[int]]) -> NDArray[np.float32]:
        """Read new rows."""
        self._cache, self._mask = None, torch.zeros(len(rows), 0, dtype=torch.long, device=self.device)
        logp = self._read(rows)
        self._started = (self._cache, self._mask)
        return logp

    def extend(self, rows: Sequence[Sequence[int]]) -> NDArray[np.float32]:
        """Go on; the cache of :meth:`start` is kept for :meth:`rewind`."""
        if self._cache is self._started[0]:
            self._cache = copy.deepcopy(self._cache)
        return self._read(rows)

    def rewind(self) -> None:
        """Back to where :meth:`start` ended."""
        self._cache, self._mask = self._started

    @torch.inference_mode()
    def _read(self, rows: Sequence[Sequence[int]]) -> NDArray[np.float32]:
        length = max(map(len, rows))
        ids = torch.zeros(len(rows), length, dtype=torch.long)
        mask = torch.zeros_like(ids)
        for i, row in enumerate(rows):  # on the left, so that the last position is every row's next token
            ids[i, length - len(row) :] = torch.tensor(row)
            mask[i, length - len(row) :] = 1
        self._mask = torch.cat([self._mask, mask.to(self.device)], dim=1)
        positions = (self._mask.cumsum(1) - 1).clamp(min=0)[:, -length:]
        out = self._model(
            input_ids=ids.to(self.device),
            attention_mask=self._mask,
            position_ids=positions,
            past_key_values=self._cache,
            use_cache=True,
            logits_to_keep=1,
        )
        self._cache = out.past_key_values
        logp: NDArray[np.float32] = out.logits[:, -1].float().log_softmax(-1).cpu().numpy()
        return logp


def _identity(source: str, model: Any) -> str:  # noqa: ANN401 - a transformers model
    """What names the weights for good: the Hub's commit, or the checksums of a folder's files."""
    commit = getattr(model.config, "_commit_hash", None)
    if commit:
        return f"{source}@{commit}"
    sums = [sha256_of(path) for path in sorted(Path(source).glob("*.safetensors"))]
    return f"{Path(source).name}@{'+'.join(s[:12] for s in sums)}"
