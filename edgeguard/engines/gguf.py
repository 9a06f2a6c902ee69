"""The engine ``gguf``: llama.cpp, through llama-cpp-python (``pip install 'edgeguard-runtime[gguf]'``).

It runs any bundle whose weights are INT4 integers of edgeguard, in a GGUF or an ONNX file (:mod:`.gguf_body` makes of
either what llama.cpp runs), and bundles that hold a plain judge as a GGUF, whose head is rows of its vocabulary (the
manifest's ``head_tokens``). On Apple Silicon the GPU computes, elsewhere the CPU.

The rows of a call are computed together, several in one ``llama_decode``, without padding but for three tokens at most.
What a row begins with, and a row of the call before began with too, is not computed again: the constant part of a
template, the earlier turns of a conversation.

What was judged before, or beside, must not decide. Rounding to INT8 makes it visible when a sum is taken in another
order, and llama.cpp's order depends on how many tokens are new, in two places. Its INT4 products on a CPU take tokens
in fours: fillers leave none over. Its flash attention is off on a CPU: with it, margins of edgeguard-mini in a batch
and alone are 0.08 apart in the mean, without it 0.015, and a pass takes about a tenth longer.

llama.cpp rounds activations to INT8 in blocks of 32 (Q8_0) before each product with INT4 weights, as onnxruntime does,
and keeps keys and values in float16.
"""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import llama_cpp
import numpy as np
from numpy.typing import NDArray

from edgeguard.engines.cpus import choose_threads
from edgeguard.engines.gguf_body import BODY_KEY, engine_files
from edgeguard.engines.gguf_llama import LlamaContext, LlamaModel, has_metal
from edgeguard.engines.int4_weights import Int4Weight
from edgeguard.errors import EngineError

if TYPE_CHECKING:
    from edgeguard.bundle import Bundle

__all__ = ["REUSE_TOLERANCE", "GgufEngine"]

# Logits, of a row alone from one whose beginning was computed before, or that stands in a batch. edgeguard-mini, 48
# short prompts and 48 conversations: the largest difference of a margin was 0.09, the mean 0.015.
REUSE_TOLERANCE = 0.25
TOKENS_AT_ONCE = 4  # of llama.cpp's products on a CPU; those left over go one by one, in another order and slower
MAX_ROWS = 16  # of one decode
MIN_CELLS = 512  # tokens of one decode: beyond that, more at once is no faster


class GgufEngine:
    """A model in llama.cpp. See :class:`edgeguard.engines.Engine`; make one with :meth:`from_bundle`."""

    name = "gguf"

    def __init__(
        self,
        model: LlamaModel,
        *,
        columns: Sequence[int],
        bias: NDArray[np.float32] | None = None,
        embedding: NDArray[np.uint8] | None = None,
        max_tokens: int,
        threads: int | None = None,
    ) -> None:
        """Put loaded parts together.

        ``columns``: which of the model's logits are the head's, in its order; ``bias`` [K] is added to them.
        ``embedding``: Q4_0 rows of the vocabulary, for a model that takes vectors; None for one that takes ids.
        ``max_tokens``: of the longest row. Raises EngineError for parts that do not fit together.
        """
        self.threads = choose_threads(threads)
        self._model, self._embedding = model, embedding
        self._columns = np.array(columns, dtype=np.int64)
        self._bias = np.zeros(len(columns), np.float32) if bias is None else bias
        self._max_tokens, self._cells = max_tokens, max(max_tokens, MIN_CELLS)
        self._vocabulary = model.vocabulary if embedding is None else len(embedding)
        if not 0 <= min(columns) <= max(columns) < model.vocabulary:
            raise EngineError(
                f"{model.path}: expected a vocabulary with the head's tokens {list(columns)}, found one of "
                f"{model.vocabulary}. Make the bundle again."
            )
        if max_tokens > model.max_tokens:
            raise EngineError(f"{model.path}: expected a model for {max_tokens} tokens, found {model.max_tokens}.")
        self._metal = has_metal()
        self._context = LlamaContext(
            model,
            tokens=self._cells + TOKENS_AT_ONCE,
            threads=self.threads,
            sequences=2 * MAX_ROWS,
            metal=self._metal,
        )
        self._lock = threading.Lock()
        # The rows whose keys and values are in the cache, and the number of the first one's sequence.
        self._kept: list[NDArray[np.int64]] = []
        self._first = 0

    @classmethod
    def from_bundle(cls, bundle: Bundle, *, threads: int | None = None) -> GgufEngine:
        """Load the model of a bundle. Raises EngineError or BundleError for one that it cannot run."""
        manifest = bundle.manifest
        if manifest.head_tokens is not None:
            model = LlamaModel(bundle.file_for("gguf"), metal=has_metal())
            columns = [manifest.head_tokens[label] for label in manifest.head]
            return cls(model, columns=columns, max_tokens=manifest.max_tokens, threads=threads)
        files = engine_files(bundle)
        model = LlamaModel(files.body, metal=has_metal())
        about = json.loads(model.text(BODY_KEY) or "{}")
        if (about.get("source"), about.get("labels")) != (files.source, list(manifest.head)):
            raise EngineError(f"{files.body}: expected the model of {bundle.label}, found another. Delete the file.")
        return cls(
            model,
            columns=range(len(manifest.head)),
            bias=np.array(about["bias"], np.float32),
            embedding=_load_embedding(files.embedding, model.width),
            max_tokens=manifest.max_tokens,
            threads=threads,
        )

    @property
    def providers_asked(self) -> tuple[str, ...]:
        """What was asked to compute, most preferred first."""
        return ("llama.cpp Metal", "llama.cpp CPU") if self._metal else ("llama.cpp CPU",)

    @property
    def providers(self) -> tuple[str, ...]:
        """The same: llama.cpp does not tell what it took."""
        return self.providers_asked

    @property
    def version(self) -> str:
        """Version of llama-cpp-python."""
        return str(llama_cpp.__version__)

    def logits(self, ids: NDArray[np.int64], mask: NDArray[np.int64]) -> NDArray[np.float32]:
        """See :meth:`edgeguard.engines.Engine.logits`."""
        rows = self._rows(ids, mask)
        with self._lock:
            found = [self._decode(group) for group in self._groups(rows)]
        logits = np.concatenate([np.zeros((0, len(self._columns)), np.float32), *found])
        if not np.isfinite(logits).all():
            raise EngineError(f"{self._model.path}: llama.cpp returned a logit that is not finite.")
        return logits

    def read_on(self, ids: Sequence[int], seen: None = None) -> tuple[NDArray[np.float32], None]:
        """See :meth:`edgeguard.engines.Engine.read_on`; what rows begin with is remembered by every call anyway."""
        row = np.array([ids], dtype=np.int64)
        return self.logits(row, np.ones_like(row)), None

    def _rows(self, ids: NDArray[np.int64], mask: NDArray[np.int64]) -> list[NDArray[np.int64]]:
        """The rows without their padding."""
        lengths = mask.sum(axis=-1)
        if ids.ndim != 2 or ids.shape != mask.shape or (mask != (np.arange(ids.shape[1]) < lengths[:, None])).any():
            raise EngineError(
                f"expected ids and mask of one shape [B, L], padded on the right, found {ids.shape}, {mask.shape}."
            )
        rows = [row[:length] for row, length in zip(ids, lengths.tolist(), strict=True)]
        for row in rows:
            if not 1 <= len(row) <= self._max_tokens:
                raise EngineError(f"expected a row of 1 to {self._max_tokens} tokens, found one of {len(row)}.")
            if not 0 <= row.min() <= row.max() < self._vocabulary:
                raise EngineError(
                    f"expected token ids from 0 to {self._vocabulary - 1}, found {row.min()} to {row.max()}."
                )
        return rows

    def _groups(self, rows: Sequence[NDArray[np.int64]]) -> Iterator[list[NDArray[np.int64]]]:
        """Rows that one decode takes, in their order."""
        group: list[NDArray[np.int64]] = []
        for row in rows:
            if group and (len(group) == MAX_ROWS or sum(map(len, group)) + len(row) > self._cells):
                yield group
                group = []
            group.append(row)
        if group:
            yield group

    def _decode(self, rows: Sequence[NDArray[np.int64]]) -> NDArray[np.float32]:
        """Logits [len(rows), K] of rows that fit into the cache together."""
        try:
            starts = self._take_over(rows)
            counts = [len(row) - start for row, start in zip(rows, starts, strict=True)]
            last = np.cumsum(counts) - 1
            fillers = -int(last[-1] + 1) % TOKENS_AT_ONCE  # after the last row, where nothing reads them
            counts[-1] += fillers
            ids = [row[start:] for row, start in zip(rows, starts, strict=True)]
            outputs = np.zeros(sum(counts), np.int8)
            outputs[last] = 1
            self._context.decode(
                self._inputs(np.concatenate([*ids, np.repeat(rows[-1][-1:], fillers)])),
                np.concatenate([np.arange(s, s + n, dtype=np.int32) for s, n in zip(starts, counts, strict=True)]),
                np.repeat(np.arange(self._first, self._first + len(rows), dtype=np.int32), counts),
                outputs,
            )
            found = [self._context.logits(index)[self._columns] for index in last.tolist()]
        except BaseException:  # whatever happened, what the cache holds is no longer known
            self._kept = []
            self._context.clear()
            raise
        return np.stack(found) + self._bias

    def _take_over(self, rows: Sequence[NDArray[np.int64]]) -> list[int]:
        """Leave in the cache what ``rows`` begin with, and nothing else; returns how many tokens of each that is."""
        old, kept = self._first, self._kept
        self._first, self._kept = MAX_ROWS - old, list(rows)  # the other half of the sequences
        starts = []
        for number, row in enumerate(rows):
            shared, source = max(((_shared(row, before), i) for i, before in enumerate(kept)), default=(0, 0))
            shares = shared and self._context.share(old + source, self._first + number, shared)
            starts.append(shared if shares else 0)
        for source in range(len(kept)):
            self._context.forget(old + source)
        return starts

    def _inputs(self, ids: NDArray[np.int64]) -> NDArray[np.int32] | NDArray[np.float32]:
        """Ids as the model takes them: themselves, or their embeddings."""
        if self._embedding is None:
            return ids.astype(np.int32)
        return Int4Weight.unpack_q4_0(np.asarray(self._embedding[ids])).dequantize()


def _shared(row: NDArray[np.int64], before: NDArray[np.int64]) -> int:
    """Tokens that both begin with, less the last of ``row``: its logits are wanted, so it is always computed."""
    most = min(len(row) - 1, len(before))
    differs = np.flatnonzero(row[:most] != before[:most])
    return int(differs[0]) if len(differs) else most


def _load_embedding(file: Path, width: int) -> NDArray[np.uint8]:
    """Rows of Q4_0, read from the disk as they are asked for."""
    try:
        rows: NDArray[np.uint8] = np.load(file, mmap_mode="r")
        found = Int4Weight.unpack_q4_0(np.asarray(rows[:1])).shape[1]
    except (OSError, ValueError, IndexError) as error:
        raise EngineError(f"{file}: expected an embedding in INT4, found {error}. Delete the file.") from error
    if found != width:
        raise EngineError(f"{file}: expected an embedding {width} wide, found {found}. Delete the file.")
    return rows
