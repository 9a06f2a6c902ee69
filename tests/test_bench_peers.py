"""Peers compute the same as the engines, on an untrained Llama; what cannot run is listed with the reason."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("onnx", reason="onnx is not installed: pip install 'edgeguard-runtime[convert]'")

from bench_support import QUICK, bench, bench_record, shrink_limits, write_tiny_llama  # noqa: E402
from cli_support import run  # noqa: E402

from edgeguard import Guard  # noqa: E402
from edgeguard.bench import peer_files, peers  # noqa: E402
from edgeguard.bench.peer_files import FILES, prepare, size_of  # noqa: E402
from edgeguard.bench.peers import PEERS, PeerRunner, missing_package  # noqa: E402
from edgeguard.bench.process import Worker  # noqa: E402
from edgeguard.bench.records import BenchError, Result, load_record  # noqa: E402
from edgeguard.bench.runners import Sample  # noqa: E402
from edgeguard.bench.shapes import SHAPES, UNTRAINED, shape_folder_name, write_shape  # noqa: E402
from edgeguard.bench.texts import TextMaker  # noqa: E402
from edgeguard.bundle import Bundle  # noqa: E402
from edgeguard.engines import ENGINES  # noqa: E402

# Other roundings of activations than the INT4 graph's: blocks of 32 in INT8 there, float32 or bfloat16 here.
TOLERANCES = {"onnxruntime-int4": 1e-3, "transformers-fp32": 0.05, "transformers-bf16": 0.2, "optimum-ort": 0.05}
UNSIGNED = "model.int8.unsigned.onnx"
SHAPE_FILES = ("manifest.json", "model.int8.json", "model.int8.onnx", UNSIGNED, "model.onnx", "tokenizer.json")


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_llama(tmp_path_factory.mktemp("peers") / "llama")


@pytest.fixture(scope="module")
def samples(llama: Path) -> list[Sample]:
    bundle = Bundle.open(llama)
    maker = TextMaker(bundle.manifest, bundle.load_tokenizer(), seed=0)
    return [maker.sample(40, str(number)) for number in range(4)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where files for peers are written."""
    return tmp_path_factory.mktemp("files")


@pytest.fixture(autouse=True)
def own_cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("EDGEGUARD_CACHE", str(tmp_path / "cache"))


def runner(name: str, llama: Path, folder: Path) -> PeerRunner:
    peer = PEERS[name]
    if reason := missing_package(peer):
        pytest.skip(f"{name}: {reason}")
    if name == "onnxruntime-genai":
        pytest.importorskip("onnx_ir", reason="the builder of onnxruntime-genai needs onnx_ir")
    prepare(peer.files, llama, folder, threads=1)
    return PeerRunner(peer, llama, folder, threads=1, longest=64)


@pytest.mark.filterwarnings("ignore")  # tracing warns of every branch it takes
@pytest.mark.parametrize("name", TOLERANCES)
def test_a_peer_with_our_head_gives_our_margins(name: str, llama: Path, folder: Path, samples: list[Sample]) -> None:
    peer = runner(name, llama, folder)
    guard = Guard.load(llama, engine="onnx", threads=1)
    expected = [guard.classify(sample.messages[0][1]).margin for sample in samples]
    found = [peer.call([sample]).margin for sample in samples]
    assert found == pytest.approx(expected, abs=TOLERANCES[name])
    assert np.ptp(expected) > 0.4, "texts differ by more than that"
    reading = peer.call(samples)
    assert reading.margin == pytest.approx(expected[0], abs=TOLERANCES[name]), "a batch of four"
    assert reading.latency_ms > 0 and reading.engine_ms is None
    assert peer.facts.settings and peer.facts.version and peer.facts.providers_used


@pytest.mark.parametrize("name", ["llama-cpp-python", "onnxruntime-genai"])
def test_a_peer_without_our_head_gives_the_vocabulary(
    name: str, llama: Path, folder: Path, samples: list[Sample]
) -> None:
    peer = runner(name, llama, folder)
    transformers = pytest.importorskip("transformers")
    torch = pytest.importorskip("torch")
    prepare("transformers", llama, folder, threads=1)
    model = transformers.AutoModelForSequenceClassification.from_pretrained(folder / "transformers").eval().model
    for sample in samples:
        with torch.inference_mode():
            hidden = model(torch.tensor([sample.ids])).last_hidden_state[0, -1]
            expected = (model.embed_tokens.weight @ hidden).numpy()
        (found,) = peer._model.logits(np.array([sample.ids]))
        assert found.shape == expected.shape
        assert np.corrcoef(found, expected)[0, 1] > 0.999
    assert peer.call(samples).margin is None


def test_files_are_made_once(llama: Path, folder: Path) -> None:
    pytest.importorskip("gguf")
    prepare("gguf", llama, folder, threads=1)
    made = FILES["gguf"].place(llama, folder)
    before = made.stat().st_mtime_ns
    prepare("gguf", llama, folder, threads=1)
    assert made.stat().st_mtime_ns == before
    assert size_of("gguf", llama, folder) == made.stat().st_size


def test_factors_of_a_scaled_rope_are_kept(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    torch = pytest.importorskip("torch")
    from test_onnx_graph import BASE, changed

    factors = tuple(1.0 + i for i in range(BASE.head_dim // 2))
    config = changed(rope_factors=factors)  # type: ignore[arg-type]
    described = peer_files.transformers_config(config, ("safe", "unsafe"), 0)
    plain = peer_files.transformers_config(BASE, ("safe", "unsafe"), 0)
    scaled, unscaled = (
        transformers.models.llama.modeling_llama.LlamaRotaryEmbedding(transformers.LlamaConfig(**fields))
        for fields in (described, plain)
    )
    positions, x = torch.arange(8)[None], torch.zeros(1)
    scaled(x, positions)
    assert torch.allclose(scaled.inv_freq * torch.tensor(factors), unscaled.inv_freq)
    assert scaled.attention_scaling == 1.0


def test_what_is_not_installed_is_listed_with_the_reason(
    llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = ("onnxruntime-int4",)
    gone = {name: replace(peer, modules=("no_such_library",)) for name, peer in PEERS.items() if name not in real}
    monkeypatch.setattr(peers, "PEERS", {**PEERS, **gone})
    record = bench_record(tmp_path / "r.json", "--bundle", llama, "--tokens", "32", "--engine", "onnx", "--peers")
    assert [(result.name, result.kind) for result in record.results] == [("onnx", "engine"), (*real, "peer")]
    assert {absent.name for absent in record.absent} == set(PEERS) - set(real)
    assert {absent.reason for absent in record.absent if absent.name == "transformers-fp32"} == {
        "not installed: pip install transformers"
    }
    result = bench("--bundle", llama, "--tokens", "32", "--engine", "onnx", "--peer", "optimum-ort")
    assert (result.exit_code, result.stdout) == (1, "")
    assert "optimum-ort: not installed: pip install optimum-onnx" in result.stderr


def test_a_bundle_that_a_peer_cannot_read_is_no_fault_of_the_run(tiny_bundle: Path, tmp_path: Path) -> None:
    if missing_package(PEERS["llama-cpp-python"]):
        pytest.skip("llama-cpp-python is not installed")
    with Worker("llama-cpp-python", 1) as worker, pytest.raises(BenchError, match="it lacks 'embedding.int4'|lacks"):
        arguments = {"bundle": str(tiny_bundle), "folder": str(tmp_path), "threads": 1}
        worker.ask("write files for a peer", files="gguf", **arguments)


def test_missing_packages_are_said(llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "gguf", None)
    with pytest.raises(BenchError, match=r"gguf.*edgeguard-runtime\[convert\]"):
        prepare("gguf", llama, tmp_path, threads=1)
    monkeypatch.setitem(sys.modules, "convert.export.shape_sizes", None)
    with pytest.raises(BenchError, match=r"the shape tiny is written by the conversion layer: .* a checkout"):
        write_shape("tiny", SHAPES["tiny"], tmp_path, seed=0)
    assert not list(tmp_path.iterdir())


def test_a_shape_is_measured_beside_a_peer_and_labelled_untrained(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("matplotlib")
    shrink_limits(monkeypatch)
    quick = [part for part in QUICK if part != "--no-limits"]
    files = ("--json", tmp_path / "r.json", "--markdown", tmp_path / "r.md", "--plot", tmp_path / "r.png")
    command = ("--shape", "tiny", "--engine", "onnx", "--peer", "onnxruntime-int4", "--tokens", "32,64")
    result = run("bench", *quick, *command, *files)
    assert result.exit_code == 0, result.stderr
    assert result.stdout.startswith("UNTRAINED: ") and "Latency of a call (untrained: random weights)" in result.stdout
    record = load_record(tmp_path / "r.json")
    assert record.bundle.untrained and record.bundle.base_model == UNTRAINED
    assert record.bundle.label == "tiny-untrained@0"
    assert record.shape is not None and record.shape.layers == SHAPES["tiny"].num_layers
    assert [work.tokens for work in record.work] == [32, 64]
    assert (tmp_path / "r.md").read_text().startswith("# tiny-untrained@0 (untrained: random weights)")
    engine, peer = record.results
    for ours, theirs in zip(engine.lengths, peer.lengths, strict=True):
        pairs = zip(ours.trials, theirs.trials, strict=True)
        assert all(a.margin == pytest.approx(b.margin, abs=1e-3) for a, b in pairs), "the same texts"
        assert ours.share is not None and ours.share.int8_peak > 0
    assert [(ratio.name, ratio.against, ratio.tokens) for ratio in record.ratios] == [
        ("onnx", "onnxruntime-int4", 32),
        ("onnx", "onnxruntime-int4", 64),
    ]
    assert all(ratio.low <= ratio.ratio <= ratio.high for ratio in record.ratios)
    cached = tmp_path / "cache" / shape_folder_name("tiny", 0)
    assert sorted(file.name for file in cached.iterdir()) == sorted(SHAPE_FILES)
    assert [path.name for path in cached.parent.iterdir()] == [cached.name], "nothing else is left"


def test_a_shape_runs_on_every_engine(tmp_path: Path) -> None:
    names = [name for name in ENGINES if name != "gguf" or not missing_package(PEERS["llama-cpp-python"])]
    record = bench_record(tmp_path / "r.json", "--shape", "tiny", "--tokens", "32", "--turn", "40")
    assert [(result.name, result.used) for result in record.results] == [(name, name) for name in names]
    sizes = {file.name: file.stat().st_size for file in (tmp_path / "cache").glob("shape-tiny-*/*")}
    shared = sizes["tokenizer.json"] + sizes["model.int8.json"] + sizes[UNSIGNED]
    files = {"onnx": ["model.onnx"], "onnx-int8": ["model.onnx", "model.int8.onnx"], "gguf": ["model.onnx"]}
    reference = margins(record.results[0])
    assert np.ptp(reference) > 0.4
    for result in record.results:
        assert result.file_bytes == shared + sum(sizes[name] for name in files[result.name])
        assert margins(result) == pytest.approx(reference, abs=0.3), result.name
        assert result.turn is not None and len(result.turn.turn_ms) == record.plan.trials


def margins(result: Result) -> list[float]:
    return [trial.margin for length in result.lengths for trial in length.trials if trial.margin is not None]


def test_the_same_shape_is_the_same_bundle(llama: Path, tmp_path: Path) -> None:
    again = write_tiny_llama(tmp_path / "again")
    for name in SHAPE_FILES:
        assert (again / name).read_bytes() == (llama / name).read_bytes()


def test_a_shape_that_cannot_be_written_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "cache").write_text("a file where the cache should be")
    result = bench("--shape", "tiny")
    assert (result.exit_code, result.stdout) == (1, "")
    assert "expected a folder that can be written" in result.stderr and "EDGEGUARD_CACHE" in result.stderr


@pytest.mark.slow
def test_the_1b_shape_is_written_in_less_than_4_gb(tmp_path: Path) -> None:
    with Worker("shape", 1) as worker:
        worker.ask("write a shape", name="llama-guard-3-1b-int4", folder=str(tmp_path), seed=0)
        peak = worker.ask("tell its memory")["peak"]
    if peak is not None:
        assert peak < 4e9
    assert 4.7e8 < Bundle.open(tmp_path).size_bytes < 5e8
