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
from torch.utils.hooks import RemovableHandle

from convert.batches import Batch
from convert.student import Student

__all__ = ["block_importance", "keep_layers", "keep_neurons", "neuron_importance"]


@torch.inference_mode()
def block_importance(student: Student, batches: Sequence[Batch]) -> Tensor:
    """Importance float64 [layers] of every layer, from 0 (does nothing) to 2; ``batches`` calibrate it."""
    # What each layer reads, and what the final norm reads: the input of one is the output of the one before.
    readers = [*student.model.layers, student.model.norm]
    totals = torch.zeros(len(readers) - 1, dtype=torch.float64)
    tokens = 0
    states: list[Tensor] = []
    hooks = [reader.register_forward_pre_hook(lambda _, inputs: states.append(inputs[0])) for reader in readers]
    try:
        for batch in batches:
            states.clear()
            student.model(input_ids=batch.ids, attention_mask=batch.mask)
            real = batch.mask.bool()
            rows = [state[real].double() for state in states]
            for layer, (before, after) in enumerate(zip(rows[:-1], rows[1:], strict=True)):
                totals[layer] += (1 - nn.functional.cosine_similarity(before, after, dim=-1)).sum().cpu()
            tokens += int(real.sum())
    finally:
        for hook in hooks:
            hook.remove()
    return totals / tokens


@torch.inference_mode()
def neuron_importance(student: Student, batches: Sequence[Batch]) -> Tensor:
    """Importance float64 [layers, neurons] of every MLP neuron; ``batches`` calibrate it."""
    layers = student.model.layers
    totals = torch.zeros(len(layers), layers[0].mlp.down_proj.in_features, dtype=torch.float64)
    mask = torch.zeros(0)

    def hook(layer: int) -> RemovableHandle:
        def collect(_: nn.Module, inputs: tuple[Tensor]) -> None:
            magnitude = inputs[0].abs().double() * mask
            totals[layer] += (magnitude.sum(1) / mask.sum(1)).pow(2).sum(0).cpu()

        handle: RemovableHandle = layers[layer].mlp.down_proj.register_forward_pre_hook(collect)
        return handle

    hooks = [hook(layer) for layer in range(len(layers))]
    try:
        for batch in batches:
            mask = batch.mask[..., None].double()
            student.model(input_ids=batch.ids, attention_mask=batch.mask)
    finally:
        for handle in hooks:
            handle.remove()
    return totals.sqrt()


def keep_layers(student: Student, kept: Sequence[int]) -> Student:
    """Drop every layer that ``kept`` does not name, in place; the order stays.

    Raises ValueError for none or unknown ones.
    """
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
