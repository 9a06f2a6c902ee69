"""What the tests of the command line share: running it (in process, or for real) and bundles that decide as told."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from click.testing import CliRunner, Result
from tiny import edit_manifest

from edgeguard.cli import main

# One thread an engine: the tests may share the machine with other work.
THREADS = ("--threads", "1")
ROOT = Path(__file__).resolve().parent.parent


def run(*args: str | Path, stdin: bytes | str | None = None, env: Mapping[str, str | None] | None = None) -> Result:
    """Run a command in this process. An exception that is no exit is a fault of the command: raise it."""
    result = CliRunner().invoke(main, [str(arg) for arg in args], input=stdin, env=env, prog_name="edgeguard")
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result


def start(*args: str | Path, **options: Any) -> subprocess.Popen[bytes]:  # noqa: ANN401 - as Popen takes them
    """Start ``python -m edgeguard`` as a process of its own; streams are pipes unless told otherwise."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    settings: dict[str, Any] = dict.fromkeys(("stdin", "stdout", "stderr"), subprocess.PIPE)
    command = [sys.executable, "-m", "edgeguard", *(str(arg) for arg in args)]
    return subprocess.Popen(command, **{"env": environment, **settings, **options})


def finish(process: subprocess.Popen[bytes], stdin: bytes | None = None) -> tuple[int, str, str]:
    """Exit code, stdout and stderr of a process; it must end within two minutes, on a busy machine too."""
    out, err = process.communicate(stdin, timeout=120)
    return process.returncode, (out or b"").decode(), (err or b"").decode()


def with_thresholds(bundle: Path, folder: Path, prompt: float, response: float | None = None) -> Path:
    """A copy of ``bundle`` whose every operating point has these thresholds: 0 flags all, 1 flags nothing."""
    shutil.copytree(bundle, folder)

    def edit(manifest: dict[str, Any]) -> None:
        for point in manifest["operating_points"].values():
            point["thresholds"] = {"prompt": prompt, "response": prompt if response is None else response}

    edit_manifest(folder, edit)
    return folder


def write_rows(path: Path, rows: Iterable[Mapping[str, Any]]) -> Path:
    """A JSON Lines file."""
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def read_rows(source: Path | str) -> list[dict[str, Any]]:
    """The objects of a JSON Lines file, or of its text; fails on a line that is none."""
    text = source.read_text(encoding="utf-8") if isinstance(source, Path) else source
    return [json.loads(line) for line in text.splitlines()]
