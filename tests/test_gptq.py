"""GPTQ on a tiny student: less error than rounding to nearest, on the shipping grid, from real tokens only."""

from __future__ import annotations

import copy
from dataclasses import replace

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="the conversion layer needs edgeguard-runtime[convert]")
pytest.importorskip("transformers", reason="the conversion layer needs edgeguard-runtime[convert]")

from torch import Tensor, nn  # noqa: E402

from convert.batches import Batch, Example, collate  # noqa: E402
from convert.fake_quant import enable_qat  # noqa: E402
from convert.gptq import GptqError, gptq, load_weights  # noqa: E402
from convert.quantize import Int4Weight, quantize_int4  # noqa: E402
from convert.smoke import llama_config  # noqa: E402
from convert.student import Student  # noqa: E402
from edgeguard.taxonomy import HAZARDS  # noqa: E402

VOCABULARY = 96


@pytest.fixture(scope="module")
def student() -> Student:
    """A random student whose embedding has 8 strong directions, as that of a language model has: correlated inputs."""
    torch.manual_seed(0)
    made = Student(llama_config(VOCABULARY, attn_implementation="eager")).eval()
    with torch.no_grad():
        for layer in made.model.layers:
            for module in layer.modules():
                if isinstance(module, nn.Linear):
                    module.weight.normal_(0, module.in_features**-0.5)
        directions = torch.randn(VOCABULARY, 8) @ torch.randn(8, 64)
        made.model.embed_tokens.weight.copy_(directions + 0.3 * torch.randn(VOCABULARY, 64))
    return made


@pytest.fixture(scope="module")
def batches() -> list[Batch]:
    """Rows of 5 to 40 tokens in padded batches."""
    rng = np.random.default_rng(1)
    rows = [rng.integers(1, VOCABULARY, rng.integers(5, 41)).tolist() for _ in range(48)]
    examples = [Example(ids, "prompt", False, (0,) * len(HAZARDS), True, 1.0) for ids in rows]
    return [collate(examples[i : i + 12], pad_id=0) for i in range(0, 48, 12)]


@pytest.fixture(scope="module")
def rounded(student: Student, batches: list[Batch]) -> dict[str, Int4Weight]:
    """The student through GPTQ."""
    return gptq(student, batches)


def linear_names(student: Student) -> list[str]:
    return [f"{name}.weight" for name, m in student.named_modules() if isinstance(m, nn.Linear) and name != "head"]


def inputs_of_linears(student: Student, batches: list[Batch]) -> dict[str, Tensor]:
    """Weight name -> inputs [tokens, K] of its linear, padding left out."""
    seen: dict[str, list[Tensor]] = {}
    masks: list[Tensor] = []
    hooks = [
        module.register_forward_pre_hook(
            lambda _, args, name=name: seen.setdefault(f"{name}.weight", []).append(args[0][masks[-1]])
        )
        for name, module in student.named_modules()
        if isinstance(module, nn.Linear) and name != "head"
    ]
    with torch.no_grad():
        for batch in batches:
            masks.append(batch.mask.bool())
            student(batch.ids, batch.mask)
    for hook in hooks:
        hook.remove()
    return {name: torch.cat(parts) for name, parts in seen.items()}


def test_every_linear_loses_clearly_less_than_by_rounding_to_nearest(
    student: Student, batches: list[Batch], rounded: dict[str, Int4Weight]
) -> None:
    inputs = inputs_of_linears(load_weights(copy.deepcopy(student), rounded), batches)
    assert inputs.keys() == set(linear_names(student))
    for name, x in inputs.items():
        weight = student.get_parameter(name).detach()
        nearest = quantize_int4(weight.numpy())
        lost, lost_nearest = (
            torch.linalg.norm(x @ (weight - torch.from_numpy(w.dequantize())).T) for w in (rounded[name], nearest)
        )
        assert lost < 0.9 * lost_nearest, f"{name}: {lost:.4g}, rounded to nearest {lost_nearest:.4g}"


def test_logits_stay_closer_than_by_rounding_to_nearest(
    student: Student, batches: list[Batch], rounded: dict[str, Int4Weight]
) -> None:
    nearest = {name: quantize_int4(student.numpy_weights()[name]) for name in rounded}
    wanted, by_gptq, by_nearest = (
        torch.cat([model(b.ids, b.mask) for b in batches]).detach()
        for model in (student, *(load_weights(copy.deepcopy(student), w) for w in (rounded, nearest)))
    )
    assert (by_gptq - wanted).square().mean() < (by_nearest - wanted).square().mean()


def test_all_linears_and_the_embedding_are_on_the_grid_and_nothing_else(
    student: Student, rounded: dict[str, Int4Weight]
) -> None:
    assert set(rounded) == {"model.embed_tokens.weight", *linear_names(student)}
    before = student.numpy_weights()
    for name, weight in rounded.items():
        assert weight.shape == before[name].shape
        assert weight.nibbles.dtype == np.uint8 and weight.nibbles.max() <= 15
        assert weight.scales.dtype == np.float16 and np.isfinite(weight.scales).all()
        again = Int4Weight.unpack_q4_0(weight.pack_q4_0())
        assert np.array_equal(again.dequantize(), weight.dequantize())


def test_embedding_is_rounded_to_nearest(student: Student, rounded: dict[str, Int4Weight]) -> None:
    name = "model.embed_tokens.weight"
    nearest = quantize_int4(student.numpy_weights()[name])
    assert np.array_equal(rounded[name].nibbles, nearest.nibbles)
    assert np.array_equal(rounded[name].scales, nearest.scales)


def test_student_is_left_as_it_was(student: Student, batches: list[Batch]) -> None:
    before = {name: tensor.clone() for name, tensor in student.state_dict().items()}
    gptq(student, batches[:1])
    assert len(student.model.layers) == 2
    assert all(torch.equal(tensor, before[name]) for name, tensor in student.state_dict().items())


def test_loading_changes_the_rounded_weights_and_no_other(student: Student, rounded: dict[str, Int4Weight]) -> None:
    loaded = load_weights(copy.deepcopy(student), rounded).numpy_weights()
    for name, before in student.numpy_weights().items():
        expected = rounded[name].dequantize() if name in rounded else before
        assert np.array_equal(loaded[name], expected), name


def test_padding_does_not_count(student: Student, batches: list[Batch], rounded: dict[str, Int4Weight]) -> None:
    other_padding = [replace(b, ids=torch.where(b.mask.bool(), b.ids, torch.full_like(b.ids, 7))) for b in batches]
    assert any(not torch.equal(a.ids, b.ids) for a, b in zip(batches, other_padding, strict=True))
    again = gptq(student, other_padding)
    assert all(np.array_equal(again[name].nibbles, weight.nibbles) for name, weight in rounded.items())
    # And that can fail: other real tokens give other integers.
    other_tokens = [replace(b, ids=torch.where(b.mask.bool(), b.ids.flip(1) % 40 + 1, b.ids)) for b in batches]
    other = gptq(student, other_tokens)
    assert any(not np.array_equal(other[name].nibbles, weight.nibbles) for name, weight in rounded.items())


def test_dead_channels_are_rounded_to_nearest(student: Student, batches: list[Batch]) -> None:
    """A channel that its norm switches off is zero in every row, and so is one whose gate is closed."""
    dead = copy.deepcopy(student)
    with torch.no_grad():
        dead.model.layers[0].input_layernorm.weight[5] = 0
        dead.model.layers[1].mlp.up_proj.weight.zero_()  # all that down_proj reads
    result = gptq(dead, batches)
    name = "model.layers.1.mlp.down_proj.weight"
    nearest = quantize_int4(dead.numpy_weights()[name])
    # Where the fp16 scale and the exact one disagree on a tie-breaking value, they are one step apart.
    assert (result[name].nibbles != nearest.nibbles).mean() < 0.01
    assert np.array_equal(result[name].scales, nearest.scales)
    query = result["model.layers.0.self_attn.q_proj.weight"].dequantize()
    weight = dead.numpy_weights()["model.layers.0.self_attn.q_proj.weight"]
    assert np.isfinite(query).all() and not np.allclose(query[:, 5], 0)
    step = np.abs(result["model.layers.0.self_attn.q_proj.weight"].scales[:, 0].astype(np.float32))
    assert (np.abs(query[:, 5] - weight[:, 5]) <= 1.5 * step).all()


def test_what_cannot_be_rounded_is_refused(student: Student, batches: list[Batch]) -> None:
    with pytest.raises(GptqError, match="needs calibration batches"):
        gptq(student, [])
    with pytest.raises(GptqError, match="positive damping"):
        gptq(student, batches, damping=0.0)
    trained = copy.deepcopy(student)
    enable_qat(trained.model)
    with pytest.raises(GptqError, match="disable_qat"):
        gptq(trained, batches)
    broken = copy.deepcopy(student)
    with torch.no_grad():
        broken.model.layers[0].input_layernorm.weight[0] = torch.nan
    with pytest.raises(GptqError, match=r"layer 0, self_attn\.q_proj"):
        gptq(broken, batches)


def test_loading_refuses_what_does_not_fit(student: Student, rounded: dict[str, Int4Weight]) -> None:
    name = "model.layers.0.self_attn.q_proj.weight"
    with pytest.raises(ValueError, match="no such weight"):
        load_weights(student, {"model.layers.9.self_attn.q_proj.weight": rounded[name]})
    with pytest.raises(ValueError, match="q_proj"):
        load_weights(student, {name: rounded["model.layers.0.mlp.down_proj.weight"]})
