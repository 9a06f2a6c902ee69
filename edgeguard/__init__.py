"""edgeguard: an on-device safety classifier.

``Guard.load().classify(text)`` reads text in one forward pass, offline, and returns a :class:`Verdict`. Importing the
package loads nothing beside the standard library: ``Guard`` brings numpy when it is first named, the engine and the
tokenizer come when a guard is loaded.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from edgeguard.errors import (
    BundleError,
    EdgeguardError,
    EngineError,
    InputError,
    ParityError,
    PolicyError,
)
from edgeguard.verdict import Verdict

if TYPE_CHECKING:
    from edgeguard.guard import Guard

__all__ = [
    "BundleError",
    "EdgeguardError",
    "EngineError",
    "Guard",
    "InputError",
    "ParityError",
    "PolicyError",
    "Verdict",
    "__version__",
]

__version__ = "0.4.0"


def __getattr__(name: str) -> object:
    """Import ``Guard`` when it is first named (PEP 562)."""
    if name == "Guard":
        from edgeguard.guard import Guard

        return Guard
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
