"""Engines: choosing one, refusing graphs of another shape, and the number of threads."""

from __future__ import annotations

import dataclasses
import os
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto
from tiny import TEMPLATE, TinyModel
from tokenizers import Tokenizer

from edgeguard.bundle import Bundle
from edgeguard.engines import cpus, create_engine
from edgeguard.engines.onnx import OnnxEngine
from edgeguard.errors import BundleError, EngineError


@pytest.mark.parametrize("name", ["auto", "onnx"])
def test_engines_by_name(tiny_bundle: Path, name: str) -> None:
    assert create_engine(name, Bundle.open(tiny_bundle), 1).name == "onnx"


@pytest.mark.parametrize("name", ["tflite", "", "ONNX"])
def test_unknown_engines_list_the_known(tiny_bundle: Path, name: str) -> None:
    with pytest.raises(EngineError, match=rf"unknown engine '{name}'. Known engines: auto, onnx"):
        create_engine(name, Bundle.open(tiny_bundle))


def test_an_engine_that_is_not_installed(tiny_bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "edgeguard.engines.onnx", None)
    with pytest.raises(EngineError, match=r"'onnx' is not installed .* Known engines: auto, onnx"):
        create_engine("auto", Bundle.open(tiny_bundle))


def test_an_extra_that_is_not_installed_is_named(tiny_bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "llama_cpp", None)
    monkeypatch.delitem(sys.modules, "edgeguard.engines.gguf", raising=False)
    monkeypatch.delitem(sys.modules, "edgeguard.engines.gguf_llama", raising=False)
    with pytest.raises(EngineError, match=r"'gguf' is not installed .* pip install 'edgeguard-runtime\[gguf\]'"):
        create_engine("gguf", Bundle.open(tiny_bundle))


def test_a_bundle_without_a_file_for_any_engine(tiny_bundle: Path) -> None:
    bundle = Bundle.open(tiny_bundle)
    files = {"tokenizer.json": bundle.manifest.files["tokenizer.json"]}
    bare = Bundle(tiny_bundle, dataclasses.replace(bundle.manifest, files=files))
    with pytest.raises(BundleError, match="one file for the engine 'onnx', found none. It has tokenizer.json"):
        create_engine("auto", bare)


def test_padding_does_not_change_a_row(tiny_bundle: Path, tiny_tokenizer: Tokenizer) -> None:
    engine = create_engine("onnx", Bundle.open(tiny_bundle), 1)
    rows = [[1, 11, 50, 60, 2], [1, 11, 70, 2, 20, 30, 40, 50]]
    length = max(map(len, rows))
    ids = np.array([row + [TEMPLATE.pad_id] * (length - len(row)) for row in rows], dtype=np.int64)
    mask = np.array([[1] * len(row) + [0] * (length - len(row)) for row in rows], dtype=np.int64)
    model = TinyModel.random(tiny_tokenizer.get_vocab_size())
    logits = engine.logits(ids, mask)
    assert logits.dtype == np.float32
    for row, found in zip(rows, logits, strict=True):
        assert found == pytest.approx(model.logits(row), abs=1e-4)


def test_ids_outside_the_vocabulary_are_an_engine_error(tiny_bundle: Path) -> None:
    engine = create_engine("onnx", Bundle.open(tiny_bundle), 1)
    with pytest.raises(EngineError, match=r"failed on a batch of shape \(1, 1\)"):
        engine.logits(np.array([[10**6]]), np.array([[1]]))


Change = Callable[[onnx.ModelProto], None]


def _renamed_input(model: onnx.ModelProto) -> None:
    model.graph.input[0].name = "tokens"
    model.graph.node[0].input[1] = "tokens"


def _int32_input(model: onnx.ModelProto) -> None:
    model.graph.input[0].type.tensor_type.elem_type = TensorProto.INT32


def _renamed_output(model: onnx.ModelProto) -> None:
    model.graph.output[0].name = "scores"
    model.graph.node[-1].output[0] = "scores"


def _loop(model: onnx.ModelProto) -> None:
    model.graph.node[0].input[1] = "mean"  # a graph with a loop


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (_renamed_input, r"expected the inputs \{'input_ids'.*found \{'tokens'"),
        (_int32_input, r"expected the inputs .*found \{'input_ids': 'tensor\(int32\)'"),
        (_renamed_output, r"expected the outputs \{'logits'.*found \{'scores'"),
        (_loop, r"expected a model that onnxruntime loads, found"),
    ],
)
def test_graphs_of_another_shape_are_refused_at_load(tmp_path: Path, change: Change, message: str) -> None:
    model = TinyModel.random(300).to_onnx()
    change(model)
    onnx.save(model, str(tmp_path / "model.onnx"))
    with pytest.raises(EngineError, match=message):
        OnnxEngine(tmp_path / "model.onnx", outputs=16, threads=1)


def test_a_head_of_another_width_is_refused(tmp_path: Path) -> None:
    onnx.save(TinyModel.random(300, outputs=15).to_onnx(), str(tmp_path / "model.onnx"))
    with pytest.raises(EngineError, match=r"logits: expected 16 columns \(the head's labels\), found 15"):
        OnnxEngine(tmp_path / "model.onnx", outputs=16, threads=1)


@pytest.mark.parametrize("raw", [b"", b"not a model", b"\x00" * 4096])
def test_files_that_are_no_model(tmp_path: Path, raw: bytes) -> None:
    (tmp_path / "model.onnx").write_bytes(raw)
    with pytest.raises(EngineError, match=r"model.onnx: expected a model that onnxruntime loads"):
        OnnxEngine(tmp_path / "model.onnx", outputs=16, threads=1)


@pytest.fixture
def machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Eight CPUs on four cores, no control group."""
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(8)), raising=False)
    monkeypatch.setattr(cpus, "CPU_ROOT", tmp_path / "cpu")
    monkeypatch.setattr(cpus, "CGROUP_ROOT", tmp_path / "cgroup")
    monkeypatch.setattr(cpus, "_cgroup_folders", lambda: [tmp_path / "cgroup" / "own", tmp_path / "cgroup"])
    (tmp_path / "cgroup" / "own").mkdir(parents=True)
    for cpu in range(8):
        folder = tmp_path / "cpu" / f"cpu{cpu}" / "topology"
        folder.mkdir(parents=True)
        (folder / "thread_siblings_list").write_text(f"{cpu % 4},{cpu % 4 + 4}\n")
    return tmp_path / "cgroup"


@pytest.mark.parametrize(("asked", "given"), [(None, 4), (1, 1), (6, 6), (64, 8)])
def test_threads(machine: Path, asked: int | None, given: int) -> None:
    assert cpus.choose_threads(asked) == given


@pytest.mark.parametrize(
    ("files", "given"),
    [
        ({"cpu.max": "max 100000"}, 4),
        ({"cpu.max": "300000 100000"}, 3),
        ({"own/cpu.max": "250000 100000", "cpu.max": "max 100000"}, 2),
        ({"own/cpu.max": "50000 100000"}, 1),
        ({"cpu.cfs_quota_us": "200000", "cpu.cfs_period_us": "100000"}, 2),
        ({"cpu.cfs_quota_us": "-1", "cpu.cfs_period_us": "100000"}, 4),
        ({"cpu.max": "rubbish"}, 4),
    ],
)
def test_a_quota_binds(machine: Path, files: dict[str, str], given: int) -> None:
    for name, content in files.items():
        (machine / name).write_text(content)
    assert cpus.choose_threads(None) == given
    assert cpus.choose_threads(64) == (8 if given == 4 else given)


def test_affinity_binds(machine: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0, 4, 1})
    assert cpus.choose_threads(None) == 2
    assert cpus.choose_threads(8) == 3


def test_without_topology_or_affinity(machine: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpus, "CPU_ROOT", machine / "none")
    assert cpus.choose_threads(None) == 8
    monkeypatch.delattr(os, "sched_getaffinity")
    monkeypatch.setattr(os, "cpu_count", lambda: None)
    assert cpus.choose_threads(None) == 1


@pytest.mark.parametrize("threads", [0, -1, True, 1.5, "2"])
def test_wrong_numbers_of_threads(threads: int) -> None:
    with pytest.raises(EngineError, match="threads: expected a whole number of 1 and up"):
        cpus.choose_threads(threads)


def test_this_machine() -> None:
    assert 1 <= cpus.choose_threads(None) <= cpus.allowed_cpus()
    assert all(folder.is_relative_to(cpus.CGROUP_ROOT) for folder in cpus._cgroup_folders())
