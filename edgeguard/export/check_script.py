"""The check that ships with an export, run as a user would run it: a process of its own, without edgeguard.

For a Python ``check.py``, importing edgeguard or convert is made impossible in that process, so what passes there needs
no code of ours.
"""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from importlib import metadata
from pathlib import Path

from edgeguard.errors import ParityError
from edgeguard.export.golden import GOLDEN_NAME, compare, read_answers, read_golden
from edgeguard.export.target import Check

__all__ = ["all_of", "check_with_command", "check_with_script", "not_checked"]

SCRIPT = "check.py"
RUN = """
import runpy, sys
sys.modules.update(edgeguard=None, convert=None)
sys.argv = sys.argv[1:]
sys.path.insert(0, ".")
runpy.run_path(sys.argv[0], run_name="__main__")
"""
WITHIN_S = 3600
QUOTED_CHARS = 400


def check_with_script(
    folder: Path, modules: Sequence[str], distribution: str, install: str, script: str = SCRIPT, **variables: str
) -> Check:
    """Compute the golden vectors of the export in ``folder`` with its own ``script``.

    ``modules``: what the script imports; ``distribution``: the runtime among them, ``install``: how to get it;
    ``variables``: of its environment. Where a module is not installed, nothing is run and the result says so. Raises as
    :func:`check_with_command`.
    """
    missing = [name for name in modules if importlib.util.find_spec(name) is None]
    if missing:
        return not_checked(f"{', '.join(missing)} is not installed here ({install})")
    runtime = f"{distribution} {metadata.version(distribution)}"
    return check_with_command(folder, [sys.executable, "-c", RUN, script], runtime, **variables)


def not_checked(reason: str) -> Check:
    """Golden vectors that nothing computed."""
    return Check(verified=(), not_verified=(f"the golden vectors were not computed: {reason}",))


def all_of(*checks: Check) -> Check:
    """Several checks as one: all that they say, all that computed, and the largest difference of any."""
    runtimes = [check.runtime for check in checks if check.runtime is not None]
    differences = [check.largest_difference for check in checks if check.largest_difference is not None]
    return Check(
        verified=tuple(line for check in checks for line in check.verified),
        not_verified=tuple(line for check in checks for line in check.not_verified),
        runtime=", ".join(runtimes) or None,
        vectors=max(check.vectors for check in checks),
        largest_difference=max(differences, default=None),
    )


def check_with_command(folder: Path, command: Sequence[str], runtime: str, **variables: str) -> Check:
    """Compute the golden vectors with a command that prints an answer a line, run in ``folder``.

    ``runtime``: what it computes with, and its version; ``variables``: of its environment. Exit code 2 of it says that
    a line is wrong. Raises ParityError for a wrong line, and for a command that fails.
    """
    golden = read_golden(folder / GOLDEN_NAME)
    with tempfile.TemporaryDirectory() as scratch:
        answers = Path(scratch) / "answers.jsonl"
        _run(folder, command, answers, variables)
        found = compare(golden, read_answers(answers))
    if found.faults:
        more = f" ({len(found.faults) - 1} more faults)" if len(found.faults) > 1 else ""
        raise ParityError(
            f"{runtime} does not reproduce the bundle: {found.faults[0]}{more}. Nothing was written; try another "
            "version of it, or report this."
        )
    return Check(
        verified=(
            f"{found.vectors} golden vectors in {runtime}, without edgeguard: the same token ids, margins at most "
            f"{found.largest_difference:.4f} off ({golden[0].tolerance:g} allowed)",
        ),
        runtime=runtime,
        vectors=found.vectors,
        largest_difference=found.largest_difference,
    )


def _run(folder: Path, command: Sequence[str], answers: Path, variables: Mapping[str, str]) -> None:
    name, environment = command[-1], {**os.environ, **variables}
    with answers.open("wb") as output:
        try:
            done = subprocess.run(
                command,
                cwd=folder,
                env=environment,
                stdout=output,
                stderr=subprocess.PIPE,
                timeout=WITHIN_S,
                check=False,
            )
        except subprocess.TimeoutExpired as error:
            raise ParityError(f"{name} did not end within {WITHIN_S} seconds. Nothing was written.") from error
    if done.returncode not in (0, 2):  # 2: a line is wrong, which compare() names
        words = done.stderr.decode("utf-8", "replace").strip()[-QUOTED_CHARS:]
        raise ParityError(
            f"{name} failed with exit code {done.returncode}. Nothing was written. Its last words: {words or 'none'}"
        )
