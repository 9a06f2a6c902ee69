"""The training mix: which rows of which sets, capped, weighted, split, and cleared of every test row.

Splits are by hash of the normalised text, so a row's split never depends on the caps or on the other rows, and the
calibration and validation splits are put aside before anything is trained. A third of ``orbench_hard`` is kept as an
over-refusal test and never enters the mix.
"""

from __future__ import annotations

import hashlib
import re
import unicodedata
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from convert.corpora.augment import constructed_answers, constructed_responses, neutral_names
from convert.corpora.constructed import KINDS, constructed_requests
from convert.corpora.registry import (
    CorpusError,
    Row,
    Stamp,
    check_ids,
    get_set,
    load_sets,
    read_set,
    set_path,
    stamp,
)
from edgeguard.prompt import TARGETS
from edgeguard.taxonomy import SAFE, UNSAFE

__all__ = [
    "CONSTRUCTED_KINDS",
    "HELD_OUT_NAME",
    "Mix",
    "MixedRow",
    "build_mix",
    "check_calibration",
    "check_no_test_rows",
    "check_splits",
    "held_out_rows",
    "is_noisy",
    "labelled_rows",
    "leak_keys",
    "normalise",
    "row_keys",
    "shuffled_by_text",
    "unlabelled_rows",
]

CALIBRATION_PER_MILLE = 50
VALIDATION_PER_MILLE = 20
HELD_OUT_SET = "orbench_hard"
HELD_OUT_NAME = "orbench_hard_held_out"
# What [corpus.constructed] may ask for.
CONSTRUCTED_KINDS = ("refusals", "echoes", "answers", *KINDS)
# Texts this short ("hello") stand in every set; equal ones are no leak.
SHORTEST_LEAK = 12


@dataclass(frozen=True)
class MixedRow:
    """A row of the mix. ``split``: train, validation or calibration; ``weight`` scales its loss."""

    row: Row
    split: str
    weight: float


@dataclass(frozen=True)
class Mix:
    """The mix and the record of how it came about (see ``manifest``)."""

    rows: list[MixedRow]
    manifest: dict[str, Any]


def normalise(text: str) -> str:
    """Letters and digits of ``text`` in compatibility form, case folded: what two copies of a text share."""
    return re.sub(r"[\W_]+", " ", unicodedata.normalize("NFKC", text).casefold()).strip()


def _hash(text: str) -> int:
    return int.from_bytes(hashlib.sha256(text.encode("utf-8", "replace")).digest()[:8], "big")


def _row_key(row: Row) -> str:
    return normalise(row.prompt) + (f"\x1f{normalise(row.response or '')}" if row.target == "response" else "")


def held_out_rows() -> list[Row]:
    """The third of ``orbench_hard`` that is kept as an over-refusal test."""
    return [row for row in read_set(HELD_OUT_SET) if _is_held_out(row)]


def _is_held_out(row: Row) -> bool:
    return row.set == HELD_OUT_SET and _hash(normalise(row.prompt)) % 3 == 0


def labelled_rows(name: str) -> list[Row]:
    """The labelled rows of a set that is measured or calibrated on, which may be the held-out third.

    Raises CorpusError when there are none, or when one has no text to judge.
    """
    rows = [row for row in _rows_of(name) if row.label]
    if not rows:
        raise CorpusError(f"{name}: expected rows with a label, found none. Label them, or take it out of the recipe.")
    if blank := [row.id for row in rows if not _has_text(row)]:
        raise CorpusError(f"{name}: {blank[0]}: expected a text to judge, found none. Correct the row or remove it.")
    return rows


def _rows_of(name: str) -> list[Row]:
    return held_out_rows() if name == HELD_OUT_NAME else read_set(name)


def _has_text(row: Row) -> bool:
    messages = row.messages()
    return bool(messages and messages[-1][1].strip())


def leak_keys(needed: Iterable[str]) -> set[str]:
    """Normalised texts of the test sets (and of the held-out third): what training may not contain.

    ``needed``: test sets that must be there; every other test set in the data folder counts as well. Read again only
    when a file has changed.
    """
    names = {entry.name for entry in load_sets().values() if entry.role == "test" and set_path(entry.name).is_file()}
    names |= set(needed) - {HELD_OUT_NAME}
    if set_path(HELD_OUT_SET).is_file():
        names.add(HELD_OUT_NAME)
    paths = {name: set_path(HELD_OUT_SET if name == HELD_OUT_NAME else name) for name in sorted(names)}
    return set(_keys_of(tuple((name, stamp(path)) for name, path in paths.items())))


@lru_cache(maxsize=4)
def _keys_of(sets: tuple[tuple[str, Stamp | None], ...]) -> frozenset[str]:
    """The keys of the sets named, whose files stand as stamped."""
    return frozenset(key for name, _ in sets for row in _rows_of(name) for key in row_keys(row))


def row_keys(row: Row) -> set[str]:
    """The normalised texts of a row that are long enough to tell rows apart."""
    texts = [row.prompt, row.response or "", *(text for _, text in row.turns)]
    return {key for text in texts if len(key := normalise(text)) >= SHORTEST_LEAK}


def check_no_test_rows(rows: Iterable[Row], keys: set[str]) -> None:
    """The trainer's own guard: raises CorpusError for a row of a test set, or one whose text stands in a test set."""
    for row in rows:
        known = load_sets().get(row.set)
        if (known is not None and known.role == "test") or _is_held_out(row):
            raise CorpusError(f"{row.id}: {row.set} is a test set and is never trained on. Take it out of the recipe.")
        if not keys.isdisjoint(row_keys(row)):
            raise CorpusError(
                f"{row.id}: its text stands in a test set. Build the mix again (`python -m convert corpus`)."
            )


def build_mix(
    sets: Mapping[str, Mapping[str, Any]], constructed: Mapping[str, int], *, seed: int, keys: set[str]
) -> Mix:
    """Build the mix that a recipe describes.

    ``sets``: name -> {"safe": cap, "unsafe": cap, "weight": loss weight}; ``constructed``: kind -> rows made
    here (see :mod:`~convert.corpora.constructed` and ``augment``); ``keys``: see :func:`leak_keys`. Raises
    CorpusError for a set that is not a commercial-use train set. Rows that share text with a test set or with an
    earlier row are left out and counted; so are, uncounted, rows without a text to judge.
    """
    seen: set[str] = set()
    rows: list[MixedRow] = []
    counts: dict[str, Counter[str]] = {}
    for name, wanted in sets.items():
        entry = get_set(name)
        if entry.role != "train" or entry.commercial != "yes":
            raise CorpusError(
                f"{name}: role {entry.role}, commercial use {entry.commercial}; a shipped model may not train on it."
            )
        counts[name] = Counter()
        usable = [row for row in read_set(name) if row.label and _has_text(row) and not _is_held_out(row)]
        rows += _take([neutral_names(row) for row in usable], wanted, seed, keys, seen, counts[name])
    rows += _constructed([m.row for m in rows if m.split == "train"], constructed, seed, keys)
    check_ids(m.row for m in rows)
    check_no_test_rows((m.row for m in rows), keys)
    return Mix(rows, _manifest(rows, counts, seed))


def check_splits(rows: Iterable[MixedRow]) -> None:
    """Raise CorpusError unless a mix has rows to train on and rows to validate with."""
    counts = Counter(mixed.split for mixed in rows)
    for split in ("train", "validation"):
        if not counts[split]:
            raise CorpusError(
                f"the mix: expected rows in its {split} split, found none among {counts.total()} rows "
                f"({VALIDATION_PER_MILLE} in 1,000 validate, by the hash of their text). Add rows to [corpus.sets]."
            )


def check_calibration(rows: Iterable[Row]) -> None:
    """Raise CorpusError unless there are safe and unsafe prompts, and safe and unsafe responses, to calibrate on."""
    counts = Counter((row.label, row.target) for row in rows)
    for label, target in [(label, target) for target in TARGETS for label in (SAFE, UNSAFE)]:
        if not counts[label, target]:
            found = ", ".join(f"{n} {a} {b}s" for (a, b), n in sorted(counts.items(), key=str)) or "no rows"
            raise CorpusError(
                f"the calibration split: expected {label} {target}s, found {found}. Add rows to [corpus.sets] "
                f"({CALIBRATION_PER_MILLE} in 1,000 calibrate), or name a set that has some in [calibrate]."
            )


def unlabelled_rows(sets: Mapping[str, int], seed: int, keys: set[str]) -> list[Row]:
    """Rows that wait for a teacher: of each set at most the number given, none twice, none with a text in ``keys``.

    Rows without text are left out. Raises CorpusError for a set of another role, or one that a shipped model may not
    learn from.
    """
    rows: list[Row] = []
    for name, most in sets.items():
        entry = get_set(name)
        if entry.role != "unlabelled" or entry.commercial != "yes":
            raise CorpusError(
                f"{name}: role {entry.role}, commercial use {entry.commercial}; [distill] takes unlabelled sets alone, "
                "and of them those that a shipped model may learn from."
            )
        clear = {_row_key(row): row for row in read_set(name) if _has_text(row) and keys.isdisjoint(row_keys(row))}
        rows += shuffled_by_text(clear.values(), seed)[:most]
    return rows


def shuffled_by_text(rows: Iterable[Row], seed: int) -> list[Row]:
    """Rows in an order that only the seed and their texts decide."""
    return sorted(rows, key=lambda row: _hash(f"{seed}\x1f{_row_key(row)}"))


def is_noisy(row: Row) -> bool:
    """Whether the label follows from how the set was built: a teacher knows better."""
    known = load_sets().get(row.set)
    return known is not None and known.labels_by == "construction"


def _constructed(rows: list[Row], wanted: Mapping[str, int], seed: int, keys: set[str]) -> list[MixedRow]:
    """Rows made from ``rows`` and from parts: for training only, since they share their parts."""
    refusals, echoes = wanted.get("refusals", 0), wanted.get("echoes", 0)
    made = constructed_responses(rows, seed, refusals=refusals, echoes=echoes)
    made += constructed_answers(rows, seed, wanted.get("answers", 0))
    made += constructed_requests(wanted, rows, seed)
    return [MixedRow(row, "train", 1.0) for row in made if keys.isdisjoint(row_keys(row))]


def _take(
    candidates: list[Row],
    wanted: Mapping[str, Any],
    seed: int,
    keys: set[str],
    seen: set[str],
    count: Counter[str],
) -> list[MixedRow]:
    """At most ``wanted[label]`` rows of each label, in an order that only the seed and the text decide."""
    taken: list[MixedRow] = []
    left = {"safe": int(wanted.get("safe", 0)), "unsafe": int(wanted.get("unsafe", 0))}
    for row in shuffled_by_text(candidates, seed):
        key = _row_key(row)
        if left[str(row.label)] <= 0:
            continue
        if key in seen:
            count["duplicate"] += 1
        elif not keys.isdisjoint(row_keys(row)):
            count["in_test"] += 1
        else:
            seen.add(key)
            left[str(row.label)] -= 1
            taken.append(MixedRow(row, _split(key), float(wanted.get("weight", 1.0))))
    return taken


def _split(key: str) -> str:
    # The prompt alone decides, so two answers to one prompt never fall into different splits.
    place = _hash("split\x1f" + key.partition("\x1f")[0]) % 1000
    if place < CALIBRATION_PER_MILLE:
        return "calibration"
    return "validation" if place < CALIBRATION_PER_MILLE + VALIDATION_PER_MILLE else "train"


def _manifest(rows: list[MixedRow], counts: dict[str, Counter[str]], seed: int) -> dict[str, Any]:
    """Counts by set, split, target and label, with licence and origin, and a hash over every row in order."""
    digest = hashlib.sha256()
    for mixed in rows:
        parts = (mixed.row.id, _row_key(mixed.row), mixed.split, str(mixed.row.label))
        digest.update(("\x1f".join(parts) + "\n").encode("utf-8", "replace"))
    by_set: dict[str, Any] = {}
    for mixed in rows:
        entry = by_set.setdefault(mixed.row.set, {"rows": Counter(), **_origin(mixed.row.set)})
        entry["rows"][f"{mixed.split}/{mixed.row.target}/{mixed.row.label}"] += 1
    for name, count in counts.items():
        if name in by_set:
            by_set[name]["left_out"] = dict(count)
    totals = Counter(f"{m.split}/{m.row.target}/{m.row.label}" for m in rows)
    sets = {name: {**entry, "rows": dict(sorted(entry["rows"].items()))} for name, entry in by_set.items()}
    counted = {"rows": len(rows), "totals": dict(sorted(totals.items()))}
    return {"sha256": digest.hexdigest(), "seed": seed, **counted, "sets": sets}


def _origin(name: str) -> dict[str, str]:
    if name not in load_sets():
        return {
            "license": "as its parts",
            "source": "made here (convert/corpora), from texts of this mix or from parts",
        }
    entry = get_set(name)
    return {"license": entry.license, "source": entry.source, "rule": entry.rule}
