"""llama.cpp through llama-cpp-python's low-level functions: a model, a context, several rows in one decode.

Whatever llama.cpp refuses raises an EngineError with the reason that it logs; nothing else of its log is shown.

Source: llama.cpp ``include/llama.h`` (2026), through llama-cpp-python 0.3.
"""

from __future__ import annotations

import ctypes
import platform
import sys
import weakref
from collections import deque
from functools import cache
from pathlib import Path
from typing import Any

import llama_cpp
import numpy as np
from numpy.typing import NDArray

from edgeguard.engines.gguf_file import GgufError
from edgeguard.errors import EngineError

__all__ = ["LlamaContext", "LlamaModel", "has_metal"]

if not hasattr(llama_cpp, "LLAMA_FLASH_ATTN_TYPE_DISABLED"):
    raise ImportError(f"llama-cpp-python {llama_cpp.__version__} is too old, 0.3.36 is known to work")

ERROR_LEVEL = 4  # of ggml.h; llama-cpp-python's own log reads the levels otherwise
LOGGED_ERRORS = 3
MAX_UBATCH = 512  # tokens computed at once; llama.cpp cuts a longer batch
TEXT_BYTES = 2**16  # of a metadata value, where it is longer than that it is read again


def has_metal() -> bool:
    """Whether this is Apple Silicon and llama.cpp was built for its GPU."""
    apple = sys.platform == "darwin" and platform.machine() == "arm64"
    return apple and bool(llama_cpp.llama_supports_gpu_offload())


class LlamaModel:
    """A GGUF file in memory.

    ``vocabulary``: the number of its tokens; ``width``: of a hidden state; ``max_tokens``: the longest row that it was
    made for.
    """

    def __init__(self, path: Path, *, vocabulary_only: bool = False, metal: bool = False) -> None:
        """Load ``path``, all layers on the GPU with ``metal``. Raises GgufError for what llama.cpp cannot load."""
        self.path = path
        llama_cpp.llama_backend_init()
        log, reasons = _error_log()
        reasons.clear()
        llama_cpp.llama_log_set(log, ctypes.c_void_p(0))
        params = llama_cpp.llama_model_default_params()
        params.vocab_only, params.n_gpu_layers = vocabulary_only, -1 if metal else 0
        self.pointer = llama_cpp.llama_model_load_from_file(str(path).encode(), params)
        if not self.pointer:
            raise GgufError(f"{path}: llama.cpp of {_version()} cannot load it: {_reasons()}")
        self.close = weakref.finalize(self, llama_cpp.llama_model_free, self.pointer)
        self.vocab = llama_cpp.llama_model_get_vocab(self.pointer)
        self.vocabulary = int(llama_cpp.llama_vocab_n_tokens(self.vocab))
        self.width = int(llama_cpp.llama_model_n_embd(self.pointer))
        self.max_tokens = int(llama_cpp.llama_model_n_ctx_train(self.pointer))

    def text(self, key: str) -> str | None:
        """The value of a key of the file's metadata, None where it has no such key."""
        room = TEXT_BYTES
        while True:
            buffer = ctypes.create_string_buffer(room)
            length = llama_cpp.llama_model_meta_val_str(self.pointer, key.encode(), buffer, room)
            if length < room:
                return None if length < 0 else buffer.value.decode("utf-8", "replace")
            room = length + 1


class LlamaContext:
    """What a model computes with: its cache of keys and values, shared by all sequences, and its threads.

    Not safe to call from several threads.
    """

    def __init__(
        self,
        model: LlamaModel,
        *,
        tokens: int,
        threads: int,
        sequences: int = 1,
        pooled: bool = False,
        metal: bool = False,
    ) -> None:
        """A cache of ``tokens`` cells for the sequences 0 to ``sequences`` - 1.

        A decode gives the logits of at most as many tokens as there are sequences, and what it computes of a token
        depends little on the others of the batch (no flash attention on a CPU). With ``pooled``, it gives the hidden
        state of each sequence's last token instead, computed as llama.cpp does by itself. Raises GgufError when
        llama.cpp cannot make it.
        """
        self.model = model
        params = llama_cpp.llama_context_default_params()
        params.n_ctx = params.n_batch = tokens
        # Pooling reads all of a sequence at once.
        params.n_ubatch = tokens if pooled else min(tokens, MAX_UBATCH)
        params.n_seq_max, params.kv_unified = sequences, True
        if hasattr(params, "n_outputs_max") and not pooled:  # else it makes room for the logits of every token
            params.n_outputs_max = sequences
        params.n_threads = params.n_threads_batch = threads
        params.offload_kqv = params.op_offload = metal
        if not metal and not pooled:
            params.flash_attn_type = llama_cpp.LLAMA_FLASH_ATTN_TYPE_DISABLED
        params.embeddings = pooled
        params.pooling_type = llama_cpp.LLAMA_POOLING_TYPE_LAST if pooled else llama_cpp.LLAMA_POOLING_TYPE_NONE
        _error_log()[1].clear()
        self.pointer = llama_cpp.llama_init_from_model(model.pointer, params)
        if not self.pointer:
            raise GgufError(f"{model.path}: llama.cpp made no context of {tokens} tokens: {_reasons()}")
        self.close = weakref.finalize(self, llama_cpp.llama_free, self.pointer)
        self._memory = llama_cpp.llama_get_memory(self.pointer)

    def decode(
        self,
        tokens: NDArray[np.int32] | NDArray[np.float32],
        positions: NDArray[np.int32],
        sequences: NDArray[np.int32],
        outputs: NDArray[np.int8],
    ) -> None:
        """Compute n tokens of one or several sequences.

        ``tokens``: ids, int32 [n], or their embeddings, float32 [n, width]. ``positions``: of each in its sequence;
        ``sequences``: its number; ``outputs``: 1 where the logits are wanted; all [n]. Raises EngineError.
        """
        count = len(positions)
        batch = llama_cpp.llama_batch()
        batch.n_tokens = count
        if tokens.dtype == np.float32:
            batch.embd = _pointer(tokens, ctypes.c_float)
        else:
            batch.token = _pointer(tokens, ctypes.c_int32)
        ones = np.ones(count, np.int32)
        places = sequences.ctypes.data + sequences.itemsize * np.arange(count, dtype=np.uintp)
        batch.pos = _pointer(positions, ctypes.c_int32)
        batch.n_seq_id = _pointer(ones, ctypes.c_int32)
        batch.seq_id = _pointer(places, ctypes.POINTER(ctypes.c_int32))
        batch.logits = _pointer(outputs, ctypes.c_int8)
        _error_log()[1].clear()
        code = llama_cpp.llama_decode(self.pointer, batch)
        if code:
            raise EngineError(f"llama.cpp could not compute {count} tokens (code {code}): {_reasons()}")

    def logits(self, index: int) -> NDArray[np.float32]:
        """Logits [vocabulary] of the token that stood at ``index`` in the last decode; a view, until the next."""
        pointer = llama_cpp.llama_get_logits_ith(self.pointer, index)
        return self._floats(pointer, self.model.vocabulary)

    def hidden(self, sequence: int) -> NDArray[np.float32]:
        """Final hidden state [width] of a sequence's last token (``pooled``); a view, until the next decode."""
        return self._floats(llama_cpp.llama_get_embeddings_seq(self.pointer, sequence), self.model.width)

    def clear(self) -> None:
        """Forget all sequences."""
        llama_cpp.llama_memory_clear(self._memory, False)

    def forget(self, sequence: int) -> None:
        """Forget one; cells that another one shares stay."""
        llama_cpp.llama_memory_seq_rm(self._memory, sequence, -1, -1)

    def share(self, source: int, target: int, count: int) -> bool:
        """Let the empty sequence ``target`` begin with the first ``count`` tokens of ``source``, computed once.

        Returns whether it does: caches of other kinds (recurrent, sliding window) keep no such beginning.
        """
        llama_cpp.llama_memory_seq_cp(self._memory, source, target, 0, count)
        ends = (llama_cpp.llama_memory_seq_pos_min, llama_cpp.llama_memory_seq_pos_max)
        if [end(self._memory, target) for end in ends] == [0, count - 1]:
            return True
        self.forget(target)
        return False

    def _floats(self, pointer: Any, count: int) -> NDArray[np.float32]:  # noqa: ANN401 - a pointer
        if not pointer:
            raise EngineError(f"llama.cpp returned nothing for a token that it computed: {_reasons()}")
        return np.ctypeslib.as_array(pointer, (count,))


def _pointer(array: NDArray[Any], kind: type) -> Any:  # noqa: ANN401 - what a structure of ctypes takes
    if not array.flags.c_contiguous:
        raise ValueError("expected an array without gaps.")
    return array.ctypes.data_as(ctypes.POINTER(kind))


@cache
def _error_log() -> tuple[Any, deque[str]]:
    """A log for llama.cpp that keeps errors for our messages, and the last of them; the rest is said to nobody."""
    reasons: deque[str] = deque(maxlen=LOGGED_ERRORS)

    @llama_cpp.llama_log_callback  # type: ignore[untyped-decorator]
    def log(level: int, text: bytes, _: object) -> None:
        if level == ERROR_LEVEL:
            reasons.append(text.decode("utf-8", "replace").strip())

    return log, reasons


def _reasons() -> str:
    return " ".join(_error_log()[1]) or "no reason given"


def _version() -> str:
    return f"llama-cpp-python {llama_cpp.__version__}"
