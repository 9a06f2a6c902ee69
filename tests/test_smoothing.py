"""Smoothing: what is measured, how far columns are moved, and what it brings against an outlier."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="the conversion layer needs edgeguard-runtime[convert]")
pytest.importorskip("transformers", reason="the conversion layer needs edgeguard-runtime[convert]")

from convert import fake_quant  # noqa: E402
from convert.batches import Batch, Example, collate  # noqa: E402
from convert.quantize import quantize_int4  # noqa: E402
from convert.smoke import llama_config  # noqa: E402
from convert.smoothing import Inputs, inputs_of, row_of, smoothing_shifts  # noqa: E402
from convert.student import Student  # noqa: E402
from edgeguard.engines.int8 import hadamard  # noqa: E402


@pytest.fixture(scope="module")
def student() -> Student:
    torch.manual_seed(0)
    return Student(llama_config(90)).eval()


def _batch(*lengths: int) -> Batch:
    rng = np.random.default_rng(0)
    rows = [Example(rng.integers(1, 90, n).tolist(), "prompt", False, (0,) * 14, True, 1.0) for n in lengths]
    return collate(rows, 0)


def test_inputs_are_those_of_real_tokens(student: Student) -> None:
    found = inputs_of(student, [_batch(3, 9), _batch(5)])
    layers = range(student.model.config.num_hidden_layers)
    assert set(found) == {f"layers.{i}.{kind}" for i in layers for kind in ("attention", "mlp")}
    batch = _batch(3, 9)
    seen = []
    hook = student.model.layers[1].mlp.up_proj.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    with torch.inference_mode():
        student(batch.ids, batch.mask)
    hook.remove()
    real = seen[0][batch.mask.bool()].numpy()
    both = found["layers.1.mlp"]
    assert (both.largest >= np.abs(real).max(0)).all() and both.sample.shape == (3 + 9 + 5, 64)
    alone = inputs_of(student, [batch])["layers.1.mlp"]
    assert alone.largest == pytest.approx(np.abs(real).max(0))
    assert alone.sample == pytest.approx(real)
    assert not student.model.layers[0].mlp.gate_proj._forward_pre_hooks


def _reads(outlier: float) -> Inputs:
    x = np.random.default_rng(1).normal(0, 0.5, (50, 64)).astype(np.float32)
    x[:, 7] *= outlier
    return Inputs(np.abs(x).max(0), x)


def _error(read: Inputs, weight: np.ndarray, shift: np.ndarray) -> float:
    power = np.ldexp(np.float32(1), shift)
    rows, columns = read.sample / power, weight * power
    row, column = np.abs(rows).max(1, keepdims=True) / 127, np.abs(columns).max(1, keepdims=True) / 127
    product = (np.rint(rows / row) * row) @ (np.rint(columns / column) * column).T
    return float(np.abs(product - read.sample @ weight.T).mean())


def test_an_outlier_channel_is_moved_into_the_weights(student: Student) -> None:
    weights, read = student.numpy_weights(), _reads(300.0)
    shift = smoothing_shifts({"layers.0.mlp": read}, weights)["layers.0.mlp"]
    assert shift.dtype == np.int8 and shift[7] >= 3 and np.abs(np.delete(shift, 7)).max() <= 2
    weight = quantize_int4(weights["model.layers.0.mlp.gate_proj.weight"]).dequantize()
    assert _error(read, weight, shift) < _error(read, weight, np.zeros(64, np.int8)) / 2


def test_a_move_is_never_worse_than_none(student: Student) -> None:
    """Here every other column is small, and every output reads large and small ones."""
    names = [f"model.layers.0.mlp.{name}_proj.weight" for name in ("gate", "up")]
    rng = np.random.default_rng(2)
    weight = (rng.normal(0, 1, (96, 64)) * np.where(np.arange(64) % 2, 0.02, 1.0)).astype(np.float32)
    read = _reads(1.0)
    shifts = smoothing_shifts({"layers.0.mlp": read}, {**student.numpy_weights(), **dict.fromkeys(names, weight)})
    rounded = quantize_int4(weight).dequantize()
    nothing = np.zeros(64, np.int8)
    assert _error(read, rounded, shifts.get("layers.0.mlp", nothing)) <= _error(read, rounded, nothing)


@pytest.mark.parametrize(
    ("name", "row"),
    [
        ("model.layers.3.self_attn.k_proj.weight", "layers.3.attention"),
        ("model.layers.3.input_layernorm.weight", "layers.3.attention"),
        ("layers.12.mlp.up_proj", "layers.12.mlp"),
        ("model.layers.0.post_attention_layernorm.weight", "layers.0.mlp"),
        ("model.layers.0.mlp.down_proj.weight", ""),
        ("model.layers.0.self_attn.o_proj.weight", ""),
        ("model.norm.weight", ""),
        ("head.weight", ""),
    ],
)
def test_rows_by_the_names_of_weights(name: str, row: str) -> None:
    assert row_of(name) == row


def _mlp(**linears: Any) -> Any:  # noqa: ANN401 - modules of torch
    """A model of one layer with an MLP alone, switched to fake quantization; its ``layers.0.mlp`` is smoothed."""
    layer = torch.nn.ModuleDict({"mlp": torch.nn.ModuleDict(linears)})
    model = torch.nn.ModuleDict({"layers": torch.nn.ModuleList([layer])})
    fake_quant.enable_qat(model, shifts={"layers.0.mlp": SHIFT})
    return layer["mlp"]


SHIFT = np.array([6] + [0] * 31, np.int8)


def _with_outlier() -> Any:  # noqa: ANN401 - a tensor
    x = torch.randn(5, 32)
    x[:, 0] = 100.0
    return x


def test_a_smoothed_input_is_rounded_on_its_own_scale() -> None:
    linear, x = torch.nn.Linear(32, 32, bias=False), _with_outlier()
    factor = torch.exp2(torch.from_numpy(SHIFT).float())
    wanted = fake_quant.fake_quant_activation(x / factor) * factor
    found = _mlp(gate_proj=linear)["gate_proj"](x)
    expected = torch.nn.functional.linear(wanted, fake_quant.fake_quant_weight(linear.weight))
    assert torch.equal(found, expected)
    assert (wanted - x).abs()[:, 1:].max() < (fake_quant.fake_quant_activation(x) - x).abs()[:, 1:].max() / 4
    found.sum().backward()
    assert linear.weight.grad is not None


def test_what_the_down_projection_reads_is_rounded_turned() -> None:
    linear, x = torch.nn.Linear(32, 32, bias=False), _with_outlier().requires_grad_()
    matrix = torch.from_numpy(hadamard())

    def turned(values: Any) -> Any:  # noqa: ANN401 - a tensor
        return (values.reshape(5, 2, 16) @ matrix).reshape(5, 32)

    found = _mlp(down_proj=linear)["down_proj"](x)
    wanted = turned(fake_quant.fake_quant_activation(turned(x))) / 16
    expected = torch.nn.functional.linear(wanted, fake_quant.fake_quant_weight(linear.weight))
    assert torch.equal(found, expected) and not torch.equal(wanted, fake_quant.fake_quant_activation(x))
    found.sum().backward()
    straight = torch.autograd.grad(torch.nn.functional.linear(x, fake_quant.fake_quant_weight(linear.weight)).sum(), x)
    assert x.grad is not None and torch.allclose(x.grad, straight[0], atol=1e-5)
