"""``edgeguard scan``: what is kept, what is reported, and that a scan stopped anywhere goes on without a row lost."""

from __future__ import annotations

import contextlib
import errno
import gzip
import json
import os
import pty
import re
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from cli_support import ROOT, THREADS, finish, read_rows, run, start, with_thresholds, write_rows

from edgeguard import Guard
from edgeguard.cli import progress as progress_module
from edgeguard.cli import rows as rows_module
from edgeguard.cli.journal import Journal
from edgeguard.errors import EngineError, InputError

ROWS = [{"id": i, "prompt": f"question number {i}", "kept": {"n": [i, None, 1.5]}} for i in range(40)]
FAST = ("--batch-size", "1", *THREADS)  # four rows a chunk: many places to stop at


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """An input of 40 rows."""
    return write_rows(tmp_path / "in.jsonl", ROWS)


@pytest.fixture
def out(tmp_path: Path) -> Path:
    """Where the output goes."""
    return tmp_path / "out.jsonl"


def part_of(out: Path) -> Path:
    return out.with_name(out.name + ".part")


def check_whole(out: Path, rows: list[dict[str, Any]] = ROWS) -> None:
    """Every input row once, in order, with a verdict; nothing left beside the output."""
    found = read_rows(out)
    assert [row["id"] for row in found] == [row["id"] for row in rows]
    assert all(set(row) == {"id", "prompt", "kept", "verdict"} for row in found)
    assert sorted(path.name for path in out.parent.iterdir() if path.name.startswith(out.name)) == [out.name]


def test_rows_keep_their_fields_and_get_the_verdict_of_the_guard(tiny_bundle: Path, tiny_guard: Guard) -> None:
    rows: list[dict[str, Any]] = [
        {"prompt": "hello there", "id": 7, "deep": [{"x": None}], "é": "ü\ud800"},
        {"prompt": "hello", "response": "once upon a time", "text": None},
        {"prompt": "hello", "response": None, "big": 10**30},
        {"messages": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "the hat"}]},
        {"text": "the cat"},
    ]
    result = run("scan", "-", "--bundle", tiny_bundle, *THREADS, stdin="\n".join(map(json.dumps, rows)))
    assert result.exit_code == 0
    found = read_rows(result.stdout)
    assert [{key: row[key] for key in row if key != "verdict"} for row in found] == rows
    keys = ("text", "prompt", "response", "messages")
    expected = [tiny_guard.classify(**{key: row[key] for key in keys if key in row}).to_dict() for row in rows]
    for row, verdict in zip(found, expected, strict=True):
        assert row["verdict"]["p_unsafe"] == pytest.approx(verdict["p_unsafe"], abs=1e-5)
        assert (row["verdict"]["tokens"], row["verdict"]["unsafe"]) == (verdict["tokens"], verdict["unsafe"])
    assert "5 rows judged" in result.stderr


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        pytest.param(b'{"prompt": "half', "invalid JSON", id="half-an-object"),
        pytest.param(b"not json", "invalid JSON", id="no-json"),
        pytest.param(b'["prompt"]', "not a JSON object but list", id="list"),
        pytest.param(b"null", "not a JSON object but NoneType", id="null"),
        pytest.param(b'{"prompt": "caf\xe9"}', "not UTF-8 (byte 16 of the line)", id="latin-1"),
        pytest.param(b'{"prompt": "hi", "prompt": "ho"}', "the key 'prompt' stands twice", id="key-twice"),
        pytest.param(b'{"prompt": "hi", "score": NaN}', "NaN is not JSON", id="nan"),
        pytest.param(b'{"prompt": "hi", "score": 1e999}', "out of range", id="infinity"),
        pytest.param(b'{"prompt": "hi", "n": ' + b"9" * 5000 + b"}", "invalid JSON", id="endless-number"),
        pytest.param(b'{"x": ' + b"[" * 200 + b"]" * 200 + b"}", "more than 100 levels", id="deep"),
        pytest.param(b"[" * 100_000, "more than 100 levels", id="deeper-than-the-stack"),
        pytest.param(b'{"prompt": null}', "nothing to judge", id="nothing"),
        pytest.param(b"{}", "nothing to judge", id="empty"),
        pytest.param(b'{"prompt": ""}', "nothing to judge", id="empty-text"),
        pytest.param(b'{"prompt": 5}', "must be a string", id="number"),
        pytest.param(b'{"prompt": "hi", "messages": []}', "exactly one of", id="two-ways"),
        pytest.param(b'{"messages": [{"role": "root", "content": "x"}]}', "unknown role", id="role"),
    ],
)
def test_a_bad_line_is_reported_kept_and_does_not_stop_the_scan(line: bytes, reason: str, tiny_bundle: Path) -> None:
    data = b'{"prompt": "one"}\n\n' + line + b'\n{"prompt": "two"}\n'
    result = run("scan", "-", "--bundle", tiny_bundle, *THREADS, stdin=data)
    assert result.exit_code == 1
    first, bad, last = read_rows(result.stdout)
    assert (first["prompt"], last["prompt"]) == ("one", "two")
    assert "verdict" in first and "verdict" in last and "verdict" not in bad
    assert reason in bad["error"]
    assert result.stderr.startswith("-:3: ") and reason in result.stderr.splitlines()[0]
    try:
        kept = json.loads(line)
    except (ValueError, RecursionError):
        kept = None
    if isinstance(kept, dict) and "line" not in bad:
        assert {key: bad[key] for key in bad if key != "error"} == kept
    else:
        assert bad["line"] == 3
        assert bad["raw"] == line.decode("utf-8", "backslashreplace")[:2000]


def test_a_line_too_long_to_read_is_skipped_without_reading_it(
    tiny_bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(rows_module, "MAX_LINE_BYTES", 1000)
    long = [b'{"prompt": "%s"}\n' % (b"x" * n) for n in (985, 986, 5000)]  # 1000, 1001, 5015 bytes with the newline
    result = run("scan", "-", "--bundle", tiny_bundle, *THREADS, stdin=b"".join(long) + b'{"prompt": "end"}')
    found = read_rows(result.stdout)
    assert ["error" in row for row in found] == [False, True, True, False]
    assert "longer than 1,000 bytes" in found[1]["error"]
    assert [row.get("line") for row in found] == [None, 2, 3, None]


def test_fields_called_verdict_and_error_are_kept_under_another_name(tiny_bundle: Path, tmp_path: Path) -> None:
    once = run("scan", "-", "--bundle", tiny_bundle, *THREADS, stdin='{"prompt": "hi", "error": "old"}').stdout
    twice = read_rows(run("scan", "-", "--bundle", tiny_bundle, *THREADS, stdin=once).stdout)[0]
    assert twice["input_error"] == "old"
    assert twice["input_verdict"]["p_unsafe"] == twice["verdict"]["p_unsafe"]
    assert "error" not in twice


@pytest.mark.parametrize("form", ["plain", "gzip", "gzip-on-stdin", "bom", "windows"])
def test_forms_of_input(form: str, source: Path, out: Path, tiny_bundle: Path) -> None:
    data = source.read_bytes()
    changed = {"plain": data, "bom": b"\xef\xbb\xbf" + data, "windows": data.replace(b"\n", b"\r\n")}
    source.write_bytes(changed.get(form, gzip.compress(data)))
    stdin = source.read_bytes() if form == "gzip-on-stdin" else None
    result = run("scan", "-" if stdin else source, "-o", out, "--bundle", tiny_bundle, *THREADS, stdin=stdin)
    assert (result.exit_code, result.stdout) == (0, "")
    check_whole(out)


def test_damaged_gzip_is_an_error_and_can_be_gone_on_with(source: Path, out: Path, tiny_bundle: Path) -> None:
    data = gzip.compress(source.read_bytes())
    source.write_bytes(data[:-20])
    result = run("scan", source, "-o", out, "--bundle", tiny_bundle, *FAST)
    assert result.exit_code == 1
    assert "damaged or cut short" in result.stderr
    assert not out.exists()
    source.write_bytes(data)
    assert run("scan", source, "-o", out, "--resume", "--bundle", tiny_bundle, *FAST).exit_code == 0
    check_whole(out)


def test_one_row_that_the_engine_fails_on_does_not_take_others_with_it(
    source: Path, tiny_bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    judge = Guard.classify_many

    def fail_on_13(self: Guard, items: Any, **options: Any) -> Any:  # noqa: ANN401 - as the original
        if any("number 13" in item["prompt"] for item in items):
            raise EngineError("not finite")
        return judge(self, items, **options)

    monkeypatch.setattr(Guard, "classify_many", fail_on_13)
    result = run("scan", source, "--bundle", tiny_bundle, *THREADS)
    assert result.exit_code == 1
    assert [row["id"] for row in read_rows(result.stdout) if "error" in row] == [13]
    assert "verdict" in read_rows(result.stdout)[14]


def wait_for_lines(path: Path, number: int) -> None:
    """Until ``path`` has that many lines; two minutes at most."""
    for _ in range(2400):
        if path.exists() and path.read_bytes().count(b"\n") >= number:
            return
        time.sleep(0.05)
    raise AssertionError(f"{path} never had {number} lines")


def stop_after(number: int, out: Path, bundle: Path, stop: signal.Signals) -> tuple[int, str, str]:
    """Start a real scan, feed it ``number`` rows and no end, and send ``stop`` when they are in the partial output."""
    process = start("scan", "-", "-o", out, "--bundle", bundle, *FAST)
    assert process.stdin is not None
    process.stdin.write("".join(json.dumps(row) + "\n" for row in ROWS[:number]).encode())
    process.stdin.flush()
    wait_for_lines(part_of(out), number)
    process.send_signal(stop)
    return finish(process)


@pytest.mark.parametrize(("stop", "code"), [(signal.SIGKILL, -9), (signal.SIGINT, 130), (signal.SIGTERM, -15)])
def test_killed_in_the_middle_then_resumed(
    stop: signal.Signals, code: int, source: Path, out: Path, tiny_bundle: Path
) -> None:
    stopped = stop_after(20, out, tiny_bundle, stop)
    assert stopped[0] == code
    assert "Traceback" not in stopped[2]
    assert not out.exists()
    before = part_of(out).read_bytes()
    refused = run("scan", source, "-o", out, "--bundle", tiny_bundle, *FAST)
    assert (refused.exit_code, "--resume" in refused.stderr) == (1, True)
    assert part_of(out).read_bytes() == before
    resumed = run("scan", source, "-o", out, "--resume", "--bundle", tiny_bundle, *FAST)
    assert resumed.exit_code == 0
    assert "20 rows are done, going on" in resumed.stderr
    assert out.read_bytes().startswith(before), "rows that were done must not be judged again"
    check_whole(out)


def test_stopped_again_and_again(source: Path, out: Path, tiny_bundle: Path) -> None:
    for number in (4, 8, 24):
        process = start("scan", "-", "-o", out, "--resume", "--bundle", tiny_bundle, *FAST)
        assert process.stdin is not None
        process.stdin.write("".join(json.dumps(row) + "\n" for row in ROWS[:number]).encode())
        process.stdin.flush()
        wait_for_lines(part_of(out), number)
        process.kill()
        finish(process)
    assert run("scan", source, "-o", out, "--resume", "--bundle", tiny_bundle, *FAST).exit_code == 0
    check_whole(out)


def leave_unfinished(source: Path, out: Path, bundle: Path, keep_bytes: int | None = None) -> Path:
    """A partial output as a crash leaves it: all rows, cut to ``keep_bytes``."""

    def crash(_: Journal) -> None:
        raise OSError(errno.EIO, "crash before the rename")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Journal, "finish", crash)
        assert run("scan", source, "-o", out, "--bundle", bundle, *FAST).exit_code == 1
    part = part_of(out)
    if keep_bytes is not None:
        os.truncate(part, keep_bytes)
    return part


@pytest.mark.parametrize("cut", ["nothing", "all", "in-the-first-line", "before-a-newline", "after-a-newline", "late"])
def test_a_half_written_line_is_cut_off(cut: str, source: Path, out: Path, tiny_bundle: Path) -> None:
    part = leave_unfinished(source, out, tiny_bundle)
    data = part.read_bytes()
    third = [i for i, byte in enumerate(data) if byte == ord("\n")][2]
    places = {"nothing": len(data), "all": 0, "in-the-first-line": 5, "before-a-newline": third}
    os.truncate(part, {**places, "after-a-newline": third + 1, "late": len(data) - 7}[cut])
    assert run("scan", source, "-o", out, "--resume", "--bundle", tiny_bundle, *FAST).exit_code == 0
    check_whole(out)


def test_bad_rows_before_the_stop_still_fail_the_resumed_scan(tmp_path: Path, out: Path, tiny_bundle: Path) -> None:
    source = tmp_path / "in.jsonl"
    source.write_bytes(b'{"prompt": "a"}\nbroken \xff\n{}\n\n' + b'{"prompt": "b"}\n' * 9)
    leave_unfinished(source, out, tiny_bundle)
    os.truncate(part_of(out), part_of(out).stat().st_size - 10)
    resumed = run("scan", source, "-o", out, "--resume", "--bundle", tiny_bundle, *FAST)
    assert resumed.exit_code == 1
    assert "10 rows judged" in resumed.stderr and "2 could not be judged" in resumed.stderr
    assert ["error" in row for row in read_rows(out)] == [False, True, True] + [False] * 9


def test_rows_appended_to_the_input_are_judged_on_resume(source: Path, out: Path, tiny_bundle: Path) -> None:
    leave_unfinished(source, out, tiny_bundle)
    more = [*ROWS, {**ROWS[0], "id": 40}]
    write_rows(source, more)
    assert run("scan", source, "-o", out, "--resume", "--bundle", tiny_bundle, *FAST).exit_code == 0
    check_whole(out, more)


def _swap_rows(source: Path, part: Path) -> None:
    write_rows(source, [ROWS[1], ROWS[0], *ROWS[2:]])


def _shorten(source: Path, part: Path) -> None:
    write_rows(source, ROWS[:5])


def _change_a_field(source: Path, part: Path) -> None:
    write_rows(source, [*ROWS[:2], {**ROWS[2], "prompt": "another"}, *ROWS[3:]])


def _garbage(source: Path, part: Path) -> None:
    part.write_bytes(b"\0" * 100 + b"\n" + part.read_bytes())


def _row_without_result(source: Path, part: Path) -> None:
    part.write_bytes(source.read_bytes())


def _no_meta(source: Path, part: Path) -> None:
    part.with_name(part.name + ".meta").unlink()


def _broken_meta(source: Path, part: Path) -> None:
    part.with_name(part.name + ".meta").write_bytes(b"[]")


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (_swap_rows, "differ at line 1 of the input"),
        (_shorten, "differ at the end of the input"),
        (_change_a_field, "differ at line 3 of the input"),
        (_garbage, "does not belong to this input"),
        (_row_without_result, "does not belong to this input"),
        (_no_meta, "cannot be read"),
        (_broken_meta, "judged with another"),
    ],
)
def test_resume_refuses_what_does_not_belong_together(
    change: Callable[[Path, Path], None], reason: str, source: Path, out: Path, tiny_bundle: Path
) -> None:
    part = leave_unfinished(source, out, tiny_bundle)
    change(source, part)
    before = part.read_bytes()
    result = run("scan", source, "-o", out, "--resume", "--bundle", tiny_bundle, *FAST)
    assert (result.exit_code, reason in result.stderr) == (1, True), result.stderr
    assert part.read_bytes() == before
    assert not out.exists()


@pytest.mark.parametrize("other", ["bundle", "operating point"])
def test_resume_refuses_another_judge(other: str, source: Path, out: Path, tmp_path: Path, tiny_bundle: Path) -> None:
    part = leave_unfinished(source, out, tiny_bundle, keep_bytes=5000)
    bundle = with_thresholds(tiny_bundle, tmp_path / "other", 0.4)  # same name and version: the sum tells them apart
    options: list[str | Path] = ["--bundle", bundle]
    if other == "operating point":
        options = ["--bundle", tiny_bundle, "--operating-point", "low_fpr"]
    result = run("scan", source, "-o", out, "--resume", *options, *FAST)
    assert result.exit_code == 1
    assert "judged with another" in result.stderr
    assert part.stat().st_size == 5000


def test_a_full_disk_stops_the_scan_and_it_can_go_on(source: Path, out: Path, tiny_bundle: Path) -> None:
    limit = 7001  # bytes: somewhere inside a line

    def fill() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))

    process = start("scan", source, "-o", out, "--bundle", tiny_bundle, *FAST, preexec_fn=fill)
    code, _, err = finish(process)
    assert code == 1
    assert "out.jsonl.part: File too large. Make room, then go on with --resume." in err
    assert part_of(out).stat().st_size == limit
    assert run("scan", source, "-o", out, "--resume", "--bundle", tiny_bundle, *FAST).exit_code == 0
    check_whole(out)


def test_two_scans_cannot_write_one_output(source: Path, out: Path, tiny_bundle: Path) -> None:
    process = start("scan", "-", "-o", out, "--bundle", tiny_bundle, *FAST)
    assert process.stdin is not None
    process.stdin.write(json.dumps(ROWS[0]).encode() + b"\n")
    process.stdin.flush()
    wait_for_lines(part_of(out).with_name(part_of(out).name + ".meta"), 1)
    second = run("scan", source, "-o", out, "--resume", "--bundle", tiny_bundle, *FAST)
    assert (second.exit_code, "another scan is writing it" in second.stderr) == (1, True)
    rest = "".join(json.dumps(row) + "\n" for row in ROWS[1:])
    assert finish(process, rest.encode())[0] == 0
    check_whole(out)


def test_an_output_that_came_meanwhile_is_kept(out: Path) -> None:
    out.write_text("another scan's\n")  # after check_output looked
    with pytest.raises(InputError, match="exists already"):
        Journal(out, fresh=False)
    assert out.read_text() == "another scan's\n" and not part_of(out).exists()


def test_a_finished_output_is_replaced_only_by_force(source: Path, out: Path, tiny_bundle: Path) -> None:
    out.write_text("precious\n")
    for options in ([], ["--resume"]):
        result = run("scan", source, "-o", out, *options, "--bundle", tiny_bundle, *FAST)
        assert (result.exit_code, "exists already" in result.stderr) == (1, True)
        assert out.read_text() == "precious\n"
    part_of(out).write_text("left over\n")
    assert run("scan", source, "-o", out, "--force", "--bundle", tiny_bundle, *FAST).exit_code == 0
    check_whole(out)


def test_a_link_is_followed_not_replaced(source: Path, out: Path, tmp_path: Path, tiny_bundle: Path) -> None:
    (tmp_path / "folder").mkdir()
    out.symlink_to(tmp_path / "folder" / "real.jsonl")
    assert run("scan", source, "-o", out, "--bundle", tiny_bundle, *FAST).exit_code == 0
    assert out.is_symlink()
    check_whole(tmp_path / "folder" / "real.jsonl")


@pytest.mark.parametrize(
    ("args", "code", "reason"),
    [
        (["in.jsonl", "-o", "in.jsonl", "--force"], 1, "same file"),
        (["in.jsonl", "-o", "no/folder/out.jsonl"], 1, "no such folder"),
        (["in.jsonl", "-o", os.devnull, "--force"], 1, "not a regular file"),
        (["in.jsonl", "-o", "."], 1, "not a regular file"),
        (["missing.jsonl"], 1, "missing.jsonl: No such file"),
        (["in.jsonl", "--operating-point", "none"], 1, "balanced"),
        (["in.jsonl", "--resume"], 2, "need -o"),
        (["in.jsonl", "--force", "-o", "-"], 2, "need -o"),
        (["in.jsonl", "-o", "x", "--resume", "--force"], 2, "give one of them"),
        (["in.jsonl", "-o", "out.jsonl.gz"], 2, "not compressed"),
        (["in.jsonl", "--batch-size", "0"], 2, "--batch-size"),
        ([], 2, "Missing argument"),
    ],
)
def test_refusals(
    args: list[str], code: int, reason: str, source: Path, tiny_bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(source.parent)
    before = source.read_bytes()
    result = run("scan", *args, "--bundle", tiny_bundle, *THREADS)
    assert (result.exit_code, reason in result.stderr) == (code, True), result.stderr
    assert result.stdout == ""
    assert [path.name for path in source.parent.iterdir()] == ["in.jsonl"]
    assert source.read_bytes() == before


def test_an_empty_input_gives_an_empty_output(out: Path, tiny_bundle: Path) -> None:
    assert run("scan", "-", "-o", out, "--bundle", tiny_bundle, *FAST, stdin=b"\n\n").exit_code == 0
    assert out.read_bytes() == b""


def test_a_reader_that_leaves_early_is_quiet_but_no_success(tmp_path: Path, tiny_bundle: Path) -> None:
    source = write_rows(tmp_path / "many.jsonl", [{**ROWS[0], "filler": "x" * 2000}] * 400)
    process = start("scan", source, "--bundle", tiny_bundle, *FAST)
    assert process.stdout is not None
    process.stdout.readline()
    process.stdout.close()
    process.stdout = None
    code, _, err = finish(process)
    assert (code, "Traceback" in err, "Exception" in err) == (1, False, False), err


def test_rows_reach_a_pipe_chunk_by_chunk(tiny_bundle: Path) -> None:
    process = start("scan", "-", "--bundle", tiny_bundle, *FAST, stderr=subprocess.DEVNULL)
    assert process.stdin is not None and process.stdout is not None
    process.stdin.write("".join(json.dumps(row) + "\n" for row in ROWS[:4]).encode())
    process.stdin.flush()
    assert [json.loads(process.stdout.readline())["id"] for _ in range(4)] == [0, 1, 2, 3]
    assert finish(process, b"")[0] == 0


def test_progress_is_a_bar_on_a_terminal(source: Path, out: Path, tiny_bundle: Path) -> None:
    primary, secondary = pty.openpty()
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "TERM": "xterm", "COLUMNS": "120"}
    process = start("scan", source, "-o", out, "--bundle", tiny_bundle, *FAST, stderr=secondary, env=environment)
    os.close(secondary)
    shown = b""
    with contextlib.suppress(OSError):  # how Linux reports the end of a terminal
        while chunk := os.read(primary, 4096):
            shown += chunk
    os.close(primary)
    code, stdout, _ = finish(process)
    assert (code, stdout) == (0, "")
    assert "100%" in shown.decode()
    assert "40 rows," in shown.decode()


def test_progress_is_a_line_now_and_then_elsewhere(
    source: Path, out: Path, tiny_bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    quiet = run("scan", source, "-o", out, "--bundle", tiny_bundle, *FAST).stderr.splitlines()
    assert [line.split(",")[0] for line in quiet] == ["scan: 40 rows", f"{source}: 40 rows judged"]
    monkeypatch.setattr(progress_module, "LINE_EVERY_S", 0.0)
    lines = run("scan", source, "-o", out, "--force", "--bundle", tiny_bundle, *FAST).stderr.splitlines()
    assert len(lines) == 12
    assert re.fullmatch(r"scan: 20 rows, [\d.]+ rows/s, \d+%", lines[4])


PEAK_KB = """
import re, sys
from edgeguard.cli import main
code = main(sys.argv[1:], standalone_mode=False)
print(code, re.search(r"VmHWM:\\s+(\\d+)", open("/proc/self/status").read())[1])
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="peak memory is read from /proc")
def test_memory_does_not_grow_with_the_rows(tmp_path: Path, out: Path, tiny_bundle: Path) -> None:
    peaks = []
    for number in (300, 1500):
        row = json.dumps({"prompt": "hi", "filler": "x" * 20_000})
        source = tmp_path / "in.jsonl"
        source.write_text(f"{row}\n" * number)
        command: list[str | Path] = [
            sys.executable,
            "-c",
            PEAK_KB,
            "scan",
            source,
            "-o",
            out,
            "--force",
            "--bundle",
            tiny_bundle,
            *THREADS,
        ]
        done = subprocess.run(command, capture_output=True, text=True, check=True, cwd=ROOT)
        code, peak = map(int, done.stdout.split())
        assert code == 0
        peaks.append(peak)
    assert peaks[1] - peaks[0] < 12_000, f"peaks in kB: {peaks}; 1,200 more rows are 24,000 kB"
