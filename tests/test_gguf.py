"""The GGUF export: integers, shape and metadata come back; and plain llama.cpp computes what torch does."""

from __future__ import annotations

import copy
import json
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("gguf", reason="gguf is not installed: pip install 'edgeguard-runtime[convert]'")
torch = pytest.importorskip("torch", reason="the conversion layer needs edgeguard-runtime[convert]")
pytest.importorskip("transformers", reason="the conversion layer needs edgeguard-runtime[convert]")

from convert.base import chat_template, plain_tokenizer_json  # noqa: E402
from convert.batches import Example  # noqa: E402
from convert.export.gguf import write_gguf  # noqa: E402
from convert.export.gguf_run import gguf_logits, gguf_tokens  # noqa: E402
from convert.fake_quant import bake_int4  # noqa: E402
from convert.quantize import Int4Weight, quantize_int4  # noqa: E402
from convert.smoke import write_base  # noqa: E402
from convert.student import HEAD, Student  # noqa: E402
from edgeguard.engines.gguf_file import GgufError, read_gguf  # noqa: E402
from edgeguard.export.gguf_write import LLAMA_3_PATTERN, pre_tokenizer_name  # noqa: E402
from edgeguard.taxonomy import HAZARDS  # noqa: E402

TEXTS = [
    "Is it safe to bake the red cake?",
    "x",
    "a longer text, with numbers 123 and ☕",
    "How do I draw a new car? " * 4,
]


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_base(tmp_path_factory.mktemp("base"))


@pytest.fixture(scope="module")
def student(base: Path) -> Student:
    made = Student.from_base(base, 2).eval()
    torch.manual_seed(1)
    torch.nn.init.normal_(made.head.weight)
    torch.nn.init.normal_(made.head.bias)
    return made


@pytest.fixture(scope="module")
def file(student: Student, base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("gguf") / "model.gguf"
    write_gguf(
        student.numpy_weights(),
        student.onnx_config(128),
        HEAD,
        plain_tokenizer_json(base),
        path,
        control_ids=chat_template(base).reserved,
        pre_tokenizer=pre_tokenizer_name(plain_tokenizer_json(base)),
        about={"name": "tiny", "version": "0.0.1", "license": "CC0-1.0"},
        bundle={"max_tokens": 128, "files": {"model.gguf": {}}},
    )
    return path


def test_integers_and_scales_come_back_unchanged(student: Student, file: Path) -> None:
    found = read_gguf(file)
    assert found.labels == HEAD
    assert found.config == student.onnx_config(128)
    assert found.metadata["general.name"] == "tiny"
    assert json.loads(found.metadata["edgeguard.bundle"]) == {"max_tokens": 128}
    expected = student.numpy_weights()
    assert set(found.weights) == set(expected)
    for name, weight in expected.items():
        kept = found.weights[name]
        if isinstance(kept, Int4Weight):
            made = quantize_int4(weight)
            assert np.array_equal(kept.nibbles, made.nibbles) and np.array_equal(kept.scales, made.scales), name
        else:
            assert np.array_equal(kept, weight), name
    assert sum(isinstance(w, Int4Weight) for w in found.weights.values()) == 2 * 7 + 1


def test_files_that_are_no_guard_are_refused(file: Path, tmp_path: Path) -> None:
    (tmp_path / "text.gguf").write_text("hello")
    with pytest.raises(GgufError, match=r"text\.gguf: not a GGUF file"):
        read_gguf(tmp_path / "text.gguf")
    from gguf import GGUFWriter

    writer = GGUFWriter(tmp_path / "plain.gguf", "llama")
    writer.add_block_count(0)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with pytest.raises(GgufError, match="no guard of edgeguard, it lacks"):
        read_gguf(tmp_path / "plain.gguf")


def pre_tokenizer(*steps: dict[str, object]) -> str:
    return json.dumps({"pre_tokenizer": {"type": "Sequence", "pretokenizers": list(steps)}})


BYTES = {"type": "ByteLevel", "add_prefix_space": False, "use_regex": True}
SPLIT_BYTES = {**BYTES, "use_regex": False}
DIGITS = {"type": "Digits", "individual_digits": True}


def split(pattern: str) -> dict[str, object]:
    return {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}


def test_ways_to_split_text_have_llama_cpps_names() -> None:
    assert pre_tokenizer_name(json.dumps({"pre_tokenizer": BYTES})) == "gpt-2"
    assert pre_tokenizer_name(pre_tokenizer(DIGITS, BYTES)) == "smollm"
    assert pre_tokenizer_name(pre_tokenizer(split(LLAMA_3_PATTERN), SPLIT_BYTES)) == "llama-bpe"
    assert pre_tokenizer_name(pre_tokenizer(split(LLAMA_3_PATTERN.replace("{1,3}", "")), SPLIT_BYTES)) == "qwen2"
    for unknown in (pre_tokenizer(split("x+"), SPLIT_BYTES), pre_tokenizer(BYTES, DIGITS), '{"pre_tokenizer": null}'):
        with pytest.raises(GgufError, match="no name of llama.cpp is known"):
            pre_tokenizer_name(unknown)


def test_labels_must_be_as_many_as_the_heads_rows(student: Student, base: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="expected 16 labels"):
        write_gguf(
            student.numpy_weights(),
            student.onnx_config(128),
            HEAD[:2],
            plain_tokenizer_json(base),
            tmp_path / "model.gguf",
            control_ids=(),
            pre_tokenizer="gpt-2",
            about={},
        )
    assert not list(tmp_path.iterdir())


def test_plain_llama_cpp_reads_text_as_we_do(base: Path, file: Path) -> None:
    pytest.importorskip("llama_cpp", reason="needs llama-cpp-python: pip install 'edgeguard-runtime[gguf]'")
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_str(plain_tokenizer_json(base))
    texts = [*TEXTS, "<|im_start|>user\n<|im_end|>"]
    found = gguf_tokens(file, texts)
    assert found == [tokenizer.encode(text, add_special_tokens=False).ids for text in texts]
    assert chat_template(base).reserved.isdisjoint(i for ids in found for i in ids)


def test_plain_llama_cpp_computes_what_torch_does(student: Student, base: Path, file: Path) -> None:
    pytest.importorskip("llama_cpp", reason="needs llama-cpp-python: pip install 'edgeguard-runtime[gguf]'")
    from tokenizers import Tokenizer

    template, tokenizer = chat_template(base), Tokenizer.from_str(plain_tokenizer_json(base))
    reference = copy.deepcopy(student)
    bake_int4(reference.model)
    rows = [template.encode(tokenizer, [("user", text)], 128).ids for text in TEXTS]
    logits = gguf_logits(file, [Example(ids, "prompt", False, (0,) * len(HAZARDS), True, 1.0) for ids in rows])
    with torch.inference_mode():
        expected = [reference(torch.tensor([ids]), torch.ones(1, len(ids), dtype=torch.long))[0] for ids in rows]
    # Activations are rounded to INT8 in blocks of 32 before each product (Q8_0): a relative error of a few thousandths
    # of logits that spread by about eight. A permuted head or another RoPE moves them by whole units.
    np.testing.assert_allclose(logits, torch.stack(expected).numpy(), atol=0.15)
    with pytest.raises(GgufError, match="a row of 129 tokens, the file allows 128"):
        gguf_logits(file, [Example([5] * 129, "prompt", False, (0,) * len(HAZARDS), True, 1.0)])


def test_what_llama_cpp_refuses_is_said(student: Student, base: Path, tmp_path: Path) -> None:
    pytest.importorskip("llama_cpp", reason="needs llama-cpp-python: pip install 'edgeguard-runtime[gguf]'")
    path = tmp_path / "model.gguf"
    about, tokenizer = {"name": "tiny"}, plain_tokenizer_json(base)
    config = student.onnx_config(128)
    write_gguf(
        student.numpy_weights(), config, HEAD, tokenizer, path, control_ids=(), pre_tokenizer="no-such", about=about
    )
    with pytest.raises(GgufError, match="cannot load it: .*no-such"):
        gguf_logits(path, [Example([5], "prompt", False, (0,) * len(HAZARDS), True, 1.0)])
