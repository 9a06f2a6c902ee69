"""From one container to the other without loss: both hold the same INT4 integers, in another order of bytes.

Reading gives :class:`~convert.quantize.Int4Weight` as it was written, so nothing is rounded anywhere. A file that was
written is read back and compared, integer by integer, before it takes its place.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import numpy_helper

from convert.export.gguf import GgufStudent, pre_tokenizer_name, read_gguf, shortest, write_gguf
from convert.export.onnx_graph import (
    LABELS_KEY,
    ROPE_FACTORS_KEY,
    StudentConfig,
    Weights,
    build_guard_graph,
    check_weights,
)
from convert.files import write_whole
from convert.quantize import GROUP_SIZE, Int4Weight
from edgeguard.errors import EdgeguardError, ParityError

__all__ = [
    "OnnxStudent",
    "TranscodeError",
    "bundle_to_gguf",
    "gguf_to_onnx",
    "onnx_to_gguf",
    "read_onnx",
    "require_same_weights",
]

THETA_DIGITS = 5  # significant ones; a table in float32 tells about six
ANGLE_TOLERANCE = 1e-6  # radians a position, since the table was computed in float32


class TranscodeError(EdgeguardError):
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
    """Read what :func:`convert.export.onnx.export_onnx` wrote: integers, scales and floats unchanged.

    Raises TranscodeError for another file.
    """
    try:
        model = onnx.load(path)
    except Exception as error:  # noqa: BLE001 - protobuf's errors share no base but Exception
        raise TranscodeError(f"{path}: not an ONNX file ({error}).") from error
    parts = _Parts(path, model)
    config = parts.config()
    weights = parts.weights(config)
    try:
        check_weights(weights, config)
    except ValueError as error:
        raise TranscodeError(f"{path}: no guard of edgeguard: {error}") from error
    return OnnxStudent(config, weights, tuple(json.loads(parts.props.get(LABELS_KEY, "[]"))))


def onnx_to_gguf(
    source: Path,
    path: Path,
    tokenizer_json: str,
    *,
    control_ids: Collection[int],
    about: Mapping[str, str],
    labels: Sequence[str] = (),
    pre_tokenizer: str | None = None,
    bundle: Mapping[str, Any] | None = None,
) -> None:
    """Write the weights of the ONNX file ``source`` as the GGUF ``path``.

    The tokenizer, ``control_ids``, ``about`` and ``bundle``: see :func:`convert.export.gguf.write_gguf`. ``labels``:
    where the file does not name them. ``pre_tokenizer``: None to recognize it. Raises TranscodeError, GgufError, or
    ParityError when what was written does not read back as it was.
    """
    student = read_onnx(source)
    names = student.labels or tuple(labels)
    if not names:
        raise TranscodeError(f"{source}: does not name the rows of its head. Pass the labels, as in the manifest.")

    def write(target: Path) -> None:
        write_gguf(
            student.weights,
            student.config,
            names,
            tokenizer_json,
            target,
            control_ids=control_ids,
            pre_tokenizer=pre_tokenizer or pre_tokenizer_name(tokenizer_json),
            about=about,
            bundle=bundle,
        )
        _require_same(read_gguf(target), student, path.name)

    write_whole(path, write)


def gguf_to_onnx(source: Path, path: Path) -> None:
    """Write the weights of the GGUF ``source`` as the INT4 ONNX file ``path``. Raises GgufError or ParityError."""
    student = read_gguf(source)

    def write(target: Path) -> None:
        model = build_guard_graph(student.weights, student.config, labels=student.labels)
        target.write_bytes(model.SerializeToString())
        _require_same(read_onnx(target), student, path.name)

    write_whole(path, write)


def bundle_to_gguf(folder: Path, path: Path) -> None:
    """Write the GGUF of the bundle in ``folder`` (its ONNX file, tokenizer and manifest), checksums verified first.

    Raises BundleError for a damaged bundle, and what :func:`onnx_to_gguf` raises.
    """
    from edgeguard.bundle import TOKENIZER_NAME, Bundle
    from edgeguard.manifest import MANIFEST_NAME

    bundle = Bundle.open(folder)
    manifest = bundle.manifest
    onnx_to_gguf(
        bundle.file_for("onnx"),
        path,
        (folder / TOKENIZER_NAME).read_text(encoding="utf-8"),
        control_ids=manifest.template.reserved,
        about={"name": manifest.name, "version": manifest.version, "license": manifest.license},
        labels=manifest.head,
        bundle=json.loads((folder / MANIFEST_NAME).read_text(encoding="utf-8")),
    )


def require_same_weights(found: Weights, expected: Weights, name: str) -> None:
    """Compare two sets of weights integer by integer and scale by scale. Raises ParityError that names the first."""
    if found.keys() != expected.keys():
        raise ParityError(f"{name}: other weights than it was made from: {sorted(found.keys() ^ expected.keys())[:3]}.")
    for key, weight in expected.items():
        pairs = [(a.nibbles, a.scales) if isinstance(a, Int4Weight) else (np.asarray(a),) for a in (found[key], weight)]
        same = len(pairs[0]) == len(pairs[1]) and all(map(_same_bits, *pairs))
        if not same:
            raise ParityError(f"{name}: {key} is not what it was made from. Do not use the file.")


def _require_same(found: OnnxStudent | GgufStudent, expected: OnnxStudent | GgufStudent, name: str) -> None:
    if found.config != expected.config:
        raise ParityError(f"{name}: reads back as {found.config}, made from {expected.config}. Do not use the file.")
    require_same_weights(found.weights, expected.weights, name)


def _same_bits(a: NDArray[Any], b: NDArray[Any]) -> bool:
    return a.dtype == b.dtype and a.shape == b.shape and a.tobytes() == b.tobytes()


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
        # Two's complement, see _Graph._embedding.
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
