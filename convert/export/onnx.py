"""Write the student as one ONNX file, and accept it only when it reproduces the model that it was made from.

The file appears whole or not at all: it is written under a temporary name, run in onnxruntime from there, compared
value by value with the logits of the torch model of the same INT4 weights, and only then renamed.

MatMulNBits at accuracy level 4 rounds activations to INT8 in blocks of 32, so on real weights a logit moves by a few
hundredths to a few tenths; a structural fault moves it by whole units.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
from numpy.typing import NDArray

from convert.export.onnx_graph import StudentConfig, Weights, build_guard_graph
from edgeguard.engines.onnx import empty_past, past_shapes
from edgeguard.errors import ParityError

__all__ = ["compare_logits", "export_onnx", "run_onnx", "save_checked"]

BATCH_SIZE = 16


def export_onnx(
    weights: Weights,
    config: StudentConfig,
    path: str | Path,
    reference_logits: NDArray[np.floating[Any]],
    sample_ids: NDArray[np.int64],
    sample_mask: NDArray[np.int64],
    *,
    tolerance: float,
    labels: Sequence[str] = (),
) -> dict[str, float]:
    """Build the INT4 graph, check it and save it as ``path``.

    ``weights``, ``config``, ``labels``: see :func:`build_guard_graph`. ``sample_ids``, ``sample_mask``: [n, length],
    padding on the right. ``reference_logits``: [n, K] of the torch model with the same (dequantized) INT4 weights.
    ``tolerance``: the largest difference accepted, in logits.

    Returns ``max_abs_diff``, ``mean_abs_diff`` (logits) and ``n`` (rows). Raises ParityError when a difference is
    larger, or a logit not finite: then nothing is written, and a file that ``path`` already held is left as it was.
    Raises ValueError for weights or samples of the wrong shape.
    """
    model = build_guard_graph(weights, config, labels=labels).SerializeToString()
    return save_checked(model, path, reference_logits, sample_ids, sample_mask, tolerance=tolerance)


def save_checked(
    model: bytes,
    path: str | Path,
    reference_logits: NDArray[np.floating[Any]],
    sample_ids: NDArray[np.int64],
    sample_mask: NDArray[np.int64],
    *,
    tolerance: float,
) -> dict[str, float]:
    """Save a serialized ONNX model as ``path`` if it reproduces the reference; see :func:`export_onnx`."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    unchecked = path.with_name(f".{path.name}.{os.getpid()}.unchecked")
    try:
        unchecked.write_bytes(model)
        logits = run_onnx(unchecked, sample_ids, sample_mask)
        figures = compare_logits(logits, reference_logits, tolerance=tolerance, name=path.name)
        unchecked.replace(path)
    finally:
        unchecked.unlink(missing_ok=True)
    return figures


def run_onnx(path: str | Path, ids: NDArray[np.int64], mask: NDArray[np.int64]) -> NDArray[np.float32]:
    """Logits [n, K] of the rows ``ids`` and ``mask`` [n, length], in batches, on onnxruntime's CPU provider.

    Raises ValueError when the shapes differ, a row has no token, or its padding is not on the right.
    """
    if ids.shape != mask.shape or ids.ndim != 2 or len(ids) == 0:
        raise ValueError(
            f"expected ids and mask of one shape [n, length] with n above 0, got {ids.shape}, {mask.shape}."
        )
    if not (mask[:, 0] == 1).all() or (np.diff(mask, axis=1) > 0).any():
        raise ValueError("every row of the mask must be ones, at least one, then zeros (padding on the right).")
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    past, batches = past_shapes(session), []
    for start in range(0, len(ids), BATCH_SIZE):
        rows = slice(start, start + BATCH_SIZE)
        longest = int(mask[rows].sum(axis=1).max())
        feeds = {"input_ids": ids[rows, :longest], "attention_mask": mask[rows, :longest]}
        feeds = {name: np.asarray(value, np.int64) for name, value in feeds.items()}
        batches.append(session.run(["logits"], {**feeds, **empty_past(past, len(ids[rows]))})[0])
    return np.concatenate(batches)


def compare_logits(
    logits: NDArray[np.floating[Any]], reference: NDArray[np.floating[Any]], *, tolerance: float, name: str
) -> dict[str, float]:
    """Compare two arrays [n, K] value by value: ``max_abs_diff``, ``mean_abs_diff`` and ``n``.

    Raises ParityError that says which row and label of ``name`` differs by more than ``tolerance``, or is not finite;
    ValueError when the shapes differ.
    """
    if logits.shape != reference.shape:
        raise ValueError(f"{name} gives logits {logits.shape}, the reference has {reference.shape}.")
    difference = np.abs(np.asarray(logits, np.float64) - np.asarray(reference, np.float64))
    worst = np.where(np.isfinite(difference), difference, np.inf)
    row, label = (int(i) for i in np.unravel_index(worst.argmax(), worst.shape))
    if not worst[row, label] <= tolerance:
        raise ParityError(
            f"{name} does not reproduce the model: row {row}, label {label} is {float(logits[row, label]):.4f} where "
            f"the model gives {float(reference[row, label]):.4f}, a difference of {worst[row, label]:.4g} above the "
            f"tolerance of {tolerance:g}. Check that the reference ran with the same INT4 weights."
        )
    return {"max_abs_diff": float(worst.max()), "mean_abs_diff": float(difference.mean()), "n": len(difference)}
