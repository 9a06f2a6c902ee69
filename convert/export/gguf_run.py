"""Run a GGUF of ours in plain llama.cpp: what the file's decisions are, measured with the program that will run it.

llama.cpp computes the body; the last token's hidden state (LAST pooling) is multiplied by the head from the metadata.
Token ids go in, not text, so a difference is one of arithmetic: llama.cpp rounds activations to INT8 in blocks of 32
(Q8_0) before each product with Q4_0 weights, keeps keys and values in float16, and torch does neither.

Source: llama.cpp ``include/llama.h`` through llama-cpp-python 0.3 (low-level API).
"""

from __future__ import annotations

import ctypes
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from convert.export.gguf import GgufError, read_gguf
from edgeguard.engines.cpus import choose_threads

if TYPE_CHECKING:
    from convert.batches import Example

__all__ = ["gguf_logits", "gguf_tokens"]

ERROR_LEVEL = 4  # of ggml.h; llama-cpp-python's own log reads the levels otherwise
LOGGED_ERRORS = 3


def gguf_logits(path: Path, examples: Sequence[Example], *, threads: int | None = None) -> NDArray[np.float32]:
    """Logits float32 [n, K] of the token ids of ``examples``, in their order, one row at a time.

    ``threads``: None for one a physical core. Raises GgufError for a file that is not ours, that llama.cpp refuses, or
    a row longer than the file allows; ImportError without llama-cpp-python.
    """
    student = read_gguf(path)
    head, bias = np.asarray(student.weights["head.weight"]), np.asarray(student.weights["head.bias"])
    longest = max((len(example.ids) for example in examples), default=1)
    if longest > student.config.max_tokens:
        raise GgufError(f"{path}: a row of {longest} tokens, the file allows {student.config.max_tokens}.")
    with _context(path, longest, choose_threads(threads)) as context:
        hidden = [_last_hidden(context, example.ids, student.config.hidden_size) for example in examples]
    if not hidden:
        return np.zeros((0, len(bias)), np.float32)
    logits: NDArray[np.float32] = np.stack(hidden) @ head.T + bias
    return logits


def gguf_tokens(path: Path, texts: Sequence[str]) -> list[list[int]]:
    """What the tokenizer inside the file makes of ``texts``, special tokens never among it: for checks against ours."""
    import llama_cpp

    with _model(path, vocab_only=True) as model:
        vocab = llama_cpp.llama_model_get_vocab(model)
        return [_tokens(vocab, text.encode()) for text in texts]


def _tokens(vocab: Any, text: bytes) -> list[int]:  # noqa: ANN401 - a pointer
    import llama_cpp

    room = (llama_cpp.llama_token * (len(text) + 1))()
    count = llama_cpp.llama_tokenize(vocab, text, len(text), room, len(room), False, False)
    if count < 0:
        raise GgufError(f"llama.cpp could not tokenize a text of {len(text)} bytes.")
    return list(room[:count])


@cache
def _error_log() -> tuple[Any, deque[str]]:
    """A log for llama.cpp that keeps errors for our messages, and the last of them; the rest is said to nobody."""
    import llama_cpp

    reasons: deque[str] = deque(maxlen=LOGGED_ERRORS)

    @llama_cpp.llama_log_callback  # type: ignore[untyped-decorator]
    def log(level: int, text: bytes, _: object) -> None:
        if level == ERROR_LEVEL:
            reasons.append(text.decode("utf-8", "replace").strip())

    return log, reasons


@contextmanager
def _model(path: Path, *, vocab_only: bool = False) -> Iterator[Any]:
    import llama_cpp

    llama_cpp.llama_backend_init()
    log, reasons = _error_log()
    reasons.clear()
    llama_cpp.llama_log_set(log, ctypes.c_void_p(0))
    params = llama_cpp.llama_model_default_params()
    params.vocab_only, params.n_gpu_layers = vocab_only, 0
    model = llama_cpp.llama_model_load_from_file(str(path).encode(), params)
    if not model:
        version = llama_cpp.__version__
        raise GgufError(
            f"{path}: llama.cpp of llama-cpp-python {version} cannot load it: {' '.join(reasons) or 'no reason given'}"
        )
    try:
        yield model
    finally:
        llama_cpp.llama_model_free(model)


@contextmanager
def _context(path: Path, tokens: int, threads: int) -> Iterator[Any]:
    import llama_cpp

    with _model(path) as model:
        params = llama_cpp.llama_context_default_params()
        params.n_ctx = params.n_batch = params.n_ubatch = tokens  # a row is one batch: pooling needs all of it
        params.n_threads = params.n_threads_batch = threads
        params.embeddings, params.pooling_type = True, llama_cpp.LLAMA_POOLING_TYPE_LAST
        context = llama_cpp.llama_init_from_model(model, params)
        if not context:
            reason = " ".join(_error_log()[1]) or "no reason given"
            raise GgufError(f"{path}: llama.cpp made no context of {tokens} tokens: {reason}")
        try:
            yield context
        finally:
            llama_cpp.llama_free(context)


def _last_hidden(context: Any, ids: Sequence[int], width: int) -> NDArray[np.float32]:  # noqa: ANN401 - a pointer
    """The final hidden state [width] of the last of ``ids``."""
    import llama_cpp

    llama_cpp.llama_memory_clear(llama_cpp.llama_get_memory(context), True)
    row = (llama_cpp.llama_token * len(ids))(*ids)
    batch = llama_cpp.llama_batch_get_one(row, len(ids))
    batch.logits = (ctypes.c_int8 * len(ids))(*[1] * len(ids))  # pooling wants every token among the outputs
    code = llama_cpp.llama_decode(context, batch)
    if code:
        raise GgufError(f"llama.cpp could not compute a row of {len(ids)} tokens (code {code}).")
    pointer = llama_cpp.llama_get_embeddings_seq(context, 0)
    return np.ctypeslib.as_array(pointer, (width,)).astype(np.float32)  # a copy: the next row writes there
