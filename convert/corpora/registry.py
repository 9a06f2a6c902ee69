"""The labelled sets: what each is, where it comes from, and what it may be used for.

``sets.json`` beside this file states role, licence, label rule, public origin and checksum of every set; the rows are
not part of this repository. They are read from a folder of ``ROLE/NAME.jsonl.gz`` files (one JSON object a line), named
by ``--data`` or ``EDGEGUARD_DATA``; ``python -m convert corpora`` prints each set's origin. A ``sets.json`` in that
folder adds sets of one's own; it cannot change what is known here.
"""

from __future__ import annotations

import gzip
import hashlib
import json
import os
from collections.abc import Iterator
from dataclasses import dataclass, fields
from functools import cache
from pathlib import Path
from typing import Any

from edgeguard.errors import EdgeguardError

__all__ = [
    "CorpusError",
    "CorpusSet",
    "Row",
    "data_root",
    "get_set",
    "load_sets",
    "origin_urls",
    "read_set",
    "set_path",
]

DATA_VARIABLE = "EDGEGUARD_DATA"
DEFAULT_DATA = Path(__file__).resolve().parents[3] / "shared" / "data"


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
    """All known sets by name: the built-in ones, and those that the data folder adds."""
    tables = [Path(__file__).parent / "sets.json", Path(os.environ.get(DATA_VARIABLE) or DEFAULT_DATA) / "sets.json"]
    return _read_tables(tuple(path for path in tables if path.is_file()))


@cache
def _read_tables(paths: tuple[Path, ...]) -> dict[str, CorpusSet]:
    names = {f.name for f in fields(CorpusSet)} - {"name"}
    sets: dict[str, CorpusSet] = {}
    for path in paths:
        for name, entry in json.loads(path.read_text(encoding="utf-8")).items():
            if missing := names - set(entry):
                raise CorpusError(f"{path}: {name}: lacks {sorted(missing)}.")
            sets.setdefault(name, CorpusSet(name=name, **{k: entry[k] for k in names}))
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
    """All rows of a set, its checksum verified. Raises CorpusError when the file is missing or not the known one."""
    entry = get_set(name)
    path = set_path(name)
    if not path.is_file():
        raise CorpusError(f"{name}: no file at {path}. It is published at: {entry.source}")
    text = gzip.decompress(path.read_bytes())
    digest = hashlib.sha256(text).hexdigest()
    if digest != entry.sha256:
        raise CorpusError(f"{path}: sha256 {digest}, expected {entry.sha256}. Fetch the set again.")
    return [_row(name, json.loads(line)) for line in text.decode().split("\n") if line]


def _row(name: str, data: dict[str, Any]) -> Row:
    turns = tuple((t["role"], t["content"]) for t in data.get("turns") or ())
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
