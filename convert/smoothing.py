"""Moving outliers from activations, where INT8 rounds them away, into weights, where a channel's own scale bears them.

A column of a matrix is multiplied by s, what it reads is divided by s: the product is the same, and both sides round
better. s = max|x|^a / max|w|^(1 - a) of the column, over a sample of real rows (SmoothQuant, arXiv 2211.10438), here as
a power of two, so that nothing is rounded by the move itself. The division costs nothing at run time: it goes into the
weights of the norm before. What ``down_proj`` reads comes from no norm, and is turned instead
(:mod:`edgeguard.engines.int8`).

How much to move differs: a matrix whose large columns end in few outputs takes what one that spreads them over all
outputs does not. So each row's strength a is the one that rounds its products best on a sample, or none at all.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

import numpy as np
import torch
from numpy.typing import NDArray

from convert.export.onnx_graph import Weights
from convert.quantize import as_int4

if TYPE_CHECKING:
    from convert.batches import Batch
    from convert.student import Student

__all__ = ["Inputs", "inputs_of", "row_of", "smoothing_shifts"]

# What reads one and the same row: the norm's output before attention and before the MLP.
READERS = {
    "attention": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    "mlp": ("mlp.gate_proj", "mlp.up_proj"),
}
# The norm that writes such a row.
WRITERS = {"attention": "input_layernorm", "mlp": "post_attention_layernorm"}
STRENGTHS = (0.35, 0.5, 0.65, 0.8)  # a
LEAST = 1e-5
LARGEST_SHIFT = 8  # of a column against the mean of its matrix
SAMPLED = 128  # tokens of a batch


@dataclass(frozen=True)
class Inputs:
    """What matrices read: ``largest`` float32 [K], each channel's largest magnitude; ``sample`` float32 [tokens, K]."""

    largest: NDArray[np.float32]
    sample: NDArray[np.float32]


def inputs_of(student: Student, batches: Iterable[Batch]) -> dict[str, Inputs]:
    """What the matrices of every ``layers.I.KIND`` (see ``READERS``) read of ``batches``, padding left out."""
    found: dict[str, list[tuple[torch.Tensor, torch.Tensor]]] = {}

    def keep(name: str, x: torch.Tensor, mask: torch.Tensor) -> None:
        tokens = x.detach()[mask.bool()].float().cpu()
        chosen = torch.linspace(0, len(tokens) - 1, min(len(tokens), SAMPLED)).long()
        found.setdefault(name, []).append((tokens.abs().amax(0), tokens[chosen]))

    student.eval()
    device = next(student.parameters()).device
    for batch in batches:
        batch = batch.to(device)
        hooks = []
        for index, layer in enumerate(student.model.layers):
            for kind, readers in READERS.items():
                hooks.append(
                    layer.get_submodule(readers[0]).register_forward_pre_hook(
                        lambda _, inputs, name=f"layers.{index}.{kind}", mask=batch.mask: keep(name, inputs[0], mask)
                    )
                )
        with torch.inference_mode():
            student(batch.ids, batch.mask)
        for hook in hooks:
            hook.remove()
    return {
        name: Inputs(torch.stack([p[0] for p in parts]).amax(0).numpy(), torch.cat([p[1] for p in parts]).numpy())
        for name, parts in found.items()
    }


def smoothing_shifts(inputs: Mapping[str, Inputs], weights: Weights) -> dict[str, NDArray[np.int8]]:
    """Exponents int8 [K] of two, by ``layers.I.KIND``, that columns are multiplied by; no entry where none is best."""
    shifts = {}
    for name, read in inputs.items():
        _, index, kind = name.split(".")
        readers = [as_int4(weights[f"model.layers.{index}.{reader}.weight"]).dequantize() for reader in READERS[kind]]
        matrix = np.concatenate(readers)
        candidates = [_shift(read.largest, np.abs(matrix).max(axis=0), strength) for strength in STRENGTHS]
        candidates.insert(0, np.zeros_like(candidates[0]))
        chosen = min(candidates, key=partial(_squared_error, read.sample, matrix))
        if chosen.any():
            shifts[name] = chosen
    return shifts


def _shift(activations: NDArray[np.float32], columns: NDArray[np.float32], strength: float) -> NDArray[np.int8]:
    """The exponents that ``strength`` asks for, from the largest magnitude of each channel and of each column."""
    wanted = strength * np.log2(np.maximum(activations, LEAST)) - (1 - strength) * np.log2(np.maximum(columns, LEAST))
    shift: NDArray[np.int8] = np.rint(wanted - wanted.mean()).clip(-LARGEST_SHIFT, LARGEST_SHIFT).astype(np.int8)
    return shift


def _squared_error(rows: NDArray[np.float32], matrix: NDArray[np.float32], shift: NDArray[np.int8]) -> float:
    """Of ``rows @ matrix.T`` when both sides are rounded to INT8 after the move."""
    power = np.ldexp(np.float32(1), shift)
    return float(np.square(_int8(rows / power) @ _int8(matrix * power).T - rows @ matrix.T).sum())


def _int8(values: NDArray[np.float32]) -> NDArray[np.float32]:
    """Values float32 [N, K] rounded to INT8 with one scale a row."""
    scale = np.maximum(np.abs(values).max(axis=1, keepdims=True) / 127, np.finfo(np.float32).tiny)
    rounded: NDArray[np.float32] = np.rint(values / scale) * scale
    return rounded


def row_of(name: str) -> str:
    """The row ``layers.I.KIND`` that a matrix reads or a norm writes; empty for any other weight.

    ``name``: as in a state dict, with or without ``model.`` before and ``.weight`` behind it.
    """
    parts = name.removeprefix("model.").removesuffix(".weight").split(".")
    for kind, readers in READERS.items():
        if parts[0] == "layers" and ".".join(parts[2:]) in (*readers, WRITERS[kind]):
            return f"layers.{parts[1]}.{kind}"
    return ""
