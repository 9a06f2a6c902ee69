"""Other ways to run the same weights, each as people usually call it: what ``--peers`` measures.

A peer gets the token ids that the engines get, the same number of threads, and files made from the bundle's own INT4
integers (:mod:`~edgeguard.bench.peer_files`). It answers with the logits of the last token. Where a library can carry a
head of K rows it does, since that is the cheaper way for it, and its margins can be compared with the engines';
llama.cpp and onnxruntime-genai know no other output than the vocabulary (the embedding again), which costs one row
more.

Every class says in ``settings`` how it is called. A library is imported when a peer is loaded, never before.
"""

from __future__ import annotations

import ctypes
import importlib
import importlib.util
import json
import time
from collections.abc import Mapping, Sequence
from importlib import metadata
from pathlib import Path
from types import MappingProxyType
from typing import ClassVar

import numpy as np
from numpy.typing import NDArray

from edgeguard.bench.peer_files import FILES, HEAD_BIAS
from edgeguard.bench.records import BenchError
from edgeguard.bench.runners import Facts, Reading, Sample

__all__ = ["PEERS", "Peer", "PeerRunner", "import_peer", "missing_package"]

CPU = ("CPUExecutionProvider",)
Ids = NDArray[np.int64]
Logits = NDArray[np.float32]


class Peer:
    """A library with the model loaded; one subclass a way to run it."""

    package: ClassVar[str]  # as pip knows it
    modules: ClassVar[tuple[str, ...]]  # imported before the model is loaded, and timed apart
    files: ClassVar[str]  # what it reads, see peer_files.FILES
    settings: ClassVar[str]
    has_head: ClassVar[bool] = True  # its logits are the head's rows, without their bias where its files lack it
    providers: ClassVar[tuple[str, ...]] = ("CPU",)  # what it is asked to compute with

    def __init__(self, model: Path, threads: int, longest: int) -> None:
        """Load ``model`` (a file or folder) for texts of at most ``longest`` tokens."""
        raise NotImplementedError

    @property
    def used(self) -> tuple[str, ...]:
        """What it does compute with, where the library tells it."""
        return self.providers

    def logits(self, ids: Ids) -> Logits:
        """Logits [B, ...] of the last token of every row of ``ids`` [B, L]."""
        raise NotImplementedError


class LlamaCpp(Peer):
    """llama.cpp through llama-cpp-python."""

    package, modules, files, has_head = "llama-cpp-python", ("llama_cpp",), "gguf", False
    settings = (
        "Llama(n_ctx, n_threads, n_threads_batch), Q4_0, all else as it comes; reset, eval, logits of the last token"
    )

    def __init__(self, model: Path, threads: int, longest: int) -> None:
        """As people call it."""
        import llama_cpp

        self._library = llama_cpp
        self._llama = llama_cpp.Llama(
            str(model), n_ctx=longest, n_threads=threads, n_threads_batch=threads, verbose=False
        )

    def logits(self, ids: Ids) -> Logits:
        """One row after the other: it reads one text at a time."""
        return np.stack([self._row(row) for row in ids.tolist()])

    def _row(self, ids: list[int]) -> Logits:
        self._llama.reset()  # type: ignore[no-untyped-call, unused-ignore]
        self._llama.eval(ids)
        pointer = self._library.llama_get_logits_ith(self._llama.ctx, -1)
        row = (ctypes.c_float * self._llama.n_vocab()).from_address(ctypes.addressof(pointer.contents))
        return np.array(row, np.float32)


class OnnxruntimeInt4(Peer):
    """onnxruntime on the bundle's own graph."""

    package, modules, files, providers = "onnxruntime", ("onnxruntime",), "onnx", CPU
    settings = (
        "InferenceSession on the INT4 graph as it is on disk (MatMulNBits), intra_op_num_threads, all else as it comes"
    )

    def __init__(self, model: Path, threads: int, longest: int) -> None:
        """A plain session."""
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads
        self._session = onnxruntime.InferenceSession(str(model), options, providers=list(CPU))

    @property
    def used(self) -> tuple[str, ...]:
        """The session's providers."""
        return tuple(self._session.get_providers())

    def logits(self, ids: Ids) -> Logits:
        """One batch."""
        feeds = {"input_ids": ids, "attention_mask": np.ones_like(ids)}
        logits: Logits = self._session.run(["logits"], feeds)[0]
        return logits


class TransformersFp32(Peer):
    """transformers in float32."""

    package, modules, files = "transformers", ("torch", "transformers"), "transformers"
    settings = "AutoModelForSequenceClassification, float32, SDPA attention, inference_mode, no KV cache"
    dtype: ClassVar[str] = "float32"

    def __init__(self, model: Path, threads: int, longest: int) -> None:
        """Weights are mapped from the file."""
        import torch
        from transformers import AutoModelForSequenceClassification

        torch.set_num_threads(threads)
        self._torch = torch
        made = AutoModelForSequenceClassification.from_pretrained(model, torch_dtype=getattr(torch, self.dtype))
        self._model = made.eval()

    def logits(self, ids: Ids) -> Logits:
        """One batch."""
        with self._torch.inference_mode():
            found = self._model(input_ids=self._torch.from_numpy(ids), use_cache=False).logits
        logits: Logits = found.float().numpy()
        return logits


class TransformersBf16(TransformersFp32):
    """transformers in bfloat16."""

    settings = "AutoModelForSequenceClassification, bfloat16, SDPA attention, inference_mode, no KV cache"
    dtype = "bfloat16"


class OnnxruntimeGenai(Peer):
    """onnxruntime-genai, on what its own builder makes."""

    package, modules, files, has_head = "onnxruntime-genai", ("onnxruntime_genai",), "genai", False
    settings = "its builder's INT4 model for the CPU; a Generator a text, append_tokens, logits of the last token"
    providers = CPU

    def __init__(self, model: Path, threads: int, longest: int) -> None:
        """Threads stand in its configuration, which was written with them."""
        self._library = importlib.import_module("onnxruntime_genai")
        self._model = self._library.Model(str(model))
        self._longest = longest

    def logits(self, ids: Ids) -> Logits:
        """A generator a batch."""
        params = self._library.GeneratorParams(self._model)
        params.set_search_options(max_length=self._longest + 1, batch_size=len(ids))
        generator = self._library.Generator(self._model, params)
        generator.append_tokens(ids.astype(np.int32))
        logits: Logits = np.asarray(generator.get_output("logits"), np.float32)[:, -1]
        return logits


class OptimumOrt(Peer):
    """optimum's ORTModel."""

    package, modules, files = "optimum-onnx", ("onnxruntime", "optimum.onnxruntime"), "optimum"
    settings = (
        "ORTModelForSequenceClassification on optimum's own export, float32, intra_op_num_threads, all else as it comes"
    )
    providers = CPU

    def __init__(self, model: Path, threads: int, longest: int) -> None:
        """A session of onnxruntime under transformers' interface."""
        import onnxruntime
        from optimum.onnxruntime import ORTModelForSequenceClassification

        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads
        self._model = ORTModelForSequenceClassification.from_pretrained(
            model, provider=CPU[0], session_options=options, local_files_only=True
        )

    def logits(self, ids: Ids) -> Logits:
        """One batch."""
        logits: Logits = self._model(input_ids=ids, attention_mask=np.ones_like(ids)).logits
        return logits


# In the order of the tables; the first one that was measured is what ratios are against.
PEERS: Mapping[str, type[Peer]] = MappingProxyType(
    {
        "llama-cpp-python": LlamaCpp,
        "onnxruntime-int4": OnnxruntimeInt4,
        "transformers-fp32": TransformersFp32,
        "transformers-bf16": TransformersBf16,
        "onnxruntime-genai": OnnxruntimeGenai,
        "optimum-ort": OptimumOrt,
    }
)


def missing_package(peer: type[Peer]) -> str | None:
    """Why ``peer`` cannot be run here; None when its library is installed. Imports nothing of it but its parents."""
    for module in peer.modules:
        try:
            found = importlib.util.find_spec(module) is not None
        except ImportError:
            found = False
        if not found:
            return f"not installed: pip install {peer.package}"
    return None


def import_peer(peer: type[Peer]) -> None:
    """Import its library."""
    for module in peer.modules:
        importlib.import_module(module)


class PeerRunner:
    """A peer, as a worker holds it."""

    def __init__(self, peer: type[Peer], bundle: Path, folder: Path, threads: int, longest: int) -> None:
        """Load the peer's model, prepared in ``folder`` from ``bundle``."""
        self._peer = peer(FILES[peer.files].place(bundle, folder), threads, longest)
        bias = json.loads((folder / HEAD_BIAS).read_text()) if (folder / HEAD_BIAS).is_file() else None
        self._bias = 0.0 if bias is None or peer.files == "onnx" else bias[1] - bias[0]
        self.facts = Facts(
            used=peer.package,
            version=metadata.version(peer.package),
            settings=peer.settings,
            providers_asked=peer.providers,
            providers_used=self._peer.used,
            threads_used=threads,
            details={},
        )

    def call(self, samples: Sequence[Sample]) -> Reading:
        """See :meth:`edgeguard.bench.runners.Runner.call`. Raises BenchError for a logit that is not finite."""
        ids = np.array([sample.ids for sample in samples], np.int64)
        start = time.perf_counter()
        logits = self._peer.logits(ids)
        latency_ms = 1000 * (time.perf_counter() - start)
        if len(logits) != len(samples) or not np.isfinite(logits).all():
            raise BenchError(f"{self.facts.used} returned logits {logits.shape}, or one that is not finite.")
        margin = float(logits[0, 1] - logits[0, 0]) + self._bias if self._peer.has_head else None
        return Reading(latency_ms, None, None, margin)
