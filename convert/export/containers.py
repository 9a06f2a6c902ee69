"""All containers of a student, from the same INT4 integers; each is accepted only when it reproduces torch."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

import click
import numpy as np

from convert.batches import collate
from convert.distill import score
from convert.export.int8_graph import export_int8
from convert.export.onnx import compare_logits, export_onnx
from convert.fake_quant import bake_int4
from convert.gptq import load_weights
from convert.student import Student
from edgeguard.errors import EdgeguardError, ParityError

if TYPE_CHECKING:
    from convert.batches import Example
    from edgeguard.engines.int4_weights import Int4Weight, Weights

__all__ = ["FILES", "ContainerError", "export_containers"]

FILES = {"onnx": "model.onnx", "gguf": "model.gguf", "standard": "model.standard.onnx"}


class ContainerError(EdgeguardError):
    """A container that needs a package which is not installed."""


def export_containers(
    student: Student,
    samples: Sequence[Example],
    folder: Path,
    *,
    pad_id: int,
    max_tokens: int,
    tokenizer_json: str,
    control_ids: Collection[int],
    about: Mapping[str, str],
    also: Sequence[str],
    tolerance: float,
    shifts: Mapping[str, np.ndarray],
    integers: Mapping[str, Int4Weight] = MappingProxyType({}),
) -> dict[str, dict[str, Any]]:
    """Write ``model.onnx`` and the containers of ``also`` (``gguf``, ``standard``) into ``folder``; rounds ``student``.

    ``integers``: of weights that are on the grid already, by name; the others are rounded to nearest.

    ``samples``: rows whose logits every container must give within ``tolerance`` of torch with the same INT4 weights;
    ``about``: name, version and licence; ``shifts``: how the INT8 graph is smoothed (see :mod:`convert.smoothing`).
    Returns ``n``, ``max_abs_diff`` and ``mean_abs_diff`` (logits) by container; llama.cpp is asked only where
    llama-cpp-python is installed, else its figures are null. Raises ParityError, ContainerError.
    """
    batch = collate(samples, pad_id)
    weights: Weights = {**student.numpy_weights(), **integers}
    config, labels = student.onnx_config(max_tokens), student.labels
    bake_int4(student.model)
    load_weights(student, integers)
    reference = score(student, samples, pad_id, bf16=False)
    checked = (reference, batch.ids.numpy(), batch.mask.numpy())
    click.echo("onnx ...", err=True)
    path = folder / FILES["onnx"]
    figures: dict[str, dict[str, Any]] = {
        "onnx": export_onnx(weights, config, path, *checked, tolerance=tolerance, labels=labels)
    }
    click.echo("int8 ...", err=True)
    figures["int8"] = export_int8(path, *checked, tolerance=tolerance, shifts=shifts)
    if "gguf" in also:
        click.echo("gguf ...", err=True)
        from edgeguard.export.gguf_transcode import onnx_to_gguf

        target = folder / FILES["gguf"]
        onnx_to_gguf(path, target, tokenizer_json, control_ids=control_ids, about=about, labels=labels)
        figures["gguf"] = _compare_gguf(target, samples, reference, tolerance)
    if "standard" in also:
        click.echo("standard ...", err=True)
        figures["standard"] = _export_standard(weights, config, folder / FILES["standard"], checked, tolerance, labels)
    return figures


def _export_standard(
    weights: Any,  # noqa: ANN401 - as numpy_weights gives them
    config: Any,  # noqa: ANN401
    path: Path,
    checked: tuple[np.ndarray, np.ndarray, np.ndarray],
    tolerance: float,
    labels: Sequence[str],
) -> dict[str, Any]:
    from convert.export.standard_onnx import export_standard

    try:
        return export_standard(weights, config, path, *checked, tolerance=tolerance, labels=labels)
    except ImportError as error:
        raise ContainerError(
            f"the standard ONNX needs optimum-onnx ({error}). Install '.[convert]', or do without 'standard'."
        ) from error


def _compare_gguf(path: Path, samples: Sequence[Example], reference: np.ndarray, tolerance: float) -> dict[str, Any]:
    """llama.cpp against torch; a file that differs too much is removed."""
    from convert.export.gguf_run import gguf_logits

    try:
        import llama_cpp  # noqa: F401
    except ImportError:
        click.echo("llama-cpp-python is not installed: the GGUF's integers are checked, its logits are not", err=True)
        return {"n": 0, "max_abs_diff": None, "mean_abs_diff": None}
    try:
        return compare_logits(gguf_logits(path, samples), reference, tolerance=tolerance, name=path.name)
    except ParityError:
        path.unlink()
        raise
