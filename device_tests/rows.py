"""Public rows for verdict agreement: drawn from labelled sets by a seed, judged by the reference first."""

from __future__ import annotations

import random

from convert.corpora.registry import Row, read_set
from device_tests.records import Agreement, DeviceTestError
from edgeguard.export.golden import Answer, Golden, golden_lines
from edgeguard.guard import Guard

__all__ = ["SETS", "agreement_of", "draw_rows", "reference_lines"]

SETS = ("openai_moderation", "toxicchat_test", "xstest", "beavertails_test")


def draw_rows(count: int, seed: int) -> list[Row]:
    """``count`` rows, as many of each set as of any other, the same ones for a seed.

    Raises CorpusError without the data, DeviceTestError when there are not so many rows.
    """
    drawn: list[Row] = []
    for number, name in enumerate(SETS):
        rows = [row for row in read_set(name) if row.messages() and row.messages()[-1][1].strip("\x00 \t\r\n")]
        wanted = (count + len(SETS) - 1 - number) // len(SETS)
        if wanted > len(rows):
            raise DeviceTestError(f"{name}: expected {wanted} rows to draw, found {len(rows)}. Ask for fewer rows.")
        drawn += random.Random(f"{seed}/{name}").sample(rows, wanted)
    return drawn


def reference_lines(guard: Guard, rows: list[Row], tolerance: float) -> list[Golden]:
    """What the reference makes of the rows, in the format of golden vectors."""
    return list(golden_lines(guard, (row.messages() for row in rows), tolerance))


def agreement_of(rows: list[Row], golden: list[Golden], answers: list[Answer], seed: int) -> Agreement:
    """Compare decisions row by row. Raises DeviceTestError for another number of answers."""
    if len(answers) != len(golden):
        raise DeviceTestError(f"expected {len(golden)} answers to the public rows, found {len(answers)}.")
    pairs = list(zip(golden, answers, strict=True))
    differences = [abs(wanted.margin - found.margin) for wanted, found in pairs]
    differing = [row.id for row, (a, b) in zip(rows, pairs, strict=True) if a.action != b.action]
    return Agreement(
        rows=len(rows),
        agree=len(rows) - len(differing),
        share=1 - len(differing) / len(rows),
        same_ids=sum(answer.same_ids for answer in answers),
        largest_difference=max(differences),
        mean_difference=sum(differences) / len(differences),
        sets={name: sum(row.set == name for row in rows) for name in SETS},
        seed=seed,
        differing=tuple(differing),
    )
