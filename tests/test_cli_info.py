"""``edgeguard info``: the facts of the bundle and of this machine, for people and for programs."""

from __future__ import annotations

import json
import platform
from importlib import metadata
from pathlib import Path

import pytest
from cli_support import THREADS, run
from tiny import edit_manifest

from edgeguard import Guard, __version__


def test_json_is_one_line_with_the_guards_own_facts(tiny_bundle: Path, tiny_guard: Guard) -> None:
    result = run("info", "--bundle", tiny_bundle, "--json", *THREADS)
    assert (result.exit_code, result.stderr, result.stdout.count("\n")) == (0, "", 1)
    info = json.loads(result.stdout)
    assert {key: info[key] for key in info if key not in ("versions", "machine")} == tiny_guard.info()
    assert info["versions"]["edgeguard"] == __version__
    assert info["versions"]["onnxruntime"] == metadata.version("onnxruntime")
    assert info["versions"]["python"] == platform.python_version()
    assert info["machine"]["cpu"]


def test_people_see_every_fact(tiny_bundle: Path, tiny_guard: Guard) -> None:
    result = run("info", "--bundle", tiny_bundle, *THREADS)
    assert result.exit_code == 0
    facts = dict(line.split(maxsplit=1) for line in result.stdout.splitlines() if line[:1].isalpha())
    assert facts["bundle"] == "tiny@0.0.1"
    assert facts["folder"] == str(tiny_bundle)
    assert facts["licence"] == "Apache-2.0"
    assert facts["teacher"] == "-"
    assert facts["quantization"].startswith("int4-symmetric [-8, 7], groups of 32")
    provider = "CPUExecutionProvider"
    assert facts["engine"] == f"onnx {metadata.version('onnxruntime')}, {provider} (asked: {provider})"
    assert facts["threads"] == "1"
    for name, point in tiny_guard.bundle.manifest.operating_points.items():
        lines = [line for line in result.stdout.splitlines() if f" {name} " in line]
        assert len(lines) == len(point.thresholds)
        for line, threshold in zip(lines, point.thresholds.values(), strict=True):
            assert f"{threshold:.3f}" in line


def test_a_figure_that_was_not_measured_is_a_dash(tiny_bundle: Path) -> None:
    lines = run("info", "--bundle", tiny_bundle, *THREADS).stdout.splitlines()
    response = next(line for line in lines if "balanced" in line and "response" in line)
    assert response.split("│")[-3].strip() == "-", "fpr is null in the manifest"


def test_text_of_a_manifest_is_never_markup(bundle_copy: Path) -> None:
    edit_manifest(bundle_copy, lambda manifest: manifest.update(license="[bold red]own[/bold red] :smile:"))
    assert "[bold red]own[/bold red] :smile:" in run("info", "--bundle", bundle_copy, *THREADS).stdout


def test_no_quantization(bundle_copy: Path) -> None:
    edit_manifest(bundle_copy, lambda manifest: manifest.update(quantization=None))
    assert "quantization   none" in run("info", "--bundle", bundle_copy, *THREADS).stdout


@pytest.mark.parametrize(
    ("args", "code", "reason"),
    [
        (["--bundle", "no/such/bundle"], 1, "no/such/bundle"),
        (["--bundle", "hf://bad"], 1, "hf://owner/name"),
        (["extra"], 2, "unexpected extra argument"),
    ],
)
def test_exit_codes(args: list[str], code: int, reason: str) -> None:
    result = run("info", *args)
    assert (result.exit_code, result.stdout, reason in result.stderr) == (code, "", True), result.stderr
