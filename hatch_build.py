"""Build hook: put the shipped bundle into the wheel as package data.

A wheel without its bundle could not judge anything, so building one without it fails. An editable install needs no
copy: the runtime finds ``models/edgeguard-mini`` in the checkout.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface

BUNDLE = "models/edgeguard-mini"


class BundleHook(BuildHookInterface[Any]):  # type: ignore[misc, unused-ignore]
    """Adds the bundle folder to the wheel's force-include table."""

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        """Called by hatch before each build; ``version`` is ``standard`` or ``editable``."""
        if self.target_name != "wheel" or version == "editable":
            return
        source = Path(self.root) / BUNDLE
        if not (source / "manifest.json").is_file():
            raise FileNotFoundError(f"{source}: expected the shipped bundle, found no manifest.json. Make it first.")
        build_data["force_include"][str(source)] = f"edgeguard/{BUNDLE}"
