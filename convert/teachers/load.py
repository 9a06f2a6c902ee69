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

from convert.teachers.formats import TeacherError, find_format
from convert.teachers.judge import Judge

if TYPE_CHECKING:
    from convert.teachers.judge import LanguageModel

__all__ = ["load_teacher"]

MAX_TOKENS = 2048
ANSWER_TOKENS = 128  # room for what the steps of a format say


def load_teacher(table: Mapping[str, Any], folder: Path) -> Judge:
    """Load and check the judge that ``table`` names; a file from the Hub is kept in ``folder``.

    ``kind = "transformers"``: ``model`` is a folder or ``owner/name`` on the Hugging Face Hub, at ``revision``; it runs
    on the fastest device that torch finds, in bfloat16 on an accelerator. ``kind = "gguf"``: ``file`` is a path, or,
    with ``model``, a file of that Hub repository; ``threads`` is llama.cpp's. Both: ``guard``, and ``max_tokens`` of a
    prompt (2,048 where it is left out).

    The table is one that :mod:`convert.recipe_tables` allows. Raises TeacherError for a guard that is not known, and
    for a model that cannot be had or is not the guard that it is said to be.
    """
    form = find_format(str(table.get("guard") or table.get("model")))
    max_tokens = table.get("max_tokens", MAX_TOKENS)
    by_transformers = table["kind"] == "transformers"
    model = _transformers(table) if by_transformers else _gguf(table, folder, max_tokens + ANSWER_TOKENS)
    return Judge(model, form, max_tokens=max_tokens)


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

    try:
        return Path(hf_hub_download(repository, file, revision=revision, local_dir=folder))
    except Exception as error:  # any: the library has changed its HTTP client, with its errors
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise TeacherError(
            f"{repository}: the Hugging Face Hub does not give its {file} ({reason}). Check both names; for a gated "
            "repository, accept its licence there and set HF_TOKEN."
        ) from error
