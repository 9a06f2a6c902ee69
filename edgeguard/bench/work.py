"""What one pass costs at least, counted from the model's shape.

A verdict is the head's logits of the last token. So in the last layer every token gives its key and value, and only the
last one goes on through query, output projection and MLP. Attention is causal: token i meets i keys. One
multiply-accumulate (MAC) is two floating-point operations. Norms, RoPE and activations are left out: they are below 1
%.
"""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import Any

from edgeguard.bench.records import ModelShape, Work
from edgeguard.errors import BundleError

__all__ = ["bundle_shape", "gguf_shape", "onnx_shape", "work_of"]

INT4_BITS = 4.5  # 4 a weight, and a 16-bit scale for each 32


def work_of(shape: ModelShape, tokens: int) -> Work:
    """The least that one text of ``tokens`` tokens costs."""
    hidden, query, kv = shape.hidden_size, shape.heads * shape.head_dim, shape.kv_heads * shape.head_dim
    key_value = 2 * hidden * kv
    rest = 2 * hidden * query + 3 * hidden * shape.intermediate_size
    pairs = tokens * (tokens + 1) // 2
    layer = tokens * (key_value + rest) + 2 * pairs * query
    last_layer = tokens * key_value + rest + 2 * tokens * query
    head = shape.head_size * hidden
    return Work(
        tokens=tokens,
        macs=(shape.layers - 1) * layer + last_layer + head,
        macs_all_tokens=shape.layers * layer + head,
        weight_bytes=int(shape.layers * (key_value + rest) * INT4_BITS / 8),
    )


def bundle_shape(folder: Path) -> ModelShape | None:
    """The shape of a bundle's model; None where no file tells it, or the library that reads it is not installed."""
    from edgeguard.bundle import Bundle

    bundle = Bundle.open(folder, verify=False)
    for engine, read in (("onnx", onnx_shape), ("gguf", gguf_shape)):
        with contextlib.suppress(BundleError, ImportError):
            if (found := read(bundle.file_for(engine))) is not None:
                return found
    return None


def onnx_shape(file: Path) -> ModelShape | None:
    """The shape of an INT4 graph as edgeguard writes it; None for another graph. ImportError without onnx."""
    from edgeguard.engines.gguf_source import TranscodeError, read_onnx

    try:
        config = read_onnx(file).config
    except TranscodeError:
        return None
    return ModelShape(
        layers=config.num_layers,
        hidden_size=config.hidden_size,
        intermediate_size=config.intermediate_size,
        heads=config.num_heads,
        kv_heads=config.num_kv_heads,
        head_dim=config.head_dim,
        vocabulary=config.vocab_size,
        head_size=config.head_size,
    )


def gguf_shape(file: Path) -> ModelShape | None:
    """The shape that a GGUF of a Llama states; None for another one. ImportError without gguf."""
    from gguf import GGUFReader

    fields: dict[str, Any] = GGUFReader(file).fields

    def number(key: str) -> int:
        return int(fields[f"llama.{key}"].contents())

    try:
        hidden, heads = number("embedding_length"), number("attention.head_count")
        width = number("attention.key_length") if "llama.attention.key_length" in fields else hidden // heads
        labels = fields.get("edgeguard.head.labels")
        return ModelShape(
            layers=number("block_count"),
            hidden_size=hidden,
            intermediate_size=number("feed_forward_length"),
            heads=heads,
            kv_heads=number("attention.head_count_kv"),
            head_dim=width,
            vocabulary=number("vocab_size"),
            head_size=len(labels.contents()) if labels is not None else number("vocab_size"),
        )
    except KeyError:
        return None
