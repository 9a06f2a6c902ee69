"""From one container to the other without loss: both hold the same INT4 integers, in another order of bytes.

Reading gives :class:`~edgeguard.engines.int4_weights.Int4Weight` as it was written, so nothing is rounded anywhere. A
file that was written is read back and compared, integer by integer, before it takes its place.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

from convert.export.onnx_graph import build_guard_graph
from convert.files import write_whole
from edgeguard.engines.gguf_file import GgufStudent, read_gguf
from edgeguard.engines.gguf_source import OnnxStudent, TranscodeError, read_onnx
from edgeguard.engines.int4_weights import require_same_weights
from edgeguard.errors import ParityError
from edgeguard.export.gguf_write import pre_tokenizer_name, write_guard

__all__ = ["TranscodeError", "bundle_to_gguf", "gguf_to_onnx", "onnx_to_gguf", "read_onnx"]


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

    The tokenizer, ``control_ids``, ``about`` and ``bundle``: see :func:`edgeguard.export.gguf_write.write_guard`.
    ``labels``: where the file does not name them. ``pre_tokenizer``: None to recognize it. Raises TranscodeError,
    GgufError, or ParityError when what was written does not read back as it was.
    """
    student = read_onnx(source)
    names = student.labels or tuple(labels)
    if not names:
        raise TranscodeError(f"{source}: does not name the rows of its head. Pass the labels, as in the manifest.")

    def write(target: Path) -> None:
        write_guard(
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


def _require_same(found: OnnxStudent | GgufStudent, expected: OnnxStudent | GgufStudent, name: str) -> None:
    if found.config != expected.config:
        raise ParityError(f"{name}: reads back as {found.config}, made from {expected.config}. Do not use the file.")
    require_same_weights(found.weights, expected.weights, name)
