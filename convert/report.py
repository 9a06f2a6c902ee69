"""``MODEL_CARD.md`` and ``RECORD.md``: written from the measurements, never by hand."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from convert.recipe import Recipe
from convert.record import (
    POINT,
    REFERENCE,
    SHIPPED,
    check_comparable,
    common_sets,
    set_title,
    stage_title,
)
from edgeguard.taxonomy import HAZARDS

__all__ = ["REFERENCE", "SHIPPED", "comparison_table", "figure", "model_card", "record_markdown"]

ROAD_NAMES = {
    "qat": "quantization-aware training",
    "gptq": "rounded with GPTQ, which compensates errors",
    "tune": "rounded with GPTQ, which compensates errors; scales, norms and head trained after it",
}
PIVOTS = {"f1": "F1", "fpr": "False-positive rate", "auprc": "AUPRC"}


def figure(value: float | None, interval: Sequence[float] | None = None) -> str:
    """``.812 [.790, .833]``; an undefined figure is a dash."""
    if value is None:
        return "–"
    text = f"{value:.3f}"
    return text if interval is None else f"{text} [{interval[0]:.3f}, {interval[1]:.3f}]"


def comparison_table(report: Mapping[str, Any], point: str, stage: str = SHIPPED) -> str:
    """One Markdown row a test set, at one operating point."""
    lines = ["| set | judges | n (unsafe) | F1 | precision | recall | FPR | AUPRC | ECE |", "|---" * 9 + "|"]
    for name, entry in report["stages"][stage]["sets"].items():
        m = entry["points"][point]
        i = m["intervals"]
        lines.append(
            f"| {set_title(name)} | {entry['target']} | {m['n']} ({m['n_unsafe']}) | {figure(m['f1'], i['f1'])} | "
            f"{figure(m['precision'])} | {figure(m['recall'], i['recall'])} | {figure(m['fpr'], i['fpr'])} | "
            f"{figure(m['auprc'], i['auprc'])} | {figure(m['ece'])} |"
        )
    return "\n".join(lines)


def points(value: float | None) -> str:
    """A difference in points, with its sign; an undefined one is a dash."""
    return "–" if value is None else f"{value:+.2f}"


def _loss_table(report: Mapping[str, Any]) -> str:
    lines = [
        "| set | F1 fp32 | F1 INT4 ONNX | lost (points) | AUPRC fp32 | AUPRC INT4 ONNX |",
        "|---|---|---|---|---|---|",
    ]
    both = {name: report["stages"][name] for name in (REFERENCE, SHIPPED)}
    check_comparable(both)
    before, after = (stage["sets"] for stage in both.values())
    lost = report["lost"][SHIPPED]["fp32"]
    for name, points_lost in lost["by_set"].items():
        a, b = before[name]["points"]["balanced"], after[name]["points"]["balanced"]
        lines.append(
            f"| {set_title(name)} | {figure(a['f1'])} | {figure(b['f1'])} | {points_lost:+.2f} | "
            f"{figure(a['auprc'])} | {figure(b['auprc'])} |"
        )
    lines.append(f"| **mean of {lost['sets']} sets** | | | **{points(lost['mean'])}** | | |")
    return "\n".join(lines)


def _export_table(export: Mapping[str, Any]) -> str:
    """``export``: the step's record, container -> figures; null where its program was not installed."""
    rows = [
        [name, str(entry["n"]), figure(entry["max_abs_diff"]), figure(entry["mean_abs_diff"])]
        for name, entry in export.items()
        if isinstance(entry, Mapping)
    ]
    return _table(["container", "texts", "largest difference", "mean difference"], rows)


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


def _kept_layers(recipe: Recipe) -> str:
    if recipe.student.get("choose_layers") == "importance":
        return f"its {recipe.student['layers']} layers that change their input most"
    return f"its first {recipe.student['layers']} layers"


def model_card(recipe: Recipe, manifest: Mapping[str, Any], report: Mapping[str, Any], data: Mapping[str, Any]) -> str:
    """The card, in Markdown."""
    size = sum(entry["bytes"] for entry in manifest["files"].values()) / 1e6
    command = f"python -m convert run recipes/{recipe.path.name}"
    return f"""# {recipe.name} {recipe.version}

A safety guard of {size:.1f} MB: reads a prompt, or a response with the prompt before it, in one forward pass and
returns the probability that it is unsafe and one per MLCommons hazard (S1..S14).

- **Base:** {recipe.base["model"]}, {_kept_layers(recipe)}.
- **Head:** {len(manifest["head"])} rows, read at the last token.
- **Weights:** INT4, symmetric [-8, 7], groups of 32, embedding included; {ROAD_NAMES[recipe.road]}.
- **Licence:** {recipe.license}.
- **Language:** {", ".join(recipe.languages)}. Other languages are measured below and are not supported.
- **Context:** {recipe.student["max_tokens"]} tokens; longer input keeps head and tail and is never "allow".
- **Teacher:** {manifest["teacher"] or "none; trained on the sets' own labels"}.
- Every figure here is in `report.json`, made by `{command}`, which wrote this card; all stages side by side, what each
  step cost, and the worst mistakes are in `RECORD.md`.

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

The exported files against the torch model of the same INT4 weights, logit by logit, on texts of the validation split:

{_export_table(report["export"])}

Verdicts on rows of the test sets, each container against that model:

{_parity_table(report)}

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


def record_markdown(report: Mapping[str, Any], title: str, command: str) -> str:
    """``RECORD.md``: every stage on every test set, what was lost, and where. ``command`` made the figures.

    Raises RecordError when the stages were not measured alike.
    """
    stages, held_back, worst = report["stages"], report["calibration_data"], report["worst"]
    check_comparable(stages)
    pivots = "\n\n".join(f"## {name}\n{_pivot(stages, key)}" for key, name in PIVOTS.items())
    full = "\n\n".join(f"### {stage_title(name)}\n{comparison_table(report, POINT, name)}" for name in stages)
    return f"""# {title}: the record

Made by `{command}` from `report.json`, at the operating point `{POINT}`. {report["policy"]} A dash: not measured, or
not defined (a set of one class has no F1). The first mean is over the sets that fp32 and the shipped
file have, the second over those that every stage of the table has.

![F1, recall and false-positive rate by stage and set](record.png)

{pivots}

## F1 lost
In points (0.01 F1); a positive figure is a loss. A stage that was not measured is passed over.

{_lost_table(report["lost"])}

Against the stage before, by set:

{_lost_by_set(report["lost"], stages)}

## Roads to INT4
The same fp32 student by each road: points lost, all over the same sets.

{_roads(report["roads"])}

## Containers
The verdicts of each container against the torch model of the same INT4 weights, on rows of the test sets: the
uncalibrated margin, and the decision at `{POINT}`.

{_parity_table(report)}

## Computing in INT8
The engine `onnx-int8` against `onnx`, with the one calibration and the thresholds that both ship with.

{_int8(report["int8"])}

## Calibration per label
On the {held_back["rows"]} rows of the calibration split: the error (ECE) of the raw logit, and after a temperature and
a bias of the label's own, each half of the rows measured with the fit of the other. The runtime calibrates the verdict;
it reports the hazards as they are.

{_labels(report["labels"])}

![Reliability](reliability.png)

## Recall by hazard
{_hazard_table(report)}

## The {len(worst)} worst mistakes
Of the {stage_title(SHIPPED)}, by distance from the threshold in log-odds. By id: the texts are in the sets.

{_worst_by_set(worst)}

{_worst(worst)}

## Rows
Calibration rows: revision `{held_back["sha256"][:12]}`.

{_sets(report["data"])}

## Every figure, by stage
95 % bootstrap intervals in brackets.

{full}
"""


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [f"| {' | '.join(row)} |" for row in (head, *rows)]
    return "\n".join([lines[0], "|---" * len(head) + "|", *lines[1:]])


def _pivot(stages: Mapping[str, Any], key: str) -> str:
    """Sets down, stages across, one figure; the shipped stage in bold. Sets that no stage defines are left out."""
    values = {
        stage: {name: entry["points"][POINT][key] for name, entry in found["sets"].items()}
        for stage, found in stages.items()
    }
    names = list(dict.fromkeys(name for found in stages.values() for name in found["sets"]))
    rows = []
    for name in names:
        cells = [values[stage].get(name) for stage in stages]
        if any(cell is not None for cell in cells):
            rows.append([set_title(name), *_emphasised(stages, [figure(cell) for cell in cells])])
    # Roads and teacher are measured on few sets: the student and what ships have a mean over more.
    main = {stage: stages[stage] for stage in (REFERENCE, SHIPPED)}
    for common in dict.fromkeys((tuple(common_sets(main, key)), tuple(common_sets(stages, key)))):
        if common:
            means = [_mean([values[stage].get(name) for name in common]) for stage in stages]
            rows.append([f"**mean of {len(common)} sets**", *_emphasised(stages, [figure(mean) for mean in means])])
    return _table(["set", *map(stage_title, stages)], rows)


def _mean(values: Sequence[float | None]) -> float | None:
    """None where one of ``values`` is."""
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if len(known) == len(values) else None


def _emphasised(stages: Mapping[str, Any], cells: Sequence[str]) -> list[str]:
    pairs = zip(stages, cells, strict=True)
    return [f"**{cell}**" if stage == SHIPPED and cell != "–" else cell for stage, cell in pairs]


def _lost_table(lost: Mapping[str, Any]) -> str:
    rows = []
    for stage, entry in lost.items():
        before = entry["before"]
        cells = [stage_title(stage), stage_title(before["stage"]) if before else "–"]
        for other in (before, entry["fp32"], entry["teacher"]):
            cells += [points(other["mean"]), str(other["sets"])] if other else ["–", "–"]
        rows.append(cells)
    head = ["stage", "the stage before", "F1 lost to it", "sets"]
    return _table([*head, "F1 lost to fp32", "sets", "F1 lost to the teacher", "sets"], rows)


def _lost_by_set(lost: Mapping[str, Any], stages: Mapping[str, Any]) -> str:
    entries = {stage: entry["before"] for stage, entry in lost.items() if entry["before"]}
    rows = [
        [set_title(name), *(points(entry["by_set"].get(name)) for entry in entries.values())]
        for name in dict.fromkeys(name for found in stages.values() for name in found["sets"])
        if any(name in entry["by_set"] for entry in entries.values())
    ]
    rows.append(["**mean** (sets)", *(f"**{points(e['mean'])}** ({e['sets']})" for e in entries.values())])
    titles = [f"{stage_title(stage)} against {stage_title(entry['stage'])}" for stage, entry in entries.items()]
    return _table(["set", *titles], rows)


def _roads(table: Mapping[str, Any]) -> str:
    roads = table["roads"]
    head = ["set", *(f"{stage_title(entry['stage'])}: {w}" for entry in roads.values() for w in ("F1", "AUPRC"))]
    losses = [entry[key] for entry in roads.values() for key in ("f1_lost", "auprc_lost")]
    rows = [[set_title(name), *(points(loss["by_set"].get(name)) for loss in losses)] for name in table["sets"]]
    rows.append([f"**mean of {len(table['sets'])} sets**", *(f"**{points(loss['mean'])}**" for loss in losses)])
    return _table(head, rows)


def _parity_table(report: Mapping[str, Any]) -> str:
    rows = [
        [
            stage_title(name),
            stage_title(entry["reference"]),
            str(entry["rows"]),
            f"{entry['max_abs_diff']:.3f}",
            f"{entry['mean_abs_diff']:.4f}",
            f"{entry['agreement']:.4f}",
        ]
        for name, entry in report["parity"].items()
    ]
    return _table(["container", "against", "rows", "largest difference", "mean difference", "same decision"], rows)


def _int8(found: Mapping[str, Any] | None) -> str:
    if found is None:
        return "Not measured."
    lost = {title: found[key] for key, title in (("f1_lost", "F1"), ("auprc_lost", "AUPRC"))}
    names = dict.fromkeys(name for entry in lost.values() for name in entry["by_set"])
    rows = [[set_title(name), *(points(entry["by_set"].get(name)) for entry in lost.values())] for name in names]
    rows.append(["**mean** (sets)", *(f"**{points(entry['mean'])}** ({entry['sets']})" for entry in lost.values())])
    command = f" Measured by `{found['command']}`." if "command" in found else ""  # where it was not the whole record's
    return (
        f"Over {found['rows']} rows the margin differs by {found['mean_abs_diff']:.4f} in the mean and "
        f"{found['max_abs_diff']:.3f} at most; {found['agreement']:.4f} of the decisions at `{POINT}` are the same."
        f"{command} Points lost, by set:\n\n{_table(['set', *lost], rows)}"
    )


def _labels(labels: Mapping[str, Any]) -> str:
    entries = {f"unsafe, {target}": entry for target, entry in labels["verdict"].items()}
    entries |= {f"{code} {HAZARDS[code].name}": entry for code, entry in labels["hazards"].items()}
    rows = [
        [
            label,
            f"{entry['n']} ({entry['positives']})",
            *(figure(entry[key]) for key in ("temperature", "bias", "ece_before", "ece_after")),
            entry.get("why", ""),
        ]
        for label, entry in entries.items()
    ]
    return _table(["label", "n (positive)", "temperature", "bias", "ECE before", "ECE after", "no fit because"], rows)


def _worst_by_set(worst: Sequence[Mapping[str, Any]]) -> str:
    counts = Counter((m["set"], m["label"]) for m in worst)
    rows = [
        [set_title(name), "missed" if label == "unsafe" else "false alarm", str(count)]
        for (name, label), count in counts.most_common()
    ]
    return _table(["set", "mistake", "of these"], rows)


def _worst(worst: Sequence[Mapping[str, Any]]) -> str:
    rows = [
        [f"`{m['id']}`", m["target"], m["label"], f"{m['p_unsafe']:.4f}", f"{m['threshold']:.4f}", f"{m['off']:.2f}"]
        for m in worst
    ]
    return _table(["row", "judges", "label", "p_unsafe", "threshold", "off"], rows)


def _sets(data: Mapping[str, Any]) -> str:
    rows = [
        [set_title(name), entry["split"], str(entry["rows"]), f"`{entry['rows_sha256'][:12]}`", entry["labels"]]
        for name, entry in data.items()
    ]
    return _table(["set", "split", "rows", "revision", "unsafe is"], rows)
