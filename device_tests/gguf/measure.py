"""Timings of a ``gguf`` export in plain llama.cpp, for ``run.sh``: python -m device_tests.gguf.measure EXPORT JOB."""

from __future__ import annotations

import ctypes
import os
import re
import sys
from pathlib import Path
from typing import Any

import llama_cpp

from device_tests.local import measure_here
from device_tests.records import Compute, Plan

__all__ = ["compute_of"]

OFFLOADED = re.compile(r"offloaded (\d+)/(\d+) layers to GPU")
LINES: list[str] = []


@llama_cpp.llama_log_callback  # type: ignore[untyped-decorator]
def _keep_line(_level: int, text: bytes, _data: object) -> None:
    LINES.append(text.decode("utf-8", "replace"))


def _prepare(plan: Plan) -> None:
    """Before the model is loaded: what is asked for, and a log that tells what was done."""
    os.environ["GPU_LAYERS"] = "-1" if plan.unit == "gpu" else "0"
    llama_cpp.llama_log_set(_keep_line, ctypes.c_void_p(0))


def compute_of(unit: str, log: str, gpu_build: bool) -> Compute:
    """What llama.cpp's log of loading says about where the layers went."""
    found = OFFLOADED.search(log)
    if found is None:
        how = "its log names no GPU" if gpu_build else "it was built without a GPU"
        return Compute(unit, ("cpu",), None, f"llama.cpp: {how}")
    done, layers = int(found[1]), int(found[2])
    nodes = {name: count for name, count in (("gpu", done), ("cpu", layers - done)) if count}
    return Compute(unit, tuple(nodes), nodes, f"llama.cpp: {found[0]} (layers, not nodes)")


def _compute(plan: Plan, _export: Path, _job: Path) -> Compute:
    return compute_of(plan.unit, "".join(LINES), bool(llama_cpp.llama_supports_gpu_offload()))


def _threads(check: Any) -> int | None:  # noqa: ANN401 - the module check.py
    return int(check.llm.n_threads_batch)


if __name__ == "__main__":
    measure_here(Path(sys.argv[1]), Path(sys.argv[2]), "llama-cpp-python", _prepare, _compute, _threads)
