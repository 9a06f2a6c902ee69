"""Vocabulary trimming: drop the tokens that a guard's texts never use, from tokenizer and embedding together.

The tokenizer must be a byte-level BPE. All single bytes stay, so any text still tokenizes and decodes to what it
decoded to before. A token that is kept keeps every token that merging goes through on the way to it; so whatever the
given texts were cut into, they are cut into still, and other texts take a few tokens more.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from convert.files import write_whole
from edgeguard.errors import EdgeguardError

__all__ = ["TokenCost", "TrimError", "token_cost", "trim_base", "trim_tokenizer"]


class TrimError(EdgeguardError):
    """The vocabulary cannot be trimmed."""


@dataclass(frozen=True)
class TokenCost:
    """Tokens of a number of ``texts`` before and after trimming."""

    texts: int
    before: int
    after: int

    @property
    def per_text(self) -> float:
        """Mean number of tokens that a text takes more."""
        return (self.after - self.before) / self.texts

    @property
    def share(self) -> float:
        """Share of tokens more: 0.01 is one in a hundred."""
        return self.after / self.before - 1


def trim_tokenizer(tokenizer_json: str, texts: Iterable[str], *, min_count: int) -> tuple[str, list[int]]:
    """A tokenizer that has only the tokens which ``texts`` use at least ``min_count`` times, and what these need.

    Returns the new ``tokenizer.json`` and, for each of its ids, the old id. Raises TrimError for another kind of
    tokenizer.
    """
    from tokenizers import Tokenizer

    data = json.loads(tokenizer_json)
    model = data["model"]
    if model["type"] != "BPE":
        raise TrimError(f"only a byte-level BPE can be trimmed, this is a {model['type']}.")
    vocab: dict[str, int] = model["vocab"]
    merges = [tuple(m.split(" ")) if isinstance(m, str) else tuple(m) for m in model["merges"]]
    ranks = {pair: rank for rank, pair in enumerate(merges)}
    tokenizer = Tokenizer.from_str(tokenizer_json)
    used: Counter[int] = Counter()
    for text in texts:
        used.update(tokenizer.encode(text, add_special_tokens=False).ids)
    # Added tokens stand in the vocabulary (SmolLM2) or after it (Llama 3).
    ids = vocab | {token["content"]: token["id"] for token in data["added_tokens"]}
    by_id = {i: token for token, i in ids.items()}
    kept = {token for token in vocab if len(token) == 1} | {token["content"] for token in data["added_tokens"]}
    for i, count in used.items():
        if count >= min_count and by_id[i] not in kept:
            kept |= _path(by_id[i], ranks)
    if unk := model.get("unk_token"):
        kept.add(unk)
    old_ids = sorted(ids[token] for token in kept)
    new_ids = {by_id[old]: new for new, old in enumerate(old_ids)}
    model["vocab"] = {token: i for token, i in new_ids.items() if token in vocab}
    model["merges"] = [list(pair) for pair in merges if {*pair, "".join(pair)} <= kept]
    for token in data["added_tokens"]:
        token["id"] = new_ids[token["content"]]
    _renumber_post_processor(data.get("post_processor"), new_ids)
    return json.dumps(data, ensure_ascii=False), old_ids


def _path(token: str, ranks: dict[tuple[str, ...], int]) -> set[str]:
    """``token`` and everything that byte pair encoding merges on the way to it."""
    parts = list(token)
    seen = {token}
    while len(parts) > 1:
        pairs = [(ranks.get((a, b), len(ranks)), i) for i, (a, b) in enumerate(zip(parts, parts[1:], strict=False))]
        rank, i = min(pairs)
        if rank == len(ranks):
            break  # a token that no merge leads to: an added one
        parts[i : i + 2] = [parts[i] + parts[i + 1]]
        seen.add(parts[i])
    return seen


def _renumber_post_processor(processor: dict[str, Any] | None, new_ids: dict[str, int]) -> None:
    """Special tokens that a post-processor adds have their ids spelt out."""
    if processor and processor.get("type") == "Sequence":
        for part in processor["processors"]:
            _renumber_post_processor(part, new_ids)
    elif processor and "special_tokens" in processor:
        for name, entry in processor["special_tokens"].items():
            entry["ids"] = [new_ids[name]]


def token_cost(before: str, after: str, texts: Sequence[str]) -> TokenCost:
    """What ``texts`` take with the tokenizer ``before`` and with ``after`` (contents of two ``tokenizer.json``).

    Raises ValueError without texts, or when they have no token at all.
    """
    from tokenizers import Tokenizer

    counts = [
        sum(len(e.ids) for e in Tokenizer.from_str(t).encode_batch(list(texts), add_special_tokens=False))
        for t in (before, after)
    ]
    if not counts[0]:
        raise ValueError(f"expected texts with tokens, got {len(texts)} without any.")
    return TokenCost(texts=len(texts), before=counts[0], after=counts[1])


def trim_base(folder: Path, out: Path, texts: Iterable[str], *, min_count: int) -> dict[str, int]:
    """Write the base in ``folder`` to ``out`` with a trimmed vocabulary; returns the sizes before and after."""
    import torch
    from transformers import AutoModelForCausalLM

    tokenizer_json, old_ids = trim_tokenizer(
        (folder / "tokenizer.json").read_text(encoding="utf-8"), texts, min_count=min_count
    )
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    before = model.config.vocab_size
    rows = torch.tensor(old_ids)
    embedding = model.get_input_embeddings().weight.data[rows].clone()
    unembedding = model.get_output_embeddings().weight.data[rows].clone()
    model.resize_token_embeddings(len(old_ids))
    model.get_input_embeddings().weight.data.copy_(embedding)
    model.get_output_embeddings().weight.data.copy_(unembedding)
    new_id = {old: new for new, old in enumerate(old_ids)}
    for config in (model.config, model.generation_config):
        for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
            old: Any = getattr(config, name, None)  # Llama 3 ends with any of several tokens
            setattr(config, name, [new_id[i] for i in old if i in new_id] if isinstance(old, list) else new_id.get(old))
    model.save_pretrained(out)
    write_whole(out / "tokenizer.json", lambda path: path.write_text(tokenizer_json, encoding="utf-8"))
    return {"before": before, "after": len(old_ids)}
