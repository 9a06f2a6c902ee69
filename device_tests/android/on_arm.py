"""What the emulated ARM64 Python runs, with ``check.py`` of the export: on_arm.py EXPORT JOB. Nothing of edgeguard."""

import contextlib
import json
import platform
import sys
import time
from pathlib import Path

export, job = Path(sys.argv[1]), Path(sys.argv[2])
sys.path.insert(0, str(export))

import check  # type: ignore[import-not-found]  # noqa: E402
import numpy as np  # noqa: E402
import onnxruntime  # noqa: E402
from rules import run_golden  # type: ignore[import-not-found]  # noqa: E402

TRIED = 4  # tokens of the row that is profiled


def nodes() -> int:
    """How many nodes ran, by the profile of one call; all of the CPU provider, since there is no other."""
    options = onnxruntime.SessionOptions()
    options.enable_profiling, options.profile_file_prefix = True, str(job / "profile")
    session = onnxruntime.InferenceSession(str(export / "model.onnx"), options, providers=["CPUExecutionProvider"])
    row = np.ones((1, TRIED), np.int64)
    session.run(["logits"], {"input_ids": row, "attention_mask": row})
    events = json.loads(Path(session.end_profiling()).read_text("utf-8"))
    return len({e["name"] for e in events if e.get("cat") == "Node" and "provider" in e.get("args", {})})


def trials(ids: list[int], warmup: int, count: int) -> list[float]:
    """Milliseconds of the emulator."""
    found = []
    for _ in range(warmup + count):
        start = time.perf_counter()
        check.margin_of(ids)
        found.append(1000 * (time.perf_counter() - start))
    return found[warmup:]


for asked in sorted(job.glob("*.jsonl")):
    with asked.with_name(f"{asked.name}.answers").open("w", encoding="utf-8") as output:
        with contextlib.redirect_stdout(output):
            run_golden(asked, check.tokenize, check.margin_of, check.manifest)
timed = json.loads((job / "timed.json").read_text("utf-8"))
facts = {
    "architecture": platform.machine(),
    "system": f"Linux, Python {platform.python_version()}",
    "version": onnxruntime.__version__,
    "nodes": nodes(),
    "timings": [
        {"tokens": len(ids), "trials_ms": trials(ids, timed["warmup"], timed["trials"])} for ids in timed["rows"]
    ],
}
(job / "arm.json").write_text(json.dumps(facts), "utf-8")
