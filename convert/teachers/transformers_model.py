"""A causal model run by transformers, on a CPU, CUDA or Apple's MPS: rows in one batch, padded on the left."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from convert.student import best_device
from convert.teachers.formats import TeacherError
from edgeguard.bundle import sha256_of

__all__ = ["TransformersModel"]

HEAD_ROWS = 16384


class TransformersModel:
    """See :class:`convert.teachers.judge.LanguageModel`."""

    rows_at_once = 1024  # the caller's batches are counted in tokens

    def __init__(self, source: str, *, revision: str | None = None, dtype: torch.dtype | None = None) -> None:
        """Load a Hub id or a folder. ``dtype``: None for bfloat16 on an accelerator and float32 on a CPU.

        Raises TeacherError when transformers cannot load it.
        """
        from transformers import AutoModelForCausalLM, AutoTokenizer

        self.device = best_device()
        dtype = dtype or (torch.float32 if self.device.type == "cpu" else torch.bfloat16)
        try:
            self._tokenizer = AutoTokenizer.from_pretrained(source, revision=revision)
            model = AutoModelForCausalLM.from_pretrained(source, revision=revision, dtype=dtype)
        except (OSError, ValueError, KeyError, ImportError) as error:
            raise TeacherError(
                f"{source}: transformers cannot load it ({_first_line(error)}). Expected a causal model: a folder, or "
                "owner/name on the Hugging Face Hub. For a gated one, accept its licence there and set HF_TOKEN."
            ) from error
        self._model = model.to(self.device).eval()
        if dtype != torch.float32:
            self._model.set_output_embeddings(_WideHead(self._model.get_output_embeddings()))
        self.name = _identity(source, self._model)
        self._added: dict[str, int] = self._tokenizer.get_added_vocab()
        self._mask = torch.zeros(0, 0)
        self._cache: Any = None
        self._started: Any = None

    def encode(self, text: str) -> list[int]:
        """Token ids of plain text."""
        ids: list[int] = self._tokenizer(text, add_special_tokens=False, split_special_tokens=True).input_ids
        return ids

    def control_id(self, token: str) -> int | None:
        """The id of a control token, or None."""
        return self._added.get(token)

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


class _WideHead(nn.Module):
    """An output layer that computes in float32: bfloat16 has steps of 1/8 at a logit of 20, too coarse for a margin."""

    def __init__(self, head: nn.Linear) -> None:
        super().__init__()
        self.weight, self.bias = head.weight, head.bias  # still shared with the embedding where they are tied

    def forward(self, hidden: Tensor) -> Tensor:
        """``hidden`` [..., width] -> float32 [..., vocabulary]; a part of the rows at a time, for the memory."""
        wide = hidden.float()
        parts = torch.split(self.weight, HEAD_ROWS)
        logits = torch.cat([nn.functional.linear(wide, rows.float()) for rows in parts], -1)
        return logits if self.bias is None else logits + self.bias.float()


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def _identity(source: str, model: Any) -> str:  # noqa: ANN401 - a transformers model
    """What names the weights for good: the Hub's commit, or the checksums of a folder's files."""
    commit = getattr(model.config, "_commit_hash", None)
    if commit:
        return f"{source}@{commit}"
    files = sorted(path for path in Path(source).iterdir() if path.suffix in (".safetensors", ".bin"))
    return f"{Path(source).name}@{'+'.join(sha256_of(path)[:12] for path in files)}"
