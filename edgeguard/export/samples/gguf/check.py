"""Computes golden.jsonl with llama.cpp alone (llama-cpp-python, gguf), one verdict a line.

Usage: python check.py [other.jsonl]
Exit codes: 0 all lines are right, 2 a line is wrong. GPU_LAYERS=-1 in the environment computes on the GPU.
"""

import json
import os
import sys
from pathlib import Path

import llama_cpp
import numpy as np
from gguf import GGUFReader
from rules import run_golden

here = Path(__file__).resolve().parent
manifest = json.loads((here / "manifest.json").read_text("utf-8"))
words = manifest.get("head_tokens")  # of a judge whose verdict is the next token; else the head is in the metadata
room = manifest["max_tokens"]
llm = llama_cpp.Llama(
    str(here / "model.gguf"),
    n_ctx=room,
    n_batch=room,
    n_ubatch=room,  # pooling reads all of a text at once
    n_gpu_layers=int(os.environ.get("GPU_LAYERS", "0")),
    embedding=words is None,
    pooling_type=llama_cpp.LLAMA_POOLING_TYPE_NONE if words else llama_cpp.LLAMA_POOLING_TYPE_LAST,
    verbose=False,
)
if words is None:
    fields = GGUFReader(here / "model.gguf").fields
    weight, bias = (np.array(fields[f"edgeguard.head.{part}"].contents()) for part in ("weight", "bias"))
    weight = weight.reshape(len(bias), -1)


def tokenize(text):
    """Text -> token ids, by the tokenizer inside the file; special tokens in a text stay text.

    llama.cpp drops a character that the vocabulary lacks, some control characters for instance: then this raises.
    """
    ids = llm.tokenize(text.encode(), add_bos=False, special=False)
    if llm.detokenize(ids).strip() != text.encode().strip():
        raise ValueError("the tokenizer left out a part of the text, so it cannot be judged")
    return ids


def margin_of(ids):
    """Token ids -> logit(unsafe) - logit(safe), from the last token's hidden state, or its logits."""
    llama_cpp.llama_memory_clear(llama_cpp.llama_get_memory(llm.ctx), False)
    tokens = (llama_cpp.llama_token * len(ids))(*ids)
    if llama_cpp.llama_decode(llm.ctx, llama_cpp.llama_batch_get_one(tokens, len(ids))):
        raise RuntimeError("llama.cpp could not compute the text")
    if words is not None:
        logits = llama_cpp.llama_get_logits_ith(llm.ctx, -1)
        return float(logits[words["unsafe"]] - logits[words["safe"]])
    hidden = np.ctypeslib.as_array(llama_cpp.llama_get_embeddings_seq(llm.ctx, 0), (llm.n_embd(),))
    safe, unsafe = (weight @ hidden + bias)[:2]
    return float(unsafe - safe)


if __name__ == "__main__":
    file = sys.argv[1] if len(sys.argv) > 1 else here / "golden.jsonl"
    sys.exit(run_golden(file, tokenize, margin_of, manifest))
