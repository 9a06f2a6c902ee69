"""A saved Core ML package computed by numpy, operator by operator, where there is no Mac to run it.

What was written is read back by coremltools and every operator of one function is carried out in its stated type: FP16
results are rounded to FP16 after each operator (sums inside a product are kept in float32, as accelerators do). So a
wrong weight, axis or mask is found, and a value that FP16 cannot hold; how Core ML itself rounds is not.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgeguard.errors import ParityError

__all__ = ["Package"]

Array = NDArray[Any]


class Package:
    """The functions of an unzipped ``.mlpackage``: ``functions`` by name, ``run`` computes one."""

    def __init__(self, path: Path) -> None:
        """Read the package. Raises ImportError without coremltools."""
        import coremltools as ct
        from coremltools.converters.mil.frontend.milproto.load import load

        self.spec = ct.utils.load_spec(str(path))
        weights = path / "Data" / "com.apple.CoreML" / "weights"
        self.functions: Mapping[str, Any] = load(self.spec, self.spec.specificationVersion, str(weights)).functions
        self._constants: dict[str, Array] = {}

    def run(self, function: str, inputs: Mapping[str, Array]) -> Array:
        """The first output of ``function``. Raises ParityError for an operator that is not known here."""
        values = {self.functions[function].inputs[name]: value for name, value in inputs.items()}
        for op in self.functions[function].operations:
            if op.op_type == "const":
                values[op.outputs[0]] = np.asarray(op.val.val)
            elif op.op_type == "constexpr_blockwise_shift_scale":
                values[op.outputs[0]] = self._weight(op)
            else:
                given = {name: _value(values, given) for name, given in op.inputs.items()}
                values[op.outputs[0]] = _carry_out(op, given)
        return values[self.functions[function].outputs[0]]

    def weights(self, function: str) -> dict[tuple[int, ...], list[tuple[Array, Array]]]:
        """Integers and scales of the INT4 weights of ``function``, in its order, by shape."""
        found: dict[tuple[int, ...], list[tuple[Array, Array]]] = {}
        for op in self.functions[function].operations:
            if op.op_type == "constexpr_blockwise_shift_scale":
                integers, scales = np.asarray(op.data.val).astype(np.int8), np.asarray(op.scale.val)
                found.setdefault(integers.shape, []).append((integers, scales))
        return found

    def _weight(self, op: Any) -> Array:  # noqa: ANN401 - a MIL operator
        """FP16 values of INT4 integers; made once for all functions that share them."""
        scales = np.asarray(op.scale.val)
        key = f"{op.data.val.shape} {hash(np.asarray(op.data.val).tobytes())} {hash(scales.tobytes())}"
        if key not in self._constants:
            integers = np.asarray(op.data.val).astype(np.float32)
            grouped = integers.reshape(*scales.shape, -1) * scales.astype(np.float32)[..., None]
            self._constants[key] = grouped.reshape(integers.shape).astype(np.float16)
        return self._constants[key]


def _value(values: Mapping[Any, Array], given: Any) -> Any:  # noqa: ANN401 - variables of MIL -> arrays
    if isinstance(given, list | tuple):
        return [_value(values, part) for part in given]
    if given is None:
        return None
    return values[given] if given in values else np.asarray(given.val)


def _carry_out(op: Any, given: dict[str, Any]) -> Array:  # noqa: ANN401 - a MIL operator
    if op.op_type not in OPERATORS:
        raise ParityError(f"the package has the operator {op.op_type}, which is not known here. Report this.")
    wide = {
        name: value.astype(np.float32) if isinstance(value, np.ndarray) and value.dtype == np.float16 else value
        for name, value in given.items()
    }
    found = np.asarray(OPERATORS[op.op_type](**wide))
    half = any(isinstance(value, np.ndarray) and value.dtype == np.float16 for value in _flat(given))
    result = found.astype(np.float16) if half and found.dtype == np.float32 else found
    if result.shape != tuple(op.outputs[0].shape):
        raise ParityError(f"{op.name}: the package states the shape {op.outputs[0].shape}, found {result.shape}.")
    return result


def _flat(given: dict[str, Any]) -> list[Any]:
    return [part for value in given.values() for part in (value if isinstance(value, list) else [value])]


def _matmul(x: Array, y: Array, transpose_x: Any = False, transpose_y: Any = False) -> Array:  # noqa: ANN401
    x = x.swapaxes(-1, -2) if transpose_x else x
    return np.asarray(x @ (y.swapaxes(-1, -2) if transpose_y else y))


def _linear(x: Array, weight: Array, bias: Array | None = None) -> Array:
    found = x @ weight.T
    return np.asarray(found if bias is None else found + bias)


def _softmax(x: Array, axis: Array) -> Array:
    shares = np.exp(x - x.max(axis=int(axis), keepdims=True))
    return np.asarray(shares / shares.sum(axis=int(axis), keepdims=True))


def _slice(x: Array, begin: Array, end: Array, **_: Any) -> Array:  # noqa: ANN401 - masks, which are not used
    return x[tuple(slice(a, b) for a, b in zip(begin.tolist(), end.tolist(), strict=True))]


def _silu(x: Array) -> Array:
    with np.errstate(over="ignore"):  # exp of a large magnitude: the quotient is 0
        return np.asarray(x / (1 + np.exp(-x)))


OPERATORS: Mapping[str, Callable[..., Any]] = {
    "abs": lambda x: np.abs(x),
    "add": lambda x, y: x + y,
    "concat": lambda values, axis, interleave=False: np.concatenate(values, int(axis)),
    "gather": lambda x, indices, axis, **_: np.take(x, indices, int(axis)),
    "linear": _linear,
    "matmul": _matmul,
    "maximum": lambda x, y: np.maximum(x, y),
    "mul": lambda x, y: x * y,
    "real_div": lambda x, y: x / y,
    "reduce_max": lambda x, axes, keep_dims: x.max(tuple(axes.tolist()), keepdims=bool(keep_dims)),
    "reduce_mean": lambda x, axes, keep_dims: x.mean(tuple(axes.tolist()), keepdims=bool(keep_dims)),
    "reshape": lambda x, shape: x.reshape(shape.tolist()),
    "rsqrt": lambda x, epsilon: 1 / np.sqrt(x + epsilon),
    "silu": _silu,
    "slice_by_index": _slice,
    "softmax": _softmax,
    "squeeze": lambda x, axes: x.squeeze(tuple(axes.tolist())),
    "transpose": lambda x, perm: x.transpose(perm.tolist()),
}
