"""Timings of a ``qnn`` export on Qualcomm's library, for ``run.sh``: python -m device_tests.qnn.measure EXPORT JOB.

Which nodes the NPU's backend took is onnxruntime's own word, for the graphs of all lengths.
"""

from __future__ import annotations

import dataclasses
import importlib
import importlib.util
import os
import sys
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from device_tests.local import measure_here
from device_tests.records import Compute, Plan, load_measured, to_json

__all__ = ["compute_of", "emulated_by"]

ARM = ("aarch64", "arm64")
RUNTIME = "onnxruntime-qnn" if importlib.util.find_spec("onnxruntime_qnn") else "onnxruntime"


def compute_of(unit: str, nodes: Mapping[int, Mapping[str, int]]) -> Compute:
    """What onnxruntime says of the nodes of each graph, by its length and the unit that has them."""
    total: Counter[str] = Counter()
    for counts in nodes.values():
        total.update(counts)
    if unit == "cpu":
        return Compute(unit, ("cpu",), None, "the CPU provider alone was asked for")
    lengths = ", ".join(map(str, sorted(nodes)))
    evidence = f"onnxruntime's assignment of the nodes of the graphs for {lengths} tokens"
    return Compute(unit, tuple(sorted(total)), dict(total) or None, evidence)


def emulated_by(unit: str, machine: str) -> str | None:
    """What stood in for the NPU, on a ``machine`` that has none."""
    return None if unit == "cpu" or machine.lower() in ARM else f"Qualcomm's HTP library on {machine}"


def _prepare(plan: Plan) -> None:
    os.environ["UNIT"] = plan.unit


def _compute(plan: Plan, _export: Path, _job: Path) -> Compute:
    check = importlib.import_module("check")  # loaded already
    return compute_of(plan.unit, {length: check.nodes(check.session(length)) for length in check.lengths})


def _threads(_check: Any) -> int | None:  # noqa: ANN401 - the module check.py
    return None


def _main(export: Path, job: Path) -> None:
    measure_here(export, job, RUNTIME, _prepare, _compute, _threads)
    file = job / "measured.json"
    measured = load_measured(file)
    device = dataclasses.replace(
        measured.device, emulated_by=emulated_by(measured.compute.asked, measured.device.architecture)
    )
    file.write_bytes(to_json(dataclasses.replace(measured, device=device)))


if __name__ == "__main__":
    _main(Path(sys.argv[1]), Path(sys.argv[2]))
