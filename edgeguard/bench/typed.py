"""Dataclasses to JSON and back: one definition gives the writer, the strict reader and the JSON schema.

A field's type says all: ``str``, ``int``, ``float``, ``bool``, ``X | None``, ``tuple[X, ...]``, ``Mapping[str, X]``,
another dataclass, or ``Any``. The schema is JSON Schema, draft 2020-12.
"""

from __future__ import annotations

import dataclasses
import math
import types
from collections.abc import Mapping
from typing import Any, TypeVar, Union, get_args, get_origin, get_type_hints

__all__ = ["JsonShapeError", "from_json", "json_schema"]

Made = TypeVar("Made")
DRAFT = "https://json-schema.org/draft/2020-12/schema"
# JSON's name, what Python's json module makes of it.
SCALARS: dict[Any, tuple[str, tuple[type, ...]]] = {
    str: ("string", (str,)),
    bool: ("boolean", (bool,)),
    int: ("integer", (int,)),
    float: ("number", (int, float)),
}


class JsonShapeError(ValueError):
    """A value is not of the type that stands there; says where."""


def from_json(kind: type[Made], value: object, where: str) -> Made:
    """Build the dataclass ``kind`` from parsed JSON. Raises JsonShapeError for a key or value that does not belong."""
    made: Made = _read(kind, value, where)
    return made


def json_schema(kind: type) -> dict[str, Any]:
    """The schema of ``kind``: every field required, no other allowed; the first line of a docstring describes it."""
    known: dict[str, Any] = {}
    top = _schema(kind, known)
    return {"$schema": DRAFT, **top, "$defs": dict(sorted(known.items()))}


def _read(kind: Any, value: object, where: str) -> Any:  # noqa: ANN401 - any type of the list above
    if kind is Any:
        return value
    if kind in SCALARS:
        name, accepted = SCALARS[kind]
        finite = not isinstance(value, float) or math.isfinite(value)
        if type(value) not in accepted or not finite:
            raise JsonShapeError(f"{where}: expected a {name}, found {value!r:.60}.")
        return kind(value)
    if dataclasses.is_dataclass(kind):
        return _read_object(kind, value, where)
    origin, arguments = get_origin(kind), get_args(kind)
    if origin in (Union, types.UnionType):
        inner = next(argument for argument in arguments if argument is not types.NoneType)
        return None if value is None else _read(inner, value, where)
    if origin is tuple:
        if not isinstance(value, list):
            raise JsonShapeError(f"{where}: expected a list, found {value!r:.60}.")
        return tuple(_read(arguments[0], item, f"{where}[{i}]") for i, item in enumerate(value))
    if not isinstance(value, dict):
        raise JsonShapeError(f"{where}: expected an object, found {value!r:.60}.")
    return {key: _read(arguments[1], item, f"{where}.{key}") for key, item in value.items()}


def _read_object(kind: Any, value: object, where: str) -> Any:  # noqa: ANN401 - a dataclass
    if not isinstance(value, dict):
        raise JsonShapeError(f"{where}: expected an object, found {value!r:.60}.")
    hints = get_type_hints(kind)
    if odd := sorted(hints.keys() ^ value.keys()):
        found = "lacks" if odd[0] in hints else "does not know"
        raise JsonShapeError(f"{where}: {kind.__name__} {found} the key {odd[0]!r}.")
    return kind(**{name: _read(hint, value[name], f"{where}.{name}") for name, hint in hints.items()})


def _schema(kind: Any, known: dict[str, Any]) -> dict[str, Any]:  # noqa: ANN401 - any type of the list above
    if kind is Any:
        return {}
    if kind in SCALARS:
        return {"type": SCALARS[kind][0]}
    if dataclasses.is_dataclass(kind):
        return _object_schema(kind, known)
    origin, arguments = get_origin(kind), get_args(kind)
    if origin in (Union, types.UnionType):
        inner = next(argument for argument in arguments if argument is not types.NoneType)
        return {"anyOf": [_schema(inner, known), {"type": "null"}]}
    if origin is tuple:
        return {"type": "array", "items": _schema(arguments[0], known)}
    assert origin is not None and issubclass(origin, Mapping), kind  # a programming mistake, not input
    return {"type": "object", "additionalProperties": _schema(arguments[1], known)}


def _object_schema(kind: Any, known: dict[str, Any]) -> dict[str, Any]:  # noqa: ANN401 - a dataclass
    if kind.__name__ not in known:
        known[kind.__name__] = None  # before its fields, should one refer back
        hints = get_type_hints(kind)
        known[kind.__name__] = {
            "type": "object",
            "description": " ".join((kind.__doc__ or "").split()),
            "properties": {name: _schema(hint, known) for name, hint in hints.items()},
            "required": list(hints),
            "additionalProperties": False,
        }
    return {"$ref": f"#/$defs/{kind.__name__}"}
