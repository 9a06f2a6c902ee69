"""Timings of an ``onnx`` export in onnxruntime, for ``run.sh``: python -m device_tests.onnx.measure EXPORT JOB."""

from __future__ import annotations

import json
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime

from device_tests.local import measure_here
from device_tests.records import Compute, Plan

__all__ = ["nodes_by_provider"]

UNITS = {"CPUExecutionProvider": "cpu", "CUDAExecutionProvider": "gpu"}


def nodes_by_provider(model: Path, folder: Path) -> Counter[str]:
    """Which execution provider ran how many nodes of ``model``, by onnxruntime's own profile of one call."""
    options = onnxruntime.SessionOptions()
    options.enable_profiling = True
    options.profile_file_prefix = str(folder / "profile")
    session = onnxruntime.InferenceSession(str(model), options, providers=["CPUExecutionProvider"])
    row = np.ones((1, 4), np.int64)
    session.run(["logits"], {"input_ids": row, "attention_mask": row})
    events: list[dict[str, Any]] = json.loads(Path(session.end_profiling()).read_text(encoding="utf-8"))
    kernels = {e["name"]: e["args"] for e in events if e.get("cat") == "Node" and "provider" in e.get("args", {})}
    return Counter(str(args["provider"]) for args in kernels.values())


def _compute(plan: Plan, export: Path, job: Path) -> Compute:
    nodes = {UNITS[name]: count for name, count in nodes_by_provider(export / "model.onnx", job).items()}
    return Compute(plan.unit, tuple(sorted(nodes)), nodes, "onnxruntime's profile of one call")


def _threads(check: Any) -> int | None:  # noqa: ANN401 - the module check.py
    return int(check.session.get_session_options().intra_op_num_threads) or None


if __name__ == "__main__":
    measure_here(Path(sys.argv[1]), Path(sys.argv[2]), "onnxruntime", lambda plan: None, _compute, _threads)
