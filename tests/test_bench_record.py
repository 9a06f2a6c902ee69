"""The record and its schema: one definition, a strict reader, and a comparison of two."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from bench_support import bench, bench_record, read_json
from cli_support import run

from edgeguard.bench.compare import compare
from edgeguard.bench.records import SCHEMA_FILE, SCHEMA_VERSION, BenchError, Record, load_record, record_to_json
from edgeguard.bench.tables import tables_of, to_markdown
from edgeguard.bench.typed import JsonShapeError, from_json, json_schema

jsonschema = pytest.importorskip("jsonschema")

Edit = Callable[[dict[str, Any]], object]


@pytest.fixture(scope="module")
def file(tiny_bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A record of the tiny bundle with everything that can be asked for."""
    path = tmp_path_factory.mktemp("records") / "a.json"
    wanted = ("--tokens", "16,8", "--batch", "1", "--turn", "20", "--sustain", "1", "--engine", "onnx")
    bench_record(path, "--bundle", tiny_bundle, *wanted)
    return path


@pytest.fixture
def edited(file: Path, tmp_path: Path) -> Callable[[Edit], Path]:
    """A copy of the record with one change."""

    def edit(change: Edit) -> Path:
        data = read_json(file)
        change(data)
        copy = tmp_path / "b.json"
        copy.write_text(json.dumps(data))
        return copy

    return edit


def faster(data: dict[str, Any], times: float) -> None:
    for result in data["results"]:
        for length in result["lengths"]:
            for trial in length["trials"]:
                trial["latency_ms"] /= times


def test_the_checked_in_schema_is_that_of_the_code() -> None:
    assert read_json(SCHEMA_FILE) == json_schema(Record), (
        "python -m edgeguard.bench.records > edgeguard/bench/schema.json"
    )
    jsonschema.Draft202012Validator.check_schema(read_json(SCHEMA_FILE))


def test_a_record_is_valid_and_reads_back_as_it_was(file: Path) -> None:
    data = read_json(file)
    jsonschema.validate(data, read_json(SCHEMA_FILE))
    record = load_record(file)
    assert json.loads(json.dumps(record_to_json(record))) == data


def test_a_record_holds_every_trial(file: Path) -> None:
    record = load_record(file)
    (result,) = record.results
    assert [length.tokens for length in result.lengths] == [8, 16] == list(record.plan.tokens)
    for length in result.lengths:
        assert [trial.round for trial in length.trials] == [0, 1, 2], "the first round is discarded"
        assert all(trial.engine_ms and trial.tokenizer_ms and trial.margin is not None for trial in length.trials)
        assert length.summary.slowest_ms == max(trial.latency_ms for trial in length.trials)
    assert {trial.position for length in result.lengths for trial in length.trials} == {0, 1}
    assert len(result.loads) == 1 and result.loads[0].start_to_verdict_ms > result.loads[0].load_ms
    assert [at.tokens for at in result.memory.by_tokens] == [8, 16]
    assert result.turn is not None and (result.turn.conversation_tokens, result.turn.tokens) == (20, 52)
    assert len(result.turn.turn_ms) == len(result.turn.scratch_ms) == 3
    assert result.sustain is not None and len(result.sustain.windows) == 1
    assert 0 < result.sustain.windows[0].calls <= len(result.sustain.latencies_ms)
    assert result.file_bytes == record.bundle.size_bytes
    assert result.providers_asked == result.providers_used == ("CPUExecutionProvider",)
    assert record.absent == () and not record.bundle.untrained


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (
            lambda d: d.update(schema_version=SCHEMA_VERSION + 1),
            f"expected schema version {SCHEMA_VERSION}, found {SCHEMA_VERSION + 1}",
        ),
        (lambda d: d.update(schema_version=None), "expected schema version"),
        (lambda d: d.update(format="other"), "found no 'edgeguard-bench'"),
        (lambda d: d.pop("plan"), "Record lacks the key 'plan'"),
        (lambda d: d.update(more=1), "does not know the key 'more'"),
        (lambda d: d["plan"].update(batch="1"), r"b\.json\.plan\.batch: expected a integer, found '1'"),
        (lambda d: d["plan"].update(batch=True), "found True"),
        (lambda d: d["results"][0]["lengths"][0]["trials"][1].update(latency_ms=None), r"trials\[1\]\.latency_ms"),
        (lambda d: d["results"][0].update(lengths={}), "expected a list"),
        (lambda d: d["versions"].update(numpy=3), r"versions\.numpy"),
    ],
)
def test_another_record_is_refused(file: Path, edited: Callable[[Edit], Path], change: Edit, reason: str) -> None:
    other = edited(change)
    with pytest.raises(BenchError, match=reason):
        load_record(other)
    result = run("bench", "--compare", file, other)
    assert (result.exit_code, result.stdout, result.stderr.count("\n")) == (1, "", 1)


def test_what_is_no_record(tmp_path: Path) -> None:
    path = tmp_path / "x.json"
    with pytest.raises(BenchError, match="No such file"):
        load_record(path)
    for text in ("", "[]", "[" * 100_000, '{"format": NaN}', "\ud800"):
        path.write_bytes(text.encode("utf-8", "surrogatepass"))
        with pytest.raises(BenchError, match="expected a record"):
            load_record(path)


def test_numbers_that_are_not_finite_are_refused() -> None:
    @dataclasses.dataclass(frozen=True)
    class Number:
        """One number."""

        value: float | None

    hints = {"value": float | None}
    Number.__annotations__ = hints
    assert from_json(Number, {"value": 3}, "x") == Number(3.0)
    for value in (float("nan"), float("inf"), "3", [3.0], False):
        with pytest.raises(JsonShapeError, match=r"x\.value"):
            from_json(Number, {"value": value}, "x")


def test_compare_shows_ratios_with_their_spread(file: Path, edited: Callable[[Edit], Path]) -> None:
    other = edited(lambda data: faster(data, 2.0))
    found = compare(load_record(file), load_record(other))
    assert [(difference.name, difference.tokens) for difference in found.differences] == [("onnx", 8), ("onnx", 16)]
    assert not found.cautions and not found.alone
    for difference in found.differences:
        assert difference.low <= difference.ratio <= difference.high
        assert difference.ratio == pytest.approx(2.0)
    same = compare(load_record(file), load_record(file))
    assert not any(difference.clear for difference in same.differences)
    result = run("bench", "--compare", file, other, "--json", "-")
    assert result.exit_code == 0 and json.loads(result.stdout) == json.loads(json.dumps(found.to_json()))
    shown = run("bench", "--compare", file, other)
    assert "2.000" in shown.stdout and shown.exit_code == 0


def test_compare_says_what_else_differs(file: Path, edited: Callable[[Edit], Path]) -> None:
    def change(data: dict[str, Any]) -> None:
        data["device"]["cpu"] = "another"
        data["plan"]["threads"] = 7
        data["versions"]["onnxruntime"] = "0.1"
        data["results"][0]["lengths"].pop()

    result = run("bench", "--compare", file, edited(change))
    assert result.exit_code == 0
    for part in ("CPU: ", "another in B", "threads: 1 in A, 7 in B", "onnxruntime: ", "onnx at 16 tokens"):
        assert part in result.stderr


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda d: d["plan"].update(batch=4), "expected one batch size, found 1 and 4"),
        (lambda d: d["bundle"].update(untrained=True), "untrained"),
        (lambda d: d["results"][0].update(name="other"), "share no engine and length: onnx and other"),
        (lambda d: d["results"].clear(), "share no engine"),
    ],
)
def test_what_cannot_be_compared(file: Path, edited: Callable[[Edit], Path], change: Edit, reason: str) -> None:
    with pytest.raises(BenchError, match=reason):
        compare(load_record(file), load_record(edited(change)))


def test_tables_leave_out_what_was_not_measured(file: Path) -> None:
    record = load_record(file)
    tables = {table.title: table for table in tables_of(record)}
    assert "Latency of a call" in tables and "Calls without pause" in tables
    assert not any("limit" in title or "Not measured" in title for title in tables)
    assert not any("peak" in column for column in tables["Shares"].columns)
    for table in tables.values():
        assert all(len(row) == len(table.columns) for row in table.rows)


def test_markdown_has_the_command_and_every_table(file: Path) -> None:
    record = load_record(file)
    text = to_markdown(record)
    assert f"```bash\n{record.command}\n```" in text
    assert text.count("\n## ") == len(tables_of(record))
    cells = {line.count("|") for line in text.split("## Latency of a call\n")[1].split("##")[0].split("\n") if line}
    assert len(cells) == 1, "one width"


def test_a_record_of_random_weights_is_labelled_everywhere(file: Path, edited: Callable[[Edit], Path]) -> None:
    record = load_record(edited(lambda data: data["bundle"].update(untrained=True)))
    figures = [table for table in tables_of(record) if table.title != "Settings"]
    assert figures and all("(untrained: random weights)" in table.title for table in figures)
    assert to_markdown(record).startswith("# tiny@0.0.1 (untrained: random weights)")


def test_compare_goes_alone(file: Path) -> None:
    result = bench("--compare", file, file)
    assert (result.exit_code, result.stdout) == (2, "") and "measures nothing" in result.stderr
