"""What a guard says about one text."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

__all__ = ["ACTIONS", "Verdict"]

ACTIONS = ("allow", "block", "escalate")
# Enough for any threshold, and few enough digits that the same verdict prints the same everywhere.
DECIMALS = 6


@dataclass(frozen=True)
class Verdict:
    """The judgement on the last message of a conversation.

    ``p_unsafe``: calibrated probability in [0, 1]; ``margin``: logit(unsafe) - logit(safe), uncalibrated;
    ``hazards``: probability per hazard code, each on its own (they do not sum to 1); ``tokens``: ids read, template
    included; ``truncated``: True when some text was left out; ``latency_ms``: wall time, of a batch shared evenly.
    """

    unsafe: bool
    p_unsafe: float
    margin: float
    action: str
    hazards: dict[str, float]
    operating_point: str
    tokens: int
    truncated: bool
    latency_ms: float
    bundle: str
    engine: str

    @property
    def flagged(self) -> bool:
        """True unless the action is ``allow``: what a caller must not let through unseen."""
        return self.action != "allow"

    def to_dict(self) -> dict[str, Any]:
        """A JSON-ready dict of every field, floats rounded to 6 places."""
        return {name: _rounded(value) for name, value in asdict(self).items()}


def _rounded(value: Any) -> Any:  # noqa: ANN401 - any JSON value
    if isinstance(value, dict):
        return {key: _rounded(item) for key, item in value.items()}
    return round(value, DECIMALS) if isinstance(value, float) else value
