"""The steps of a recipe, in order; each reads what the one before wrote and is skipped when its own result is there.

| file | steps |
|---|---|
| ``data.py`` | base, corpus |
| ``teaching.py`` | teacher, label |
| ``training.py`` | student, train, qat |
| ``containers.py`` | gptq, tune, export |
| ``measuring.py`` | evaluate |
| ``bundling.py`` | package |
| ``renewing.py`` | renew, which is no step of ``run`` |

``kept.py`` tells whether a result is there, ``runs.py`` is a training run. No file is named like a step, so that
``convert.steps.evaluate`` is the step alone.
"""

from __future__ import annotations

from pathlib import Path

import click

from convert.recipe import Recipe
from convert.steps.bundling import package
from convert.steps.containers import export, gptq, tune
from convert.steps.data import base, calibration_rows, corpus, evaluation_rows, read_mix, text_side, trimmed_base
from convert.steps.measuring import evaluate, measure, stages
from convert.steps.renewing import renew
from convert.steps.teaching import judge_tests, label, rows_to_judge, teacher
from convert.steps.training import qat, student, train

__all__ = [
    "ORDER",
    "base",
    "calibration_rows",
    "corpus",
    "evaluate",
    "evaluation_rows",
    "export",
    "gptq",
    "judge_tests",
    "label",
    "measure",
    "package",
    "qat",
    "read_mix",
    "renew",
    "rows_to_judge",
    "run",
    "stages",
    "student",
    "teacher",
    "text_side",
    "train",
    "trimmed_base",
    "tune",
]

ORDER = (
    # The student first: whatever is wrong with its shape or its start is told before hours of a teacher.
    *("base", "corpus", "student", "teacher", "label", "train"),
    *("qat", "gptq", "tune", "export", "evaluate", "package"),
)


def run(recipe: Recipe) -> Path:
    """All steps in order; what is there already is kept."""
    result = recipe.build
    for name in ORDER:
        click.echo(f"== {name}", err=True)
        result = globals()[name](recipe)
    return result
