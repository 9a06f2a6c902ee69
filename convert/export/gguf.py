"""The student as one GGUF file for llama.cpp: the same INT4 integers as in ONNX (Q4_0), tokenizer and head inside."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

from convert.files import write_whole
from convert.quantize import as_int4
from edgeguard.engines.gguf_file import tensor_names
from edgeguard.engines.int4_weights import StudentConfig, Weights
from edgeguard.export.gguf_write import write_guard

__all__ = ["write_gguf"]


def write_gguf(
    weights: Weights,
    config: StudentConfig,
    labels: Sequence[str],
    tokenizer_json: str,
    path: Path,
    *,
    control_ids: Collection[int],
    pre_tokenizer: str,
    about: Mapping[str, str],
    bundle: Mapping[str, Any] | None = None,
) -> None:
    """Write ``path``, whole or not at all; matrices of ``weights`` that are not INT4 yet are rounded.

    Parameters and errors otherwise: :func:`edgeguard.export.gguf_write.write_guard`.
    """
    matrices = [name for name in tensor_names(config.num_layers) if len(weights[name].shape) == 2]
    rounded = {**weights, **{name: as_int4(weights[name]) for name in matrices}}

    def write(target: Path) -> None:
        write_guard(
            rounded,
            config,
            labels,
            tokenizer_json,
            target,
            control_ids=control_ids,
            pre_tokenizer=pre_tokenizer,
            about=about,
            bundle=bundle,
        )

    write_whole(path, write)
