"""Timings of a ``.pte`` in ExecuTorch, for ``run.sh``: python -m device_tests.executorch.measure EXPORT JOB."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from device_tests.local import measure_here
from device_tests.records import Compute, Plan


def _compute(plan: Plan, _export: Path, _job: Path) -> Compute:
    return Compute(plan.unit, ("cpu",), None, "the program has XNNPACK and portable operators, which are of the CPU")


def _threads(_check: Any) -> int | None:
    return None  # ExecuTorch does not tell


if __name__ == "__main__":
    measure_here(
        Path(sys.argv[1]), Path(sys.argv[2]), "executorch", lambda plan: None, _compute, _threads, module="check_pte"
    )
