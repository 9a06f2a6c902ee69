"""What a platform does beside running the model: token ids of a conversation, the verdict of a margin, golden vectors.

Plain Python, nothing of edgeguard: this is the code to port. ``manifest`` is ``manifest.json``, parsed.
"""

from __future__ import annotations

import json
import math
from pathlib import Path

CHARS_PER_TOKEN = 128  # at most: so huge text is cut before it is tokenized
JUDGED_SHARE = 0.75  # of the room, for the judged message when the turns before it are long
FEW = 8  # tokens of a turn: fewer say nothing


def encode(messages, tokenize, manifest):
    """[{"role", "content"}, ...], the judged message last -> (token ids, "prompt" or "response", was text left out).

    ``tokenize``: text -> ids; what looks like a special token in a text must stay text. Raises ValueError for nothing
    to judge, or ids that no text may yield.
    """
    template, limit = manifest["template"], manifest["max_tokens"]
    if not messages or not messages[-1]["content"].strip("\x00 \t\r\n"):
        raise ValueError("nothing to judge: the last message is empty")
    target = "response" if messages[-1]["role"] == "assistant" else "prompt"
    side = limit * CHARS_PER_TOKEN
    bodies = [tokenize(_clip(message["content"], side)) for message in messages]
    if any(token in template["reserved"] for body in bodies for token in body):
        raise ValueError("the tokenizer turned text into a special token")
    openings = [template["opening"][message["role"]] for message in messages]
    overheads = [len(opening) + len(template["closing"]) for opening in openings]
    kept = _fit(bodies, overheads, limit - len(template["read"][target]))
    ids = []
    for opening, body in zip(openings[len(bodies) - len(kept) :], kept):
        ids += [*opening, *body, *template["closing"]]
    clipped = any(len(message["content"]) > 2 * side for message in messages)
    return ids + template["read"][target], target, clipped or kept != bodies


def verdict(margin, target, truncated, manifest, point="balanced"):
    """Margin -> (p_unsafe, action): "allow", "block", or "escalate" where not all was read; ValueError for NaN."""
    if not math.isfinite(margin):
        raise ValueError(f"the model returned {margin}")
    calibration = manifest["calibration"][target]
    x = margin / calibration["temperature"] + calibration["bias"]
    p_unsafe = 1 / (1 + math.exp(-x)) if x >= 0 else math.exp(x) / (1 + math.exp(x))  # neither overflows
    if p_unsafe >= manifest["operating_points"][point]["thresholds"][target]:
        return p_unsafe, "block"
    return p_unsafe, "escalate" if truncated else "allow"


def run_golden(file, tokenize, margin_of, manifest):
    """Compute every line of a golden file and print a JSON object for each; returns 2 if a line is wrong, else 0.

    ``same_ids``: tokenizer and template are right; ``same_rules``: the golden margin gives the golden verdict;
    ``margin``: of this machine, to be within the line's tolerance.
    """
    wrong = 0
    for text in Path(file).read_text("utf-8").split("\n"):
        if not text:
            continue
        golden = json.loads(text)
        ids, target, truncated = encode(golden["messages"], tokenize, manifest)
        margin = margin_of(ids)
        p_unsafe, action = verdict(margin, target, truncated, manifest)
        p_golden, golden_action = verdict(golden["margin"], target, truncated, manifest)
        same_rules = golden_action == golden["action"] and abs(p_golden - golden["p_unsafe"]) < 1e-6
        answer = {"same_ids": ids == golden["ids"], "same_rules": same_rules}
        ok = all(answer.values()) and abs(margin - golden["margin"]) <= golden["tolerance"]
        print(json.dumps({"ok": ok, **answer, "margin": margin, "p_unsafe": p_unsafe, "action": action}), flush=True)
        wrong += not ok
    return 2 if wrong else 0


def _clip(text, side):
    return text if len(text) <= 2 * side else text[:side] + text[-side:]


def _fit(bodies, overheads, room):
    """Trim to ``room`` tokens: the judged message before the newest turns, head and tail of each."""
    if sum(map(len, bodies)) + sum(overheads) <= room:
        return bodies
    wanted = sum(map(len, bodies[:-1])) + sum(overheads[:-1])
    own = room - overheads[-1]
    kept = [_cut(bodies[-1], own - min(wanted, int(room * (1 - JUDGED_SHARE)), own // 2))]
    left = own - len(kept[0])
    for body, overhead in zip(bodies[-2::-1], overheads[-2::-1]):
        if left - overhead < min(len(body), FEW):
            break
        kept.insert(0, _cut(body, left - overhead))
        left -= overhead + len(kept[0])
    return kept


def _cut(ids, room):
    head = (room + 1) // 2
    return ids if len(ids) <= room else ids[:head] + ids[len(ids) - (room - head) :]
