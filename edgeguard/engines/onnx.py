"""The ONNX engines: onnxruntime on the CPU, computing with the INT4 weights as they are, or with an INT8 copy of them.

The graph takes ``input_ids`` and ``attention_mask`` (int64 [batch, length]) and returns ``logits`` (float32
[batch, K]); anything else is refused at load, not at the first text. A graph that also takes ``past.LAYER.key`` and
``past.LAYER.value`` can read on where an earlier call ended.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnxruntime
from numpy.typing import NDArray

from edgeguard.engines.cpus import choose_threads
from edgeguard.errors import EngineError

__all__ = ["OnnxEngine", "Seen", "empty_past", "past_shapes"]

INPUTS = {"input_ids": "tensor(int64)", "attention_mask": "tensor(int64)"}
OUTPUTS = {"logits": "tensor(float)"}
ERRORS_ONLY = 3
WEIGHTS_FOLDER = "session.model_external_initializers_file_folder_path"  # read for a model that is given as bytes
FLOAT = "tensor(float)"


@dataclass(frozen=True)
class Seen:
    """Tokens that were read, and their keys and values: name of the input -> float32 [1, heads, tokens, width]."""

    ids: tuple[int, ...]
    past: Mapping[str, NDArray[np.float32]]

    def first(self, count: int) -> Seen:
        """The first ``count`` tokens of it."""
        return Seen(self.ids[:count], {name: array[:, :, :count] for name, array in self.past.items()})


def past_shapes(session: onnxruntime.InferenceSession) -> dict[str, tuple[int, int]]:
    """Heads and width of every input of ``session`` that takes a past."""
    return {node.name: (node.shape[1], node.shape[3]) for node in session.get_inputs() if node.name not in INPUTS}


def empty_past(shapes: Mapping[str, tuple[int, int]], batch: int) -> dict[str, NDArray[np.float32]]:
    """A past of no tokens [batch, heads, 0, width] for every input in ``shapes``."""
    return {name: np.zeros((batch, heads, 0, width), np.float32) for name, (heads, width) in shapes.items()}


class OnnxEngine:
    """An onnxruntime session. ``outputs``: K, the labels of the bundle's head; ``name``: of the engine."""

    providers_asked = ("CPUExecutionProvider",)

    def __init__(
        self,
        file: Path,
        *,
        outputs: int,
        threads: int | None = None,
        name: str = "onnx",
        weights: Path | None = None,
    ) -> None:
        """Load ``file``; ``weights``: the folder of the file that it has its weights in, None for its own folder.

        Raises EngineError for a file that is no such model.
        """
        self.name = name
        self.threads = choose_threads(threads)
        self._outputs = outputs
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = self.threads
        options.inter_op_num_threads = 1
        options.log_severity_level = ERRORS_ONLY
        if weights is not None:
            options.add_session_config_entry(WEIGHTS_FOLDER, str(weights))
        try:
            model = str(file) if weights is None else file.read_bytes()
            self._session = onnxruntime.InferenceSession(model, options, providers=list(self.providers_asked))
        except Exception as error:  # onnxruntime's errors share no base but Exception
            raise EngineError(f"{file}: expected a model that onnxruntime loads, found {_first_line(error)}") from error
        self._check_graph(file)
        self._past = past_shapes(self._session)

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
        return self._run(["logits"], ids, mask, empty_past(self._past, len(ids)))[0]

    def read_on(self, ids: Sequence[int], seen: Seen | None) -> tuple[NDArray[np.float32], Seen | None]:
        """See :meth:`edgeguard.engines.Engine.read_on`; what ``ids`` share with ``seen`` is not computed again."""
        if not self._present:
            row = np.array([ids], dtype=np.int64)
            return self.logits(row, np.ones_like(row)), None
        seen = seen or Seen((), empty_past(self._past, 1))
        seen = seen.first(min(_shared(seen.ids, ids), len(ids) - 1))  # the last token gives the logits: always read
        new = np.array([ids[len(seen.ids) :]], dtype=np.int64)
        logits, *present = self._run(["logits", *self._present], new, np.ones_like(new), seen.past)
        return logits, Seen(tuple(ids), dict(zip(self._present.values(), present, strict=True)))

    def _run(
        self,
        outputs: Sequence[str],
        ids: NDArray[np.int64],
        mask: NDArray[np.int64],
        past: Mapping[str, NDArray[np.float32]],
    ) -> list[NDArray[np.float32]]:
        try:
            found: list[NDArray[np.float32]] = self._session.run(
                list(outputs), {"input_ids": ids, "attention_mask": mask, **past}
            )
        except Exception as error:  # as above
            raise EngineError(f"onnxruntime failed on a batch of shape {ids.shape}: {_first_line(error)}") from error
        expected = (ids.shape[0], self._outputs)
        if found[0].shape != expected:
            raise EngineError(f"the model returned logits of shape {found[0].shape}, expected {expected}.")
        return found

    def _check_graph(self, file: Path) -> None:
        inputs, outputs = self._session.get_inputs(), self._session.get_outputs()
        past = {node.name: FLOAT for node in inputs if node.name.startswith("past.")}
        self._present = {name.replace("past", "present", 1): name for name in past}
        present = dict.fromkeys(self._present, FLOAT)
        for kind, expected, nodes in (
            ("inputs", {**INPUTS, **past}, inputs),
            ("outputs", {**OUTPUTS, **present}, outputs),
        ):
            found = {node.name: node.type for node in nodes}
            if found != expected:
                raise EngineError(f"{file}: expected the {kind} {expected}, found {found}.")
            for node in nodes:
                dimensions = 4 if node.name in past or node.name in present else 2
                if len(node.shape) != dimensions:
                    raise EngineError(f"{file}: {node.name}: expected {dimensions} dimensions, found {node.shape}.")
        width = outputs[0].shape[1]
        if width != self._outputs:
            raise EngineError(f"{file}: logits: expected {self._outputs} columns (the head's labels), found {width}.")


def _shared(first: Sequence[int], second: Sequence[int]) -> int:
    """How many tokens two rows begin with alike."""
    return next(
        (i for i, (a, b) in enumerate(zip(first, second, strict=False)) if a != b), min(len(first), len(second))
    )


def _first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__
