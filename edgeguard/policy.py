"""From a probability to an action: thresholds per operating point and target.

A guard that could not read everything never says "allow": truncated text that is not blocked is escalated.
"""

from __future__ import annotations

from collections.abc import Mapping

from edgeguard.errors import PolicyError

__all__ = ["decide", "threshold_for"]


def threshold_for(thresholds: Mapping[str, Mapping[str, float]], operating_point: str, target: str) -> float:
    """The threshold on p_unsafe. ``thresholds``: operating point -> target -> value in [0, 1].

    Raises PolicyError for an operating point or target that the bundle does not define.
    """
    if operating_point not in thresholds:
        raise PolicyError(f"unknown operating point {operating_point!r}. This bundle has: {', '.join(thresholds)}.")
    targets = thresholds[operating_point]
    if target not in targets:
        raise PolicyError(f"{operating_point}: no threshold for {target!r}. It has: {', '.join(targets)}.")
    return targets[target]


def decide(p_unsafe: float, threshold: float, *, truncated: bool) -> tuple[bool, str]:
    """Return (unsafe, action); ``p_unsafe`` equal to the threshold is unsafe."""
    if p_unsafe >= threshold:
        return True, "block"
    return False, "escalate" if truncated else "allow"
