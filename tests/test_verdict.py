"""Verdict: fields, flagged, and JSON."""

from __future__ import annotations

import dataclasses
import json

import pytest

from edgeguard.verdict import ACTIONS, Verdict


def make(action: str = "block") -> Verdict:
    return Verdict(
        unsafe=action == "block",
        p_unsafe=0.123456789,
        margin=-1 / 3,
        action=action,
        hazards={"S1": 2 / 3, "S2": 1e-9},
        operating_point="balanced",
        tokens=12,
        truncated=False,
        latency_ms=1.00000049,
        bundle="tiny@0.0.1",
        engine="onnx",
    )


def test_to_dict_is_exactly_this() -> None:
    assert json.dumps(make().to_dict()) == (
        '{"unsafe": true, "p_unsafe": 0.123457, "margin": -0.333333, "action": "block", '
        '"hazards": {"S1": 0.666667, "S2": 0.0}, "operating_point": "balanced", "tokens": 12, "truncated": false, '
        '"latency_ms": 1.0, "bundle": "tiny@0.0.1", "engine": "onnx"}'
    )


def test_types_survive_rounding() -> None:
    data = make().to_dict()
    assert type(data["tokens"]) is int
    assert type(data["unsafe"]) is bool


def test_flagged_is_whatever_is_not_allowed() -> None:
    assert {action: make(action).flagged for action in ACTIONS} == {"allow": False, "block": True, "escalate": True}


def test_a_verdict_cannot_be_changed() -> None:
    verdict = make()
    with pytest.raises(dataclasses.FrozenInstanceError):
        verdict.action = "allow"  # type: ignore[misc]
