"""A guard as a Core ML package: INT4 weights with their own scales, FP16 arithmetic, one function a length.

The program is built from the bundle's integers (no torch, no tracing): ``constexpr_blockwise_shift_scale`` holds
nibbles and FP16 scales of groups of 32 as they are in the bundle, so nothing is rounded again. Core ML compiles for
fixed shapes, so there is a function for each of a few lengths (``tokens_64``, ...); all share one file of weights.

Inputs: ``input_ids`` int32 [1, length], padding on the right (any id: causal attention hides it), and ``last``
int32 [1], the place of the last token. Output: ``logits`` FP16 [1, K]. iOS 18, macOS 15 and newer.

FP16 ends at 65504, which squares in a norm would pass: a row is divided by its largest magnitude first.

Sources: coremltools 9 (``converters/mil/mil/ops/defs``: operators; ``models/utils.py``: functions that share weights),
transformers ``models/llama/modeling_llama.py`` (semantics).
"""

from __future__ import annotations

import contextlib
import io
import logging
import shutil
import tempfile
import zipfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgeguard.engines.int4_weights import Int4Weight, StudentConfig, Weights, check_weights

__all__ = ["LENGTHS", "function_name", "open_package", "write_package"]

LENGTHS = (64, 128, 256, 512)
MASKED = -1e4  # added to the score of a later token; FP16 holds it
LEAST = 1e-3  # of a row's largest magnitude, which it is divided by
PACKAGE = "model.mlpackage"
ZIP_TIME = (1980, 1, 1, 0, 0, 0)  # equal weights give equal bytes


def write_package(
    weights: Weights, config: StudentConfig, path: Path, *, about: str, lengths: Sequence[int] = LENGTHS
) -> list[int]:
    """Write the zipped package ``path``; returns the lengths of its functions.

    ``lengths`` over ``config.max_tokens`` become that; ``about``: one line for the package's description. Raises
    ValueError for a missing, unknown or misshapen weight, ImportError without coremltools.
    """
    check_weights(weights, config)
    fixed = sorted({min(length, config.max_tokens) for length in (*lengths, config.max_tokens)})
    with _quiet():
        model = _convert(_program(weights, config, fixed))
        model.short_description = about
        model.license = "Apache-2.0"
        with tempfile.TemporaryDirectory() as scratch:
            package = Path(scratch) / PACKAGE
            model.save(str(package))
            _zip(package, path)
    return fixed


def function_name(length: int) -> str:
    """Of the function that reads rows of ``length`` tokens."""
    return f"tokens_{length}"


@contextlib.contextmanager
def open_package(path: Path) -> Iterator[Path]:
    """The unzipped package, gone afterwards."""
    with tempfile.TemporaryDirectory() as scratch:
        shutil.unpack_archive(path, scratch, "zip")
        yield Path(scratch) / PACKAGE


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Coremltools shows its progress, and warns of torch versions, which nothing here uses."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with contextlib.redirect_stderr(io.StringIO()):
            yield
    finally:
        logging.disable(before)


def _zip(package: Path, path: Path) -> None:
    with zipfile.ZipFile(path, "w", zipfile.ZIP_STORED) as archive:
        for file in sorted(p for p in package.rglob("*") if p.is_file()):
            entry = zipfile.ZipInfo(f"{PACKAGE}/{file.relative_to(package).as_posix()}", ZIP_TIME)
            archive.writestr(entry, file.read_bytes())


def _convert(program: Any) -> Any:  # noqa: ANN401 - a MIL program -> an MLModel
    import coremltools as ct
    from coremltools.converters.mil.converter import mil_convert
    from coremltools.converters.mil.mil.passes.pass_registry import PASS_REGISTRY

    PASS_REGISTRY["common::const_deduplication"]._deduplicate_const_across_functions(program)
    program.skip_all_passes = True  # the program is written as it is meant
    return mil_convert(
        program,
        convert_to="mlprogram",
        convert_from="milinternal",
        specification_version=ct.target.iOS18.value,
        compute_units=ct.ComputeUnit.CPU_ONLY,
        export_multi_functions=True,
        skip_model_load=True,
    )


def _program(weights: Weights, config: StudentConfig, lengths: Sequence[int]) -> Any:  # noqa: ANN401 - a MIL program
    from coremltools.converters.mil.mil import Program

    program = Program()
    for length in lengths:
        program.add_function(function_name(length), _function(weights, config, length))
    program.default_function_name = function_name(lengths[-1])
    program.export_as_multifunction = True
    return program


def _function(weights: Weights, config: StudentConfig, length: int) -> Any:  # noqa: ANN401 - a MIL function
    import coremltools as ct
    from coremltools.converters.mil.mil import Builder as mb
    from coremltools.converters.mil.mil import types

    specs = [mb.TensorSpec((1, length), types.int32), mb.TensorSpec((1,), types.int32)]

    @mb.function(input_specs=specs, opset_version=ct.target.iOS18)  # type: ignore[untyped-decorator]
    def function(input_ids: Any, last: Any) -> Any:  # noqa: ANN401 - MIL variables
        return _Guard(mb, types, weights, config, length).logits(input_ids, last)

    return function


class _Guard:
    """Adds the operators of one function to the program being built; arguments and results are its variables."""

    def __init__(self, mb: Any, types: Any, weights: Weights, config: StudentConfig, length: int) -> None:  # noqa: ANN401
        self.mb, self.types, self.weights, self.config, self.length = mb, types, weights, config, length

    def logits(self, ids: Any, last: Any) -> Any:  # noqa: ANN401
        mb, cfg = self.mb, self.config
        x = mb.gather(x=self._weight("model.embed_tokens.weight"), indices=ids, axis=0)
        cos, sin = _rope(cfg, self.length)
        bias = np.triu(np.full((self.length, self.length), MASKED, np.float16), 1)
        for index in range(cfg.num_layers):
            tables = (cos, sin, bias)
            if index == cfg.num_layers - 1:  # keys and values of all tokens, all else of the last one
                tables = tuple(mb.gather(x=table, indices=last, axis=0) for table in tables)
            x = self._layer(f"model.layers.{index}.", x, (cos, sin), tables, last if tables[0] is not cos else None)
        x = mb.squeeze(x=self._norm("model.norm.weight", x), axes=[1])
        head, offset = (np.asarray(self.weights[f"head.{part}"], np.float16) for part in ("weight", "bias"))
        return mb.linear(x=x, weight=head, bias=offset, name="logits")

    def _layer(self, prefix: str, x: Any, turns: Any, tables: Any, last: Any) -> Any:  # noqa: ANN401
        mb, cfg = self.mb, self.config
        normed = self._norm(prefix + "input_layernorm.weight", x)
        k = self._turn(self._heads(prefix + "self_attn.k_proj.weight", normed, cfg.num_kv_heads), *turns)
        v = self._heads(prefix + "self_attn.v_proj.weight", normed, cfg.num_kv_heads)
        rows = self.length
        if last is not None:
            rows, x, normed = 1, *(mb.gather(x=t, indices=last, axis=1) for t in (x, normed))
        q = self._turn(self._heads(prefix + "self_attn.q_proj.weight", normed, cfg.num_heads), *tables[:2])
        q = mb.mul(x=q, y=np.float16(cfg.head_dim**-0.5))
        # The heads that share keys stand one below the other, so keys and values are never repeated.
        together = (1, cfg.num_kv_heads, cfg.num_heads // cfg.num_kv_heads * rows)
        apart = (1, cfg.num_heads, rows)
        scores = mb.matmul(x=mb.reshape(x=q, shape=(*together, cfg.head_dim)), y=k, transpose_y=True)
        scores = mb.add(x=mb.reshape(x=scores, shape=(*apart, self.length)), y=tables[2])
        shares = mb.reshape(x=mb.softmax(x=scores, axis=-1), shape=(*together, self.length))
        mixed = mb.transpose(x=mb.reshape(x=mb.matmul(x=shares, y=v), shape=(*apart, cfg.head_dim)), perm=[0, 2, 1, 3])
        mixed = mb.reshape(x=mixed, shape=(1, rows, cfg.query_size))
        x = mb.add(x=x, y=self._linear(prefix + "self_attn.o_proj.weight", mixed))
        normed = self._norm(prefix + "post_attention_layernorm.weight", x)
        gate = mb.silu(x=self._linear(prefix + "mlp.gate_proj.weight", normed))
        both = mb.mul(x=gate, y=self._linear(prefix + "mlp.up_proj.weight", normed))
        return mb.add(x=x, y=self._linear(prefix + "mlp.down_proj.weight", both))

    def _heads(self, name: str, normed: Any, heads: int) -> Any:  # noqa: ANN401
        """[1, rows, hidden] -> [1, heads, rows, width]."""
        x = self._linear(name, normed)
        x = self.mb.reshape(x=x, shape=(1, x.shape[1], heads, self.config.head_dim))
        return self.mb.transpose(x=x, perm=[0, 2, 1, 3])

    def _turn(self, x: Any, cos: Any, sin: Any) -> Any:  # noqa: ANN401
        """RoPE; the tables are [rows, width]."""
        mb, half = self.mb, self.config.head_dim // 2
        first = mb.slice_by_index(x=x, begin=[0, 0, 0, 0], end=[*x.shape[:3], half])
        second = mb.slice_by_index(x=x, begin=[0, 0, 0, half], end=list(x.shape))
        turned = mb.concat(values=[mb.mul(x=second, y=np.float16(-1)), first], axis=-1)
        return mb.add(x=mb.mul(x=x, y=cos), y=mb.mul(x=turned, y=sin))

    def _norm(self, name: str, x: Any) -> Any:  # noqa: ANN401
        """RMSNorm of rows divided by their largest magnitude."""
        mb = self.mb
        largest = mb.reduce_max(x=mb.abs(x=x), axes=[-1], keep_dims=True)
        largest = mb.maximum(x=largest, y=np.float16(LEAST))
        share = mb.real_div(x=x, y=largest)
        # eps / largest^2 as a square of what FP16 can hold
        root = mb.real_div(x=np.float16(self.config.rms_norm_eps**0.5), y=largest)
        mean = mb.reduce_mean(x=mb.mul(x=share, y=share), axes=[-1], keep_dims=True)
        power = mb.rsqrt(x=mb.add(x=mean, y=mb.mul(x=root, y=root)), epsilon=1e-7)
        return mb.mul(x=mb.mul(x=share, y=power), y=np.asarray(self.weights[name], np.float16))

    def _linear(self, name: str, x: Any) -> Any:  # noqa: ANN401
        return self.mb.linear(x=x, weight=self._weight(name))

    def _weight(self, name: str) -> Any:  # noqa: ANN401
        weight = self.weights[name]
        if not isinstance(weight, Int4Weight):
            raise ValueError(f"{name}: expected INT4 integers, found {weight.dtype}.")
        integers = (weight.nibbles.astype(np.int8) - np.int8(8)).astype(self.types.np_int4_dtype)
        return self.mb.constexpr_blockwise_shift_scale(data=integers, scale=weight.scales)


def _rope(config: StudentConfig, length: int) -> tuple[NDArray[np.float16], NDArray[np.float16]]:
    """Cosines and sines [length, head_dim], both halves alike."""
    steps = np.arange(0, config.head_dim, 2, dtype=np.float32) / np.float32(config.head_dim)
    divisors = np.float32(config.rope_theta) ** steps
    if config.rope_factors is not None:
        divisors *= np.array(config.rope_factors, np.float32)
    angles = np.tile(np.arange(length, dtype=np.float32)[:, None] / divisors, 2)
    return np.cos(angles).astype(np.float16), np.sin(angles).astype(np.float16)
