"""``report.json``, ``MODEL_CARD.md`` and plots of a bundle: written from the measurements, never by hand."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from convert.corpora.registry import load_sets
from convert.files import write_whole
from convert.recipe import Recipe
from edgeguard.taxonomy import HAZARDS

__all__ = ["REFERENCE", "SHIPPED", "comparison_table", "data_revisions", "model_card", "plot_report"]

SET_TITLES = {
    "openai_moderation": "OpenAI Moderation",
    "toxicchat_test": "ToxicChat",
    "xstest": "XSTest",
    "orbench_hard_held_out": "OR-Bench-Hard, held-out third",
    "simplesafetytests": "SimpleSafetyTests",
    "harmbench_prompt": "HarmBench",
    "advbench": "AdvBench",
    "ailuminate_demo_en": "AILuminate demo",
    "multijail": "MultiJail (10 languages)",
    "rtplx_en": "RTP-LX en",
    "rtplx_de": "RTP-LX de",
    "rtplx_fr": "RTP-LX fr",
    "rtplx_es": "RTP-LX es",
    "llm_eval_prompts_benign": "Assistant benchmarks (benign)",
    "gsm8k_benign": "GSM8K (benign)",
    "wildchat_benign": "WildChat (benign)",
    "beavertails_test": "BeaverTails",
    "xstest_response": "XSTest responses",
    "harmbench_response": "HarmBench responses",
}
SHIPPED = "student-int4-onnx"
REFERENCE = "student-fp32"


def figure(value: float | None, interval: Sequence[float] | None = None) -> str:
    """``.812 [.790, .833]``; an undefined figure is a dash."""
    if value is None:
        return "–"
    text = f"{value:.3f}"
    return text if interval is None else f"{text} [{interval[0]:.3f}, {interval[1]:.3f}]"


def _title(name: str) -> str:
    return SET_TITLES.get(name, name)


def comparison_table(report: Mapping[str, Any], point: str, stage: str = SHIPPED) -> str:
    """One Markdown row a test set, at one operating point."""
    lines = ["| set | judges | n (unsafe) | F1 | precision | recall | FPR | AUPRC | ECE |", "|---" * 9 + "|"]
    for name, entry in report["stages"][stage]["sets"].items():
        m = entry["points"][point]
        i = m["intervals"]
        lines.append(
            f"| {_title(name)} | {entry['target']} | {m['n']} ({m['n_unsafe']}) | {figure(m['f1'], i['f1'])} | "
            f"{figure(m['precision'])} | {figure(m['recall'], i['recall'])} | {figure(m['fpr'], i['fpr'])} | "
            f"{figure(m['auprc'], i['auprc'])} | {figure(m['ece'])} |"
        )
    return "\n".join(lines)


def _loss_table(report: Mapping[str, Any]) -> str:
    lines = [
        "| set | F1 fp32 | F1 INT4 ONNX | lost (points) | AUPRC fp32 | AUPRC INT4 ONNX |",
        "|---|---|---|---|---|---|",
    ]
    before, after = (report["stages"][s]["sets"] for s in (REFERENCE, SHIPPED))
    for name, lost in report["int4_loss"]["by_set"].items():
        a, b = before[name]["points"]["balanced"], after[name]["points"]["balanced"]
        lines.append(
            f"| {_title(name)} | {figure(a['f1'])} | {figure(b['f1'])} | {lost:+.2f} | "
            f"{figure(a['auprc'])} | {figure(b['auprc'])} |"
        )
    lines.append(f"| **mean** | | | **{report['int4_loss']['mean']:+.2f}** | | |")
    return "\n".join(lines)


def _hazard_table(report: Mapping[str, Any]) -> str:
    lines = ["| hazard | n | flagged | named first |", "|---|---|---|---|"]
    for code, row in report["hazards"].items():
        lines.append(f"| {code} {HAZARDS[code].name} | {row['n']} | {row['recall']:.2f} | {row['named']:.2f} |")
    return "\n".join(lines)


def _data_table(manifest: Mapping[str, Any]) -> str:
    lines = ["| set | rows | licence | origin |", "|---|---|---|---|"]
    for name, entry in manifest["sets"].items():
        rows = sum(entry["rows"].values())
        lines.append(f"| {name} | {rows} | {entry['license']} | {entry['source']} |")
    return "\n".join(lines)


def _points_table(manifest: Mapping[str, Any]) -> str:
    lines = ["| operating point | judges | threshold | n | F1 | recall | FPR |", "|---|---|---|---|---|---|---|"]
    for name, entry in manifest["operating_points"].items():
        for target, threshold in entry["thresholds"].items():
            m = entry["measured"][target]
            figures = " | ".join(figure(m[key]) for key in ("f1", "recall", "fpr"))
            lines.append(f"| `{name}` | {target} | {threshold:.4f} | {m['n']} | {figures} |")
    return "\n".join(lines)


def model_card(recipe: Recipe, manifest: Mapping[str, Any], report: Mapping[str, Any], data: Mapping[str, Any]) -> str:
    """The card, in Markdown."""
    size = sum(entry["bytes"] for entry in manifest["files"].values()) / 1e6
    parity = report["parity"]
    command = f"python -m convert run recipes/{recipe.path.name}"
    return f"""# {recipe.name} {recipe.version}

A safety guard of {size:.1f} MB: reads a prompt, or a response with the prompt before it, in one forward pass and
returns the probability that it is unsafe and one per MLCommons hazard (S1..S14).

- **Base:** {recipe.base["model"]}, its first {recipe.student["layers"]} layers.
- **Head:** {len(manifest["head"])} rows, read at the last token.
- **Weights:** INT4, symmetric [-8, 7], groups of 32, embedding included; quantization-aware training.
- **Licence:** {recipe.license}.
- **Language:** {", ".join(recipe.languages)}. Other languages are measured below and are not supported.
- **Context:** {recipe.student["max_tokens"]} tokens; longer input keeps head and tail and is never "allow".
- **Teacher:** {manifest["teacher"] or "none; trained on the sets' own labels"}.
- Every figure here is in `report.json`, made by `{command}`, which wrote this card.

## Figures: INT4 ONNX at `balanced`
95 % bootstrap intervals in brackets. {report["policy"]} Sets of one class show only what they define.

{comparison_table(report, "balanced")}

![Precision and recall](curves.png)
![Reliability](reliability.png)

## At `low_fpr`
{comparison_table(report, "low_fpr")}

## Operating points, on the calibration split
{_points_table(manifest)}

## What INT4 costs
F1 at `balanced`, each stage calibrated on its own margins; a positive figure is a loss. Sets of one class have no F1;
all figures of the float32 student are in `report.json`.

{_loss_table(report)}

The exported file against the torch model of the same INT4 weights, {parity["n"]} texts: largest logit difference
{parity["max_abs_diff"]:.3f}, mean {parity["mean_abs_diff"]:.4f}.

## Hazards, on AILuminate's demo prompts
Its prompts elicit a hazard and need not be unsafe in themselves. "Flagged" at `balanced`; "named first": the highest
hazard probability is the prompt's own hazard.

{_hazard_table(report)}

## Training data
{data["rows"]} rows, hash `{data["sha256"]}`; free of every test row by normalised text.

{_data_table(data)}

## Limits
- Trained on labels of many hands, some of them by construction: it learns their mistakes too.
- English. Short requests more than long documents; one turn or a request with its answer more than long conversations.
- It flags some harmless texts and misses some harmful ones at every operating point: see FPR and recall above, and
  measure it on your own data (`edgeguard eval`).
- Prompt injection and jailbreak templates are not hazards of S1..S14 and are judged only by the request inside.
"""


def plot_report(report: Mapping[str, Any], curves: Mapping[str, Any], folder: Path) -> None:
    """``curves.png`` (precision against recall) and ``reliability.png`` (observed against predicted).

    ``curves``: set -> (labels bool [n], p_unsafe [n]) of the shipped stage.
    """
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    import numpy as np

    figure_, axes = plt.subplots(figsize=(6.5, 5))
    for name, (labels, p_unsafe) in curves.items():
        order = np.argsort(-p_unsafe, kind="stable")
        hits = np.cumsum(labels[order])
        area = report["stages"][SHIPPED]["sets"][name]["points"]["balanced"]["auprc"]
        axes.plot(hits / hits[-1], hits / np.arange(1, len(hits) + 1), label=f"{_title(name)} ({area:.3f})")
    axes.set(xlabel="recall", ylabel="precision", ylim=(0, 1.02), title="INT4 ONNX (AUPRC)")
    axes.legend(fontsize=8)
    axes.grid(alpha=0.3)
    _save(figure_, folder / "curves.png")

    figure_, axes = plt.subplots(figsize=(6.5, 5))
    axes.plot([0, 1], [0, 1], color="gray", linestyle=":")
    for name, (labels, p_unsafe) in curves.items():
        bins = np.minimum((p_unsafe * 10).astype(int), 9)
        filled = [b for b in range(10) if (bins == b).sum() >= 10]
        predicted = [p_unsafe[bins == b].mean() for b in filled]
        axes.plot(predicted, [labels[bins == b].mean() for b in filled], marker="o", label=_title(name))
    axes.set(
        xlabel="predicted p_unsafe", ylabel="observed share unsafe", title="Reliability (bins of 10 rows and more)"
    )
    axes.legend(fontsize=8)
    axes.grid(alpha=0.3)
    _save(figure_, folder / "reliability.png")


def _save(figure_: Any, path: Path) -> None:  # noqa: ANN401 - a matplotlib Figure
    import matplotlib.pyplot as plt

    figure_.tight_layout()
    write_whole(path, lambda p: figure_.savefig(p, dpi=110, format="png"))
    plt.close(figure_)


def data_revisions(names: Sequence[str]) -> dict[str, str]:
    """sha256 of each set's text, so that figures of different revisions are never compared."""
    return {name: load_sets()[name].sha256 for name in names if name in load_sets()}
