"""The tables of README.md that hold measured or published figures: written from the records, never by hand."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from convert.files import read_json
from convert.report import SHIPPED, comparison_table
from edgeguard.errors import EdgeguardError

__all__ = ["ReadmeError", "render"]

HERE = Path(__file__).resolve().parent
BUNDLE = HERE.parent / "models" / "edgeguard-mini"
COLUMNS = ("openai_moderation", "toxicchat_test", "xstest", "beavertails_test")


class ReadmeError(EdgeguardError):
    """README.md lacks a block, or a block is not what the records say."""


def render(text: str) -> str:
    """``text`` of README.md with every ``<!-- table: NAME -->`` block filled from the records of the shipped bundle."""
    report, manifest = read_json(BUNDLE / "report.json"), read_json(BUNDLE / "manifest.json")
    tables = {
        "guards": _guards(report, manifest),
        "sets": comparison_table(report, "balanced"),
        "low_fpr": comparison_table(report, "low_fpr"),
    }
    for name, table in tables.items():
        pattern = re.compile(rf"(<!-- table: {name} -->\n).*?(<!-- end -->)", re.DOTALL)
        if not pattern.search(text):
            raise ReadmeError(f"README.md has no block '<!-- table: {name} -->' ... '<!-- end -->'.")
        before, after = pattern.split(text)[0::3]
        text = f"{before}<!-- table: {name} -->\n{table}\n<!-- end -->{after}"
    return text


def _guards(report: Mapping[str, Any], manifest: Mapping[str, Any]) -> str:
    """Our guard's F1 and FPR, measured, above other guards' as published."""
    size = sum(entry["bytes"] for entry in manifest["files"].values()) / 1e6
    sets = report["stages"][SHIPPED]["sets"]
    ours = {name: sets[name]["points"]["balanced"] for name in COLUMNS}
    cells = [_cell(100 * m["f1"], m["fpr"]) for m in ours.values()]
    titles = ("OpenAI-Mod", "ToxicChat", "XSTest", "BeaverTails responses")
    head = ["guard", "size", *(f"{title} F1 / FPR" for title in titles), "figures from"]
    own = [f"**{manifest['name']} {manifest['version']}**, INT4", f"{size:.0f} MB", *cells, "measured, `report.json`"]
    lines = [f"| {' | '.join(head)} |", "|---" * len(head) + "|", f"| {' | '.join(own)} |"]
    for row in read_json(HERE / "published.json")["guards"]:
        cells = [_cell(row.get(name), row.get(f"{name.removesuffix('_test')}_fpr")) for name in COLUMNS]
        lines.append(f"| {row['guard']} | {row['size']} | {' | '.join(cells)} | {row['source']} |")
    return "\n".join(lines)


def _cell(f1: float | None, fpr: float | None) -> str:
    if f1 is None:
        return "–"
    return f"{f1:.1f}" if fpr is None else f"{f1:.1f} / {fpr:.3f}"
