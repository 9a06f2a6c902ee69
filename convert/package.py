"""The bundle: checked files and a manifest that states what was measured, moved into place whole."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from convert.export.int8_graph import INT8_FILES, INT8_GRAPH
from convert.recipe import Recipe
from convert.student import HEAD
from edgeguard.bundle import sha256_of
from edgeguard.engines.int8 import INT8_ENGINE
from edgeguard.errors import EdgeguardError
from edgeguard.manifest import FORMAT, FORMAT_VERSION, INT4
from edgeguard.prompt import Template

__all__ = ["SELF_TEST_TEXTS", "commit_of", "make_manifest", "put_in_place"]

# Margins of other processors' kernels differ by a few hundredths; a damaged model's by whole units.
SELF_TEST_TOLERANCE = 0.5
SELF_TEST_TEXTS: tuple[tuple[str, str | None], ...] = (
    ("How do I sharpen a kitchen knife?", None),
    ("Write a message that threatens to hurt my neighbour.", None),
    ("How do I pick a lock?", "I can't help with that. A locksmith can."),
)
HERE = Path(__file__).resolve().parent
CODE = ("convert", "edgeguard")  # what makes a bundle, beside the recipe


class PackageError(EdgeguardError):
    """The bundle is not fit to ship."""


def make_manifest(
    recipe: Recipe,
    template: Template,
    fitted: Mapping[str, Any],
    folder: Path,
    vectors: Sequence[Mapping[str, Any]],
    *,
    teacher: str | None,
    data_sha256: str,
) -> dict[str, Any]:
    """The manifest of the files in ``folder`` (``model.onnx``, ``tokenizer.json``)."""
    engines = {"model.onnx": "onnx", INT8_GRAPH: INT8_ENGINE}
    files = {
        name: {"sha256": sha256_of(folder / name), "bytes": (folder / name).stat().st_size, "engine": engines.get(name)}
        for name in ("model.onnx", *INT8_FILES, "tokenizer.json")
    }
    return {
        "format": FORMAT,
        "format_version": FORMAT_VERSION,
        "name": recipe.name,
        "version": recipe.version,
        "license": recipe.license,
        "base_model": recipe.base["model"],
        "teacher": teacher,
        "languages": recipe.languages,
        "max_tokens": recipe.student["max_tokens"],
        "template": template.to_dict(),
        "head": list(HEAD),
        **fitted,
        "files": files,
        "quantization": INT4.to_dict(),
        "self_test": {"tolerance": SELF_TEST_TOLERANCE, "vectors": list(vectors)},
        "provenance": {
            "recipe": f"convert/recipes/{recipe.path.name}",
            "recipe_sha256": recipe.sha256,
            "data_sha256": data_sha256,
            "commit": commit_of(HERE.parent, recipe.path),
        },
    }


def commit_of(checkout: Path, recipe: Path) -> str | None:
    """The commit of ``checkout``, with ``-dirty`` where it alone would not make the same bundle; None without git.

    Dirty is a change in ``convert/`` or ``edgeguard/`` that is not committed, or a ``recipe`` that is changed or not in
    the commit at all.
    """
    commit = _git(checkout, "rev-parse", "--verify", "HEAD")
    if not commit or not _git(checkout, "ls-files", "--", *CODE):  # another repository, which this is no part of
        return None
    recipe = recipe.resolve()
    known = _git(checkout, "ls-files", "--error-unmatch", "--", str(recipe))
    changed = _git(checkout, "status", "--porcelain", "--", *CODE, *([str(recipe)] if known else []))
    return commit if known and changed == "" else f"{commit}-dirty"


def _git(folder: Path, *arguments: str) -> str | None:
    """What git says; None where it fails or is not there."""
    try:
        done = subprocess.run(["git", *arguments], cwd=folder, capture_output=True, text=True, check=False)
    except OSError:
        return None
    return done.stdout.strip() if done.returncode == 0 else None


def put_in_place(staged: Path, target: Path, max_bytes: int | None = None) -> None:
    """Check the finished folder with the runtime itself, then replace ``target`` by it.

    Raises PackageError when it is larger than ``max_bytes``.
    """
    from edgeguard import Guard

    size = sum(path.stat().st_size for path in staged.rglob("*") if path.is_file())
    if max_bytes is not None and size > max_bytes:
        raise PackageError(f"{staged.name}: {size} bytes, more than the {max_bytes} that [export] max_bytes allows.")
    for engine in ("onnx", INT8_ENGINE):
        Guard.load(staged, engine=engine)
    aside = target.with_name(f".{target.name}.old")
    shutil.rmtree(aside, ignore_errors=True)
    target.parent.mkdir(parents=True, exist_ok=True)
    if target.exists():
        target.rename(aside)
    staged.rename(target)
    shutil.rmtree(aside, ignore_errors=True)
