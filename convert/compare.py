"""Is a guard better than the one before it? Both shipped files on the same test rows.

Ranking is compared by AUPRC, which asks for no threshold; false alarms at one and the same recall, since a guard that
flags less has fewer of them for nothing. The recall is that of the older guard at its own ``balanced`` thresholds, in
the mean over the sets with unsafe rows; the newer guard's threshold is the highest that reaches it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from convert.evaluate import fit_stage, margins_of
from convert.recipe import RecipeError
from convert.record import POINT, set_title
from edgeguard.metrics import average_precision
from edgeguard.prompt import TARGETS

if TYPE_CHECKING:
    from convert.corpora.registry import Row
    from convert.recipe import Recipe

__all__ = ["Judged", "compare", "compare_recipes", "comparison_markdown"]

RESAMPLES = 1000
SEED = 0

Margins = Mapping[str, NDArray[np.float64]]
Judged = Mapping[str, tuple[NDArray[np.bool_], NDArray[np.float64], NDArray[np.float64]]]
"""Set -> unsafe [n], the new guard's margins [n], the old one's [n]."""


def compare_recipes(new: Recipe, old: Recipe) -> dict[str, Any]:
    """:func:`compare` the files that two recipes exported, on the test sets that both name; scores are kept.

    Raises RecipeError without a set of unsafe rows for each target.
    """
    from convert import steps

    tests = {name: rows for name, rows in steps.evaluation_rows(new).items() if name in old.evaluate["sets"]}
    margins = [{name: _margins(recipe, name, rows) for name, rows in tests.items()} for recipe in (new, old)]
    held_back = steps.calibration_rows(old)
    fitted = fit_stage(held_back, _logits(old, "calibration", held_back))
    found: dict[str, Any] = {
        "new": f"{new.name} {new.version}",
        "old": f"{old.name} {old.version}",
        "rows": sum(map(len, tests.values())),
    }
    for target in TARGETS:
        judged = {
            name: (np.array([row.label == "unsafe" for row in rows]), margins[0][name], margins[1][name])
            for name, rows in tests.items()
            if rows[0].target == target
        }
        if not any(unsafe.any() for unsafe, _, _ in judged.values()):
            raise RecipeError(
                f"{new.path.name} and {old.path.name}: [evaluate] sets: both name no {target} set with unsafe rows, so "
                "there is no recall to compare at. Add one."
            )
        calibration, threshold = fitted.calibration[target], fitted.points[target][POINT].threshold
        flagged = {name: calibration.probabilities(old_) >= threshold for name, (_, _, old_) in judged.items()}
        found[target] = compare(judged, flagged)
    return found


def _margins(recipe: Recipe, name: str, rows: Sequence[Row]) -> NDArray[np.float64]:
    return margins_of(_logits(recipe, name, rows))


def _logits(recipe: Recipe, name: str, rows: Sequence[Row]) -> NDArray[np.float32]:
    from convert import steps
    from convert.record import SHIPPED
    from convert.scores import onnx_stage, score_rows

    template, tokenizer = steps.text_side(steps.trimmed_base(recipe))
    stage = onnx_stage(SHIPPED, steps.export(recipe), template.pad_id)
    return score_rows(stage, name, rows, template, tokenizer, recipe.student["max_tokens"], recipe.build / "scores")


def compare(judged: Judged, flagged: Mapping[str, NDArray[np.bool_]]) -> dict[str, Any]:
    """Figures of sets with one target. ``flagged``: what the old guard flags at its own threshold, bool [n] by set.

    Returns ``auprc`` (of every set with both classes, their ``mean``, its ``difference`` new - old with a 95 % interval
    over resampled rows) and ``fpr`` at the old guard's ``recall`` (of every set with safe rows, and their ``mean``);
    pairs are [new, old].
    """
    both = {name: row for name, row in judged.items() if row[0].any() and not row[0].all()}
    auprc = {name: [float(average_precision(y, m) or 0.0) for m in (a, b)] for name, (y, a, b) in both.items()}
    recall = _mean_recall({name: (judged[name][0], flagged[name]) for name in judged})
    threshold = _threshold_of(judged, recall)
    fpr = {
        name: [float(np.mean(found[~y])) for found in (new >= threshold, flagged[name])]
        for name, (y, new, _) in judged.items()
        if not y.all()
    }
    return {
        "auprc": {"sets": auprc, "mean": _mean(auprc), "difference": _difference(both)},
        "fpr": {"recall": recall, "sets": fpr, "mean": _mean(fpr)},
    }


def _mean(pairs: Mapping[str, Sequence[float]]) -> list[float] | None:
    return [float(x) for x in np.mean(list(pairs.values()), axis=0)] if pairs else None


def _mean_recall(found: Mapping[str, tuple[NDArray[np.bool_], NDArray[np.bool_]]]) -> float:
    return float(np.mean([flagged[y].mean() for y, flagged in found.values() if y.any()]))


def _threshold_of(judged: Judged, recall: float) -> float:
    """The highest margin at which the new guard's mean recall is at least ``recall``."""
    margins = np.unique(np.concatenate([new[y] for y, new, _ in judged.values()]))
    low, high = 0, len(margins) - 1  # recall falls as the threshold rises, and is 1 at the lowest unsafe margin
    while low < high:
        middle = (low + high + 1) // 2
        reached = _mean_recall({name: (y, new >= margins[middle]) for name, (y, new, _) in judged.items()})
        low, high = (middle, high) if reached >= recall else (low, middle - 1)
    return float(margins[low])


def _difference(both: Judged) -> dict[str, Any] | None:
    """Of the mean AUPRC, in resamples of the rows that both guards share."""
    if not both:
        return None
    rng = np.random.default_rng(SEED)
    draws = []
    for _ in range(RESAMPLES):
        of_sets = []
        for y, new, old in both.values():
            rows = rng.integers(0, len(y), len(y))
            values = [average_precision(y[rows], margins[rows]) for margins in (new, old)]
            if None not in values:
                of_sets.append(values[0] - values[1])  # type: ignore[operator]
        draws.append(np.mean(of_sets))
    low, high = np.percentile(draws, [2.5, 97.5])
    return {"interval": [float(low), float(high)], "resamples": RESAMPLES}


def comparison_markdown(found: Mapping[str, Any]) -> str:
    """The comparison as Markdown tables."""
    lines = []
    for target in TARGETS:
        entry = found[target]
        lines += ["", f"AUPRC, {target}s:", "", f"| set | {found['new']} | {found['old']} |", "|---|---|---|"]
        lines += [f"| {set_title(name)} | {a:.3f} | {b:.3f} |" for name, (a, b) in entry["auprc"]["sets"].items()]
        if entry["auprc"]["mean"]:
            a, b = entry["auprc"]["mean"]
            low, high = entry["auprc"]["difference"]["interval"]
            lines.append(f"| **mean** | **{a:.3f}** (difference {a - b:+.3f} [{low:+.3f}, {high:+.3f}]) | {b:.3f} |")
        recall = entry["fpr"]["recall"]
        lines += ["", f"False-positive rate on {target}s, both at a mean recall of {recall:.3f}:", ""]
        lines += [f"| set | {found['new']} | {found['old']} |", "|---|---|---|"]
        lines += [f"| {set_title(name)} | {a:.3f} | {b:.3f} |" for name, (a, b) in entry["fpr"]["sets"].items()]
        if entry["fpr"]["mean"]:
            a, b = entry["fpr"]["mean"]
            lines.append(f"| **mean** | **{a:.3f}** | {b:.3f} |")
    return "\n".join(lines).strip()
