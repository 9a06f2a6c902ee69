"""The two files that the engine ``gguf`` runs, made once of a bundle's GGUF or ONNX file and kept in the cache folder.

A guard's GGUF is a plain Llama with its whole vocabulary. llama.cpp multiplies by all of it (in edgeguard-mini, 28 of
99 million products a token), and when it is asked for hidden states, it does so for every token: with embeddings on, it
makes each token an output. So the engine runs another form of the same integers:

- the **body** is a Llama whose vocabulary is the head, K rows of float32, tied: llama.cpp's logits are the head's, and
  only a row's last token is an output. The bias and what the file was made of are the JSON text ``edgeguard.body``.
- the **embedding** is a numpy array of Q4_0 rows, uint8 [vocabulary, hidden / 32 * 18]: the rows of a text's tokens go
  into llama.cpp as vectors.

Nothing is rounded: integers and scales are those of the bundle. Sources: llama.cpp ``src/llama-context.cpp``
(``decode``: ``output_all``), ``src/llama-vocab.cpp`` (the tokenizer model ``none``).
"""

from __future__ import annotations

import functools
import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from edgeguard import schema
from edgeguard.bundle import sha256_of
from edgeguard.cache import cached
from edgeguard.engines.gguf_file import ARCHITECTURE, GgufStudent, add_config, add_weights, finish, read_gguf
from edgeguard.engines.int4_weights import Int4Weight, require_head
from edgeguard.errors import EngineError

if TYPE_CHECKING:
    from edgeguard.bundle import Bundle
    from edgeguard.engines.gguf_source import OnnxStudent

__all__ = ["BODY_KEY", "EngineFiles", "engine_files"]

BODY_KEY = "edgeguard.body"
FILES_FORMAT = 1  # part of the names: files of another format are never met
EMBEDDING = "model.embed_tokens.weight"


@dataclass(frozen=True)
class EngineFiles:
    """The two files, and the SHA-256 of the bundle's file that they were made of."""

    body: Path
    embedding: Path
    source: str


def engine_files(bundle: Bundle) -> EngineFiles:
    """The body and the embedding of ``bundle``, made first where the cache has none (a second or two).

    Raises EngineError for a file that is no INT4 guard of edgeguard, or not this bundle's; BundleError when the bundle
    has neither a GGUF nor an ONNX file; ImportError when the packages that read them are not installed.
    """
    engine = "gguf" if any(entry.engine == "gguf" for entry in bundle.manifest.files.values()) else "onnx"
    file = bundle.file_for(engine)
    source = bundle.manifest.files[file.name].sha256
    student = functools.cache(lambda: _read(bundle, file, source))
    name = f"{bundle.manifest.name}-{source[:32]}-gguf{FILES_FORMAT}"
    return EngineFiles(
        body=cached(f"{name}.gguf", lambda path: _write_body(student(), bundle, source, path)),
        embedding=cached(f"{name}.npy", lambda path: _write_embedding(student(), path)),
        source=source,
    )


def _read(bundle: Bundle, file: Path, source: str) -> GgufStudent | OnnxStudent:
    """The weights of ``file``, when they are this bundle's."""
    manifest = bundle.manifest
    if (found := sha256_of(file)) != source:  # a bundle opened without verifying must not leave its mark in the cache
        raise EngineError(f"{file}: expected sha256 {source}, found {found}. Download the bundle again.")
    student: GgufStudent | OnnxStudent
    if manifest.files[file.name].engine == "gguf":
        student = read_gguf(file)
        stated = str(student.metadata.get("edgeguard.bundle", "{}"))
        made_for = schema.json_object(stated.encode(), f"{file}: edgeguard.bundle")
        if made_for and (made_for.get("name"), made_for.get("version")) != (manifest.name, manifest.version):
            raise EngineError(
                f"{file}: expected the model of {bundle.label}, found that of {made_for.get('name')}@"
                f"{made_for.get('version')}. Make the bundle again."
            )
    else:
        from edgeguard.engines.gguf_source import read_onnx

        student = read_onnx(file)
    require_head(student.config, student.labels, manifest.head, file)
    return student


def _write_body(student: GgufStudent | OnnxStudent, bundle: Bundle, source: str, path: Path) -> None:
    """The layers, with the head in the vocabulary's place."""
    from gguf import GGUFWriter

    about = {
        "source": source,
        "labels": bundle.manifest.head,
        "bias": np.asarray(student.weights["head.bias"], np.float32).tolist(),
    }
    writer = GGUFWriter(path, ARCHITECTURE)
    writer.add_string("general.name", bundle.manifest.name)
    writer.add_string(BODY_KEY, json.dumps(about))
    writer.add_tokenizer_model("none")
    add_config(writer, replace(student.config, vocab_size=student.config.head_size))
    add_weights(writer, {**student.weights, EMBEDDING: student.weights["head.weight"]}, student.config)
    finish(writer)


def _write_embedding(student: GgufStudent | OnnxStudent, path: Path) -> None:
    weight = student.weights[EMBEDDING]
    if not isinstance(weight, Int4Weight):
        raise EngineError("expected an embedding in INT4, found one of floats. Make the bundle again.")
    with path.open("wb") as stream:
        np.save(stream, weight.pack_q4_0())
