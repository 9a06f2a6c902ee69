"""From GGUF back to ONNX without loss; the other way: :mod:`edgeguard.export.gguf_transcode`.

Reading gives :class:`~edgeguard.engines.int4_weights.Int4Weight` as it was written, so nothing is rounded anywhere.
"""

from __future__ import annotations

from pathlib import Path

from convert.export.onnx_graph import build_guard_graph
from convert.files import write_whole
from edgeguard.engines.gguf_file import read_gguf
from edgeguard.engines.gguf_source import read_onnx
from edgeguard.export.gguf_transcode import require_same_student

__all__ = ["gguf_to_onnx"]


def gguf_to_onnx(source: Path, path: Path) -> None:
    """Write the weights of the GGUF ``source`` as the INT4 ONNX file ``path``. Raises GgufError or ParityError."""
    student = read_gguf(source)

    def write(target: Path) -> None:
        model = build_guard_graph(student.weights, student.config, labels=student.labels)
        target.write_bytes(model.SerializeToString())
        require_same_student(read_onnx(target), student, path.name)

    write_whole(path, write)
