"""The INT8 graph and its weights: made from the INT4 file, kept in the cache, equal to what they stand for."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

pytest.importorskip("onnx", reason="onnx is not installed: pip install 'edgeguard-runtime[convert]'")
torch = pytest.importorskip("torch", reason="torch is not installed: pip install 'edgeguard-runtime[convert]'")
pytest.importorskip("transformers", reason="transformers is not installed")

from test_onnx_graph import BASE, LENGTHS, Weights, changed, random_weights, run, sample, torch_logits  # noqa: E402

from convert.export.int8_graph import INT8_GRAPH, INT8_PLAN, build_int8_graph, export_int8  # noqa: E402
from convert.export.onnx import export_onnx, run_onnx  # noqa: E402
from convert.export.onnx_graph import StudentConfig, build_guard_graph  # noqa: E402
from convert.quantize import quantize_int4  # noqa: E402
from edgeguard.engines.int8 import STEPS, STEPS_WHERE_CUT, Matrix, Plan, to_int8, write_int8_weights  # noqa: E402
from edgeguard.errors import BundleError, ParityError  # noqa: E402

STRUCTURE_TOLERANCE = 1e-3  # the same roundings; a float that falls on the other side of a half moves a logit a little
UNCUT = 64  # steps: 255 * 64 + 255 * 64 fits 16 bits, so that every CPU computes the same
SHAPES = {
    "grouped heads": BASE,
    "one key-value head": changed(num_kv_heads=1),
    "heads wider than hidden": changed(num_heads=6, num_kv_heads=3, head_dim=32),
    "one layer": changed(num_layers=1),
}


Shifts = dict[str, np.ndarray]


def random_shifts(config: StudentConfig) -> Shifts:
    """A power of two for every column that is smoothed."""
    rng = np.random.default_rng(5)
    sizes = {"attention": config.hidden_size, "mlp": config.hidden_size, "down": config.intermediate_size}
    layers = range(config.num_layers)
    return {f"layers.{i}.{k}": rng.integers(-2, 3, n).astype(np.int8) for i in layers for k, n in sizes.items()}


def write_model(folder: Path, weights: Weights, config: StudentConfig = BASE, shifts: Shifts | None = None) -> Path:
    """``model.onnx``, its INT8 graph and plan in ``folder``, with the file of weights that a machine would make."""
    folder.mkdir(parents=True, exist_ok=True)
    ids, mask = sample(LENGTHS, config)
    reference = run(build_guard_graph(weights, config), ids, mask)
    export_onnx(weights, config, folder / "model.onnx", reference, ids, mask, tolerance=0.1)
    export_int8(folder / "model.onnx", reference, ids, mask, tolerance=20 if shifts else 1, shifts=shifts or {})
    write_int8_weights(folder / INT8_PLAN, folder, UNCUT)
    return folder / INT8_GRAPH


def int8_values(weight: np.ndarray, shift: np.ndarray) -> np.ndarray:
    """What the INT8 file stands for, worked out apart: rows of the shifted INT4 values on a grid of their own."""
    values = quantize_int4(weight).dequantize() * power(shift)
    scale = np.abs(values).max(axis=1, keepdims=True) / np.float32(UNCUT)  # -4 of -8 is a tie: float32 as in the file
    rounded: np.ndarray = np.rint(values / scale) * scale / power(shift)
    return rounded


def power(shift: np.ndarray) -> np.ndarray:
    """Two to the ``shift``, float32."""
    factors: np.ndarray = np.ldexp(np.float32(1), shift)
    return factors


def column_shift(name: str, shifts: Shifts) -> np.ndarray:
    """Of the matrix ``model.layers.I.PART.NAME_proj.weight``."""
    layer, part = name.split(".")[2], name.split(".")[4]
    kinds = {"q": "attention", "k": "attention", "v": "attention", "gate": "mlp", "up": "mlp", "down": "down"}
    return shifts.get(f"layers.{layer}.{kinds.get(part.removesuffix('_proj'))}", np.zeros(1, np.int8))


def torch_int8_logits(
    weights: Weights, config: StudentConfig, ids: np.ndarray, mask: np.ndarray, shifts: Shifts
) -> np.ndarray:
    """The Llama of transformers with INT8 weights, every linear layer reading rows that are rounded token by token."""
    values = {n: int8_values(w, column_shift(n, shifts)) if "_proj." in n else w for n, w in weights.items()}
    values["model.embed_tokens.weight"] = quantize_int4(weights["model.embed_tokens.weight"]).dequantize()
    spread = {values[name].tobytes(): power(column_shift(name, shifts)) for name in values if "_proj." in name}

    def round_rows(module: Any, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
        factor = torch.from_numpy(spread[module.weight.detach().numpy().tobytes()])
        x = inputs[0] / factor
        step = x.abs().amax(-1, keepdim=True) / 127
        return ((x / step).round() * step * factor,)

    hook = torch.nn.modules.module.register_module_forward_pre_hook(
        lambda module, inputs: round_rows(module, inputs) if isinstance(module, torch.nn.Linear) else None
    )
    try:
        logits: np.ndarray = torch_logits(values, config, ids, mask)
        return logits
    finally:
        hook.remove()


@pytest.mark.parametrize("smooth", [False, True], ids=["as it is", "smoothed"])
@pytest.mark.parametrize("config", SHAPES.values(), ids=SHAPES.keys())
def test_the_graph_equals_torch_with_the_same_roundings(config: StudentConfig, smooth: bool, tmp_path: Path) -> None:
    weights, shifts = random_weights(config), random_shifts(config) if smooth else {}
    ids, mask = sample(LENGTHS, config)
    found = run_onnx(write_model(tmp_path, weights, config, shifts), ids, mask)
    expected = torch_int8_logits(weights, config, ids, mask, shifts)
    assert np.abs(found - expected).max() < STRUCTURE_TOLERANCE
    assert np.abs(found - run(build_guard_graph(weights, config, accuracy_level=1), ids, mask)).max() > 1e-3


@given(
    values=hnp.arrays(np.float32, (3, 64), elements=st.floats(-4, 4, width=32)),
    steps=st.sampled_from([STEPS, STEPS_WHERE_CUT]),
)
def test_an_int8_value_is_within_half_a_step(values: np.ndarray, steps: int) -> None:
    quantized = quantize_int4(values)
    found, scale = to_int8(quantized, steps=steps)
    assert found.dtype == np.int8 and np.abs(found.astype(int)).max() <= steps
    error = np.abs(found * scale[:, None] - quantized.dequantize())
    assert (error <= scale[:, None] * 0.5001).all()


def test_reading_on_gives_what_reading_all_gives(tmp_path: Path) -> None:
    from edgeguard.engines.onnx import OnnxEngine

    engine = OnnxEngine(write_model(tmp_path, random_weights(BASE)), outputs=16, threads=1)
    ids = np.random.default_rng(3).integers(0, BASE.vocab_size, 30)
    whole = engine.logits(ids[None], np.ones((1, 30), np.int64))
    _, seen = engine.read_on(ids[:18].tolist(), None)
    assert seen is not None and len(seen.ids) == 18
    first, seen = engine.read_on(ids.tolist(), seen)
    again, seen = engine.read_on(ids.tolist(), seen)
    other, _ = engine.read_on([*ids[:10].tolist(), 5, 6], seen)
    scratch = engine.logits(np.array([[*ids[:10], 5, 6]]), np.ones((1, 12), np.int64))
    for found, expected in ((first, whole), (again, whole), (other, scratch)):
        assert np.abs(found - expected).max() < STRUCTURE_TOLERANCE


def test_padding_and_neighbours_do_not_matter(tmp_path: Path) -> None:
    graph = write_model(tmp_path, random_weights(BASE))
    ids, mask = sample(LENGTHS)
    together = run_onnx(graph, ids, mask)
    for row, length in enumerate(LENGTHS):
        alone = run_onnx(graph, ids[row : row + 1, :length], mask[row : row + 1, :length])
        assert np.abs(alone[0] - together[row]).max() < STRUCTURE_TOLERANCE


def test_a_graph_that_differs_is_not_kept(tmp_path: Path) -> None:
    weights = random_weights(BASE)
    ids, mask = sample(LENGTHS)
    reference = run(build_guard_graph(weights, BASE), ids, mask)
    export_onnx(weights, BASE, tmp_path / "model.onnx", reference, ids, mask, tolerance=0.1)
    with pytest.raises(ParityError, match="does not reproduce"):
        export_int8(tmp_path / "model.onnx", reference + 5, ids, mask, tolerance=1.0)
    assert [path.name for path in tmp_path.iterdir()] == ["model.onnx"]


def test_weights_that_the_file_does_not_hold_are_refused(tmp_path: Path) -> None:
    write_model(tmp_path, random_weights(BASE))
    with pytest.raises(ValueError, match="model.onnx does not hold layers.0.qkv"):
        build_int8_graph(random_weights(BASE, seed=1), BASE, tmp_path / "model.onnx", "weights.bin")


Change = Callable[[dict[str, Any]], None]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda plan: plan.update(format=2), "format: expected a whole number from 1 to 1, found 2"),
        (lambda plan: plan.update(weights="../w.bin"), "weights: expected a plain name"),
        (lambda plan: plan.update(source="/etc/passwd"), "source: expected a plain name"),
        (lambda plan: plan.pop("copies"), "none of the name 'copies'"),
        (lambda plan: plan.update(copies=3), "copies: expected a list, found 3"),
        (lambda plan: plan["copies"][0].pop(), r"copies\[0\]: expected three whole numbers"),
        (lambda plan: plan["matrices"][0].pop("to"), r"matrices\[0\]: .* none of the name 'to'"),
        (lambda plan: plan["matrices"][0].update(shape=[1]), r"matrices\[0\].shape: expected two whole numbers"),
        (lambda plan: plan["matrices"][0].update(columns="QUI="), r"columns: expected null or base64 of 64 bytes"),
        (lambda plan: plan["matrices"][0].update(rows="?"), "rows: expected null or base64 of 128 bytes"),
        (lambda plan: plan["matrices"][0].update(nibbles=-1), "nibbles: expected a whole number from 0"),
        (lambda plan: plan["matrices"][0].update(nibbles=10**9), "expected places within model.onnx"),
        (lambda plan: plan["copies"][0].__setitem__(0, 10**9), "expected places within model.onnx"),
        (lambda plan: plan["copies"][0].__setitem__(2, 10**7), "bytes of weights, found"),
    ],
)
def test_damaged_plans_are_refused(tmp_path: Path, change: Change, message: str) -> None:
    write_model(tmp_path, random_weights(BASE))
    plan = json.loads((tmp_path / INT8_PLAN).read_text())
    change(plan)
    (tmp_path / INT8_PLAN).write_text(json.dumps(plan))
    with pytest.raises(BundleError, match=message):
        write_int8_weights(tmp_path / INT8_PLAN, tmp_path)


def test_a_plan_comes_back_as_it_was() -> None:
    shift = np.array([-3, 0], np.int8)
    matrices = (Matrix(0, 1, (3, 2), 4, 5), Matrix(0, 1, (2, 2), 4, 5, columns=shift, rows=-shift))
    plan = Plan("a.onnx", "b.bin", 64, matrices, ((6, 7, 8),))
    read = Plan.from_json(json.dumps(plan.to_dict()).encode(), "plan")
    assert read.to_dict() == plan.to_dict()
    assert read.matrices[1].columns is not None and read.matrices[1].columns.tolist() == [-3, 0]
