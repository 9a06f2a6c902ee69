"""What the tests of the benchmark share: an untrained Llama small enough for a test, and a run of the command."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from cli_support import run
from click.testing import Result

from edgeguard.bench import limits
from edgeguard.bench.records import Record, load_record
from edgeguard.bench.shapes import SHAPES, write_shape

QUICK = ("--trials", "3", "--warmup", "1", "--loads", "1", "--threads", "1", "--no-limits")


def write_tiny_llama(folder: Path) -> Path:
    """The bundle of ``--shape tiny``."""
    folder.mkdir()
    write_shape("tiny", SHAPES["tiny"], folder, seed=0)
    return folder


def shrink_limits(patch: pytest.MonkeyPatch) -> None:
    """Measure the machine with small products: quickly, and with meaningless rates."""
    for name, value in {"LARGE": (64, 96, 64), "COPY_BYTES": 2**20, "TRIALS_S": 0.05}.items():
        patch.setattr(limits, name, value)


def bench(*args: str | Path) -> Result:
    """Run ``edgeguard bench`` quickly."""
    return run("bench", *QUICK, *args)


def bench_record(file: Path, *args: str | Path) -> Record:
    """Run it, and read the record that it wrote."""
    result = bench("--json", file, *args)
    assert result.exit_code == 0, result.stderr
    return load_record(file)


def read_json(file: Path) -> Any:  # noqa: ANN401
    """Any JSON file."""
    return json.loads(file.read_text(encoding="utf-8"))
