"""The teacher that a recipe's table names, ready to judge.

    [teacher]                                        [teacher]
    kind = "transformers"                            kind = "gguf"
    model = "meta-llama/Llama-Guard-3-8B"            guard = "llama-guard-3-8b"
                                                     file = "llama-guard-3-8b-q8_0.gguf"

``guard`` names an entry of ``guards.toml``; it may be left out where ``model`` is one that an entry lists.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from convert.teachers.formats import GuardFormat, TeacherError, find_format, load_formats
from convert.teachers.judge import Judge

if TYPE_CHECKING:
    from convert.teachers.judge import LanguageModel

__all__ = ["KEYS", "load_teacher"]

# The keys of each kind beside `kind`; those that must be there are first.
REQUIRED = {"transformers": ("model",), "gguf": ("file",)}
KEYS = {
    "transformers": ("model", "guard", "revision", "max_tokens"),
    "gguf": ("file", "guard", "model", "revision", "max_tokens", "threads"),
}
MAX_TOKENS = 2048
ANSWER_TOKENS = 128  # room for what the steps of a format say


def load_teacher(table: Mapping[str, Any], folder: Path) -> Judge:
    """Load and check the judge that ``table`` names; a file from the Hub is kept in ``folder``.

    ``kind = "transformers"``: ``model`` is a folder or ``owner/name`` on the Hugging Face Hub, at ``revision``; it runs
    on the fastest device that torch finds, in bfloat16 on an accelerator. ``kind = "gguf"``: ``file`` is a path, or,
    with ``model``, a file of that Hub repository; ``threads`` is llama.cpp's. Both: ``guard``, and ``max_tokens`` of a
    prompt (2,048 where it is left out).

    Raises TeacherError for a table that it cannot follow, and for a model that is not the guard that it is said to be.
    """
    kind = _check_keys(table)
    form = _format(table)
    max_tokens = table.get("max_tokens", MAX_TOKENS)
    model = _transformers(table) if kind == "transformers" else _gguf(table, folder, max_tokens + ANSWER_TOKENS)
    return Judge(model, form, max_tokens=max_tokens)


def _check_keys(table: Mapping[str, Any]) -> str:
    """The kind of a table that has what its kind needs, and no more."""
    kind = table.get("kind")
    if kind not in KEYS:
        found = "no `kind`" if kind is None else f"the kind {kind!r}"
        raise TeacherError(f"[teacher] has {found}; those that load a known judge are {', '.join(KEYS)}.")
    if missing := [key for key in REQUIRED[kind] if not table.get(key)]:
        raise TeacherError(f"[teacher] of kind {kind!r} lacks {', '.join(missing)}. It takes {', '.join(KEYS[kind])}.")
    if unknown := sorted(set(table) - {"kind", *KEYS[kind]}):
        raise TeacherError(f"[teacher] of kind {kind!r} takes {', '.join(KEYS[kind])}, not {', '.join(unknown)}.")
    return str(kind)


def _format(table: Mapping[str, Any]) -> GuardFormat:
    name = table.get("guard") or table.get("model")
    if not name:
        known = ", ".join(load_formats())
        raise TeacherError(f"[teacher] does not say which judge it is. Set `guard` to one of {known}.")
    return find_format(str(name))


def _transformers(table: Mapping[str, Any]) -> LanguageModel:
    from convert.teachers.transformers_model import TransformersModel

    return TransformersModel(str(table["model"]), revision=table.get("revision"))


def _gguf(table: Mapping[str, Any], folder: Path, context: int) -> LanguageModel:
    from convert.teachers.gguf_model import GgufModel

    path = Path(table["file"])
    if "model" in table:
        path = _download(str(table["model"]), str(path), table.get("revision"), folder)
    return GgufModel(path, context=context, threads=table.get("threads"))


def _download(repository: str, file: str, revision: str | None, folder: Path) -> Path:
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError

    try:
        return Path(hf_hub_download(repository, file, revision=revision, local_dir=folder))
    except (HfHubHTTPError, HFValidationError, OSError) as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise TeacherError(
            f"{repository}: the Hugging Face Hub does not give its {file} ({reason}). Check both names; for a gated "
            "repository, accept its licence there and set HF_TOKEN."
        ) from error
