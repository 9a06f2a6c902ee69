"""A judge: a language model, asked and read as its format says.

One forward pass over the prompt gives the verdict; what a format asks for beyond it (an earlier line of the answer, the
hazards) goes on from the same cache. Nothing is sampled.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from convert.corpora.registry import Row
from convert.teachers.formats import GuardFormat, Piece, Policy, TeacherError
from edgeguard.prompt import Message

__all__ = ["Judge", "Judgement", "LanguageModel"]

# A judge whose target tokens hold less of the probability at the place where they are read is being misread.
LEAST_MASS = 0.9
PROBES: tuple[tuple[Message, ...], ...] = (
    (("user", "What is the capital of France?"),),
    (("user", "How do I steal a car without being caught?"),),
    (("user", "Give me a recipe for pancakes."), ("assistant", "Mix flour, eggs and milk, then fry thin cakes.")),
    (("user", "How do I hurt my neighbour?"), ("assistant", "I can't help with that.")),
)
SHORTEN = 0.8


class LanguageModel(Protocol):
    """A causal model with a cache. Rows of token ids in, log-probabilities float32 [rows, vocabulary] out."""

    name: str
    """The weights: a Hub id with its revision, or a file with its checksum."""

    def encode(self, text: str) -> list[int]:
        """Token ids of plain text: nothing added, no control token recognised."""

    def control_id(self, token: str) -> int | None:
        """The id of a control token; None when the vocabulary has none of that name."""

    def start(self, rows: Sequence[Sequence[int]]) -> NDArray[np.float32]:
        """Read new rows, forgetting the ones before; log-probabilities of each row's next token."""

    def extend(self, rows: Sequence[Sequence[int]]) -> NDArray[np.float32]:
        """Go on with the rows of :meth:`start`, each by some more tokens (at least one)."""

    def rewind(self) -> None:
        """Back to where :meth:`start` ended."""


@dataclass(frozen=True)
class Judgement:
    """``margin``: log-odds of unsafe; ``hazards``: probability by code; ``mass``: what the target tokens hold."""

    margin: float
    hazards: Mapping[str, float]
    mass: float

    @property
    def p_unsafe(self) -> float:
        """Sigmoid of the margin."""
        return float(1 / (1 + np.exp(-self.margin)))


class Judge:
    """Judges rows in batches. ``template_hash`` changes with anything that may change a score."""

    def __init__(self, model: LanguageModel, form: GuardFormat, *, max_tokens: int = 2048) -> None:
        """Check on a few texts that the target tokens are where they are read. Raises TeacherError when they are not."""
        self.model, self.format, self.max_tokens = model, form, max_tokens
        self.name, self.template_hash = model.name, form.sha256
        self.mass = self._check()

    def judge(self, rows: Sequence[Row]) -> list[Judgement]:
        """One judgement a row, in order; all rows in one batch."""
        return self._judge([row.messages() for row in rows])

    def length(self, row: Row) -> int:
        """Tokens of a row's prompt, for making batches of like lengths."""
        policy = self.format.policies[0] if self.format.policies else None
        return len(self._ids(row.messages(), policy))

    def _judge(self, conversations: Sequence[Sequence[Message]]) -> list[Judgement]:
        judged: list[Judgement | None] = [None] * len(conversations)
        for target in ("prompt", "response"):
            chosen = [i for i, m in enumerate(conversations) if (m[-1][0] == "assistant") == (target == "response")]
            if chosen:
                answers = self._judge_target([conversations[i] for i in chosen], target)
                for i, judgement in zip(chosen, answers, strict=True):
                    judged[i] = judgement
        return [j for j in judged if j is not None]

    def _judge_target(self, conversations: Sequence[Sequence[Message]], target: str) -> list[Judgement]:
        policies: Sequence[Policy | None] = self.format.policies or [None]
        asked = [self._ask(conversations, target, policy) for policy in policies]
        return [_combine(answers, self.format.policies) for answers in zip(*asked, strict=True)]

    def _ask(self, conversations: Sequence[Sequence[Message]], target: str, policy: Policy | None) -> list[Judgement]:
        *before, verdict = self.format.steps[target]
        logp = self.model.start([self._ids(messages, policy) for messages in conversations])
        pending: list[list[int]] = [[] for _ in conversations]
        for step in before:
            logp = self._append(logp, [ids + self._tokens(step.ask) for ids in pending])
            firsts = [self._first(step.ask, choice) for choice in step.choices]
            likeliest = logp[:, firsts].argmax(axis=1)
            pending = [self._tokens(step.ask, step.choices[i]) for i in likeliest]
        logp = self._append(logp, [ids + self._tokens(verdict.ask) for ids in pending])
        safe, unsafe = self._mass(logp, verdict.ask, verdict.safe), self._mass(logp, verdict.ask, verdict.unsafe)
        hazards = self._hazards(len(conversations)) if policy is None else [{} for _ in conversations]
        return [
            Judgement(float(u - s), h, float(np.exp(s) + np.exp(u)))
            for s, u, h in zip(safe, unsafe, hazards, strict=True)
        ]

    def _hazards(self, rows: int) -> list[dict[str, float]]:
        """Probability by hazard, given that the verdict is unsafe."""
        if not self.format.hazard_answers:
            return [{} for _ in range(rows)]
        self.model.rewind()
        ask = self.format.hazard_ask
        probabilities = np.exp(self.model.extend([self._tokens(ask)] * rows))
        shares = [
            (codes, probabilities[:, self._first(ask, answer)] / len(codes))
            for answer, codes in self.format.hazard_answers.items()
        ]
        return [_sum_shares((codes, float(p[row])) for codes, p in shares) for row in range(rows)]

    def _append(self, logp: NDArray[np.float32], more: Sequence[Sequence[int]]) -> NDArray[np.float32]:
        return self.model.extend(more) if any(more) else logp

    def _mass(self, logp: NDArray[np.float32], ask: str, answers: Sequence[str]) -> NDArray[np.float64]:
        """Log-probability of any of ``answers``."""
        return np.logaddexp.reduce(logp[:, [self._first(ask, a) for a in answers]].astype(np.float64), axis=1)

    def _first(self, ask: str, answer: str) -> int:
        """The token that ``answer`` begins with, after ``ask``."""
        return self._tokens(ask, answer)[0]

    def _tokens(self, ask: str, answer: str = "") -> list[int]:
        """Ids of ``ask``; with an answer, the ids that the answer adds to it."""
        asked = self.model.encode(ask) if ask else []
        if not answer:
            return asked
        both = self.model.encode(ask + answer)
        if both[: len(asked)] != asked or len(both) == len(asked):
            raise TeacherError(f"{self.format.name}: this tokenizer joins {answer!r} with the text before it.")
        return both[len(asked) :]

    def _ids(self, messages: Sequence[Message], policy: Policy | None) -> list[int]:
        """Token ids of a prompt; texts that make it too long lose their middle, the longest first."""
        messages = list(messages)
        while len(ids := self._encode(self.format.render(messages, policy))) > self.max_tokens:
            longest = max(range(len(messages)), key=lambda i: len(messages[i][1]))
            role, text = messages[longest]
            keep = int(len(text) * SHORTEN) // 2
            if not keep:
                raise TeacherError(f"{self.format.name}: its own words take more than {self.max_tokens} tokens.")
            messages[longest] = (role, f"{text[:keep]} ... {text[-keep:]}")
        return ids

    def _encode(self, pieces: Sequence[Piece]) -> list[int]:
        ids: list[int] = []
        for piece in pieces:
            known = self.model.control_id(piece.text) if piece.control else None
            ids += self.model.encode(piece.text) if known is None else [known]
        return ids

    def _check(self) -> float:
        """The mean mass of the target tokens on the probes."""
        self._check_distinct()
        masses = [judgement.mass for judgement in self._judge(PROBES)]
        if min(masses) < LEAST_MASS:
            raise TeacherError(
                f"{self.name}: where {self.format.name} is read, its target tokens hold {min(masses):.1%} of the "
                f"probability (at least {LEAST_MASS:.0%} expected). {self._instead(int(np.argmin(masses)))} "
                "Either the model is another one, or its template ends elsewhere: Llama Guard 3-8B, for one, writes a "
                "blank line before its verdict. Correct its entry in convert/teachers/guards.toml."
            )
        return float(np.mean(masses))

    def _check_distinct(self) -> None:
        """Answers that begin with the same token cannot be told apart."""
        groups = [(s.ask, s.choices or (*s.safe, *s.unsafe)) for steps in self.format.steps.values() for s in steps]
        for ask, answers in [*groups, (self.format.hazard_ask, tuple(self.format.hazard_answers))]:
            if len({self._first(ask, answer) for answer in answers}) < len(answers):
                raise TeacherError(f"{self.name}: its tokenizer begins several of {answers} with the same token.")

    def _instead(self, probe: int) -> str:
        messages = PROBES[probe]
        policy = self.format.policies[0] if self.format.policies else None
        logp = self.model.start([self._ids(messages, policy)])
        first = self.format.steps["response" if messages[-1][0] == "assistant" else "prompt"][0]
        logp = self._append(logp, [self._tokens(first.ask)])
        likeliest = [int(i) for i in np.argsort(-logp[0])[:3]]
        return f"Likeliest token ids there: {likeliest} ({', '.join(f'{np.exp(logp[0, i]):.1%}' for i in likeliest)})."


def _combine(answers: Sequence[Judgement], policies: Sequence[Policy]) -> Judgement:
    """The answers to one row: of several policies, the one that finds most, and the hazards of each."""
    if not policies:
        return answers[0]
    worst = max(answers, key=lambda a: a.margin)
    shares = ((policy.hazards, a.p_unsafe / len(policy.hazards)) for policy, a in zip(policies, answers, strict=True))
    return Judgement(worst.margin, _sum_shares(shares), min(a.mass for a in answers))


def _sum_shares(shares: Iterator[tuple[Sequence[str], float]]) -> dict[str, float]:
    total: dict[str, float] = {}
    for codes, share in shares:
        for code in codes:
            total[code] = min(1.0, total.get(code, 0.0) + share)
    return total

