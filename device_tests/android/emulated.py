"""An export's ONNX file on ARM64 kernels under qemu-user, for ``run.sh``: python -m device_tests.android.emulated.

Arguments: EXPORT JOB FOLDER, the last as ``arm64.sh`` made it. The kernels are those of a phone; the time they take is
the emulator's, and no device's.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

from device_tests.local import conditions, this_machine, timed_ids
from device_tests.records import Compute, Device, DeviceTestError, Measured, Timing, load_plan, to_json

__all__ = ["judge_on_arm"]

ON_ARM = Path(__file__).with_name("on_arm.py")
CHIP = "Cortex-A76"  # what arm64.sh makes qemu-user show


def judge_on_arm(export: Path, job: Path, folder: Path) -> None:
    """Answers and ``measured.json`` of a job. Raises DeviceTestError when the emulated process fails."""
    plan = load_plan(job / "plan.json")
    manifest = json.loads((export / "manifest.json").read_text(encoding="utf-8"))
    rows = [timed_ids(export, tokens, manifest) for tokens in plan.tokens]
    (job / "timed.json").write_text(json.dumps({"rows": rows, "warmup": plan.warmup, "trials": plan.trials}))
    before = conditions()
    done = subprocess.run([str(folder / "python"), str(ON_ARM), str(export), str(job)], check=False)
    if done.returncode != 0:
        raise DeviceTestError(f"the ARM64 process ended with exit code {done.returncode}.")
    found: dict[str, Any] = json.loads((job / "arm.json").read_text(encoding="utf-8"))
    here = this_machine("qemu-user")
    measured = Measured(
        device=Device(
            name="ARM64 Linux",
            chip=CHIP,
            architecture=found["architecture"],
            system=f"{found['system']}, on {here.system}",
            ram_bytes=None,
            emulated_by=emulator(),
            virtual=None,
        ),
        runtime="onnxruntime",
        runtime_version=found["version"],
        threads=None,
        compute=Compute(plan.unit, ("cpu",), {"cpu": found["nodes"]}, "onnxruntime's profile of one call, ARM64 build"),
        load_ms=None,
        peak_bytes=None,
        timings=tuple(Timing(t["tokens"], plan.warmup, tuple(t["trials_ms"])) for t in found["timings"]),
        before=before,
        after=conditions(),
    )
    (job / "measured.json").write_bytes(to_json(measured))


def emulator() -> str:
    """Name and version, as ``qemu-aarch64 --version`` tells."""
    said = subprocess.run(["qemu-aarch64", "--version"], capture_output=True, text=True, check=True).stdout
    return f"qemu-user {said.split()[2]}"


if __name__ == "__main__":
    try:
        judge_on_arm(*map(Path, sys.argv[1:4]))
    except DeviceTestError as error:
        sys.exit(str(error))
