"""The GGUF export: the same integers as ONNX, there and back; and plain llama.cpp computes what torch does."""

from __future__ import annotations

import copy
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("gguf", reason="gguf is not installed: pip install 'edgeguard-runtime[convert]'")
torch = pytest.importorskip("torch", reason="the conversion layer needs edgeguard-runtime[convert]")
pytest.importorskip("transformers", reason="the conversion layer needs edgeguard-runtime[convert]")

from convert_support import write_base  # noqa: E402

from convert.base import chat_template, plain_tokenizer_json  # noqa: E402
from convert.export.gguf import GgufError, read_gguf, write_gguf  # noqa: E402
from convert.fake_quant import bake_int4  # noqa: E402
from convert.quantize import Int4Weight, quantize_int4  # noqa: E402
from convert.student import HEAD, Student  # noqa: E402

TEXTS = ["Is it safe to bake the red cake?", "x", "a longer text, with numbers 123 and ☕", "How do I draw a new car? " * 4]


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
        pre_tokenizer="gpt-2",
        about={"name": "tiny", "version": "0.0.1", "license": "CC0-1.0"},
    )
    return path


def test_integers_and_scales_come_back_unchanged(student: Student, file: Path) -> None:
    found = read_gguf(file)
    assert found.labels == HEAD
    assert found.metadata["general.name"] == "tiny"
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


def test_plain_llama_cpp_reads_the_same_hidden_state(student: Student, base: Path, file: Path) -> None:
    llama_cpp = pytest.importorskip("llama_cpp", reason="needs llama-cpp-python: pip install 'edgeguard-runtime[gguf]'")
    llama = llama_cpp.Llama(
        str(file), embedding=True, pooling_type=llama_cpp.LLAMA_POOLING_TYPE_LAST, n_ctx=256, verbose=False
    )
    metadata = read_gguf(file)
    template, reference = chat_template(base), bake_int4(copy.deepcopy(student))
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_str(plain_tokenizer_json(base))
    for text in TEXTS:
        ids = template.encode(tokenizer, [("user", text)], 128).ids
        assert llama.tokenize(text.encode(), add_bos=False, special=False) == tokenizer.encode(text).ids
        hidden = np.array(llama.embed(ids, normalize=False))
        head = metadata.weights["head.weight"], metadata.weights["head.bias"]
        logits = head[0] @ hidden + head[1]
        expected = reference(torch.tensor([ids]), torch.ones(1, len(ids), dtype=torch.long)).detach().numpy()[0]
        np.testing.assert_allclose(logits, expected, atol=0.15)
