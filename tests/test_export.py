"""``edgeguard export``: whole folders that another runtime reproduces, or nothing and the reason."""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import runpy
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from cli_support import run
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import HEAD, MAX_TOKENS, TEMPLATE, edit_manifest, make_tokenizer, refresh_files

pytest.importorskip("onnx", reason="onnx is not installed: pip install 'edgeguard-runtime[test]'")

import export_support  # noqa: E402
from export_support import CONFIG, read_lines, tiny_weights, write_int4_bundle, write_lines  # noqa: E402

from convert.export.onnx_graph import build_guard_graph  # noqa: E402
from edgeguard import Guard  # noqa: E402
from edgeguard.bundle import Bundle, default_bundle_path  # noqa: E402
from edgeguard.engines.gguf_source import read_onnx  # noqa: E402
from edgeguard.errors import BundleError, InputError, ParityError  # noqa: E402
from edgeguard.export import TARGETS, ExportError, check_script, make  # noqa: E402
from edgeguard.export import onnx as onnx_target  # noqa: E402
from edgeguard.export.golden import Answer, Golden, compare, read_answers, read_golden, verdict_faults  # noqa: E402
from edgeguard.export.make import Export, export_bundle, open_export  # noqa: E402
from edgeguard.export.target import SAMPLES, Check, Target, load_target  # noqa: E402
from edgeguard.manifest import Manifest  # noqa: E402
from edgeguard.prompt import as_messages  # noqa: E402

rules = SimpleNamespace(**runpy.run_path(str(SAMPLES / "rules.py")))
FILES = {"README.md", "check.py", "export.json", "golden.jsonl", "rules.py", "tokenizer.json"}
GGUF_MISSING = "needs llama-cpp-python and gguf: pip install 'edgeguard-runtime[gguf]'"


@pytest.fixture(scope="module")
def onnx_export(tiny_bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> Export:
    """The tiny bundle as the target onnx. Read only."""
    return export_bundle("onnx", tiny_bundle, tmp_path_factory.mktemp("exports") / "onnx")


@pytest.fixture(scope="module")
def gguf_export(int4_bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> Export:
    """That bundle as the target gguf, for at most 80 tokens. Read only."""
    pytest.importorskip("llama_cpp", reason=GGUF_MISSING)
    pytest.importorskip("gguf", reason=GGUF_MISSING)
    return export_bundle("gguf", int4_bundle, tmp_path_factory.mktemp("exports") / "gguf", max_tokens=80)


def run_check(folder: Path, *arguments: str | Path) -> subprocess.CompletedProcess[str]:
    """``check.py`` as somebody without edgeguard runs it."""
    command = [sys.executable, "check.py", *map(str, arguments)]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)


# What an export is


def test_an_export_is_a_bundle_with_golden_vectors(onnx_export: Export, tiny_bundle: Path) -> None:
    folder = onnx_export.bundle.path
    assert {file.name for file in folder.iterdir()} == FILES | {"model.onnx", "manifest.json"}
    assert set(onnx_export.bundle.manifest.files) == FILES | {"model.onnx"}
    for name in ("model.onnx", "tokenizer.json"):
        assert (folder / name).read_bytes() == (tiny_bundle / name).read_bytes()
    guard, reference = Guard.load(folder, threads=1), Guard.load(tiny_bundle, threads=1)
    assert guard.classify("Tell me a story.").margin == reference.classify("Tell me a story.").margin
    assert run("verify", folder, "--threads", "1").exit_code == 0
    assert list(folder.parent.iterdir()) == [folder]


def test_it_says_what_was_verified(onnx_export: Export) -> None:
    facts = onnx_export.facts
    golden = read_golden(onnx_export.bundle.path / "golden.jsonl")
    assert (facts.target, facts.bundle, facts.reference_engine) == ("onnx", "tiny@0.0.1", "onnx")
    assert facts.check.vectors == len(golden) >= 12
    assert facts.check.runtime is not None and facts.check.runtime.startswith("onnxruntime 1.")
    assert facts.check.largest_difference == pytest.approx(0, abs=1e-5)
    assert facts.check.not_verified == ()
    assert onnx_export.model_bytes == (onnx_export.bundle.path / "model.onnx").stat().st_size
    readme = (onnx_export.bundle.path / "README.md").read_text()
    assert onnx_export.bundle.manifest.files["model.onnx"].sha256 in readme
    assert facts.check.verified[0] in readme and "{{" not in readme


def test_golden_vectors_are_what_the_guard_says(onnx_export: Export, tiny_guard: Guard) -> None:
    golden = read_golden(onnx_export.bundle.path / "golden.jsonl")
    tokenizer = tiny_guard.bundle.load_tokenizer()
    for line in golden:
        verdict = tiny_guard.classify(messages=[{"role": role, "content": text} for role, text in line.messages])
        assert (line.margin, line.action, line.truncated) == (verdict.margin, verdict.action, verdict.truncated)
        assert list(line.ids) == TEMPLATE.encode(tokenizer, line.messages, MAX_TOKENS).ids
    assert {line.target for line in golden} == {"prompt", "response"}
    assert [line.truncated for line in golden].count(True) >= 2
    assert any(len(line.messages) > 1 and not line.truncated for line in golden)


def test_its_script_judges_every_line(onnx_export: Export, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(onnx_export.bundle.path, tmp_path / "copy"))
    lines = read_lines(folder / "golden.jsonl")
    done = run_check(folder)
    answers = [json.loads(line) for line in done.stdout.splitlines()]
    assert done.returncode == 0, done.stderr
    assert [answer["action"] for answer in answers] == [line["action"] for line in lines]
    assert all(answer["ok"] for answer in answers)
    lines[0]["margin"] += 1
    lines[1]["ids"][3] += 1
    lines[2]["action"] = "escalate"
    write_lines(tmp_path / "wrong.jsonl", lines)
    done = run_check(folder, tmp_path / "wrong.jsonl")
    found = [json.loads(line)["ok"] for line in done.stdout.splitlines()]
    assert (done.returncode, found) == (2, [False] * 3 + [True] * (len(lines) - 3))


# The command


def test_the_command_prints_one_object(tiny_bundle: Path, tmp_path: Path) -> None:
    result = run(
        "export", "--target", "onnx", "--bundle", tiny_bundle, "--max-tokens", "48", "-o", tmp_path / "a/b", "--json"
    )
    assert result.exit_code == 0, result.stderr
    report = json.loads(result.stdout)
    assert (report["target"], report["max_tokens"], report["path"]) == ("onnx", 48, str(tmp_path / "a/b"))
    assert report["files"]["model.onnx"]["bytes"] == report["model_bytes"]
    assert "verifying" in result.stderr
    export = open_export(tmp_path / "a/b")
    golden = read_golden(export.bundle.path / "golden.jsonl")
    assert max(len(line.ids) for line in golden) == export.bundle.manifest.max_tokens == 48
    Guard.load(export.bundle.path, threads=1)  # its self-test fits the shorter limit


def test_the_command_names_its_targets() -> None:
    result = run("export", "--help")
    assert all(name in result.stdout and summary.split(":")[0] in result.stdout for name, summary in TARGETS.items())


@pytest.mark.parametrize("name", TARGETS)
def test_every_target_is_complete(name: str) -> None:
    target = load_target(name)
    assert target.name == name
    assert all((SAMPLES / sample).is_file() for sample in target.samples)
    readme = (SAMPLES / name / "README.md").read_text()
    assert all(f"{{{{{part}}}}}" in readme for part in ("label", "files", "check", "keep"))


def _no_onnx(bundle: Path) -> None:
    (bundle / "model.onnx").unlink()
    edit_manifest(bundle, lambda manifest: manifest["files"].pop("model.onnx"))


def _damaged(bundle: Path) -> None:
    (bundle / "model.onnx").write_bytes(b"not a model")


def _other_self_test(bundle: Path) -> None:
    edit_manifest(bundle, lambda manifest: manifest["self_test"]["vectors"][0].update(margin=99.0))


@pytest.mark.parametrize(
    ("damage", "arguments", "code", "says"),
    [
        (None, ["--target", "onnx", "--max-tokens", "65"], 1, "reads at most 64 tokens, and was asked for 65"),
        (None, ["--target", "onnx", "--max-tokens", "3"], 1, "max_tokens: expected a whole number from"),
        (None, ["--target", "onnx", "--max-tokens", "0"], 2, "is not in the range"),
        (None, ["--target", "abacus"], 2, "'abacus' is not one of"),
        (None, ["--target", "onnx", "-o", "{full}"], 2, "is not free: name a new folder"),
        (None, ["--target", "onnx", "-o", "."], 2, "one that is not the current folder"),
        (None, ["--target", "onnx", "-o", "{link}"], 2, "is not free"),
        (None, [], 2, "Missing option '--target'"),
        (_no_onnx, ["--target", "onnx"], 1, "expected a file for the engine 'onnx'"),
        (_no_onnx, ["--target", "gguf"], 1, "expected a GGUF or an ONNX file"),
        (_damaged, ["--target", "onnx"], 1, "Download the bundle again"),
        (_other_self_test, ["--target", "onnx"], 1, "expected a margin of 99"),
    ],
)
def test_what_cannot_be_made_is_refused(
    damage: Callable[[Path], None] | None,
    arguments: list[str],
    code: int,
    says: str,
    bundle_copy: Path,
    tmp_path: Path,
) -> None:
    if damage is not None:
        damage(bundle_copy)
    out = tmp_path / "out"
    out.mkdir()
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "something").touch()
    (tmp_path / "link").symlink_to(tmp_path / "empty")
    (tmp_path / "empty").mkdir()
    arguments = [argument.format(full=tmp_path / "full", link=tmp_path / "link") for argument in arguments]
    where = [] if "-o" in arguments else ["-o", str(out / "made")]
    result = run("export", "--bundle", bundle_copy, *arguments, *where)
    assert (result.exit_code, result.stdout) == (code, "")
    assert says in " ".join(result.stderr.split())
    assert list(out.iterdir()) == []


def _write(file: Path, content: bytes) -> None:
    file.write_bytes(content)


def _with_make(monkeypatch: pytest.MonkeyPatch, change: Callable[[Path], None]) -> None:
    """The target onnx, whose model is changed after it was made."""

    def changed(bundle: Bundle, folder: Path) -> Any:
        made = onnx_target.TARGET.make(bundle, folder)
        change(folder / "model.onnx")
        return made

    other = dataclasses.replace(onnx_target.TARGET, make=changed)
    monkeypatch.setattr(make, "load_target", lambda name: other)


def test_an_export_that_judges_otherwise_is_not_written(
    int4_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    other = build_guard_graph(tiny_weights(seed=1), CONFIG, labels=HEAD).SerializeToString()
    _with_make(monkeypatch, lambda file: _write(file, other))
    with pytest.raises(ParityError, match=r"onnxruntime .* does not reproduce the bundle: golden vector 1 .* margin"):
        export_bundle("onnx", int4_bundle, tmp_path / "made")
    assert list(tmp_path.iterdir()) == []


def test_an_export_that_does_not_run_is_not_written(
    tiny_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _with_make(monkeypatch, lambda file: _write(file, b"not a model"))
    with pytest.raises(ParityError, match=r"(?s)check.py failed with exit code 1.*INVALID_PROTOBUF"):
        export_bundle("onnx", tiny_bundle, tmp_path / "made")
    assert list(tmp_path.iterdir()) == []


def test_a_runtime_that_is_not_there_is_said(
    tiny_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    result = run("export", "--target", "onnx", "--bundle", tiny_bundle, "-o", tmp_path / "made")
    assert result.exit_code == 0
    assert "warning: not verified: the golden vectors were not computed: onnxruntime" in result.stderr
    facts = open_export(tmp_path / "made").facts
    assert facts.check == Check(verified=(), not_verified=facts.check.not_verified)
    assert "**Not verified:** the golden vectors were not computed" in (tmp_path / "made" / "README.md").read_text()


@pytest.mark.parametrize("name", ["edgeguard", "convert"])
def test_scripts_have_no_code_of_ours(name: str, onnx_export: Export, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(onnx_export.bundle.path, tmp_path / "copy"))
    (folder / "check.py").write_text(f"import {name}\n")
    with pytest.raises(ParityError, match=f"import of {name} halted"):
        check_script.check_with_script(folder, (), "onnxruntime", "pip install onnxruntime")


def test_the_extra_that_is_missing_is_named(int4_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "gguf", None)
    with pytest.raises(ExportError, match=r"needs packages that are not installed .*edgeguard-runtime\[gguf\]"):
        export_bundle("gguf", int4_bundle, tmp_path / "made")
    assert list(tmp_path.iterdir()) == []


def _append(name: str) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        with (folder / name).open("a") as stream:
            stream.write("\n")

    return change


def _other_check(folder: Path) -> None:
    facts = json.loads((folder / "export.json").read_text())
    facts["check"]["verified"] = "all of it"
    (folder / "export.json").write_text(json.dumps(facts))
    refresh_files(folder)


def _other_format(folder: Path) -> None:
    facts = json.loads((folder / "export.json").read_text())
    (folder / "export.json").write_text(json.dumps({**facts, "format_version": 2}))
    refresh_files(folder)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (_append("golden.jsonl"), "expected .* bytes"),
        (_append("check.py"), "expected .* bytes"),
        (_other_format, "edgeguard-export of version 1"),
        (_other_check, "verified: expected a list of texts"),
        (lambda folder: (folder / "rules.py").unlink(), "found nothing"),
    ],
)
def test_a_changed_export_is_refused(
    change: Callable[[Path], None], says: str, onnx_export: Export, tmp_path: Path
) -> None:
    folder = Path(shutil.copytree(onnx_export.bundle.path, tmp_path / "copy"))
    change(folder)
    with pytest.raises(BundleError, match=says):
        open_export(folder)


def test_a_bundle_is_no_export(tiny_bundle: Path) -> None:
    with pytest.raises(BundleError, match="expected an export, with export.json"):
        open_export(tiny_bundle)


# The target gguf


def test_gguf_holds_the_same_integers(gguf_export: Export, int4_bundle: Path) -> None:
    from edgeguard.engines.gguf_file import read_gguf
    from edgeguard.engines.int4_weights import require_same_weights

    found = read_gguf(gguf_export.bundle.path / "model.gguf")
    require_same_weights(found.weights, read_onnx(int4_bundle / "model.onnx").weights, "model.gguf")
    assert found.config == dataclasses.replace(CONFIG, max_tokens=80)
    assert found.labels == tuple(HEAD)
    stated = json.loads(found.metadata["edgeguard.bundle"])
    assert (stated["name"], stated["max_tokens"], "files" in stated) == ("tiny", 80, False)
    other = {**found.weights, "model.norm.weight": tiny_weights(1)["model.norm.weight"]}
    with pytest.raises(ParityError, match="model.norm.weight is not what it was made from"):
        require_same_weights(other, found.weights, "model.gguf")


def test_gguf_is_reproduced_by_plain_llama_cpp(gguf_export: Export) -> None:
    check = gguf_export.facts.check
    assert check.runtime is not None and check.runtime.startswith("llama-cpp-python")
    assert 0 < (check.largest_difference or 0) <= export_support.TOLERANCE
    golden = read_golden(gguf_export.bundle.path / "golden.jsonl")
    margins = [line.margin for line in golden]
    assert max(margins) - min(margins) > 2 * export_support.TOLERANCE  # else a constant would pass
    assert max(len(line.ids) for line in golden) == 80
    assert gguf_export.bundle.file_for("gguf").name == "model.gguf"


def test_gguf_script_judges_no_text_that_llama_cpp_leaves_out(tmp_path: Path) -> None:
    """The shipped tokenizer has no token for U+0004, which llama.cpp drops."""
    pytest.importorskip("llama_cpp", reason=GGUF_MISSING)
    export = export_bundle("gguf", default_bundle_path(), tmp_path / "gguf", max_tokens=64)
    code = """
from check import tokenize
assert tokenize("water") and tokenize(" the  plants\\n")
for text in ("\\x04", "water\\x04 the plants", chr(0x40000)):
    try:
        tokenize(text)
    except ValueError as error:
        assert "left out a part" in str(error)
    else:
        raise SystemExit(f"{text!r} was taken")
"""
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=export.bundle.path, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr


def test_gguf_of_a_bundle_that_has_one_is_its_own(gguf_export: Export, tmp_path: Path) -> None:
    pytest.importorskip("llama_cpp", reason=GGUF_MISSING)
    again = export_bundle("gguf", gguf_export.bundle.path, tmp_path / "again")
    assert (tmp_path / "again/model.gguf").read_bytes() == (gguf_export.bundle.path / "model.gguf").read_bytes()
    assert again.facts.reference_engine == "gguf"


def test_gguf_of_a_judge_reads_its_words(tmp_path: Path) -> None:
    pytest.importorskip("llama_cpp", reason=GGUF_MISSING)
    gguf = pytest.importorskip("gguf", reason=GGUF_MISSING)
    from edgeguard.engines.gguf_file import add_config, add_weights, finish
    from edgeguard.export.gguf_write import add_tokenizer

    words = {"safe": 290, "unsafe": 117}
    folder = write_int4_bundle(tmp_path / "judge")
    (folder / "model.onnx").unlink()
    weights = tiny_weights()
    writer = gguf.GGUFWriter(folder / "model.gguf", "llama")
    add_config(writer, CONFIG)
    add_tokenizer(writer, make_tokenizer().to_str(), TEMPLATE.reserved, "gpt-2", CONFIG.vocab_size)
    add_weights(writer, weights, CONFIG)  # tied: the embedding is its output
    finish(writer)

    def edit(manifest: dict[str, Any]) -> None:
        manifest.update(head=HEAD[:2], head_tokens=words, quantization=None)
        manifest["files"] = {"model.gguf": {"engine": "gguf"}, "tokenizer.json": {"engine": None}}
        manifest["self_test"]["tolerance"] = 100.0  # not measured yet

    edit_manifest(folder, edit)
    refresh_files(folder)
    guard = Guard.load(folder, engine="gguf", threads=1)

    def measure(manifest: dict[str, Any]) -> None:
        manifest["self_test"]["tolerance"] = export_support.TOLERANCE
        for vector in manifest["self_test"]["vectors"]:
            vector["margin"] = guard.classify(prompt=vector["prompt"], response=vector["response"]).margin

    edit_manifest(folder, measure)
    check = export_bundle("gguf", folder, tmp_path / "made").facts.check
    assert check.vectors >= 11 and (check.largest_difference or 0) <= export_support.TOLERANCE


# The code to port


@settings(max_examples=60)
@given(
    st.lists(st.tuples(st.sampled_from(["system", "user", "assistant"]), st.text(max_size=60)), min_size=1, max_size=6),
    st.integers(24, 80),
)
def test_rules_encode_as_the_guard_does(messages: list[tuple[str, str]], limit: int) -> None:
    pairs = as_messages(messages=[{"role": role, "content": text} for role, text in messages])
    manifest = {"template": TEMPLATE.to_dict(), "max_tokens": limit}
    said = [{"role": role, "content": text} for role, text in pairs]
    try:
        wanted = TEMPLATE.encode(TOKENIZER, pairs, limit)
    except InputError:
        with pytest.raises(ValueError, match="nothing to judge"):
            rules.encode(said, _tokenize, manifest)
        return
    assert rules.encode(said, _tokenize, manifest) == (wanted.ids, wanted.target, wanted.truncated)


def test_rules_keep_to_the_limit_where_a_turn_costs_much() -> None:
    said = [{"role": "user", "content": "the cat and the hat " * 40}] * 3
    template = dataclasses.replace(TEMPLATE, opening={**TEMPLATE.opening, "user": (1, *range(10, 60))})
    for limit in (70, 90, 120, 300):
        wanted = template.encode(TOKENIZER, as_messages(messages=said), limit)
        assert len(wanted.ids) <= limit and wanted.truncated
        assert len(wanted.ids) > limit - 60  # no more is wasted than a turn of its own would cost
        manifest = {"template": template.to_dict(), "max_tokens": limit}
        assert rules.encode(said, _tokenize, manifest) == (wanted.ids, wanted.target, True)


TOKENIZER = make_tokenizer()
TOKENIZER.encode_special_tokens = True


def _tokenize(text: str) -> list[int]:
    ids: list[int] = TOKENIZER.encode(text, add_special_tokens=False).ids
    return ids


def test_rules_cut_huge_text_and_refuse_special_tokens() -> None:
    manifest = {"template": TEMPLATE.to_dict(), "max_tokens": 24}
    seen: list[int] = []

    def counted(text: str) -> list[int]:
        seen.append(len(text))
        return _tokenize(text)

    huge = [{"role": "user", "content": "a b" * 10**6}]
    ids, _, truncated = rules.encode(huge, counted, manifest)
    assert (len(ids), truncated, seen) == (24, True, [2 * 24 * rules.CHARS_PER_TOKEN])
    with pytest.raises(ValueError, match="special token"):
        rules.encode([{"role": "user", "content": "x"}], lambda text: [1], manifest)


@given(st.floats(-1e6, 1e6), st.booleans(), st.sampled_from(["prompt", "response"]))
def test_rules_decide_as_the_guard_does(margin: float, truncated: bool, target: str) -> None:
    from edgeguard.calibration import Calibration
    from edgeguard.policy import decide

    calibration = Calibration(1.3, -0.2)
    manifest = {
        "calibration": {target: calibration.to_dict()},
        "operating_points": {"balanced": {"thresholds": {target: 0.6}}},
    }
    p_unsafe, action = rules.verdict(margin, target, truncated, manifest)
    wanted = calibration.probability(margin)
    assert p_unsafe == pytest.approx(wanted, abs=1e-12)
    if abs(wanted - 0.6) > 1e-9:
        assert action == decide(wanted, 0.6, truncated=truncated)[1]


@pytest.mark.parametrize("margin", [float("nan"), float("inf"), float("-inf")])
def test_rules_allow_nothing_without_a_margin(margin: float) -> None:
    with pytest.raises(ValueError, match="the model returned"):
        rules.verdict(margin, "prompt", False, {})


# Golden vectors and answers

LINE = Golden((("user", "Hi"),), "prompt", False, (1, 2, 3), -1.0, 0.5, 0.3, "allow")
GOOD = Answer(True, True, True, -1.2, 0.28, "allow")


@pytest.mark.parametrize(
    ("answer", "says"),
    [
        (dataclasses.replace(GOOD, same_ids=False), "other token ids"),
        (dataclasses.replace(GOOD, same_rules=False), "another verdict of the golden margin"),
        (dataclasses.replace(GOOD, margin=-1.6), "expected a margin of -1.0000 within 0.5, found -1.6000"),
        (dataclasses.replace(GOOD, margin=float("nan")), "found nan"),
    ],
)
def test_a_wrong_answer_is_found_whatever_it_says_of_itself(answer: Answer, says: str) -> None:
    assert compare([LINE], [GOOD]).faults == ()
    (fault,) = compare([LINE], [answer]).faults
    assert says in fault


def test_a_verdict_that_is_not_of_its_own_margin_is_found(tiny_guard: Guard) -> None:
    manifest = tiny_guard.bundle.manifest
    p_unsafe = manifest.calibration[LINE.target].probability(GOOD.margin)
    line = dataclasses.replace(LINE, truncated=False)
    right = dataclasses.replace(
        GOOD, p_unsafe=p_unsafe, action="block" if p_unsafe >= _threshold(manifest) else "allow"
    )
    assert verdict_faults([line], [right], manifest) == ()
    for wrong in ({"action": "escalate"}, {"p_unsafe": 1 - p_unsafe}, {"margin": -50.0}):
        (fault,) = verdict_faults([line], [dataclasses.replace(right, **wrong)], manifest)
        assert fault.startswith("line 1 ("), fault


def _threshold(manifest: Manifest) -> float:
    return manifest.operating_points["balanced"].thresholds[LINE.target]


def test_missing_answers_are_a_fault() -> None:
    assert compare([LINE, LINE], [GOOD]).faults == ("1 answers to 2 golden vectors",)
    assert compare([LINE], []).faults == ("0 answers to 1 golden vectors",)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("not JSON", "expected one JSON object"),
        ('{"ok": true}', "found none of the name"),
        (
            '{"ok": true, "same_ids": 1, "same_rules": true, "margin": 0, "p_unsafe": 0, "action": "allow"}',
            "true or false",
        ),
        ('{"ok": true, "same_ids": true, "same_rules": true, "margin": NaN, "p_unsafe": 0, "action": "allow"}', "NaN"),
        (
            '{"ok": true, "same_ids": true, "same_rules": true, "margin": 0, "p_unsafe": 2, "action": "allow"}',
            "p_unsafe",
        ),
        ('{"ok": true, "same_ids": true, "same_rules": true, "margin": 0, "p_unsafe": 0, "action": "pass"}', "one of"),
    ],
)
def test_answers_are_read_strictly(text: str, says: str, tmp_path: Path) -> None:
    (tmp_path / "answers").write_text(text + "\n")
    with pytest.raises(BundleError, match=says):
        read_answers(tmp_path / "answers")


@pytest.mark.parametrize("key", [field.name for field in dataclasses.fields(Golden)])
def test_golden_vectors_are_read_strictly(key: str, tmp_path: Path) -> None:
    values: list[Any] = ["?", []]
    for value in values:
        write_lines(tmp_path / "golden", [{**LINE.to_dict(), key: value}])
        with pytest.raises(BundleError, match=key):
            read_golden(tmp_path / "golden")
    write_lines(tmp_path / "golden", [LINE.to_dict()])
    assert read_golden(tmp_path / "golden") == [LINE]


def test_unknown_targets_are_named() -> None:
    with pytest.raises(ExportError, match="unknown target 'abacus'. Known targets: gguf, onnx"):
        load_target("abacus")
    assert isinstance(load_target("onnx"), Target)


# The shipped bundle


@pytest.mark.slow
@pytest.mark.parametrize("target", ["onnx", "gguf"])
def test_the_shipped_bundle_exports(target: str, tmp_path: Path) -> None:
    if target == "gguf":
        pytest.importorskip("llama_cpp", reason=GGUF_MISSING)
    result = run("export", "--target", target, "-o", tmp_path / "made", "--json")
    assert result.exit_code == 0, result.stderr
    report = json.loads(result.stdout)
    assert report["check"]["not_verified"] == [] and report["check"]["vectors"] >= 11
    assert report["model_bytes"] < 60_000_000
