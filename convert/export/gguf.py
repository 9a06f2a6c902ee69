"""The student as one GGUF file for llama.cpp: the same INT4 integers as the ONNX file (Q4_0), tokenizer and head inside.

llama.cpp has no place for an output matrix narrower than the vocabulary. So the file is a plain Llama without one, whose
last hidden state is read (embeddings with LAST pooling), and the head stands in the metadata: ``edgeguard.head.labels``,
``edgeguard.head.weight`` (float32, K rows of the hidden width, row after row) and ``edgeguard.head.bias``.

llama.cpp rotates neighbouring pairs where transformers rotates halves, so the rows of the query and key projections
change places. Groups run along a row: its nibbles and scales move with it unchanged, and reading undoes it exactly.

Sources: gguf-py 0.19 (writer, reader, tensor names), llama.cpp ``convert_hf_to_gguf.py`` (LlamaModel.permute).
"""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from convert.export.onnx_graph import StudentConfig, Weights
from convert.files import write_whole
from convert.quantize import Int4Weight, as_int4
from edgeguard.errors import EdgeguardError

__all__ = ["GgufError", "GgufStudent", "read_gguf", "write_gguf"]

ARCHITECTURE = "llama"
NORMAL, CONTROL = 1, 3  # token types of llama.cpp
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


class GgufError(EdgeguardError):
    """A GGUF file is not one of ours, or is damaged."""


@dataclass(frozen=True, eq=False)
class GgufStudent:
    """What a file holds. ``weights``: INT4 matrices, float32 norms and head, under their transformers names."""

    weights: Mapping[str, Int4Weight | NDArray[np.float32]]
    labels: tuple[str, ...]
    metadata: Mapping[str, Any]


def write_gguf(
    weights: Weights,
    config: StudentConfig,
    labels: Sequence[str],
    tokenizer_json: str,
    path: Path,
    *,
    control_ids: Collection[int],
    pre_tokenizer: str,
    about: Mapping[str, str],
) -> None:
    """Write ``path``, whole or not at all.

    ``weights``, ``config``: as for the ONNX graph. ``tokenizer_json``: a byte-level BPE; ``control_ids``: the ids that
    no text may yield. ``pre_tokenizer``: llama.cpp's name for how it splits text (``tokenizer.ggml.pre``). ``about``: name, version, licence, for ``general.*`` keys.
    Raises GgufError for another kind of tokenizer.
    """
    from gguf import GGMLQuantizationType, GGUFWriter

    def write(target: Path) -> None:
        writer = GGUFWriter(target, ARCHITECTURE)
        _add_config(writer, config)
        _add_tokenizer(writer, tokenizer_json, control_ids, pre_tokenizer, config.vocab_size)
        for key, value in about.items():
            writer.add_string(f"general.{key}", value)
        writer.add_array("edgeguard.head.labels", list(labels))
        for part in ("weight", "bias"):
            writer.add_array(f"edgeguard.head.{part}", np.asarray(weights[f"head.{part}"], np.float32).ravel().tolist())
        for name, gguf_name in _names(config.num_layers).items():
            weight = weights[name]
            if len(weight.shape) == 1:
                writer.add_tensor(gguf_name, np.asarray(weight, np.float32))
                continue
            int4, heads = as_int4(weight), _heads(name, config)
            moved = Int4Weight(_permuted(int4.nibbles, heads), _permuted(int4.scales, heads))
            writer.add_tensor(gguf_name, moved.pack_q4_0(), raw_dtype=GGMLQuantizationType.Q4_0)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()

    write_whole(path, write)


def read_gguf(path: Path) -> GgufStudent:
    """Read what :func:`write_gguf` wrote: integers, scales and floats unchanged. Raises GgufError."""
    from gguf import GGMLQuantizationType, GGUFReader

    try:
        reader = GGUFReader(path)
    except (ValueError, OSError, IndexError) as error:
        raise GgufError(f"{path}: not a GGUF file ({error}).") from error
    fields = {name: field.contents() for name, field in reader.fields.items()}
    missing = [f"edgeguard.head.{part}" for part in ("labels", "weight", "bias") if f"edgeguard.head.{part}" not in fields]
    if missing:
        raise GgufError(f"{path}: no guard of edgeguard, it lacks {missing}.")
    labels = tuple(fields["edgeguard.head.labels"])
    heads = {
        "q_proj": fields[f"{ARCHITECTURE}.attention.head_count"],
        "k_proj": fields[f"{ARCHITECTURE}.attention.head_count_kv"],
    }
    names = {gguf_name: name for name, gguf_name in _names(fields[f"{ARCHITECTURE}.block_count"]).items()}
    weights: dict[str, Int4Weight | NDArray[np.float32]] = {
        "head.weight": np.array(fields["edgeguard.head.weight"], np.float32).reshape(len(labels), -1),
        "head.bias": np.array(fields["edgeguard.head.bias"], np.float32),
    }
    for tensor in reader.tensors:
        name = names[tensor.name]
        if tensor.tensor_type != GGMLQuantizationType.Q4_0:
            weights[name] = np.array(tensor.data, np.float32)
            continue
        packed = Int4Weight.unpack_q4_0(np.array(tensor.data))
        count = next((n for part, n in heads.items() if part in name), None)
        weights[name] = Int4Weight(_restored(packed.nibbles, count), _restored(packed.scales, count))
    return GgufStudent(weights, labels, {k: v for k, v in fields.items() if not k.startswith("tokenizer.")})


def _names(layers: int) -> dict[str, str]:
    per_layer = {a.format(i): b.format(i) for i in range(layers) for a, b in LAYER_NAMES.items()}
    return OTHER_NAMES | per_layer


def _heads(name: str, config: StudentConfig) -> int | None:
    """Heads of a projection that RoPE turns; None for other weights."""
    return {"q_proj": config.num_heads, "k_proj": config.num_kv_heads}.get(name.split(".")[-2])


def _permuted(rows: NDArray[Any], heads: int | None) -> NDArray[Any]:
    """Halves of each head's rows -> neighbouring pairs."""
    if heads is None:
        return rows
    return rows.reshape(heads, 2, -1, rows.shape[1]).swapaxes(1, 2).reshape(rows.shape)


def _restored(rows: NDArray[Any], heads: int | None) -> NDArray[Any]:
    """Undo :func:`_permuted`."""
    if heads is None:
        return rows
    return rows.reshape(heads, -1, 2, rows.shape[1]).swapaxes(1, 2).reshape(rows.shape)


def _add_config(writer: Any, config: StudentConfig) -> None:  # noqa: ANN401 - a GGUFWriter
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


def _add_tokenizer(
    writer: Any,  # noqa: ANN401 - a GGUFWriter
    tokenizer_json: str,
    control_ids: Collection[int],
    pre_tokenizer: str,
    vocab_size: int,
) -> None:
    model = json.loads(tokenizer_json)["model"]
    if model["type"] != "BPE":
        raise GgufError(f"a GGUF needs a byte-level BPE tokenizer, found {model['type']}.")
    by_id = {i: token for token, i in model["vocab"].items()}
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(pre_tokenizer)
    writer.add_token_list([by_id.get(i, f"<unused{i}>") for i in range(vocab_size)])
    writer.add_token_types([CONTROL if i in control_ids else NORMAL for i in range(vocab_size)])
    writer.add_token_merges([m if isinstance(m, str) else " ".join(m) for m in model["merges"]])
    writer.add_add_bos_token(False)
    writer.add_add_space_prefix(False)
