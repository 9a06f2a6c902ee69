"""Other ways to run the same weights, each as people usually call it: what ``--peers`` measures.

A peer gets the token ids that the engines get, the same number of threads, and files made from the bundle's own INT4
integers (:mod:`~edgeguard.bench.peer_files`). It answers with the logits of the last token. Where a library can carry a
head of K rows it does, since that is the cheaper way for it, and its margins can be compared with the engines';
llama.cpp and onnxruntime-genai know no other output than the vocabulary (the embedding again), which costs one row
more.

A peer is data, and a function that loads it; ``settings`` says how it is called. A library is imported when its peer is
loaded, never before.
"""

from __future__ import annotations

import ctypes
import importlib
import importlib.util
import json
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from importlib import metadata
from pathlib import Path
from types import MappingProxyType
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from edgeguard.bench.peer_files import FILES, HEAD_BIAS
from edgeguard.bench.records import BenchError
from edgeguard.bench.runners import Facts, Reading, Sample

__all__ = ["PEERS", "Model", "Peer", "PeerRunner", "import_peer", "missing_package"]

CPU = ("CPUExecutionProvider",)
Ids = NDArray[np.int64]
Logits = NDArray[np.float32]


class Model(NamedTuple):
    """A model in memory.

    ``logits``: ids [B, L] -> logits [B, ...] of the last token of every row. ``providers``: what it computes with,
    where the library tells it, else what it was asked to.
    """

    logits: Callable[[Ids], Logits]
    providers: Sequence[str]


@dataclass(frozen=True)
class Peer:
    """A library, and one way to run the weights in it.

    ``package``: as pip knows it; ``modules``: imported before the model is loaded, and timed apart. ``files``: what it
    reads, see :data:`edgeguard.bench.peer_files.FILES`. ``load``: (file or folder of the model, threads, tokens of the
    longest text) -> the model. ``providers``: what it is asked to compute with. ``has_head``: its logits are the head's
    rows, without their bias where its files lack it.
    """

    package: str
    modules: tuple[str, ...]
    files: str
    settings: str
    load: Callable[[Path, int, int], Model]
    providers: tuple[str, ...] = CPU
    has_head: bool = True


def _llama_cpp(model: Path, threads: int, longest: int) -> Model:
    """It reads one text at a time: a batch is one after the other."""
    import llama_cpp

    llama = llama_cpp.Llama(str(model), n_ctx=longest, n_threads=threads, n_threads_batch=threads, verbose=False)

    def read(ids: list[int]) -> Logits:
        llama.reset()  # type: ignore[no-untyped-call, unused-ignore]
        llama.eval(ids)
        pointer = llama_cpp.llama_get_logits_ith(llama.ctx, -1)
        row = (ctypes.c_float * llama.n_vocab()).from_address(ctypes.addressof(pointer.contents))
        return np.array(row, np.float32)

    return Model(lambda ids: np.stack([read(row) for row in ids.tolist()]), ("CPU",))


def _onnxruntime(model: Path, threads: int, _: int) -> Model:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    session = onnxruntime.InferenceSession(str(model), options, providers=list(CPU))

    def logits(ids: Ids) -> Logits:
        found: Logits = session.run(["logits"], {"input_ids": ids, "attention_mask": np.ones_like(ids)})[0]
        return found

    return Model(logits, session.get_providers())


def _transformers(dtype: str, model: Path, threads: int, _: int) -> Model:
    """Weights are mapped from the file."""
    import torch
    from transformers import AutoModelForSequenceClassification

    torch.set_num_threads(threads)
    made = AutoModelForSequenceClassification.from_pretrained(model, torch_dtype=getattr(torch, dtype)).eval()

    def logits(ids: Ids) -> Logits:
        with torch.inference_mode():
            found: Logits = made(input_ids=torch.from_numpy(ids), use_cache=False).logits.float().numpy()
        return found

    return Model(logits, ("CPU",))


def _onnxruntime_genai(model: Path, _: int, longest: int) -> Model:
    """A generator a batch. Threads stand in the model's configuration, which was written with them."""
    genai = importlib.import_module("onnxruntime_genai")
    made = genai.Model(str(model))

    def logits(ids: Ids) -> Logits:
        params = genai.GeneratorParams(made)
        params.set_search_options(max_length=longest + 1, batch_size=len(ids))
        generator = genai.Generator(made, params)
        generator.append_tokens(ids.astype(np.int32))
        found: Logits = np.asarray(generator.get_output("logits"), np.float32)[:, -1]
        return found

    return Model(logits, CPU)


def _optimum(model: Path, threads: int, _: int) -> Model:
    """A session of onnxruntime under transformers' interface."""
    import onnxruntime
    from optimum.onnxruntime import ORTModelForSequenceClassification

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    made = ORTModelForSequenceClassification.from_pretrained(
        model, provider=CPU[0], session_options=options, local_files_only=True
    )

    def logits(ids: Ids) -> Logits:
        found: Logits = made(input_ids=ids, attention_mask=np.ones_like(ids)).logits
        return found

    return Model(logits, CPU)


def _transformers_peer(dtype: str) -> Peer:
    return Peer(
        package="transformers",
        modules=("torch", "transformers"),
        files="transformers",
        settings=f"AutoModelForSequenceClassification, {dtype}, SDPA attention, inference_mode, no KV cache",
        load=partial(_transformers, dtype),
        providers=("CPU",),
    )


# In the order of the tables; the first one that was measured is what ratios are against.
PEERS: Mapping[str, Peer] = MappingProxyType(
    {
        "llama-cpp-python": Peer(
            package="llama-cpp-python",
            modules=("llama_cpp",),
            files="gguf",
            settings="Llama(n_ctx, n_threads, n_threads_batch), Q4_0, all else as it comes; reset, eval, logits of the "
            "last token",
            load=_llama_cpp,
            providers=("CPU",),
            has_head=False,
        ),
        "onnxruntime-int4": Peer(
            package="onnxruntime",
            modules=("onnxruntime",),
            files="onnx",
            settings="InferenceSession on the INT4 graph as it is on disk (MatMulNBits), intra_op_num_threads, all "
            "else as it comes",
            load=_onnxruntime,
        ),
        "transformers-fp32": _transformers_peer("float32"),
        "transformers-bf16": _transformers_peer("bfloat16"),
        "onnxruntime-genai": Peer(
            package="onnxruntime-genai",
            modules=("onnxruntime_genai",),
            files="genai",
            settings="its builder's INT4 model for the CPU; a Generator a text, append_tokens, logits of the last "
            "token",
            load=_onnxruntime_genai,
            has_head=False,
        ),
        "optimum-ort": Peer(
            package="optimum-onnx",
            modules=("onnxruntime", "optimum.onnxruntime"),
            files="optimum",
            settings="ORTModelForSequenceClassification on optimum's own export, float32, intra_op_num_threads, all "
            "else as it comes",
            load=_optimum,
        ),
    }
)


def missing_package(peer: Peer) -> str | None:
    """Why ``peer`` cannot be run here; None when its library is installed. Imports nothing of it but its parents."""
    for module in peer.modules:
        try:
            found = importlib.util.find_spec(module) is not None
        except ImportError:
            found = False
        if not found:
            return f"not installed: pip install {peer.package}"
    return None


def import_peer(peer: Peer) -> None:
    """Import its library."""
    for module in peer.modules:
        importlib.import_module(module)


class PeerRunner:
    """A peer, as a worker holds it."""

    def __init__(self, peer: Peer, bundle: Path, folder: Path, threads: int, longest: int) -> None:
        """Load the peer's model, prepared in ``folder`` from ``bundle``."""
        self._peer = peer
        self._model = peer.load(FILES[peer.files].place(bundle, folder), threads, longest)
        bias = json.loads((folder / HEAD_BIAS).read_text()) if (folder / HEAD_BIAS).is_file() else None
        self._bias = 0.0 if bias is None or peer.files == "onnx" else bias[1] - bias[0]
        self.facts = Facts(
            used=peer.package,
            version=metadata.version(peer.package),
            settings=peer.settings,
            providers_asked=peer.providers,
            providers_used=tuple(self._model.providers),
            threads_used=threads,
            details={},
        )

    def call(self, samples: Sequence[Sample]) -> Reading:
        """See :meth:`edgeguard.bench.runners.Runner.call`. Raises BenchError for a logit that is not finite."""
        ids = np.array([sample.ids for sample in samples], np.int64)
        start = time.perf_counter()
        logits = self._model.logits(ids)
        latency_ms = 1000 * (time.perf_counter() - start)
        if len(logits) != len(samples) or not np.isfinite(logits).all():
            raise BenchError(f"{self.facts.used} returned logits {logits.shape}, or one that is not finite.")
        margin = float(logits[0, 1] - logits[0, 0]) + self._bias if self._peer.has_head else None
        return Reading(latency_ms, None, None, margin)
