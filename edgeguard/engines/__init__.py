"""Engines: what runs the forward pass. One small protocol stands between them and Guard.

Engine libraries are imported when an engine is made, never before.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Protocol

import numpy as np
from numpy.typing import NDArray

from edgeguard.errors import EngineError

if TYPE_CHECKING:
    from edgeguard.bundle import Bundle

__all__ = ["ENGINES", "Engine", "create_engine"]


class Engine(Protocol):
    """A model in memory. Safe to call from several threads."""

    @property
    def name(self) -> str:
        """``onnx``: as in ``Verdict.engine``."""

    @property
    def providers(self) -> Sequence[str]:
        """What computes, most preferred first: ``CPUExecutionProvider``."""

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


def _onnx(bundle: Bundle, threads: int | None) -> Engine:
    from edgeguard.engines.onnx import OnnxEngine

    return OnnxEngine(bundle.file_for("onnx"), outputs=len(bundle.manifest.head), threads=threads)


def _gguf(bundle: Bundle, threads: int | None) -> Engine:
    try:
        from edgeguard.engines.gguf import GgufEngine
    except (OSError, RuntimeError) as error:  # what llama-cpp-python raises when its own library does not load
        raise EngineError(f"the engine 'gguf' does not load here: {error}. Install llama-cpp-python again.") from error
    return GgufEngine.from_bundle(bundle, threads=threads)


# Name -> how to make it. "auto" takes the first that the bundle has a file for.
ENGINES: dict[str, Callable[[Bundle, int | None], Engine]] = {"onnx": _onnx, "gguf": _gguf}
# Name -> how to install it, for those that the base install lacks.
EXTRAS = {"gguf": "pip install 'edgeguard-runtime[gguf]'"}


def create_engine(name: str, bundle: Bundle, threads: int | None = None) -> Engine:
    """Load the bundle's model into the engine ``name`` (``auto``: the preferred one the bundle has a file for).

    ``threads``: None for one a physical core. Raises EngineError for an unknown name, a library that is not installed
    or a model that does not load; BundleError when the bundle has no file for the engine.
    """
    if name == "auto":
        held = {entry.engine for entry in bundle.manifest.files.values()}
        name = next((known for known in ENGINES if known in held), next(iter(ENGINES)))
    if name not in ENGINES:
        raise EngineError(f"unknown engine {name!r}. Known engines: auto, {', '.join(ENGINES)}.")
    try:
        return ENGINES[name](bundle, threads)
    except ImportError as error:
        advice = f"Install it with {EXTRAS[name]}. " if name in EXTRAS else ""
        raise EngineError(
            f"the engine {name!r} is not installed ({error}). {advice}Known engines: auto, {', '.join(ENGINES)}."
        ) from error
