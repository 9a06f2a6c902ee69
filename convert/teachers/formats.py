"""How known judges are asked and read: ``guards.toml`` as objects.

The control tokens of a prompt come from the template alone. A text that spells one is kept as text, so that a judged
conversation cannot end its own turn, or answer for the judge.
"""

from __future__ import annotations

import hashlib
import json
import re
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from edgeguard.errors import EdgeguardError
from edgeguard.prompt import TARGETS, Message
from edgeguard.taxonomy import HAZARDS

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

__all__ = ["SLOT", "GuardFormat", "Piece", "Policy", "Step", "TeacherError", "find_format", "load_formats"]

TABLE = Path(__file__).with_name("guards.toml")
USER_SLOTS = ("conversation", "prompt", "response")
SLOT = re.compile(r"\{(\w+)\}")


class TeacherError(EdgeguardError):
    """A teacher cannot be had, does not answer where it should, or its scores do not belong together."""


@dataclass(frozen=True)
class Piece:
    """A part of a rendered prompt: a control token, or text in which no control token is recognised."""

    text: str
    control: bool


@dataclass(frozen=True)
class Step:
    """Append ``ask``, then read a token: one of ``choices``, or the verdict (``safe`` against ``unsafe``)."""

    ask: str
    choices: tuple[str, ...] = ()
    safe: tuple[str, ...] = ()
    unsafe: tuple[str, ...] = ()


@dataclass(frozen=True)
class Policy:
    """One question of a judge that is asked several: its words, and the hazards that it covers."""

    text: str
    hazards: tuple[str, ...]


@dataclass(frozen=True)
class GuardFormat:
    """A judge's prompt, reading positions and target tokens; the table's head says what each means.

    ``steps``, ``words``: by target.
    """

    name: str
    models: tuple[str, ...]
    sources: tuple[str, ...]
    control: tuple[str, ...]
    markers: tuple[str, ...]
    template: str
    turn: str
    roles: Mapping[str, str]
    words: Mapping[str, Mapping[str, str]]
    steps: Mapping[str, tuple[Step, ...]]
    hazard_ask: str
    hazard_answers: Mapping[str, tuple[str, ...]]
    policies: tuple[Policy, ...]

    @property
    def sha256(self) -> str:
        """Changes with anything that may change a score."""
        parts = {k: v for k, v in vars(self).items() if k not in ("models", "sources")}
        return hashlib.sha256(json.dumps(parts, sort_keys=True, default=vars).encode()).hexdigest()

    def render(self, messages: Sequence[Message], policy: Policy | None = None) -> list[Piece]:
        """The prompt for a conversation whose last message is judged. Raises TeacherError when it does not fit in."""
        target = "response" if messages[-1][0] == "assistant" else "prompt"
        texts = {role: text for role, text in messages}  # the last of each role
        slots = {
            "prompt": texts.get("user", ""),
            "response": texts.get("assistant", "") if target == "response" else "",
        }
        pieces: list[Piece] = []
        for text, is_slot in _split(self._wording(target, policy)):
            if is_slot and text == "conversation":
                for role, said in messages:
                    before, after = self.turn.format(role=self.roles.get(role, role), text="\0").split("\0")
                    pieces += [Piece(before, False), Piece(said.strip(), False), Piece(after, False)]
            elif is_slot:
                pieces.append(Piece(slots[text].strip(), False))
            else:
                pieces += self._controls(text)
        return _joined(pieces)

    def _wording(self, target: str, policy: Policy | None) -> str:
        """The template with everything filled in but the texts of the conversation."""
        words = dict(self.words[target])
        if policy is not None:
            words["policy"] = policy.text
        text = self.template
        while missing := {m for m in SLOT.findall(text) if m not in USER_SLOTS}:
            for name in missing:
                if name not in words:
                    raise TeacherError(f"{self.name}: the template needs {{{name}}}, which no word of {target} gives.")
                text = text.replace(f"{{{name}}}", words[name])
        return text

    def _controls(self, text: str) -> Iterator[Piece]:
        tokens = (*self.control, *self.markers)
        for part in re.split(f"({'|'.join(map(re.escape, tokens))})", text):
            if part:
                yield Piece(part, part in tokens)


def _split(wording: str) -> Iterator[tuple[str, bool]]:
    """Literal text and names of slots, in order, with whether it is a slot."""
    for i, part in enumerate(SLOT.split(wording)):
        if part:
            yield part, bool(i % 2)


def _joined(pieces: Sequence[Piece]) -> list[Piece]:
    """Neighbouring text in one piece: a tokenizer's merges cross the borders between template and text."""
    joined: list[Piece] = []
    for piece in pieces:
        if joined and not piece.control and not joined[-1].control:
            joined[-1] = Piece(joined[-1].text + piece.text, False)
        elif piece.text:
            joined.append(piece)
    return joined


@cache
def load_formats() -> dict[str, GuardFormat]:
    """All known judges by name."""
    tables = tomllib.loads(TABLE.read_text(encoding="utf-8"))
    return {name: _format(name, tables) for name in tables}


def find_format(name: str) -> GuardFormat:
    """A judge by its own name or by a model that it is known to read. Raises TeacherError for an unknown one."""
    formats = load_formats()
    for known in formats.values():
        if name == known.name or name in known.models:
            return known
    raise TeacherError(
        f"no template known for {name!r}. Name one of {', '.join(formats)} as `guard`; "
        "other judges are added in convert/teachers/guards.toml."
    )


def _format(name: str, tables: Mapping[str, Any]) -> GuardFormat:
    table = {**tables[tables[name]["like"]], **tables[name]} if "like" in tables[name] else tables[name]
    template = table["template"]
    for old, new in table.get("replace", []):
        if old not in template:
            raise TeacherError(f"{name}: the template has no {old!r} to replace.")
        template = template.replace(old, new)
    hazards = table.get("hazards", {"ask": "", "answers": {}})
    answers = {answer: tuple(codes) for answer, codes in hazards["answers"].items()}
    policies = tuple(Policy(p["text"], tuple(p["hazards"])) for p in table.get("policies", []))
    if unknown := {c for codes in [*answers.values(), *(p.hazards for p in policies)] for c in codes} - set(HAZARDS):
        raise TeacherError(f"{name}: unknown hazards {sorted(unknown)}.")
    return GuardFormat(
        name=name,
        models=tuple(table["models"]),
        sources=tuple(table["sources"]),
        control=tuple(table["control"]),
        markers=tuple(table.get("markers", ())),
        template=template,
        turn=table.get("turn", ""),
        roles=table.get("roles", {}),
        words={target: table[target].get("words", {}) for target in TARGETS},
        steps={target: tuple(_step(s) for s in table[target]["steps"]) for target in TARGETS},
        hazard_ask=hazards["ask"],
        hazard_answers=answers,
        policies=policies,
    )


def _step(table: Mapping[str, Any]) -> Step:
    return Step(table["ask"], *(tuple(table.get(key, ())) for key in ("choices", "safe", "unsafe")))
