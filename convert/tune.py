"""Training what INT4 leaves free: the scales of rounded weights, the norms and the head, while every integer stays.

The second phase of EfficientQAT (Chen et al. 2024, arXiv 2407.11062), which trains step sizes alone, end to end. A
scale is trained as a relative change of what it was, so that one learning rate suits all of them; it is rounded to fp16
once, at the end (a change of at most 0.05 %).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from convert.gptq import load_weights
from convert.quantize import GROUP_SIZE, Int4Weight, QuantizeError
from convert.student import Student

__all__ = ["free_scales", "tuned_weights"]


class _Scaled(nn.Module):
    """A rounded weight [N, K]: ``steps`` int8 [N, K / 32, 32] from -8 to 7, ``scales`` float32 [N, K / 32] as rounded.

    ``change`` float32 [N, K / 32] is what is trained: a group's scale is ``scales * (1 + change)``.
    """

    steps: Tensor
    scales: Tensor

    def __init__(self, weight: Int4Weight) -> None:
        super().__init__()
        steps = weight.nibbles.astype(np.int8) - np.int8(8)
        self.register_buffer("steps", torch.from_numpy(steps.reshape(*weight.scales.shape, GROUP_SIZE)))
        self.register_buffer("scales", torch.from_numpy(weight.scales.astype(np.float32)))
        self.change = nn.Parameter(torch.zeros_like(self.scales))

    def int4(self) -> Int4Weight:
        """The weight with its trained scales. Raises QuantizeError for a scale that fp16 cannot hold."""
        scales = (self.scales * (1 + self.change)).detach().cpu().numpy().astype(np.float16)
        if not np.isfinite(scales).all():
            raise QuantizeError(
                "a trained scale is not finite in fp16: training diverged. Lower learning_rate of [tune]."
            )
        nibbles = (self.steps.reshape(len(scales), -1) + 8).to(torch.uint8).cpu().numpy()
        return Int4Weight(nibbles, scales)


class _ScaledLinear(_Scaled):
    def forward(self, x: Tensor) -> Tensor:
        """``x`` [..., K] -> [..., N]."""
        weight: Tensor = _Dequantize.apply(self.steps, self.scales * (1 + self.change))  # type: ignore[no-untyped-call]
        return nn.functional.linear(x, weight)


class _ScaledEmbedding(_Scaled):
    def forward(self, ids: Tensor) -> Tensor:
        """``ids`` int64 [...] -> float32 [..., K]."""
        scales = self.scales[ids] * (1 + nn.functional.embedding(ids, self.change))
        rows: Tensor = _Dequantize.apply(self.steps[ids], scales)  # type: ignore[no-untyped-call]
        return rows


class _Dequantize(torch.autograd.Function):
    """``steps`` int8 [..., G, 32] and ``scales`` [..., G] -> float32 [..., G * 32]; only the integers are kept."""

    @staticmethod
    def forward(ctx: Any, steps: Tensor, scales: Tensor) -> Tensor:  # noqa: ANN401
        ctx.save_for_backward(steps)
        return (steps * scales.unsqueeze(-1)).flatten(-2)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[None, Tensor]:  # noqa: ANN401
        (steps,) = ctx.saved_tensors
        return None, (grads[0].view(steps.shape) * steps).sum(-1)


def free_scales(student: Student, weights: Mapping[str, Int4Weight]) -> Student:
    """Put ``weights`` into ``student`` in place with trainable scales, for training; returns it.

    ``weights``: every matrix of the body, under its name in ``student.numpy_weights()``. Integers are kept; norms and
    head stay trainable as they are. :func:`tuned_weights` makes it a plain student again.
    """
    for name, weight in weights.items():
        path, _, child = name.removesuffix(".weight").rpartition(".")
        parent = student.get_submodule(path)
        kind = _ScaledEmbedding if isinstance(getattr(parent, child), nn.Embedding) else _ScaledLinear
        setattr(parent, child, kind(weight))
    return student


def tuned_weights(student: Student) -> tuple[Student, dict[str, Int4Weight]]:
    """A plain student of what :func:`free_scales` made trainable, and its INT4 weights.

    Raises QuantizeError for a scale that fp16 cannot hold.
    """
    weights = {f"{name}.weight": part.int4() for name, part in student.named_modules() if isinstance(part, _Scaled)}
    plain = Student(student.model.config, student.labels)
    plain.load_state_dict(student.state_dict(), strict=False)  # norms and head
    return load_weights(plain, weights), weights
