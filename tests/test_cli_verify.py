"""``edgeguard verify``: a line a check, and no damage passes."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from cli_support import THREADS, run
from tiny import edit_manifest, refresh_files

from edgeguard.cli import verify


def test_a_whole_bundle_passes(tiny_bundle: Path) -> None:
    result = run("verify", tiny_bundle, *THREADS)
    assert (result.exit_code, result.stderr) == (0, "")
    lines = result.stdout.splitlines()
    assert [line.split()[:2] for line in lines] == [
        ["ok", "manifest.json"],
        ["ok", "model.onnx"],
        ["ok", "tokenizer.json"],
        ["ok", "self-test"],
    ]
    assert "3 vectors" in lines[-1]


def _flip_a_byte(bundle: Path) -> None:
    data = bytearray((bundle / "model.onnx").read_bytes())
    data[len(data) // 2] ^= 1
    (bundle / "model.onnx").write_bytes(bytes(data))


def _drop_the_model(bundle: Path) -> None:
    (bundle / "model.onnx").unlink()


def _cut_the_tokenizer(bundle: Path) -> None:
    (bundle / "tokenizer.json").write_bytes((bundle / "tokenizer.json").read_bytes()[:-1])


def _drop_the_manifest(bundle: Path) -> None:
    (bundle / "manifest.json").unlink()


def _no_json(bundle: Path) -> None:
    (bundle / "manifest.json").write_text('{"format": \n\n')


def _future_format(bundle: Path) -> None:
    edit_manifest(bundle, lambda manifest: manifest.update(format_version=99))


def _other_margin(bundle: Path) -> None:
    edit_manifest(bundle, lambda manifest: manifest["self_test"]["vectors"][1].update(margin=123.0))


def _no_model_after_all(bundle: Path) -> None:
    (bundle / "model.onnx").write_bytes(b"not a model")
    refresh_files(bundle)


def _no_tokenizer_after_all(bundle: Path) -> None:
    (bundle / "tokenizer.json").write_text("{}")
    refresh_files(bundle)


def _no_engine(bundle: Path) -> None:
    edit_manifest(bundle, lambda manifest: manifest["files"]["model.onnx"].update(engine="executorch"))


DAMAGES: list[tuple[Callable[[Path], None], str, str]] = [
    (_flip_a_byte, "model.onnx", "expected sha256"),
    (_drop_the_model, "model.onnx", "found nothing"),
    (_cut_the_tokenizer, "tokenizer.json", "bytes, found"),
    (_drop_the_manifest, "manifest.json", "found nothing"),
    (_no_json, "manifest.json", "expected one JSON object"),
    (_future_format, "manifest.json", "found 99"),
    (_other_margin, "self-test", "expected a margin of 123"),
    (_no_model_after_all, "self-test", "expected a model that onnxruntime loads"),
    (_no_tokenizer_after_all, "self-test", "expected a tokenizers file"),
    (_no_engine, "self-test", "expected one file for the engine"),
]


@pytest.mark.parametrize(("damage", "where", "reason"), DAMAGES)
def test_damage_fails_and_is_named(damage: Callable[[Path], None], where: str, reason: str, bundle_copy: Path) -> None:
    damage(bundle_copy)
    result = run("verify", bundle_copy, *THREADS)
    assert result.exit_code == 1
    failed = [line for line in result.stdout.splitlines() if line.startswith("FAIL")]
    assert len(failed) == 1, result.stdout
    assert failed[0].split()[1] == where
    assert reason in failed[0]


def test_what_only_an_app_runs_is_skipped(bundle_copy: Path) -> None:
    _no_engine(bundle_copy)
    (bundle_copy / "export.json").write_text("{}")
    edit_manifest(bundle_copy, lambda manifest: manifest["files"].update({"export.json": {"engine": None}}))
    refresh_files(bundle_copy)
    result = run("verify", bundle_copy, *THREADS)
    assert result.exit_code == 0
    assert result.stdout.splitlines()[-1].split()[:2] == ["skip", "self-test"]


def test_an_engine_whose_library_is_missing_is_skipped(bundle_copy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(verify.LIBRARIES, "onnx", "no_such_library")
    result = run("verify", bundle_copy, *THREADS)
    assert (result.exit_code, "needs pip install 'edgeguard-runtime[onnx]'" in result.stdout) == (0, True)
    _flip_a_byte(bundle_copy)
    assert run("verify", bundle_copy, *THREADS).exit_code == 1


def test_every_file_is_looked_at_and_a_damaged_model_is_not_run(bundle_copy: Path) -> None:
    _flip_a_byte(bundle_copy)
    _cut_the_tokenizer(bundle_copy)
    result = run("verify", bundle_copy, "--json", *THREADS)
    checks = [json.loads(line) for line in result.stdout.splitlines()]
    assert result.exit_code == 1
    assert [check["ok"] for check in checks] == [True, False, False, None]


@pytest.mark.parametrize(("args", "code"), [([], 2), (["nowhere"], 1), (["a", "b"], 2), ([""], 1)])
def test_exit_codes(args: list[str], code: int) -> None:
    assert run("verify", *args).exit_code == code
