"""Texts for the benchmark have exactly so many tokens, and depend on seed, length and key alone."""

from __future__ import annotations

from pathlib import Path

import pytest
from tokenizers import Tokenizer

from edgeguard import Guard
from edgeguard.bench.records import BenchError
from edgeguard.bench.texts import WORDS, TextMaker
from edgeguard.bundle import Bundle, default_bundle_path

OVERHEAD = 5  # of the tiny bundle's template


@pytest.fixture
def maker(tiny_guard: Guard, tiny_tokenizer: Tokenizer) -> TextMaker:
    return TextMaker(tiny_guard.bundle.manifest, tiny_tokenizer, seed=0)


@pytest.mark.parametrize("tokens", [OVERHEAD + 1, 7, 16, 33, 63, 64])
def test_a_text_has_exactly_so_many_tokens(maker: TextMaker, tiny_guard: Guard, tokens: int) -> None:
    for key in ("a", "b", "c"):
        sample = maker.sample(tokens, key)
        ((role, text),) = sample.messages
        verdict = tiny_guard.classify(text)
        assert (role, verdict.tokens, verdict.truncated, len(sample.ids)) == ("user", tokens, False, tokens)
        assert set(text.split()) <= set(WORDS)


def test_every_length_of_the_shipped_bundle(tmp_path: Path) -> None:
    bundle = Bundle.open(default_bundle_path(), verify=False)
    maker = TextMaker(bundle.manifest, bundle.load_tokenizer(), seed=1)
    for tokens in (8, 16, 17, 64, 256, 511, 512):
        assert len(maker.sample(tokens, "x").ids) == tokens


def test_a_new_turn_has_exactly_so_many_tokens(maker: TextMaker, tiny_guard: Guard) -> None:
    first = maker.sample(20, "x")
    second = maker.sample(52, "x", (*first.messages, ("assistant", "I see.")))
    assert second.messages[:1] == first.messages
    shared = len(first.ids) - len(tiny_guard.bundle.manifest.template.read["prompt"])
    assert second.ids[:shared] == first.ids[:shared]
    messages = [{"role": role, "content": text} for role, text in second.messages]
    assert tiny_guard.classify(messages=messages).tokens == 52


def test_the_seed_decides_and_texts_differ(tiny_guard: Guard, tiny_tokenizer: Tokenizer, maker: TextMaker) -> None:
    manifest = tiny_guard.bundle.manifest
    again, other = (TextMaker(manifest, tiny_tokenizer, seed) for seed in (0, 1))
    keys = [f"round {number}" for number in range(30)]
    texts = [maker.sample(40, key) for key in keys]
    assert len(set(texts)) == len(texts)
    assert [again.sample(40, key) for key in reversed(keys)] == texts[::-1], "whatever was made before"
    assert not set(texts) & {other.sample(40, key) for key in keys}


def test_lengths_that_no_text_has(maker: TextMaker) -> None:
    with pytest.raises(BenchError, match=rf"{OVERHEAD} tokens: no text .* take {OVERHEAD + 1}\."):
        maker.sample(OVERHEAD, "x")
    with pytest.raises(BenchError, match="65 tokens: this bundle reads at most 64"):
        maker.sample(65, "x")
    assert maker.possible((2, 16, 64, 128)) == (16, 64)
    with pytest.raises(BenchError, match="128 tokens"):
        maker.possible((2, 128))
