"""Teacher scores: a file of one JSON object a row, which grows while a teacher judges and is gone on with.

    {"id": "set:row", "p_unsafe": 0.93, "margin": 2.6, "hazards": {"S2": 0.7}, "teacher": "...", "template_hash": "..."}

``margin`` is the log-odds of unsafe and ``p_unsafe`` its sigmoid; ``hazards``: the probability that the text is unsafe
for each hazard that the teacher knows (empty where it names none). Scores of two teachers, or of one asked in two ways,
never share a file. Scores made elsewhere are such a file too: ``teacher`` names who made them, ``template_hash`` how.
``row_hash`` tells which text was judged, and may be left out: a row whose text has changed since is judged again.
"""

from __future__ import annotations

import hashlib
import json
import math
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, Protocol

import click

from convert.corpora.registry import Row
from convert.files import write_whole
from convert.teachers.formats import TeacherError
from convert.teachers.judge import Judgement
from edgeguard.calibration import sigmoid
from edgeguard.taxonomy import HAZARDS

__all__ = ["Score", "Teacher", "label_rows", "read_scores", "row_hash"]

SHOW_EVERY_S = 15.0
POOL_BATCHES = 50
HASH_DIGITS = 16
# How far p_unsafe may be from the sigmoid of the margin: one of them may have been rounded.
TOLERANCE = 0.01


class Teacher(Protocol):
    """What labels rows: see :class:`convert.teachers.judge.Judge` and :mod:`convert.teachers.trained`."""

    name: str
    template_hash: str

    def length(self, row: Row) -> int:
        """Tokens of a row, for batches of like lengths."""

    def judge(self, rows: Sequence[Row]) -> list[Judgement]:
        """One judgement a row, in order."""


@dataclass(frozen=True)
class Score:
    """One line of a score file."""

    id: str
    p_unsafe: float
    margin: float
    hazards: Mapping[str, float]
    teacher: str
    template_hash: str
    row_hash: str = ""


def row_hash(row: Row) -> str:
    """What tells the texts of two rows of one id apart."""
    return hashlib.sha256(json.dumps(row.messages()).encode()).hexdigest()[:HASH_DIGITS]


def read_scores(path: Path) -> dict[str, Score]:
    """Scores by row id, each checked. Raises TeacherError for a damaged line, or for lines of more than one teacher."""
    if not path.is_file():
        raise TeacherError(f"{path}: no such file. Expected scores, one JSON object a line as in {__name__}.")
    scores: dict[str, Score] = {}
    for number, line in enumerate(path.read_text(encoding="utf-8").split("\n"), 1):
        if not line.strip():
            continue
        try:
            score = _parse(json.loads(line))
        except ValueError as error:
            raise TeacherError(
                f"{path}: line {number} is no score: {error}. Correct or remove it; {__name__} shows one."
            ) from error
        if score.id in scores:
            raise TeacherError(f"{path}: line {number} scores {score.id!r} again. Keep one score a row.")
        scores[score.id] = score
    judges = {(s.teacher, s.template_hash) for s in scores.values()}
    if len(judges) > 1:
        raise TeacherError(f"{path}: mixes the teachers {sorted(judges)}. Keep one file a teacher.")
    return scores


def _parse(data: Any) -> Score:  # noqa: ANN401 - what a line of JSON may hold
    """A line as a score. Raises ValueError that says what is wrong with it."""
    names = [field.name for field in fields(Score) if field.name != "row_hash"]
    if not isinstance(data, dict) or set(data) - {"row_hash"} != set(names):
        found = f"the fields {sorted(data)}" if isinstance(data, dict) else f"{str(data):.40}"
        raise ValueError(f"expected the fields {names}, found {found}")
    for name in ("id", "teacher", "template_hash"):
        if not isinstance(data[name], str) or not data[name]:
            raise ValueError(f"{name} is {data[name]!r:.40}, expected a text")
    if not isinstance(data.get("row_hash", ""), str):
        raise ValueError(f"row_hash is {data['row_hash']!r:.40}, expected a text")
    p, margin, hazards = data["p_unsafe"], data["margin"], data["hazards"]
    if not _is_probability(p):
        raise ValueError(f"p_unsafe is {str(p):.40}, expected a number from 0 to 1")
    if not _is_number(margin) or abs(sigmoid(margin) - p) > TOLERANCE:
        raise ValueError(f"margin is {str(margin):.40}, expected the log-odds of p_unsafe, {p}")
    if not isinstance(hazards, dict) or set(hazards) - set(HAZARDS) or not all(map(_is_probability, hazards.values())):
        raise ValueError(
            f"hazards is {str(hazards):.60}, expected any of {', '.join(HAZARDS)}, each with a probability"
        )
    return Score(**{**data, "p_unsafe": float(p), "margin": float(margin)})


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def _is_probability(value: object) -> bool:
    return _is_number(value) and 0 <= value <= 1  # type: ignore[operator]


def label_rows(teacher: Teacher, rows: Sequence[Row], path: Path, *, tokens: int = 4096) -> dict[str, Score]:
    """Judge the rows that ``path`` has no score for, batches of ``tokens`` tokens at a time; returns all scores.

    A score of another text than the row has now is replaced. Each batch is on disk before the next begins; a line that
    was being written when a run died is dropped. Raises TeacherError when ``path`` holds another teacher's scores.
    """
    done = _without_changed(_resume(teacher, path), rows, path)
    todo = [row for row in rows if row.id not in done]
    started = shown = time.monotonic()
    count = 0
    with path.open("a", encoding="utf-8") as stream:
        for batch in _batches(teacher, todo, tokens):
            for row, judgement in zip(batch, teacher.judge(batch), strict=True):
                score = _score(teacher, row, judgement)
                done[row.id] = score
                stream.write(json.dumps(asdict(score)) + "\n")
            stream.flush()
            count += len(batch)
            if time.monotonic() - shown > SHOW_EVERY_S:
                shown = time.monotonic()
                rate = count / (shown - started)
                left = (len(todo) - count) / rate / 60
                click.echo(
                    f"{teacher.name}: {count}/{len(todo)} rows, {rate:.1f} rows/s, {left:.0f} min left", err=True
                )
    return {row.id: done[row.id] for row in rows}


def _resume(teacher: Teacher, path: Path) -> dict[str, Score]:
    path.parent.mkdir(parents=True, exist_ok=True)
    if not path.exists():
        return {}
    whole = path.read_bytes()
    if not whole.endswith(b"\n"):
        with path.open("rb+") as stream:
            stream.truncate(whole.rfind(b"\n") + 1)
    done = read_scores(path)
    for score in done.values():
        if (score.teacher, score.template_hash) != (teacher.name, teacher.template_hash):
            raise TeacherError(
                f"{path}: holds scores of {score.teacher} ({score.template_hash[:12]}), not of {teacher.name} "
                f"({teacher.template_hash[:12]}). Choose another file, or remove this one."
            )
        break
    return done


def _without_changed(done: dict[str, Score], rows: Sequence[Row], path: Path) -> dict[str, Score]:
    """The scores whose text is still that of their row; the others leave ``path`` too."""
    changed = {row.id for row in rows if row.id in done and done[row.id].row_hash not in ("", row_hash(row))}
    if not changed:
        return done
    click.echo(f"{path}: {len(changed)} rows have another text than was judged, and are judged again", err=True)
    kept = {id_: score for id_, score in done.items() if id_ not in changed}
    lines = "".join(json.dumps(asdict(score)) + "\n" for score in kept.values())
    write_whole(path, lambda part: part.write_text(lines, encoding="utf-8"))
    return kept


def _score(teacher: Teacher, row: Row, judgement: Judgement) -> Score:
    hazards = {code: round(p, 5) for code, p in judgement.hazards.items()}
    return Score(
        row.id,
        round(judgement.p_unsafe, 7),
        round(judgement.margin, 5),
        hazards,
        teacher.name,
        teacher.template_hash,
        row_hash(row),
    )


def _batches(teacher: Teacher, rows: Sequence[Row], tokens: int) -> Iterator[list[Row]]:
    """Batches of like lengths: rows are sorted within pools, so that the file grows from the start."""
    pool = POOL_BATCHES * 8
    for start in range(0, len(rows), pool):
        lengths = sorted(((teacher.length(row), i) for i, row in enumerate(rows[start : start + pool])))
        batch: list[Row] = []
        for length, i in lengths:
            if batch and (len(batch) + 1) * length > tokens:
                yield batch
                batch = []
            batch.append(rows[start + i])
        if batch:
            yield batch
