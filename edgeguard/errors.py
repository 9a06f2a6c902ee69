"""The errors edgeguard raises. All derive from :class:`EdgeguardError`, so one ``except`` fails closed."""

from __future__ import annotations

__all__ = ["BundleError", "EdgeguardError", "EngineError", "InputError", "ParityError", "PolicyError"]


class EdgeguardError(Exception):
    """Base of every error of this package: the guard could not judge, so nothing was called safe."""


class BundleError(EdgeguardError):
    """A bundle is missing, damaged, of an unknown format, or does not reproduce its self-test."""


class InputError(EdgeguardError):
    """The text or conversation given cannot be judged (empty, wrong type, unknown role)."""


class PolicyError(EdgeguardError):
    """An operating point or threshold that the bundle does not define."""


class EngineError(EdgeguardError):
    """The engine asked for is not installed, or failed while running."""


class ParityError(EdgeguardError):
    """An export does not reproduce the model that it was made from."""
