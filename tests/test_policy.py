"""Thresholds and actions."""

from __future__ import annotations

import math

import pytest

from edgeguard.errors import PolicyError
from edgeguard.policy import decide, threshold_for

THRESHOLDS = {"balanced": {"prompt": 0.5, "response": 0.4}, "low_fpr": {"prompt": 0.9}}


@pytest.mark.parametrize(
    ("p_unsafe", "truncated", "expected"),
    [
        (0.5, False, (True, "block")),
        (math.nextafter(0.5, 0), False, (False, "allow")),
        (0.0, False, (False, "allow")),
        (1.0, True, (True, "block")),
        (0.0, True, (False, "escalate")),
    ],
)
def test_decide(p_unsafe: float, truncated: bool, expected: tuple[bool, str]) -> None:
    assert decide(p_unsafe, 0.5, truncated=truncated) == expected


def test_a_threshold_of_zero_blocks_everything() -> None:
    assert decide(0.0, 0.0, truncated=False) == (True, "block")


def test_thresholds_by_point_and_target() -> None:
    assert threshold_for(THRESHOLDS, "balanced", "response") == 0.4


@pytest.mark.parametrize(
    ("point", "target", "message"),
    [
        ("strict", "prompt", "unknown operating point 'strict'. This bundle has: balanced, low_fpr"),
        ("low_fpr", "response", "low_fpr: no threshold for 'response'. It has: prompt"),
    ],
)
def test_what_a_bundle_does_not_define(point: str, target: str, message: str) -> None:
    with pytest.raises(PolicyError, match=message):
        threshold_for(THRESHOLDS, point, target)
