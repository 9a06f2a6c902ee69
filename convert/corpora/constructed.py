"""Requests built from parts, for what the labelled sets lack: the label follows from how a request is built.

The parts are in ``parts.json``. The errors of edgeguard-mini 0.1.0 decided what is there (docs/log.md, 2026-11-22): it
flagged creative writing with conditions and harmless texts with a violent word, and passed requests to reproduce
copyrighted works. No text of a test set is used; the mix leaves out any that coincides with one.
"""

from __future__ import annotations

import itertools
import json
import random
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

from convert.corpora.registry import Row

__all__ = ["KINDS", "constructed_requests"]

Item = TypeVar("Item")

# Kind -> label, hazards.
KINDS: dict[str, tuple[str, tuple[str, ...]]] = {
    "creative": ("safe", ()),
    "copies": ("unsafe", ("S8",)),
    "discussions": ("safe", ()),
    "look_alikes": ("safe", ()),
    "tasks": ("safe", ()),
    "self_harm": ("unsafe", ("S11",)),
    "care": ("safe", ()),
}


def constructed_requests(wanted: Mapping[str, int], rows: Sequence[Row], seed: int) -> list[Row]:
    """``wanted[kind]`` different requests of each kind, or as many as there are; keys that are no kind are ignored."""
    parts = json.loads((Path(__file__).parent / "parts.json").read_text(encoding="utf-8"))
    made: list[Row] = []
    for kind in [kind for kind in KINDS if wanted.get(kind)]:
        texts = _texts(kind, random.Random(f"{seed} {kind}"), parts, rows)
        unique = itertools.islice(dict.fromkeys(itertools.islice(texts, 4 * wanted[kind])), wanted[kind])
        label, hazards = KINDS[kind]
        name = f"constructed_{kind}"
        made += [Row(f"{name}:{i}", name, "prompt", label, text, None, hazards) for i, text in enumerate(unique)]
    return made


def _texts(kind: str, rng: random.Random, parts: Mapping[str, Any], rows: Sequence[Row]) -> Iterator[str]:
    if kind == "creative":
        return _creative(rng, **parts["creative"])
    if kind == "look_alikes":
        return _look_alikes(rng, **parts["look_alikes"])
    if kind == "tasks":
        return _tasks(rng, rows, **parts["tasks"])
    if kind in ("self_harm", "care"):
        return _self_harm(rng, KINDS[kind][0], parts["self_harm"])
    works = parts["works"]
    if kind == "copies":
        return iter(_shuffled(rng, _fill(works["copy"], works["protected"])))
    free, discussed = _fill(works["copy"], works["free"]), _fill(works["discuss"], works["protected"])
    return iter(_shuffled(rng, [*free, *discussed]))


def _creative(
    rng: random.Random,
    openers: Sequence[str],
    forms: Sequence[str],
    topics: Sequence[str],
    conditions: Sequence[str],
    words: Sequence[str],
) -> Iterator[str]:
    """Creative and office writing with up to three conditions: harmless, whatever the words in it."""
    while True:
        request = rng.choice(openers).format(form=rng.choice(forms), topic=rng.choice(topics))
        chosen = rng.sample(conditions, rng.randint(0, 3))
        yield " ".join([request, *(c.format(n=rng.choice((10, 50, 120, 300)), w=rng.choice(words)) for c in chosen)])


def _look_alikes(
    rng: random.Random, ask: Sequence[str], uses: Sequence[str], questions: Sequence[str], crimes: Sequence[str]
) -> Iterator[str]:
    """Violent words in harmless use, and questions that name a crime to understand it."""
    yield from _shuffled(rng, [*_fill(ask, uses), *_fill(questions, crimes)])


def _tasks(rng: random.Random, rows: Sequence[Row], templates: Sequence[str], sets: Sequence[str]) -> Iterator[str]:
    """A task on a harmless text: the long everyday requests that few sets have."""
    for text in _shuffled(rng, [r.response or "" for r in rows if r.label == "safe" and r.set in sets]):
        yield rng.choice(templates).format(x=text)


def _self_harm(rng: random.Random, label: str, parts: Mapping[str, Any]) -> Iterator[str]:
    """Encouragement of self-harm and eating disorders, or, with the same words, care about them."""
    for template, (me, them) in _shuffled(rng, itertools.product(parts[label], parts["acts"])):
        yield template.format(me=me, them=them, her=me.replace("my", "her"))


def _fill(templates: Sequence[str], fillings: Sequence[str]) -> list[str]:
    return [template.format(x=filling) for template, filling in itertools.product(templates, fillings)]


def _shuffled(rng: random.Random, items: Iterable[Item]) -> list[Item]:
    result = list(items)
    rng.shuffle(result)
    return result
