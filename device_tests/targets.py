"""Targets that have a folder here, and where each of them runs."""

from __future__ import annotations

import importlib.util
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType

from device_tests.records import DeviceTestError

__all__ = ["ROOT", "TARGETS", "DeviceTarget", "find_target", "missing_here"]

ROOT = Path(__file__).resolve().parent


@dataclass(frozen=True)
class DeviceTarget:
    """A folder with ``run.sh``.

    ``export``: the export target that it runs; ``kind``: of the devices that it runs on (local, adb or xcrun);
    ``units``: of compute that can be asked for, the usual one first; ``modules``, ``programs``: Python packages
    and programs that this machine needs for it; ``model``: the file that it runs, of an export that has several.
    """

    name: str
    export: str
    kind: str
    units: tuple[str, ...]
    modules: tuple[str, ...]
    programs: tuple[str, ...] = ()
    model: str | None = None

    @property
    def script(self) -> Path:
        """What runs it."""
        return ROOT / self.name / "run.sh"


TARGETS: Mapping[str, DeviceTarget] = MappingProxyType(
    {
        target.name: target
        for target in (
            DeviceTarget("onnx", "onnx", "local", ("cpu",), ("onnxruntime", "tokenizers")),
            DeviceTarget("gguf", "gguf", "local", ("cpu", "gpu"), ("llama_cpp", "gguf")),
            DeviceTarget("android", "android", "adb", ("cpu",), (), model="model.onnx"),
            DeviceTarget("executorch", "android", "local", ("cpu",), ("executorch", "tokenizers"), model="model.pte"),
            DeviceTarget("ios", "ios", "xcrun", ("npu", "gpu", "cpu"), (), model="model.mlpackage.zip"),
            DeviceTarget("web", "web", "local", ("cpu",), (), ("node",)),
            DeviceTarget("qnn", "qnn", "local", ("npu", "cpu"), ("onnxruntime_qnn", "tokenizers")),
        )
    }
)


def find_target(name: str) -> DeviceTarget:
    """The target ``name``. Raises DeviceTestError for an unknown one."""
    if name not in TARGETS:
        raise DeviceTestError(f"unknown target {name!r}. Known targets: {', '.join(TARGETS)}.")
    return TARGETS[name]


def missing_here(target: DeviceTarget) -> list[str]:
    """Python packages and programs that the target needs on this machine and that are not installed."""
    absent = [name for name in target.modules if importlib.util.find_spec(name) is None]
    return absent + [name for name in target.programs if shutil.which(name) is None]
