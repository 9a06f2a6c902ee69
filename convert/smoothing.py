"""Moving outliers from activations, where INT8 rounds them away, into weights, where a channel's own scale bears them.

A column of a matrix is multiplied by s, what it reads is divided by s: the product is the same, and both sides round
better. s = max|x|^a / max|w|^(1 - a) of the column, over a sample of real rows (SmoothQuant, arXiv 2211.10438), here as
a power of two, so that nothing is rounded by the move itself. The division costs nothing at run time: it goes into the
norm's weights, or into the rows of the matrix before.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING

import numpy as np
import torch
from numpy.typing import NDArray

from convert.export.onnx_graph import Weights
from convert.quantize import as_int4

if TYPE_CHECKING:
    from convert.batches import Batch
    from convert.student import Student

__all__ = ["input_magnitudes", "row_of", "smoothing_shifts"]

# What reads one and the same row: the norm's output before attention and before the MLP, and the gated product.
READERS = {
    "attention": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    "mlp": ("mlp.gate_proj", "mlp.up_proj"),
    "down": ("mlp.down_proj",),
}
# The norm that writes such a row.
WRITERS = {"attention": "input_layernorm", "mlp": "post_attention_layernorm"}
STRENGTH = 0.65  # a
LEAST = 1e-5
LARGEST_SHIFT = 8  # of a column against the mean of its matrix


def input_magnitudes(student: Student, batches: Iterable[Batch]) -> dict[str, NDArray[np.float32]]:
    """The largest magnitude of each input channel, float32 [K], of every ``layers.I.KIND`` (see ``READERS``)."""
    found: dict[str, torch.Tensor] = {}

    def keep(name: str, x: torch.Tensor, mask: torch.Tensor) -> None:
        largest = x.detach()[mask.bool()].abs().amax(0).float()
        found[name] = torch.maximum(found[name], largest) if name in found else largest

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
    return {name: largest.cpu().numpy() for name, largest in found.items()}


def smoothing_shifts(magnitudes: Mapping[str, NDArray[np.float32]], weights: Weights) -> dict[str, NDArray[np.int8]]:
    """Exponents int8 [K] of two, by ``layers.I.KIND``: what each column is multiplied by."""
    shifts = {}
    for name, activations in magnitudes.items():
        _, index, kind = name.split(".")
        columns = [as_int4(weights[f"model.layers.{index}.{reader}.weight"]).dequantize() for reader in READERS[kind]]
        largest = np.max([np.abs(values).max(axis=0) for values in columns], axis=0)
        wanted = STRENGTH * np.log2(np.maximum(activations, LEAST)) - (1 - STRENGTH) * np.log2(
            np.maximum(largest, LEAST)
        )
        shift = np.rint(wanted - wanted.mean())
        shifts[name] = shift.clip(-LARGEST_SHIFT, LARGEST_SHIFT).astype(np.int8)
    return shifts


def row_of(name: str) -> str:
    """The row ``layers.I.KIND`` that a matrix reads or a norm writes; empty for any other weight.

    ``name``: as in a state dict, with or without ``model.`` before and ``.weight`` behind it.
    """
    parts = name.removeprefix("model.").removesuffix(".weight").split(".")
    for kind, readers in READERS.items():
        if parts[0] == "layers" and ".".join(parts[2:]) in (*readers, WRITERS.get(kind)):
            return f"layers.{parts[1]}.{kind}"
    return ""
