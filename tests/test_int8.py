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
from edgeguard.engines.byte_products import byte_products_are_exact  # noqa: E402
from edgeguard.engines.int8 import Matrix, Plan, hadamard, to_int8, unsigned_graph, write_int8_weights  # noqa: E402
from edgeguard.errors import BundleError, ParityError  # noqa: E402

STRUCTURE_TOLERANCE = 1e-3  # the same roundings; a float that falls on the other side of a half moves a logit a little
SHAPES = {
    "grouped heads": BASE,
    "one key-value head": changed(num_kv_heads=1),
    "heads wider than hidden": changed(num_heads=6, num_kv_heads=3, head_dim=32),
    "one layer": changed(num_layers=1),
}


Shifts = dict[str, np.ndarray]


def random_shifts(config: StudentConfig) -> Shifts:
    """A power of two for every column that is smoothed."""
    rng, layers = np.random.default_rng(5), range(config.num_layers)
    rows = [f"layers.{layer}.{kind}" for layer in layers for kind in ("attention", "mlp")]
    return {row: rng.integers(-2, 3, config.hidden_size).astype(np.int8) for row in rows}


def write_model(folder: Path, weights: Weights, config: StudentConfig = BASE, shifts: Shifts | None = None) -> Path:
    """``model.onnx`` and its INT8 files in ``folder``, with the weights of the graph that is returned.

    It is the one of unsigned weights, which computes the same on every CPU.
    """
    folder.mkdir(parents=True, exist_ok=True)
    ids, mask = sample(LENGTHS, config)
    reference = run(build_guard_graph(weights, config), ids, mask)
    export_onnx(weights, config, folder / "model.onnx", reference, ids, mask, tolerance=0.1)
    export_int8(folder / "model.onnx", reference, ids, mask, tolerance=20 if shifts else 1, shifts=shifts or {})
    write_int8_weights(folder / INT8_PLAN, folder, unsigned=True)
    return unsigned_graph(folder / INT8_GRAPH)


def int8_values(name: str, weight: np.ndarray, shift: np.ndarray) -> np.ndarray:
    """What the INT8 file stands for, worked out apart: rows of the shifted INT4 values on a grid of their own."""
    values = turn(name, quantize_int4(weight).dequantize() * power(shift)) / (16 if "down_proj" in name else 1)
    scale = np.abs(values).max(axis=1, keepdims=True) / np.float32(127)  # -4 of -8 is a tie: float32 as in the file
    rounded: np.ndarray = turn(name, np.rint(values / scale) * scale) / power(shift)
    return rounded


def turn(name: str, x: Any) -> Any:  # noqa: ANN401 - an array or a tensor
    """Blocks of 16 columns times the matrix of signs (-1)^(bits that i and j share), for ``down_proj`` alone."""
    if "down_proj" not in name:
        return x
    signs = np.array([[(-1.0) ** (i & j).bit_count() for j in range(16)] for i in range(16)], np.float32)
    matrix = torch.from_numpy(signs) if isinstance(x, torch.Tensor) else signs
    return (x.reshape(*x.shape[:-1], -1, 16) @ matrix).reshape(x.shape)


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
    values = {n: int8_values(n, w, column_shift(n, shifts)) if "_proj." in n else w for n, w in weights.items()}
    values["model.embed_tokens.weight"] = quantize_int4(weights["model.embed_tokens.weight"]).dequantize()
    names = {values[name].tobytes(): name for name in values if "_proj." in name}

    def round_rows(module: Any, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
        name = names[module.weight.detach().numpy().tobytes()]
        factor = torch.from_numpy(power(column_shift(name, shifts)))
        x = turn(name, inputs[0] / factor)
        step = x.abs().amax(-1, keepdim=True) / 127
        rounded = turn(name, (x / step).round() * step)
        return (rounded / (16 if "down_proj" in name else 1) * factor,)

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


@pytest.mark.skipif(not byte_products_are_exact(), reason="this CPU's fast kernel cuts sums of byte products")
def test_signed_and_unsigned_weights_compute_the_same(tmp_path: Path) -> None:
    ids, mask = sample(LENGTHS)
    unsigned = run_onnx(write_model(tmp_path, random_weights(BASE)), ids, mask)
    write_int8_weights(tmp_path / INT8_PLAN, tmp_path, unsigned=False)
    assert np.abs(run_onnx(tmp_path / INT8_GRAPH, ids, mask) - unsigned).max() < STRUCTURE_TOLERANCE


def test_unsigned_weights_are_128_above_the_signed_ones(tmp_path: Path) -> None:
    write_model(tmp_path, random_weights(BASE))
    plan = Plan.from_json((tmp_path / INT8_PLAN).read_bytes(), "plan")
    signed, unsigned = (
        write_int8_weights(tmp_path / INT8_PLAN, tmp_path, unsigned=choice).read_bytes() for choice in (False, True)
    )
    for matrix in plan.matrices:
        part = slice(matrix.to, matrix.to + matrix.shape[0] * matrix.shape[1])
        below, above = np.frombuffer(signed[part], np.int8), np.frombuffer(unsigned[part], np.uint8)
        assert np.abs(below).max() == 127 and (above.astype(int) == below.astype(int) + 128).all()


def test_the_graph_reads_positions_as_its_source_does(tmp_path: Path) -> None:
    """Another CPU computes cosines with another last bit; the file of weights takes them from the source."""
    import onnx

    graph = write_model(tmp_path, random_weights(BASE))
    model = onnx.load(tmp_path / "model.onnx")
    (cos,) = (tensor for tensor in model.graph.initializer if tensor.name == "rope_cos")
    other = np.nextafter(onnx.numpy_helper.to_array(cos), np.float32(2))
    cos.CopyFrom(onnx.numpy_helper.from_array(other, "rope_cos"))
    onnx.save(model, tmp_path / "model.onnx")
    build_int8_graph(random_weights(BASE), BASE, tmp_path / "model.onnx", graph.name)


@given(values=hnp.arrays(np.float32, (3, 64), elements=st.floats(-4, 4, width=32)), turned=st.booleans())
def test_an_int8_value_is_within_half_a_step(values: np.ndarray, turned: bool) -> None:
    quantized = quantize_int4(values)
    found, scale = to_int8(quantized, turned=turned)
    assert found.dtype == np.int8 and np.abs(found.astype(int)).max() <= 127
    wanted = quantized.dequantize()
    if turned:
        wanted = turn("down_proj", wanted) / 16
    assert (np.abs(found * scale[:, None] - wanted) <= scale[:, None] * 0.5001).all()


def test_turning_twice_is_sixteen_times() -> None:
    matrix = hadamard()
    assert set(np.unique(matrix)) == {-1, 1} and (matrix @ matrix == 16 * np.eye(16)).all()


def test_turning_spreads_an_outlier() -> None:
    """What turning is for: products of rows with a few large channels are rounded less."""
    rng = np.random.default_rng(4)
    x, weight = rng.normal(0, 1, (40, 64)).astype(np.float32), rng.normal(0, 1, (32, 64)).astype(np.float32)
    x[:, [5, 40]] *= 60

    def rounded(values: np.ndarray) -> np.ndarray:
        scale = np.abs(values).max(1, keepdims=True) / 127
        return np.asarray(np.rint(values / scale) * scale)

    errors = [
        np.abs(rounded(turn(name, x)) @ rounded(turn(name, weight)).T / by - x @ weight.T).mean()
        for name, by in (("other", 1), ("down_proj", 16))
    ]
    assert errors[1] < errors[0] / 1.5


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
        (lambda plan: plan.update(format=1), "format: expected a whole number from 2 to 2, found 1"),
        (lambda plan: plan.update(weights="../w.bin"), "weights: expected a plain name"),
        (lambda plan: plan.update(source="/etc/passwd"), "source: expected a plain name"),
        (lambda plan: plan.pop("copies"), "none of the name 'copies'"),
        (lambda plan: plan.update(copies=3), "copies: expected a list, found 3"),
        (lambda plan: plan["copies"][0].pop(), r"copies\[0\]: expected three whole numbers"),
        (lambda plan: plan["matrices"][0].pop("to"), r"matrices\[0\]: .* none of the name 'to'"),
        (lambda plan: plan["matrices"][0].update(shape=[1]), r"matrices\[0\].shape: expected two whole numbers"),
        (lambda plan: plan["matrices"][0].update(columns="QUI="), r"columns: expected null or base64 of 64 bytes"),
        (lambda plan: plan["matrices"][0].update(turned=1), "turned: expected true or false, found 1"),
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
        write_int8_weights(tmp_path / INT8_PLAN, tmp_path, unsigned=False)


def test_a_plan_comes_back_as_it_was() -> None:
    shift = np.array([-3, 0], np.int8)
    matrices = (Matrix(0, 1, (3, 2), 4, 5), Matrix(0, 1, (2, 2), 4, 5, columns=shift, turned=True))
    plan = Plan("a.onnx", "b.bin", 64, matrices, ((6, 7, 8),))
    read = Plan.from_json(json.dumps(plan.to_dict()).encode(), "plan")
    assert read.to_dict() == plan.to_dict()
    assert read.matrices[1].columns is not None and read.matrices[1].columns.tolist() == [-3, 0]
