"""From a conversation to token ids: the template of a bundle.

A template is data (lists of token ids in the bundle's ``manifest.json``), never a format string: structure comes from
ids that the template holds, text comes from the tokenizer, and text that yields a reserved id is refused. So no user
text can close its own turn or open another one, whatever it contains.

Over-long input keeps its head and its tail, and says so (:attr:`Encoded.truncated`); the judged message is kept
before the turns that lead up to it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from edgeguard.errors import BundleError, InputError

if TYPE_CHECKING:
    from tokenizers import Tokenizer

__all__ = ["ROLES", "TARGETS", "Encoded", "Message", "Template", "as_messages"]

ROLES = ("system", "user", "assistant")
TARGETS = ("prompt", "response")
# The judged message may use this share of the room that long context would otherwise take.
JUDGED_SHARE = 0.75
# Upper bound on characters that one token stands for, to cut huge text before it is tokenized. The longest entry of
# the GPT-2 style vocabularies in use here is 128 characters (runs of spaces).
MAX_CHARS_PER_TOKEN = 128
# Ids of a manifest stay well inside int64, the dtype that engines take.
MAX_ID = 2**31

Message = tuple[str, str]


@dataclass(frozen=True)
class Encoded:
    """Token ids ready for an engine.

    ``ids``: 1-D list of token ids, at most the bundle's ``max_tokens``. ``target``: ``prompt`` or ``response``, what
    the verdict is about. ``truncated``: True when some text was left out.
    """

    ids: list[int]
    target: str
    truncated: bool


@dataclass(frozen=True)
class Template:
    """Token ids around each turn, and the ids after which the head is read.

    ``opening``: role -> ids before its text; ``closing``: ids after any text; ``read``: target -> ids appended last
    (the logits of the very last token are the verdict); ``reserved``: ids that text may never produce;
    ``pad_id``: fills the right of shorter rows in a batch.
    """

    opening: Mapping[str, Sequence[int]]
    closing: Sequence[int]
    read: Mapping[str, Sequence[int]]
    reserved: frozenset[int]
    pad_id: int

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Template:
        """Read the ``template`` object of a manifest. Raises BundleError that names the bad field."""
        known = {"opening", "closing", "read", "reserved", "pad_id"}
        if set(data) != known:
            raise BundleError(
                f"template: expected the fields {sorted(known)}, found {sorted(data)}. "
                "Use a bundle made for this version."
            )
        for name, keys in (("opening", ROLES), ("read", TARGETS)):
            if not isinstance(data[name], Mapping) or set(data[name]) != set(keys):
                raise BundleError(
                    f"template.{name}: expected an object with the keys {list(keys)}, found {data[name]!r:.80}."
                )
        lists = [data["closing"], data["reserved"], *data["opening"].values(), *data["read"].values()]
        for ids in [*lists, [data["pad_id"]]]:
            if not isinstance(ids, list) or not all(type(i) is int and 0 <= i < MAX_ID for i in ids):
                raise BundleError(f"template: expected lists of token ids (integers of 0 and up), found {ids!r:.80}.")
        return cls(
            opening={k: tuple(v) for k, v in data["opening"].items()},
            closing=tuple(data["closing"]),
            read={k: tuple(v) for k, v in data["read"].items()},
            reserved=frozenset(data["reserved"]),
            pad_id=data["pad_id"],
        )

    def to_dict(self) -> dict[str, Any]:
        """The ``template`` object of a manifest."""
        return {
            "opening": {k: list(v) for k, v in self.opening.items()},
            "closing": list(self.closing),
            "read": {k: list(v) for k, v in self.read.items()},
            "reserved": sorted(self.reserved),
            "pad_id": self.pad_id,
        }

    def encode(self, tokenizer: Tokenizer, messages: Sequence[Message], max_tokens: int) -> Encoded:
        """Encode a conversation; its last message is the one judged.

        ``messages``: (role, text) pairs, oldest first. Returns at most ``max_tokens`` ids. Raises InputError for an
        empty conversation or judged message, and when text yields a reserved id (a tokenizer at fault).
        """
        if not messages or not messages[-1][1].strip("\x00 \t\r\n"):
            raise InputError("nothing to judge: the judged message is empty. Pass some text.")
        target = "response" if messages[-1][0] == "assistant" else "prompt"
        room = max_tokens - len(self.read[target])
        bodies, overheads, clipped = self._newest_turns(tokenizer, messages, max_tokens)
        kept, cut = _fit(bodies, overheads, room)
        ids: list[int] = []
        for (role, _), body in zip(messages[len(messages) - len(kept) :], kept, strict=True):
            ids += [*self.opening[role], *body, *self.closing]
        ids += self.read[target]
        return Encoded(ids=ids, target=target, truncated=cut or clipped or len(kept) < len(messages))

    def _newest_turns(
        self, tokenizer: Tokenizer, messages: Sequence[Message], max_tokens: int
    ) -> tuple[list[list[int]], list[int], bool]:
        """Tokenize from the newest turn back until older ones cannot fit, so that a long history costs nothing.

        Returns the token ids and the overhead of each such turn, oldest first, and whether any text was clipped.
        """
        bodies: list[list[int]] = []
        overheads: list[int] = []
        clipped = False
        context = 0
        for role, text in reversed(messages):
            text, was_cut = _clip_text(text, max_tokens)
            bodies.insert(0, self._tokenize(tokenizer, text))
            overheads.insert(0, len(self.opening[role]) + len(self.closing))
            clipped = clipped or was_cut
            context += len(bodies[0]) + overheads[0] if len(bodies) > 1 else 0
            if context >= max_tokens:
                break
        return bodies, overheads, clipped

    def _tokenize(self, tokenizer: Tokenizer, text: str) -> list[int]:
        ids: list[int] = tokenizer.encode(text, add_special_tokens=False).ids
        if not self.reserved.isdisjoint(ids):
            raise InputError(
                f"the tokenizer turned plain text into the reserved ids {sorted(self.reserved & set(ids))}. "
                "Its tokenizer.json must not match special tokens in text; make the bundle again."
            )
        return ids


def as_messages(
    text: str | None = None,
    *,
    prompt: str | None = None,
    response: str | None = None,
    messages: Sequence[Mapping[str, str]] | None = None,
) -> list[Message]:
    """Bring the three ways to ask into one: (role, text) pairs, the judged message last.

    Exactly one of ``text``, ``prompt`` (with or without ``response``) or ``messages`` (``[{"role", "content"}]``) is
    given; a ``response`` alone is judged without context. Lone surrogates, which no tokenizer takes, become U+FFFD.
    Raises InputError for anything else.
    """
    ways = [text is not None, prompt is not None or response is not None, messages is not None]
    if sum(ways) != 1:
        raise InputError("pass exactly one of: a text, prompt= (with or without response=), or messages=.")
    if text is not None:
        pairs: list[tuple[Any, Any]] = [("user", text)]
    elif messages is not None:
        if isinstance(messages, str | bytes) or not isinstance(messages, Sequence):
            raise InputError("messages must be a list of objects with 'role' and 'content'.")
        pairs = [_pair(i, message) for i, message in enumerate(messages)]
    else:
        pairs = [(role, value) for role, value in (("user", prompt), ("assistant", response)) if value is not None]
    for role, value in pairs:
        if role not in ROLES:
            raise InputError(f"unknown role {role!r}. Use one of: {', '.join(ROLES)}.")
        if not isinstance(value, str):
            raise InputError(f"the text of a {role} message must be a string, not {type(value).__name__}.")
    return [(role, _without_surrogates(value)) for role, value in pairs]


def _pair(index: int, message: Any) -> tuple[Any, Any]:  # noqa: ANN401 - user input, checked here
    if not isinstance(message, Mapping) or not {"role", "content"} <= set(message):
        raise InputError(f"messages[{index}]: expected an object with 'role' and 'content', found {message!r:.80}.")
    return message["role"], message["content"]


def _without_surrogates(text: str) -> str:
    """Join surrogate pairs into the character they stand for; a lone surrogate becomes U+FFFD."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return text.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace")
    return text


def _clip_text(text: str, max_tokens: int) -> tuple[str, bool]:
    """Cut text that cannot fit whatever its tokens are, so that megabytes are never tokenized."""
    side = max_tokens * MAX_CHARS_PER_TOKEN
    if len(text) <= 2 * side:
        return text, False
    return text[:side] + text[-side:], True


def _fit(bodies: list[list[int]], overheads: list[int], room: int) -> tuple[list[list[int]], bool]:
    """Trim bodies to ``room`` tokens with overheads: newest turns first, head and tail of each kept."""
    if sum(map(len, bodies)) + sum(overheads) <= room:
        return bodies, False
    *context, judged = bodies
    wanted = sum(map(len, context)) + sum(overheads[:-1])
    own = room - overheads[-1]
    kept = [_head_and_tail(judged, own - min(wanted, int(room * (1 - JUDGED_SHARE)), own // 2))]
    left = own - len(kept[0])
    for body, overhead in zip(reversed(context), reversed(overheads[:-1]), strict=True):
        if left - overhead < min(len(body), 8):  # a turn of a few tokens says nothing: drop it and those before
            break
        kept.insert(0, _head_and_tail(body, left - overhead))
        left -= overhead + len(kept[0])
    return kept, True


def _head_and_tail(ids: list[int], room: int) -> list[int]:
    if len(ids) <= room:
        return ids
    head = (room + 1) // 2
    return ids[:head] + ids[len(ids) - (room - head) :]
