"""The INT8 engine in a bundle, its file in the cache, the choice between engines, and reading on in a conversation."""

from __future__ import annotations

import errno
import json
import multiprocessing
import shutil
from pathlib import Path

import pytest

pytest.importorskip("torch", reason="torch is not installed: pip install 'edgeguard-runtime[convert]'")
pytest.importorskip("transformers", reason="transformers is not installed")

from tiny import edit_manifest, refresh_files  # noqa: E402
from tiny_llama import write_llama_bundle  # noqa: E402

from edgeguard import Guard  # noqa: E402
from edgeguard.bundle import Bundle  # noqa: E402
from edgeguard.cache import CACHE_VARIABLE  # noqa: E402
from edgeguard.engines import Engine, choose, create_engine, int8  # noqa: E402
from edgeguard.engines.byte_products import byte_products_are_exact  # noqa: E402
from edgeguard.errors import BundleError, EngineError, InputError  # noqa: E402

TEXTS = ["How do I make the thing?", "the cat and the hat", "once upon a time there was a hat", "No."]


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_llama_bundle(tmp_path_factory.mktemp("llama") / "tiny")


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv(CACHE_VARIABLE, str(tmp_path / "cache"))
    return tmp_path / "cache"


def test_both_paths_give_near_margins(bundle: Path, cache: Path) -> None:
    int4, int8 = (Guard.load(bundle, engine=name, threads=1) for name in ("onnx", "onnx-int8"))
    assert int8.classify(TEXTS[0]).engine == "onnx-int8"
    pairs = list(zip(int4.classify_many(TEXTS), int8.classify_many(TEXTS), strict=True))
    assert 0 < max(abs(a.margin - b.margin) for a, b in pairs) < 0.5
    assert int8.classify(TEXTS[2]).margin == pytest.approx(pairs[2][1].margin, abs=1e-3)


def test_the_weights_are_made_once(bundle: Path, cache: Path) -> None:
    Guard.load(bundle, engine="onnx-int8", threads=1)
    (weights,) = cache.rglob("*.bin")
    stamp = weights.stat().st_mtime_ns
    Guard.load(bundle, engine="onnx-int8", threads=1)
    assert [path.stat().st_mtime_ns for path in cache.rglob("*.bin")] == [stamp]


def test_another_bundle_has_weights_of_its_own(bundle: Path, cache: Path, tmp_path: Path) -> None:
    Guard.load(bundle, engine="onnx-int8", threads=1)
    other = write_llama_bundle(tmp_path / "other", seed=1)
    assert Guard.load(other, engine="onnx-int8", threads=1).self_test() < 0.5
    assert len(list(cache.rglob("*.bin"))) == 2


def test_a_bundle_that_takes_the_name_of_anothers_weights_changes_nothing_there(
    bundle: Path, cache: Path, tmp_path: Path
) -> None:
    margin = Guard.load(bundle, engine="onnx-int8", threads=1).classify(TEXTS[0]).margin
    shutil.rmtree(cache)
    other = write_llama_bundle(tmp_path / "other", seed=1)
    names = [json.loads((folder / "model.int8.json").read_text())["weights"] for folder in (other, bundle)]
    for file in ("model.int8.json", "model.int8.onnx", "model.int8.unsigned.onnx"):  # the names are of one length
        (other / file).write_bytes((other / file).read_bytes().replace(names[0].encode(), names[1].encode()))
    refresh_files(other)
    assert Guard.load(other, engine="onnx-int8", threads=1).self_test() < 0.5
    assert Guard.load(bundle, engine="onnx-int8", threads=1).classify(TEXTS[0]).margin == margin
    assert [file.name for file in cache.rglob("*.bin")] == [names[1]] * 2


def test_weights_are_made_of_nothing_but_what_the_manifest_lists(bundle: Path, cache: Path, tmp_path: Path) -> None:
    other = Path(shutil.copytree(bundle, tmp_path / "other"))
    shutil.copy(other / "model.onnx", other / "unlisted.onnx")
    plan = json.loads((other / "model.int8.json").read_text())
    (other / "model.int8.json").write_text(json.dumps({**plan, "source": "unlisted.onnx"}))
    refresh_files(other)
    with pytest.raises(BundleError, match=r"source: expected a file that the manifest lists, found 'unlisted.onnx'"):
        Guard.load(other, engine="onnx-int8", threads=1)


def test_a_cpu_that_cuts_products_has_weights_of_its_own(
    bundle: Path, cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    margins = []
    for exact in (True, False) if byte_products_are_exact() else (False,):
        monkeypatch.setattr(int8, "byte_products_are_exact", lambda exact=exact: exact)
        margins.append(Guard.load(bundle, engine="onnx-int8", threads=1).classify(TEXTS[0]).margin)
    assert margins == pytest.approx([margins[0]] * len(margins), abs=1e-3)  # the same integers, the same products
    assert len(list(cache.rglob("*.bin"))) == len(margins)
    older = Path(shutil.copytree(bundle, tmp_path / "older"))
    edit_manifest(older, lambda manifest: manifest["files"].pop("model.int8.unsigned.onnx"))
    with pytest.raises(BundleError, match=r"expected model.int8.unsigned.onnx, which this CPU needs"):
        Guard.load(older, engine="onnx-int8", threads=1)


def test_damaged_weights_are_made_again(bundle: Path, cache: Path) -> None:
    margin = Guard.load(bundle, engine="onnx-int8", threads=1).classify(TEXTS[0]).margin
    (weights,) = cache.rglob("*.bin")
    weights.write_bytes(b"x" * weights.stat().st_size)
    assert Guard.load(bundle, engine="onnx-int8", threads=1).classify(TEXTS[0]).margin == margin


def _load(bundle: str) -> float:
    return Guard.load(bundle, engine="onnx-int8", threads=1).classify(TEXTS[0]).margin


def test_two_processes_may_make_it_at_once(bundle: Path, cache: Path) -> None:
    with multiprocessing.get_context("spawn").Pool(2) as pool:
        margins = pool.map(_load, [str(bundle)] * 4)
    assert len(set(margins)) == 1 and len(list(cache.rglob("*.bin"))) == 1


def test_a_cache_that_cannot_be_written_is_said(bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv(CACHE_VARIABLE, str(tmp_path / "file" / "cache"))
    with pytest.raises(EngineError, match=f"{CACHE_VARIABLE}=.*: expected a folder that can be written"):
        Guard.load(bundle, engine="onnx-int8", threads=1)
    guard = Guard.load(bundle, threads=1)  # what needs no cache still runs
    assert guard.info()["engine"]["name"] == "onnx"
    assert "can be written" in guard.info()["engine"]["choice"]["refused"]["onnx-int8"]


def test_auto_measures_once_and_remembers(bundle: Path, cache: Path) -> None:
    choice = Guard.load(bundle, threads=1).info()["engine"]["choice"]
    assert set(choice["latency_ms"]) == {"onnx", "onnx-int8"} and choice["refused"] == {}
    assert choice["chosen"] == min(choice["latency_ms"], key=choice["latency_ms"].get)
    assert Guard.load(bundle, threads=1).info()["engine"]["choice"] == choice
    (file,) = cache.glob("engine-*.json")
    other = next(name for name in choice["latency_ms"] if name != choice["chosen"])
    file.write_text(json.dumps({**choice, "chosen": other}))
    assert Guard.load(bundle, threads=1).info()["engine"]["name"] == other  # what is remembered counts
    for damaged in ("{", "null", "[1]"):
        file.write_text(damaged)
        assert Guard.load(bundle, threads=1).info()["engine"]["choice"]["refused"] == {}


def test_it_measures_again_where_what_computes_has_changed(
    bundle: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def make(name: str) -> Engine:
        if name == "gguf":
            raise EngineError("not installed")
        return create_engine(name, opened, 1)

    opened = Bundle.open(bundle)
    for version in (None, "0.3.1", "0.3.2", None):
        monkeypatch.setattr(choose, "installed_version", lambda name, version=version: version)
        choose.choose_engine(opened, ["onnx", "gguf"], 1, make)
    assert len(list(cache.glob("engine-*.json"))) == 3


def test_a_refusal_that_may_pass_is_not_remembered(bundle: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(plan: int8.Plan, file: Path, target: Path, *, unsigned: bool) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(int8, "_carry_out", full)
        assert "No space left" in Guard.load(bundle, threads=1).info()["engine"]["choice"]["refused"]["onnx-int8"]
    assert Guard.load(bundle, threads=1).info()["engine"]["choice"]["refused"] == {}


def test_an_engine_that_gives_other_verdicts_is_not_chosen(bundle: Path, cache: Path, tmp_path: Path) -> None:
    changed = Path(shutil.copytree(bundle, tmp_path / "changed"))
    margin = Guard.load(bundle, engine="onnx", threads=1).self_test()
    spread = max(abs(a - b) for a, b in zip(_margins(bundle, "onnx"), _margins(bundle, "onnx-int8"), strict=True))
    edit_manifest(changed, lambda manifest: manifest["self_test"].update(tolerance=(margin + spread) / 2))
    choice = Guard.load(changed, threads=1).info()["engine"]["choice"]
    assert choice["chosen"] == "onnx" and "expected a margin of" in choice["refused"]["onnx-int8"]


def _margins(bundle: Path, engine: str) -> list[float]:
    guard = Guard.load(bundle, engine=engine, threads=1)
    vectors = guard.bundle.manifest.self_test.vectors
    return [guard.classify(prompt=v.prompt, response=v.response).margin for v in vectors]


def test_a_graph_without_its_plan_is_refused(bundle: Path, cache: Path, tmp_path: Path) -> None:
    bare = Path(shutil.copytree(bundle, tmp_path / "bare"))
    edit_manifest(bare, lambda manifest: manifest["files"].pop("model.int8.json"))
    with pytest.raises(BundleError, match="expected model.int8.json beside model.int8.onnx"):
        Guard.load(bare, engine="onnx-int8", threads=1)


@pytest.mark.parametrize("engine", ["onnx", "onnx-int8"])
def test_a_conversation_is_judged_as_a_whole(bundle: Path, cache: Path, engine: str) -> None:
    guard = Guard.load(bundle, engine=engine, threads=1)
    talk = guard.conversation("low_fpr")
    turns = [("user", "the cat"), ("assistant", "and the hat?"), ("user", "once upon a time " * 9), ("user", "no")]
    for count, (role, text) in enumerate(turns, start=1):
        found = talk.classify(role, text)
        messages = [{"role": r, "content": t} for r, t in turns[:count]]
        expected = guard.classify(messages=messages, operating_point="low_fpr")
        assert found.margin == pytest.approx(expected.margin, abs=1e-3)
        assert (found.tokens, found.truncated, found.action) == (expected.tokens, expected.truncated, expected.action)
        assert talk.messages == messages
    with pytest.raises(InputError):
        talk.classify("user", " ")
    assert len(talk.messages) == len(turns)  # what was refused was not said
