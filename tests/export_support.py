"""What the tests of engines, exports and devices share: a tiny INT4 Llama as a bundle, made without torch."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from tiny import HEAD, VECTORS, edit_manifest, make_tokenizer, refresh_files, write_bundle

from convert.export.onnx_graph import build_guard_graph
from convert.quantize import quantize_int4
from edgeguard import Guard
from edgeguard.engines.int4_weights import Int4Weight, StudentConfig

__all__ = ["CONFIG", "MAX_TOKENS", "TOLERANCE", "read_lines", "tiny_weights", "write_int4_bundle", "write_lines"]

MAX_TOKENS = 96
CONFIG = StudentConfig(
    vocab_size=make_tokenizer().get_vocab_size(),
    hidden_size=64,
    intermediate_size=96,
    num_layers=2,
    num_heads=4,
    num_kv_heads=2,
    head_dim=16,
    rms_norm_eps=1e-5,
    rope_theta=100_000.0,
    max_tokens=MAX_TOKENS,
    head_size=len(HEAD),
)
# Both runtimes round activations to INT8, each in its own way: margins of random weights, which spread by several
# units, differ by a few tenths. A structural fault moves them by units.
TOLERANCE = 1.0


def tiny_weights(seed: int = 0, config: StudentConfig = CONFIG) -> dict[str, Int4Weight | NDArray[np.float32]]:
    """Matrices on the INT4 grid, norms and head of float32; every layer matters in the logits."""
    rng = np.random.default_rng(seed)
    weights: dict[str, Int4Weight | NDArray[np.float32]] = {}
    for name, shape in config.shapes().items():
        values = rng.uniform(0.5, 1.5, shape) if len(shape) == 1 else rng.standard_normal(shape) * 0.2
        weights[name] = quantize_int4(values) if name.startswith("model.") and len(shape) == 2 else np.float32(values)
    return weights


def write_int4_bundle(folder: Path, seed: int = 0, config: StudentConfig = CONFIG) -> Path:
    """A complete bundle with an INT4 Llama, whose self-test is what onnxruntime computes."""
    write_bundle(folder)
    graph = build_guard_graph(tiny_weights(seed, config), config, labels=HEAD)
    (folder / "model.onnx").write_bytes(graph.SerializeToString())
    edit_manifest(folder, lambda manifest: manifest.update(max_tokens=config.max_tokens))
    refresh_files(folder)
    guard = Guard.load(folder, engine="onnx", threads=1, self_test=False)
    margins = [guard.classify(prompt=prompt, response=response).margin for prompt, response in VECTORS]

    def edit(manifest: dict[str, Any]) -> None:
        manifest["self_test"]["tolerance"] = TOLERANCE
        for vector, margin in zip(manifest["self_test"]["vectors"], margins, strict=True):
            vector["margin"] = margin

    edit_manifest(folder, edit)
    return folder


def read_lines(file: Path) -> list[dict[str, Any]]:
    """The objects of a JSON Lines file."""
    return [json.loads(line) for line in file.read_text(encoding="utf-8").split("\n") if line]


def write_lines(file: Path, lines: list[dict[str, Any]]) -> None:
    """Write them."""
    file.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
