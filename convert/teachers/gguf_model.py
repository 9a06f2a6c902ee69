"""A causal model in a GGUF file, run by llama-cpp-python: one row at a time, its cache kept between steps."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from convert.teachers.formats import TeacherError
from edgeguard.bundle import sha256_of

__all__ = ["GgufModel"]


class GgufModel:
    """See :class:`convert.teachers.judge.LanguageModel`. The shared beginning of two prompts is computed once."""

    rows_at_once = 1  # so that a row's answer goes on from its own prompt's cache

    def __init__(self, path: Path, *, context: int = 4096, threads: int | None = None) -> None:
        """Load ``path``; ``context``: most tokens of a prompt and its answer; ``threads``: None for llama.cpp's choice.

        Raises TeacherError when the file or llama-cpp-python is missing, or llama.cpp cannot read the file.
        """
        if not path.is_file():
            raise TeacherError(f"{path}: no such file. Name a GGUF file with a causal language model.")
        try:
            from llama_cpp import Llama
        except ImportError as error:
            raise TeacherError(
                "a GGUF teacher needs llama-cpp-python: pip install 'edgeguard-runtime[gguf]'."
            ) from error
        try:
            self._llama = Llama(
                str(path),
                n_ctx=context,
                n_threads=threads,
                n_batch=512,
                logits_all=False,
                n_gpu_layers=-1,
                verbose=False,
            )
        except (ValueError, OSError, RuntimeError) as error:
            raise TeacherError(
                f"{path}: llama.cpp cannot load it ({error}). Expected a GGUF file with a causal language model; "
                "download it again, or update llama-cpp-python when the architecture is a new one."
            ) from error
        self.name = f"{path.name}@{sha256_of(path)[:12]}"
        self._rows: list[list[int]] = []
        self._started: list[list[int]] = []

    def encode(self, text: str) -> list[int]:
        """Token ids of plain text."""
        ids: list[int] = self._llama.tokenize(text.encode(), add_bos=False, special=False)
        return ids

    def control_id(self, token: str) -> int | None:
        """The id of a control token, or None."""
        ids = self._llama.tokenize(token.encode(), add_bos=False, special=True)
        return int(ids[0]) if len(ids) == 1 else None

    def start(self, rows: Sequence[Sequence[int]]) -> NDArray[np.float32]:
        """Read new rows."""
        self._started = [list(row) for row in rows]
        self._rows = self._started
        return self._read()

    def extend(self, rows: Sequence[Sequence[int]]) -> NDArray[np.float32]:
        """Go on."""
        self._rows = [[*before, *more] for before, more in zip(self._rows, rows, strict=True)]
        return self._read()

    def rewind(self) -> None:
        """Back to where :meth:`start` ended."""
        self._rows = self._started

    def _read(self) -> NDArray[np.float32]:
        return np.stack([self._next(row) for row in self._rows])

    def _next(self, row: list[int]) -> NDArray[np.float32]:
        """Log-probabilities after ``row``; what the row before shares with it is not computed again."""
        llama: Any = self._llama
        known = llama.input_ids[: llama.n_tokens]
        common = min(len(known), len(row) - 1)  # the last token is always computed: its logits are wanted
        differs = np.flatnonzero(known[:common] != np.array(row[:common]))
        shared = int(differs[0]) if len(differs) else common
        llama.n_tokens = shared  # eval() drops what the cache holds beyond
        llama.eval(row[shared:])
        last = np.ctypeslib.as_array(llama._ctx.get_logits(), shape=(llama.n_vocab(),))
        logits = last.astype(np.float64)
        logits -= logits.max()
        result: NDArray[np.float32] = (logits - np.log(np.exp(logits).sum())).astype(np.float32)
        return result
