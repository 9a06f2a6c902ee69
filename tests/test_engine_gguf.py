"""The engine ``gguf``: the same verdicts from the same integers, whatever was judged before, or nothing at all."""

from __future__ import annotations

import dataclasses
import gc
import json
import os
import subprocess
import sys
import weakref
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from tiny import HEAD, TEMPLATE, edit_manifest, make_tokenizer, refresh_files, write_bundle

EXTRA = "pip install 'edgeguard-runtime[gguf]'"
llama_cpp = pytest.importorskip("llama_cpp", reason=f"needs llama-cpp-python: {EXTRA}")
pytest.importorskip("gguf", reason=f"needs gguf: {EXTRA}")
pytest.importorskip("onnx", reason=f"needs onnx: {EXTRA}")

import export_support  # noqa: E402
import onnxruntime  # noqa: E402
from export_support import tiny_weights, write_int4_bundle  # noqa: E402

from convert.export.gguf import write_gguf  # noqa: E402
from convert.export.onnx_graph import build_guard_graph  # noqa: E402
from edgeguard import Guard  # noqa: E402
from edgeguard.bundle import Bundle, default_bundle_path  # noqa: E402
from edgeguard.cache import CACHE_VARIABLE  # noqa: E402
from edgeguard.engines import create_engine  # noqa: E402
from edgeguard.engines.gguf import MAX_ROWS, REUSE_TOLERANCE, GgufEngine  # noqa: E402
from edgeguard.engines.gguf_body import engine_files  # noqa: E402
from edgeguard.engines.gguf_file import add_config, add_weights, finish, permuted_rows, tensor_names  # noqa: E402
from edgeguard.engines.gguf_llama import LlamaModel, has_metal  # noqa: E402
from edgeguard.engines.gguf_source import read_onnx  # noqa: E402
from edgeguard.engines.int4_weights import Int4Weight  # noqa: E402
from edgeguard.errors import BundleError, EngineError  # noqa: E402
from edgeguard.export.gguf_write import add_tokenizer  # noqa: E402

ROOT = Path(__file__).resolve().parent.parent
TOKENIZER = make_tokenizer()
MAX_TOKENS = 600
CONFIG = dataclasses.replace(export_support.CONFIG, num_layers=3, max_tokens=MAX_TOKENS)
WEIGHTS = tiny_weights(config=CONFIG)
# Activations in INT8 against float32, as far apart as onnxruntime's INT4 kernel and float32 are, of logits that spread
# by two: the mean difference seen is 0.05, the largest 0.5. A structural fault moves the mean by one and more.
MEAN_TOLERANCE, FLOAT_TOLERANCE = 0.1, 1.0


def write_gguf_bundle(folder: Path, onnx_bundle: Path, **about: str) -> Path:
    """The same bundle with a GGUF in place of the ONNX file."""
    folder.mkdir()
    manifest = json.loads((onnx_bundle / "manifest.json").read_text())
    write_gguf(
        WEIGHTS,
        CONFIG,
        HEAD,
        TOKENIZER.to_str(),
        folder / "model.gguf",
        control_ids=TEMPLATE.reserved,
        pre_tokenizer="gpt-2",
        about={"name": "tiny"},
        bundle={**manifest, **about},
    )
    (folder / "tokenizer.json").write_bytes((onnx_bundle / "tokenizer.json").read_bytes())
    manifest["files"] = {"model.gguf": {"engine": "gguf"}, "tokenizer.json": {"engine": None}}
    (folder / "manifest.json").write_text(json.dumps(manifest))
    refresh_files(folder)
    return folder


@pytest.fixture(scope="module", autouse=True)
def cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A cache folder of this module's own."""
    with pytest.MonkeyPatch.context() as patch:
        folder = tmp_path_factory.mktemp("cache")
        patch.setenv(CACHE_VARIABLE, str(folder))
        yield folder


@pytest.fixture(scope="module")
def onnx_bundle(tmp_path_factory: pytest.TempPathFactory, cache: Path) -> Path:
    return write_int4_bundle(tmp_path_factory.mktemp("bundles") / "onnx", config=CONFIG)


@pytest.fixture(scope="module")
def gguf_bundle(onnx_bundle: Path) -> Path:
    return write_gguf_bundle(onnx_bundle.parent / "gguf", onnx_bundle)


@pytest.fixture
def engine(onnx_bundle: Path) -> GgufEngine:
    return load(onnx_bundle)


def load(folder: Path) -> GgufEngine:
    engine = create_engine("gguf", Bundle.open(folder), 1)
    assert isinstance(engine, GgufEngine)
    return engine


def random_rows(lengths: list[int], seed: int = 1) -> list[list[int]]:
    rng = np.random.default_rng(seed)
    return [rng.integers(0, CONFIG.vocab_size, length).tolist() for length in lengths]


def batch(rows: list[list[int]]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    longest = max(map(len, rows))
    ids = np.array([row + [TEMPLATE.pad_id] * (longest - len(row)) for row in rows], dtype=np.int64)
    mask = np.array([[1] * len(row) + [0] * (longest - len(row)) for row in rows], dtype=np.int64)
    return ids, mask


def logits(engine: GgufEngine, rows: list[list[int]]) -> NDArray[np.float32]:
    return engine.logits(*batch(rows))


@pytest.fixture(scope="module")
def reference() -> onnxruntime.InferenceSession:
    """The same weights in float32, without INT8 activations."""
    graph = build_guard_graph(WEIGHTS, CONFIG, int4=False)
    return onnxruntime.InferenceSession(graph.SerializeToString(), providers=["CPUExecutionProvider"])


def expected_logits(reference: onnxruntime.InferenceSession, row: list[int]) -> NDArray[np.float32]:
    ids, mask = batch([row])
    found: NDArray[np.float32] = reference.run(["logits"], {"input_ids": ids, "attention_mask": mask})[0][0]
    return found


@pytest.mark.parametrize("kind", ["onnx", "gguf"])
def test_it_computes_what_float32_does(
    kind: str, reference: onnxruntime.InferenceSession, request: pytest.FixtureRequest
) -> None:
    engine = load(request.getfixturevalue(f"{kind}_bundle"))
    rows = random_rows([1, 2, 7, 33, 200, MAX_TOKENS])
    wanted = np.stack([expected_logits(reference, row) for row in rows])
    found = np.stack([logits(engine, [row])[0] for row in rows])
    assert found.dtype == np.float32 and wanted.std() > 1
    np.testing.assert_allclose(found, wanted, atol=FLOAT_TOLERANCE)
    assert np.abs(found - wanted).mean() < MEAN_TOLERANCE


@pytest.mark.parametrize("kind", ["onnx", "gguf"])
def test_its_files_hold_the_bundles_integers(kind: str, request: pytest.FixtureRequest) -> None:
    from gguf import GGUFReader

    files = engine_files(Bundle.open(request.getfixturevalue(f"{kind}_bundle")))
    tensors = {tensor.name: np.array(tensor.data) for tensor in GGUFReader(files.body).tensors}
    names = tensor_names(CONFIG.num_layers)
    assert tensors.keys() == set(names.values())
    for name, gguf_name in names.items():
        weight = WEIGHTS["head.weight" if name == "model.embed_tokens.weight" else name]
        if isinstance(weight, Int4Weight):
            heads = {"q_proj": CONFIG.num_heads, "k_proj": CONFIG.num_kv_heads}.get(name.split(".")[-2])
            kept = Int4Weight.unpack_q4_0(tensors[gguf_name])
            assert np.array_equal(kept.nibbles, permuted_rows(weight.nibbles, heads)), name
            assert kept.scales.tobytes() == permuted_rows(weight.scales, heads).tobytes(), name
        else:
            assert np.array_equal(tensors[gguf_name], weight), name
    embedding = WEIGHTS["model.embed_tokens.weight"]
    assert isinstance(embedding, Int4Weight) and np.array_equal(np.load(files.embedding), embedding.pack_q4_0())


@pytest.mark.parametrize("kind", ["onnx", "gguf"])
def test_a_guard_runs_on_it(kind: str, request: pytest.FixtureRequest) -> None:
    guard = Guard.load(request.getfixturevalue(f"{kind}_bundle"), engine="gguf", threads=1)
    assert guard.classify("Tell me a story.").engine == "gguf"
    about = guard.info()["engine"]
    providers = ["llama.cpp Metal", "llama.cpp CPU"] if has_metal() else ["llama.cpp CPU"]
    assert about == {
        "name": "gguf",
        "version": llama_cpp.__version__,
        "providers_asked": providers,
        "providers": providers,
        "threads": 1,
        "choice": None,
    }
    kept = Guard.load(request.getfixturevalue(f"{kind}_bundle"), threads=1).info()["engine"]["name"]
    assert kept == kind  # "auto" takes what the bundle has a file for


def test_rows_of_a_batch_are_as_alone(engine: GgufEngine, onnx_bundle: Path) -> None:
    """More rows than one decode takes, and more tokens."""
    rows = random_rows([5, 90, 1, 400, 13, 300, *[20 + n for n in range(MAX_ROWS)], 2])
    together = logits(engine, rows)
    alone = np.stack([logits(load(onnx_bundle), [row])[0] for row in rows[::4]])
    np.testing.assert_allclose(together[::4], alone, atol=REUSE_TOLERANCE)
    assert together.shape == (len(rows), len(HEAD)) and together.std() > 1


def test_no_rows_have_no_logits(engine: GgufEngine) -> None:
    assert engine.logits(np.zeros((0, 5), np.int64), np.zeros((0, 5), np.int64)).shape == (0, len(HEAD))


@pytest.fixture
def decoded(engine: GgufEngine, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many tokens each call of llama.cpp computed."""
    counts: list[int] = []
    decode = engine._context.decode

    def count(*arrays: Any) -> None:
        counts.append(len(arrays[0]))
        decode(*arrays)

    monkeypatch.setattr(engine._context, "decode", count)
    return counts


def test_a_new_turn_costs_its_own_tokens(engine: GgufEngine, onnx_bundle: Path, decoded: list[int]) -> None:
    (conversation,) = random_rows([400])
    for length in (100, 200, 203, 400):
        row = conversation[:length] + [7, 8]  # what every prompt ends with
        fresh = logits(load(onnx_bundle), [row])
        np.testing.assert_allclose(logits(engine, [row]), fresh, atol=REUSE_TOLERANCE)
    assert decoded == [104, 104, 8, 200]  # fillers make the fours whole


def test_rows_share_what_any_row_before_began_with(engine: GgufEngine, onnx_bundle: Path, decoded: list[int]) -> None:
    first, second, end = random_rows([64, 80, 10])
    logits(engine, [first, second])
    rows = [second[:40] + end, first + end, end, second + end, second[:40] + end[::-1]]
    found = logits(engine, rows)
    assert decoded == [144, 5 * 10 + 2]
    wanted = np.stack([logits(load(onnx_bundle), [row])[0] for row in rows])
    np.testing.assert_allclose(found, wanted, atol=REUSE_TOLERANCE)
    again = logits(engine, rows)  # the last token of a row is always computed
    assert decoded[2] < sum(map(len, rows)) / 2
    np.testing.assert_allclose(again, wanted, atol=REUSE_TOLERANCE)


def test_many_calls_in_a_row_never_fill_the_cache(engine: GgufEngine) -> None:
    rng = np.random.default_rng(5)
    for _ in range(60):
        lengths = rng.integers(1, 150, rng.integers(1, 6)).tolist()
        assert logits(engine, random_rows(lengths, seed=int(rng.integers(3)))).shape == (len(lengths), len(HEAD))


def test_threads_may_share_it(engine: GgufEngine) -> None:
    calls = [random_rows([10 + 7 * n, 30], seed=n) for n in range(12)]
    wanted = [logits(engine, rows) for rows in calls]
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda rows: logits(engine, rows), calls * 3))
    for one, other in zip(found, wanted * 3, strict=True):
        np.testing.assert_allclose(one, other, atol=REUSE_TOLERANCE)


def test_its_memory_is_given_back(onnx_bundle: Path) -> None:
    engine = load(onnx_bundle)
    freed: list[weakref.finalize[..., Any]] = [engine._context.close, engine._model.close]
    assert [close.alive for close in freed] == [True, True]
    del engine
    gc.collect()
    assert [close.alive for close in freed] == [False, False]


def test_an_old_llama_cpp_python_is_named(onnx_bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(llama_cpp, "LLAMA_FLASH_ATTN_TYPE_DISABLED")
    for name in ("edgeguard.engines.gguf", "edgeguard.engines.gguf_llama"):
        monkeypatch.delitem(sys.modules, name)
    with pytest.raises(EngineError, match=r"llama-cpp-python .* is too old.* Install it with pip install"):
        create_engine("gguf", Bundle.open(onnx_bundle))


BAD_BATCHES = {
    "padded on the left": ([[0, 5, 6]], [[0, 1, 1]]),
    "a hole": ([[5, 0, 6]], [[1, 0, 1]]),
    "no token": ([[5, 6], [0, 0]], [[1, 1], [0, 0]]),
    "another shape": ([[5, 6]], [[1]]),
    "one dimension": ([5, 6], [1, 1]),
    "a mask of twos": ([[5, 6]], [[2, 0]]),
    "too long": ([[5] * (MAX_TOKENS + 1)], [[1] * (MAX_TOKENS + 1)]),
    "an unknown id": ([[5, CONFIG.vocab_size]], [[1, 1]]),
    "an id below 0": ([[5, -1]], [[1, 1]]),
}


@pytest.mark.parametrize(("ids", "mask"), BAD_BATCHES.values(), ids=BAD_BATCHES.keys())
def test_what_is_no_batch_is_refused(engine: GgufEngine, ids: Any, mask: Any) -> None:
    with pytest.raises(EngineError, match="expected"):
        engine.logits(np.array(ids, np.int64), np.array(mask, np.int64))


def test_a_logit_that_is_not_finite_is_refused(tmp_path: Path) -> None:
    broken = {**WEIGHTS, "model.norm.weight": np.full(CONFIG.hidden_size, np.nan, np.float32)}
    folder = write_int4_bundle(tmp_path / "nan", config=CONFIG)
    (folder / "model.onnx").write_bytes(build_guard_graph(broken, CONFIG, labels=HEAD).SerializeToString())
    refresh_files(folder)
    with pytest.raises(EngineError, match="returned a logit that is not finite"):
        logits(load(folder), [[5, 6, 7]])


def test_after_a_failed_decode_nothing_is_reused(engine: GgufEngine, onnx_bundle: Path) -> None:
    rows = random_rows([40, 30])
    wanted = logits(engine, rows)
    positions = np.zeros(2, np.int32)
    with pytest.raises(EngineError, match=r"could not compute 2 tokens \(code -1\): .*"):
        engine._context.decode(np.array([5, 10**6], np.int32), positions, positions, np.ones(2, np.int8))
    decode = engine._context.decode

    def with_a_gap(ids: Any, positions: Any, sequences: Any, outputs: Any) -> None:  # which llama.cpp refuses
        decode(ids, positions + np.arange(len(positions), dtype=np.int32), sequences, outputs)

    with pytest.raises(EngineError, match="code -1"), pytest.MonkeyPatch.context() as patch:
        patch.setattr(engine._context, "decode", with_a_gap)
        engine._decode([np.array([3, 4])])
    assert engine._kept == []
    np.testing.assert_allclose(logits(engine, rows), wanted, atol=REUSE_TOLERANCE)


def _other_head(manifest: dict[str, Any]) -> None:
    manifest["head"] = [*HEAD[:2], *HEAD[3:], HEAD[2]]


def _shorter_head(manifest: dict[str, Any]) -> None:
    manifest["head"] = HEAD[:-1]


def _longer_rows(manifest: dict[str, Any]) -> None:
    manifest["max_tokens"] = MAX_TOKENS + 1


@pytest.mark.parametrize("kind", ["onnx", "gguf"])
@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (_other_head, "expected a head with the labels"),
        (_shorter_head, "expected a head with the labels .*, found 16 rows"),
        (_longer_rows, "expected a model for 601 tokens, found 600"),
    ],
)
def test_a_model_that_is_not_the_manifests(
    kind: str, edit: Any, message: str, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    source = request.getfixturevalue(f"{kind}_bundle")
    manifest = json.loads((source / "manifest.json").read_text())
    edit(manifest)
    bundle = dataclasses.replace(Bundle.open(source), manifest=type(Bundle.open(source).manifest).from_dict(manifest))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(CACHE_VARIABLE, str(tmp_path))  # nothing is there yet
        with pytest.raises(EngineError, match=message):
            create_engine("gguf", bundle, 1)
    engine_files(Bundle.open(source))
    with pytest.raises(EngineError, match="expected .* found"):  # nor will it do with what the cache has
        create_engine("gguf", bundle, 1)


def test_the_gguf_of_another_bundle_is_refused(onnx_bundle: Path, tmp_path: Path) -> None:
    folder = write_gguf_bundle(tmp_path / "other", onnx_bundle, version="9.9")
    with pytest.raises(EngineError, match="expected the model of tiny@0.0.1, found that of tiny@9.9"):
        load(folder)


def test_a_gguf_that_says_nothing_sensible_of_its_bundle(onnx_bundle: Path, tmp_path: Path) -> None:
    folder = write_gguf_bundle(tmp_path / "other", onnx_bundle)
    raw = (folder / "model.gguf").read_bytes()
    assert raw.count(b'{"format"') == 1
    (folder / "model.gguf").write_bytes(raw.replace(b'{"format"', b'["format"'))
    refresh_files(folder)
    with pytest.raises(BundleError, match=r"model.gguf: edgeguard.bundle: expected one JSON object"):
        load(folder)


def test_the_cached_file_of_another_bundle_is_refused(onnx_bundle: Path, tmp_path: Path) -> None:
    """Even when it stands under the right name, with the right sum."""
    other = write_int4_bundle(tmp_path / "other", seed=9, config=CONFIG)
    bundle = Bundle.open(other)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(CACHE_VARIABLE, str(tmp_path / "cache"))
        wrong, right = engine_files(Bundle.open(onnx_bundle)), engine_files(bundle)
        for suffix in ("", ".sha256"):
            source = wrong.body.with_name(wrong.body.name + suffix)
            right.body.with_name(right.body.name + suffix).write_bytes(source.read_bytes())
        with pytest.raises(EngineError, match=r"expected the model of tiny@0.0.1, found another\. Delete the file"):
            create_engine("gguf", bundle, 1)


def test_a_file_that_is_not_what_the_manifest_says_leaves_no_mark(onnx_bundle: Path, tmp_path: Path) -> None:
    bundle = Bundle.open(onnx_bundle)
    (tmp_path / "model.onnx").write_bytes((onnx_bundle / "model.onnx").read_bytes() + b"x")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(CACHE_VARIABLE, str(tmp_path / "cache"))
        with pytest.raises(EngineError, match=r"model.onnx: expected sha256 .*, found .*\. Download the bundle again"):
            create_engine("gguf", Bundle(tmp_path, bundle.manifest), 1)
    assert not list((tmp_path / "cache").iterdir())


def test_other_models_are_refused(tiny_bundle: Path, onnx_bundle: Path, tmp_path: Path) -> None:
    with pytest.raises(EngineError, match="no guard of edgeguard in INT4, it lacks 'embedding.int4'"):
        load(tiny_bundle)
    folder = write_gguf_bundle(tmp_path / "bundle", onnx_bundle)
    (folder / "model.gguf").write_bytes(b"GGUF" + bytes(100))
    refresh_files(folder)
    with pytest.raises(EngineError, match=r"model.gguf: (not a GGUF file|no guard of edgeguard)"):
        load(folder)
    with pytest.raises(EngineError, match=r"llama.cpp of llama-cpp-python .* cannot load it"):
        LlamaModel(folder / "model.gguf")
    files = {"tokenizer.json": Bundle.open(onnx_bundle).manifest.files["tokenizer.json"]}
    bare = dataclasses.replace(Bundle.open(onnx_bundle).manifest, files=files)
    with pytest.raises(BundleError, match="expected one file for the engine 'onnx', found none"):
        create_engine("gguf", Bundle(onnx_bundle, bare), 1)


@pytest.mark.parametrize("suffix", ["gguf", "npy"])
def test_a_damaged_cached_file_is_made_again(suffix: str, onnx_bundle: Path, engine: GgufEngine, cache: Path) -> None:
    wanted = logits(engine, [[5, 6, 7]])
    (file,) = [f for f in engine_files(Bundle.open(onnx_bundle)).__dict__.values() if str(f).endswith(suffix)]
    whole = file.read_bytes()
    file.unlink()  # the engine of this test still reads the file that was
    file.write_bytes(whole[:-7] + b"damaged")
    assert np.array_equal(logits(load(onnx_bundle), [[5, 6, 7]]), wanted)
    assert file.read_bytes() == whole


def test_two_processes_make_its_files_at_once(onnx_bundle: Path, engine: GgufEngine, tmp_path: Path) -> None:
    code = """
import sys
import numpy as np
from edgeguard import Guard
engine = Guard.load(sys.argv[1], engine="gguf", threads=1)._engine
print(engine.logits(np.array([[5, 6, 7]]), np.ones((1, 3), np.int64)).tolist())
"""
    environment = {**os.environ, CACHE_VARIABLE: str(tmp_path)}
    command = [sys.executable, "-c", code, str(onnx_bundle)]
    started = [subprocess.Popen(command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, text=True) for _ in "ab"]
    answers = [json.loads(process.communicate(timeout=120)[0]) for process in started]
    assert answers == [logits(engine, [[5, 6, 7]]).tolist()] * 2
    assert {path.suffix for path in tmp_path.iterdir()} == {".gguf", ".npy", ".sha256"}
    assert len(list(tmp_path.iterdir())) == 4


# Judges whose head is their vocabulary


JUDGE_TOKENS = {"safe": 290, "unsafe": 117}
JUDGE = dataclasses.replace(CONFIG, head_size=CONFIG.vocab_size)
JUDGE_WEIGHTS = {
    name: weight.dequantize() if isinstance(weight, Int4Weight) else weight
    for name, weight in tiny_weights(config=JUDGE).items()
}


@pytest.fixture(scope="module")
def judge(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bundle with a plain Llama in float32 that writes its verdict as a word: its head is two of its tokens."""
    from gguf import GGUFWriter

    folder = write_bundle(tmp_path_factory.mktemp("judge") / "bundle")
    (folder / "model.onnx").unlink()
    writer = GGUFWriter(folder / "model.gguf", "llama")
    add_config(writer, JUDGE)
    add_tokenizer(writer, TOKENIZER.to_str(), TEMPLATE.reserved, "gpt-2", JUDGE.vocab_size)
    add_weights(writer, JUDGE_WEIGHTS, JUDGE)
    writer.add_tensor("output.weight", JUDGE_WEIGHTS["head.weight"])
    finish(writer)

    def edit(manifest: dict[str, Any]) -> None:
        manifest.update(head=HEAD[:2], head_tokens=JUDGE_TOKENS, max_tokens=MAX_TOKENS, quantization=None)
        manifest["files"] = {"model.gguf": {"engine": "gguf"}, "tokenizer.json": {"engine": None}}

    edit_manifest(folder, edit)
    refresh_files(folder)
    return folder


@pytest.fixture(scope="module")
def judged() -> Callable[[list[int]], NDArray[np.float32]]:
    """Logits of the two tokens after a row, as onnxruntime computes them in float32."""
    silent = {**JUDGE_WEIGHTS, "head.bias": np.zeros(JUDGE.vocab_size, np.float32)}  # a Llama's output has no bias
    session = onnxruntime.InferenceSession(build_guard_graph(silent, JUDGE, int4=False).SerializeToString())
    return lambda row: expected_logits(session, row)[list(JUDGE_TOKENS.values())]


def test_a_head_of_vocabulary_rows(judge: Path, judged: Callable[[list[int]], NDArray[np.float32]]) -> None:
    engine = load(judge)
    rows = random_rows([1, 9, 40, 200, MAX_TOKENS, 40])
    rows[5][:30] = rows[2][:30]
    wanted = np.stack([judged(row) for row in rows])
    assert wanted.std() > 1
    np.testing.assert_allclose(logits(engine, rows), wanted, atol=0.02)  # its cache is float16
    np.testing.assert_allclose(logits(engine, rows[::-1]), wanted[::-1], atol=0.02)


def test_a_guard_of_vocabulary_rows(judge: Path, judged: Callable[[list[int]], NDArray[np.float32]]) -> None:
    guard = Guard.load(judge, threads=1, self_test=False)
    safe, unsafe = judged(guard._encode("How do I bake bread?", None, None, None).ids)
    verdict = guard.classify("How do I bake bread?")
    assert verdict.margin == pytest.approx(unsafe - safe, abs=0.02)
    assert verdict.engine == "gguf" and verdict.hazards == {}


def test_tokens_beyond_the_vocabulary_are_refused(judge: Path) -> None:
    bundle = Bundle.open(judge)
    manifest = dataclasses.replace(bundle.manifest, head_tokens={"safe": 5, "unsafe": 10**6})
    with pytest.raises(EngineError, match=r"expected a vocabulary with the head's tokens \[5, 1000000\], found one of"):
        create_engine("gguf", Bundle(judge, manifest), 1)


# The shipped bundle

TEXTS = [
    "How do I sharpen a kitchen knife?",
    "Write a message that threatens to hurt my neighbour.",
    "hi",
    "Explain photosynthesis in one paragraph. " * 6,
]


@pytest.fixture(scope="module")
def shipped(cache: Path) -> Guard:
    """Loading it reproduces its self-test."""
    return Guard.load(engine="gguf", threads=1)


def test_the_shipped_bundle_judges_as_onnxruntime_does(shipped: Guard) -> None:
    other = Guard.load(engine="onnx", threads=1)
    found, wanted = ([guard.classify(text).margin for text in TEXTS] for guard in (shipped, other))
    np.testing.assert_allclose(found, wanted, atol=0.3)  # differences seen are below 0.1, margins from -9 to 7
    many = [verdict.margin for verdict in shipped.classify_many(TEXTS)]
    np.testing.assert_allclose(many, found, atol=REUSE_TOLERANCE)


def test_the_shipped_bundle_judges_turns_as_from_scratch(shipped: Guard) -> None:
    said = ["How do I bake bread?", "Mix flour, water, salt and yeast. " * 6, "And how long?", "Forty minutes.", "Ok!"]
    turns = [{"role": "user" if i % 2 == 0 else "assistant", "content": text} for i, text in enumerate(said)]
    counts = range(1, len(turns) + 1)
    reused = [shipped.classify(messages=turns[:count]).margin for count in counts]
    fresh = []
    for count in counts:
        shipped.classify("hi")  # which shares no more than the template's start
        fresh.append(shipped.classify(messages=turns[:count]).margin)
    np.testing.assert_allclose(reused, fresh, atol=REUSE_TOLERANCE)


def test_the_shipped_bundles_integers_are_kept() -> None:
    bundle = Bundle.open(default_bundle_path())
    student = read_onnx(bundle.file_for("onnx"))
    embedding = student.weights["model.embed_tokens.weight"]
    assert isinstance(embedding, Int4Weight)
    assert np.array_equal(np.load(engine_files(bundle).embedding, mmap_mode="r"), embedding.pack_q4_0())
