"""Shapes that can be measured without their weights: a bundle with random INT4 weights, made here, kept in the cache.

Speed, memory and size depend on the shape alone; the verdicts of such a bundle mean nothing, and its name and its base
model say so. Writing one needs the conversion layer (``convert``) of a checkout.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType

import numpy as np
from tokenizers import Tokenizer

from edgeguard.bench.records import BenchError
from edgeguard.bundle import TOKENIZER_NAME, sha256_of
from edgeguard.calibration import Calibration, Measured
from edgeguard.engines.int4_weights import StudentConfig
from edgeguard.engines.int8 import INT8_ENGINE
from edgeguard.manifest import (
    DEFAULT_OPERATING_POINT,
    INT4,
    MANIFEST_NAME,
    FileEntry,
    Manifest,
    OperatingPoint,
    Provenance,
    SelfTest,
    SelfTestVector,
)
from edgeguard.prompt import ROLES, TARGETS, Template
from edgeguard.taxonomy import HAZARDS, SAFE, UNSAFE

__all__ = ["SHAPES", "SHAPE_SEED", "UNTRAINED", "shape_folder_name", "write_shape"]

UNTRAINED = "none: random weights"  # the base model of such a bundle
SHAPE_SEED = 0  # one set of weights for everybody, whatever the seed of the texts
SPECIAL_IDS = 8  # ids at the end of the vocabulary that no text yields: start and end of turns
# Random logits: an engine that rounds otherwise moves a margin by as much as one unit. A broken one gives no number.
SELF_TEST_TOLERANCE = 20.0
SELF_TEST_TEXT = "How do I sharpen a kitchen knife?"
WRITER_VERSION = 3  # of this file: another one does not use what an older one left in the cache
HEAD = (SAFE, UNSAFE, *HAZARDS)

SHAPES: Mapping[str, StudentConfig] = MappingProxyType(
    {
        # Llama Guard 3-1B-INT4, arXiv 2411.17713
        "llama-guard-3-1b-int4": StudentConfig(
            vocab_size=128256,
            hidden_size=2048,
            intermediate_size=6400,
            num_layers=12,
            num_heads=32,
            num_kv_heads=8,
            head_dim=64,
            rms_norm_eps=1e-5,
            rope_theta=500_000.0,
            max_tokens=2048,
            head_size=len(HEAD),
        ),
        # Nobody's: to try the command in seconds
        "tiny": StudentConfig(
            vocab_size=512,
            hidden_size=64,
            intermediate_size=96,
            num_layers=3,
            num_heads=4,
            num_kv_heads=2,
            head_dim=16,
            rms_norm_eps=1e-5,
            rope_theta=10_000.0,
            max_tokens=128,
            head_size=len(HEAD),
        ),
    }
)


def shape_folder_name(name: str, seed: int) -> str:
    """The folder of the cache that holds this shape with this seed."""
    key = hashlib.sha256(f"{WRITER_VERSION} {SHAPES[name]} {seed}".encode()).hexdigest()[:16]
    return f"shape-{name}-{key}"


def write_shape(name: str, config: StudentConfig, folder: Path, seed: int) -> None:
    """Write an untrained bundle of the shape ``config`` into the empty ``folder``; the same seed, the same weights.

    It has the files of a trained one: INT4, and the graph and plan of INT8. One byte a weight is held in memory, and
    the file up to four times: below 4 GB for a 1B model. Raises BenchError without the conversion layer, ParityError
    when the INT8 graph computes something else.
    """
    try:
        from convert.export.int8_graph import INT8_FILES, INT8_GRAPH, export_int8
        from convert.export.onnx import run_onnx
        from convert.export.shape_sizes import synthetic_tokenizer, write_untrained
    except ImportError as error:
        raise BenchError(
            f"the shape {name} is written by the conversion layer: run from a checkout of edgeguard, with "
            f"'pip install -e .[convert]' ({error})."
        ) from error
    write_untrained(config, folder, seed, ["onnx"], HEAD)
    tokenizer_json = synthetic_tokenizer(config.vocab_size - SPECIAL_IDS, seed)
    (folder / TOKENIZER_NAME).write_text(tokenizer_json, encoding="utf-8")
    template = _template(config.vocab_size)
    tokenizer = Tokenizer.from_str(tokenizer_json)
    ids = np.array([template.encode(tokenizer, [("user", SELF_TEST_TEXT)], config.max_tokens).ids], np.int64)
    mask = np.ones_like(ids)
    logits = run_onnx(folder / "model.onnx", ids, mask)
    export_int8(folder / "model.onnx", logits, ids, mask, tolerance=SELF_TEST_TOLERANCE)
    vector = SelfTestVector(SELF_TEST_TEXT, None, ids.size, float(logits[0, 1] - logits[0, 0]))
    engines = {"model.onnx": "onnx", INT8_GRAPH: INT8_ENGINE}
    files = {
        file: FileEntry(sha256_of(folder / file), (folder / file).stat().st_size, engines.get(file))
        for file in ("model.onnx", *INT8_FILES, TOKENIZER_NAME)
    }
    manifest = _manifest(name, config.max_tokens, template, vector, files)
    (folder / MANIFEST_NAME).write_text(json.dumps(manifest.to_dict(), indent=1), encoding="utf-8")


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


def _manifest(
    name: str, max_tokens: int, template: Template, vector: SelfTestVector, files: Mapping[str, FileEntry]
) -> Manifest:
    """A manifest whose figures are empty where only training could fill them (it wants at least one row)."""
    nothing = Measured(n=1, f1=None, precision=None, recall=None, fpr=None)
    point = OperatingPoint(dict.fromkeys(TARGETS, 0.5), dict.fromkeys(TARGETS, nothing))
    return Manifest(
        name=f"{name}-untrained",
        version="0",
        license="CC0-1.0",
        base_model=UNTRAINED,
        teacher=None,
        languages=("en",),
        max_tokens=max_tokens,
        template=template,
        head=HEAD,
        calibration=dict.fromkeys(TARGETS, Calibration(temperature=1.0, bias=0.0)),
        operating_points={DEFAULT_OPERATING_POINT: point},
        files=files,
        quantization=INT4,
        self_test=SelfTest(SELF_TEST_TOLERANCE, (vector,)),
        provenance=Provenance(recipe=None, recipe_sha256=None, data_sha256=None, commit=None),
    )
