"""``model.pte``, the part of an export that ExecuTorch runs: made and checked where executorch and a checkout are.

The program is traced from a torch model, which is code of the conversion layer (``convert/export/pte.py``: precision,
operators). Where one of the packages is missing the export is made without it, and says so.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from edgeguard.export.check_script import all_of, check_with_script
from edgeguard.export.target import Check, ExportError

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from edgeguard.bundle import Bundle
    from edgeguard.engines.int4_weights import StudentConfig, Weights

__all__ = ["PTE", "SAMPLES", "check_pte", "make_pte", "student_of"]

PTE = "model.pte"
SCRIPT = "check_pte.py"
SAMPLES = (f"executorch/{SCRIPT}",)
INSTALL = "in a checkout: pip install -e '.[convert,executorch]'"
MAKING = ("torch", "executorch", "convert")
RUNNING = ("executorch", "torch", "tokenizers")
# What reads one row: the first of the matrices that the plan of the INT8 engine lists for it.
READERS = {"attention": "self_attn.q_proj", "mlp": "mlp.gate_proj"}


def make_pte(bundle: Bundle, folder: Path) -> dict[str, str | None]:
    """Write ``model.pte`` where that can be done here; returns the file and its engine, nothing where it cannot.

    Raises ExportError for a bundle without INT4 integers, or with an INT8 plan that is not of them.
    """
    if _missing():
        return {}
    from convert.export.pte import write_pte

    weights, config = student_of(bundle)
    write_pte(weights, config, folder / PTE, _shifts(bundle, weights, config))
    return {PTE: None}


def check_pte(folder: Path) -> Check:
    """Compute the golden vectors with ``model.pte``, or say why it was left out. Raises ParityError."""
    if not (folder / PTE).exists():
        return Check((), (f"{PTE} was left out: {', '.join(_missing())} is not installed here ({INSTALL})",))
    check = check_with_script(folder, RUNNING, "executorch", INSTALL, SCRIPT)
    about = Check((f"{PTE} computes in INT8 (weights a scale a channel, activations a scale a token)",))
    return all_of(check, about)


def student_of(bundle: Bundle) -> tuple[Weights, StudentConfig]:
    """The bundle's INT4 integers and their shape, its limit of tokens included. Raises ExportError."""
    import dataclasses

    from edgeguard.engines.gguf_file import read_gguf
    from edgeguard.engines.gguf_source import read_onnx

    held = {entry.engine for entry in bundle.manifest.files.values()}
    engine, read = ("onnx", read_onnx) if "onnx" in held else ("gguf", read_gguf)
    if engine not in held:
        raise ExportError(f"{bundle.path}: expected a GGUF or an ONNX file, found {sorted(bundle.manifest.files)}.")
    student = read(bundle.file_for(engine))
    if student.config.head_size != len(bundle.manifest.head):
        raise ExportError(
            f"{bundle.path}: expected a head with the labels {list(bundle.manifest.head)}, found "
            f"{student.config.head_size} rows. Make the bundle again."
        )
    return student.weights, dataclasses.replace(student.config, max_tokens=bundle.manifest.max_tokens)


def _missing() -> list[str]:
    return [name for name in MAKING if importlib.util.find_spec(name) is None]


def _shifts(bundle: Bundle, weights: Weights, config: StudentConfig) -> Mapping[str, NDArray[np.int8]]:
    """How the bundle's INT8 engine smooths, exponents of two by ``layers.I.KIND``; empty for a bundle without it."""
    from edgeguard.engines.int4_weights import Int4Weight
    from edgeguard.engines.int8 import INT8_ENGINE, Plan

    if not any(entry.engine == INT8_ENGINE for entry in bundle.manifest.files.values()):
        return {}
    file = bundle.file_for(INT8_ENGINE).with_suffix(".json")
    plan = Plan.from_json(file.read_bytes(), str(file))
    source, columns = (bundle.path / plan.source).read_bytes(), {m.nibbles: m.columns for m in plan.matrices}
    shifts = {}
    for index in range(config.num_layers):
        for kind, reader in READERS.items():
            weight = weights[f"model.layers.{index}.{reader}.weight"]
            assert isinstance(weight, Int4Weight)  # of a file that was read as INT4
            packed = weight.pack_matmulnbits().tobytes()
            place = next((place for place in columns if source.startswith(packed, place)), None)
            if place is None:
                raise ExportError(f"{file}: expected layer {index}'s {reader} in the plan, found no such matrix.")
            if (found := columns[place]) is not None:
                shifts[f"layers.{index}.{kind}"] = found
    return shifts
