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
BENCH = HERE.parent / "docs" / "bench"
SPEEDS = {"mini": (64, 256), "1b": (128,)}  # runs of docs/bench/record.sh, and the lengths of theirs to show
ENGINES = ("onnx-int8", "onnx", "llama-cpp-python")
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
        "speed": _speed(),
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


def _speed() -> str:
    """Latency, ratio and memory of the recorded runs, a row a guard and length."""
    from edgeguard.bench.records import load_record

    head = ["CPU, threads", "guard", "tokens", *(f"`{name}` p50 / p95 ms" for name in ENGINES)]
    head += ["`onnx-int8` by llama.cpp", "peak memory, `onnx-int8` / `onnx`", "record"]
    lines = [f"| {' | '.join(head)} |", "|---" * len(head) + "|"]
    for run, lengths in SPEEDS.items():
        for file in sorted(BENCH.glob(f"*-{run}.json")):
            record = load_record(file)
            results = {result.name: result for result in record.results}
            peaks = [_megabytes(results[name].memory.peak_bytes) for name in ENGINES[:2]]
            for tokens in lengths:
                found = [next(x.summary for x in results[name].lengths if x.tokens == tokens) for name in ENGINES]
                (ratio,) = [
                    r for r in record.ratios if (r.name, r.against, r.tokens) == (ENGINES[0], ENGINES[2], tokens)
                ]
                cells = [f"{record.device.cpu}, {record.plan.threads}", record.bundle.label, str(tokens)]
                cells += [f"{s.p50_ms:.0f} / {s.p95_ms:.0f}" for s in found]
                cells += [f"{ratio.ratio:.2f} times as fast [{ratio.low:.2f}, {ratio.high:.2f}]", " / ".join(peaks)]
                lines.append(f"| {' | '.join([*cells, f'[{file.name}](docs/bench/{file.name})'])} |")
    return "\n".join(lines)


def _megabytes(count: int | None) -> str:
    return "–" if count is None else f"{count / 1e6:.0f} MB"


def _cell(f1: float | None, fpr: float | None) -> str:
    if f1 is None:
        return "–"
    return f"{f1:.1f}" if fpr is None else f"{f1:.1f} / {fpr:.3f}"
