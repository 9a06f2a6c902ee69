"""What the ONNX file of a bundle holds: INT4 integers, scales and floats as they were written, nothing rounded.

Reads the graphs of the conversion layer (``convert/export/onnx_graph.py``, INT4) and refuses any other.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import numpy_helper

from edgeguard.engines.int4_weights import GROUP_SIZE, Int4Weight, StudentConfig, check_weights, shortest
from edgeguard.errors import EngineError

__all__ = ["LABELS_KEY", "ROPE_FACTORS_KEY", "OnnxStudent", "TranscodeError", "read_onnx"]

LABELS_KEY = "edgeguard.head.labels"
ROPE_FACTORS_KEY = "edgeguard.rope.factors"
THETA_DIGITS = 5  # significant ones; a table in float32 tells about six
ANGLE_TOLERANCE = 1e-6  # radians a position, since the table was computed in float32


class TranscodeError(EngineError):
    """A container is not one of ours, or lacks what the other one needs."""


class OnnxStudent(NamedTuple):
    """What an ONNX file holds: INT4 matrices, float32 norms and head, under their transformers names.

    ``labels`` is empty for a file that does not name the rows of its head: edgeguard-mini 0.2 leaves that to its
    manifest.
    """

    config: StudentConfig
    weights: Mapping[str, Int4Weight | NDArray[np.float32]]
    labels: tuple[str, ...]


def read_onnx(path: Path) -> OnnxStudent:
    """Read what the conversion layer wrote as ``model.onnx``: integers, scales and floats unchanged.

    Raises TranscodeError for another file.
    """
    try:
        model = onnx.load(path)
    except Exception as error:  # noqa: BLE001 - protobuf's errors share no base but Exception
        raise TranscodeError(f"{path}: not an ONNX file ({error}).") from error
    parts = _Parts(path, model)
    try:
        config = parts.config()
        weights = parts.weights(config)
        check_weights(weights, config)
        labels = tuple(json.loads(parts.props.get(LABELS_KEY, "[]")))
    except (ValueError, TypeError, LookupError, StopIteration) as error:  # of a graph that only looks like ours
        raise TranscodeError(f"{path}: no guard of edgeguard: {error}") from error
    return OnnxStudent(config, weights, labels)


class _Parts:
    """The initializers and attributes of a graph of :mod:`convert.export.onnx_graph`, by name."""

    def __init__(self, path: Path, model: onnx.ModelProto) -> None:
        self.path = path
        self.initializers: dict[str, onnx.TensorProto] = {t.name: t for t in model.graph.initializer}
        self.nodes = {node.name: node for node in model.graph.node}
        self.props: dict[str, str] = {prop.key: prop.value for prop in model.metadata_props}

    def config(self) -> StudentConfig:
        """The shape, from the shapes of the weights and what the nodes were told."""
        layers = sum(name.endswith(".o.int4") for name in self.initializers)
        last = f"layers.{layers - 1}.attention"
        (vocab, hidden), cos = self._tensor("embedding.int4").dims, self.array("rope_cos")
        factors = self._rope_factors(cos.shape[1])
        return StudentConfig(
            vocab_size=vocab,
            hidden_size=hidden,
            intermediate_size=self._tensor("layers.0.mlp.gate_up.int4").dims[0] // 2,
            num_layers=layers,
            num_heads=self._attribute(f"{last}.query_rope/RotaryEmbedding", "num_heads"),
            num_kv_heads=self._attribute(f"{last}.key_rope/RotaryEmbedding", "num_heads"),
            head_dim=2 * cos.shape[1],
            rms_norm_eps=shortest(
                self._attribute("layers.0.input_norm/SimplifiedLayerNormalization", "epsilon"),
            ),
            rope_theta=self._theta(cos, self.array("rope_sin"), factors),
            max_tokens=cos.shape[0],
            head_size=self._tensor("head.bias").dims[0],
            rope_factors=factors,
        )

    def weights(self, config: StudentConfig) -> dict[str, Int4Weight | NDArray[np.float32]]:
        """All weights under their transformers names; projections that are one product are parted again."""
        query, kv, inner = config.query_size, config.kv_size, config.intermediate_size
        found: dict[str, Int4Weight | NDArray[np.float32]] = {"model.embed_tokens.weight": self._embedding()}
        for name in config.shapes():
            if name in self.initializers:
                found[name] = self.array(name)
        for layer in range(config.num_layers):
            attention, mlp = f"model.layers.{layer}.self_attn", f"model.layers.{layer}.mlp"
            products = {
                "o": {f"{attention}.o_proj": config.hidden_size},
                "mlp.gate_up": {f"{mlp}.gate_proj": inner, f"{mlp}.up_proj": inner},
                "mlp.down": {f"{mlp}.down_proj": config.hidden_size},
            }
            q, k, v = ({f"{attention}.{letter}_proj": n} for letter, n in (("q", query), ("k", kv), ("v", kv)))
            last = layer == config.num_layers - 1
            products |= {"q": q, "kv": k | v} if last else {"qkv": q | k | v}
            for product, rows in products.items():
                found |= self._parted(f"layers.{layer}.{product}", rows)
        return found

    def array(self, name: str) -> NDArray[Any]:
        return np.array(numpy_helper.to_array(self._tensor(name)))

    def _parted(self, product: str, rows: Mapping[str, int]) -> dict[str, Int4Weight | NDArray[np.float32]]:
        whole = Int4Weight.unpack_matmulnbits(self.array(f"{product}.int4"), self.array(f"{product}.scales"))
        if len(whole.nibbles) != sum(rows.values()):
            raise TranscodeError(f"{self.path}: {product} has {len(whole.nibbles)} rows, expected {dict(rows)}.")
        parted, start = {}, 0
        for name, count in rows.items():
            part = slice(start, start + count)
            parted[f"{name}.weight"] = Int4Weight(whole.nibbles[part], whole.scales[part])
            start += count
        return dict(parted)

    def _embedding(self) -> Int4Weight:
        tensor = self._tensor("embedding.int4")
        rows, width = tensor.dims
        # Two's complement, as the graph's GatherBlockQuantized reads it.
        packed = np.frombuffer(tensor.raw_data, np.uint8).reshape(rows, width // GROUP_SIZE, -1) ^ np.uint8(0x88)
        return Int4Weight.unpack_matmulnbits(packed, self.array("embedding.scales"))

    def _rope_factors(self, steps: int) -> tuple[float, ...] | None:
        """What the file divides the plain frequencies by, as it states; None where it states nothing."""
        if ROPE_FACTORS_KEY not in self.props:
            return None
        text = self.props[ROPE_FACTORS_KEY]
        try:
            factors = tuple(map(float, json.loads(text)))
        except (ValueError, TypeError) as error:
            raise TranscodeError(f"{self.path}: {ROPE_FACTORS_KEY} is no list of numbers, found {text!r}.") from error
        if len(factors) != steps or not all(0 < factor < np.inf for factor in factors):
            raise TranscodeError(f"{self.path}: expected {steps} numbers above 0 in {ROPE_FACTORS_KEY}, found {text}.")
        return factors

    def _theta(self, cos: NDArray[np.float32], sin: NDArray[np.float32], factors: tuple[float, ...] | None) -> float:
        """The base of the angles, from the slowest one, checked against the whole table."""
        count, steps = cos.shape
        if count < 2 or steps < 2:
            raise TranscodeError(f"{self.path}: its RoPE table {cos.shape} is too small to tell the base.")
        # At position 1 no angle has gone round; the slowest one there says most about the base.
        scale = np.ones(steps) if factors is None else np.array(factors)
        angle = np.arctan2(np.float64(sin[1, -1]), np.float64(cos[1, -1])) * scale[-1]
        theta = float(f"{angle ** (-steps / (steps - 1)):.{THETA_DIGITS}g}")
        angles = np.arange(count)[:, None] / (theta ** (np.arange(steps) / steps) * scale)
        if max(np.abs(np.cos(angles) - cos).max(), np.abs(np.sin(angles) - sin).max()) > ANGLE_TOLERANCE * count:
            kind = "plain one of any base" if factors is None else f"one of any base with the factors {factors}"
            raise TranscodeError(f"{self.path}: its RoPE table is not the {kind}; {theta:g} is nearest.")
        return theta

    def _tensor(self, name: str) -> onnx.TensorProto:
        if name not in self.initializers:
            raise TranscodeError(f"{self.path}: no guard of edgeguard in INT4, it lacks {name!r}.")
        return self.initializers[name]

    def _attribute(self, node: str, name: str) -> Any:  # noqa: ANN401 - what the operator has
        if node not in self.nodes:
            raise TranscodeError(f"{self.path}: no guard of edgeguard in INT4, it lacks the node {node!r}.")
        return next(onnx.helper.get_attribute_value(a) for a in self.nodes[node].attribute if a.name == name)
