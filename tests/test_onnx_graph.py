"""The ONNX student against transformers' Llama on tiny random models, and the gate before a file is kept."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

pytest.importorskip("onnx", reason="onnx is not installed: pip install 'edgeguard-runtime[convert]'")
torch = pytest.importorskip("torch", reason="torch is not installed: pip install 'edgeguard-runtime[convert]'")
transformers = pytest.importorskip("transformers", reason="transformers is not installed")

import onnx  # noqa: E402
import onnxruntime  # noqa: E402

from convert.export import onnx as export  # noqa: E402
from convert.export.onnx_graph import LABELS_KEY, StudentConfig, build_guard_graph  # noqa: E402
from convert.quantize import quantize_int4  # noqa: E402
from edgeguard.errors import ParityError  # noqa: E402

Weights = dict[str, NDArray[Any]]
BASE = StudentConfig(
    vocab_size=90,
    hidden_size=64,
    intermediate_size=96,
    num_layers=3,
    num_heads=4,
    num_kv_heads=2,
    head_dim=16,
    rms_norm_eps=1e-5,
    rope_theta=100_000.0,
    max_tokens=40,
    head_size=16,
)
LENGTHS = (12, 1, 7, 2, 11)
STRUCTURE_TOLERANCE = 1e-4  # the same arithmetic in float32; differences seen are about 1e-6


def changed(**fields: int) -> StudentConfig:
    return StudentConfig(**{**BASE.__dict__, **fields})


def random_weights(config: StudentConfig, seed: int = 0) -> Weights:
    """Values large enough that every layer matters in the logits."""
    rng = np.random.default_rng(seed)
    weights: Weights = {}
    for name, shape in config.shapes().items():
        values = rng.uniform(0.5, 1.5, shape) if len(shape) == 1 else rng.standard_normal(shape) * 0.2
        weights[name] = values.astype(np.float32)
    return weights


def rounded(weights: Weights) -> Weights:
    """The values that the INT4 file holds: embedding and linears on the grid, head and norms as they were."""
    on_grid = {name for name, value in weights.items() if value.ndim == 2 and name.startswith("model.")}
    return {name: quantize_int4(value).dequantize() if name in on_grid else value for name, value in weights.items()}


def torch_logits(weights: Weights, config: StudentConfig, ids: NDArray[Any], mask: NDArray[Any]) -> NDArray[np.float32]:
    llama = transformers.LlamaConfig(
        vocab_size=config.vocab_size,
        hidden_size=config.hidden_size,
        intermediate_size=config.intermediate_size,
        num_hidden_layers=config.num_layers,
        num_attention_heads=config.num_heads,
        num_key_value_heads=config.num_kv_heads,
        head_dim=config.head_dim,
        rms_norm_eps=config.rms_norm_eps,
        rope_theta=config.rope_theta,
        max_position_embeddings=config.max_tokens,
    )
    model = transformers.LlamaModel(llama).eval()
    tensors = {name: torch.from_numpy(value) for name, value in weights.items()}
    model.load_state_dict({name.removeprefix("model."): t for name, t in tensors.items() if name.startswith("model.")})
    with torch.no_grad():
        hidden = model(torch.from_numpy(ids), attention_mask=torch.from_numpy(mask)).last_hidden_state
        last = hidden[torch.arange(len(ids)), torch.from_numpy(mask).sum(1) - 1]
        logits: NDArray[np.float32] = (last @ tensors["head.weight"].T + tensors["head.bias"]).numpy()
    return logits


def sample(lengths: tuple[int, ...], config: StudentConfig = BASE) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Rows of these lengths; what stands under the padding is random, since nothing may read it."""
    ids = np.random.default_rng(1).integers(0, config.vocab_size, (len(lengths), max(lengths)))
    return ids, (np.arange(max(lengths)) < np.array(lengths)[:, None]).astype(np.int64)


def run(model: onnx.ModelProto, ids: NDArray[Any], mask: NDArray[Any]) -> NDArray[np.float32]:
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    logits: NDArray[np.float32] = session.run(["logits"], {"input_ids": ids, "attention_mask": mask})[0]
    return logits


SHAPES = {
    "grouped heads": BASE,
    "one key-value head": changed(num_kv_heads=1),
    "as many key-value heads": changed(num_kv_heads=4),
    "heads wider than hidden": changed(num_heads=6, num_kv_heads=3, head_dim=32),
    "one layer": changed(num_layers=1),
}


@pytest.mark.parametrize("config", SHAPES.values(), ids=SHAPES.keys())
@pytest.mark.parametrize("int4", [False, True], ids=["float32", "int4"])
def test_graph_equals_torch(config: StudentConfig, int4: bool) -> None:
    weights = random_weights(config)
    ids, mask = sample(LENGTHS)
    logits = run(build_guard_graph(weights, config, int4=int4, accuracy_level=1), ids, mask)
    expected = torch_logits(rounded(weights) if int4 else weights, config, ids, mask)
    assert logits.shape == (len(LENGTHS), config.head_size)
    assert np.abs(logits - expected).max() < STRUCTURE_TOLERANCE


@pytest.mark.parametrize("length", [1, 2, 31, 40])
def test_every_length_up_to_the_limit(length: int) -> None:
    weights = random_weights(BASE)
    ids, mask = sample((length,))
    logits = run(build_guard_graph(weights, BASE, accuracy_level=1), ids, mask)
    assert np.abs(logits - torch_logits(rounded(weights), BASE, ids, mask)).max() < STRUCTURE_TOLERANCE


def test_int8_activations_stay_near() -> None:
    weights = random_weights(BASE)
    ids, mask = sample(LENGTHS)
    difference = np.abs(
        run(build_guard_graph(weights, BASE), ids, mask) - torch_logits(rounded(weights), BASE, ids, mask)
    )
    assert 1e-4 < difference.max() < 0.3  # the level 4 kernel is in use, and it handles scales of both signs


def test_padding_and_neighbours_do_not_matter() -> None:
    model = build_guard_graph(random_weights(BASE), BASE, accuracy_level=1)
    ids, mask = sample(LENGTHS)
    together = run(model, ids, mask)
    for row, length in enumerate(LENGTHS):
        alone = run(model, ids[row : row + 1, :length], mask[row : row + 1, :length])
        assert np.abs(alone[0] - together[row]).max() < STRUCTURE_TOLERANCE


def test_the_file_holds_four_bits_and_a_half_a_weight() -> None:
    config = changed(vocab_size=4096)
    model = build_guard_graph(random_weights(config), config)
    quantized = sum(int(np.prod(s)) for n, s in config.shapes().items() if len(s) == 2 and n != "head.weight")
    stored = [t for t in model.graph.initializer if t.name.endswith((".int4", ".scales"))]
    assert sum(len(t.raw_data) for t in stored) == quantized * 18 // 32
    assert len(model.SerializeToString()) < quantized * 18 // 32 + 40_000


def test_equal_weights_give_equal_bytes() -> None:
    first, second = (build_guard_graph(random_weights(BASE), BASE).SerializeToString() for _ in range(2))
    assert first == second


def test_labels_stand_in_the_metadata() -> None:
    labels = [f"label{i}" for i in range(BASE.head_size)]
    model = build_guard_graph(random_weights(BASE), BASE, labels=labels)
    assert [(prop.key, json.loads(prop.value)) for prop in model.metadata_props] == [(LABELS_KEY, labels)]
    assert not build_guard_graph(random_weights(BASE), BASE).metadata_props
    with pytest.raises(ValueError, match="expected 16 labels"):
        build_guard_graph(random_weights(BASE), BASE, labels=labels[1:])


def drop(weights: Weights) -> None:
    del weights["head.bias"]


def add_layer(weights: Weights) -> None:
    weights["model.layers.3.mlp.up_proj.weight"] = weights["model.layers.2.mlp.up_proj.weight"]


def transpose(weights: Weights) -> None:
    weights["model.layers.1.mlp.down_proj.weight"] = weights["model.layers.1.mlp.down_proj.weight"].T


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (drop, r"1 missing \['head.bias'\]"),
        (add_layer, r"1 unknown \['model.layers.3.mlp.up_proj.weight'\]"),
        (transpose, r"down_proj.weight: expected the shape \(64, 96\), found \(96, 64\)"),
    ],
)
def test_weights_that_do_not_fit_are_refused(spoil: Callable[[Weights], None], message: str) -> None:
    weights = random_weights(BASE)
    spoil(weights)
    with pytest.raises(ValueError, match=message):
        build_guard_graph(weights, BASE)


def test_config_that_does_not_fit_is_refused() -> None:
    with pytest.raises(ValueError, match="4 / 3 heads"):
        changed(num_kv_heads=3)


def test_export_saves_what_it_checked(tmp_path: Path) -> None:
    weights = random_weights(BASE)
    ids, mask = sample(LENGTHS * 4)  # more than one batch
    expected = torch_logits(rounded(weights), BASE, ids, mask)
    path = tmp_path / "new" / "model.onnx"
    figures = export.export_onnx(weights, BASE, path, expected, ids, mask, tolerance=0.3)
    assert figures["n"] == 20
    assert 0 < figures["mean_abs_diff"] <= figures["max_abs_diff"] <= 0.3
    assert [p.name for p in path.parent.iterdir()] == ["model.onnx"]
    difference = np.abs(export.run_onnx(path, ids, mask) - expected)
    assert difference.max() == pytest.approx(figures["max_abs_diff"])


def test_a_wrong_weight_leaves_no_file(tmp_path: Path) -> None:
    weights = random_weights(BASE)
    ids, mask = sample(LENGTHS)
    expected = torch_logits(rounded(weights), BASE, ids, mask)
    weights["model.layers.1.self_attn.k_proj.weight"] = -weights["model.layers.1.self_attn.k_proj.weight"]
    with pytest.raises(ParityError, match=r"row \d+, label \d+ .* difference of .* tolerance of 0.3"):
        export.export_onnx(weights, BASE, tmp_path / "model.onnx", expected, ids, mask, tolerance=0.3)
    assert list(tmp_path.iterdir()) == []


def test_comparison_names_the_worst_value() -> None:
    reference = np.zeros((3, 4), dtype=np.float32)
    logits = reference.copy()
    logits[2, 1], logits[0, 3] = 0.5, 0.2
    assert export.compare_logits(logits, reference, tolerance=0.5, name="m")["max_abs_diff"] == 0.5
    with pytest.raises(
        ParityError, match=r"row 2, label 1 is 0.5000 where the model gives 0.0000, a difference of 0.5"
    ):
        export.compare_logits(logits, reference, tolerance=0.4, name="m")
    logits[1, 0] = np.nan
    with pytest.raises(ParityError, match="row 1, label 0 is nan"):
        export.compare_logits(logits, reference, tolerance=10.0, name="m")
    with pytest.raises(ValueError, match="the reference has"):
        export.compare_logits(logits, reference[:2], tolerance=1.0, name="m")


@pytest.mark.parametrize("mask", [[[0, 1, 1]], [[0, 0, 0]], [[1, 0, 1]]])
def test_samples_padded_elsewhere_are_refused(mask: list[list[int]], tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="padding on the right"):
        export.run_onnx(tmp_path / "none.onnx", np.zeros((1, 3), dtype=np.int64), np.array(mask))
