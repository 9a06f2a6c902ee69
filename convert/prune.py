"""Structured pruning of a student: whole layers, and neurons of the MLPs; both by what the training mix shows.

- Depth: a layer's block importance is the mean of 1 - cosine(its input, its output) over all tokens; the least
  important layers go (arXiv 2403.03853).
- Width: a neuron's importance is the L2 norm over rows of its mean activation magnitude over a row's tokens; every
  layer keeps its most important ones (arXiv 2407.14679, section 2.2).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from convert.batches import Batch
from convert.student import Student

__all__ = ["block_importance", "keep_layers", "keep_neurons", "neuron_importance"]


@torch.inference_mode()
def block_importance(student: Student, batches: Sequence[Batch]) -> Tensor:
    """Importance float64 [layers] of every layer, from 0 (does nothing) to 2."""
    totals = torch.zeros(len(student.model.layers), dtype=torch.float64)
    tokens = 0
    for batch in batches:
        states = student.model(
            input_ids=batch.ids, attention_mask=batch.mask, output_hidden_states=True
        ).hidden_states
        # The last of them stands after the final norm: the last layer's own output is taken before it.
        outputs = [*states[1:-1], _last_output(student, batch)]
        real = batch.mask.bool()
        for layer, (before, after) in enumerate(zip(states[:-1], outputs, strict=True)):
            cosine = nn.functional.cosine_similarity(before[real].double(), after[real].double(), dim=-1)
            totals[layer] += (1 - cosine).sum()
        tokens += int(real.sum())
    return totals / tokens


def _last_output(student: Student, batch: Batch) -> Tensor:
    """The residual stream after the last layer, before the final norm."""
    seen: list[Tensor] = []
    hook = student.model.norm.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    try:
        student.model(input_ids=batch.ids, attention_mask=batch.mask)
    finally:
        hook.remove()
    return seen[0]


@torch.inference_mode()
def neuron_importance(student: Student, batches: Sequence[Batch]) -> Tensor:
    """Importance float64 [layers, neurons] of every MLP neuron."""
    layers = student.model.layers
    totals = torch.zeros(len(layers), layers[0].mlp.down_proj.in_features, dtype=torch.float64)
    mask = torch.zeros(0)

    def hook(layer: int) -> object:
        def collect(_: nn.Module, inputs: tuple[Tensor]) -> None:
            magnitude = inputs[0].abs().double() * mask
            totals[layer] += (magnitude.sum(1) / mask.sum(1)).pow(2).sum(0)

        return layers[layer].mlp.down_proj.register_forward_pre_hook(collect)

    hooks = [hook(layer) for layer in range(len(layers))]
    try:
        for batch in batches:
            mask = batch.mask[..., None].double()
            student.model(input_ids=batch.ids, attention_mask=batch.mask)
    finally:
        for handle in hooks:
            handle.remove()  # type: ignore[attr-defined]
    return totals.sqrt()


def keep_layers(student: Student, kept: Sequence[int]) -> Student:
    """Drop every layer that ``kept`` does not name, in place; the order stays. Raises ValueError for none or unknown."""
    layers = student.model.layers
    if not kept or not set(kept) <= set(range(len(layers))):
        raise ValueError(f"expected some of the layers 0 to {len(layers) - 1}, got {list(kept)}.")
    student.model.layers = nn.ModuleList(layers[i] for i in sorted(set(kept)))
    for index, layer in enumerate(student.model.layers):
        layer.self_attn.layer_idx = index  # where its keys and values stand in a cache
    student.model.config.num_hidden_layers = len(student.model.layers)
    return student


def keep_neurons(student: Student, importance: Tensor, count: int) -> Student:
    """Keep the ``count`` most important MLP neurons of every layer, in place; their order stays.

    ``importance``: [layers, neurons]. Raises ValueError when ``count`` is no multiple of 32 (the INT4 groups run along
    the neurons) or more than there are.
    """
    neurons = importance.shape[1]
    if count % 32 or not 0 < count <= neurons:
        raise ValueError(f"expected a multiple of 32 up to {neurons} neurons, got {count}.")
    for layer, scores in zip(student.model.layers, importance, strict=True):
        chosen = scores.topk(count).indices.sort().values
        mlp = layer.mlp
        for name in ("gate_proj", "up_proj", "down_proj"):
            linear = getattr(mlp, name)
            weight = linear.weight.data
            linear.weight = nn.Parameter((weight[:, chosen] if name == "down_proj" else weight[chosen]).clone())
            linear.out_features, linear.in_features = linear.weight.shape
        mlp.intermediate_size = count
    student.model.config.intermediate_size = count
    return student
