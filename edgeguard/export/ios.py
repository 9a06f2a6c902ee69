"""Target ``ios``: a Core ML package, the GGUF for llama.cpp on Metal, a ``.pte`` for ExecuTorch, and Swift.

Core ML runs on Apple's systems alone. Elsewhere the package is checked as far as it can be: its integers and scales are
those of the bundle bit by bit, its functions have the stated inputs, and numpy, carrying out its operators in FP16,
reproduces the golden vectors. On a Mac, ``check_coreml.py`` of the export runs it in Core ML.
"""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from edgeguard.bundle import TOKENIZER_NAME
from edgeguard.errors import ParityError
from edgeguard.export import gguf, pte
from edgeguard.export.check_script import all_of, check_with_script
from edgeguard.export.golden import GOLDEN_NAME, read_golden
from edgeguard.export.target import Check, ExportError, Target
from edgeguard.export.web import write_portable_tokenizer

if TYPE_CHECKING:
    from edgeguard.bundle import Bundle
    from edgeguard.engines.int4_weights import Weights

__all__ = ["PACKAGE", "TARGET"]

PACKAGE = "model.mlpackage.zip"
SCRIPT = "check_coreml.py"
INSTALL = "pip install 'edgeguard-runtime[coreml]'"


def _make(bundle: Bundle, folder: Path) -> dict[str, str | None]:
    if importlib.util.find_spec("coremltools") is None:
        raise ExportError(f"the target 'ios' needs coremltools, which is not installed: {INSTALL}.")
    from edgeguard.export.coreml import open_package, write_package
    from edgeguard.export.coreml_numpy import Package

    weights, config = pte.student_of(bundle)
    about = f"{bundle.label}: a safety guard. Labels, template and thresholds: manifest.json."
    write_package(weights, config, folder / PACKAGE, about=about)
    with open_package(folder / PACKAGE) as package:
        _require_same_weights(Package(package), weights)
    write_portable_tokenizer(bundle, folder)  # Swift's regular expressions are ICU's
    _write_tokenizer_config(folder)
    made: dict[str, str | None] = {PACKAGE: None}
    if not _gguf_missing():
        made |= gguf.TARGET.make(bundle, folder)
    return made | pte.make_pte(bundle, folder)


def _write_tokenizer_config(folder: Path) -> None:
    """What swift-transformers reads beside ``tokenizer.json``.

    The unknown token too, which it takes from here alone: without one, a character that the vocabulary lacks, a control
    character for instance, ends the program.
    """
    model = json.loads((folder / TOKENIZER_NAME).read_text(encoding="utf-8"))["model"]
    unknown = {name: model[name] for name in ("unk_token", "fuse_unk") if model.get(name) is not None}
    config = {"tokenizer_class": "GPT2Tokenizer", "clean_up_tokenization_spaces": False, **unknown}
    (folder / "tokenizer_config.json").write_text(json.dumps(config) + "\n", encoding="utf-8")


def _gguf_missing() -> list[str]:
    return [name for name in ("gguf", "onnx") if importlib.util.find_spec(name) is None]


def _require_same_weights(package: object, weights: Weights) -> None:
    """The package's INT4 weights, in every function, are the bundle's. Raises ParityError."""
    from edgeguard.engines.int4_weights import Int4Weight
    from edgeguard.export.coreml_numpy import Package

    assert isinstance(package, Package)
    wanted = {
        (w.nibbles.shape, (w.nibbles.astype(np.int8) - 8).astype(np.int8).tobytes(), w.scales.tobytes())
        for w in weights.values()
        if isinstance(w, Int4Weight)
    }
    for function in package.functions:
        held = package.weights(function)
        found = {(shape, a.tobytes(), b.tobytes()) for shape, pairs in held.items() for a, b in pairs}
        if found != wanted:
            raise ParityError(f"{PACKAGE}: {function} has other weights than the bundle. Do not use the file.")


def _check(folder: Path) -> Check:
    checks = [_check_package(folder)]
    if (folder / gguf.MODEL).exists():
        checks.append(gguf.TARGET.check(folder))
    else:
        missing = ", ".join(_gguf_missing())
        checks.append(Check((), (f"{gguf.MODEL} was left out: {missing} is not installed here ({gguf.INSTALL})",)))
    checks.append(pte.check_pte(folder))
    if sys.platform == "darwin":
        checks.append(check_with_script(folder, ("coremltools", "tokenizers"), "coremltools", INSTALL, SCRIPT))
    else:
        checks.append(Check((), ("Core ML did not run the package: that needs a Mac (device_tests/ios)",)))
    return all_of(*checks)


def _check_package(folder: Path) -> Check:
    """Inputs and outputs of the package, and its golden vectors by numpy. Raises ParityError."""
    from edgeguard.export.coreml import function_name, open_package
    from edgeguard.export.coreml_numpy import Package

    golden = read_golden(folder / GOLDEN_NAME)
    with open_package(folder / PACKAGE) as path:
        package = Package(path)
        lengths = sorted(int(name.rpartition("_")[2]) for name in package.functions)
        differences = []
        for number, line in enumerate(golden, start=1):
            length = next(length for length in lengths if length >= len(line.ids))
            ids = np.zeros((1, length), np.int32)
            ids[0, : len(line.ids)] = line.ids
            inputs = {"input_ids": ids, "last": np.array([len(line.ids) - 1], np.int32)}
            logits = package.run(function_name(length), inputs)[0].astype(np.float64)
            differences.append(abs(float(logits[1] - logits[0]) - line.margin))
            if not differences[-1] <= line.tolerance:
                raise ParityError(
                    f"{PACKAGE}: golden vector {number}: expected a margin of {line.margin:.4f} within "
                    f"{line.tolerance:g}, found {logits[1] - logits[0]:.4f} by numpy. Nothing was written; report this."
                )
    return Check(
        verified=(
            f"{PACKAGE}: every integer and scale is the bundle's, in the functions of {lengths} tokens",
            f"{PACKAGE}: numpy, carrying out its operators in FP16, reproduces {len(golden)} golden vectors, margins "
            f"at most {max(differences):.4f} off ({golden[0].tolerance:g} allowed); it is not Core ML",
        ),
        vectors=len(golden),
        largest_difference=max(differences),
    )


TARGET = Target(
    name="ios",
    make=_make,
    check=_check,
    samples=(*gguf.TARGET.samples, *pte.SAMPLES, f"ios/{SCRIPT}", "ios/EdgeGuard.swift"),
    packages=("coremltools", *gguf.TARGET.packages, "executorch", "torch"),
)
