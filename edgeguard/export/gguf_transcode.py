"""A bundle's ONNX file as GGUF without loss: both hold the same INT4 integers, in another order of bytes.

The file that was written is read back and compared, integer by integer, before it takes its place. The way back needs
the graph's builder: ``convert/export/transcode.py``.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edgeguard.engines.gguf_file import GgufStudent, read_gguf
from edgeguard.engines.gguf_source import OnnxStudent, TranscodeError, read_onnx
from edgeguard.engines.int4_weights import require_head, require_same_weights
from edgeguard.errors import ParityError
from edgeguard.export.gguf_write import pre_tokenizer_name, write_guard
from edgeguard.files import write_whole

if TYPE_CHECKING:
    from edgeguard.bundle import Bundle

__all__ = ["bundle_to_gguf", "onnx_to_gguf", "require_same_student"]


def bundle_to_gguf(bundle: Bundle, path: Path) -> None:
    """Write the GGUF of ``bundle``: its ONNX file, tokenizer and manifest, for as many tokens as the manifest states.

    Raises BundleError for a bundle without an ONNX file, and what :func:`onnx_to_gguf` raises.
    """
    from edgeguard.bundle import TOKENIZER_NAME

    manifest = bundle.manifest
    onnx_to_gguf(
        bundle.file_for("onnx"),
        path,
        (bundle.path / TOKENIZER_NAME).read_text(encoding="utf-8"),
        control_ids=manifest.template.reserved,
        about={"name": manifest.name, "version": manifest.version, "license": manifest.license},
        labels=manifest.head,
        max_tokens=manifest.max_tokens,
        bundle=manifest.to_dict(),
    )


def onnx_to_gguf(
    source: Path,
    path: Path,
    tokenizer_json: str,
    *,
    control_ids: Collection[int],
    about: Mapping[str, str],
    labels: Sequence[str] = (),
    max_tokens: int | None = None,
    bundle: Mapping[str, Any] | None = None,
) -> None:
    """Write the weights of the ONNX file ``source`` as the GGUF ``path``, whole or not at all.

    The tokenizer, ``control_ids``, ``about`` and ``bundle``: see :func:`edgeguard.export.gguf_write.write_guard`.
    ``labels``: of the head's rows, when known. ``max_tokens``: that the file states, for which llama.cpp makes room;
    None for the graph's. Raises TranscodeError for a file that is no INT4 guard, EngineError for another head,
    GgufError for a tokenizer that llama.cpp cannot split by, ParityError when what was written does not read back as
    it was, ImportError without gguf.
    """
    student = read_onnx(source)
    names = tuple(labels) or student.labels
    if not names:
        raise TranscodeError(f"{source}: does not name the rows of its head. Pass the labels, as in the manifest.")
    require_head(student.config, student.labels, names, source)
    student = student._replace(config=replace(student.config, max_tokens=max_tokens or student.config.max_tokens))

    def write(target: Path) -> None:
        write_guard(
            student.weights,
            student.config,
            names,
            tokenizer_json,
            target,
            control_ids=control_ids,
            pre_tokenizer=pre_tokenizer_name(tokenizer_json),
            about=about,
            bundle=bundle,
        )
        require_same_student(read_gguf(target), student, path.name)

    path.parent.mkdir(parents=True, exist_ok=True)
    write_whole(path, write)


def require_same_student(found: OnnxStudent | GgufStudent, expected: OnnxStudent | GgufStudent, name: str) -> None:
    """Raise ParityError unless shape and weights are the same, bit by bit; ``name``: the file that ``found`` is of."""
    if found.config != expected.config:
        raise ParityError(f"{name}: reads back as {found.config}, made from {expected.config}. Do not use the file.")
    require_same_weights(found.weights, expected.weights, name)
