"""Target ``onnx``: the bundle's INT4 ONNX file as it is, for onnxruntime 1.20 and newer in any of its languages.

The graph takes ``input_ids`` and ``attention_mask`` (int64 [batch, length]) and returns ``logits`` (float32
[batch, K]). It uses operators of onnxruntime's own domain com.microsoft (MatMulNBits, GatherBlockQuantized,
GroupQueryAttention), which the CPU provider has on every platform; NPU providers do not.
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

MODEL = "model.onnx"


def _make(bundle: Bundle, folder: Path) -> dict[str, str | None]:
    if not any(entry.engine == "onnx" for entry in bundle.manifest.files.values()):
        raise ExportError(
            f"{bundle.path}: expected a file for the engine 'onnx', found {sorted(bundle.manifest.files)}. A checkout "
            "makes it of a GGUF of edgeguard: python -m convert transcode."
        )
    shutil.copyfile(bundle.file_for("onnx"), folder / MODEL)
    return {MODEL: "onnx"}


def _check(folder: Path) -> Check:
    return check_with_script(
        folder, ("onnxruntime", "tokenizers", "numpy"), "onnxruntime", "pip install onnxruntime tokenizers"
    )


TARGET = Target(
    name="onnx",
    make=_make,
    check=_check,
    samples=("rules.py", "onnx/check.py"),
    packages=("onnxruntime", "tokenizers"),
)
