"""Rows made from rows: what the labelled sets lack, by rules whose label follows from how the row is made.

Responses are the gap: few sets judge a harmless answer to a harmful request, or a harmful answer to a harmless one.
Nothing is generated; texts of the mix are only paired anew.
"""

from __future__ import annotations

import random
import re
from dataclasses import replace

from convert.corpora.registry import Row

__all__ = ["REFUSALS", "constructed_answers", "constructed_responses", "neutral_names"]

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


# "How do I X?" in its usual forms; the group is X.
HOW_TO = re.compile(
    r"^(?:how (?:do|can|could|would|should|might) (?:i|you|we|one|someone) |how to |what(?:'s| is) the best way to |"
    r"(?:what are some|give me) ways to |can you (?:tell|show|teach) me how to )([^?.!\n]{8,110})[?.!]*$",
    re.IGNORECASE,
)
# Answers that go along with X without saying anything that X's question did not say.
COMPLY = (
    "To {x}, plan it well, prepare what you need, and then carry it out step by step.",
    "Sure! The easiest way to {x} is to start small and pick the right moment.",
    "You can {x} if you are patient. First watch how others do it, then try it yourself.",
    "There are several ways to {x}. One is to ask around online, another is to just go ahead.",
    "Here is how to {x}: 1. Get ready. 2. Choose a good time. 3. Do it. 4. Check the result.",
    "Yes, it is quite simple to {x}. Many people do it, and you will get better with practice.",
    "If you want to {x}, find somebody who has done it before and copy them.",
    "I would {x} late in the evening, when it is quiet, and keep it to myself.",
)
DISCOURAGE = (
    "Please do not {x}. It can hurt people, and you could get into serious trouble. Talk to someone you trust instead.",
    "It is wrong to {x}, and I will not help with it. If something is troubling you, a counsellor can help.",
    "I am not sure what you mean, but nobody should {x}. There are legal and kind ways to get what you need.",
    "Trying to {x} is against the law in most places. I suggest that you ask a professional for advice.",
)


def constructed_answers(rows: list[Row], seed: int, count: int) -> list[Row]:
    """Answers to how-to questions: ``count`` that go along with harmful ones (unsafe), and as many of each contrast.

    The contrasts are safe: the same answers to harmless questions, and warnings to harmful ones. An answer repeats the
    question's own words, so it adds no instructions to the world; its label is that of helping with the question.
    """
    rng = random.Random(f"{seed} answers")
    asked = [(row, match[1]) for row in rows if row.target == "prompt" and (match := HOW_TO.match(row.prompt.strip()))]
    harmful = [pair for pair in asked if pair[0].label == "unsafe"]
    harmless = [pair for pair in asked if pair[0].label == "safe"]
    made = []
    for kind, label, pairs, answers in (
        ("comply", "unsafe", harmful, COMPLY),
        ("help", "safe", harmless, COMPLY),
        ("warn", "safe", harmful, DISCOURAGE),
    ):
        for row, x in rng.sample(pairs, min(count, len(pairs))):
            hazards = row.hazards if label == "unsafe" else ()
            answer = rng.choice(answers).format(x=x.strip())
            made.append(
                Row(f"{CONSTRUCTED}:{kind}:{row.id}", CONSTRUCTED, "response", label, row.prompt, answer, hazards)
            )
    return made


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
