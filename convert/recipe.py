"""Recipes: TOML files that describe a guard from its base weights to its bundle."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from edgeguard.bundle import sha256_of
from edgeguard.errors import EdgeguardError

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

__all__ = ["Recipe", "RecipeError", "load_recipe"]

TABLES = ("base", "student", "train", "qat", "export", "calibrate", "evaluate", "corpus")
OPTIONAL = ("teacher", "distill", "roads", "shape")
HERE = Path(__file__).resolve().parent


class RecipeError(EdgeguardError):
    """A recipe that lacks something, or has something that no step reads."""


@dataclass(frozen=True)
class Recipe:
    """A parsed recipe.

    ``build``: the folder its steps work in; ``models``: where the bundle's folder goes; ``path`` and ``sha256``: the
    bundle's provenance.
    """

    name: str
    version: str
    license: str
    languages: list[str]
    base: dict[str, Any]
    student: dict[str, Any]
    train: dict[str, Any]
    qat: dict[str, Any]
    export: dict[str, Any]
    calibrate: dict[str, Any]
    evaluate: dict[str, Any]
    corpus: dict[str, Any]
    teacher: dict[str, Any]
    distill: dict[str, Any]
    roads: dict[str, Any]
    shape: dict[str, Any]
    path: Path
    sha256: str
    build: Path
    models: Path
    start: Recipe | None = None
    """Another recipe, whose trained student this one's training starts from (``start_from`` of [student])."""


def load_recipe(path: Path, build: Path | None = None, models: Path | None = None) -> Recipe:
    """Read a recipe; a relative path is also looked for beside this package. Raises RecipeError.

    A table that is only ``like = "other.toml"`` is that recipe's table of the same name.
    """
    found = next((p for p in (path, HERE / path) if p.is_file()), None)
    if found is None:
        known = ", ".join(f"recipes/{p.name}" for p in sorted((HERE / "recipes").glob("*.toml")))
        raise RecipeError(f"no recipe at {path}. There are: {known}.")
    data = _parse(found)
    wanted = {"name", "version", "license", "languages", *TABLES}
    missing, unknown = wanted - set(data), set(data) - wanted - set(OPTIONAL)
    if missing or unknown:
        raise RecipeError(f"{found.name}: missing {sorted(missing)}, unknown {sorted(unknown)}.")
    data = {**dict.fromkeys(OPTIONAL, {}), **data}
    for table in (*TABLES, *OPTIONAL):
        if set(data[table]) == {"like"}:
            data[table] = _parse(found.with_name(data[table]["like"]))[table]
    if data["distill"] and not data["teacher"]:
        raise RecipeError(f"{found.name}: [distill] needs a [teacher].")
    if "start_share" in data["distill"] and "start_from" not in data["student"]:
        raise RecipeError(f"{found.name}: start_share of [distill] needs start_from in [student].")
    folder = build or HERE.parent / "build" / found.stem
    start = _start(data, found, build / "start" if build else None)
    models = models or HERE.parent / "models"
    return Recipe(**data, path=found, sha256=sha256_of(found), build=folder, models=models, start=start)


def _start(data: dict[str, Any], path: Path, build: Path | None) -> Recipe | None:
    """The recipe that ``start_from`` names, which stands beside this one and cuts the same student out of its base."""
    cut = {name: value for name, value in data["student"].items() if name != "start_from"}
    if len(cut) == len(data["student"]):
        return None
    start = load_recipe(path.with_name(data["student"]["start_from"]), build)
    if (start.base, start.student) != (data["base"], cut):
        raise RecipeError(f"{path.name}: it starts from {start.path.name}, so [base] and [student] must be as there.")
    return start


def _parse(path: Path) -> dict[str, Any]:
    try:
        data: dict[str, Any] = tomllib.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise RecipeError(f"no recipe at {path}.") from error
    except tomllib.TOMLDecodeError as error:
        raise RecipeError(f"{path.name}: {error}") from error
    return data
