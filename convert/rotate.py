"""Turning the residual stream before rounding, so that no channel stands out: the first rotation of QuaRot.

A Llama's layers read the stream x through an RMSNorm and add to it. Without its weights an RMSNorm gives the same row
turned when it is given a turned row, since an orthogonal R keeps lengths: norm(xR) = norm(x)R. So the norms' weights go
into the matrices that read them, whatever writes to the stream is multiplied by R, whatever reads it by R's transpose,
and the student answers as before. Nothing is left to do at run time, and every container holds the result.

Source: Ashkboos et al. 2024, arXiv 2404.00456.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from convert.student import Student
from edgeguard.engines.int8 import hadamard

__all__ = ["rotate_residual", "rotation"]

# What reads each norm of a layer, and what writes to the stream.
READERS = {
    "input_layernorm": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    "post_attention_layernorm": ("mlp.gate_proj", "mlp.up_proj"),
}
WRITERS = ("self_attn.o_proj", "mlp.down_proj")


@torch.no_grad()
def rotate_residual(student: Student, seed: int = 0) -> Student:
    """Turn the residual stream of ``student`` (a Llama without biases in its layers) by :func:`rotation`, in place.

    Its logits stay what they were up to the rounding of float32; its norms' weights are 1 afterwards. Returns it.
    """
    turn = rotation(student.model.config.hidden_size, seed).to(student.head.weight.device)
    for norm, readers in _norms(len(student.model.layers)):
        scale = student.get_parameter(f"{norm}.weight")
        for reader in readers:
            weight = student.get_parameter(f"{reader}.weight")
            weight.copy_((weight * scale).double() @ turn)
        scale.fill_(1)
    for number in range(len(student.model.layers)):
        for name in WRITERS:
            weight = student.get_parameter(f"model.layers.{number}.{name}.weight")
            weight.copy_(turn.T @ weight.double())
    embedding = student.get_parameter("model.embed_tokens.weight")
    embedding.copy_(embedding.double() @ turn)
    return student


def rotation(width: int, seed: int) -> Tensor:
    """An orthogonal matrix float64 [width, width], each entry of which mixes many channels; the same for the same seed.

    The Kronecker product of a random orthogonal matrix, as large as the odd factor of ``width``, with the Hadamard
    matrix of the power of two that is left; its rows' signs are random.
    """
    generator = torch.Generator().manual_seed(seed)
    power = width & -width
    odd = torch.empty(width // power, width // power, dtype=torch.float64)
    torch.nn.init.orthogonal_(odd, generator=generator)
    signs = torch.randint(0, 2, (width, 1), generator=generator) * 2 - 1
    turn: Tensor = torch.kron(odd.contiguous(), torch.tensor(hadamard(power)).double()) * power**-0.5 * signs
    return turn


def _norms(layers: int) -> Iterator[tuple[str, list[str]]]:
    """Every norm that reads the stream, and the matrices that read the norm."""
    for number in range(layers):
        for norm, readers in READERS.items():
            yield f"model.layers.{number}.{norm}", [f"model.layers.{number}.{name}" for name in readers]
    yield "model.norm", ["head"]
