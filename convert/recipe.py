"""Recipes: TOML files that describe a guard from its base weights to its bundle."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from convert.checks import Kind, faults
from convert.recipe_tables import LIKE, RECIPE
from edgeguard.bundle import sha256_of
from edgeguard.errors import EdgeguardError

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

__all__ = ["Recipe", "RecipeError", "load_recipe"]

HERE = Path(__file__).resolve().parent


class RecipeError(EdgeguardError):
    """A recipe that lacks something, or has something that no step reads."""


@dataclass(frozen=True)
class Recipe:
    """A parsed recipe, its tables as they stand in the file (see :mod:`convert.recipe_tables`); absent ones are empty.

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
    gptq: dict[str, Any]
    tune: dict[str, Any]
    shape: dict[str, Any]
    path: Path
    sha256: str
    build: Path
    models: Path
    start: Recipe | None = None
    """Another recipe, whose trained student this one's training starts from (``start_from`` of [student])."""

    @property
    def road(self) -> str:
        """The road to INT4 that ships: ``qat``, ``gptq`` or ``tune``."""
        return str(self.export.get("road", "qat"))


def load_recipe(path: Path, build: Path | None = None, models: Path | None = None) -> Recipe:
    """Read a recipe; a relative path is also looked for beside this package.

    A table that is only ``like = "other.toml"`` is that recipe's table of the same name. Raises RecipeError, which
    names every fault with file, table, key, what was found and what is expected.
    """
    found = next((p for p in (path, HERE / path) if p.is_file()), None)
    if found is None:
        known = ", ".join(f"recipes/{p.name}" for p in sorted((HERE / "recipes").glob("*.toml")))
        raise RecipeError(f"no recipe at {path}. There are: {known}.")
    data = _read(found)
    start = _start(data, found, build / "start" if build else None)
    absent: dict[str, Any] = {name: {} for name in RECIPE.optional if name not in data}
    return Recipe(
        **data,
        **absent,
        path=found,
        sha256=sha256_of(found),
        build=build or HERE.parent / "build" / found.stem,
        models=models or HERE.parent / "models",
        start=start,
    )


def _read(path: Path) -> dict[str, Any]:
    """The checked tables of the recipe at ``path``, those of others put in where it says ``like``."""
    data = _parse(path)
    for name, kind in {**RECIPE.required, **RECIPE.optional}.items():
        if isinstance(data.get(name), dict) and "like" in data[name]:
            _check(data[name], LIKE, path, name)
            other = path.with_name(data[name]["like"])
            tables = _parse(other)
            if name not in tables:
                raise RecipeError(f"{path.name}: [{name}] like: expected a recipe with [{name}], found {other.name}.")
            _check(tables[name], kind, other, name)
            data[name] = tables[name]
    _check(data, RECIPE, path)
    return data


def _start(data: dict[str, Any], path: Path, build: Path | None) -> Recipe | None:
    """The recipe that ``start_from`` names, which stands beside this one and cuts the same student out of its base."""
    cut = {name: value for name, value in data["student"].items() if name != "start_from"}
    if len(cut) == len(data["student"]):
        return None
    other = path.with_name(data["student"]["start_from"])
    tables = _read(other)
    if "start_from" in tables["student"]:
        raise RecipeError(
            f"{path.name}: [student] start_from: expected a recipe that starts from its base, found {other.name}, "
            f"which starts from {tables['student']['start_from']}."
        )
    if (tables["base"], tables["student"]) != (data["base"], cut):
        raise RecipeError(f"{path.name}: it starts from {other.name}, so [base] and [student] must be as there.")
    return load_recipe(other, build)


def _parse(path: Path) -> dict[str, Any]:
    try:
        data: dict[str, Any] = tomllib.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise RecipeError(f"no recipe at {path}.") from error
    except ValueError as error:  # no UTF-8, or no TOML
        raise RecipeError(f"{path.name}: {error}") from error
    return data


def _check(data: dict[str, Any], kind: Kind, path: Path, *tables: str) -> None:
    if found := list(faults(data, kind, path.name, tables)):
        raise RecipeError("\n".join(found))
