"""Target ``android``: the bundle's INT4 ONNX file for onnxruntime-android, a ``.pte`` for ExecuTorch, and Kotlin.

The Maven package ``com.microsoft.onnxruntime:onnxruntime-android`` is a full build (the packages with fewer operators
ended with 1.18), so its CPU provider has the operators of com.microsoft and runs the bundle's own file: no other one is
needed. The ARM kernels of that provider are checked by ``device_tests/android``.

Sources: onnxruntime ``tools/ci_build/github/android/default_full_aar_build_settings.json``, pull request 20941.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from edgeguard.export import onnx, pte
from edgeguard.export.check_script import all_of
from edgeguard.export.target import Check, Target

if TYPE_CHECKING:
    from edgeguard.bundle import Bundle

__all__ = ["TARGET"]

KOTLIN = ("EdgeGuard", "ExecuTorchModel", "Rules")


def _make(bundle: Bundle, folder: Path) -> dict[str, str | None]:
    return {**onnx.TARGET.make(bundle, folder), **pte.make_pte(bundle, folder)}


def _check(folder: Path) -> Check:
    device = Check((), ("nothing ran on Android, nor on ARM: device_tests/android does that",))
    return all_of(onnx.TARGET.check(folder), pte.check_pte(folder), device)


TARGET = Target(
    name="android",
    make=_make,
    check=_check,
    samples=(*onnx.TARGET.samples, *pte.SAMPLES, *(f"android/{name}.kt" for name in KOTLIN)),
    packages=(*onnx.TARGET.packages, "executorch", "torch"),
)
