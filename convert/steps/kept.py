"""Whether a step's result is there, and made from what the recipe says now."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from convert.files import read_json, write_json
from convert.recipe import RecipeError

__all__ = ["is_made"]


def is_made(result: Path, inputs: dict[str, Any], folder: Path) -> bool:
    """Whether ``result`` is there. What it is made from is kept in ``folder`` beside everything else of the step.

    Raises RecipeError when something in the folder, a checkpoint for one, was made from other settings.
    """
    record = folder / "inputs.json"
    inputs = json.loads(json.dumps(inputs))
    known = read_json(record) if record.is_file() else None
    if known not in (None, inputs) and any(path != record for path in folder.iterdir()):
        raise RecipeError(f"{folder} was made from other settings than the recipe has now. Remove it, or pass --build.")
    if known != inputs:
        write_json(record, inputs)
    return result.exists()
