"""Exports: folders that an app, a browser or an NPU can bundle, each proved with that platform's own runtime.

``edgeguard export --target T -o DIR`` makes one (:func:`edgeguard.export.make.export_bundle`). A new target is an entry
in :data:`edgeguard.export.target.TARGETS`, a module of that name here, a folder ``samples/NAME`` with its README.md and
code, and a folder ``device_tests/NAME`` in the repository that runs it on devices.

What a target makes from a bundle's integers (numpy, gguf, onnx) is code of this package; what it traces from a torch
model is code of the conversion layer, imported where it is used, and needs a checkout.
"""

from edgeguard.export.target import TARGETS, ExportError

__all__ = ["TARGETS", "ExportError"]
