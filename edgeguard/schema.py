"""Small checks for untrusted JSON: each names the place, what was expected and what was found.

Every function takes the value, ``where`` it stands (``manifest.json: files.model.onnx.bytes``) and raises BundleError.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Sequence
from typing import Any, NoReturn

from edgeguard.errors import BundleError

__all__ = ["fail", "integer", "json_object", "number", "objects", "optional_text", "record", "text", "texts"]


def fail(where: str, expected: str, found: object) -> NoReturn:
    """Raise the BundleError that all checks share; a long value is shortened."""
    shown = repr(found)
    raise BundleError(f"{where}: expected {expected}, found {shown if len(shown) <= 120 else shown[:117] + '...'}.")


def json_object(raw: bytes, where: str) -> dict[str, Any]:
    """Parse one JSON object strictly: UTF-8, no repeated keys, no NaN or Infinity."""
    try:
        value = json.loads(raw.decode(), object_pairs_hook=_unique_pairs, parse_constant=_refuse_constant)
    except (ValueError, RecursionError) as error:
        raise BundleError(f"{where}: expected one JSON object, found {error}.") from error
    return value if isinstance(value, dict) else fail(where, "one JSON object", value)


def record(value: object, where: str, keys: Sequence[str]) -> dict[str, Any]:
    """An object with exactly these keys."""
    if not isinstance(value, dict):
        fail(where, f"an object with the keys {sorted(keys)}", value)
    missing, unknown = sorted(set(keys) - set(value)), sorted(set(value) - set(keys))
    if missing:
        raise BundleError(f"{where}: expected the keys {sorted(keys)}, found none of the name {missing[0]!r}.")
    if unknown:
        raise BundleError(f"{where}: expected only the keys {sorted(keys)}, found {unknown[0]!r}.")
    return value


def objects(value: object, where: str) -> dict[str, Any]:
    """An object with names of the bundle's own choice, at least one."""
    return value if isinstance(value, dict) and value else fail(where, "an object with at least one key", value)


def text(value: object, where: str, *, pattern: str = r".+", called: str = "a text that is not empty") -> str:
    """A string that matches ``pattern`` as a whole; ``called`` describes it in the message."""
    if not isinstance(value, str) or not re.fullmatch(pattern, value, re.DOTALL | re.ASCII):
        fail(where, called, value)
    return value


def optional_text(value: object, where: str, *, pattern: str = r".+", called: str = "a text or null") -> str | None:
    """A string as in :func:`text`, or null."""
    return None if value is None else text(value, where, pattern=pattern, called=called)


def texts(value: object, where: str) -> tuple[str, ...]:
    """A list of at least one non-empty string, none twice."""
    if not isinstance(value, list) or not value:
        fail(where, "a list of at least one text", value)
    found = tuple(text(item, f"{where}[{index}]") for index, item in enumerate(value))
    if len(set(found)) < len(found):
        fail(where, "no entry twice", value)
    return found


def integer(value: object, where: str, *, low: int, high: int) -> int:
    """A whole number in [low, high]; true and false are not numbers."""
    if type(value) is not int or not low <= value <= high:
        fail(where, f"a whole number from {low} to {high}", value)
    return value


def number(value: object, where: str, *, low: float = -1e9, high: float = 1e9, above: bool = False) -> float:
    """A finite number in [low, high], or in (low, high] when ``above``."""
    ok = type(value) is int or (isinstance(value, float) and math.isfinite(value))
    if not ok or not low <= value <= high or (above and value == low):  # type: ignore[operator]
        fail(where, f"a finite number {'above' if above else 'from'} {low:g}, at most {high:g}", value)
    return float(value)  # type: ignore[arg-type]


def boolean(value: object, where: str) -> bool:
    """True or false, and nothing that merely counts as one."""
    if not isinstance(value, bool):
        fail(where, "true or false", value)
    return value


def _unique_pairs(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, value in pairs:
        if name in found:
            raise ValueError(f"the key {name!r} twice in one object")
        found[name] = value
    return found


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"{name}, which is not JSON")
