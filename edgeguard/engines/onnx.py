"""The ONNX engine: onnxruntime on the CPU.

The graph takes ``input_ids`` and ``attention_mask`` (int64 [batch, length]) and returns ``logits`` (float32
[batch, K]); anything else is refused at load, not at the first text.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnxruntime
from numpy.typing import NDArray

from edgeguard.engines.cpus import choose_threads
from edgeguard.errors import EngineError

__all__ = ["OnnxEngine"]

INPUTS = {"input_ids": "tensor(int64)", "attention_mask": "tensor(int64)"}
OUTPUTS = {"logits": "tensor(float)"}
ERRORS_ONLY = 3


class OnnxEngine:
    """An onnxruntime session. ``outputs``: K, the labels of the bundle's head."""

    name = "onnx"

    def __init__(self, file: Path, *, outputs: int, threads: int | None = None) -> None:
        """Load ``file``. Raises EngineError for a file that is no such model."""
        self.threads = choose_threads(threads)
        self._outputs = outputs
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = self.threads
        options.inter_op_num_threads = 1
        options.log_severity_level = ERRORS_ONLY
        try:
            self._session = onnxruntime.InferenceSession(str(file), options, providers=["CPUExecutionProvider"])
        except Exception as error:  # onnxruntime's errors share no base but Exception
            raise EngineError(f"{file}: expected a model that onnxruntime loads, found {_first_line(error)}") from error
        self._check_graph(file)

    @property
    def providers(self) -> tuple[str, ...]:
        """Execution providers of the session, most preferred first."""
        return tuple(self._session.get_providers())

    @property
    def version(self) -> str:
        """Version of onnxruntime."""
        return str(onnxruntime.__version__)

    def logits(self, ids: NDArray[np.int64], mask: NDArray[np.int64]) -> NDArray[np.float32]:
        """See :meth:`edgeguard.engines.Engine.logits`."""
        try:
            (found,) = self._session.run(["logits"], {"input_ids": ids, "attention_mask": mask})
        except Exception as error:  # as above
            raise EngineError(f"onnxruntime failed on a batch of shape {ids.shape}: {_first_line(error)}") from error
        expected = (ids.shape[0], self._outputs)
        if found.shape != expected:
            raise EngineError(f"the model returned logits of shape {found.shape}, expected {expected}.")
        result: NDArray[np.float32] = found
        return result

    def _check_graph(self, file: Path) -> None:
        for kind, expected, nodes in (
            ("inputs", INPUTS, self._session.get_inputs()),
            ("outputs", OUTPUTS, self._session.get_outputs()),
        ):
            found = {node.name: node.type for node in nodes}
            if found != expected:
                raise EngineError(f"{file}: expected the {kind} {expected}, found {found}.")
            for node in nodes:
                if len(node.shape) != 2:
                    raise EngineError(f"{file}: {node.name}: expected two dimensions, found {node.shape}.")
        width = self._session.get_outputs()[0].shape[1]
        if width != self._outputs:
            raise EngineError(f"{file}: logits: expected {self._outputs} columns (the head's labels), found {width}.")


def _first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__
