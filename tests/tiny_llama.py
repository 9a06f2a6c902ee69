"""A real bundle of a tiny random Llama with its INT8 graph: what an export looks like, without training."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType

import numpy as np
from test_onnx_graph import LENGTHS, changed, random_weights, run, sample
from tiny import HEAD, MAX_TOKENS, TEMPLATE, VECTORS, TinyModel, make_manifest, make_tokenizer, refresh_files

from convert.export.int8_graph import INT8_FILES, INT8_GRAPH, export_int8
from convert.export.onnx import export_onnx
from convert.export.onnx_graph import build_guard_graph
from edgeguard.prompt import as_messages

__all__ = ["write_llama_bundle"]


def write_llama_bundle(folder: Path, seed: int = 0, shifts: Mapping[str, np.ndarray] = MappingProxyType({})) -> Path:
    """Write the bundle into ``folder`` and return it; its self-test holds the INT4 graph's margins.

    ``shifts``: how its INT8 graph is smoothed (:mod:`convert.smoothing`).
    """
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer = make_tokenizer()
    tokenizer.save(str(folder / "tokenizer.json"))
    config = changed(vocab_size=tokenizer.get_vocab_size(), max_tokens=MAX_TOKENS)
    weights = random_weights(config, seed)
    ids, mask = sample(LENGTHS, config)
    model = build_guard_graph(weights, config, labels=HEAD)
    reference = run(model, ids, mask)
    export_onnx(weights, config, folder / "model.onnx", reference, ids, mask, tolerance=0.1, labels=HEAD)
    export_int8(folder / "model.onnx", reference, ids, mask, tolerance=1.0, shifts=shifts)
    manifest = make_manifest(tokenizer, TinyModel.random(config.vocab_size))
    manifest["files"] |= {name: {"engine": "onnx-int8" if name == INT8_GRAPH else None} for name in INT8_FILES}
    vectors = []
    for prompt, response in VECTORS:
        row = TEMPLATE.encode(tokenizer, as_messages(prompt=prompt, response=response), MAX_TOKENS).ids
        logits = run(model, np.array([row]), np.ones((1, len(row)), np.int64))[0]
        margin = float(logits[1] - logits[0])
        vectors.append({"prompt": prompt, "response": response, "tokens": len(row), "margin": margin})
    manifest["self_test"] = {"tolerance": 0.5, "vectors": vectors}
    (folder / "manifest.json").write_text(json.dumps(manifest))
    refresh_files(folder)
    return folder
