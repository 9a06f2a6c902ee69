"""The Core ML package of an export by numpy, for ``run.sh`` without a Mac.

The package that Core ML would load is read back and its operators are carried out in FP16
(:mod:`edgeguard.export.coreml_numpy`); rules are those of the export's own ``rules.py``. Usage:
python -m device_tests.ios.emulated EXPORT JOB.
"""

from __future__ import annotations

import contextlib
import importlib
import json
import sys
import time
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np

from device_tests.local import conditions, this_machine, timed_ids
from device_tests.records import Compute, Device, Measured, Timing, load_plan, to_json
from edgeguard.bundle import Bundle
from edgeguard.export.coreml import function_name, open_package
from edgeguard.export.coreml_numpy import Package
from edgeguard.export.ios import PACKAGE

__all__ = ["judge_by_numpy"]

EMULATOR = "numpy, operator by operator in FP16"


class _Judge:
    """Margins of an unzipped package."""

    def __init__(self, path: Path) -> None:
        self.package = Package(path)
        self.lengths = sorted(int(name.rpartition("_")[2]) for name in self.package.functions)

    def margin_of(self, ids: list[int]) -> float:
        length = next(length for length in self.lengths if length >= len(ids))
        row = np.zeros((1, length), np.int32)
        row[0, : len(ids)] = ids
        inputs = {"input_ids": row, "last": np.array([len(ids) - 1], np.int32)}
        logits = self.package.run(function_name(length), inputs)[0].astype(np.float64)
        return float(logits[1] - logits[0])


def judge_by_numpy(export: Path, job: Path) -> None:
    """Answers and ``measured.json`` of a job."""
    plan = load_plan(job / "plan.json")
    before = conditions()
    manifest: dict[str, Any] = json.loads((export / "manifest.json").read_text(encoding="utf-8"))
    tokenizer = Bundle.open(export).load_tokenizer()
    sys.path.insert(0, str(export))
    rules = importlib.import_module("rules")
    with open_package(export / PACKAGE) as path:
        judge = _Judge(path)
        for asked in sorted(job.glob("*.jsonl")):
            with asked.with_name(f"{asked.name}.answers").open("w", encoding="utf-8") as output:
                with contextlib.redirect_stdout(output):
                    rules.run_golden(
                        asked,
                        lambda text: tokenizer.encode(text, add_special_tokens=False).ids,
                        judge.margin_of,
                        manifest,
                    )
        timings = []
        for tokens in plan.tokens:
            ids, trials = timed_ids(export, tokens, manifest), []
            for number in range(plan.warmup + plan.trials):
                start = time.perf_counter()
                judge.margin_of(ids)
                if number >= plan.warmup:
                    trials.append(1000 * (time.perf_counter() - start))
            timings.append(Timing(len(ids), plan.warmup, tuple(trials)))
    here = this_machine("no Apple device")
    measured = Measured(
        device=Device("no Apple device", "none", here.architecture, here.system, None, EMULATOR, None),
        runtime="numpy",
        runtime_version=metadata.version("numpy"),
        threads=None,
        compute=Compute(plan.unit, ("cpu",), None, "Core ML was not there: numpy computed"),
        load_ms=None,
        peak_bytes=None,
        timings=tuple(timings),
        before=before,
        after=conditions(),
    )
    (job / "measured.json").write_bytes(to_json(measured))


if __name__ == "__main__":
    judge_by_numpy(Path(sys.argv[1]), Path(sys.argv[2]))
