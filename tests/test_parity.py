"""``convert parity``: containers made from a bundle alone, compared on public rows."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("torch", reason="torch is not installed: pip install 'edgeguard-runtime[convert]'")
pytest.importorskip("transformers", reason="transformers is not installed")

from click.testing import CliRunner  # noqa: E402
from tiny import edit_manifest  # noqa: E402
from tiny_llama import write_llama_bundle  # noqa: E402

from convert.__main__ import main  # noqa: E402
from convert.parity import bundle_parity, public_rows  # noqa: E402
from convert.smoke import requests, write_sets  # noqa: E402


@pytest.fixture
def bundle(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A tiny bundle; the rows to judge are in the data folder."""
    data = write_sets(tmp_path / "data", {"tiny_test": ({"role": "test"}, requests("gamma", 60, 3))})
    monkeypatch.setenv("EDGEGUARD_DATA", str(data))
    return write_llama_bundle(tmp_path / "bundle")


def test_every_container_is_asked(bundle: Path, tmp_path: Path) -> None:
    arguments = ["parity", str(bundle), "--rows", "40", "--set", "tiny_test", "--build", str(tmp_path / "kept")]
    arguments += ["-o", str(tmp_path / "record.json")]
    result = CliRunner().invoke(main, arguments, catch_exceptions=False)
    assert result.exit_code == 0, result.output
    record = json.loads((tmp_path / "record.json").read_text())
    assert (record["rows"], record["sets"], record["bundle"]) == (40, {"tiny_test": 40}, "tiny@0.0.1")
    found = record["containers"]
    assert set(found) == {"onnx", "standard", "onnx-int8"} | (
        {"gguf"} if importlib.util.find_spec("llama_cpp") else set()
    )
    for name in found:  # each rounds activations in a way of its own, also what onnxruntime makes of standard operators
        assert 0 < found[name]["mean_abs_diff"] < found[name]["max_abs_diff"] < 3
        assert f"| {name} | {found[name]['max_abs_diff']:.3f} |" in result.stdout
        assert f"{name} parity: 40 rows" in result.stderr
    next((tmp_path / "kept").glob("*/standard/parity.npz")).unlink()  # as if it had been stopped before that one
    again = CliRunner().invoke(main, arguments, catch_exceptions=False)
    assert again.stdout == result.stdout and again.stderr.count("rows, ") == again.stderr.count("standard parity") == 1


def test_decisions_are_those_of_the_bundles_calibration(bundle: Path, tmp_path: Path) -> None:
    def lean(manifest: dict[str, Any]) -> None:
        manifest["calibration"]["prompt"]["bias"] = manifest["calibration"]["response"]["bias"] = 50.0

    rows = public_rows(["tiny_test"], 30)
    before = bundle_parity(bundle, rows, tmp_path / "kept")["containers"]["onnx-int8"]
    edit_manifest(bundle, lean)
    after = bundle_parity(bundle, rows, tmp_path / "kept")["containers"]["onnx-int8"]
    assert after["agreement"] == 1.0, "everything is flagged by both"
    assert after["max_abs_diff"] == before["max_abs_diff"]


def test_without_the_rows_it_says_where_to_get_them(bundle: Path, tmp_path: Path) -> None:
    result = CliRunner().invoke(main, ["parity", str(bundle), "--set", "nothing", "-o", str(tmp_path / "r.json")])
    assert result.exit_code == 1 and "nothing" in result.output and not (tmp_path / "r.json").exists()
