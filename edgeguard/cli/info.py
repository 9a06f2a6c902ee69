"""``edgeguard info``: the bundle, its measured figures, and what runs it here."""

from __future__ import annotations

import platform
from collections.abc import Mapping
from typing import Any

import click

from edgeguard.cli.options import guard_options, json_option, load_guard
from edgeguard.cli.output import NOT_MEASURED, console, emit_json, figure, size

__all__ = ["info_command"]

LIBRARIES = ("numpy", "tokenizers", "onnxruntime", "llama-cpp-python")
FIGURES = ("f1", "precision", "recall", "fpr")


@click.command("info", short_help="Show the bundle, its figures and the engine.")
@guard_options
@json_option
def info_command(as_json: bool, **guard_settings: Any) -> None:  # noqa: ANN401 - checked by click
    """Show the bundle with its measured figures, the engine and the versions.

    The bundle is loaded and tested as for classify, so what is shown does run. The figures of the operating points
    were measured when the bundle was made, on its calibration split; see edgeguard eval for your own data.

    \b
    edgeguard info
    edgeguard info --bundle ./my-bundle --json

    Exit codes: 0 fine, 1 the bundle cannot be used, 2 wrong usage.
    """  # noqa: D301 - click reads \b
    from edgeguard.bench.device import versions

    info = {**load_guard(**guard_settings).info(), "versions": versions(LIBRARIES), "machine": _machine()}
    if as_json:
        emit_json(info)
    else:
        _show(info)


def _machine() -> dict[str, str]:
    from edgeguard.bench.device import cpu_name

    return {
        "cpu": cpu_name(),
        "architecture": platform.machine(),
        "system": f"{platform.system()} {platform.release()}",
    }


def _show(info: Mapping[str, Any]) -> None:
    """Facts, then a table of the operating points."""
    from rich.table import Table
    from rich.text import Text

    out = console()
    for name, value in _facts(info):
        out.print(Text(f"{name:<15}", style="bold"), value, sep="")
    table = Table(title="Operating points, measured on the calibration split", title_justify="left")
    table.add_column("name")
    table.add_column("judges")
    for name in ("flags from", *FIGURES, "rows"):
        table.add_column(name, justify="right")
    for name, point in info["manifest"]["operating_points"].items():
        for target, threshold in point["thresholds"].items():
            measured = point["measured"][target]
            row = (figure(threshold), *(figure(measured[column]) for column in FIGURES), f"{measured['n']:,}")
            table.add_row(name, target, *row)
    out.print(table)


def _facts(info: Mapping[str, Any]) -> list[tuple[str, str]]:
    manifest, engine = info["manifest"], info["engine"]
    asked = ", ".join(engine["providers_asked"])
    return [
        ("bundle", info["bundle"]),
        ("folder", info["path"]),
        ("size", f"{size(info['size_bytes'])} in {len(manifest['files'])} files"),
        ("licence", manifest["license"]),
        ("base model", manifest["base_model"]),
        ("teacher", manifest["teacher"] or NOT_MEASURED),
        ("languages", ", ".join(manifest["languages"])),
        ("max tokens", str(manifest["max_tokens"])),
        ("quantization", _quantization(manifest["quantization"])),
        ("engine", f"{engine['name']} {engine['version']}, {', '.join(engine['providers'])} (asked: {asked})"),
        ("chosen", _choice(engine["choice"])),
        ("threads", str(engine["threads"])),
        ("versions", ", ".join(f"{name} {version or NOT_MEASURED}" for name, version in info["versions"].items())),
        ("machine", ", ".join(info["machine"].values())),
    ]


def _choice(found: Mapping[str, Any] | None) -> str:
    """Why this engine: what each took for a short message."""
    if found is None:
        return "by name, or the only one"
    fastest_first = sorted(found["latency_ms"].items(), key=lambda item: float(item[1]))
    times = [f"{name} {ms:.1f} ms" for name, ms in fastest_first] + [f"{name} refused" for name in found["refused"]]
    return f"measured here: {', '.join(times)}"


def _quantization(found: Mapping[str, Any] | None) -> str:
    if found is None:
        return "none"
    low, high = found["grid"]
    what = "embedding too" if found["embedding"] else "not the embedding"
    return f"{found['scheme']} [{low}, {high}], groups of {found['group_size']}, {found['scale_dtype']} scales, {what}"
