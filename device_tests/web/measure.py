"""What ``browser.mjs`` measured, as ``measured.json``, for ``run.sh``: python -m device_tests.web.measure JOB."""

from __future__ import annotations

import json
import sys
from pathlib import Path

from device_tests.local import conditions, this_machine
from device_tests.records import Compute, Measured, Timing, load_plan, to_json

__all__ = ["measured_in_browser"]


def measured_in_browser(job: Path) -> Measured:
    """Facts of the page and of this machine."""
    plan = load_plan(job / "plan.json")
    found = json.loads((job / "browser.json").read_text(encoding="utf-8"))
    isolated = "cross-origin isolated" if found["isolated"] else "not cross-origin isolated: one thread"
    return Measured(
        device=this_machine(f"Chromium {found['version']}"),
        runtime="onnxruntime-web",
        runtime_version=found["runtime_version"],
        threads=found["threads"],
        compute=Compute(plan.unit, ("cpu",), None, f"the WebAssembly provider alone was asked for; {isolated}"),
        load_ms=found["load_ms"],
        peak_bytes=found["peak_bytes"],
        timings=tuple(Timing(t["tokens"], t["warmup"], tuple(t["trials_ms"])) for t in found["timings"]),
        before=conditions(),
        after=conditions(),
    )


if __name__ == "__main__":
    (Path(sys.argv[1]) / "measured.json").write_bytes(to_json(measured_in_browser(Path(sys.argv[1]))))
