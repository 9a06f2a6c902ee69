"""``edgeguard classify`` and what all commands share: exit codes, where text comes from, what is printed where."""

from __future__ import annotations

import json
import os
import pty
import re
import subprocess
import sys
from dataclasses import fields
from pathlib import Path

import pytest
from cli_support import ROOT, THREADS, finish, run, start, with_thresholds

from edgeguard import Guard, Verdict, __version__
from edgeguard.errors import EngineError

TEXT = "How do I sharpen a kitchen knife?"
COLOR = re.compile(r"\x1b\[[0-9;]*3[0-7]m")


@pytest.fixture(scope="module")
def allowing(tiny_bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bundle that flags nothing but text too long to read."""
    return with_thresholds(tiny_bundle, tmp_path_factory.mktemp("allowing") / "bundle", 1.0)


@pytest.fixture(scope="module")
def blocking(tiny_bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bundle that flags everything."""
    return with_thresholds(tiny_bundle, tmp_path_factory.mktemp("blocking") / "bundle", 0.0)


@pytest.mark.parametrize(
    ("args", "stdin", "code", "expected"),
    [
        pytest.param([TEXT], None, 0, "ALLOW", id="argument"),
        pytest.param(["-"], TEXT, 0, "ALLOW", id="dash"),
        pytest.param([], TEXT, 0, "ALLOW", id="pipe"),
        pytest.param(["--file", "-"], TEXT, 0, "ALLOW", id="file-dash"),
        pytest.param(["--", "--help"], None, 0, "ALLOW", id="text-that-looks-like-an-option"),
        pytest.param(["--prompt", "hello", "--response", "hi"], None, 0, "ALLOW", id="pair"),
        pytest.param(["--response", "hi"], None, 0, "ALLOW", id="response-alone"),
        pytest.param(["--messages", "-"], '[{"role": "user", "content": "hi"}]', 0, "ALLOW", id="messages"),
        pytest.param([TEXT, "--operating-point", "low_fpr"], None, 0, "low_fpr", id="operating-point"),
        pytest.param([""], TEXT, 1, "nothing to judge", id="empty-argument-is-not-stdin"),
        pytest.param(["--file", ""], TEXT, 1, "Error", id="empty-file-name-is-not-stdin"),
        pytest.param([], "", 1, "nothing to judge", id="empty-pipe"),
        pytest.param([], " \n\t\n", 1, "nothing to judge", id="blank-pipe"),
        pytest.param(["--file", "no/such/file"], None, 1, "no/such/file: No such file", id="missing-file"),
        pytest.param([TEXT, "--operating-point", "strict"], None, 1, "balanced", id="unknown-operating-point"),
        pytest.param([TEXT, "--engine", "abacus"], None, 1, "abacus", id="unknown-engine"),
        pytest.param(["--messages", "-"], "[]", 1, "nothing to judge", id="no-messages"),
        pytest.param(["--messages", "-"], '{"role": "user"}', 1, "expected a JSON list", id="messages-no-list"),
        pytest.param(["--messages", "-"], "[", 1, "not JSON", id="messages-no-json"),
        pytest.param(["--messages", "-"], "[" * 5000, 1, "levels deep", id="messages-too-deep"),
        pytest.param(["--messages", "-"], '[{"role": "root", "content": "x"}]', 1, "unknown role", id="unknown-role"),
        pytest.param(["--messages", "-"], '[{"a": 1, "a": 2}]', 1, "twice", id="key-twice"),
        pytest.param([TEXT, "--file", "f"], None, 2, "give one input, not TEXT and --file", id="two-inputs"),
        pytest.param(["", "--prompt", ""], None, 2, "give one input", id="two-empty-inputs"),
        pytest.param(["--messages", "f", "--response", "r"], None, 2, "give one input", id="messages-and-pair"),
        pytest.param(["how", "are", "you"], None, 2, "unexpected extra argument", id="text-without-quotes"),
        pytest.param([TEXT, "--threads", "0"], None, 2, "--threads", id="no-threads"),
        pytest.param(["--no-such-option"], TEXT, 2, "No such option", id="unknown-option"),
    ],
)
def test_inputs_and_exit_codes(args: list[str], stdin: str | None, code: int, expected: str, allowing: Path) -> None:
    result = run("classify", "--bundle", allowing, *(() if "--threads" in args else THREADS), *args, stdin=stdin)
    assert (result.exit_code, expected in result.output) == (code, True), result.output
    if code:
        assert result.stdout == "", "a failure must not print anything that reads like an answer"
        assert len(result.stderr.strip().splitlines()) == 1 or code == 2


def test_flagged_exits_3_and_names_the_likeliest_hazards(blocking: Path) -> None:
    result = run("classify", TEXT, "--bundle", blocking, *THREADS)
    verdict = Guard.load(blocking, threads=1).classify(TEXT)
    top = max(verdict.hazards, key=verdict.hazards.__getitem__)
    assert result.exit_code == 3
    lines = result.stdout.splitlines()
    assert lines[0].startswith("BLOCK")
    assert f"{verdict.p_unsafe:.4f}" in lines[1]
    assert lines[2].split()[0] == top
    assert f"{verdict.tokens} tokens" in lines[-1]


def test_not_flagged_names_no_hazard(allowing: Path) -> None:
    result = run("classify", TEXT, "--bundle", allowing, *THREADS)
    assert len(result.stdout.splitlines()) == 3
    assert not re.search(r"\bS\d", result.stdout)


def test_text_too_long_to_read_is_escalated(allowing: Path) -> None:
    result = run("classify", "--bundle", allowing, *THREADS, stdin="some words " * 20_000)
    assert result.exit_code == 3
    assert result.stdout.startswith("ESCALATE")
    assert "truncated" in result.stdout
    assert "only its head and tail were judged" in result.stderr


@pytest.mark.parametrize("code", [0, 3])
def test_json_is_one_line_with_the_fields_of_a_verdict(code: int, allowing: Path, blocking: Path) -> None:
    result = run("classify", TEXT, "--json", "--bundle", blocking if code else allowing, *THREADS)
    assert result.exit_code == code
    assert result.stdout.count("\n") == 1
    found = json.loads(result.stdout)
    assert list(found) == [field.name for field in fields(Verdict)]
    assert (found["action"] != "allow") == bool(code)
    expected = Guard.load(blocking if code else allowing, threads=1).classify(TEXT).to_dict()
    assert {**found, "latency_ms": 0} == {**expected, "latency_ms": 0}


def test_the_response_is_judged_not_the_prompt(tiny_bundle: Path, tmp_path: Path) -> None:
    bundle = with_thresholds(tiny_bundle, tmp_path / "bundle", prompt=0.0, response=1.0)
    pair = ("--prompt", "hello", "--response", "hi")
    messages = '[{"role": "user", "content": "hello"}, {"role": "assistant", "content": "hi"}]'
    assert run("classify", *pair[:2], "--bundle", bundle, *THREADS).exit_code == 3
    shown = run("classify", *pair, "--bundle", bundle, *THREADS)
    assert (shown.exit_code, "flags from 1.000" in shown.stdout) == (0, True)
    assert run("classify", "--messages", "-", "--bundle", bundle, *THREADS, stdin=messages).exit_code == 0


@pytest.mark.parametrize("source", ["stdin", "file"])
@pytest.mark.parametrize(
    ("data", "says"),
    [
        (b"caf\xe9 au lait", "not utf-8 (first at byte 4)"),
        (TEXT.encode("utf-16-le"), "holds NUL characters"),
        (TEXT.encode("utf-16") + b"x", "not utf-16"),
    ],
)
def test_text_that_cannot_be_read_is_not_judged(
    data: bytes, says: str, source: str, tmp_path: Path, allowing: Path
) -> None:
    (tmp_path / "text").write_bytes(data)
    where = ["--file", str(tmp_path / "text")] if source == "file" else ["-"]
    result = run("classify", *where, "--bundle", allowing, *THREADS, stdin=data)
    assert (result.exit_code, result.stdout) == (1, "")
    assert says in result.stderr and "Nothing was judged" in result.stderr


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16", "utf-32"])
def test_a_byte_order_mark_says_how_to_read(encoding: str, allowing: Path, tiny_guard: Guard) -> None:
    for name, text in (("-", TEXT), ("--messages=-", json.dumps([{"role": "user", "content": TEXT}]))):
        data = text.encode(encoding)
        result = run("classify", name, "--json", "--bundle", allowing, *THREADS, stdin=data)
        assert json.loads(result.stdout)["margin"] == tiny_guard.classify(TEXT).to_dict()["margin"]


@pytest.mark.parametrize("command", ["classify", "scan", "eval"])
def test_a_closed_stdin_is_said(command: str, allowing: Path) -> None:
    closed = {"stdin": None, "preexec_fn": lambda: os.close(0)}
    code, out, err = finish(start(command, "-", "--bundle", allowing, *THREADS, **closed))
    assert (code, out, err) == (1, "", "Error: stdin is closed. Name a file instead of -.\n")


def test_a_path_that_stdout_cannot_encode_is_escaped(tiny_bundle: Path, tmp_path: Path) -> None:
    folder = tmp_path / "\u738b"
    folder.symlink_to(tiny_bundle)
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "PYTHONIOENCODING": "cp1252"}
    code, out, _ = finish(start("info", "--bundle", folder, *THREADS, env=environment))
    assert code == 0 and "\\u738b" in out


def test_an_engine_that_fails_is_an_error_not_an_allow(allowing: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object, **__: object) -> None:
        raise EngineError("a logit is not\na number")

    monkeypatch.setattr(Guard, "classify", fail)
    result = run("classify", TEXT, "--bundle", allowing)
    assert (result.exit_code, result.stdout) == (1, "")
    assert result.stderr == "Error: a logit is not a number\n"


def test_ctrl_c_exits_130(allowing: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(Guard, "classify", interrupt)
    result = run("classify", TEXT, "--bundle", allowing)
    assert (result.exit_code, result.stdout) == (130, "")


@pytest.mark.parametrize("bundle", ["nowhere", "empty"])
def test_no_bundle_is_an_error(bundle: str, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    result = run("classify", TEXT, "--bundle", tmp_path / bundle)
    assert (result.exit_code, result.stdout) == (1, "")
    assert bundle in result.stderr


def test_a_real_pipe_and_exit_code(blocking: Path) -> None:
    code, out, err = finish(start("classify", "--json", "--bundle", blocking, *THREADS), TEXT.encode())
    assert (code, err) == (3, "")
    assert json.loads(out)["unsafe"] is True


def test_an_argument_that_is_not_utf8(allowing: Path) -> None:
    code, out, err = finish(start("classify", os.fsdecode(b"caf\xe9"), "--bundle", allowing, *THREADS))
    assert (code, out) == (1, "")
    assert "TEXT: not UTF-8. Nothing was judged" in err


def test_no_input_on_a_terminal_is_wrong_usage(allowing: Path) -> None:
    primary, secondary = pty.openpty()
    try:
        code, out, err = finish(start("classify", "--bundle", allowing, stdin=secondary))
    finally:
        os.close(primary)
        os.close(secondary)
    assert (code, out) == (2, "")
    assert "nothing to judge" in err


@pytest.mark.parametrize(("no_color", "colored"), [("", True), ("1", False)])
def test_colour_on_a_terminal_unless_no_color(no_color: str, colored: bool, blocking: Path) -> None:
    primary, secondary = pty.openpty()
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "TERM": "xterm-256color", "NO_COLOR": no_color}
    process = start("classify", TEXT, "--bundle", blocking, *THREADS, stdout=secondary, env=environment)
    os.close(secondary)
    shown = b""
    try:
        while chunk := os.read(primary, 4096):
            shown += chunk
    except OSError:
        pass  # how Linux reports the end of a terminal
    finally:
        os.close(primary)
    assert finish(process)[0] == 3
    assert b"BLOCK" in shown
    assert bool(COLOR.search(shown.decode())) == colored


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full on this system")
@pytest.mark.parametrize("options", [[], ["--json"]], ids=["text", "json"])
@pytest.mark.parametrize("flagged", [True, False])
def test_an_answer_that_cannot_be_written_is_an_error(
    flagged: bool, options: list[str], allowing: Path, blocking: Path
) -> None:
    bundle = blocking if flagged else allowing
    with open("/dev/full", "wb") as full:  # noqa: PTH123 - a device
        code, _, err = finish(start("classify", TEXT, *options, "--bundle", bundle, *THREADS, stdout=full))
    assert code == 1
    assert err.count("\n") == 1
    assert "No space left" in err


def test_help_and_version_are_quick_and_teach() -> None:
    loaded = "import sys; from edgeguard.cli import main; main(['--help'], standalone_mode=False); "
    check = "print(sorted({'onnxruntime', 'tokenizers', 'rich', 'torch'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", loaded + check], capture_output=True, text=True, cwd=ROOT, check=True)
    assert done.stdout.splitlines()[-1] == "[]", "--help must not load an engine"
    assert run("--version").output == f"edgeguard {__version__}\n"
    for command in ("classify", "scan", "eval", "info", "verify"):
        assert f"  {command} " in done.stdout
        text = run(command, "--help").output
        assert f"edgeguard {command}" in text
        assert "Exit codes:" in text


def test_an_unknown_command_is_wrong_usage() -> None:
    result = run("clasify", TEXT)
    assert result.exit_code == 2
    assert "No such command" in result.stderr
