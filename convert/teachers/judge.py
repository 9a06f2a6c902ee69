"""A judge: a language model, asked and read as its format says.

One forward pass over the prompt gives the verdict; what a format asks for beyond it (an earlier line of the answer, the
hazards) goes on from the same cache. Nothing is sampled.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import groupby
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from convert.corpora.registry import Row
from convert.teachers.formats import SLOT, GuardFormat, Piece, Policy, TeacherError
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
    rows_at_once: int
    """How many rows are worth reading together; of more than it can hold, a model computes texts again."""

    def encode(self, text: str) -> list[int]:
        """Token ids of plain text: nothing added; control tokens that a tokenizer calls special stay text."""

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
        """Check on a few texts that the target tokens are where they are read. Raises TeacherError when they are not.

        ``max_tokens``: of a prompt; longer texts lose their middle.
        """
        self.model, self.format, self.max_tokens = model, form, max_tokens
        self.name = model.name
        self.template_hash = hashlib.sha256(f"{form.sha256} {max_tokens}".encode()).hexdigest()
        self._control = self._control_ids()
        # A tokenizer may recognise a control token wherever it is spelled: text that spells one is cut after its "<".
        self._cut = re.compile("|".join(f"(?<={re.escape(t[0])})(?={re.escape(t[1:])})" for t in self._control))
        # What a prompt ends with, whatever is judged. Its answer is tokenized as what follows that.
        self._ending = re.split("|".join([SLOT.pattern, *map(re.escape, self._control)]), form.template)[-1]
        self._added_ids: dict[tuple[str, str], list[int]] = {}
        self.mass = self._check()

    def judge(self, rows: Sequence[Row]) -> list[Judgement]:
        """One judgement a row, in order; all rows in one batch where the model has room for them."""
        conversations, size = [row.messages() for row in rows], self.model.rows_at_once
        batches = [conversations[i : i + size] for i in range(0, len(conversations), size)]
        return [judgement for batch in batches for judgement in self._judge(batch)]

    def length(self, row: Row) -> int:
        """Tokens of a row's prompt, for making batches of like lengths."""
        policy = self.format.policies[0] if self.format.policies else None
        return len(self._ids(row.messages(), policy))

    def _judge(self, conversations: Sequence[Sequence[Message]]) -> list[Judgement]:
        judged: dict[int, Judgement] = {}
        for target in ("prompt", "response"):
            chosen = [i for i, m in enumerate(conversations) if (m[-1][0] == "assistant") == (target == "response")]
            if chosen:
                answers = self._judge_target([conversations[i] for i in chosen], target)
                judged.update(zip(chosen, answers, strict=True))
        return [judged[i] for i in range(len(conversations))]

    def _judge_target(self, conversations: Sequence[Sequence[Message]], target: str) -> list[Judgement]:
        policies: Sequence[Policy | None] = self.format.policies or [None]
        asked = [self._ask(conversations, target, policy) for policy in policies]
        return [_combine(answers, self.format.policies) for answers in zip(*asked, strict=True)]

    def _ask(self, conversations: Sequence[Sequence[Message]], target: str, policy: Policy | None) -> list[Judgement]:
        """Read the prompts, then take the steps: ``said`` is how each row's text ends, ``unread`` its new tokens."""
        *before, verdict = self.format.steps[target]
        logp = self.model.start([self._ids(messages, policy) for messages in conversations])
        said = [self._ending] * len(conversations)
        unread: list[list[int]] = [[] for _ in conversations]
        for step in before:
            logp, said = self._say(logp, said, unread, step.ask)
            chosen = [self._likeliest(row, text, step.choices) for row, text in zip(logp, said, strict=True)]
            unread = [self._added(text, choice) for text, choice in zip(said, chosen, strict=True)]
            said = [text + choice for text, choice in zip(said, chosen, strict=True)]
        logp, said = self._say(logp, said, unread, verdict.ask)
        safe, unsafe = self._held(logp, said, verdict.safe), self._held(logp, said, verdict.unsafe)
        hazards = self._hazards(len(conversations)) if policy is None else [{} for _ in conversations]
        judged = [Judgement(float(u - s), {}, float(np.exp(s) + np.exp(u))) for s, u in zip(safe, unsafe, strict=True)]
        return [
            replace(j, hazards={c: p * j.p_unsafe for c, p in h.items()}) for j, h in zip(judged, hazards, strict=True)
        ]

    def _say(
        self, logp: NDArray[np.float32], said: Sequence[str], unread: Sequence[Sequence[int]], ask: str
    ) -> tuple[NDArray[np.float32], list[str]]:
        """Append ``unread`` and ``ask`` to every row: the next token's log-probabilities, and how each row ends now."""
        more = [[*ids, *self._added(text, ask)] for ids, text in zip(unread, said, strict=True)]
        return (self.model.extend(more) if any(more) else logp), [text + ask for text in said]

    def _likeliest(self, logp: NDArray[np.float32], said: str, choices: Sequence[str]) -> str:
        return choices[int(np.argmax([logp[self._first(said, choice)] for choice in choices]))]

    def _held(self, logp: NDArray[np.float32], said: Sequence[str], answers: Sequence[str]) -> NDArray[np.float64]:
        """Log-probability, by row, of any of ``answers``."""
        held = [row[[self._first(text, a) for a in answers]] for row, text in zip(logp, said, strict=True)]
        total: NDArray[np.float64] = np.logaddexp.reduce(np.array(held, np.float64), axis=1)
        return total

    def _hazards(self, rows: int) -> list[dict[str, float]]:
        """Probability by hazard, given that the verdict is unsafe."""
        if not self.format.hazard_answers:
            return [{} for _ in range(rows)]
        self.model.rewind()
        asked = self._ending + self.format.hazard_ask
        probabilities = np.exp(self.model.extend([self._added(self._ending, self.format.hazard_ask)] * rows))
        shares = [
            (codes, probabilities[:, self._first(asked, answer)] / len(codes))
            for answer, codes in self.format.hazard_answers.items()
        ]
        return [_sum_shares((codes, float(p[row])) for codes, p in shares) for row in range(rows)]

    def _first(self, before: str, answer: str) -> int:
        """The token that ``answer`` begins with, after ``before``."""
        return self._added(before, answer)[0]

    def _added(self, before: str, more: str) -> list[int]:
        """The ids that ``more`` adds to a text that ends with ``before``."""
        if (before, more) not in self._added_ids:
            start, both = self.model.encode(before), self.model.encode(before + more)
            if both[: len(start)] != start or (more and len(both) == len(start)):
                raise TeacherError(
                    f"{self.name}: its tokenizer joins {more!r} with the text before it, {before[-20:]!r}. "
                    f"It is not the one that {self.format.name} was written for."
                )
            self._added_ids[before, more] = both[len(start) :]
        return self._added_ids[before, more]

    def _ids(self, messages: Sequence[Message], policy: Policy | None) -> list[int]:
        """Token ids of a prompt; texts that make it too long lose their middle, the longest first."""
        kept = [len(text) for _, text in messages]
        while True:
            shortened = [(role, _without_middle(text, n)) for (role, text), n in zip(messages, kept, strict=True)]
            ids = self._encode(self.format.render(shortened, policy))
            if len(ids) <= self.max_tokens:
                return ids
            if not any(kept):
                raise TeacherError(f"{self.format.name}: its own words take more than {self.max_tokens} tokens.")
            longest = kept.index(max(kept))
            kept[longest] = int(kept[longest] * SHORTEN)

    def _encode(self, pieces: Sequence[Piece]) -> list[int]:
        ids: list[int] = []
        for known, run in groupby(pieces, lambda piece: self._control.get(piece.text) if piece.control else None):
            texts = [piece.text for piece in run]
            ids += self._text_ids("".join(texts)) if known is None else [known for _ in texts]
        return ids

    def _text_ids(self, text: str) -> list[int]:
        return [i for part in self._cut.split(text) for i in self.model.encode(part)]

    def _control_ids(self) -> dict[str, int]:
        """Ids of the template's control tokens. Raises TeacherError when the vocabulary lacks one."""
        ids = {token: self.model.control_id(token) for token in (*self.format.control, *self.format.markers)}
        if missing := [token for token in self.format.control if ids[token] is None]:
            raise TeacherError(
                f"{self.name}: its tokenizer lacks {', '.join(missing)}, which the template of {self.format.name} "
                "has. Name the guard that the model is, or the model that the guard is."
            )
        return {token: i for token, i in ids.items() if i is not None}

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
            if len({self._first(self._ending + ask, answer) for answer in answers}) < len(answers):
                several = ", ".join(map(repr, answers))
                raise TeacherError(
                    f"{self.name}: its tokenizer begins several of {several} with the same token: they cannot be told "
                    f"apart. It is not the one that {self.format.name} was written for."
                )

    def _instead(self, probe: int) -> str:
        messages = PROBES[probe]
        policy = self.format.policies[0] if self.format.policies else None
        logp = self.model.start([self._ids(messages, policy)])
        first = self.format.steps["response" if messages[-1][0] == "assistant" else "prompt"][0]
        logp, _ = self._say(logp, [self._ending], [[]], first.ask)
        likeliest = [int(i) for i in np.argsort(-logp[0])[:3]]
        return f"Likeliest token ids there: {likeliest} ({', '.join(f'{np.exp(logp[0, i]):.1%}' for i in likeliest)})."


def _without_middle(text: str, kept: int) -> str:
    """The two ends of ``text``, ``kept`` characters of it together."""
    return text if kept == len(text) else f"{text[: kept // 2]} ... {text[len(text) - kept // 2 :]}"


def _combine(answers: Sequence[Judgement], policies: Sequence[Policy]) -> Judgement:
    """The answers to one row: of several policies, the one that finds most, and the hazards of each."""
    if not policies:
        return answers[0]
    worst = max(answers, key=lambda a: a.margin)
    shares = ((policy.hazards, a.p_unsafe / len(policy.hazards)) for policy, a in zip(policies, answers, strict=True))
    return Judgement(worst.margin, _sum_shares(shares), min(a.mass for a in answers))


def _sum_shares(shares: Iterable[tuple[Sequence[str], float]]) -> dict[str, float]:
    total: dict[str, float] = {}
    for codes, share in shares:
        for code in codes:
            total[code] = min(1.0, total.get(code, 0.0) + share)
    return total
