"""Target ``qnn``: quantized ONNX graphs of fixed lengths for Qualcomm's NPU (HTP), through onnxruntime's QNN provider.

A family of graphs (64, 128, 256, 512 tokens, up to the bundle's limit) names one file of weights: INT8 with a scale for
each output channel, rounded from the bundle's INT4, and 16-bit activations (:mod:`edgeguard.export.qnn_graph`). The
ranges of the activations come from texts: the golden conversations, and those that are passed. They are widened a
little, which 16 bits can afford, so that texts unlike these are not cut.

Verified here with onnxruntime's CPU provider, which computes the same rounding; ``device_tests/qnn`` runs the export on
Qualcomm's own library, as an emulation on x86-64 or on a device.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import os
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edgeguard.export.check_script import check_with_script
from edgeguard.export.golden import golden_conversations
from edgeguard.export.target import Check, ExportError, Target
from edgeguard.prompt import Message, as_messages

if TYPE_CHECKING:
    import onnx

    from edgeguard.bundle import Bundle
    from edgeguard.engines.gguf_source import OnnxStudent
    from edgeguard.export.qnn_graph import Prefix, QuantizedWeights, Range

__all__ = ["FAMILY", "TARGET", "family"]

INSTALL = "pip install 'edgeguard-runtime[qnn]'"
FAMILY = (64, 128, 256, 512)
WEIGHTS = "weights.bin"
HEADROOM = 1.25  # of a range that was seen: a third of a bit of 16
ALIGNMENT = 64
# In logits: of 8-bit weights, 16-bit activations and the reference's own rounding. A fault moves margins by units.
TOLERANCE = 1.0


def family(max_tokens: int) -> tuple[int, ...]:
    """The lengths of the graphs: the usual ones below ``max_tokens``, and that."""
    return (*(length for length in FAMILY if length < max_tokens), max_tokens)


def _make(bundle: Bundle, folder: Path, conversations: Sequence[Sequence[Message]] = ()) -> dict[str, str | None]:
    if not any(entry.engine == "onnx" for entry in bundle.manifest.files.values()):
        raise ExportError(
            f"{bundle.path}: expected a file for the engine 'onnx', found {sorted(bundle.manifest.files)}. A checkout "
            "makes it of a GGUF of edgeguard: python -m convert transcode."
        )
    try:
        from edgeguard.engines.gguf_source import read_onnx
        from edgeguard.export.qnn_graph import build_qnn_graph, quantize_weights
    except ImportError as error:
        raise ExportError(f"the target 'qnn' needs packages that are not installed ({error}): {INSTALL}.") from error
    student = read_onnx(bundle.file_for("onnx"))
    lengths = family(bundle.manifest.max_tokens)
    prefix = _prefix(student, os.path.commonprefix([*map(tuple, bundle.manifest.template.opening.values())]), folder)
    ranges = _ranges(student, prefix, _rows(bundle, conversations), lengths[-1], folder)
    weights = quantize_weights(student.weights, student.config)
    file = _WeightsFile(folder / WEIGHTS, weights)
    names = {length: f"model.{length}.onnx" for length in lengths}
    for length, name in names.items():
        graph, _ = build_qnn_graph(student.weights, student.config, length, prefix, (ranges, weights))
        file.take_from(graph)
        (folder / name).write_bytes(graph.SerializeToString())
    return dict.fromkeys((*names.values(), WEIGHTS))


def _rows(bundle: Bundle, conversations: Sequence[Sequence[Message]]) -> list[list[int]]:
    """Token ids of the texts that ranges are made of."""
    manifest, tokenizer = bundle.manifest, bundle.load_tokenizer()
    own = [as_messages(prompt=vector.prompt, response=vector.response) for vector in manifest.self_test.vectors]
    texts = [*golden_conversations(manifest.max_tokens, own), *map(tuple, conversations)]
    return [manifest.template.encode(tokenizer, text, manifest.max_tokens).ids for text in texts]


def _prefix(student: OnnxStudent, ids: Sequence[int], folder: Path) -> Prefix | None:
    """Keys and values of the tokens that every text begins with; None where there are none."""
    import numpy as np

    from edgeguard.export.qnn_graph import Prefix, build_qnn_graph, key_and_value

    if not ids:
        return None
    graph, _ = build_qnn_graph(student.weights, student.config, len(ids))
    names = [name for layer in range(student.config.num_layers) for name in key_and_value(layer)]
    _tell(graph, names)
    with _session(graph, folder) as session:
        found = session.run(names, {"input_ids": np.array([ids], np.int32), "last": np.array([len(ids) - 1], np.int32)})
    return Prefix(keys=found[0::2], values=found[1::2])


def _ranges(
    student: OnnxStudent, prefix: Prefix | None, rows: Sequence[Sequence[int]], length: int, folder: Path
) -> dict[str, Range]:
    """What the tensors of the float32 graph hold, over all rows; a row is repeated until it is ``length`` long."""
    import numpy as np

    from edgeguard.export.qnn_graph import Range, build_qnn_graph

    graph, names = build_qnn_graph(student.weights, student.config, length, prefix)
    outputs = _tell_extremes(graph, names)
    found = []
    with _session(graph, folder) as session:
        for row in rows:
            ids = np.array([list(itertools.islice(itertools.cycle(row), length))], np.int32)
            feeds = {"input_ids": ids, "last": np.array([len(row) - 1], np.int32)}
            found.append(np.array(session.run(outputs, feeds)))
    low, high = np.min(found, axis=0)[0::2], np.max(found, axis=0)[1::2]
    return {
        name: Range.of(HEADROOM * float(a), HEADROOM * float(b)) for name, a, b in zip(names, low, high, strict=True)
    }


@contextmanager
def _session(graph: onnx.ModelProto, folder: Path) -> Iterator[Any]:
    """The float32 graph in onnxruntime, from a file beside ``folder``: it may be larger than a message can be."""
    import onnx
    import onnxruntime

    with tempfile.TemporaryDirectory(dir=folder.parent) as scratch:
        file = Path(scratch) / "float32.onnx"
        onnx.save(graph, file, save_as_external_data=True, location="float32.bin")
        yield onnxruntime.InferenceSession(str(file), providers=["CPUExecutionProvider"])


def _tell(graph: onnx.ModelProto, names: Sequence[str], shape: Sequence[int] | None = None) -> None:
    """Let the graph return these tensors too."""
    from onnx import TensorProto, helper

    graph.graph.output.extend(helper.make_tensor_value_info(name, TensorProto.FLOAT, shape) for name in names)


def _tell_extremes(graph: onnx.ModelProto, names: Sequence[str]) -> list[str]:
    """Let the graph return the smallest and the largest value of each of these tensors; returns their names."""
    from onnx import helper

    found = [(f"{name}/{op}", op, name) for name in names for op in ("ReduceMin", "ReduceMax")]
    graph.graph.node.extend(helper.make_node(op, [name], [output], keepdims=0) for output, op, name in found)
    outputs = [output for output, _, _ in found]
    _tell(graph, outputs, [])
    return outputs


class _WeightsFile:
    """The integers of the matrices in one file, which graphs of all lengths name."""

    def __init__(self, path: Path, weights: QuantizedWeights) -> None:
        """Write it."""
        self.name = path.name
        self.places: dict[str, tuple[int, int]] = {}
        with path.open("wb") as stream:
            for name, held in weights.items():
                raw = held.integers.tobytes()
                stream.write(bytes(-stream.tell() % ALIGNMENT))
                self.places[name] = (stream.tell(), len(raw))
                stream.write(raw)

    def take_from(self, graph: onnx.ModelProto) -> None:
        """Let the graph name the file instead of holding the integers."""
        from onnx import TensorProto

        from edgeguard.export.qnn_graph import integers_name

        held = {integers_name(name): place for name, place in self.places.items()}
        for tensor in graph.graph.initializer:
            if tensor.name in held:
                offset, size = held[tensor.name]
                tensor.ClearField("raw_data")
                tensor.data_location = TensorProto.EXTERNAL
                for key, value in (("location", self.name), ("offset", offset), ("length", size)):
                    tensor.external_data.add(key=key, value=str(value))


def _check(folder: Path) -> Check:
    check = check_with_script(
        folder, ("onnxruntime", "tokenizers", "numpy"), "onnxruntime", "pip install onnxruntime tokenizers", UNIT="cpu"
    )
    return dataclasses.replace(
        check, not_verified=(*check.not_verified, "no NPU and no emulation of one computed: device_tests/qnn does that")
    )


def _calibrated(conversations: Sequence[Sequence[Message]]) -> Target:
    return dataclasses.replace(TARGET, make=functools.partial(_make, conversations=conversations))


TARGET = Target(
    name="qnn",
    make=_make,
    check=_check,
    samples=("rules.py", "qnn/check.py"),
    packages=("onnx", "onnxruntime", "onnxruntime-qnn", "tokenizers"),
    tolerance=TOLERANCE,
    calibrated=_calibrated,
)
