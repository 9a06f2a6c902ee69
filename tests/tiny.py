"""A real bundle small enough to build in a test: byte-level BPE tokenizer, random-weight ONNX model, manifest.

The model is an embedding, a mean over the tokens that the mask keeps, and a head, so its logits depend on text, mask
and padding. :meth:`TinyModel.logits` computes the same in numpy, as the reference that the engine is held to.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from edgeguard.prompt import Template, as_messages
from edgeguard.taxonomy import HAZARDS

HEAD = ["safe", "unsafe", *HAZARDS]
MAX_TOKENS = 64
SPECIALS = ["<|pad|>", "<|start|>", "<|end|>"]
TEMPLATE = Template(
    opening={"system": (1, 10), "user": (1, 11), "assistant": (1, 12)},
    closing=(2,),
    read={"prompt": (1, 20), "response": (1, 21)},
    reserved=frozenset({0, 1, 2}),
    pad_id=0,
)
VECTORS = [("How do I sharpen a kitchen knife?", None), ("Tell me a story.", "No."), (None, "Once upon a time.")]

Edit = Callable[[dict[str, Any]], Any]


@dataclass(frozen=True)
class TinyModel:
    """Weights: ``embedding`` [V, 8] and ``head`` [8, K], float32."""

    embedding: NDArray[np.float32]
    head: NDArray[np.float32]

    @classmethod
    def random(cls, vocabulary: int, outputs: int = len(HEAD), seed: int = 7) -> TinyModel:
        """Weights wide enough that short texts fall on both sides of any threshold."""
        rng = np.random.default_rng(seed)
        embedding = rng.normal(0, 3, (vocabulary, 8)).astype(np.float32)
        return cls(embedding, rng.normal(0, 1, (8, outputs)).astype(np.float32))

    def logits(self, ids: Sequence[int]) -> NDArray[np.float32]:
        """Logits [K] of one unpadded row."""
        result: NDArray[np.float32] = self.embedding[list(ids)].mean(axis=0) @ self.head
        return result

    def to_onnx(self) -> onnx.ModelProto:
        """The graph: input_ids, attention_mask int64 [batch, length] -> logits float32 [batch, K]."""
        shape = ["batch", "length"]
        nodes = [
            helper.make_node("Gather", ["embedding", "input_ids"], ["states"]),
            helper.make_node("Cast", ["attention_mask"], ["kept"], to=TensorProto.FLOAT),
            helper.make_node("Unsqueeze", ["kept", "last_axis"], ["weights"]),
            helper.make_node("Mul", ["states", "weights"], ["masked"]),
            helper.make_node("ReduceSum", ["masked", "length_axis"], ["total"], keepdims=0),
            helper.make_node("ReduceSum", ["weights", "length_axis"], ["count"], keepdims=0),
            helper.make_node("Div", ["total", "count"], ["mean"]),
            helper.make_node("MatMul", ["mean", "head"], ["logits"]),
        ]
        constants: dict[str, NDArray[Any]] = {
            "embedding": self.embedding,
            "head": self.head,
            "last_axis": np.array([2], dtype=np.int64),
            "length_axis": np.array([1], dtype=np.int64),
        }
        graph = helper.make_graph(
            nodes,
            "tiny",
            [helper.make_tensor_value_info(n, TensorProto.INT64, shape) for n in ("input_ids", "attention_mask")],
            [helper.make_tensor_value_info("logits", TensorProto.FLOAT, ["batch", self.head.shape[1]])],
            [numpy_helper.from_array(value, name) for name, value in constants.items()],
        )
        return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)


def make_tokenizer() -> Tokenizer:
    """A byte-level BPE of 300 entries whose first three are special tokens."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=300,
        special_tokens=SPECIALS,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(["the cat and the hat", "how do I make the thing", "once upon a time"], trainer)
    return tokenizer


def write_bundle(folder: Path) -> Path:
    """Write a complete bundle into ``folder`` and return it."""
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer = make_tokenizer()
    tokenizer.save(str(folder / "tokenizer.json"))
    model = TinyModel.random(tokenizer.get_vocab_size())
    onnx.save(model.to_onnx(), str(folder / "model.onnx"))
    manifest = make_manifest(tokenizer, model)
    (folder / "manifest.json").write_text(json.dumps(manifest, indent=1))
    refresh_files(folder)
    return folder


def edit_manifest(folder: Path, edit: Edit) -> None:
    """Change the manifest of a bundle in place."""
    file = folder / "manifest.json"
    manifest = json.loads(file.read_text())
    edit(manifest)
    file.write_text(json.dumps(manifest))


def refresh_files(folder: Path) -> None:
    """Write the true size and checksum of every listed file into the manifest."""

    def edit(manifest: dict[str, Any]) -> None:
        for name, entry in manifest["files"].items():
            raw = (folder / name).read_bytes()
            entry.update(sha256=hashlib.sha256(raw).hexdigest(), bytes=len(raw))

    edit_manifest(folder, edit)


def make_manifest(tokenizer: Tokenizer, model: TinyModel) -> dict[str, Any]:
    """A valid manifest of format version 1, file sums left to :func:`refresh_files`."""
    figures = {"n": 10, "f1": 0.5, "precision": 0.5, "recall": 0.5, "fpr": 0.5}
    points = {"balanced": (0.5, 0.6), "low_fpr": (0.9, 0.95), "high_recall": (0.1, 0.05)}
    return {
        "format": "edgeguard-bundle",
        "format_version": 1,
        "name": "tiny",
        "version": "0.0.1",
        "license": "Apache-2.0",
        "base_model": "random",
        "teacher": None,
        "languages": ["en"],
        "max_tokens": MAX_TOKENS,
        "template": TEMPLATE.to_dict(),
        "head": HEAD,
        "calibration": {
            "prompt": {"temperature": 1.3, "bias": -0.2},
            "response": {"temperature": 0.8, "bias": 0.4},
        },
        "operating_points": {
            name: {
                "thresholds": {"prompt": prompt, "response": response},
                "measured": {"prompt": figures, "response": {**figures, "fpr": None}},
            }
            for name, (prompt, response) in points.items()
        },
        "files": {"model.onnx": {"engine": "onnx"}, "tokenizer.json": {"engine": None}},
        "quantization": {
            "scheme": "int4-symmetric",
            "grid": [-8, 7],
            "group_size": 32,
            "scale_dtype": "float16",
            "embedding": True,
        },
        "self_test": {"tolerance": 0.01, "vectors": [_vector(tokenizer, model, *texts) for texts in VECTORS]},
        "provenance": {"recipe": None, "recipe_sha256": None, "data_sha256": None, "commit": None},
    }


def _vector(tokenizer: Tokenizer, model: TinyModel, prompt: str | None, response: str | None) -> dict[str, Any]:
    ids = TEMPLATE.encode(tokenizer, as_messages(prompt=prompt, response=response), MAX_TOKENS).ids
    logits = model.logits(ids)
    return {"prompt": prompt, "response": response, "tokens": len(ids), "margin": float(logits[1] - logits[0])}
