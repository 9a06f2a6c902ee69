"""The labelled sets: what each is, where it comes from, and what it may be used for.

``sets.json`` beside this file states role, licence, label rule, public origin and checksum of every set; the rows are
not part of this repository. They are read from a folder of ``ROLE/NAME.jsonl.gz`` files (one JSON object a line), named
by ``--data`` or ``EDGEGUARD_DATA``; ``python -m convert corpora`` prints each set's origin. A ``sets.json`` in that
folder adds sets of one's own; it cannot change what is known here. Every entry and every row is checked when it is
read: what is wrong is named by file, row and key.
"""

from __future__ import annotations

import gzip
import hashlib
import json
import os
import zlib
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from convert.checks import Named, Table, Value, choice, faults, text, whole
from edgeguard.errors import EdgeguardError
from edgeguard.manifest import NAME_CALLED, NAME_PATTERN, SHA256_CALLED, SHA256_PATTERN
from edgeguard.prompt import ROLES, TARGETS
from edgeguard.taxonomy import HAZARDS, SAFE, UNSAFE

__all__ = [
    "CorpusError",
    "CorpusSet",
    "Row",
    "Stamp",
    "check_ids",
    "data_root",
    "get_set",
    "load_sets",
    "origin_urls",
    "read_set",
    "set_path",
    "stamp",
]

DATA_VARIABLE = "EDGEGUARD_DATA"
DEFAULT_DATA = Path(__file__).resolve().parents[3] / "shared" / "data"

# An entry of a sets.json.
ENTRY = Table(
    required={
        "role": choice("train", "calibration", "test", "unlabelled", "injection"),
        "commercial": choice("yes", "no", "verify"),
        "license": text(),
        "labels_by": text(),
        "rule": Value("a text", lambda v: isinstance(v, str)),
        "source": text(),
        "rows": whole(),
        "sha256": text(SHA256_PATTERN, SHA256_CALLED),
    },
    others=True,
)
SETS = Named(text(NAME_PATTERN, NAME_CALLED), ENTRY)


def _is_turn(value: object) -> bool:
    return isinstance(value, dict) and value.get("role") in ROLES and isinstance(value.get("content"), str)


def _judged_text(row: Mapping[str, Any]) -> str | None:
    """A labelled row must have what its label judges; a row that waits for a teacher may be left out instead."""
    if row["target"] == "response" and row["response"] is None:
        return "response: expected a text, since target is response; found null."
    if row["label"] and row["target"] == "prompt" and not (row["prompt"] or "").strip():
        return f"prompt: expected a text, since the row has a label and target is prompt; found {row['prompt']!r}."
    turns = row.get("turns") or []
    if row["target"] == "prompt" and turns and turns[-1]["content"] == row["prompt"] and turns[-1]["role"] != "user":
        return (
            f"turns: expected the prompt to be the last turn's, of the role user; found the role {turns[-1]['role']!r}."
        )
    return None


OPTIONAL_TEXT = Value("a text or null", lambda v: v is None or isinstance(v, str))
# A line of a set's file.
ROW = Table(
    required={
        "id": text(),
        "prompt": OPTIONAL_TEXT,
        "response": OPTIONAL_TEXT,
        "label": choice(SAFE, UNSAFE, None),
        "target": choice(*TARGETS),
        "hazards": Value(
            f"a list of hazards, each one of {', '.join(HAZARDS)}",
            lambda v: isinstance(v, list) and all(isinstance(code, str) and code in HAZARDS for code in v),
        ),
        "lang": OPTIONAL_TEXT,
    },
    optional={
        "turns": Value(
            f"null or a list of turns, each with a role ({', '.join(ROLES)}) and its content, a text",
            lambda v: v is None or (isinstance(v, list) and all(map(_is_turn, v))),
        )
    },
    rules=(_judged_text,),
    others=True,
)


class CorpusError(EdgeguardError):
    """A data set is missing, damaged, or may not be used the way it was asked for."""


@dataclass(frozen=True)
class CorpusSet:
    """One set: ``role`` is train, calibration, test, unlabelled or injection; ``commercial`` is yes, no or verify."""

    name: str
    role: str
    commercial: str
    license: str
    labels_by: str
    rule: str
    source: str
    rows: int
    sha256: str


@dataclass(frozen=True)
class Row:
    """One labelled text. ``target`` says what ``label`` judges; ``hazards``: any of them, empty when unknown."""

    id: str
    set: str
    target: str
    label: str | None
    prompt: str
    response: str | None
    hazards: tuple[str, ...] = ()
    lang: str = "en"
    turns: tuple[tuple[str, str], ...] = ()
    """Earlier conversation with the judged prompt as its last turn, where the set has one."""

    def messages(self) -> list[tuple[str, str]]:
        """(role, text) pairs with the judged message last, as the runtime takes them."""
        if self.turns:
            return list(self.turns)
        pairs = [("user", self.prompt)] if self.prompt else []
        return pairs if self.target == "prompt" else [*pairs, ("assistant", self.response or "")]


def load_sets() -> dict[str, CorpusSet]:
    """All known sets by name: the built-in ones, and those that the data folder adds. Raises CorpusError."""
    tables = [Path(__file__).parent / "sets.json", Path(os.environ.get(DATA_VARIABLE) or DEFAULT_DATA) / "sets.json"]
    return _read_tables(tuple(found for path in tables if (found := stamp(path))))


Stamp = tuple[Path, int, int]


def stamp(path: Path) -> Stamp | None:
    """A file as it stands: path, time of its last change (ns) and bytes; None where there is none."""
    try:
        found = path.stat()
    except FileNotFoundError:
        return None
    return path, found.st_mtime_ns, found.st_size


@cache
def _read_tables(tables: tuple[Stamp, ...]) -> dict[str, CorpusSet]:
    sets: dict[str, CorpusSet] = {}
    for path, *_ in tables:
        try:
            data = json.loads(path.read_text(encoding="utf-8"))
        except ValueError as error:
            raise CorpusError(f"{path}: expected JSON, found {error}.") from error
        if found := list(faults(data, SETS, str(path))):
            raise CorpusError("\n".join(found))
        for name, entry in data.items():
            sets.setdefault(name, CorpusSet(name=name, **{key: entry[key] for key in ENTRY.required}))
    return sets


def get_set(name: str) -> CorpusSet:
    """One set. Raises CorpusError for an unknown name."""
    if name not in load_sets():
        raise CorpusError(f"unknown set {name!r}. `python -m convert corpora` lists the known ones.")
    return load_sets()[name]


def data_root() -> Path:
    """The folder that holds the sets: $EDGEGUARD_DATA, else ``../shared/data`` beside the checkout."""
    root = Path(os.environ.get(DATA_VARIABLE) or DEFAULT_DATA)
    if not root.is_dir():
        raise CorpusError(
            f"no data folder at {root}. Set {DATA_VARIABLE} to a folder of ROLE/NAME.jsonl.gz files; "
            "`python -m convert corpora` prints where each set is published."
        )
    return root


def set_path(name: str) -> Path:
    """Where the rows of a set are read from."""
    return data_root() / get_set(name).role / f"{name}.jsonl.gz"


def read_set(name: str) -> list[Row]:
    """All rows of a set, its checksum verified and every row checked.

    Raises CorpusError when the file is missing or not the one that ``sets.json`` states, and for a row that is none.
    """
    entry = get_set(name)
    path = set_path(name)
    if not path.is_file():
        raise CorpusError(f"{name}: no file at {path}. It is published at: {entry.source}")
    try:
        raw = gzip.decompress(path.read_bytes())
    except (OSError, EOFError, zlib.error) as error:
        raise CorpusError(f"{path}: expected a gzip file, found {error}. Fetch or write the set again.") from error
    again = "Fetch the set again; where it is your own, correct sets.json."
    digest = hashlib.sha256(raw).hexdigest()
    if digest != entry.sha256:
        raise CorpusError(f"{path}: sha256 {digest}, expected {entry.sha256}. {again}")
    try:
        lines = raw.decode().split("\n")
    except UnicodeDecodeError as error:
        raise CorpusError(f"{path}: expected UTF-8, found {error}.") from error
    rows = [_row(name, line, f"{path}: line {number}") for number, line in enumerate(lines, 1) if line]
    if len(rows) != entry.rows:
        raise CorpusError(f"{path}: {len(rows)} rows, expected {entry.rows}. {again}")
    check_ids(rows)
    return rows


def check_ids(rows: Iterable[Row]) -> None:
    """Raise CorpusError for two rows of one id: scores are kept by id, so one would be taught what the other is."""
    sets: dict[str, str] = {}
    for row in rows:
        if row.id in sets:
            where = " and ".join(dict.fromkeys((sets[row.id], row.set)))
            raise CorpusError(f"{where}: expected ids of which none stands twice, found {row.id!r} twice.")
        sets[row.id] = row.set


def _row(name: str, line: str, where: str) -> Row:
    try:
        data = json.loads(line)
    except ValueError as error:
        raise CorpusError(f"{where}: expected one JSON object, found {error}.") from error
    if wrong := next(faults(data, ROW, where), None):
        raise CorpusError(wrong)
    turns = tuple((turn["role"], turn["content"]) for turn in data.get("turns") or ())
    if turns and (data["target"] != "prompt" or turns[-1][1] != data["prompt"]):
        turns = ()
    return Row(
        id=data["id"],
        set=name,
        target=data["target"],
        label=data["label"],
        prompt=data["prompt"] or "",
        response=data["response"],
        hazards=tuple(data["hazards"]),
        lang=data["lang"] or "en",
        turns=turns,
    )


def origin_urls(entry: CorpusSet) -> Iterator[str]:
    """Where a set is published, as web addresses where its source names a repository, commit and path."""
    repository, _, rest = entry.source.partition("@")
    commit, _, path = rest.partition(":")
    if path and repository.count("/") == 1:
        yield f"https://github.com/{repository}/tree/{commit}/{path.partition('!')[0]}"
    else:
        yield entry.source
