"""README.md is run, not believed: its Python block, and the first command's output."""

from __future__ import annotations

import re
from pathlib import Path

from click.testing import CliRunner

from edgeguard.cli import main

README = (Path(__file__).resolve().parent.parent / "README.md").read_text(encoding="utf-8")


def _without_times(text: str) -> str:
    """And without the engine, which is the one that was faster here."""
    return re.sub(r"\((onnx|onnx-int8|gguf)\)", "(E)", re.sub(r"\d+\.\d ms", "T ms", text)).strip()


def test_the_first_command_prints_what_readme_shows() -> None:
    shown = re.search(r"<!-- output: classify -->\n```\n(.*?)```\n<!-- end -->", README, re.DOTALL)
    assert shown, "README.md shows no output of its first command"
    result = CliRunner().invoke(main, ["classify", "How do I sharpen a kitchen knife?"])
    assert result.exit_code == 0
    # The probability's last digits depend on the processor's kernels.
    assert re.sub(r"0\.\d+", "P", _without_times(result.output)) == re.sub(r"0\.\d+", "P", _without_times(shown[1]))


def test_the_python_block_runs() -> None:
    block = re.search(r"```python\n(.*?)```", README, re.DOTALL)
    assert block
    names: dict[str, object] = {}
    exec(compile(block[1], "README.md", "exec"), names)  # noqa: S102 - our own README
    assert getattr(names["verdict"], "action", None) == "allow"
