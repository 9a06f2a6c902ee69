"""A dialogue that is judged turn by turn: what was read before is not computed again."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any

from edgeguard.verdict import Verdict

if TYPE_CHECKING:
    from edgeguard.guard import Guard

__all__ = ["Conversation"]


class Conversation:
    """The messages so far. Make one with :meth:`edgeguard.Guard.conversation`; use it from one thread at a time.

    The engine's keys and values of the turns are kept in memory as long as this object lives.
    """

    def __init__(self, guard: Guard, operating_point: str | None) -> None:
        """An empty dialogue."""
        self._guard = guard
        self._operating_point = operating_point
        self._messages: list[dict[str, str]] = []
        self._seen: Any = None

    @property
    def messages(self) -> list[dict[str, str]]:
        """A copy of the messages, oldest first: ``{"role", "content"}``."""
        return [dict(message) for message in self._messages]

    def classify(self, role: str, content: str) -> Verdict:
        """Add a message of ``user``, ``assistant`` or ``system`` and judge it in the light of those before it.

        The verdict is that of :meth:`Guard.classify` on all messages. Raises what that raises; the message is then
        not added.
        """
        start = time.perf_counter()
        messages = [*self._messages, {"role": role, "content": content}]
        point = self._guard._known_point(self._operating_point)
        encoded = self._guard._encode(None, None, None, messages)
        row, seen = self._guard._read_on(encoded, self._seen)
        self._messages, self._seen = messages, seen
        return self._guard._verdict(encoded, row, point, 1000 * (time.perf_counter() - start))
