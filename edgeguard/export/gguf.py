"""Target ``gguf``: one Q4_0 file with tokenizer, head and manifest inside, for llama.cpp.

It is the bundle's own GGUF, or the INT4 integers of its ONNX file in the other order of bytes, read back and compared
bit by bit. A GGUF of edgeguard is a plain Llama; the head (K rows) stands in its metadata, since llama.cpp has no place
for an output narrower than the vocabulary.
"""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import TYPE_CHECKING

from edgeguard.export.check_script import check_with_script
from edgeguard.export.target import Check, ExportError, Target

if TYPE_CHECKING:
    from edgeguard.bundle import Bundle

__all__ = ["TARGET"]

MODEL = "model.gguf"
INSTALL = "pip install 'edgeguard-runtime[gguf]'"


def _make(bundle: Bundle, folder: Path) -> dict[str, str | None]:
    held = {entry.engine for entry in bundle.manifest.files.values()}
    if "gguf" in held:
        shutil.copyfile(bundle.file_for("gguf"), folder / MODEL)
    elif "onnx" in held:
        try:
            from edgeguard.export.gguf_transcode import bundle_to_gguf

            bundle_to_gguf(bundle, folder / MODEL)
        except ImportError as error:
            raise ExportError(
                f"the target 'gguf' needs packages that are not installed ({error}): {INSTALL}."
            ) from error
    else:
        raise ExportError(
            f"{bundle.path}: expected a GGUF or an ONNX file to make a GGUF of, found {sorted(bundle.manifest.files)}."
        )
    return {MODEL: "gguf"}


def _check(folder: Path) -> Check:
    return check_with_script(folder, ("llama_cpp", "gguf", "numpy"), "llama-cpp-python", INSTALL)


TARGET = Target(
    name="gguf",
    make=_make,
    check=_check,
    samples=("rules.py", "gguf/check.py"),
    packages=("gguf", "llama-cpp-python"),
)
