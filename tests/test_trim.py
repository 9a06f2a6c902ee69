"""Vocabulary trimming: any text round-trips, the texts it was made for are cut as before, and the model agrees."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from tokenizers import Tokenizer

pytest.importorskip("transformers", reason="the conversion layer needs edgeguard-runtime[convert]")

from convert.smoke import requests, write_base  # noqa: E402
from convert.trim import TrimError, token_cost, trim_base, trim_tokenizer  # noqa: E402

TEXTS = [row["prompt"] for row in requests("alpha", 60, 1)]
AWKWARD = ["", "plain", "naïve ☕ 漢字 🤖", "\x00\x01 tabs\tand\n\nlines", "<|im_start|>", "a" * 300, "ﬁ \ufffd"]


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_base(tmp_path_factory.mktemp("base"))


def test_any_text_comes_back_and_known_texts_are_cut_as_before(base: Path) -> None:
    before = (base / "tokenizer.json").read_text()
    after, old_ids = trim_tokenizer(before, TEXTS[:20], min_count=1)
    old, new = Tokenizer.from_str(before), Tokenizer.from_str(after)
    assert new.get_vocab_size() == len(old_ids) < old.get_vocab_size()
    for text in TEXTS[:20]:
        assert new.encode(text).tokens == old.encode(text).tokens
        assert [old_ids[i] for i in new.encode(text).ids] == old.encode(text).ids
    for text in [*TEXTS, *AWKWARD]:
        ids = new.encode(text, add_special_tokens=False).ids
        assert new.decode(ids, skip_special_tokens=False) == text
    assert token_cost(before, after, TEXTS[:20]).share == 0


def test_the_cost_in_tokens_is_counted(base: Path) -> None:
    before = (base / "tokenizer.json").read_text()
    bytes_only, _ = trim_tokenizer(before, TEXTS, min_count=10**6)
    cost = token_cost(before, bytes_only, TEXTS)
    old = Tokenizer.from_str(before)
    assert cost.after == sum(len(text.encode()) for text in TEXTS)
    assert cost.before == sum(len(old.encode(text).ids) for text in TEXTS)
    assert cost.per_text == pytest.approx((cost.after - cost.before) / len(TEXTS))
    assert cost.share > 1
    with pytest.raises(ValueError, match="texts with tokens, got 1"):
        token_cost(before, bytes_only, [""])


def test_added_tokens_after_the_vocabulary_stay_last(base: Path) -> None:
    """As in Llama 3, whose special tokens are not in the model's vocabulary."""
    data = json.loads((base / "tokenizer.json").read_text())
    size = max(data["model"]["vocab"].values()) + 1
    extra = {**data["added_tokens"][0], "content": "<|extra|>", "id": size, "special": True}
    data["added_tokens"].append(extra)
    after, old_ids = trim_tokenizer(json.dumps(data), [*TEXTS[:5], "a <|extra|>"], min_count=1)
    new = Tokenizer.from_str(after)
    assert old_ids[-1] == size
    assert new.token_to_id("<|extra|>") == len(old_ids) - 1 == new.get_vocab_size() - 1
    assert "<|extra|>" not in json.loads(after)["model"]["vocab"]


def test_rare_tokens_go_with_a_higher_count(base: Path) -> None:
    before = (base / "tokenizer.json").read_text()
    sizes = [len(trim_tokenizer(before, TEXTS, min_count=n)[1]) for n in (1, 5, 1000)]
    assert sizes[0] > sizes[1] > sizes[2]
    assert sizes[2] == 256 + len(json.loads(before)["added_tokens"])


def test_the_trimmed_model_gives_the_same_states(base: Path, tmp_path: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM

    sizes = trim_base(base, tmp_path / "small", TEXTS, min_count=1)
    assert sizes["after"] < sizes["before"]
    old_model = AutoModelForCausalLM.from_pretrained(base).eval()
    new_model = AutoModelForCausalLM.from_pretrained(tmp_path / "small").eval()
    assert new_model.config.vocab_size == sizes["after"]
    old, new = (Tokenizer.from_file(str(f / "tokenizer.json")) for f in (base, tmp_path / "small"))
    with torch.inference_mode():
        for text in TEXTS[:5]:
            states = [
                model.model(torch.tensor([tokenizer.encode(text).ids])).last_hidden_state
                for model, tokenizer in ((old_model, old), (new_model, new))
            ]
            torch.testing.assert_close(*states)


def test_another_kind_of_tokenizer_is_refused() -> None:
    with pytest.raises(TrimError, match="only a byte-level BPE can be trimmed, this is a WordLevel"):
        trim_tokenizer(json.dumps({"model": {"type": "WordLevel", "vocab": {}}, "added_tokens": []}), [], min_count=1)
