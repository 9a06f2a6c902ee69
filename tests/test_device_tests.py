"""``python -m device_tests``: real runs on this machine, and a harness that no device can fool."""

from __future__ import annotations

import dataclasses
import gzip
import hashlib
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result
from tiny import edit_manifest, refresh_files

pytest.importorskip("onnx", reason="onnx is not installed: pip install 'edgeguard-runtime[test]'")
jsonschema = pytest.importorskip("jsonschema")

from export_support import read_lines, write_lines  # noqa: E402

from convert.corpora.registry import DATA_VARIABLE  # noqa: E402
from device_tests import records, rows, targets  # noqa: E402
from device_tests.__main__ import main  # noqa: E402
from device_tests.devices import parse_adb, parse_xctrace  # noqa: E402
from device_tests.drive import Wanted, run_on_device  # noqa: E402
from device_tests.matrix import matrix  # noqa: E402
from device_tests.records import Compute, DeviceTestError, Plan, Record, load_record, to_json  # noqa: E402
from device_tests.targets import TARGETS, DeviceTarget, missing_here  # noqa: E402
from edgeguard.bench.typed import json_schema  # noqa: E402
from edgeguard.bundle import Bundle  # noqa: E402
from edgeguard.export.make import Export, export_bundle, open_export  # noqa: E402
from edgeguard.export.web import MODULES_VARIABLE  # noqa: E402

QUICK = ("--tokens", "24,48,999", "--trials", "3", "--warmup", "1")
PLAN = Plan(device=None, unit="cpu", tokens=(24,), warmup=1, trials=3)


@pytest.fixture(scope="module")
def export(int4_bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> Export:
    """That bundle for onnxruntime. Read only: tests that change it copy it."""
    return export_bundle("onnx", int4_bundle, tmp_path_factory.mktemp("exports") / "onnx")


@pytest.fixture
def exported(export: Export, tmp_path: Path) -> Path:
    """A copy of the export that a test may change."""
    return Path(shutil.copytree(export.bundle.path, tmp_path / "export"))


def device_tests(*args: str | Path) -> Result:
    """Run the command in this process."""
    result = CliRunner().invoke(main, [str(arg) for arg in args])
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result


def run_local(target: str, bundle: Path, results: Path, *args: str | Path) -> Result:
    return device_tests("run", target, "--bundle", bundle, "--results", results, "--rows", "0", *QUICK, *args)


def require(target: str) -> None:
    """Skip where this machine lacks what the target needs."""
    if missing := missing_here(TARGETS[target]):
        pytest.skip(f"{target} needs {', '.join(missing)}")
    if target == "web" and MODULES_VARIABLE not in os.environ:
        pytest.skip(f"{MODULES_VARIABLE} names no folder with playwright-core")
    if target == "web" and not (os.environ.get("CHROMIUM") or shutil.which("chromium")):
        pytest.skip("Chromium is not installed")


def only_record(results: Path) -> Record:
    (file,) = results.glob("*.json")
    jsonschema.validate(json.loads(file.read_text()), json.loads(records.SCHEMA_FILE.read_text()))
    return load_record(file)


# Real runs


@pytest.mark.parametrize("target", ["onnx", "gguf", "web"])  # android, executorch, ios, qnn: their exports' tests
def test_a_run_on_this_machine(target: str, int4_bundle: Path, export: Export, tmp_path: Path) -> None:
    require(target)
    ready = ("--export", export.bundle.path) if target == "onnx" else ()
    result = run_local(target, int4_bundle, tmp_path / "results", *ready, "--keep", tmp_path / "job")
    assert result.exit_code == 0, result.output
    assert {"plan.json", "measured.json", "run.log"} <= {file.name for file in (tmp_path / "job").iterdir()}
    record = only_record(tmp_path / "results")
    measured = record.measured
    assert (record.target, record.failures, record.fell_back) == (target, (), False)
    assert record.golden is not None and record.golden.passed == record.golden.vectors >= 12
    assert record.agreement is None and record.agreement_skipped == "no rows were asked for"
    assert measured is not None and measured.compute.used == ("cpu",)
    if target == "onnx":
        assert measured.compute.nodes is not None and measured.compute.nodes["cpu"] > 20
    assert [(timing.tokens, len(timing.trials_ms)) for timing in measured.timings] == [(24, 3), (48, 3)]
    assert [summary.tokens for summary in record.summaries] == [24, 48]
    assert measured.peak_bytes is None or measured.peak_bytes > 10**7
    assert measured.device.emulated_by is None
    table = device_tests("matrix", "--results", tmp_path / "results", "--tokens", "24").stdout
    assert f"| {target} |" in table and "| 24 |" in table and f"{record.golden.vectors} of" in table
    assert f"{record.summaries[0].p50_ms:.1f} / " in table


def test_a_person_may_start_the_script(export: Export, tmp_path: Path) -> None:
    """As on a phone: an export and a job in, answers and measurements out."""
    (tmp_path / "plan.json").write_bytes(to_json(PLAN))
    shutil.copy(export.bundle.path / "golden.jsonl", tmp_path)
    script = TARGETS["onnx"].script
    environment = {**os.environ, "PYTHON": sys.executable}
    subprocess.run([script, export.bundle.path, "."], cwd=tmp_path, env=environment, check=True, capture_output=True)
    assert len(read_lines(tmp_path / "golden.jsonl.answers")) == len(read_lines(tmp_path / "golden.jsonl"))
    assert records.load_measured(tmp_path / "measured.json").runtime == "onnxruntime"


# What must fail, in real runs


def test_a_wrong_golden_vector_fails(int4_bundle: Path, exported: Path, tmp_path: Path) -> None:
    lines = read_lines(exported / "golden.jsonl")
    lines[0]["margin"] += 3
    lines[1]["ids"][3] += 1
    lines[2]["p_unsafe"] = 0.123
    write_lines(exported / "golden.jsonl", lines)
    refresh_files(exported)
    result = run_local("onnx", int4_bundle, tmp_path / "results", "--export", exported)
    assert result.exit_code == 1
    record = only_record(tmp_path / "results")
    assert [failure.split(":")[0].split(" (")[0] for failure in record.failures] == [
        "golden vector 1",  # its margin decides otherwise, too
        "golden vector 1",
        "golden vector 2",
        "golden vector 3",
    ]
    assert record.golden is not None and record.golden.passed == record.golden.vectors - 3
    assert "**failed**: golden vector 1" in result.output


def test_a_missing_model_fails(int4_bundle: Path, exported: Path, tmp_path: Path) -> None:
    (exported / "model.onnx").unlink()
    result = run_local("onnx", int4_bundle, tmp_path / "results", "--export", exported)
    assert (result.exit_code, (tmp_path / "results").exists()) == (1, False)
    assert "model.onnx: expected a file of" in result.output and "found nothing" in result.output


def test_a_model_that_goes_missing_on_the_device_fails(int4_bundle: Path, exported: Path) -> None:
    opened = open_export(exported)
    (exported / "model.onnx").unlink()  # after it was verified here, as on a device that lost it
    record = run_on_device(TARGETS["onnx"], opened, Bundle.open(int4_bundle), Wanted(PLAN, 0, 0, 300.0))
    assert record.measured is None and record.golden is not None and record.golden.passed == 0
    assert "run.sh ended with exit code 1" in record.failures[0] and "model.onnx" in record.failures[0]


# What must fail: devices that crash, are silent, or lie


@pytest.fixture
def answers(export: Export, tmp_path: Path) -> Path:
    """What a device that does all right leaves in its job."""
    folder = tmp_path / "answers"
    folder.mkdir()
    lines = [
        {"ok": True, "same_ids": True, "same_rules": True}
        | {key: line[key] for key in ("margin", "p_unsafe", "action")}
        for line in read_lines(export.bundle.path / "golden.jsonl")
    ]
    write_lines(folder / "golden.jsonl.answers", lines)
    (folder / "measured.json").write_text(json.dumps(MEASURED))
    return folder


NOTHING = {"load_average": None, "battery_percent": 80.0, "temperature_c": None}
MEASURED: dict[str, Any] = {
    "device": {
        "name": "Phone",
        "chip": "Chip 9",
        "architecture": "aarch64",
        "system": "Android 16",
        "ram_bytes": 8 * 10**9,
        "emulated_by": None,
        "virtual": False,
    },
    "runtime": "onnxruntime",
    "runtime_version": "1.31.1",
    "threads": 4,
    "compute": {"asked": "cpu", "used": ["cpu"], "nodes": {"cpu": 99}, "evidence": "profile"},
    "load_ms": 80.0,
    "peak_bytes": 150_000_000,
    "timings": [{"tokens": 24, "warmup": 1, "trials_ms": [41.0, 42.0, 43.0]}],
    "before": NOTHING,
    "after": NOTHING,
}


def run_script(
    script: str, export: Export, bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, within_s: float = 60
) -> Record:
    """Run a device whose ``run.sh`` has these lines; $2 is its job."""
    monkeypatch.setattr(targets, "ROOT", tmp_path)
    (tmp_path / "phone").mkdir()
    file = tmp_path / "phone" / "run.sh"
    file.write_text(f"#!/usr/bin/env bash\nset -eu\n{script}\n")
    file.chmod(0o755)
    target = DeviceTarget("phone", "onnx", "local", ("cpu", "npu"), ())
    unit = "npu" if '"asked": "npu"' in script else "cpu"
    plan = dataclasses.replace(PLAN, unit=unit)
    return run_on_device(target, export, Bundle.open(bundle), Wanted(plan, 0, 0, within_s))


def change_measured(answers: Path, **changes: Any) -> None:
    (answers / "measured.json").write_text(json.dumps({**MEASURED, **changes}))


def test_a_device_that_does_all_right_passes(
    export: Export, int4_bundle: Path, answers: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    record = run_script(f'cp "{answers}"/* "$2"', export, int4_bundle, tmp_path, monkeypatch)
    assert (record.failures, record.fell_back) == ((), False)
    assert record.golden is not None and record.golden.passed == record.golden.vectors
    row = matrix([record], 64).splitlines()[2]
    assert [cell.strip() for cell in row.split("|")[2:-1]] == [
        "tiny@0.0.1",
        "Chip 9",
        "onnxruntime 1.31.1",
        "cpu",
        f"{export.model_bytes / 10**6:.1f} MB",
        "24",
        "42.0 / 42.9",
        "571",
        "150 MB",
        f"{record.golden.vectors} of {record.golden.vectors}",
        "-",
        "real",
    ]


@pytest.mark.parametrize(
    ("script", "says"),
    [
        ("kill -9 $$", "ended with exit code -9"),
        ('head -n 3 "{answers}/golden.jsonl.answers" > "$2/golden.jsonl.answers"; kill -9 $$', "3 answers to"),
        ('echo "no device" >&2; exit 5', "ended with exit code 5: no device"),
        ("true", "measured.json: expected a JSON file"),
        ("true", "golden.jsonl.answers: expected lines of JSON"),
        ('cp "{answers}"/* "$2"; echo "{{}}" > "$2/measured.json"', "Measured lacks the key"),
        ('cp "{answers}"/* "$2"; echo oops >> "$2/golden.jsonl.answers"', "expected one JSON object"),
        (
            'cp "{answers}"/* "$2"; head -n 1 "{answers}/golden.jsonl.answers" >> "$2/golden.jsonl.answers"',
            "answers to",
        ),
        ("sleep 60", "did not end within 2 seconds"),
    ],
)
def test_a_device_that_fails_is_a_failure(
    script: str,
    says: str,
    export: Export,
    int4_bundle: Path,
    answers: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    within_s = 2 if script.startswith("sleep") else 60
    record = run_script(script.format(answers=answers), export, int4_bundle, tmp_path, monkeypatch, within_s)
    assert any(says in failure for failure in record.failures), record.failures
    assert "**failed**" in matrix([record], 64)
    assert load_record_of(record, tmp_path) == record


def load_record_of(record: Record, folder: Path) -> Record:
    """Through its JSON, and the schema."""
    (folder / "record.json").write_bytes(to_json(record))
    jsonschema.validate(json.loads(to_json(record)), json.loads(records.SCHEMA_FILE.read_text()))
    return load_record(folder / "record.json")


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"timings": []}, "expected 3 trials of each of [24] tokens"),
        ({"timings": [{"tokens": 24, "warmup": 1, "trials_ms": [1.0]}]}, "expected 3 trials"),
        ({"timings": [{"tokens": 24, "warmup": 1, "trials_ms": [1.0, 0.0, 1.0]}]}, "expected trials above 0 ms"),
        ({"compute": {"asked": "npu", "used": ["npu"], "nodes": None, "evidence": ""}}, "asked for the npu, the plan"),
        ({"compute": {"asked": "cpu", "used": ["abacus"], "nodes": None, "evidence": ""}}, "found 'abacus'"),
    ],
)
def test_measurements_that_cannot_be_are_a_failure(
    changes: dict[str, Any],
    says: str,
    export: Export,
    int4_bundle: Path,
    answers: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    change_measured(answers, **changes)
    record = run_script(f'cp "{answers}"/* "$2"', export, int4_bundle, tmp_path, monkeypatch)
    assert any(says in failure for failure in record.failures), record.failures


@pytest.mark.parametrize(
    ("used", "nodes", "fell_back", "shown"),
    [
        (["npu"], {"npu": 500}, False, "| npu |"),
        (["cpu"], {"cpu": 500}, True, "npu asked for, **fell back**: cpu"),
        (["cpu", "npu"], {"cpu": 20, "npu": 480}, True, "**partly fell back**: cpu (20 nodes), npu (480 nodes)"),
        ([], None, None, "npu asked for, used: not told"),
    ],
)
def test_another_unit_is_marked(
    used: list[str],
    nodes: dict[str, int] | None,
    fell_back: bool | None,
    shown: str,
    export: Export,
    int4_bundle: Path,
    answers: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    change_measured(answers, compute={"asked": "npu", "used": used, "nodes": nodes, "evidence": "profile"})
    script = f'cp "{answers}"/* "$2" # "asked": "npu"'
    record = run_script(script, export, int4_bundle, tmp_path, monkeypatch)
    assert (record.failures, record.fell_back) == ((), fell_back)
    assert shown in matrix([record], 64)


def test_emulated_timings_are_not_printed(
    export: Export, int4_bundle: Path, answers: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    change_measured(answers, device={**MEASURED["device"], "emulated_by": "qemu-user 10.0"})
    record = run_script(f'cp "{answers}"/* "$2"', export, int4_bundle, tmp_path, monkeypatch)
    table = matrix([record], 64)
    assert record.failures == () and len(record.summaries) == 1
    assert "emulated by qemu-user 10.0" in table and "| - | - | - | - |" in table
    assert not any(figure in table for figure in ("42.0", "571", "150 MB"))


def test_a_loud_machine_is_marked(
    export: Export, int4_bundle: Path, answers: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    change_measured(answers, before={**NOTHING, "load_average": 3.2})
    record = run_script(f'cp "{answers}"/* "$2"', export, int4_bundle, tmp_path, monkeypatch)
    assert "real, load average 3.2 before" in matrix([record], 64)


# Exports that do not fit


def test_an_export_of_another_bundle_is_refused(int4_bundle: Path, exported: Path, tmp_path: Path) -> None:
    other = Path(shutil.copytree(int4_bundle, tmp_path / "other"))
    edit_manifest(other, lambda manifest: manifest.update(version="0.0.2"))
    result = run_local("onnx", other, tmp_path / "results", "--export", exported)
    assert result.exit_code == 1 and "was made from another bundle (tiny@0.0.1)" in result.output
    with pytest.raises(DeviceTestError, match="expected an export for gguf, found one for onnx"):
        run_on_device(TARGETS["gguf"], open_export(exported), Bundle.open(int4_bundle), Wanted(PLAN, 0, 0, 60.0))


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["run", "abacus"], "'abacus' is not one of"),
        (["run", "onnx", "--unit", "npu"], "onnx runs on cpu, not on npu"),
        (["run", "onnx", "--tokens", "many"], "expected numbers of tokens"),
        (["run", "onnx", "--keep", "."], "--keep: . exists already"),
        (["agreement", "onnx", "--rows", "0"], "is not in the range"),
    ],
)
def test_wrong_usage_is_told(arguments: list[str], says: str) -> None:
    result = device_tests(*arguments)
    assert result.exit_code == 2 and says in result.output


# Verdict agreement


@pytest.fixture
def own_sets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two small sets of public rows, as a data folder may add them."""
    entries, folder = {}, tmp_path / "data" / "test"
    folder.mkdir(parents=True)
    for name, texts in {"cooks": ["How do I {} an egg?"], "talks": ["Tell me of {}.", "No, of {}."]}.items():
        lines: list[dict[str, Any]] = [
            {"id": f"{name}-{i}", "lang": "en", "label": None, "hazards": [], "target": "prompt"}
            | {"prompt": texts[0].format(i), "response": None}
            for i in range(6)
        ]
        if len(texts) > 1:
            lines = [{**line, "target": "response", "response": texts[1].format(i)} for i, line in enumerate(lines)]
        raw = "".join(json.dumps(line) + "\n" for line in lines).encode()
        (folder / f"{name}.jsonl.gz").write_bytes(gzip.compress(raw))
        entries[name] = dict.fromkeys(("license", "labels_by", "rule", "source"), "own") | {
            "role": "test",
            "commercial": "yes",
            "rows": len(lines),
            "sha256": hashlib.sha256(raw).hexdigest(),
        }
    (tmp_path / "data" / "sets.json").write_text(json.dumps(entries))
    monkeypatch.setenv(DATA_VARIABLE, str(tmp_path / "data"))
    monkeypatch.setattr(rows, "SETS", ("cooks", "talks"))


@pytest.mark.usefixtures("own_sets")
def test_agreement_is_measured_on_public_rows(int4_bundle: Path, export: Export) -> None:
    arguments = ("agreement", "onnx", "--bundle", int4_bundle, "--export", export.bundle.path)
    result = device_tests(*arguments, "--rows", "7")
    assert result.exit_code == 0, result.output
    found = json.loads(result.stdout)
    assert (found["rows"], found["agree"], found["share"], found["same_ids"]) == (7, 7, 1.0, 7)
    assert (found["sets"], found["differing"]) == ({"cooks": 4, "talks": 3}, [])
    assert found["largest_difference"] < 0.01
    result = device_tests(*arguments, "--rows", "70")
    assert result.exit_code == 1 and "cooks: expected 35 rows to draw, found 6" in result.output


@pytest.mark.usefixtures("own_sets")
def test_the_same_seed_draws_the_same_rows() -> None:
    drawn = [[row.id for row in rows.draw_rows(6, seed)] for seed in (0, 0, 1)]
    assert drawn[0] == drawn[1] != drawn[2]
    assert len(set(drawn[0])) == 6


@pytest.mark.usefixtures("own_sets")
def test_rows_that_the_device_judges_otherwise_are_counted(
    export: Export, int4_bundle: Path, answers: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    change = """
import json, sys
lines = [json.loads(line) for line in open(sys.argv[1])]
for i, line in enumerate(lines):
    action = {"allow": "block", "block": "allow"}[line["action"]] if i < 2 else line["action"]
    print(json.dumps({"ok": True, "same_ids": i > 0, "same_rules": True, "margin": line["margin"] + (i == 3),
        "p_unsafe": line["p_unsafe"], "action": action}))
"""
    (tmp_path / "change.py").write_text(change)
    script = f'cp "{answers}"/* "$2"; "$PYTHON" "{tmp_path}/change.py" "$2/rows.jsonl" > "$2/rows.jsonl.answers"'
    monkeypatch.setattr(targets, "ROOT", tmp_path)
    (tmp_path / "phone").mkdir()
    (tmp_path / "phone" / "run.sh").write_text(f"#!/usr/bin/env bash\nset -eu\n{script}\n")
    (tmp_path / "phone" / "run.sh").chmod(0o755)
    target = DeviceTarget("phone", "onnx", "local", ("cpu",), ())
    record = run_on_device(target, export, Bundle.open(int4_bundle), Wanted(PLAN, 8, 0, 60.0))
    found = record.agreement
    assert found is not None
    # The verdicts of three lines are not those of their own margins.
    assert [failure.split()[1] for failure in record.failures if " a margin of " in failure] == ["1", "2", "4"]
    assert (found.rows, found.agree, found.share, found.same_ids) == (8, 6, 0.75, 7)
    assert found.largest_difference == pytest.approx(1) and len(found.differing) == 2


def test_without_data_agreement_is_skipped_and_says_so(
    int4_bundle: Path, export: Export, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(DATA_VARIABLE, str(tmp_path / "nowhere"))
    arguments = ("agreement", "onnx", "--bundle", int4_bundle, "--export", export.bundle.path)
    result = device_tests(*arguments)
    assert (result.exit_code, result.stdout) == (0, "")
    assert "skipped" in result.stderr and "nowhere" in result.stderr


# Devices


def test_tools_that_are_absent_are_said_to_be(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    result = device_tests("list")
    assert result.exit_code == 0
    assert result.stdout.startswith("local ")
    assert "adb is not installed" in result.stdout and "xcrun is not installed" in result.stdout
    assert all(f"target  {name}" in result.stdout for name in TARGETS)
    listed = json.loads(device_tests("list", "--json").stdout)
    assert [device["kind"] for device in listed["devices"]] == ["local"] and len(listed["absent"]) == 2


def test_a_tool_that_fails_is_said_to_fail(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "adb").write_text("#!/bin/sh\nexit 1\n")
    (tmp_path / "adb").chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    assert "'adb devices -l' failed" in device_tests("list").stdout


def test_the_devices_of_adb_are_listed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text = """* daemon started successfully
List of devices attached
33041FDH2000AB         device usb:1-1 product:shiba model:Pixel_8 device:shiba transport_id:2
emulator-5554          device product:sdk_gphone64_arm64 model:sdk_gphone64_arm64 device:emu64a transport_id:1
R58M123ABCD            unauthorized usb:1-2 transport_id:3

"""
    (tmp_path / "adb").write_text(f"#!/bin/sh\n/bin/cat <<'EOF'\n{text}EOF\n")
    (tmp_path / "adb").chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    found = json.loads(device_tests("list", "--json").stdout)["devices"][1:]
    assert found == [dataclasses.asdict(device) for device in parse_adb(text)]
    assert [(d["id"], d["name"], d["state"], d["emulated"]) for d in found] == [
        ("33041FDH2000AB", "Pixel 8", "ready", False),
        ("emulator-5554", "sdk gphone64 arm64", "ready", True),
        ("R58M123ABCD", "R58M123ABCD", "unauthorized", False),
    ]


def test_the_devices_of_xctrace_are_parsed() -> None:
    text = """== Devices ==
My Mac (AC1F5E2B-0000-5CDB-8D7B-000000000000)
Anna's iPhone (18.1) (00008130-000A00000000001C)

== Devices Offline ==
Old iPad (15.8) (00008027-000A00000000001E)

== Simulators ==
iPhone 16 Simulator (18.1) (5E3A0000-0000-0000-0000-000000000000)
"""
    found = [(device.name, device.state, device.emulated) for device in parse_xctrace(text)]
    assert found == [
        ("My Mac", "ready", False),
        ("Anna's iPhone 18.1", "ready", False),
        ("Old iPad 15.8", "offline", False),
        ("iPhone 16 Simulator 18.1", "ready", True),
    ]


# Results


def test_the_schema_file_is_that_of_the_code() -> None:
    assert json.loads(records.SCHEMA_FILE.read_text()) == json_schema(Record)


def test_results_that_are_here_can_be_read() -> None:
    folder = Path(records.SCHEMA_FILE).parent / "results"
    for file in folder.glob("*.json"):
        jsonschema.validate(json.loads(file.read_text()), json.loads(records.SCHEMA_FILE.read_text()))
        assert load_record(file).failures == (), file


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("{}", "no 'edgeguard-device-test' as its format"),
        ("[]", "as its format"),
        ('{"format": "edgeguard-device-test", "schema_version": 99}', "expected schema version 1, found 99"),
        ('{"format": "edgeguard-device-test", "schema_version": 1}', "Record lacks the key"),
        ("nothing", "expected JSON"),
    ],
)
def test_other_files_are_no_results(text: str, says: str, tmp_path: Path) -> None:
    (tmp_path / "result.json").write_text(text)
    result = device_tests("matrix", "--results", tmp_path)
    assert result.exit_code == 1 and says in result.output


def test_llama_cpp_tells_where_its_layers_went() -> None:
    pytest.importorskip("llama_cpp", reason="needs llama-cpp-python")
    from device_tests.gguf.measure import compute_of

    log = "load_tensors: offloaded {}/21 layers to GPU\n"
    whole = compute_of("gpu", log.format(21), True)
    assert (whole.used, records.fell_back(whole)) == (("gpu",), False)
    partly = compute_of("gpu", log.format(5), True)
    assert (partly.nodes, records.fell_back(partly)) == ({"gpu": 5, "cpu": 16}, True)
    none = compute_of("gpu", "", False)
    assert none == Compute("gpu", ("cpu",), None, "llama.cpp: it was built without a GPU") and records.fell_back(none)
