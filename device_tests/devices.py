"""Devices that are connected: this machine, Android through adb, Apple through xcrun."""

from __future__ import annotations

import platform
import re
import shutil
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass

from edgeguard.bench.device import describe_device

__all__ = ["ConnectedDevice", "Found", "find_devices", "parse_adb", "parse_xctrace"]

WITHIN_S = 30
APPLE_LINE = re.compile(r"(?P<name>.+?)(?: \((?P<version>[\d.]+)\))? \((?P<id>[0-9A-Fa-f-]{8,})\)")


@dataclass(frozen=True)
class ConnectedDevice:
    """A device that can be reached.

    ``kind``: local, adb or xcrun; ``id``: as that tool names it; ``state``: ready, or why not; ``emulated``: an
    emulator or simulator.
    """

    kind: str
    id: str
    name: str
    state: str
    emulated: bool


@dataclass(frozen=True)
class Found:
    """Devices, and a sentence for each tool that is absent or failed."""

    devices: tuple[ConnectedDevice, ...]
    absent: tuple[str, ...]


def find_devices() -> Found:
    """Look for all of them; a tool that is absent is said to be absent."""
    devices = [ConnectedDevice("local", "local", f"{describe_device().cpu}, {platform.system()}", "ready", False)]
    absent = []
    for command, what, parse in (
        (["adb", "devices", "-l"], "Android devices: install Android's platform-tools", parse_adb),
        (["xcrun", "xctrace", "list", "devices"], "Apple devices: needs a Mac with Xcode", parse_xctrace),
    ):
        if shutil.which(command[0]) is None:
            absent.append(f"{command[0]} is not installed ({what}).")
            continue
        output = _output(command)
        if output is None:
            absent.append(f"'{' '.join(command)}' failed ({what}).")
        else:
            devices += parse(output)
    return Found(tuple(devices), tuple(absent))


def parse_adb(text: str) -> list[ConnectedDevice]:
    """The lines of ``adb devices -l``: id, state, and ``model:NAME`` among other facts."""
    found = []
    for line in text.splitlines():
        words = line.split()
        if len(words) < 2 or line.startswith(("List of", "*")):
            continue
        model = next((word.removeprefix("model:") for word in words if word.startswith("model:")), words[0])
        state = "ready" if words[1] == "device" else words[1]
        found.append(ConnectedDevice("adb", words[0], model.replace("_", " "), state, words[0].startswith("emulator-")))
    return found


def parse_xctrace(text: str) -> list[ConnectedDevice]:
    """The lines of ``xcrun xctrace list devices``: headings ``== Devices ==``, then ``NAME (VERSION) (ID)``."""
    found, heading = [], ""
    for line in text.splitlines():
        if line.startswith("=="):
            heading = line.strip("= ")
        elif (match := APPLE_LINE.fullmatch(line.strip())) is not None:
            name = match["name"] + (f" {match['version']}" if match["version"] else "")
            state = "offline" if "Offline" in heading else "ready"
            found.append(ConnectedDevice("xcrun", match["id"], name, state, heading.startswith("Simulators")))
    return found


def _output(command: Sequence[str]) -> str | None:
    """What a command prints on either stream (xctrace uses stderr); None when it fails."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=WITHIN_S, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout + done.stderr if done.returncode == 0 else None
