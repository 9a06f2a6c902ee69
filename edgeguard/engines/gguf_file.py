"""GGUF files of a guard: a plain Llama in INT4 (Q4_0), its head in the metadata. Names, order of rows, reading.

llama.cpp has no place for an output matrix narrower than the vocabulary, so the head stands in the metadata:
``edgeguard.head.labels``, ``edgeguard.head.weight`` (float32, K rows of the hidden width, row after row) and
``edgeguard.head.bias``. The conversion layer writes such files (``convert/export/gguf.py``), with the tokenizer inside.

llama.cpp rotates neighbouring pairs where transformers rotates halves, so the rows of the query and key projections
change places. Groups run along a row: its nibbles and scales move with it unchanged, and reading undoes it exactly.
The factors of a scaled RoPE are the tensor ``rope_freqs.weight``, one divisor a pair.

Sources: gguf-py 0.19 (writer, reader, tensor names), llama.cpp ``convert_hf_to_gguf.py`` (LlamaModel: permute,
generate_extra_tensors).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgeguard.engines.int4_weights import Int4Weight, StudentConfig, Weights, check_weights, shortest
from edgeguard.errors import EngineError

__all__ = [
    "ARCHITECTURE",
    "GgufError",
    "GgufStudent",
    "add_config",
    "add_weights",
    "finish",
    "permuted_rows",
    "read_gguf",
    "tensor_names",
]

ARCHITECTURE = "llama"
# transformers name -> GGUF name, {} the layer
LAYER_NAMES = {
    "model.layers.{}.input_layernorm.weight": "blk.{}.attn_norm.weight",
    "model.layers.{}.self_attn.q_proj.weight": "blk.{}.attn_q.weight",
    "model.layers.{}.self_attn.k_proj.weight": "blk.{}.attn_k.weight",
    "model.layers.{}.self_attn.v_proj.weight": "blk.{}.attn_v.weight",
    "model.layers.{}.self_attn.o_proj.weight": "blk.{}.attn_output.weight",
    "model.layers.{}.post_attention_layernorm.weight": "blk.{}.ffn_norm.weight",
    "model.layers.{}.mlp.gate_proj.weight": "blk.{}.ffn_gate.weight",
    "model.layers.{}.mlp.up_proj.weight": "blk.{}.ffn_up.weight",
    "model.layers.{}.mlp.down_proj.weight": "blk.{}.ffn_down.weight",
}
OTHER_NAMES = {"model.embed_tokens.weight": "token_embd.weight", "model.norm.weight": "output_norm.weight"}
ROPE_FACTORS = "rope_freqs.weight"


class GgufError(EngineError):
    """A GGUF file is not one of ours, is damaged, or is refused by llama.cpp."""


@dataclass(frozen=True, eq=False)
class GgufStudent:
    """What a file holds. ``weights``: INT4 matrices, float32 norms and head, under their transformers names.

    ``metadata``: the file's keys and values, less the tokenizer's.
    """

    config: StudentConfig
    weights: Mapping[str, Int4Weight | NDArray[np.float32]]
    labels: tuple[str, ...]
    metadata: Mapping[str, Any]


def read_gguf(path: Path) -> GgufStudent:
    """Read what the conversion layer wrote: integers, scales and floats unchanged. Raises GgufError."""
    from gguf import GGUFReader

    try:
        reader = GGUFReader(path)
    except (ValueError, OSError, IndexError) as error:
        raise GgufError(f"{path}: not a GGUF file ({error}).") from error
    try:
        return _student(reader, path)
    except (ValueError, TypeError, LookupError) as error:  # a key or tensor that is missing, or of another shape
        raise GgufError(f"{path}: no guard of edgeguard: {error!r}.") from error


def _student(reader: Any, path: Path) -> GgufStudent:  # noqa: ANN401 - a GGUFReader
    # The tokenizer's lists are long, slow to take out, and llama.cpp's business.
    fields = {name: field.contents() for name, field in reader.fields.items() if not name.startswith("tokenizer.")}
    missing = [
        f"edgeguard.head.{part}" for part in ("labels", "weight", "bias") if f"edgeguard.head.{part}" not in fields
    ]
    if missing:
        raise GgufError(f"{path}: no guard of edgeguard, it lacks {missing}.")
    labels = tuple(fields["edgeguard.head.labels"])
    heads = {
        "q_proj": fields[f"{ARCHITECTURE}.attention.head_count"],
        "k_proj": fields[f"{ARCHITECTURE}.attention.head_count_kv"],
    }
    names = {gguf_name: name for name, gguf_name in tensor_names(fields[f"{ARCHITECTURE}.block_count"]).items()}
    weights: dict[str, Int4Weight | NDArray[np.float32]] = {
        "head.weight": np.array(fields["edgeguard.head.weight"], np.float32).reshape(len(labels), -1),
        "head.bias": np.array(fields["edgeguard.head.bias"], np.float32),
    }
    rope_factors = None
    for tensor in reader.tensors:
        if tensor.name == ROPE_FACTORS:
            rope_factors = tuple(tensor.data.tolist())
            continue
        name = names[tensor.name]
        if tensor.tensor_type.name == "F32":
            weights[name] = np.array(tensor.data)
            continue
        if tensor.tensor_type.name != "Q4_0":
            raise GgufError(f"{path}: {tensor.name} is {tensor.tensor_type.name}, expected F32 or Q4_0.")
        packed = Int4Weight.unpack_q4_0(np.array(tensor.data))
        count = next((n for part, n in heads.items() if part in name), None)
        weights[name] = Int4Weight(_restored(packed.nibbles, count), _restored(packed.scales, count))
    config = _read_config(fields, head_size=len(labels), rope_factors=rope_factors)
    check_weights(weights, config)
    return GgufStudent(config, weights, labels, fields)


def tensor_names(layers: int) -> dict[str, str]:
    """Transformers name -> GGUF name of every tensor of a body with so many layers."""
    per_layer = {a.format(i): b.format(i) for i in range(layers) for a, b in LAYER_NAMES.items()}
    return OTHER_NAMES | per_layer


def _heads(name: str, config: StudentConfig) -> int | None:
    """Heads of a projection that RoPE turns; None for other weights."""
    return {"q_proj": config.num_heads, "k_proj": config.num_kv_heads}.get(name.split(".")[-2])


def permuted_rows(rows: NDArray[Any], heads: int | None) -> NDArray[Any]:
    """Halves of each head's rows -> neighbouring pairs."""
    if heads is None:
        return rows
    permuted: NDArray[Any] = rows.reshape(heads, 2, -1, rows.shape[1]).swapaxes(1, 2).reshape(rows.shape)
    return permuted


def _restored(rows: NDArray[Any], heads: int | None) -> NDArray[Any]:
    """Undo :func:`permuted_rows`."""
    if heads is None:
        return rows
    restored: NDArray[Any] = rows.reshape(heads, -1, 2, rows.shape[1]).swapaxes(1, 2).reshape(rows.shape)
    return restored


def add_config(writer: Any, config: StudentConfig) -> None:  # noqa: ANN401 - a GGUFWriter
    """The keys ``llama.*`` of a shape."""
    writer.add_block_count(config.num_layers)
    writer.add_context_length(config.max_tokens)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_heads)
    writer.add_head_count_kv(config.num_kv_heads)
    writer.add_key_length(config.head_dim)
    writer.add_value_length(config.head_dim)
    writer.add_rope_dimension_count(config.head_dim)
    writer.add_rope_freq_base(config.rope_theta)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_vocab_size(config.vocab_size)
    writer.add_file_type(2)  # mostly Q4_0


def add_weights(writer: Any, weights: Weights, config: StudentConfig) -> None:  # noqa: ANN401 - a GGUFWriter
    """All tensors of a body, under llama.cpp's names and in its order of rows: INT4 as Q4_0, arrays as float32."""
    from gguf import GGMLQuantizationType

    for name, gguf_name in tensor_names(config.num_layers).items():
        weight, heads = weights[name], _heads(name, config)
        if isinstance(weight, Int4Weight):
            moved = Int4Weight(permuted_rows(weight.nibbles, heads), permuted_rows(weight.scales, heads))
            writer.add_tensor(gguf_name, moved.pack_q4_0(), raw_dtype=GGMLQuantizationType.Q4_0)
        else:
            writer.add_tensor(gguf_name, permuted_rows(np.asarray(weight, np.float32), heads))
    if config.rope_factors is not None:
        writer.add_tensor(ROPE_FACTORS, np.array(config.rope_factors, np.float32))


def finish(writer: Any) -> None:  # noqa: ANN401 - a GGUFWriter
    """Write all that was added."""
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _read_config(fields: Mapping[str, Any], *, head_size: int, rope_factors: tuple[float, ...] | None) -> StudentConfig:
    """Undo :func:`add_config`."""
    return StudentConfig(
        vocab_size=fields[f"{ARCHITECTURE}.vocab_size"],
        hidden_size=fields[f"{ARCHITECTURE}.embedding_length"],
        intermediate_size=fields[f"{ARCHITECTURE}.feed_forward_length"],
        num_layers=fields[f"{ARCHITECTURE}.block_count"],
        num_heads=fields[f"{ARCHITECTURE}.attention.head_count"],
        num_kv_heads=fields[f"{ARCHITECTURE}.attention.head_count_kv"],
        head_dim=fields[f"{ARCHITECTURE}.attention.key_length"],
        rms_norm_eps=shortest(fields[f"{ARCHITECTURE}.attention.layer_norm_rms_epsilon"]),
        rope_theta=shortest(fields[f"{ARCHITECTURE}.rope.freq_base"]),
        max_tokens=fields[f"{ARCHITECTURE}.context_length"],
        head_size=head_size,
        rope_factors=rope_factors,
    )
