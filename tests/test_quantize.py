"""The INT4 grid: numpy against gguf-py, bit for bit; torch's fake quantization against numpy."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from convert.quantize import GROUP_SIZE, Int4Weight, QuantizeError, quantize_int4
from convert.smoke import llama_config


def awkward_weight(rows: int = 48, columns: int = 192) -> NDArray[np.float32]:
    """Random rows, and the groups that go wrong first."""
    weight = np.random.default_rng(7).standard_normal((rows, columns)).astype(np.float32)
    weight[0] = 0
    weight[1, :GROUP_SIZE] = 0  # a zero group beside others
    weight[2] = np.sign(weight[2])  # +1 and -1: the first decides the sign of the scale
    weight[3] = np.abs(weight[3])  # negative scales
    weight[4] = -np.abs(weight[4])
    weight[5] *= 1e-6  # scales below the normal range of fp16
    weight[6] *= 1e-9  # scales that are zero in fp16
    weight[7] *= 1e4
    weight[8] = np.round(weight[8] * 2)  # values halfway between steps
    return weight


def test_grid_is_gguf_q4_0_bit_for_bit() -> None:
    gguf = pytest.importorskip("gguf", reason="gguf is not installed: pip install 'edgeguard-runtime[gguf]'")
    weight = awkward_weight()
    quantized = quantize_int4(weight)
    expected = gguf.quants.quantize(weight, gguf.GGMLQuantizationType.Q4_0)
    assert np.array_equal(quantized.pack_q4_0(), expected)
    assert np.array_equal(quantized.dequantize(), gguf.quants.dequantize(expected, gguf.GGMLQuantizationType.Q4_0))


def test_largest_value_lands_on_minus_eight() -> None:
    weight = np.zeros((2, GROUP_SIZE), dtype=np.float32)
    weight[0, 3], weight[1, 3] = 4.0, -4.0
    quantized = quantize_int4(weight)
    assert quantized.scales.tolist() == [[-0.5], [0.5]]
    assert quantized.nibbles[:, 3].tolist() == [0, 0]
    assert np.array_equal(quantized.dequantize(), weight)


def test_zero_groups_stay_zero() -> None:
    quantized = quantize_int4(np.zeros((1, GROUP_SIZE), dtype=np.float32))
    assert quantized.scales.tolist() == [[0.0]]
    assert set(quantized.nibbles.ravel().tolist()) == {8}


def test_packed_layouts_round_trip() -> None:
    quantized = quantize_int4(awkward_weight())
    by_onnx = Int4Weight.unpack_matmulnbits(quantized.pack_matmulnbits(), quantized.scales)
    by_gguf = Int4Weight.unpack_q4_0(quantized.pack_q4_0())
    for other in (by_onnx, by_gguf):
        assert np.array_equal(other.nibbles, quantized.nibbles)
        assert np.array_equal(other.scales, quantized.scales)


def test_byte_order_of_the_layouts() -> None:
    nibbles = np.arange(GROUP_SIZE, dtype=np.uint8)[None] % 16
    weight = Int4Weight(nibbles=nibbles, scales=np.ones((1, 1), dtype=np.float16))
    assert weight.pack_matmulnbits().shape == (1, 1, 16)
    assert weight.pack_matmulnbits()[0, 0, :2].tolist() == [0x10, 0x32]
    assert weight.pack_q4_0()[0, :4].tolist() == [0x00, 0x3C, 0x00, 0x11]  # 1.0 in fp16, then elements (0, 16), (1, 17)


def test_quantizing_again_changes_nothing() -> None:
    once = quantize_int4(awkward_weight()).dequantize()
    assert np.array_equal(quantize_int4(once).dequantize(), once)


@pytest.mark.parametrize(
    ("weight", "error", "message"),
    [
        (np.zeros((4, 33), dtype=np.float32), ValueError, "multiple of 32"),
        (np.zeros(32, dtype=np.float32), ValueError, "multiple of 32"),
        (np.full((1, 32), np.nan, dtype=np.float32), QuantizeError, "not finite"),
        (np.full((1, 32), 1e6, dtype=np.float32), QuantizeError, "beyond fp16"),
    ],
)
def test_weights_off_the_grid_are_refused(weight: NDArray[np.float32], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        quantize_int4(weight)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"nibbles": np.zeros((1, 32), dtype=np.int8)}, "uint8 nibbles"),
        ({"nibbles": np.full((1, 32), 16, dtype=np.uint8)}, "0..15"),
        ({"scales": np.zeros((1, 2), dtype=np.float16)}, "need scales"),
    ],
)
def test_parts_that_do_not_fit_are_refused(fields: dict[str, Any], message: str) -> None:
    good = {"nibbles": np.zeros((1, 32), dtype=np.uint8), "scales": np.zeros((1, 1), dtype=np.float16)}
    with pytest.raises(ValueError, match=message):
        Int4Weight(**{**good, **fields})


@pytest.fixture
def torch() -> Any:  # noqa: ANN401 - a module
    return pytest.importorskip("torch", reason="torch is not installed: pip install 'edgeguard-runtime[convert]'")


@pytest.fixture
def fake_quant(torch: Any) -> Any:  # noqa: ANN401 - a module that imports torch
    from convert import fake_quant

    return fake_quant


def linear_pair(torch: Any, fake_quant: Any) -> tuple[Any, Any, Any]:
    torch.manual_seed(0)
    linear = torch.nn.Linear(64, 32)
    return (
        linear,
        fake_quant.enable_qat(torch.nn.ModuleDict({"o_proj": linear}))["o_proj"],
        torch.randn(3, 5, 64),
    )


@pytest.mark.parametrize("slice_elements", [64, 1 << 19])
def test_weight_equals_the_integer_grid(
    torch: Any, fake_quant: Any, slice_elements: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fake_quant, "SLICE_ELEMENTS", slice_elements)
    weight = awkward_weight()
    faked = fake_quant.fake_quant_weight(torch.from_numpy(weight))
    assert np.array_equal(faked.numpy(), quantize_int4(weight).dequantize())


def test_weight_in_bfloat16_is_the_grid_rounded(torch: Any, fake_quant: Any) -> None:
    weight = torch.from_numpy(awkward_weight())
    faked = fake_quant.fake_quant_weight(weight, torch.bfloat16)
    assert torch.equal(faked, fake_quant.fake_quant_weight(weight).bfloat16())


def test_width_off_the_grid_is_refused(torch: Any, fake_quant: Any) -> None:
    with pytest.raises(ValueError, match="multiple of 32"):
        fake_quant.fake_quant_weight(torch.zeros(2, 31))


def test_activation_is_int8_per_token(torch: Any, fake_quant: Any) -> None:
    x = np.random.default_rng(1).standard_normal((2, 3, 40)).astype(np.float32)
    x[0, 1] = 0
    scale = np.maximum(np.abs(x).max(-1, keepdims=True) / np.float32(127), np.finfo(np.float32).tiny)
    faked = fake_quant.fake_quant_activation(torch.from_numpy(x)).numpy()
    assert np.array_equal(faked, np.round(x / scale) * scale)
    assert np.abs(np.round(faked / scale)).max() == 127


def test_gradients_pass_straight_through(torch: Any, fake_quant: Any) -> None:
    for function in (fake_quant.fake_quant_weight, fake_quant.fake_quant_activation):
        x = torch.from_numpy(awkward_weight()).requires_grad_()
        upstream = torch.randn(x.shape, generator=torch.Generator().manual_seed(0))
        (function(x, torch.bfloat16).float() * upstream).sum().backward()
        assert x.grad.dtype == torch.float32
        assert torch.equal(x.grad, upstream.bfloat16().float())  # the upstream gradient, rounded by the type asked for


def test_linear_computes_with_quantized_weight_and_input(torch: Any, fake_quant: Any) -> None:
    linear, qat, x = linear_pair(torch, fake_quant)
    expected = torch.nn.functional.linear(
        fake_quant.fake_quant_activation(x), fake_quant.fake_quant_weight(linear.weight), linear.bias
    )
    assert torch.equal(qat(x), expected)
    assert qat.weight is linear.weight
    with torch.autocast("cpu", torch.bfloat16):
        assert qat(x).dtype == torch.bfloat16


def test_siblings_share_one_quantized_input(torch: Any, fake_quant: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[int] = []
    original = fake_quant.fake_quant_activation

    def counted(*arguments: Any) -> Any:  # noqa: ANN401
        calls.append(1)
        return original(*arguments)

    monkeypatch.setattr(fake_quant, "fake_quant_activation", counted)
    names = ("q_proj", "k_proj", "v_proj")
    block = fake_quant.enable_qat(torch.nn.ModuleDict({name: torch.nn.Linear(32, 32) for name in names}))
    x = torch.randn(2, 32)
    first = [block[name](x) for name in names]
    assert len(calls) == 1
    x += 1  # changed in place: what was kept may not be used again
    assert not torch.equal(block["q_proj"](x), first[0])
    assert len(calls) == 2


def test_llama_is_switched_and_switched_back(torch: Any, fake_quant: Any) -> None:
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    torch.manual_seed(0)
    model = transformers.LlamaModel(llama_config(50)).eval()
    ids = torch.arange(10)[None]
    parameters, plain = dict(model.named_parameters()), model(ids).last_hidden_state
    fake_quant.enable_qat(model, activations=False)
    assert all(parameter is parameters[name] for name, parameter in model.named_parameters())
    quantized = model(ids).last_hidden_state
    assert not torch.allclose(quantized, plain)
    fake_quant.disable_qat(model)
    assert torch.equal(model(ids).last_hidden_state, plain)
    fake_quant.bake_int4(model)
    assert torch.equal(model(ids).last_hidden_state, quantized)
    fake_quant.enable_qat(model)(ids).last_hidden_state.sum().backward()
    assert all(parameter.grad is not None and parameter.grad.isfinite().all() for parameter in model.parameters())


def test_model_off_the_grid_is_left_unchanged(torch: Any, fake_quant: Any) -> None:
    model = torch.nn.Sequential(torch.nn.Linear(32, 40), torch.nn.Linear(40, 2))
    with pytest.raises(ValueError, match="1: its width 40"):
        fake_quant.enable_qat(model)
    assert type(model[0]) is torch.nn.Linear
