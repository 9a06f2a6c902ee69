"""Shapes that can be measured without their weights: a bundle with random INT4 weights, made here, kept in the cache.

Speed, memory and size depend on the shape alone; the verdicts of such a bundle mean nothing, and its name and its base
model say so. Writing one needs the conversion layer (``convert``) of a checkout.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

import numpy as np

from edgeguard.bench.records import BenchError
from edgeguard.bundle import TOKENIZER_NAME, sha256_of
from edgeguard.manifest import FORMAT, FORMAT_VERSION, MANIFEST_NAME
from edgeguard.prompt import ROLES, TARGETS, Template
from edgeguard.taxonomy import HAZARDS, SAFE, UNSAFE

if TYPE_CHECKING:
    from convert.export.onnx_graph import StudentConfig
    from convert.quantize import Int4Weight

__all__ = ["SHAPES", "SHAPE_SEED", "UNTRAINED", "Shape", "shape_folder_name", "write_shape"]

UNTRAINED = "none: random weights"  # the base model of such a bundle
SHAPE_SEED = 0  # one set of weights for everybody, whatever the seed of the texts
SPECIAL_IDS = 8  # ids at the end of the vocabulary that no text yields: start and end of turns
SLICE_ELEMENTS = 1 << 24  # of float32 at a time
# Random logits: an engine that rounds otherwise moves a margin by as much as one unit. A broken one gives no number.
SELF_TEST_TOLERANCE = 20.0
SELF_TEST_TEXT = "How do I sharpen a kitchen knife?"
WRITER_VERSION = 1  # of this file: another one does not use what an older one left in the cache


@dataclass(frozen=True)
class Shape:
    """A Llama with a head of K rows, K being the labels of the taxonomy; named as in transformers."""

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    rope_theta: float
    max_tokens: int
    source: str


SHAPES: Mapping[str, Shape] = MappingProxyType(
    {
        "llama-guard-3-1b-int4": Shape(
            vocab_size=128256,
            hidden_size=2048,
            intermediate_size=6400,
            num_layers=12,
            num_heads=32,
            num_kv_heads=8,
            head_dim=64,
            rope_theta=500_000.0,
            max_tokens=2048,
            source="arXiv 2411.17713: Llama Guard 3-1B-INT4",
        ),
        "tiny": Shape(
            vocab_size=512,
            hidden_size=64,
            intermediate_size=96,
            num_layers=3,
            num_heads=4,
            num_kv_heads=2,
            head_dim=16,
            rope_theta=10_000.0,
            max_tokens=128,
            source="nobody's: to try the command in seconds",
        ),
    }
)


def shape_folder_name(name: str, seed: int) -> str:
    """The folder of the cache that holds this shape with this seed."""
    key = hashlib.sha256(f"{WRITER_VERSION} {SHAPES[name]} {seed}".encode()).hexdigest()[:16]
    return f"shape-{name}-{key}"


def write_shape(name: str, shape: Shape, folder: Path, seed: int) -> None:
    """Write an untrained bundle of ``shape`` into the empty ``folder``. The same seed gives the same weights.

    One byte a weight is held in memory, and the file up to four times: below 4 GB for a 1B model. Raises BenchError
    without the conversion layer.
    """
    try:
        from convert.export.onnx import run_onnx
        from convert.export.onnx_graph import StudentConfig, build_guard_graph
        from convert.export.shape_sizes import synthetic_tokenizer
    except ImportError as error:
        raise BenchError(
            f"the shape {name} is written by the conversion layer: run from a checkout of edgeguard, with "
            f"'pip install -e .[convert]' ({error})."
        ) from error
    labels = [SAFE, UNSAFE, *HAZARDS]
    config = StudentConfig(
        vocab_size=shape.vocab_size,
        hidden_size=shape.hidden_size,
        intermediate_size=shape.intermediate_size,
        num_layers=shape.num_layers,
        num_heads=shape.num_heads,
        num_kv_heads=shape.num_kv_heads,
        head_dim=shape.head_dim,
        rms_norm_eps=1e-5,
        rope_theta=shape.rope_theta,
        max_tokens=shape.max_tokens,
        head_size=len(labels),
    )
    model = build_guard_graph(dict(_random_weights(config, seed)), config, labels=labels)
    (folder / "model.onnx").write_bytes(model.SerializeToString())
    del model
    tokenizer_json = synthetic_tokenizer(shape.vocab_size - SPECIAL_IDS, seed)
    (folder / TOKENIZER_NAME).write_text(tokenizer_json, encoding="utf-8")
    template = _template(shape.vocab_size)
    ids = _self_test_ids(template, tokenizer_json, shape.max_tokens)
    logits = run_onnx(folder / "model.onnx", np.array([ids]), np.ones((1, len(ids)), np.int64))[0]
    manifest = _manifest(name, shape, template, labels, len(ids), float(logits[1] - logits[0]), folder)
    (folder / MANIFEST_NAME).write_text(json.dumps(manifest, indent=1), encoding="utf-8")


def _random_weights(config: StudentConfig, seed: int) -> Iterator[tuple[str, Int4Weight | np.ndarray]]:
    """Normal weights whose outputs stay near 1, on the INT4 grid; norms of 1, as at the start of a training."""
    from convert.quantize import Int4Weight, quantize_int4

    rng = np.random.default_rng(seed)
    for name, shape in config.shapes().items():
        if len(shape) == 1:
            yield name, np.zeros(shape, np.float32) if name == "head.bias" else np.ones(shape, np.float32)
            continue
        spread = np.float32(1.0 if name == "model.embed_tokens.weight" else shape[1] ** -0.5)
        if name == "head.weight":
            yield name, rng.standard_normal(shape, np.float32) * spread
            continue
        rows = max(1, SLICE_ELEMENTS // shape[1])
        counts = [min(rows, shape[0] - start) for start in range(0, shape[0], rows)]
        parts = [quantize_int4(rng.standard_normal((count, shape[1]), np.float32) * spread) for count in counts]
        yield name, Int4Weight.stack(parts)


def _template(vocab_size: int) -> Template:
    """Turns between special ids, as the shipped bundle has them; a role and a target are one id each."""
    specials = list(range(vocab_size - SPECIAL_IDS, vocab_size))
    start, end, *rest = specials
    return Template(
        opening={role: (start, rest[i]) for i, role in enumerate(ROLES)},
        closing=(end,),
        read={target: (start, rest[len(ROLES) + i]) for i, target in enumerate(TARGETS)},
        reserved=frozenset(specials),
        pad_id=end,
    )


def _self_test_ids(template: Template, tokenizer_json: str, max_tokens: int) -> list[int]:
    from tokenizers import Tokenizer

    return template.encode(Tokenizer.from_str(tokenizer_json), [("user", SELF_TEST_TEXT)], max_tokens).ids


def _manifest(
    name: str, shape: Shape, template: Template, labels: list[str], tokens: int, margin: float, folder: Path
) -> dict[str, Any]:
    """A manifest whose figures are empty where only training could fill them (it wants at least one row)."""
    nothing = {"n": 1, "f1": None, "precision": None, "recall": None, "fpr": None}
    thresholds = dict.fromkeys(TARGETS, 0.5)
    point = {"thresholds": thresholds, "measured": dict.fromkeys(TARGETS, nothing)}
    return {
        "format": FORMAT,
        "format_version": FORMAT_VERSION,
        "name": f"{name}-untrained",
        "version": "0",
        "license": "CC0-1.0",
        "base_model": UNTRAINED,
        "teacher": None,
        "languages": ["en"],
        "max_tokens": shape.max_tokens,
        "template": template.to_dict(),
        "head": labels,
        "calibration": dict.fromkeys(TARGETS, {"temperature": 1.0, "bias": 0.0}),
        "operating_points": {"balanced": point},
        "files": {
            file: {"sha256": sha256_of(folder / file), "bytes": (folder / file).stat().st_size, "engine": engine}
            for file, engine in (("model.onnx", "onnx"), (TOKENIZER_NAME, None))
        },
        "quantization": {
            "scheme": "int4-symmetric",
            "grid": [-8, 7],
            "group_size": 32,
            "scale_dtype": "float16",
            "embedding": True,
        },
        "self_test": {
            "tolerance": SELF_TEST_TOLERANCE,
            "vectors": [{"prompt": SELF_TEST_TEXT, "response": None, "tokens": tokens, "margin": margin}],
        },
        "provenance": dict.fromkeys(("recipe", "recipe_sha256", "data_sha256", "commit")),
    }
