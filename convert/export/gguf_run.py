"""Run a GGUF of ours in plain llama.cpp: what the file's decisions are, measured with the program that will run it.

llama.cpp computes the body; the last token's hidden state (LAST pooling) is multiplied by the head from the metadata,
as whoever has the file alone would do. The engine (:mod:`edgeguard.engines.gguf`) runs a faster form of the same
integers. Token ids go in, not text, so a difference is one of arithmetic: llama.cpp rounds activations to INT8 in
blocks of 32 (Q8_0) before each product with Q4_0 weights, keeps keys and values in float16, and torch does neither.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from edgeguard.engines.cpus import choose_threads
from edgeguard.engines.gguf_file import GgufError, read_gguf

if TYPE_CHECKING:
    from convert.batches import Example
    from edgeguard.engines.gguf_llama import LlamaContext

__all__ = ["gguf_logits", "gguf_tokens"]


def gguf_logits(path: Path, examples: Sequence[Example], *, threads: int | None = None) -> NDArray[np.float32]:
    """Logits float32 [n, K] of the token ids of ``examples``, in their order, one row at a time.

    ``threads``: None for one a physical core. Raises GgufError for a file that is not ours, that llama.cpp refuses, or
    a row longer than the file allows; ImportError without llama-cpp-python.
    """
    from edgeguard.engines.gguf_llama import LlamaContext, LlamaModel

    student = read_gguf(path)
    head, bias = np.asarray(student.weights["head.weight"]), np.asarray(student.weights["head.bias"])
    longest = max((len(example.ids) for example in examples), default=1)
    if longest > student.config.max_tokens:
        raise GgufError(f"{path}: a row of {longest} tokens, the file allows {student.config.max_tokens}.")
    context = LlamaContext(LlamaModel(path), tokens=longest, threads=choose_threads(threads), pooled=True)
    hidden = [_last_hidden(context, example.ids) for example in examples]
    if not hidden:
        return np.zeros((0, len(bias)), np.float32)
    logits: NDArray[np.float32] = np.stack(hidden) @ head.T + bias
    return logits


def gguf_tokens(path: Path, texts: Sequence[str]) -> list[list[int]]:
    """What the tokenizer inside the file makes of ``texts``, special tokens never among it: for checks against ours."""
    from edgeguard.engines.gguf_llama import LlamaModel

    model = LlamaModel(path, vocabulary_only=True)
    return [_tokens(model.vocab, text.encode()) for text in texts]


def _tokens(vocab: Any, text: bytes) -> list[int]:  # noqa: ANN401 - a pointer
    import llama_cpp

    room = (llama_cpp.llama_token * (len(text) + 1))()
    count = llama_cpp.llama_tokenize(vocab, text, len(text), room, len(room), False, False)
    if count < 0:
        raise GgufError(f"llama.cpp could not tokenize a text of {len(text)} bytes.")
    return list(room[:count])


def _last_hidden(context: LlamaContext, ids: Sequence[int]) -> NDArray[np.float32]:
    """The final hidden state [width] of the last of ``ids``."""
    context.clear()
    row, count = np.array(ids, np.int32), len(ids)
    # Pooling wants every token among the outputs.
    context.decode(row, np.arange(count, dtype=np.int32), np.zeros(count, np.int32), np.ones(count, np.int8))
    hidden: NDArray[np.float32] = context.hidden(0).copy()  # the next row is written there
    return hidden
