"""Two containers, one set of weights: from ONNX to GGUF and back, every integer and every scale stays what it was."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("gguf", reason="gguf is not installed: pip install 'edgeguard-runtime[convert]'")
pytest.importorskip("torch", reason="the conversion layer needs edgeguard-runtime[convert]")
pytest.importorskip("transformers", reason="the conversion layer needs edgeguard-runtime[convert]")

import onnx  # noqa: E402
from test_onnx_graph import BASE, changed, random_weights  # noqa: E402
from tiny import TinyModel  # noqa: E402

from convert.base import plain_tokenizer_json  # noqa: E402
from convert.export.gguf import write_gguf  # noqa: E402
from convert.export.onnx_graph import StudentConfig, build_guard_graph  # noqa: E402
from convert.export.shape_sizes import synthetic_tokenizer, write_untrained  # noqa: E402
from convert.export.transcode import gguf_to_onnx  # noqa: E402
from convert.quantize import Int4Weight, quantize_int4  # noqa: E402
from convert.smoke import write_base  # noqa: E402
from edgeguard.bundle import Bundle  # noqa: E402
from edgeguard.engines.gguf_file import read_gguf  # noqa: E402
from edgeguard.engines.gguf_source import TranscodeError, read_onnx  # noqa: E402
from edgeguard.engines.int4_weights import require_same_weights  # noqa: E402
from edgeguard.errors import ParityError  # noqa: E402
from edgeguard.export.gguf_transcode import bundle_to_gguf, onnx_to_gguf  # noqa: E402

LABELS = tuple(f"label{i}" for i in range(BASE.head_size))
SHAPES = {
    "grouped heads": BASE,
    "one key-value head": changed(num_kv_heads=1),
    "heads wider than hidden": changed(num_heads=6, num_kv_heads=3, head_dim=32),
    "one layer": changed(num_layers=1),
}
SHIPPED = Path(__file__).resolve().parent.parent / "models" / "edgeguard-mini"


@pytest.fixture(scope="module")
def tokenizer_json(tmp_path_factory: pytest.TempPathFactory) -> str:
    return plain_tokenizer_json(write_base(tmp_path_factory.mktemp("base")))


def packed(config: StudentConfig) -> dict[str, Int4Weight | np.ndarray]:
    return {
        name: quantize_int4(weight) if weight.ndim == 2 and name.startswith("model.") else weight
        for name, weight in random_weights(config).items()
    }


def write_onnx(path: Path, config: StudentConfig, labels: tuple[str, ...] = LABELS) -> Path:
    path.write_bytes(build_guard_graph(packed(config), config, labels=labels).SerializeToString())
    return path


def to_gguf(source: Path, path: Path, tokenizer_json: str, labels: tuple[str, ...] = ()) -> Path:
    about = {"name": "tiny"}
    onnx_to_gguf(source, path, tokenizer_json, control_ids={0, 1}, about=about, labels=labels)
    return path


@pytest.mark.parametrize("config", SHAPES.values(), ids=SHAPES.keys())
def test_onnx_to_gguf_and_back_is_the_same_file(config: StudentConfig, tokenizer_json: str, tmp_path: Path) -> None:
    source = write_onnx(tmp_path / "a.onnx", config)
    gguf = to_gguf(source, tmp_path / "a.gguf", tokenizer_json)
    found = read_gguf(gguf)
    assert found.config == read_onnx(source).config == config
    assert found.labels == LABELS
    for name, weight in packed(config).items():
        kept = found.weights[name]
        if isinstance(weight, Int4Weight):
            assert isinstance(kept, Int4Weight)
            assert np.array_equal(kept.nibbles, weight.nibbles) and kept.scales.tobytes() == weight.scales.tobytes()
        else:
            assert np.array_equal(np.asarray(kept), weight)
    gguf_to_onnx(gguf, tmp_path / "b.onnx")
    assert (tmp_path / "b.onnx").read_bytes() == source.read_bytes()


def test_gguf_to_onnx_and_back_keeps_every_integer(tokenizer_json: str, tmp_path: Path) -> None:
    weights = packed(BASE)
    path = tmp_path / "a.gguf"
    write_gguf(weights, BASE, LABELS, tokenizer_json, path, control_ids=(), pre_tokenizer="gpt-2", about={})
    gguf_to_onnx(path, tmp_path / "a.onnx")
    student = read_onnx(tmp_path / "a.onnx")
    assert (student.config, student.labels) == (BASE, LABELS)
    require_same_weights(student.weights, weights, "a.onnx")
    again = to_gguf(tmp_path / "a.onnx", tmp_path / "b.gguf", tokenizer_json)
    require_same_weights(read_gguf(again).weights, weights, "b.gguf")


def test_a_file_without_labels_needs_them(tokenizer_json: str, tmp_path: Path) -> None:
    source = write_onnx(tmp_path / "a.onnx", BASE, labels=())
    assert read_onnx(source).labels == ()
    with pytest.raises(TranscodeError, match="Pass the labels"):
        to_gguf(source, tmp_path / "a.gguf", tokenizer_json)
    assert read_gguf(to_gguf(source, tmp_path / "a.gguf", tokenizer_json, LABELS)).labels == LABELS


def test_other_onnx_files_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.onnx"
    path.write_text("hello")
    with pytest.raises(TranscodeError, match="not an ONNX file"):
        read_onnx(path)
    onnx.save(TinyModel.random(300).to_onnx(), str(path))
    with pytest.raises(TranscodeError, match="no guard of edgeguard in INT4, it lacks 'embedding.int4'"):
        read_onnx(path)
    path.write_bytes(build_guard_graph(random_weights(BASE), BASE, int4=False).SerializeToString())
    with pytest.raises(TranscodeError, match="no guard of edgeguard in INT4"):
        read_onnx(path)


def test_another_rotation_is_refused(tmp_path: Path) -> None:
    """A RoPE that the file does not state would be lost on the way: GGUF takes the base and the factors."""
    model = build_guard_graph(packed(BASE), BASE)
    for tensor in model.graph.initializer:
        if tensor.name == "rope_sin":
            table = np.frombuffer(tensor.raw_data, np.float32).copy()
            table[BASE.head_dim // 2] += 0.1
            tensor.raw_data = table.tobytes()
    (tmp_path / "a.onnx").write_bytes(model.SerializeToString())
    with pytest.raises(TranscodeError, match="not the plain one of any base"):
        read_onnx(tmp_path / "a.onnx")


@pytest.mark.parametrize("part", ["nibbles", "scales"])
def test_one_wrong_integer_is_found(part: str) -> None:
    weights = packed(BASE)
    name = "model.layers.1.mlp.down_proj.weight"
    weight = weights[name]
    assert isinstance(weight, Int4Weight)
    nibbles, scales = weight.nibbles.copy(), weight.scales.copy()
    if part == "nibbles":
        nibbles[3, 5] ^= 1
    else:
        scales[3, 1] *= -1
    with pytest.raises(ParityError, match="down_proj.weight is not what it was made from"):
        require_same_weights({**weights, name: Int4Weight(nibbles, scales)}, weights, "x")
    with pytest.raises(ParityError, match="other weights"):
        require_same_weights({k: v for k, v in weights.items() if k != name}, weights, "x")


@pytest.mark.slow
def test_the_shipped_bundle_transcodes_without_loss(tmp_path: Path) -> None:
    if not (SHIPPED / "model.onnx").is_file():
        pytest.skip(f"{SHIPPED} is not in this checkout")
    shipped = read_onnx(SHIPPED / "model.onnx")
    bundle_to_gguf(Bundle.open(SHIPPED), tmp_path / "model.gguf")
    student = read_gguf(tmp_path / "model.gguf")
    assert student.config == shipped.config
    assert student.labels[:2] == ("safe", "unsafe")
    require_same_weights(student.weights, shipped.weights, "model.gguf")
    gguf_to_onnx(tmp_path / "model.gguf", tmp_path / "model.onnx")
    require_same_weights(read_onnx(tmp_path / "model.onnx").weights, shipped.weights, "model.onnx")


def test_an_untrained_shape_is_written_in_every_container(tmp_path: Path) -> None:
    config = changed(vocab_size=600, max_tokens=64)
    sizes = write_untrained(config, tmp_path, seed=3, containers=("onnx", "gguf"))
    assert sizes == {name: (tmp_path / name).stat().st_size for name in ("model.onnx", "model.gguf")}
    weights = read_onnx(tmp_path / "model.onnx").weights
    require_same_weights(read_gguf(tmp_path / "model.gguf").weights, weights, "model.gguf")
    assert write_untrained(config, tmp_path / "again", seed=3, containers=("onnx",))["model.onnx"]
    assert (tmp_path / "again" / "model.onnx").read_bytes() == (tmp_path / "model.onnx").read_bytes()


def test_a_synthetic_tokenizer_has_the_size_asked_for() -> None:
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_str(synthetic_tokenizer(1000, seed=1))
    assert tokenizer.get_vocab_size() == 1000
    text = "Any text ☕ 12"
    assert tokenizer.decode(tokenizer.encode(text).ids) == text
