"""What a target of ``edgeguard export`` is, and which ones there are.

A target is one module of this package, of the target's name, with a :class:`Target` called ``TARGET``; its entry in
:data:`TARGETS` is what ``--help`` shows. The module may be imported without the target's libraries: they are imported
where they are used. What a platform needs beside the model (its README, its code) are files in ``samples/NAME/``.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING

from edgeguard import schema
from edgeguard.errors import EdgeguardError

if TYPE_CHECKING:
    from edgeguard.bundle import Bundle
    from edgeguard.prompt import Message

__all__ = ["SAMPLES", "TARGETS", "Check", "ExportError", "Target", "load_target"]

SAMPLES = Path(__file__).with_name("samples")
TARGETS: Mapping[str, str] = MappingProxyType(
    {
        "gguf": "INT4 (Q4_0) GGUF for llama.cpp: desktops, servers, apps that link it",
        "onnx": "INT4 ONNX for plain onnxruntime: desktops and servers, any of its languages",
        "android": "INT4 ONNX for onnxruntime-android, .pte for ExecuTorch (XNNPACK), Kotlin",
        "ios": "INT4 Core ML package, INT4 GGUF for Metal, .pte for ExecuTorch, Swift",
        "web": "INT4 ONNX for onnxruntime-web: a JavaScript module and a demo page",
        "qnn": "INT8 ONNX (QDQ) of fixed lengths for Qualcomm NPUs, through onnxruntime's QNN provider",
    }
)


class ExportError(EdgeguardError):
    """An export that cannot be made, and why. Nothing was written."""


@dataclass(frozen=True)
class Check:
    """What was verified, and what was not and why: sentences for README and ``--json``.

    ``runtime``: what computed the golden vectors, with its version; None where nothing did. ``vectors``: how many;
    ``largest_difference``: of a margin from the golden one, in logits.
    """

    verified: tuple[str, ...]
    not_verified: tuple[str, ...] = ()
    runtime: str | None = None
    vectors: int = 0
    largest_difference: float | None = None

    @classmethod
    def from_dict(cls, data: object, where: str) -> Check:
        """Read the object ``check`` of ``export.json``. Raises BundleError."""
        fields = schema.record(data, where, list(cls.__dataclass_fields__))
        for name in ("verified", "not_verified"):
            if not isinstance(fields[name], list) or not all(isinstance(line, str) for line in fields[name]):
                schema.fail(f"{where}: {name}", "a list of texts", fields[name])
        largest = fields["largest_difference"]
        return cls(
            verified=tuple(fields["verified"]),
            not_verified=tuple(fields["not_verified"]),
            runtime=schema.optional_text(fields["runtime"], f"{where}: runtime"),
            vectors=schema.integer(fields["vectors"], f"{where}: vectors", low=0, high=10**9),
            largest_difference=None if largest is None else schema.number(largest, f"{where}: largest_difference"),
        )


@dataclass(frozen=True)
class Target:
    """How an export is made and verified.

    ``make``: (bundle, folder) -> model file -> engine of the manifest that runs it, None where none does; writes those
    files into ``folder``, and tokenizer.json where it must not be the bundle's own. The bundle is verified, and its
    ``max_tokens`` is what was asked for. ``check``: (folder) -> what was verified, with the target's own runtime; the
    folder then holds all but README.md and export.json. Both raise an EdgeguardError: ExportError for what cannot be
    made here, ParityError for what does not reproduce the golden vectors. ``samples``: files of ``samples/`` that are
    copied, as paths below it. ``packages``: distributions whose versions the export notes. ``tolerance``: of the golden
    margins, in logits; None for the bundle's own. ``calibrated``: conversations -> the same target, whose ranges of
    activations take them into account; None where nothing is calibrated.
    """

    name: str
    make: Callable[[Bundle, Path], Mapping[str, str | None]]
    check: Callable[[Path], Check]
    samples: tuple[str, ...]
    packages: tuple[str, ...]
    tolerance: float | None = None
    calibrated: Callable[[Sequence[Sequence[Message]]], Target] | None = None


def load_target(name: str) -> Target:
    """The target ``name``. Raises ExportError for an unknown name."""
    if name not in TARGETS:
        raise ExportError(f"unknown target {name!r}. Known targets: {', '.join(TARGETS)}.")
    target = importlib.import_module(f"edgeguard.export.{name}").TARGET
    assert isinstance(target, Target)  # a programming mistake, not user input
    return target
