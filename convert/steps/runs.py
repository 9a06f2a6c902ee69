"""One training run, of a teacher or of a student, with a table of a recipe as its settings."""

from __future__ import annotations

from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from convert.recipe import Recipe
from convert.steps.data import read_examples, text_side

if TYPE_CHECKING:
    from convert.batches import Example
    from convert.distill import Loss
    from convert.student import Student

__all__ = ["run_training"]


def run_training(
    recipe: Recipe,
    table: dict[str, Any],
    student: Student,
    loss: Loss,
    folder: Path,
    source: Path,
    rows: list[Example],
) -> None:
    """Train a student of the base in ``source`` with a recipe's table of settings; the run is kept in ``folder``."""
    import torch

    from convert.distill import Settings, Trainer

    names = {f.name for f in fields(Settings)}
    settings = Settings(**{name: value for name, value in table.items() if name in names})
    validation = read_examples(recipe, "validation", table["max_tokens"], source)
    torch.manual_seed(settings.seed)  # for LoRA's dropout: the order of the rows is seeded by itself
    Trainer(student, loss, rows, validation, text_side(source)[0].pad_id, settings, folder).run()
