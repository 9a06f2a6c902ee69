"""Options that several commands share, and how they become a Guard."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, TypeVar

import click

if TYPE_CHECKING:
    from edgeguard.guard import Guard

__all__ = ["bundle_option", "guard_options", "json_option", "load_guard", "threads_option", "threshold_of"]

Function = TypeVar("Function", bound=Callable[..., object])

bundle_option = click.option(
    "--bundle", metavar="DIR", default=None, help="Folder of the bundle, or hf://owner/name. Default: the shipped one."
)
json_option = click.option("--json", "as_json", is_flag=True, help="Print one JSON object a line, for programs.")
_operating_point = click.option(
    "--operating-point",
    metavar="NAME",
    default="balanced",
    show_default=True,
    help="Named threshold of the bundle: balanced, low_fpr (few false alarms) or high_recall (few misses).",
)
threads_option = click.option(
    "--threads", metavar="N", type=click.IntRange(min=1), help="CPU threads. Default: the engine's."
)
_engine = click.option("--engine", metavar="NAME", default="auto", show_default=True, help="What runs the model.")


def guard_options(function: Function) -> Function:
    """Add --bundle, --operating-point, --threads and --engine to a command."""
    for option in (_engine, threads_option, _operating_point, bundle_option):  # the last one added is listed first
        function = option(function)
    return function


def load_guard(bundle: str | None, operating_point: str, threads: int | None, engine: str) -> Guard:
    """Open the bundle. Imports the engine here, not at module level, so that --help stays quick."""
    from edgeguard.guard import Guard

    return Guard.load(bundle, engine=engine, operating_point=operating_point, threads=threads)


def threshold_of(guard: Guard, operating_point: str, target: str) -> float:
    """The p_unsafe from which the guard flags a ``target`` (prompt or response)."""
    return guard.bundle.manifest.thresholds[operating_point][target]
