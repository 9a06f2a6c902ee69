"""Writing a guard as one GGUF file for llama.cpp: INT4 integers as Q4_0, tokenizer, head and manifest inside.

Names and order of the tensors: :mod:`edgeguard.engines.gguf_file`, which reads such files as well. A plain llama.cpp
reads the hidden state of a row's last token (embeddings with LAST pooling); the head's product is left to its caller.
The manifest, less its list of files, is the JSON text ``edgeguard.bundle``.

Sources: gguf-py 0.19 (writer), llama.cpp ``llama-vocab.cpp`` (how it splits text).
"""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from edgeguard.engines.gguf_file import ARCHITECTURE, GgufError, add_config, add_weights, finish
from edgeguard.engines.int4_weights import StudentConfig, Weights

__all__ = ["LLAMA_3_PATTERN", "add_tokenizer", "pre_tokenizer_name", "write_guard"]

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


def write_guard(
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
    """Write ``path``.

    ``weights``: INT4 matrices, float32 norms and head. ``tokenizer_json``: a byte-level BPE; ``control_ids``: the ids
    that no text may yield. ``pre_tokenizer``: llama.cpp's name for how it splits text, see :func:`pre_tokenizer_name`.
    ``about``: name, version, licence, for the keys ``general.*``. ``bundle``: the manifest; its ``files`` are left out,
    since this file is one of them. Raises GgufError for another kind of tokenizer, ValueError when the labels are not
    as many as the head's rows; ImportError without gguf.
    """
    from gguf import GGUFWriter, PoolingType

    if len(labels) != config.head_size:
        raise ValueError(f"expected {config.head_size} labels, one a row of the head, got {list(labels)}.")
    writer = GGUFWriter(path, ARCHITECTURE)
    add_config(writer, config)
    writer.add_pooling_type(PoolingType.LAST)  # what llama.cpp then does by itself when it is asked for embeddings
    add_tokenizer(writer, tokenizer_json, control_ids, pre_tokenizer, config.vocab_size)
    for key, value in about.items():
        writer.add_string(f"general.{key}", value)
    if bundle is not None:
        kept = {key: value for key, value in bundle.items() if key != "files"}
        writer.add_string("edgeguard.bundle", json.dumps(kept, ensure_ascii=False))
    writer.add_array("edgeguard.head.labels", list(labels))
    for part in ("weight", "bias"):
        writer.add_array(f"edgeguard.head.{part}", np.asarray(weights[f"head.{part}"], np.float32).ravel().tolist())
    add_weights(writer, weights, config)
    finish(writer)


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


def add_tokenizer(
    writer: Any,  # noqa: ANN401 - a GGUFWriter
    tokenizer_json: str,
    control_ids: Collection[int],
    pre_tokenizer: str,
    vocab_size: int,
) -> None:
    """The keys ``tokenizer.ggml.*`` of a byte-level BPE. Raises GgufError for another kind."""
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
