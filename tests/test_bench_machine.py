"""What the benchmark tells of the machine: facts, memory, energy, its limit, and the work of a pass."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from bench_support import write_tiny_llama

from edgeguard import Guard
from edgeguard.bench import device
from edgeguard.bench.energy import Rapl, find_meter, milliwatts
from edgeguard.bench.limits import best_of, measure_limits
from edgeguard.bench.memory import peak_bytes, resident_bytes
from edgeguard.bench.records import ModelShape
from edgeguard.bench.work import bundle_shape, onnx_shape, work_of
from edgeguard.bundle import Bundle
from edgeguard.engines.cpus import allowed_cpus

TINY = ModelShape(3, 64, 96, 4, 2, 16, 512, 16)


def test_the_device_describes_itself() -> None:
    found = device.describe_device()
    assert found.cpu and found.system and found.architecture
    assert 1 <= found.cpus_allowed == allowed_cpus() <= found.cpus_online
    assert found.others_cpus is None
    if sys.platform == "linux":
        assert found.ram_bytes is not None and found.ram_bytes > 2**28
        assert found.load_before is not None
    versions = device.versions()
    assert versions["python"] == ".".join(map(str, sys.version_info[:3]))
    assert versions["onnxruntime"] and "onnxruntime-genai" in versions


def test_the_commit_is_the_checkouts() -> None:
    head = subprocess.run(
        ["git", "-C", str(Path(__file__).parent), "rev-parse", "HEAD"], capture_output=True, text=True, check=False
    )
    if head.returncode:
        pytest.skip("not a checkout of git")
    found = device.commit()
    assert found is not None and found.rstrip("+") == head.stdout.strip()


def test_other_work_is_told_apart_from_ours(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stat, ticks, now = tmp_path / "stat", os.sysconf("SC_CLK_TCK"), [0.0]
    monkeypatch.setattr(time, "perf_counter", lambda: now[0])

    def write(busy_s: float) -> None:
        """Half of it as a user's time, half of it stolen; idle and waiting count as nothing."""
        half = int(busy_s * ticks / 2)
        stat.write_text(f"cpu  {half} 0 0 999 999 0 0 {half} 0 0\ncpu0 1 1 1 1 1 1 1 1 0 0\n")

    write(100)
    work, own = device.OtherWork(stat), sum(os.times()[:4])
    subprocess.run([sys.executable, "-c", "sum(range(10**7))"], check=True)  # ours, once it has ended
    own = sum(os.times()[:4]) - own
    now[0] = 10.0
    write(100 + own + 3 * now[0])
    assert own > 0.05 and work.cpus() == pytest.approx(3, abs=0.05)
    write(100)
    assert work.cpus() == 0
    assert device.OtherWork(tmp_path / "none").cpus() is None


def test_the_hottest_sensor(tmp_path: Path) -> None:
    for number, text in enumerate(("41000\n", "67500\n", "nothing\n")):
        (tmp_path / f"thermal_zone{number}").mkdir()
        (tmp_path / f"thermal_zone{number}" / "temp").write_text(text)
    assert device.temperature_c(tmp_path) == 67.5
    assert device.temperature_c(tmp_path / "none") is None


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_memory_grows_with_what_is_held_and_the_peak_stays() -> None:
    before = resident_bytes()
    held = np.ones(2**26, np.uint8)
    during, peak = resident_bytes(), peak_bytes()
    assert before is not None and during is not None and peak is not None
    assert during - before > 0.9 * held.nbytes
    del held
    after = peak_bytes()
    assert after is not None and after > before + 0.9 * 2**26


def write_zone(root: Path, zone: str, name: str, microjoules: int) -> Path:
    folder = root / zone
    folder.mkdir(exist_ok=True)
    for file, text in {"name": name, "energy_uj": microjoules, "max_energy_range_uj": 1_000_000}.items():
        (folder / file).write_text(f"{text}\n")
    return folder


def test_rapl_counts_packages_and_survives_a_wrap(tmp_path: Path) -> None:
    zones = [write_zone(tmp_path, f"intel-rapl:{i}", f"package-{i}", 900_000) for i in range(2)]
    write_zone(tmp_path, "intel-rapl:0:0", "core", 5)
    write_zone(tmp_path, "intel-rapl-mmio:0", "package-0", 900_000)  # the same package
    meter, told = find_meter(tmp_path)
    assert isinstance(meter, Rapl) and told.source == "RAPL package-0, package-1"
    assert meter.joules() == 0
    (zones[0] / "energy_uj").write_text("950000\n")
    assert meter.joules() == pytest.approx(0.05)
    (zones[1] / "energy_uj").write_text("100000\n")  # it went past 1,000,000
    assert meter.joules() == pytest.approx(0.25)
    assert meter.joules() == pytest.approx(0.25)


def test_no_meter_says_why(tmp_path: Path) -> None:
    meter, told = find_meter(tmp_path)
    assert meter is None and told.source is None and "no package counter" in str(told.reason)
    zone = write_zone(tmp_path, "intel-rapl:0", "package-0", 1)
    (zone / "energy_uj").unlink()
    assert "cannot be read" in str(find_meter(tmp_path)[1].reason)


def test_powermetrics_lines() -> None:
    lines = ["*** Sampled system activity ***", "CPU Power: 900 mW", "Combined Power (CPU + GPU + ANE): 1250 mW", ""]
    assert list(milliwatts(lines * 2)) == [1250.0, 1250.0]


def test_limits_come_from_every_trial() -> None:
    found = measure_limits(threads=1, product=(64, 96, 32), copy_bytes=2**16, seconds=0.01)
    assert found.int8 is not None and found.fp32 is not None and found.copy is not None
    assert (found.int8.operator, found.fp32.operator) == ("MatMulIntegerToFloat", "MatMul")
    for product in (found.int8, found.fp32):
        assert product.macs_per_s == pytest.approx(1000 * 64 * 96 * 32 / min(product.trials_ms))
        assert len(product.trials_ms) >= 4
    assert found.copy.bytes_per_s == pytest.approx(1000 * 2 * 2**16 / min(found.copy.trials_ms))
    again = measure_limits(threads=1, product=(64, 96, 32), copy_bytes=2**16, seconds=0.01)
    best = best_of(found, again)
    assert best.int8 is not None and again.int8 is not None
    assert best.int8.trials_ms == found.int8.trials_ms + again.int8.trials_ms
    assert best.int8.macs_per_s == max(found.int8.macs_per_s, again.int8.macs_per_s)


def test_the_work_of_a_pass_is_what_its_products_add_up_to() -> None:
    tokens = 7
    q, kv, hidden, inner = 4 * 16, 2 * 16, 64, 96
    macs = 0
    for layer in range(3):
        for token in range(1, tokens + 1):
            macs += 2 * hidden * kv
            if layer == 2 and token < tokens:
                continue
            macs += hidden * q + q * hidden + 3 * hidden * inner
            macs += 2 * 4 * 16 * token  # scores and values of the keys up to here
    macs += hidden * 16
    found = work_of(TINY, tokens)
    assert found.macs == macs
    assert found.macs_all_tokens > found.macs
    weights = 3 * (hidden * q + 2 * hidden * kv + q * hidden + 3 * hidden * inner)
    assert found.weight_bytes == weights * 18 // 32


def test_one_token_needs_all_of_it() -> None:
    found = work_of(TINY, 1)
    assert found.macs == found.macs_all_tokens


def test_the_shape_is_read_from_the_graph(tmp_path: Path, tiny_guard: Guard) -> None:
    bundle = write_tiny_llama(tmp_path / "llama")
    assert bundle_shape(bundle) == TINY
    assert bundle_shape(tiny_guard.bundle.path) is None, "an embedding and a mean are no Llama"
    assert onnx_shape(tiny_guard.bundle.file_for("onnx")) is None


def test_the_shape_is_read_from_a_gguf(tmp_path: Path) -> None:
    pytest.importorskip("gguf")
    from edgeguard.bench.work import gguf_shape
    from edgeguard.export.gguf_transcode import bundle_to_gguf

    bundle_to_gguf(Bundle.open(write_tiny_llama(tmp_path / "llama")), tmp_path / "model.gguf")
    assert gguf_shape(tmp_path / "model.gguf") == TINY
