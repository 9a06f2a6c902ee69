"""Writing files whole or not at all."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from edgeguard import files

if TYPE_CHECKING:
    from numpy.typing import NDArray

__all__ = ["read_json", "write_arrays", "write_json", "write_whole"]


def write_whole(path: Path, write: Callable[[Path], object]) -> None:
    """As :func:`edgeguard.files.write_whole`; the folder is made where there is none."""
    path.parent.mkdir(parents=True, exist_ok=True)
    files.write_whole(path, write)


def write_json(path: Path, data: Any) -> None:  # noqa: ANN401
    """Write ``data`` as readable JSON, whole or not at all."""
    text = json.dumps(data, indent=1, ensure_ascii=False) + "\n"
    write_whole(path, lambda p: p.write_text(text, encoding="utf-8"))


def write_arrays(path: Path, **arrays: NDArray[Any]) -> None:
    """Write named arrays as an ``.npz`` file, whole or not at all."""

    def save(part: Path) -> None:
        with part.open("wb") as stream:  # given a name, numpy would append its own suffix
            np.savez(stream, **arrays)  # type: ignore[arg-type]

    write_whole(path, save)


def read_json(path: Path) -> Any:  # noqa: ANN401
    """Parse a JSON file."""
    return json.loads(path.read_text(encoding="utf-8"))
