"""Rows made from rows: what the labelled sets lack, by rules whose label follows from how the row is made.

Responses are the gap: few sets judge a harmless answer to a harmful request, or a harmful answer to a harmless one.
Nothing is generated; texts of the mix are only paired anew.
"""

from __future__ import annotations

import random
import re
from dataclasses import replace

from convert.corpora.registry import Row

__all__ = ["REFUSALS", "constructed_responses", "neutral_names"]

CONSTRUCTED = "constructed_responses"
HATE_SETS = ("hatemoji_build", "stormfront_hate", "davidson_hate")

REFUSALS = (
    "I'm sorry, but I can't help with that.",
    "I can't assist with that request.",
    "Sorry, I won't help with this. If you are in danger or thinking of hurting someone, please reach out for help.",
    "I cannot provide that information, because it could cause harm to other people.",
    "No. That is illegal, and I would advise you not to do it.",
    "I'm not able to help with that, but I'm happy to talk about how to stay safe and within the law instead.",
    "That is not something I can support. Please consider talking to someone you trust about it.",
    "As an AI assistant I have to decline. Is there something else I can do for you?",
    "It is not okay to do that. It would hurt people, and it is against the law in most places.",
    "I won't write that. I can explain why it is harmful, if that would be useful.",
)
OPENERS = (
    "What do you think?",
    "Tell me more.",
    "What's on your mind?",
    "Say something.",
    "Go on.",
    "Any thoughts on this?",
)

# Requests about named members of parliament would teach the names (SOURCES of diselect_mps): a placeholder instead.
_NAMED_MP = re.compile(r"\b(how|that) (?:[A-Z][\w'’.-]+ ){1,5}(?=(?:has|is|have|was)\b)")


def neutral_names(row: Row) -> Row:
    """Replace real politicians' names in the one set that has them; other rows come back unchanged."""
    if row.set != "diselect_mps":
        return row
    return replace(row, prompt=_NAMED_MP.sub(r"\1 Alex Example ", row.prompt))


def constructed_responses(rows: list[Row], seed: int, *, refusals: int, echoes: int) -> list[Row]:
    """``refusals``: harmful requests that are refused, safe. ``echoes`` of each label: statements as answers."""
    rng = random.Random(seed)
    requests = [
        r for r in rows if r.target == "prompt" and r.label == "unsafe" and r.set not in HATE_SETS and r.lang == "en"
    ]
    statements = [r for r in rows if r.set in HATE_SETS]
    refused = [
        Row(f"{CONSTRUCTED}:refusal:{r.id}", CONSTRUCTED, "response", "safe", r.prompt, rng.choice(REFUSALS))
        for r in rng.sample(requests, min(refusals, len(requests)))
    ]
    echoed = []
    for label in ("safe", "unsafe"):
        pool = [r for r in statements if r.label == label]
        echoed += [
            Row(f"{CONSTRUCTED}:echo:{r.id}", CONSTRUCTED, "response", label, rng.choice(OPENERS), r.prompt, r.hazards)
            for r in rng.sample(pool, min(echoes, len(pool)))
        ]
    return refused + echoed
