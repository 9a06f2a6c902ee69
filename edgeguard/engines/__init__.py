"""Engines: what runs the forward pass. One small protocol stands between them and Guard.

Engine libraries are imported when an engine is made, never before.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
from numpy.typing import NDArray

from edgeguard.errors import EngineError

if TYPE_CHECKING:
    from edgeguard.bundle import Bundle

__all__ = ["ENGINES", "Engine", "create_engine", "fastest_engine"]


class Engine(Protocol):
    """A model in memory. Safe to call from several threads."""

    @property
    def name(self) -> str:
        """``onnx``, ``onnx-int8``: as in ``Verdict.engine``."""

    @property
    def providers_asked(self) -> Sequence[str]:
        """What was asked to compute, most preferred first: ``CPUExecutionProvider``."""

    @property
    def providers(self) -> Sequence[str]:
        """What does compute, most preferred first."""

    @property
    def threads(self) -> int:
        """Threads one forward pass uses."""

    @property
    def version(self) -> str:
        """Version of the library behind it."""

    def logits(self, ids: NDArray[np.int64], mask: NDArray[np.int64]) -> NDArray[np.float32]:
        """Logits of each row's last token. ``ids``, ``mask``: int64 [B, L], mask 1 = token, padded on the right.

        Returns float32 [B, K]. Raises EngineError when the model fails.
        """

    def read_on(self, ids: Sequence[int], seen: Any) -> tuple[NDArray[np.float32], Any]:  # noqa: ANN401
        """Logits float32 [1, K] of the row ``ids``, and what to pass as ``seen`` with the next, longer row.

        ``seen``: None at first, then what this method returned; only this engine knows what it is, and one that cannot
        read on returns None and reads all of every row. Raises EngineError when the model fails.
        """


def _onnx(bundle: Bundle, threads: int | None) -> Engine:
    from edgeguard.engines.onnx import OnnxEngine

    return OnnxEngine(bundle.file_for("onnx"), outputs=len(bundle.manifest.head), threads=threads)


def _onnx_int8(bundle: Bundle, threads: int | None) -> Engine:
    from edgeguard.engines.int8 import INT8_ENGINE, int8_files
    from edgeguard.engines.onnx import OnnxEngine

    graph, weights = int8_files(bundle)
    head = len(bundle.manifest.head)
    return OnnxEngine(graph, outputs=head, threads=threads, name=INT8_ENGINE, weights=weights.parent)


def _gguf(bundle: Bundle, threads: int | None) -> Engine:
    try:
        from edgeguard.engines.gguf import GgufEngine
    except (OSError, RuntimeError) as error:  # what llama-cpp-python raises when its own library does not load
        raise EngineError(f"the engine 'gguf' does not load here: {error}. Install llama-cpp-python again.") from error
    return GgufEngine.from_bundle(bundle, threads=threads)


# Name -> how to make it. ``onnx`` computes with the INT4 weights as they are and needs the least memory, ``onnx-int8``
# with an INT8 copy of them, which is faster on a CPU with INT8 dot products; ``gguf`` is llama.cpp.
ENGINES: dict[str, Callable[[Bundle, int | None], Engine]] = {"onnx": _onnx, "onnx-int8": _onnx_int8, "gguf": _gguf}
# Name -> how to install it, for those that the base install lacks.
EXTRAS = {"gguf": "pip install 'edgeguard-runtime[gguf]'"}


def create_engine(name: str, bundle: Bundle, threads: int | None = None) -> Engine:
    """Load the bundle's model into the engine ``name``; ``auto``: see :func:`fastest_engine`.

    ``threads``: None for one a physical core. Raises EngineError for an unknown name, a library that is not installed
    or a model that does not load; BundleError when the bundle has no file for the engine.
    """
    if name == "auto":
        return fastest_engine(bundle, threads)[0]
    if name not in ENGINES:
        raise EngineError(f"unknown engine {name!r}. Known engines: auto, {', '.join(ENGINES)}.")
    try:
        return ENGINES[name](bundle, threads)
    except ImportError as error:
        advice = f"Install it with {EXTRAS[name]}. " if name in EXTRAS else ""
        raise EngineError(
            f"the engine {name!r} is not installed ({error}). {advice}Known engines: auto, {', '.join(ENGINES)}."
        ) from error


def fastest_engine(bundle: Bundle, threads: int | None = None) -> tuple[Engine, Mapping[str, Any] | None]:
    """The fastest engine that the bundle has a file for, and how it was chosen (see :mod:`edgeguard.engines.choose`).

    The record is None where there was nothing to choose. Raises as :func:`create_engine`.
    """
    from edgeguard.engines.choose import choose_engine

    held = {entry.engine for entry in bundle.manifest.files.values()}
    names = [name for name in ENGINES if name in held] or [next(iter(ENGINES))]
    if len(names) == 1:
        return create_engine(names[0], bundle, threads), None
    return choose_engine(bundle, names, threads, lambda name: create_engine(name, bundle, threads))
