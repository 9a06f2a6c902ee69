"""Quantization-aware training on the shipping grid: fake quantization with straight-through gradients (torch).

Weights go through the INT4 grid of :mod:`convert.quantize`, value for value (fp16 scales included), activations through
INT8 with one scale a token; both gradients pass straight through, as in Bengio et al. 2013 (arXiv 1308.3432). An
activation is divided by its own row's largest magnitude, so nothing is clipped and no gradient is masked. What
``down_proj`` reads is turned while it is rounded, as :mod:`edgeguard.engines.int8` does.

Cost decides the shape of this file, since it runs in every step: a weight is rounded in float32 in slices that stay in
the processor's cache and is written once, in the type that autocast wants; the projections that read the same input
share its quantization; the embedding quantizes only the rows that a batch looks up.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from convert.quantize import GROUP_SIZE
from convert.smoothing import row_of
from edgeguard.engines.int8 import TURNED_BLOCK, hadamard

__all__ = [
    "QatEmbedding",
    "QatLinear",
    "SharedActivation",
    "bake_int4",
    "disable_qat",
    "enable_qat",
    "fake_quant_activation",
    "fake_quant_weight",
]

SLICE_ELEMENTS = 1 << 19  # 2 MiB of float32: temporaries stay in the cache, and the threads meet rarely
INT8_MAX = 127.0
# Projections of one Llama layer that read the same tensor: their input is quantized once.
SIBLINGS = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))


def fake_quant_weight(weight: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """Round a weight to the values of ``quantize_int4(weight).dequantize()``, straight through.

    ``weight``: [..., K], K a multiple of 32. Returns the same shape in float32, or in ``dtype`` (rounded as autocast
    would). The gradient of the result is the gradient of ``weight``. Raises ValueError for another K.
    """
    if weight.shape[-1] % GROUP_SIZE:
        raise ValueError(f"the last axis must be a multiple of {GROUP_SIZE}, got {tuple(weight.shape)}.")
    return _apply(weight, _round_int4, GROUP_SIZE, dtype or torch.float32)


def fake_quant_activation(x: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """INT8 values of ``x`` [..., K], symmetric with one scale a row: largest magnitude / 127; straight through.

    Returns the same shape in the type of ``x``, or in ``dtype``. Rounds halves to even.
    """
    return _apply(x, _round_int8, x.shape[-1], dtype or x.dtype)


class SharedActivation:
    """Fake quantization of one input for all linears that read it: computed for the first, kept for the others."""

    def __init__(self, shift: Tensor | None = None, *, turned: bool = False) -> None:
        """Nothing is kept yet.

        ``shift``: [K], the input is divided by two to it while it is rounded; ``turned``: blocks of 16 are turned then.
        """
        self._factor = None if shift is None else torch.exp2(shift.float())
        self._turned = turned
        self._key: tuple[Any, ...] | None = None
        self._result: Tensor | None = None

    def __call__(self, x: Tensor, dtype: torch.dtype) -> Tensor:
        """``fake_quant_activation(x, dtype)``; the same object again for the same, unchanged ``x``."""
        source = self._key[0]() if self._key else None
        key = (None if x.is_inference() else x._version, dtype, torch.is_grad_enabled())
        if source is not x or self._key is None or self._key[1:] != key or self._result is None:
            if self._turned:
                self._result = (_turn(fake_quant_activation(_turn(x.float()))) / TURNED_BLOCK).to(dtype)
            elif self._factor is None:
                self._result = fake_quant_activation(x, dtype)
            else:  # powers of two: exact in every type
                factor = self._factor.to(x.device, x.dtype)
                self._result = fake_quant_activation(x / factor, dtype) * factor.to(dtype)
            self._key = (weakref.ref(x), *key)
        return self._result

    def clear(self) -> None:
        """Let go of the result, so that it lives no longer than the graph that needs it."""
        self._key = self._result = None


class QatLinear(nn.Linear):
    """A linear layer whose weight is INT4 and whose input is INT8 in the forward pass; trained as float32.

    It shares the parameters of the layer that it stands for: optimizers and ``state_dict`` names stay as they were.
    """

    def __init__(self, linear: nn.Linear, shared: SharedActivation | None, *, last: bool) -> None:
        """``shared``: quantizes the input (None: left as it is); ``last``: no later layer reads that input."""
        super().__init__(linear.in_features, linear.out_features, linear.bias is not None, device="meta")
        self.weight, self.bias = linear.weight, linear.bias
        self._shared, self._last = shared, last

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002 - the name nn.Linear uses
        """``input`` [..., in_features] -> [..., out_features]."""
        device = input.device.type
        dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else input.dtype
        x = input
        if self._shared is not None:
            x = self._shared(input, dtype)
            if self._last:
                self._shared.clear()
        return nn.functional.linear(x, fake_quant_weight(self.weight, dtype), self.bias)


class QatEmbedding(nn.Embedding):
    """An embedding whose rows are INT4 in the forward pass; only the rows looked up are rounded."""

    def __init__(self, embedding: nn.Embedding) -> None:
        """Share the weight of ``embedding``."""
        rows, width = embedding.weight.shape
        super().__init__(rows, width, embedding.padding_idx, device="meta")
        self.weight = embedding.weight

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002 - the name nn.Embedding uses
        """``input`` int64 [...] -> float32 [..., width]."""
        return fake_quant_weight(super().forward(input))


def enable_qat(
    model: nn.Module, *, activations: bool = True, shifts: Mapping[str, np.ndarray] | None = None
) -> nn.Module:
    """Switch every nn.Linear and nn.Embedding of ``model`` (a transformers LlamaModel) to fake quantization, in place.

    The parameters stay the same objects. ``activations=False``: weights only. ``shifts``: how the rows that the linears
    read are smoothed (see :mod:`convert.smoothing`). A layer already switched is left alone.
    Returns ``model``. Raises ValueError, before any change, when a width is not a multiple of 32.
    """
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear | nn.Embedding) and module.weight.shape[1] % GROUP_SIZE:
            raise ValueError(f"{name}: its width {module.weight.shape[1]} is not a multiple of {GROUP_SIZE}.")
    for path, parent in list(model.named_modules()):
        children = dict(parent.named_children())
        for name, child in children.items():
            if type(child) is nn.Embedding:
                setattr(parent, name, QatEmbedding(child))
        for group in _groups([name for name, child in children.items() if type(child) is nn.Linear]):
            shift = (shifts or {}).get(row_of(f"{path}.{group[0]}"))
            exponents = None if shift is None else torch.from_numpy(shift)
            shared = SharedActivation(exponents, turned=group == ["down_proj"]) if activations else None
            for name in group:
                setattr(parent, name, QatLinear(children[name], shared, last=name == group[-1]))
    return model


def disable_qat(model: nn.Module) -> nn.Module:
    """Undo :func:`enable_qat`: plain layers again with the same (float32) parameters. Returns ``model``."""
    for parent in list(model.modules()):
        for name, child in parent.named_children():
            if isinstance(child, QatLinear | QatEmbedding):
                plain: nn.Linear | nn.Embedding
                rows, width = child.weight.shape
                if isinstance(child, QatLinear):
                    plain = nn.Linear(width, rows, child.bias is not None, device="meta")
                    plain.bias = child.bias
                else:
                    plain = nn.Embedding(rows, width, child.padding_idx, device="meta")
                plain.weight = child.weight
                setattr(parent, name, plain)
    return model


@torch.no_grad()
def bake_int4(model: nn.Module) -> nn.Module:
    """Replace the weights of every linear and embedding of ``model`` by their INT4 values, in place; returns ``model``.

    For a reference that an export is compared with: the float32 model of the shipped weights.
    """
    for module in model.modules():
        if isinstance(module, nn.Linear | nn.Embedding):
            module.weight.copy_(fake_quant_weight(module.weight))
    return model


def _groups(names: list[str]) -> list[list[str]]:
    """Split the linears of one module into lists that read the same input."""
    groups = [[name for name in siblings if name in names] for siblings in SIBLINGS]
    known = {name for siblings in SIBLINGS for name in siblings}
    return [group for group in groups if group] + [[name] for name in names if name not in known]


def _turn(x: Tensor) -> Tensor:
    """Blocks of 16 of the last axis times a Hadamard matrix: sixteen times ``x`` when done twice."""
    with torch.autocast(x.device.type, enabled=False):
        matrix = torch.from_numpy(hadamard()).to(x.device)
        return (x.reshape(*x.shape[:-1], -1, TURNED_BLOCK) @ matrix).reshape(x.shape)


Rounding = Callable[[Tensor, Tensor], None]


class _StraightThrough(torch.autograd.Function):
    """Forward: ``rounding``. Backward: the identity."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, rounding: Rounding, group: int, dtype: torch.dtype) -> Tensor:  # noqa: ANN401
        ctx.dtype = x.dtype
        rows = x.detach().reshape(-1, group)
        out = torch.empty(rows.shape, dtype=dtype, device=x.device)
        size = max(1, SLICE_ELEMENTS // group)
        for source, target in zip(torch.split(rows, size), torch.split(out, size), strict=True):
            rounding(source.float(), target)
        return out.view(x.shape)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None, None]:  # noqa: ANN401
        return grads[0].to(ctx.dtype), None, None, None


def _apply(x: Tensor, rounding: Rounding, group: int, dtype: torch.dtype) -> Tensor:
    result: Tensor = _StraightThrough.apply(x, rounding, group, dtype)  # type: ignore[no-untyped-call]
    return result


def _round_int4(x: Tensor, out: Tensor) -> None:
    """``x`` float32 [G, 32] -> the INT4 values of each row in ``out``. Step by step as in ``quantize_int4``."""
    high, low = x.amax(-1, keepdim=True), x.amin(-1, keepdim=True)
    largest = torch.where(high > -low, high, low)
    if bool(
        (high == -low).any()
    ):  # +a and -a: the first one decides the sign, as argmax does; rare, and argmax is slow
        largest = x.gather(-1, x.abs().argmax(-1, keepdim=True))
    step = largest / -8
    inverse = step.reciprocal().nan_to_num_(nan=0.0, posinf=0.0, neginf=0.0)
    # Never below 0.5 here, so floor is trunc; torch's trunc takes eight times as long.
    q = torch.mul(x, inverse).add_(8.5).floor_().clamp_(max=15).sub_(8)
    out.copy_(q.mul_(step.half().float()))


def _round_int8(x: Tensor, out: Tensor) -> None:
    """``x`` float32 [rows, K] -> the INT8 values of each row in ``out``; a row of zeros stays so."""
    scale = x.abs().amax(-1, keepdim=True).div_(INT8_MAX).clamp_(min=torch.finfo(torch.float32).tiny)
    out.copy_(torch.div(x, scale).round_().mul_(scale))
