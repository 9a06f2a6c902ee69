"""Descriptions of what a table may hold, and the search of a parsed table for what does not fit its description.

A description is data: a :class:`Value`, or a table of them (:class:`Table`, :class:`Named`, :class:`OneOf`). Nothing is
changed or filled in: a table that has no fault is used as it was read, and a step can keep and compare it. (Of the
libraries that are here anyway none does that: click's types turn texts into numbers, and the strict dataclasses of
huggingface_hub make objects, and are younger than the version that is asked for.)
"""

from __future__ import annotations

import difflib
import math
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

__all__ = ["Kind", "Named", "OneOf", "Rule", "Table", "Value", "choice", "faults", "many", "number", "text", "whole"]

Rule = Callable[[Mapping[str, Any]], "str | None"]
"""What the keys of a table must be together: what is wrong, or None. Asked of a table whose keys are right."""


@dataclass(frozen=True)
class Value:
    """One value. ``expected`` says in words what ``holds`` asks."""

    expected: str
    holds: Callable[[Any], bool]


@dataclass(frozen=True)
class Table:
    """Keys that must be there, keys that may be, and ``rules`` over them all; ``others``: whether more are allowed."""

    required: Mapping[str, Kind] = field(default_factory=dict)
    optional: Mapping[str, Kind] = field(default_factory=dict)
    rules: tuple[Rule, ...] = ()
    others: bool = False


@dataclass(frozen=True)
class Named:
    """A table that names its keys itself, each of them a ``key``; all hold the same ``kind`` of thing."""

    key: Value
    kind: Value | Table


@dataclass(frozen=True)
class OneOf:
    """One of several tables: the one that the key ``by`` names; without ``by``, the one whose name is itself a key."""

    tables: Mapping[str, Table]
    by: str | None = None


Kind = Value | Table | Named | OneOf
ANYTHING = Value("anything", lambda _: True)


def whole(low: int = 0, high: int | None = None, *, multiple_of: int = 1) -> Value:
    """A whole number in [low, high]; true and false are none."""
    words = "a whole number" if multiple_of == 1 else f"a multiple of {multiple_of}"
    return Value(
        f"{words} from {low}" + ("" if high is None else f" to {high}"),
        lambda v: type(v) is int and low <= v <= (v if high is None else high) and v % multiple_of == 0,
    )


def number(low: float = 0.0, high: float = math.inf, *, above: bool = False) -> Value:
    """A finite number in [low, high], or in (low, high] when ``above``."""
    words = f"a number {'above' if above else 'from'} {low:g}"
    return Value(
        words if high == math.inf else f"{words}, at most {high:g}",
        lambda v: type(v) in (int, float) and low <= v <= high and v != math.inf and not (above and v == low),
    )


def text(pattern: str = r".*\S.*", called: str = "a text that is not empty") -> Value:
    """A text that ``pattern`` matches as a whole; ``called`` says it in words."""
    matches = re.compile(pattern, re.DOTALL).fullmatch
    return Value(called, lambda v: isinstance(v, str) and matches(v) is not None)


def choice(*known: str | None) -> Value:
    """One of ``known``, of which None stands for null."""
    words = ", ".join("null" if v is None else v for v in known)
    return Value(f"one of {words}", lambda v: (v is None or isinstance(v, str)) and v in known)


def many(value: Value, least: int = 0) -> Value:
    """A list of ``value``, at least ``least`` long, none twice."""
    words = "a list" if not least else f"a list of at least {least}"
    return Value(
        f"{words}, none twice, each {value.expected}",
        lambda v: (
            isinstance(v, list)
            and len(v) >= least
            and all(value.holds(item) for item in v)
            and all(item not in v[:i] for i, item in enumerate(v))
        ),
    )


def faults(value: object, kind: Kind, where: str, path: tuple[str, ...] = ()) -> Iterator[str]:
    """What is wrong with ``value``, one sentence a fault, which names place, expected and found.

    ``where`` begins every sentence (a file's name); ``path``: the tables and the key that lead to the value.
    """
    if isinstance(kind, Value):
        if not kind.holds(value):
            yield f"{_place(where, path, kind)}: expected {kind.expected}, found {_shown(value)}."
    elif not isinstance(value, dict):
        yield f"{_place(where, path, kind)}: expected a table, found {_shown(value)}."
    elif isinstance(kind, Table):
        found = list(_faults_of_keys(value, kind, where, path))
        if not found:
            found = [f"{_place(where, path, kind)}: {wrong}" for rule in kind.rules if (wrong := rule(value))]
        yield from found
    elif isinstance(kind, Named):
        for key, item in value.items():
            if not kind.key.holds(key):
                yield f"{_place(where, path, kind)}: expected every key to be {kind.key.expected}, found {key!r}."
            yield from faults(item, kind.kind, where, (*path, key))
    else:
        yield from _faults_of_one(value, kind, where, path)


def _faults_of_keys(value: dict[str, Any], kind: Table, where: str, path: tuple[str, ...]) -> Iterator[str]:
    known = {**kind.required, **kind.optional}
    for key in kind.required:
        if key not in value:
            yield f"{_place(where, (*path, key), known[key])} is missing; expected {_expected(known[key])}."
    for key, item in value.items():
        if key in known:
            yield from faults(item, known[key], where, (*path, key))
        elif not kind.others:
            nearest = difflib.get_close_matches(key, known, n=1)
            hint = f"the nearest is {nearest[0]}" if nearest else f"there are {', '.join(known)}"
            place = _place(where, (*path, key), Table() if isinstance(item, dict) else ANYTHING)
            yield f"{place}: no such key, found with the value {_shown(item)}; {hint}."


def _faults_of_one(value: dict[str, Any], kind: OneOf, where: str, path: tuple[str, ...]) -> Iterator[str]:
    if kind.by is not None:
        named = choice(*kind.tables)
        chosen = kind.tables[value[kind.by]] if named.holds(value.get(kind.by)) else Table(others=True)
        yield from faults(value, replace(chosen, required={kind.by: named, **chosen.required}), where, path)
        return
    there = [name for name in kind.tables if name in value]
    if len(there) == 1:
        yield from faults(value, kind.tables[there[0]], where, path)
    else:
        found = f"found {' and '.join(there)}" if there else f"found only {', '.join(value) or 'nothing'}"
        yield f"{_place(where, path, kind)}: expected one of the keys {', '.join(kind.tables)}, {found}."


def _expected(kind: Kind) -> str:
    if isinstance(kind, Value):
        return kind.expected
    if isinstance(kind, Table):
        return f"a table with {', '.join(kind.required) or 'any of ' + ', '.join(kind.optional)}"
    if isinstance(kind, Named):
        return f"a table whose every key is {kind.key.expected}"
    return f"a table with {f'{kind.by} as ' if kind.by else ''}one of {', '.join(kind.tables)}"


def _place(where: str, path: tuple[str, ...], kind: Kind) -> str:
    """``where: [table.table] key``; of a table, without a key."""
    tables, key = (path[:-1], path[-1:]) if isinstance(kind, Value) else (path, ())
    at = " ".join([*([f"[{'.'.join(tables)}]"] if tables else []), *key])
    return f"{where}: {at}" if at else where


def _shown(value: object) -> str:
    shown = repr(value)
    return shown if len(shown) <= 80 else f"{shown[:77]}..."
