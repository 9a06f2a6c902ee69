"""Descriptions of tables: what they let through, and what they say about the rest."""

from __future__ import annotations

from typing import Any

import pytest

from convert.checks import Kind, Named, OneOf, Table, choice, faults, many, number, text, whole

TRAIN = Table(required={"rate": number(0, 1, above=True)}, optional={"steps": whole(1)})
SOURCE = OneOf({"hub": Table({"hub": text()}), "folder": Table({"folder": text()})})
KINDS = OneOf({"a": Table({"file": text()}), "b": Table(optional={"n": whole(2, 8, multiple_of=2)})}, by="kind")


def _both(table: Any) -> str | None:
    return "not both." if len(table) == 2 else None


def found(value: object, kind: Kind) -> list[str]:
    return list(faults(value, kind, "x.toml", ("t",)))


@pytest.mark.parametrize(
    ("value", "kind"),
    [
        (0, whole()),
        (1, number(0, 1)),
        (0.5, number(above=True)),
        ("a", text()),
        (None, choice("a", None)),
        (["a", "b"], many(text(), 1)),
        ([], many(text())),
        ({"rate": 1}, TRAIN),
        ({"rate": 0.1, "steps": 3}, TRAIN),
        ({"hub": "a/b"}, SOURCE),
        ({"kind": "b", "n": 4}, KINDS),
        ({"x": 1, "y": 2}, Named(text(), whole())),
        ({"a": 1, "b": 2}, Table({"a": whole()}, others=True)),
    ],
)
def test_what_fits_has_no_fault(value: object, kind: Kind) -> None:
    assert found(value, kind) == []


@pytest.mark.parametrize(
    ("value", "kind", "expected"),
    [
        ({"rate": True}, TRAIN, "x.toml: [t] rate: expected a number above 0, at most 1, found True."),
        ({"rate": "1e-4"}, TRAIN, "x.toml: [t] rate: expected a number above 0, at most 1, found '1e-4'."),
        ({"rate": float("nan")}, TRAIN, "x.toml: [t] rate: expected a number above 0, at most 1, found nan."),
        ({"rate": 0}, TRAIN, "x.toml: [t] rate: expected a number above 0, at most 1, found 0."),
        ({"rate": 1, "steps": 2.0}, TRAIN, "x.toml: [t] steps: expected a whole number from 1, found 2.0."),
        ({}, TRAIN, "x.toml: [t] rate is missing; expected a number above 0, at most 1."),
        (
            {"rate": 1, "stpes": 2},
            TRAIN,
            "x.toml: [t] stpes: no such key, found with the value 2; the nearest is steps.",
        ),
        ({"rate": 1, "q": {}}, TRAIN, "x.toml: [t.q]: no such key, found with the value {}; there are rate, steps."),
        (3, TRAIN, "x.toml: [t]: expected a table, found 3."),
        ({"huub": "a"}, SOURCE, "x.toml: [t]: expected one of the keys hub, folder, found only huub."),
        (
            {"hub": "a", "folder": "b"},
            SOURCE,
            "x.toml: [t]: expected one of the keys hub, folder, found hub and folder.",
        ),
        (
            {"hub": "a", "fodler": "b"},
            SOURCE,
            "x.toml: [t] fodler: no such key, found with the value 'b'; there are hub.",
        ),
        ({"file": "a"}, KINDS, "x.toml: [t] kind is missing; expected one of a, b."),
        ({"kind": ["a"]}, KINDS, "x.toml: [t] kind: expected one of a, b, found ['a']."),
        ({"kind": "b", "n": 5}, KINDS, "x.toml: [t] n: expected a multiple of 2 from 2 to 8, found 5."),
        ({"kind": "a"}, KINDS, "x.toml: [t] file is missing; expected a text that is not empty."),
        ({"x": -1}, Named(text(), whole()), "x.toml: [t] x: expected a whole number from 0, found -1."),
        ({"z": 1}, Named(choice("x"), whole()), "x.toml: [t]: expected every key to be one of x, found 'z'."),
        (["a", "a"], many(text(), 1), "x.toml: t: expected a list of at least 1, none twice, each a text that is not "),
        ({"a": 1, "b": 2}, Table({"a": whole(), "b": whole()}, rules=(_both,)), "x.toml: [t]: not both."),
        ({"k": "y" * 200}, Table({"k": whole()}), "yyy...."),
    ],
)
def test_what_does_not_fit_is_named(value: object, kind: Kind, expected: str) -> None:
    (fault,) = found(value, kind)
    assert expected in fault and len(fault) < 200


def test_a_rule_waits_until_the_keys_are_right_and_every_fault_is_told() -> None:
    table = Table({"a": whole(), "b": whole()}, rules=(_both,))
    assert len(found({"a": "1", "b": "2"}, table)) == 2
    assert all("expected a whole number" in fault for fault in found({"a": "1", "b": "2"}, table))
