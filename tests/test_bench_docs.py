"""What is written about the benchmark can be done: its commands are understood, its records become tables."""

from __future__ import annotations

import os
import re
import runpy
import shlex
import shutil
import subprocess
from pathlib import Path

import pytest
from bench_support import bench_record
from cli_support import ROOT

from edgeguard.cli.bench import _check_names, bench_command

FOLDER = ROOT / "docs" / "bench"


def understood(line: str) -> dict[str, object]:
    """The settings of a command line; fails where click does not understand it."""
    program, command, *arguments = shlex.split(line, comments=True)
    assert (program, command) == ("edgeguard", "bench")
    found = bench_command.make_context("bench", arguments).params
    _check_names(found["engines"], found["peers"], found["shape"])
    return found


def test_the_commands_of_the_page_are_understood() -> None:
    text = (FOLDER.parent / "bench.md").read_text(encoding="utf-8")
    lines = re.findall(r"^edgeguard bench.*$", text, re.MULTILINE)
    assert len(lines) >= 8
    for line in lines:
        understood(line)


@pytest.mark.skipif(shutil.which("bash") is None or os.name == "nt", reason="needs bash")
def test_what_is_recorded() -> None:
    done = subprocess.run([FOLDER / "record.sh", "-n", "here"], capture_output=True, text=True, check=True)
    runs = [understood(line) for line in done.stdout.splitlines()]
    assert {run["shape"] for run in runs} == {"llama-guard-3-1b-int4", None}
    assert {(run["threads"], run["batch"]) for run in runs} >= {(t, b) for t in (1, 2) for b in (1, 4, 16)}
    assert all(isinstance(run["trials"], int) and run["trials"] >= 20 for run in runs)
    assert any(run["turn"] == 400 for run in runs) and any(run["sustain"] for run in runs)
    files = [run["json_file"] for run in runs]
    assert len(set(files)) == len(files) and all(str(file).startswith("docs/bench/here-") for file in files)
    nameless = subprocess.run([FOLDER / "record.sh"], capture_output=True, text=True, check=False)
    assert nameless.returncode != 0 and "the name of this machine" in nameless.stderr


def test_throughput_is_read_from_the_records(tiny_bundle: Path, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    files = []
    for batch in (1, 4):
        files.append(tmp_path / f"{batch}.json")
        record = bench_record(
            files[-1], "--bundle", tiny_bundle, "--engine", "onnx", "--tokens", "16", "--batch", str(batch)
        )
    rate = record.results[0].lengths[0].summary.tokens_per_s
    runpy.run_path(str(FOLDER / "throughput.py"))["main"](str(tmp_path / "here"), *map(str, files))
    text = (tmp_path / "here-throughput.md").read_text(encoding="utf-8")
    assert "Tokens/s of tiny@0.0.1 in texts of 16 tokens" in text and text.count("edgeguard bench") == 2
    cells = [cell.strip() for cell in text.splitlines()[-1].split("|")]
    assert cells[1:3] == ["onnx", "1"] and cells[4] == f"{rate:,.0f}"
    assert (tmp_path / "here-throughput.png").read_bytes().startswith(b"\x89PNG")
