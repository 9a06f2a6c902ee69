"""How large a student of some shape is in every container, before anyone trains it: random weights, real files.

A size depends on the shape alone, so it can be known before a base model is chosen, pruned or trimmed.
"""

from __future__ import annotations

import json
import random
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import click
import numpy as np
from numpy.typing import NDArray

from convert.export.onnx_graph import StudentConfig, build_guard_graph
from convert.files import write_whole
from convert.quantize import Int4Weight, quantize_int4
from edgeguard.bench.memory import peak_bytes

__all__ = ["CONTAINERS", "measure_sizes", "synthetic_tokenizer", "write_untrained"]

CONTAINERS = ("onnx", "gguf", "standard")
SLICE_ELEMENTS = 1 << 24  # of float32 at a time
TOKEN_LENGTHS = range(2, 12)  # bytes of a made-up token; the mean is near that of a real vocabulary of 100,000


def write_untrained(
    config: StudentConfig,
    folder: Path,
    seed: int,
    containers: Sequence[str] = CONTAINERS,
    labels: Sequence[str] = (),
) -> dict[str, int]:
    """Write a student of random INT4 weights into ``folder``; returns the bytes of each file by name.

    ``containers``: some of ``onnx`` (``model.onnx``), ``gguf`` (``model.gguf``, with a made-up tokenizer of the size of
    the vocabulary) and ``standard`` (``model.standard.onnx``, needs optimum-onnx). ``labels``: names of the head's
    rows, made up where there are none. One byte a weight is held in memory, and a container on top. The same seed gives
    the same weights. Raises ValueError for an unknown container.
    """
    if unknown := set(containers) - set(CONTAINERS):
        raise ValueError(f"unknown containers {sorted(unknown)}. Known are {list(CONTAINERS)}.")
    weights = dict(_random_weights(config, np.random.default_rng(seed)))
    labels = labels or [f"label{i}" for i in range(config.head_size)]

    def onnx(path: Path) -> None:
        path.write_bytes(build_guard_graph(weights, config, labels=labels).SerializeToString())

    def gguf(path: Path) -> None:
        from convert.export.gguf import write_gguf

        tokenizer, about = synthetic_tokenizer(config.vocab_size, seed), {"name": "untrained"}
        write_gguf(weights, config, labels, tokenizer, path, control_ids=(), pre_tokenizer="gpt-2", about=about)

    def standard(path: Path) -> None:
        from convert.export.standard_onnx import build_standard_graph

        path.write_bytes(build_standard_graph(weights, config, labels=labels).SerializeToString())

    files: dict[str, tuple[str, Callable[[Path], None]]] = {
        "onnx": ("model.onnx", onnx),
        "gguf": ("model.gguf", gguf),
        "standard": ("model.standard.onnx", standard),
    }
    for container in containers:
        name, write = files[container]
        write_whole(folder / name, write)
    return {files[container][0]: (folder / files[container][0]).stat().st_size for container in containers}


def measure_sizes(shape: Mapping[str, Any]) -> dict[str, Any]:
    """Write every container of ``shape`` into a temporary folder; returns what they weigh.

    ``shape``: the fields of StudentConfig, ``vocab_size`` a list. Returns ``shape``, ``untrained`` (True: the
    weights are random), ``bytes`` by vocabulary and file, and ``peak_memory_bytes`` of this process.
    """
    sizes = {}
    for vocabulary in shape["vocab_size"]:
        config = StudentConfig(**{**shape, "vocab_size": vocabulary})
        with tempfile.TemporaryDirectory() as folder:
            sizes[str(vocabulary)] = write_untrained(config, Path(folder), seed=0)
        click.echo(f"vocabulary {vocabulary}: {sizes[str(vocabulary)]}", err=True)
    return {"shape": dict(shape), "untrained": True, "bytes": sizes, "peak_memory_bytes": peak_bytes()}


def synthetic_tokenizer(size: int, seed: int) -> str:
    """A ``tokenizer.json`` of a byte-level BPE with ``size`` tokens, of all bytes and made-up merges.

    Raises ValueError below the 256 bytes.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    if size < len(alphabet):
        raise ValueError(f"expected at least {len(alphabet)} tokens, one a byte, got {size}.")
    rng = random.Random(seed)
    tokens, known, merges = list(alphabet), set(alphabet), []
    while len(tokens) < size:
        left, right = rng.choice(tokens), rng.choice(tokens)
        if left + right not in known and len(left + right) in TOKEN_LENGTHS:
            tokens.append(left + right)
            known.add(left + right)
            merges.append((left, right))
    tokenizer = Tokenizer(models.BPE({token: i for i, token in enumerate(tokens)}, merges))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return json.dumps(json.loads(tokenizer.to_str()), ensure_ascii=False)


def _random_weights(
    config: StudentConfig, rng: np.random.Generator
) -> Iterator[tuple[str, Int4Weight | NDArray[np.float32]]]:
    """Normal weights whose outputs stay near 1, on the INT4 grid; norms of 1, as at the start of a training."""
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
        parts = [quantize_int4(rng.standard_normal((n, shape[1]), np.float32) * spread) for n in counts]
        yield name, Int4Weight.stack(parts)
