"""What the XCTest attached, under the names that the driver reads: python -m device_tests.ios.attachments JOB."""

from __future__ import annotations

import json
import re
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from device_tests.records import DeviceTestError

__all__ = ["collect"]

WANTED = re.compile(r"(measured\.json|(?:golden|rows)\.jsonl\.answers)")
# xcresulttool puts a number and an id before the end of a name: golden.jsonl_0_3F2A....answers
NUMBERED = re.compile(r"_\d+_[0-9A-Fa-f-]{36}")


def collect(job: Path) -> list[str]:
    """Copy the attachments into ``job``; returns their names. Raises DeviceTestError where there are none."""
    folder = job / "attachments"
    found = []
    for attachment in _attachments(folder / "manifest.json"):
        name = NUMBERED.sub("", str(attachment.get("suggestedHumanReadableName", "")))
        if WANTED.fullmatch(name):
            shutil.copyfile(folder / Path(str(attachment["exportedFileName"])).name, job / name)
            found.append(name)
    if "measured.json" not in found:
        raise DeviceTestError(f"{folder}: expected measured.json among the attachments, found {found}.")
    return found


def _attachments(file: Path) -> Iterator[dict[str, Any]]:
    try:
        tests = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise DeviceTestError(
            f"{file}: expected the list of attachments that xcresulttool writes ({error})."
        ) from error
    for test in tests:
        yield from test.get("attachments", [])


if __name__ == "__main__":
    try:
        collect(Path(sys.argv[1]))
    except DeviceTestError as error:
        sys.exit(str(error))
