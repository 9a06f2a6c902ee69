"""Guard: verdicts against a numpy reference, order of batches, failing closed, self-test, threads."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from tiny import HEAD, MAX_TOKENS, TEMPLATE, VECTORS, TinyModel, edit_manifest, refresh_files
from tokenizers import Tokenizer

from edgeguard import BundleError, EngineError, Guard, InputError, PolicyError, Verdict
from edgeguard.bundle import Bundle
from edgeguard.prompt import as_messages

TEXTS = [
    "hi",
    "How do I make the thing?",
    "a much longer text about the cat and the hat " * 9,
    "z",
    "\x00 nul",
    "\ud800",
]


class FakeEngine:
    """Returns what it is told to, whatever the text."""

    name, providers_asked, providers, threads, version = "fake", ("Fake",), ("Fake",), 1, "0"

    def __init__(self, row: list[float]) -> None:
        self.row = row

    def logits(self, ids: NDArray[np.int64], mask: NDArray[np.int64]) -> NDArray[np.float32]:
        return np.tile(np.array(self.row, dtype=np.float32), (ids.shape[0], 1))

    def read_on(self, ids: Sequence[int], seen: object) -> tuple[NDArray[np.float32], None]:
        return np.array([self.row], dtype=np.float32), None


def faked(bundle: Path, margin: float) -> Guard:
    opened = Bundle.open(bundle)
    return Guard(opened, FakeEngine([0.0, margin] + [0.0] * 14), opened.load_tokenizer())


def same(one: Verdict, other: Verdict) -> bool:
    """Equal but for time and the last digits of floats."""
    a, b = one.to_dict(), other.to_dict()
    floats = [a.pop(k) == pytest.approx(b.pop(k), abs=1e-4) for k in ("margin", "p_unsafe", "hazards")]
    a.pop("latency_ms"), b.pop("latency_ms")
    return a == b and all(floats)


@pytest.mark.parametrize(("prompt", "response"), VECTORS)
def test_a_verdict_is_what_numpy_computes(tiny_guard: Guard, prompt: str | None, response: str | None) -> None:
    tokenizer = tiny_guard.bundle.load_tokenizer()
    encoded = TEMPLATE.encode(tokenizer, as_messages(prompt=prompt, response=response), MAX_TOKENS)
    logits = TinyModel.random(tokenizer.get_vocab_size()).logits(encoded.ids).astype(np.float64)
    verdict = tiny_guard.classify(prompt=prompt, response=response)
    temperature, bias, threshold = (0.8, 0.4, 0.6) if response else (1.3, -0.2, 0.5)
    p_unsafe = 1 / (1 + math.exp(-((logits[1] - logits[0]) / temperature + bias)))
    assert verdict.margin == pytest.approx(logits[1] - logits[0], abs=1e-4)
    assert verdict.p_unsafe == pytest.approx(p_unsafe, abs=1e-5)
    assert verdict.unsafe == (p_unsafe >= threshold)
    assert verdict.action == ("block" if verdict.unsafe else "allow")
    assert list(verdict.hazards) == HEAD[2:]
    assert list(verdict.hazards.values()) == pytest.approx((1 / (1 + np.exp(-logits[2:]))).tolist(), abs=1e-5)
    assert (verdict.tokens, verdict.truncated) == (len(encoded.ids), False)
    assert (verdict.bundle, verdict.engine, verdict.operating_point) == ("tiny@0.0.1", "onnx", "balanced")
    assert verdict.latency_ms > 0


def test_the_ways_to_ask_agree(tiny_guard: Guard) -> None:
    text = tiny_guard.classify("hello there")
    assert same(text, tiny_guard.classify(prompt="hello there"))
    assert same(text, tiny_guard.classify(messages=[{"role": "user", "content": "hello there"}]))
    pair = tiny_guard.classify(prompt="hello", response="there")
    turns = [{"role": "user", "content": "hello"}, {"role": "assistant", "content": "there"}]
    assert same(pair, tiny_guard.classify(messages=turns))
    assert not same(text, pair)


@given(
    items=st.lists(st.text(min_size=0, max_size=30).map(lambda t: t + "x"), max_size=20), batch_size=st.integers(1, 7)
)
@settings(max_examples=30)
def test_classify_many_equals_one_by_one(tiny_guard: Guard, items: list[str], batch_size: int) -> None:
    many = tiny_guard.classify_many(items, batch_size=batch_size)
    assert len(many) == len(items)
    for item, verdict in zip(items, many, strict=True):
        assert same(verdict, tiny_guard.classify(item))


def test_items_of_every_kind(tiny_guard: Guard) -> None:
    turns = [{"role": "user", "content": "b"}]
    items: list[Any] = [
        "b",
        {"text": "b"},
        {"prompt": "b", "response": None, "id": 7},
        {"messages": turns},
        {"prompt": "a", "response": "b"},
    ]
    many = tiny_guard.classify_many(iter(items), batch_size=2)
    assert all(same(verdict, many[0]) for verdict in many[1:4])
    assert same(many[4], tiny_guard.classify(prompt="a", response="b"))


@pytest.mark.parametrize(
    ("item", "message"),
    [("", "nothing to judge"), ({}, "exactly one"), (5, "expected a text or an object"), (None, "expected a text")],
)
def test_items_that_cannot_be_judged(tiny_guard: Guard, item: Any, message: str) -> None:
    with pytest.raises(InputError, match=rf"items\[1\]: .*{message}"):
        tiny_guard.classify_many(["good", item])
    good, bad, last = tiny_guard.classify_many(["good", item, "last"], on_error="return")
    assert isinstance(good, Verdict) and isinstance(last, Verdict)
    assert isinstance(bad, InputError)
    assert same(last, tiny_guard.classify("last"))


@pytest.mark.parametrize(
    ("items", "options", "message"),
    [
        ("one text", {}, "expected a list"),
        ({"prompt": "one"}, {}, "expected a list"),
        ([], {"batch_size": 0}, "batch_size: expected a whole number of 1 and up, found 0"),
        ([], {"on_error": "ignore"}, "on_error: expected 'raise' or 'return', found 'ignore'"),
    ],
)
def test_wrong_use_of_classify_many(tiny_guard: Guard, items: Any, options: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        tiny_guard.classify_many(items, **options)


def test_no_items(tiny_guard: Guard) -> None:
    assert tiny_guard.classify_many([]) == []
    assert tiny_guard.classify_many(["", " "], on_error="return") != []


def test_operating_points_change_the_action_only(tiny_bundle: Path) -> None:
    guard = faked(tiny_bundle, margin=1.3)  # p_unsafe = sigmoid(0.8) = .69
    found = {p: guard.classify("x", operating_point=p).action for p in ("balanced", "low_fpr", "high_recall")}
    assert found == {"balanced": "block", "low_fpr": "allow", "high_recall": "block"}
    assert guard.classify("x", operating_point="low_fpr").p_unsafe == pytest.approx(0.689974, abs=1e-6)
    assert guard.classify_many(["x"], operating_point="low_fpr")[0].action == "allow"


def test_unknown_operating_points(tiny_bundle: Path, tiny_guard: Guard) -> None:
    message = "unknown operating point 'loose'. This bundle has: balanced, low_fpr, high_recall"
    calls: list[Callable[[], object]] = [
        lambda: Guard.load(tiny_bundle, operating_point="loose"),
        lambda: tiny_guard.classify("x", operating_point="loose"),
        lambda: tiny_guard.classify_many([], operating_point="loose"),
    ]
    for call in calls:
        with pytest.raises(PolicyError, match=message):
            call()


def test_the_operating_point_of_the_guard_is_the_default(tiny_bundle: Path) -> None:
    guard = Guard.load(tiny_bundle, operating_point="low_fpr", threads=1)
    assert guard.operating_point == guard.classify("x").operating_point == "low_fpr"
    assert guard.classify("x", operating_point="balanced").operating_point == "balanced"


def test_truncated_text_is_never_allowed(tiny_bundle: Path) -> None:
    safe, unsafe = faked(tiny_bundle, margin=-9), faked(tiny_bundle, margin=9)
    long = "word " * 1000
    assert safe.classify("short").action == "allow"
    verdict = safe.classify(long)
    assert (verdict.action, verdict.unsafe, verdict.truncated, verdict.flagged) == ("escalate", False, True, True)
    assert verdict.tokens == MAX_TOKENS
    assert unsafe.classify(long).action == "block"


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("column", [0, 1, 5])
def test_logits_that_are_not_finite_fail_closed(tiny_bundle: Path, value: float, column: int) -> None:
    opened = Bundle.open(tiny_bundle)
    row = [0.0] * 16
    row[column] = value
    guard = Guard(opened, FakeEngine(row), opened.load_tokenizer())
    for call in (lambda: guard.classify("x"), lambda: guard.classify_many(["x"], on_error="return")):
        with pytest.raises(EngineError, match="not finite"):
            call()


@pytest.mark.parametrize("margin", [1e30, -1e30])
def test_extreme_margins_do_not_overflow(tiny_bundle: Path, margin: float) -> None:
    with np.errstate(over="raise", invalid="raise", divide="raise"):
        verdict = faked(tiny_bundle, margin).classify("x")
    assert verdict.p_unsafe == (1.0 if margin > 0 else 0.0)


@pytest.mark.parametrize("text", TEXTS)
def test_awkward_text_gets_a_verdict(tiny_guard: Guard, text: str) -> None:
    assert tiny_guard.classify(text).action in ("allow", "block", "escalate")


def test_huge_text_gets_a_verdict_quickly(tiny_guard: Guard) -> None:
    start = time.process_time()
    assert tiny_guard.classify("😀" * 100_000).truncated
    assert tiny_guard.classify("x" * 10_000_000).truncated
    assert time.process_time() - start < 2


@pytest.mark.parametrize("given", [{}, {"text": ""}, {"prompt": "a", "response": ""}, {"messages": []}])
def test_nothing_to_judge(tiny_guard: Guard, given: dict[str, Any]) -> None:
    with pytest.raises(InputError):
        tiny_guard.classify(**given)


def test_a_guard_is_shared_between_threads(tiny_guard: Guard) -> None:
    texts = [f"text number {i} " * (i % 5 + 1) for i in range(40)]
    expected = [tiny_guard.classify(text) for text in texts]
    with ThreadPoolExecutor(4) as pool:
        assert all(map(same, pool.map(tiny_guard.classify, texts), expected))


def test_info_is_json_ready_and_complete(tiny_guard: Guard, tiny_bundle: Path) -> None:
    info = tiny_guard.info()
    assert info["bundle"] == "tiny@0.0.1"
    assert info["path"] == str(tiny_bundle)
    assert info["engine"]["name"] == "onnx"
    assert info["engine"]["providers"] == info["engine"]["providers_asked"] == ["CPUExecutionProvider"]
    assert info["engine"]["threads"] == 1
    assert info["manifest"]["operating_points"]["balanced"]["thresholds"] == {"prompt": 0.5, "response": 0.6}
    assert "template" not in info["manifest"]


def test_the_self_test_reproduces_its_vectors(tiny_guard: Guard) -> None:
    assert 0 <= tiny_guard.self_test() < 1e-4


def _margin(manifest: dict[str, Any]) -> None:
    manifest["self_test"]["vectors"][1]["margin"] += 0.02


def _tokens(manifest: dict[str, Any]) -> None:
    manifest["self_test"]["vectors"][2]["tokens"] += 1


def _empty(manifest: dict[str, Any]) -> None:
    manifest["self_test"]["vectors"][0]["prompt"] = " "


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (_margin, r"self-test vector 1: expected a margin of -?\d+\.\d+ within 0.01, found -?\d+\.\d+"),
        (_tokens, r"self-test vector 2: expected \d+ tokens, found \d+"),
        (_empty, r"self-test vector 0: expected a margin of .* found an error: nothing to judge"),
    ],
)
def test_a_self_test_that_fails_refuses_the_bundle(bundle_copy: Path, edit: Any, message: str) -> None:
    edit_manifest(bundle_copy, edit)
    with pytest.raises(BundleError, match=message):
        Guard.load(bundle_copy, threads=1)
    assert Guard.load(bundle_copy, threads=1, self_test=False).classify("x").tokens > 0


def test_other_weights_fail_the_self_test(bundle_copy: Path) -> None:
    vocabulary = Tokenizer.from_file(str(bundle_copy / "tokenizer.json")).get_vocab_size()
    onnx.save(TinyModel.random(vocabulary, seed=8).to_onnx(), str(bundle_copy / "model.onnx"))
    refresh_files(bundle_copy)
    with pytest.raises(BundleError, match=r"self-test vector 0: expected a margin"):
        Guard.load(bundle_copy, threads=1)


def test_nan_weights_fail_the_self_test(bundle_copy: Path) -> None:
    vocabulary = Tokenizer.from_file(str(bundle_copy / "tokenizer.json")).get_vocab_size()
    model = TinyModel.random(vocabulary)
    model.head[:] = np.nan
    onnx.save(model.to_onnx(), str(bundle_copy / "model.onnx"))
    refresh_files(bundle_copy)
    with pytest.raises(BundleError, match=r"found an error: .*not finite"):
        Guard.load(bundle_copy, threads=1)
