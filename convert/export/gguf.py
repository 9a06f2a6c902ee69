"""The student as one GGUF file for llama.cpp: the same INT4 integers as in ONNX (Q4_0), tokenizer and head inside.

llama.cpp has no place for an output matrix narrower than the vocabulary. So the file is a plain Llama without one,
whose last hidden state is read (embeddings with LAST pooling), and the head stands in the metadata:
``edgeguard.head.labels``, ``edgeguard.head.weight`` (float32, K rows of the hidden width, row after row) and
``edgeguard.head.bias``. The bundle's manifest, less its list of files, is the JSON text ``edgeguard.bundle``.

llama.cpp rotates neighbouring pairs where transformers rotates halves, so the rows of the query and key projections
change places. Groups run along a row: its nibbles and scales move with it unchanged, and reading undoes it exactly.
The factors of a scaled RoPE are the tensor ``rope_freqs.weight``, one divisor a pair.

Sources: gguf-py 0.19 (writer, reader, tensor names), llama.cpp ``convert_hf_to_gguf.py`` (LlamaModel: permute,
generate_extra_tensors) and ``llama-vocab.cpp`` (how it splits text).
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

__all__ = [
    "GgufError",
    "GgufStudent",
    "permuted_rows",
    "pre_tokenizer_name",
    "read_gguf",
    "shortest",
    "tensor_names",
    "write_gguf",
]

ARCHITECTURE = "llama"
NORMAL, CONTROL, UNUSED = 1, 3, 5  # token types of llama.cpp
# How a byte-level tokenizer splits text before merging -> llama.cpp's name for it. A pattern is a regular expression,
# "digits" one digit at a time, "bytes" the splitting that comes with GPT-2's bytes.
LLAMA_3_PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
PRE_TOKENIZERS = {
    ("bytes",): "gpt-2",
    ("digits", "bytes"): "smollm",
    (LLAMA_3_PATTERN,): "llama-bpe",
    (LLAMA_3_PATTERN.replace("{1,3}", ""),): "qwen2",
}
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


class GgufError(EdgeguardError):
    """A GGUF file is not one of ours, or is damaged."""


@dataclass(frozen=True, eq=False)
class GgufStudent:
    """What a file holds. ``weights``: INT4 matrices, float32 norms and head, under their transformers names.

    ``metadata``: the file's keys and values, less the tokenizer's.
    """

    config: StudentConfig
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
    bundle: Mapping[str, Any] | None = None,
) -> None:
    """Write ``path``, whole or not at all.

    ``weights``, ``config``: as for the ONNX graph. ``tokenizer_json``: a byte-level BPE; ``control_ids``: the ids that
    no text may yield. ``pre_tokenizer``: llama.cpp's name for how it splits text, see :func:`pre_tokenizer_name`.
    ``about``: name, version, licence, for the keys ``general.*``. ``bundle``: the manifest; its ``files`` are left out,
    since this file is one of them. Raises GgufError for another kind of tokenizer, ValueError when the labels are not
    as many as the head's rows.
    """
    from gguf import GGMLQuantizationType, GGUFWriter

    if len(labels) != config.head_size:
        raise ValueError(f"expected {config.head_size} labels, one a row of the head, got {list(labels)}.")

    def write(target: Path) -> None:
        writer = GGUFWriter(target, ARCHITECTURE)
        _add_config(writer, config)
        _add_tokenizer(writer, tokenizer_json, control_ids, pre_tokenizer, config.vocab_size)
        for key, value in about.items():
            writer.add_string(f"general.{key}", value)
        if bundle is not None:
            kept = {key: value for key, value in bundle.items() if key != "files"}
            writer.add_string("edgeguard.bundle", json.dumps(kept, ensure_ascii=False))
        writer.add_array("edgeguard.head.labels", list(labels))
        for part in ("weight", "bias"):
            writer.add_array(f"edgeguard.head.{part}", np.asarray(weights[f"head.{part}"], np.float32).ravel().tolist())
        for name, gguf_name in tensor_names(config.num_layers).items():
            weight = weights[name]
            if len(weight.shape) == 1:
                writer.add_tensor(gguf_name, np.asarray(weight, np.float32))
                continue
            int4, heads = as_int4(weight), _heads(name, config)
            moved = Int4Weight(permuted_rows(int4.nibbles, heads), permuted_rows(int4.scales, heads))
            writer.add_tensor(gguf_name, moved.pack_q4_0(), raw_dtype=GGMLQuantizationType.Q4_0)
        if config.rope_factors is not None:
            writer.add_tensor(ROPE_FACTORS, np.array(config.rope_factors, np.float32))
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
        if tensor.tensor_type != GGMLQuantizationType.Q4_0:
            weights[name] = np.array(tensor.data, np.float32)
            continue
        packed = Int4Weight.unpack_q4_0(np.array(tensor.data))
        count = next((n for part, n in heads.items() if part in name), None)
        weights[name] = Int4Weight(_restored(packed.nibbles, count), _restored(packed.scales, count))
    config = _read_config(fields, head_size=len(labels), rope_factors=rope_factors)
    return GgufStudent(config, weights, labels, fields)


def pre_tokenizer_name(tokenizer_json: str) -> str:
    """What llama.cpp calls the way this tokenizer splits text before merging (``tokenizer.ggml.pre``).

    Raises GgufError for a way that is not known here: with a wrong one, llama.cpp would cut texts into other tokens.
    """
    data = json.loads(tokenizer_json)["pre_tokenizer"] or {}
    steps = data["pretokenizers"] if data.get("type") == "Sequence" else [data]
    found = tuple(step for step in map(_split_step, steps) if step)
    if found not in PRE_TOKENIZERS:
        raise GgufError(
            f"no name of llama.cpp is known for the pre-tokenizer {steps}. Known are {list(PRE_TOKENIZERS.values())}; "
            "find its name in llama.cpp's llama-vocab.cpp, and pass it."
        )
    return PRE_TOKENIZERS[found]


def _split_step(step: Mapping[str, Any]) -> str | None:
    """How one step splits, in the words of PRE_TOKENIZERS; None where it only writes bytes as characters."""
    kind = step.get("type")
    if kind == "ByteLevel" and not step.get("add_prefix_space"):
        return "bytes" if step.get("use_regex", True) else None
    if kind == "Digits" and step.get("individual_digits"):
        return "digits"
    if kind == "Split" and step.get("behavior") == "Isolated" and not step.get("invert"):
        return str(step["pattern"].get("Regex"))
    return str(kind)


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


def _read_config(fields: Mapping[str, Any], *, head_size: int, rope_factors: tuple[float, ...] | None) -> StudentConfig:
    """Undo :func:`_add_config`."""
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


def shortest(value: float) -> float:
    """The shortest decimal that is the same float32: 1e-05, where a file holds 9.99999974e-06."""
    return float(str(np.float32(value)))


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
    types = {i: NORMAL for i in by_id} | dict.fromkeys(control_ids, CONTROL)
    writer.add_token_types([types.get(i, UNUSED) for i in range(vocab_size)])
    writer.add_token_merges([m if isinstance(m, str) else " ".join(m) for m in model["merges"]])
    writer.add_add_bos_token(False)
    writer.add_add_space_prefix(False)
