"""Students with Llama 3's RoPE scaling: every container computes what torch does, and a file without it would not."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
from numpy.typing import NDArray

pytest.importorskip("gguf", reason="gguf is not installed: pip install 'edgeguard-runtime[convert]'")
torch = pytest.importorskip("torch", reason="the conversion layer needs edgeguard-runtime[convert]")
pytest.importorskip("transformers", reason="the conversion layer needs edgeguard-runtime[convert]")

import onnx  # noqa: E402
import onnxruntime  # noqa: E402
from transformers import AutoConfig, LlamaForCausalLM  # noqa: E402

from convert.batches import Example, collate  # noqa: E402
from convert.distill import score  # noqa: E402
from convert.export.gguf import write_gguf  # noqa: E402
from convert.export.gguf_run import gguf_logits  # noqa: E402
from convert.export.onnx_graph import LABELS_KEY, ROPE_FACTORS_KEY, StudentConfig, build_guard_graph  # noqa: E402
from convert.export.rope import RopeError, rope_factors  # noqa: E402
from convert.export.shape_sizes import synthetic_tokenizer  # noqa: E402
from convert.export.transcode import gguf_to_onnx  # noqa: E402
from convert.fake_quant import bake_int4  # noqa: E402
from convert.gptq import load_weights  # noqa: E402
from convert.quantize import quantize_int4  # noqa: E402
from convert.student import HEAD, Student  # noqa: E402
from edgeguard.engines.gguf_file import read_gguf  # noqa: E402
from edgeguard.engines.gguf_source import TranscodeError, read_onnx  # noqa: E402
from edgeguard.export.gguf_transcode import onnx_to_gguf  # noqa: E402
from edgeguard.export.gguf_write import pre_tokenizer_name  # noqa: E402
from edgeguard.taxonomy import HAZARDS  # noqa: E402

# The keys of Llama-3.2-1B's config.json, made small: frequencies below, between and above the two limits remain.
LLAMA_3_2: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "attention_bias": False,
    "attention_dropout": 0.0,
    "bos_token_id": 270,
    "eos_token_id": [271, 278, 279],
    "head_dim": 16,
    "hidden_act": "silu",
    "hidden_size": 64,
    "initializer_range": 0.02,
    "intermediate_size": 96,
    "max_position_embeddings": 512,
    "mlp_bias": False,
    "model_type": "llama",
    "num_attention_heads": 4,
    "num_hidden_layers": 3,
    "num_key_value_heads": 2,
    "pretraining_tp": 1,
    "rms_norm_eps": 1e-05,
    "rope_scaling": {
        "factor": 32.0,
        "high_freq_factor": 4.0,
        "low_freq_factor": 1.0,
        "original_max_position_embeddings": 64,
        "rope_type": "llama3",
    },
    "rope_theta": 500000.0,
    "tie_word_embeddings": True,
    "torch_dtype": "bfloat16",
    "use_cache": True,
    "vocab_size": 280,
}
MAX_TOKENS = 64
LENGTHS = (60, 3, 41, 1)
STRUCTURE_TOLERANCE = 1e-4  # as in test_onnx_graph: the same arithmetic in float32
LLAMA_CPP_TOLERANCE = 0.15  # as in test_gguf: activations in INT8; half of it is seen, whether RoPE is scaled or plain
SEVERAL = 5  # times the tolerance: how far off a file without the scaling is, at least


class Case(NamedTuple):
    """A student, rows for it and what torch computes of them with its INT4 weights."""

    student: Student
    config: StudentConfig
    examples: list[Example]
    expected: NDArray[np.float32]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("base")
    (made / "config.json").write_text(json.dumps(LLAMA_3_2))
    torch.manual_seed(0)
    model = LlamaForCausalLM(AutoConfig.from_pretrained(made))
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if name.endswith(("q_proj.weight", "k_proj.weight")):
                weight *= 8  # attention far from uniform, so that positions count
    model.to(torch.bfloat16).save_pretrained(made)
    (made / "config.json").write_text(json.dumps(LLAMA_3_2))  # as published, not as this transformers writes it
    return made


@pytest.fixture(scope="module")
def case(folder: Path) -> Case:
    student = Student.from_base(folder, 2, target_tokens={"safe": 5, "unsafe": 6}).eval()
    torch.manual_seed(1)
    torch.nn.init.normal_(student.head.weight[2:], std=0.5)  # logits spread by about four
    rng = np.random.default_rng(2)
    rows = [rng.integers(0, LLAMA_3_2["vocab_size"], length).tolist() for length in LENGTHS]
    examples = [Example(ids, "prompt", False, (0,) * len(HAZARDS), True, 1.0) for ids in rows]
    rounded = copy.deepcopy(student)
    bake_int4(rounded.model)
    with torch.inference_mode():
        expected = [rounded(torch.tensor([ids]), torch.ones(1, len(ids), dtype=torch.long))[0] for ids in rows]
    return Case(student, student.onnx_config(MAX_TOKENS), examples, torch.stack(expected).numpy())


def int4_graph(case: Case, config: StudentConfig) -> onnx.ModelProto:
    return build_guard_graph(case.student.numpy_weights(), config, accuracy_level=1, labels=HEAD)


def standard_graph(case: Case, config: StudentConfig) -> onnx.ModelProto:
    pytest.importorskip("optimum.exporters.onnx", reason="optimum-onnx is not installed: pip install optimum-onnx")
    from convert.export.standard_onnx import build_standard_graph

    return build_standard_graph(case.student.numpy_weights(), config, labels=HEAD)


def write_file(case: Case, config: StudentConfig, path: Path) -> Path:
    tokenizer = synthetic_tokenizer(config.vocab_size, seed=1)
    pre = pre_tokenizer_name(tokenizer)
    weights = case.student.numpy_weights()
    write_gguf(weights, config, HEAD, tokenizer, path, control_ids=(), pre_tokenizer=pre, about={})
    return path


def error(case: Case, model: onnx.ModelProto) -> float:
    """The largest difference from torch, of the graph as it stands: no fusion into INT8 kernels."""
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    batch = collate(case.examples, 0)
    feeds = {"input_ids": batch.ids.numpy(), "attention_mask": batch.mask.numpy()}
    return float(np.abs(session.run(["logits"], feeds)[0] - case.expected).max())


def test_factors_of_llama_3_2_1b() -> None:
    """Its own numbers: head width 64, base 500000, factor 32, limits at wavelengths of 2048 and 8192 tokens."""
    scaling = {**LLAMA_3_2["rope_scaling"], "original_max_position_embeddings": 8192}
    shape = {"head_dim": 64, "max_position_embeddings": 131072, "rope_scaling": scaling}
    factors = np.array(rope_factors(AutoConfig.for_model(**{**LLAMA_3_2, **shape})))
    wavelengths = 2 * np.pi * 500000.0 ** (np.arange(32) / 32)
    assert (factors[wavelengths < 2048] == 1).all() and (factors[wavelengths > 8192] == 32).all()
    between = (wavelengths > 2048) & (wavelengths < 8192)
    kept = (8192 / wavelengths[between] - 1) / (4 - 1)  # the share that stays as it was
    np.testing.assert_allclose(factors[between], 1 / ((1 - kept) / 32 + kept), rtol=1e-5)
    assert between.sum() == 3


@pytest.mark.parametrize("scaling", [None, {"rope_type": "default"}])
def test_plain_rope_has_no_factors(scaling: dict[str, str] | None) -> None:
    assert rope_factors(AutoConfig.for_model(**{**LLAMA_3_2, "rope_scaling": scaling})) is None


@pytest.mark.parametrize("kind", ["linear", "dynamic", "yarn"])
def test_other_kinds_are_refused(kind: str, folder: Path) -> None:
    config = AutoConfig.for_model(**{**LLAMA_3_2, "rope_scaling": {"rope_type": kind, "factor": 2.0}})
    with pytest.raises(RopeError, match=f"of the type '{kind}'"):
        Student(config).onnx_config(MAX_TOKENS)


def test_a_llama_3_2_base_becomes_a_student(folder: Path, case: Case, tmp_path: Path) -> None:
    """Tied embeddings, several end tokens and bfloat16 weights; and the scaling outlives saving."""
    factors = case.config.rope_factors
    assert factors is not None and factors[0] == 1 and 1 < factors[1] < 32 and set(factors[2:]) == {32.0}
    assert (case.config.head_dim, case.config.rope_theta, case.config.num_layers) == (16, 500000.0, 2)
    base = LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32)
    assert torch.equal(case.student.head.weight[1], base.get_input_embeddings().weight[6])
    case.student.save(tmp_path)
    loaded = Student.load(tmp_path)
    assert loaded.onnx_config(MAX_TOKENS) == case.config
    assert torch.equal(loaded.model.rotary_emb.inv_freq, base.model.rotary_emb.inv_freq)


def test_a_student_read_from_a_container_keeps_the_scaling(case: Case, tmp_path: Path) -> None:
    write_onnx(case, tmp_path / "a.onnx")
    held = read_onnx(tmp_path / "a.onnx")
    load_weights(Student.of_shape(held.config, HEAD), held.weights).save(tmp_path)
    logits = score(Student.load(tmp_path), case.examples, 0, bf16=False)
    np.testing.assert_allclose(logits, case.expected, atol=STRUCTURE_TOLERANCE)


@pytest.mark.parametrize("build", [int4_graph, standard_graph])
def test_onnx_computes_what_torch_does(case: Case, build: Callable[[Case, StudentConfig], onnx.ModelProto]) -> None:
    assert error(case, build(case, case.config)) < STRUCTURE_TOLERANCE
    assert error(case, build(case, replace(case.config, rope_factors=None))) > SEVERAL * STRUCTURE_TOLERANCE


def test_plain_llama_cpp_computes_what_torch_does(case: Case, tmp_path: Path) -> None:
    pytest.importorskip("llama_cpp", reason="needs llama-cpp-python: pip install 'edgeguard-runtime[gguf]'")
    scaled = write_file(case, case.config, tmp_path / "scaled.gguf")
    plain = write_file(case, replace(case.config, rope_factors=None), tmp_path / "plain.gguf")
    differences = [np.abs(gguf_logits(path, case.examples) - case.expected).max() for path in (scaled, plain)]
    assert differences[0] < LLAMA_CPP_TOLERANCE
    assert differences[1] > SEVERAL * LLAMA_CPP_TOLERANCE


def write_onnx(case: Case, path: Path) -> onnx.ModelProto:
    weights = {
        name: quantize_int4(weight) if weight.ndim == 2 and name.startswith("model.") else weight
        for name, weight in case.student.numpy_weights().items()
    }
    model = build_guard_graph(weights, case.config, labels=HEAD)
    path.write_bytes(model.SerializeToString())
    return model


def test_onnx_to_gguf_and_back_keeps_the_factors(case: Case, tmp_path: Path) -> None:
    write_onnx(case, tmp_path / "a.onnx")
    assert read_onnx(tmp_path / "a.onnx").config == case.config
    tokenizer = synthetic_tokenizer(case.config.vocab_size, seed=1)
    onnx_to_gguf(tmp_path / "a.onnx", tmp_path / "a.gguf", tokenizer, control_ids=(), about={})
    assert read_gguf(tmp_path / "a.gguf").config == case.config
    gguf_to_onnx(tmp_path / "a.gguf", tmp_path / "b.onnx")
    assert (tmp_path / "b.onnx").read_bytes() == (tmp_path / "a.onnx").read_bytes()


@pytest.mark.parametrize(
    ("stated", "message"),
    [
        (None, "not the plain one of any base"),
        ([1.0] * 8, "not the one of any base with the factors"),
        ([1.0] * 7, "expected 8 numbers above 0"),
        ([0.0] * 8, "expected 8 numbers above 0"),
        (["x"], "no list of numbers"),
        (5, "no list of numbers"),
    ],
)
def test_factors_that_are_not_those_of_the_table_are_refused(
    stated: object, message: str, case: Case, tmp_path: Path
) -> None:
    model = write_onnx(case, tmp_path / "a.onnx")
    props = {LABELS_KEY: json.dumps(HEAD)} | ({} if stated is None else {ROPE_FACTORS_KEY: json.dumps(stated)})
    onnx.helper.set_model_props(model, props)
    (tmp_path / "a.onnx").write_bytes(model.SerializeToString())
    with pytest.raises(TranscodeError, match=message):
        read_onnx(tmp_path / "a.onnx")


@pytest.mark.parametrize("factors", [(1.0,) * 7, (0.0,) * 8, (float("nan"),) * 8])
def test_factors_that_do_not_fit_are_refused(factors: tuple[float, ...], case: Case) -> None:
    with pytest.raises(ValueError, match="expected 8 RoPE factors above 0"):
        replace(case.config, rope_factors=factors)
