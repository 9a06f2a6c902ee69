"""Error-compensating rounding to the INT4 grid: GPTQ (Frantar et al. 2022, arXiv 2210.17323), in torch.

A linear's columns are rounded one after the other, and what a column loses on the calibration rows is made up for by
the columns that are still to come. Layers go in order, and each sees the inputs that the rounded layers before it give.
Nothing is trained: a few hundred rows and minutes do.

Own code, since no library yields integers on this grid here: gptqmodel 7.7 (and optimum, which wraps it) asks for torch
2.14 and transformers 5.20, llm-compressor for a torch before 2.11 or transformers 5; torchao 0.18 asserts CUDA;
neural-compressor 3.10 (from Python 3.11 on) and onnxruntime's matmul_nbits_quantizer count padding and compensate for
float32 scales, and the latter rounds the compensated values once more with other scales.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import click
import torch
from torch import Tensor, nn

from convert.batches import Batch
from convert.quantize import GROUP_SIZE, Int4Weight, quantize_int4
from convert.student import Student
from edgeguard.engines.int4_weights import Weights, as_float32
from edgeguard.errors import EdgeguardError

__all__ = ["GptqError", "gptq", "load_weights"]

EMBEDDING = "model.embed_tokens.weight"
# The linears of a Llama layer in the order of its forward pass; those that read the same input share a Hessian.
STAGES = (
    ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    ("self_attn.o_proj",),
    ("mlp.gate_proj", "mlp.up_proj"),
    ("mlp.down_proj",),
)


class GptqError(EdgeguardError):
    """A student or calibration rows that cannot be rounded with compensation."""


@dataclass
class _Call:
    """A layer's call for one batch: ``states`` [B, L, hidden] and the rest; ``real`` bool [B, L]: false for padding."""

    states: Tensor
    rest: dict[str, Any]
    real: Tensor


class _Reached(Exception):
    """Ends a forward pass at the module whose inputs were wanted."""

    def __init__(self, states: Tensor, rest: dict[str, Any]) -> None:
        super().__init__()
        self.states, self.rest = states, rest


@torch.no_grad()
def gptq(student: Student, batches: Sequence[Batch], damping: float = 0.01) -> dict[str, Int4Weight]:
    """Round every linear of ``student``'s layers with compensation, and its embedding to nearest.

    ``batches``: calibration rows, a few hundred of the kind that the student will read; their padding does not count.
    ``damping``: added to the Hessian's diagonal, as a share of its mean. Returns weights under their names in
    ``student.numpy_weights()``; norms and head are not among them. The student keeps its own weights. Progress on
    stderr.

    The values are on the grid, but not where ``quantize_int4`` would put them: hand the integers to an exporter
    (``student.numpy_weights() | gptq(...)``) and never round the values again.

    Raises GptqError without batches, for a damping that is not positive, for a student in quantization-aware training,
    and for activations that are not finite; QuantizeError for weights that the grid cannot hold.
    """
    if not batches or not damping > 0:
        raise GptqError(f"GPTQ needs calibration batches and a positive damping, got {len(batches)} and {damping}.")
    _check_plain(student)
    student.eval()
    embedding = student.get_parameter(EMBEDDING)
    result = {EMBEDDING: quantize_int4(embedding.float().cpu().numpy())}
    with _restored([embedding]):
        load_weights(student, result)
        calls = _first_calls(student, batches)
    layers = student.model.layers
    for number, layer in enumerate(layers):
        with _restored(list(layer.parameters())):
            for names in STAGES:
                linears = [layer.get_submodule(name) for name in names]
                hessian = _hessian(layer, linears[0], calls)
                inverse = _inverse_factor(hessian, damping, f"layer {number}, {names[0]}")
                rounded = _round_columns(torch.cat([linear.weight for linear in linears]), inverse)
                weights = _split(rounded, [linear.out_features for linear in linears])
                named = {f"model.layers.{number}.{n}.weight": w for n, w in zip(names, weights, strict=True)}
                load_weights(student, named)
                result |= named
            for call in calls:
                call.states = layer(call.states, **call.rest)
        click.echo(f"gptq: layer {number + 1} of {len(layers)}", err=True)
    return result


@torch.no_grad()
def load_weights(student: Student, weights: Weights) -> Student:
    """Put the values of ``weights`` into ``student`` in place, to run it in torch as it will ship; returns it.

    Raises ValueError, before any change, for a name or a shape that the student does not have.
    """
    parameters = dict(student.named_parameters())
    for name, weight in weights.items():
        if name not in parameters or tuple(parameters[name].shape) != weight.shape:
            found = tuple(parameters[name].shape) if name in parameters else "no such weight"
            raise ValueError(f"{name}: the weight to load is {weight.shape}, the student has {found}.")
    for name, weight in weights.items():
        parameters[name].copy_(torch.from_numpy(as_float32(weight)))
    return student


def _check_plain(student: Student) -> None:
    """Refuse layers that would round the rounded values again."""
    for name, module in student.model.named_modules():
        if isinstance(module, nn.Linear | nn.Embedding) and type(module) not in (nn.Linear, nn.Embedding):
            raise GptqError(f"{name} is a {type(module).__name__}: GPTQ takes a plain student; call disable_qat first.")


@contextmanager
def _restored(parameters: Sequence[Tensor]) -> Iterator[None]:
    """Give ``parameters`` their values back at the end."""
    before = [parameter.clone() for parameter in parameters]
    try:
        yield
    finally:
        for parameter, value in zip(parameters, before, strict=True):
            parameter.copy_(value)


def _reach(module: nn.Module, run: Callable[[], object]) -> _Reached:
    """What ``module`` is called with in the forward pass ``run``, which ends there."""

    def stop(_: nn.Module, args: tuple[Tensor, ...], rest: dict[str, Any]) -> None:
        raise _Reached(args[0], rest)

    hook = module.register_forward_pre_hook(stop, with_kwargs=True)
    try:
        run()
    except _Reached as reached:
        return reached
    finally:
        hook.remove()
    raise GptqError(f"the forward pass does not use {type(module).__name__}: GPTQ takes a student with a Llama body.")


def _first_calls(student: Student, batches: Sequence[Batch]) -> list[_Call]:
    """What the first layer is called with; transformers makes masks and positions."""
    body, calls = student.model, []
    for batch in (batch.to(body.embed_tokens.weight.device) for batch in batches):
        run = partial(body, input_ids=batch.ids, attention_mask=batch.mask, use_cache=False)
        reached = _reach(body.layers[0], run)
        calls.append(_Call(reached.states, reached.rest, batch.mask.bool()))
    return calls


def _hessian(layer: nn.Module, linear: nn.Linear, calls: Sequence[_Call]) -> Tensor:
    """2 X^T X float32 [K, K] of the inputs X [tokens, K] that ``linear`` of ``layer`` sees."""
    hessian = torch.zeros(linear.in_features, linear.in_features, device=linear.weight.device)
    for call in calls:
        x = _reach(linear, partial(layer, call.states, **call.rest)).states[call.real].float()
        hessian.addmm_(x.T, x, alpha=2)
    return hessian


def _inverse_factor(hessian: Tensor, damping: float, where: str) -> Tensor:
    """The upper triangular U [K, K] with U^T U = (H + damping)^-1; changes ``hessian``.

    From H = R R^T with R upper triangular (the Cholesky factor of H read backwards), U is R^-1: the inverse of H
    itself, which float32 would hurt, is never made. A channel that is always zero has nothing but the damping on its
    diagonal, so it is rounded to nearest and moves no other.
    """
    mean = hessian.diagonal().mean()
    hessian.diagonal().add_(damping * mean if mean > 0 else torch.ones_like(mean))
    factor, failed = torch.linalg.cholesky_ex(hessian.flip(0, 1))
    if failed or not torch.isfinite(mean):
        raise GptqError(f"{where}: the inputs have no usable Hessian (mean {mean:.3g}). Raise damping above {damping}.")
    identity = torch.eye(len(hessian), device=hessian.device)
    inverse: Tensor = torch.linalg.solve_triangular(factor.flip(0, 1), identity, upper=True)
    return inverse


def _round_columns(weight: Tensor, inverse: Tensor) -> Int4Weight:
    """Round ``weight`` [N, K] column by column; ``inverse``: of :func:`_inverse_factor`.

    A group's scales are those of ``quantize_int4``, of the group as it is when its turn comes (the best of 26 scales by
    weighted error moved the margins of edgeguard-mini further: 0.52 against 0.48). Its errors reach the later groups in
    one product.
    """
    columns = weight.float().T.contiguous()
    nibbles, scales = torch.empty_like(columns, dtype=torch.uint8), []
    for start in range(0, len(columns), GROUP_SIZE):
        end = start + GROUP_SIZE
        group, triangle = columns[start:end], inverse[start:end, start:end]
        scales.append(torch.from_numpy(quantize_int4(group.T.cpu().numpy()).scales[:, 0]))
        scale = scales[-1].to(group.device).float()
        per_step = torch.where(scale == 0, scale, scale.reciprocal())
        errors = torch.empty_like(group)
        for i, column in enumerate(group):
            nibble = torch.floor(column * per_step + 8.5).clamp_(0, 15)
            nibbles[start + i] = nibble
            errors[i] = (column - (nibble - 8) * scale) / triangle[i, i]
            group[i + 1 :].addr_(triangle[i, i + 1 :], errors[i], alpha=-1)
        columns[end:].addmm_(inverse[start:end, end:].T, errors, alpha=-1)
    return Int4Weight(nibbles.T.contiguous().cpu().numpy(), torch.stack(scales, 1).numpy())


def _split(weight: Int4Weight, rows: Sequence[int]) -> list[Int4Weight]:
    """Undo ``Int4Weight.stack``: ``weight`` cut into parts of so many ``rows``."""
    ends = [sum(rows[: i + 1]) for i in range(len(rows))]
    parts = [slice(end - count, end) for end, count in zip(ends, rows, strict=True)]
    return [Int4Weight(weight.nibbles[part], weight.scales[part]) for part in parts]
