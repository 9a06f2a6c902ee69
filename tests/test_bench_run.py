"""``edgeguard bench`` as a command: real workers on the tiny bundle, outputs, failures."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from bench_support import QUICK, bench, bench_record, read_json, shrink_limits
from cli_support import finish, run, start

from edgeguard.bench import energy, measure
from edgeguard.bench.measure import schedule, sustained
from edgeguard.bench.records import Record, load_record
from edgeguard.engines import ENGINES

psutil = pytest.importorskip("psutil")

PNG = b"\x89PNG\r\n\x1a\n"


@pytest.fixture(autouse=True)
def own_cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """A cache folder of the test's own."""
    monkeypatch.setenv("EDGEGUARD_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def texts_and_order(record: Record) -> tuple[str, list[tuple[int, int, int]]]:
    order = [
        (trial.round, trial.position, length.tokens)
        for result in record.results
        for length in result.lengths
        for trial in length.trials
    ]
    return record.plan.texts_sha256, sorted(order)


def margins(record: Record) -> list[float | None]:
    return [trial.margin for result in record.results for length in result.lengths for trial in length.trials]


def test_all_engines_that_can_run_and_all_outputs(tiny_bundle: Path, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    files = [tmp_path / name for name in ("r.json", "r.md", "r.png")]
    outputs = [part for pair in zip(("--json", "--markdown", "--plot"), files, strict=True) for part in pair]
    result = bench("--bundle", tiny_bundle, "--tokens", "8,16", *outputs)
    assert result.exit_code == 0, result.stderr
    assert "Latency of a call" in result.stdout and "onnx" in result.stdout
    assert "bench: loading onnx" in result.stderr, "progress goes to stderr"
    record = load_record(files[0])
    assert record.plan.engines == tuple(ENGINES)
    measured, left_out = {r.name for r in record.results}, {absent.name for absent in record.absent}
    assert "onnx" in measured and measured | left_out == set(ENGINES) and not measured & left_out
    assert files[1].read_text().startswith("# tiny@0.0.1\n")
    assert files[2].read_bytes().startswith(PNG)
    assert sorted(path.name for path in tmp_path.iterdir() if path.is_file()) == ["r.json", "r.md", "r.png"]
    assert files[0].stat().st_mode & 0o777 == 0o666 & ~current_umask()


def current_umask() -> int:
    umask = os.umask(0)
    os.umask(umask)
    return umask


def test_json_on_stdout_is_one_line_and_nothing_else(tiny_bundle: Path) -> None:
    result = bench("--bundle", tiny_bundle, "--engine", "onnx", "--tokens", "8", "--json", "-")
    assert (result.exit_code, result.stdout.count("\n")) == (0, 1)
    assert json.loads(result.stdout)["format"] == "edgeguard-bench"


def test_a_seed_gives_the_same_texts_and_order(tiny_bundle: Path, tmp_path: Path) -> None:
    common = ("--bundle", tiny_bundle, "--engine", "onnx", "--tokens", "8,16,32")
    first, again, other = (
        bench_record(tmp_path / f"{i}.json", *common, "--seed", seed) for i, seed in enumerate(("5", "5", "6"))
    )
    assert texts_and_order(first) == texts_and_order(again)
    assert margins(first) == pytest.approx(margins(again), abs=1e-4)
    assert first.plan.texts_sha256 != other.plan.texts_sha256
    assert margins(first) != pytest.approx(margins(other), abs=1e-4)


def test_every_round_has_every_call_once_in_another_order() -> None:
    rounds = list(schedule(["a", "b"], [16, 64, 256], 8, seed=3))
    assert all(sorted(calls) == sorted(rounds[0]) and len(calls) == 6 for calls in rounds)
    assert len({tuple(calls) for calls in rounds}) > 1
    assert rounds == list(schedule(["a", "b"], [16, 64, 256], 8, seed=3))
    assert rounds != list(schedule(["a", "b"], [16, 64, 256], 8, seed=4))


def test_a_batch_goes_through_classify_many(tiny_bundle: Path, tmp_path: Path) -> None:
    record = bench_record(
        tmp_path / "r.json", "--bundle", tiny_bundle, "--engine", "onnx", "--tokens", "16", "--batch", "4"
    )
    summary = record.results[0].lengths[0].summary
    assert record.plan.batch == 4
    assert summary.tokens_per_s == pytest.approx(1000 * 4 * 16 / summary.p50_ms)


def test_the_machines_limit_is_measured_unless_told_otherwise(
    tiny_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shrink_limits(monkeypatch)
    quick = ("--trials", "1", "--warmup", "0", "--loads", "1", "--threads", "1", "--engine", "onnx", "--tokens", "8")
    result = run("bench", *quick, "--bundle", tiny_bundle, "--json", tmp_path / "r.json")
    assert result.exit_code == 0, result.stderr
    record = load_record(tmp_path / "r.json")
    assert record.limits.copy is not None and record.limits.copy.bytes_per_s > 0
    assert record.limits.int8 is not None and len(record.limits.int8.trials_ms) >= 8, "before and after"
    assert record.shape is None and record.work == (), "the tiny bundle is no Llama"
    assert "GMAC/s" in result.stdout


@pytest.mark.skipif(sys.platform != "linux", reason="reads RAPL")
def test_energy_is_that_of_a_call(
    tiny_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, own_cache: Path
) -> None:
    zone = tmp_path / "powercap" / "intel-rapl:0"
    zone.mkdir(parents=True)
    for file, text in {"name": "package-0", "energy_uj": 0, "max_energy_range_uj": 10**9}.items():
        (zone / file).write_text(f"{text}\n")
    monkeypatch.setattr(energy, "POWERCAP_ROOT", zone.parent)
    monkeypatch.setattr(measure, "ENERGY_S", 0.5)
    monkeypatch.setattr(measure, "IDLE_S", 0.2)
    command = ("--bundle", tiny_bundle, "--engine", "onnx", "--tokens", "8")
    still = bench_record(tmp_path / "still.json", *command)
    assert still.results[0].energy is None and still.meter.source == "RAPL package-0"
    stop = threading.Event()

    def burn() -> None:
        """30 watts: 300,000 microjoules each hundredth of a second."""
        joules = 0
        while not stop.wait(0.01):
            joules += 300_000
            part = zone / "part"
            part.write_text(f"{joules}\n")
            part.replace(zone / "energy_uj")

    thread = threading.Thread(target=burn)
    thread.start()
    try:
        found = bench_record(tmp_path / "burning.json", *command).results[0].energy
    finally:
        stop.set()
        thread.join()
    assert found is not None and found.calls > 0
    assert 3 < found.watts < 33 and 3 < found.idle_watts < 33
    assert found.joules_per_call * found.calls == pytest.approx(found.watts * found.seconds)


def test_seconds_are_counted_whole() -> None:
    told = {
        "ends_s": [0.2, 0.9, 1.1, 3.4, 3.9, 4.2],
        "latencies_ms": [200, 700, 200, 2300, 500, 300],
        "sensors": [(1000.0, 50.0), (900.0, 60.0), (900.0, 60.0), (None, None)],
    }
    found = sustained(told, tokens=10, batch=2)
    assert [(w.second, w.calls, w.tokens_per_s, w.mhz) for w in found.windows] == [
        *((0, 2, 40.0, 1000.0), (1, 1, 20.0, 900.0), (2, 0, 0.0, 900.0), (3, 2, 40.0, None)),
    ]
    assert found.kept == 1.0
    assert sustained({"ends_s": [0.5], "latencies_ms": [500], "sensors": []}, 10, 1).kept is None


@pytest.mark.parametrize(
    ("args", "code", "reason"),
    [
        (["--engine", "nope"], 2, "unknown engine 'nope'. Known are: auto, onnx"),
        (["--peer", "nope"], 2, "unknown peer 'nope'. Known are: llama-cpp-python"),
        (["--shape", "nope"], 2, "unknown shape 'nope'. Known are: llama-guard-3-1b-int4"),
        (["--shape", "tiny", "--bundle", "x"], 2, "give --bundle or --shape"),
        (["--tokens", "8,x"], 2, "expected numbers of tokens"),
        (["--tokens", "0"], 2, "expected numbers of tokens"),
        (["--json", "no/such/folder/r.json"], 2, "cannot be written: No such file or directory"),
        (["--json", "."], 2, "is a folder. Name a file"),
        (["--markdown", "-"], 2, "only --json writes to stdout"),
        (["--bundle", "no/such/bundle"], 1, "no/such/bundle"),
    ],
)
def test_wrong_usage_and_bundles(args: list[str], code: int, reason: str) -> None:
    result = bench(*args)
    assert (result.exit_code, result.stdout) == (code, "")
    assert reason in result.stderr


@pytest.mark.parametrize(
    ("args", "reason"),
    [
        (["--tokens", "8,65"], "65 tokens: this bundle reads at most 64"),
        (["--tokens", "3"], "3 tokens: no text"),
        (["--turn", "60"], "92 tokens: this bundle reads at most 64"),
    ],
)
def test_lengths_that_cannot_be_are_found_before_anything_runs(tiny_bundle: Path, args: list[str], reason: str) -> None:
    result = bench("--bundle", tiny_bundle, *args)
    assert (result.exit_code, result.stdout) == (1, "")
    assert reason in result.stderr and "loading" not in result.stderr


def test_lengths_are_those_the_bundle_reads(tiny_bundle: Path, tmp_path: Path) -> None:
    assert bench_record(tmp_path / "r.json", "--bundle", tiny_bundle, "--engine", "onnx").plan.tokens == (16, 32, 64)


def test_an_engine_asked_for_by_name_must_run(bundle_copy: Path, tmp_path: Path) -> None:
    def nothing_for_onnx(manifest: dict[str, object]) -> None:
        files = manifest["files"]
        assert isinstance(files, dict)
        files["model.onnx"]["engine"] = "gguf"

    manifest = bundle_copy / "manifest.json"
    data = read_json(manifest)
    nothing_for_onnx(data)
    manifest.write_text(json.dumps(data))
    result = bench("--bundle", bundle_copy, "--engine", "onnx", "--json", tmp_path / "r.json")
    assert (result.exit_code, result.stdout) == (1, "") and "Error: onnx: " in result.stderr
    assert not (tmp_path / "r.json").exists()


def test_the_plot_says_what_is_missing(tiny_bundle: Path, tmp_path: Path) -> None:
    (tmp_path / "matplotlib.py").write_text("raise ImportError('there is none')")
    command = ("bench", *QUICK, "--bundle", tiny_bundle, "--plot", tmp_path / "r.png")
    path = os.pathsep.join([str(tmp_path), str(Path(__file__).parents[1])])
    code, out, err = finish(start(*command, env={**os.environ, "PYTHONPATH": path}))
    assert (code, out) == (1, "")
    assert "--plot needs matplotlib" in err and "edgeguard-runtime[bench]" in err and "loading" not in err


def test_help_imports_nothing_that_measures() -> None:
    code = "import sys; from edgeguard.cli.bench import bench_command; print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    modules = set(done.stdout.split())
    assert modules.isdisjoint({"rich", "onnxruntime", "matplotlib", "edgeguard.bench.measure", "edgeguard.bench.peers"})


def begin(tiny_bundle: Path, tmp_path: Path) -> tuple[subprocess.Popen[bytes], Path]:
    """A long run whose rounds have begun."""
    file = tmp_path / "r.json"
    settings = ("--threads", "1", "--no-limits", "--loads", "1", "--trials", "100000", "--engine", "onnx")
    process = start("bench", *settings, "--bundle", tiny_bundle, "--tokens", "8", "--json", file)
    assert process.stderr is not None
    for line in process.stderr:
        if b"rounds" in line:
            return process, file
    raise AssertionError("it ended before its rounds")


@pytest.mark.skipif(sys.platform == "win32", reason="signals of POSIX")
def test_a_worker_that_dies_is_an_error_and_no_result(tiny_bundle: Path, tmp_path: Path) -> None:
    process, file = begin(tiny_bundle, tmp_path)
    (worker,) = psutil.Process(process.pid).children()
    worker.kill()
    code, out, err = finish(process)
    assert (code, out) == (1, "")
    assert "Error: onnx: its process ended while it was asked to judge (killed by SIGKILL); nothing was recorded" in err
    assert not file.exists()


@pytest.mark.skipif(sys.platform == "win32", reason="signals of POSIX")
@pytest.mark.parametrize(("number", "expected"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_an_interrupted_run_leaves_nothing(
    tiny_bundle: Path, tmp_path: Path, number: signal.Signals, expected: int
) -> None:
    process, file = begin(tiny_bundle, tmp_path)
    children = psutil.Process(process.pid).children()
    process.send_signal(number)
    code, out, _ = finish(process)
    assert (code, out, file.exists(), len(children)) == (expected, "", False, 1)
    assert not psutil.wait_procs(children, timeout=20)[1]


@pytest.mark.skipif(sys.platform == "win32", reason="signals of POSIX")
def test_a_worker_does_not_outlive_a_killed_run(tiny_bundle: Path, tmp_path: Path) -> None:
    process, _ = begin(tiny_bundle, tmp_path)
    children = psutil.Process(process.pid).children()
    process.kill()
    finish(process)
    assert len(children) == 1 and not psutil.wait_procs(children, timeout=20)[1]


def test_what_a_killed_run_left_goes_when_it_is_old(own_cache: Path) -> None:
    from edgeguard.bench.files import scratch_folder

    old, young = own_cache / "bench-old", own_cache / "bench-young"
    for folder in (old, young):
        folder.mkdir(parents=True)
    long_ago = time.time() - 2 * 24 * 3600
    os.utime(old, (long_ago, long_ago))
    with scratch_folder() as scratch:
        assert scratch.is_dir() and young.is_dir() and not old.exists()
    assert not scratch.exists()
