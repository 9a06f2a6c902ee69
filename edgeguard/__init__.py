"""edgeguard: an on-device safety classifier.

``Guard.load().classify(text)`` reads text in one forward pass, offline, and returns a :class:`Verdict`. Importing the
package loads numpy only; the engine and the tokenizer are imported when a guard is loaded.
"""

from edgeguard.errors import (
    BundleError,
    EdgeguardError,
    EngineError,
    InputError,
    ParityError,
    PolicyError,
)
from edgeguard.guard import Guard
from edgeguard.verdict import Verdict

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

__version__ = "0.3.0"
