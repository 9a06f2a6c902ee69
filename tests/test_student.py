"""A student of any base that is offered, and those that no container could hold."""

from __future__ import annotations

from typing import Any

import pytest

pytest.importorskip("torch", reason="the conversion layer needs edgeguard-runtime[convert]")
pytest.importorskip("transformers", reason="the conversion layer needs edgeguard-runtime[convert]")

from convert.smoke import llama_config  # noqa: E402
from convert.student import Student, StudentError  # noqa: E402


def test_a_plain_llama_fits() -> None:
    student = Student(llama_config(300))
    config = student.onnx_config(64)
    assert config.shapes() == {name: tuple(tensor.shape) for name, tensor in student.state_dict().items()}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"attention_bias": True},
            r"layers\.0\.self_attn\.q_proj\.bias as nothing, this base has \(64,\) \(and 7 more",
        ),
        ({"mlp_bias": True}, r"layers\.0\.mlp\.gate_proj\.bias as nothing, this base has \(96,\) \(and 5 more"),
        ({"hidden_act": "gelu"}, "containers hold a Llama with hidden_act silu, this base has gelu"),
        ({"partial_rotary_factor": 0.5}, r"with partial_rotary_factor 1\.0, this base has 0\.5"),
        (
            {"intermediate_size": 100},
            r"mlp\.down_proj\.weight: expected a width that INT4 groups of 32 divide, .*100\)",
        ),
        ({"hidden_size": 72, "head_dim": 16}, r"embed_tokens\.weight: expected a width .*found \(300, 72\)"),
        ({"head_dim": 15}, "no container holds this base: a student needs .* an even head width, got .* heads of 15"),
    ],
)
def test_a_base_that_no_container_holds_is_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(StudentError, match=f"{message}.*Take another base model"):
        Student(llama_config(300, **changes)).onnx_config(64)


def test_a_float32_read_from_a_gguf_is_the_decimal_that_it_was() -> None:
    student = Student(llama_config(300, rms_norm_eps=9.999999747378752e-06))
    assert student.onnx_config(64).rms_norm_eps == 1e-05


def test_a_body_that_is_no_llama_is_refused() -> None:
    from transformers import Qwen2Config

    small = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 1, "num_attention_heads": 4}
    with pytest.raises(StudentError, match="exported as a Llama, this base is a qwen2"):
        Student(Qwen2Config(vocab_size=300, num_key_value_heads=2, **small)).onnx_config(64)
