"""Workers: real processes that answer, refuse, print, die, or hang."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from cli_support import ROOT

from edgeguard import Guard
from edgeguard.bench.process import Refused, Worker
from edgeguard.bench.records import BenchError


@pytest.fixture
def worker() -> Iterator[Worker]:
    with Worker("onnx", threads=1) as started:
        yield started


def sample(guard: Guard, text: str) -> dict[str, object]:
    return {"messages": [["user", text]], "ids": [0] * guard.classify(text).tokens}


def test_a_worker_judges_as_the_guard_does(worker: Worker, tiny_bundle: Path, tiny_guard: Guard) -> None:
    loaded = worker.ask("load an engine", name="onnx", bundle=str(tiny_bundle), threads=1)
    assert loaded["facts"]["used"] == "onnx" and loaded["facts"]["threads_used"] == 1
    assert loaded["import_ms"] > 0 and loaded["load_ms"] > 0
    text = "How do I make the thing?"
    reading = worker.ask("judge", samples=[sample(tiny_guard, text)])
    assert reading["margin"] == pytest.approx(tiny_guard.classify(text).margin, abs=1e-4)
    assert 0 < reading["tokenizer_ms"] + reading["engine_ms"] < reading["latency_ms"]
    batch = worker.ask("judge", samples=[sample(tiny_guard, text), sample(tiny_guard, text)])
    assert batch["margin"] == pytest.approx(reading["margin"], abs=1e-4)
    memory = worker.ask("tell its memory")
    if sys.platform == "linux":
        assert memory["peak"] >= memory["resident"] > memory["private"] > 0


def test_a_worker_holds_nothing_but_the_engine(tiny_bundle: Path) -> None:
    code = """
import sys, edgeguard.bench.worker as worker
worker.Session(0).load_engine("onnx", sys.argv[1], 1)
print(*sys.modules)
"""
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", code, str(tiny_bundle)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=True)
    modules = {name.split(".")[0] for name in done.stdout.split()}
    assert "onnxruntime" in modules
    assert modules.isdisjoint({"torch", "transformers", "onnx", "matplotlib", "rich", "click", "llama_cpp", "convert"})


def test_a_text_of_another_length_is_refused(worker: Worker, tiny_bundle: Path) -> None:
    worker.ask("load an engine", name="onnx", bundle=str(tiny_bundle), threads=1)
    with pytest.raises(Refused, match=r"^onnx: expected a verdict on 3 tokens, found one on \d+"):
        worker.ask("judge", samples=[{"messages": [["user", "Hello there"]], "ids": [1, 2, 3]}])
    assert worker.ask("tell its memory"), "it lives on"


def test_an_engine_that_cannot_load_is_refused(worker: Worker, bundle_copy: Path) -> None:
    (bundle_copy / "model.onnx").write_bytes(b"no model")
    with pytest.raises(Refused, match=r"^onnx: .*model\.onnx: expected"):
        worker.ask("load an engine", name="onnx", bundle=str(bundle_copy), threads=1)


@pytest.mark.skipif(sys.platform == "win32", reason="signals of POSIX")
def test_a_worker_that_is_killed_says_so(worker: Worker) -> None:
    os.kill(worker.pid, signal.SIGKILL)
    with pytest.raises(BenchError, match=r"^onnx: its process ended .*tell its memory \(killed by SIGKILL\)") as caught:
        worker.ask("tell its memory")
    assert not isinstance(caught.value, Refused)
    assert "nothing was recorded" in str(caught.value)


def test_a_worker_that_crashes_is_quoted(worker: Worker) -> None:
    with pytest.raises(BenchError, match=r"\(exit code 1\).*KeyError: 'no such task'"):
        worker.ask("no such task")


def test_a_worker_that_does_not_answer_is_ended(tiny_bundle: Path, tiny_guard: Guard) -> None:
    with Worker("onnx", threads=1, answer_within_s=15) as worker:
        worker.ask("load an engine", name="onnx", bundle=str(tiny_bundle), threads=1)
        worker._answer_within_s = 5  # what is asked to take longer has that much more
        told = worker.ask("judge without pause", batches=[[sample(tiny_guard, "Hi there")]], seconds=6)
        assert told["ends_s"][-1] >= 5.5
        os.kill(worker.pid, signal.SIGSTOP)
        worker._answer_within_s = 0.5
        with pytest.raises(BenchError, match=r"gave no answer within 1.5 s to 'judge without pause'"):
            worker.ask("judge without pause", batches=[[sample(tiny_guard, "Hi there")]], seconds=1)


def test_threads_are_told_by_the_environment(tmp_path: Path) -> None:
    if not Path("/proc/self/environ").exists():
        pytest.skip("reads /proc")
    with Worker("x", threads=3) as worker:
        worker.ask("tell its memory")
        environment = Path(f"/proc/{worker.pid}/environ").read_bytes().split(b"\0")
    assert b"OMP_NUM_THREADS=3" in environment and b"HF_HUB_OFFLINE=1" in environment
