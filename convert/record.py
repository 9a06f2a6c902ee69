"""The record: all stages of a guard measured on the same rows, what each step cost, and a refusal to compare the rest.

``report.json`` is made here. Figures share a table only when data revision, split, label mapping and threshold policy
are the same; every stage says in ``comparable`` what its figures stand on, and whatever puts two stages side by side
calls :func:`check_comparable` first. A mean always says over how many sets it is.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from convert.corpora.registry import Row, get_set
from convert.evaluate import (
    POLICY,
    Fitted,
    MeasuredStage,
    hazard_recall,
    label_calibration,
    mean_lost,
    measure_set,
    verdict_parity,
    worst_mistakes,
)
from edgeguard.errors import EdgeguardError

__all__ = [
    "CONTAINERS",
    "GGUF",
    "GPTQ",
    "TUNED",
    "INT8",
    "POINT",
    "QAT",
    "REFERENCE",
    "ROADS",
    "ROUNDED",
    "SHIPPED",
    "STAGES",
    "STANDARD",
    "TEACHER",
    "RecordError",
    "StageKind",
    "check_comparable",
    "check_rows",
    "common_sets",
    "describe_sets",
    "losses",
    "make_report",
    "renew_int8",
    "roads_table",
    "rows_sha256",
    "set_title",
    "stage_title",
]

SCHEMA = 2
POINT = "balanced"


@dataclass(frozen=True)
class StageKind:
    """A stage that a record may have: its title, and the stage whose loss it is charged with.

    None for a container: it is charged with the loss to the road that it was made by.
    """

    title: str
    before: str | None


TEACHER = "teacher"
REFERENCE = "student-fp32"
ROUNDED = "student-int4-rounded"
GPTQ = "student-int4-gptq"
TUNED = "student-int4-tuned"
QAT = "student-int4-qat"
SHIPPED = "student-int4-onnx"
INT8 = "student-int8-onnx"
GGUF = "student-int4-gguf"
STANDARD = "student-onnx-standard"
# In the order of every table.
STAGES = {
    TEACHER: StageKind("teacher", None),
    REFERENCE: StageKind("fp32", TEACHER),
    ROUNDED: StageKind("INT4 rounded", REFERENCE),
    GPTQ: StageKind("INT4 GPTQ", REFERENCE),
    TUNED: StageKind("INT4 GPTQ, tuned", REFERENCE),
    QAT: StageKind("INT4 QAT", REFERENCE),
    SHIPPED: StageKind("INT4 ONNX", None),
    INT8: StageKind("ONNX, INT8 compute", None),
    GGUF: StageKind("INT4 GGUF", None),
    STANDARD: StageKind("standard ONNX", None),
}
CONTAINERS = (SHIPPED, INT8, GGUF, STANDARD)
# The roads to INT4 by their names in recipes, in torch.
ROADS = {"rounding": ROUNDED, "gptq": GPTQ, "tune": TUNED, "qat": QAT}
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
# What a stage's figures stand on, as messages call it.
CONDITIONS = {"policy": "threshold policy", "calibration": "calibration rows"}
SET_CONDITIONS = {"revision": "data revision", "split": "split", "labels": "label mapping"}


class RecordError(EdgeguardError):
    """Figures that may not stand side by side, or a record that lacks a stage."""


def set_title(name: str) -> str:
    """A test set's name for people."""
    return SET_TITLES.get(name, name)


def stage_title(name: str) -> str:
    """A stage's name for people, short enough for a column. Raises RecordError for an unknown stage."""
    return _kind(name).title


def make_report(
    measured: Sequence[MeasuredStage],
    tests: Mapping[str, Sequence[Row]],
    calibration: Sequence[Row],
    *,
    hazard_set: str,
    road: str = QAT,
) -> dict[str, Any]:
    """``report.json`` of all stages, in the order of :data:`STAGES`; of them the shipped one and fp32 must be there.

    ``tests``, ``calibration``: the rows that were measured; ``hazard_set``: the test set whose rows name one hazard
    each; ``road``: the stage that the containers were made from. A stage measured on no set is left out. What takes
    more models than the stages' own (the containers' parity) is for the caller to add. Raises RecordError.
    """
    for stage in measured:
        _kind(stage.name)
    by_name = {stage.name: stage for stage in measured if stage.sets}
    if missing := [name for name in (SHIPPED, REFERENCE) if name not in by_name]:
        raise RecordError(f"the record lacks the stages {missing}; measured were {sorted(by_name)}.")
    data, revision = describe_sets(tests), rows_sha256(calibration)
    stages = {name: _entry(by_name[name], data, revision) for name in STAGES if name in by_name}
    shipped = by_name[SHIPPED]
    own = {name: rows for name, rows in tests.items() if name in shipped.logits}
    return {
        "schema": SCHEMA,
        "policy": POLICY,
        "data": data,
        "calibration_data": {"rows": len(calibration), "sha256": revision},
        "stages": stages,
        "lost": losses(stages, road=road),
        "roads": roads_table(stages, road=road),
        "int8": (
            _int8_against_int4(shipped.logits, by_name[INT8].logits, shipped.fitted, tests) if INT8 in by_name else None
        ),
        "hazards": hazard_recall(tests[hazard_set], shipped.logits[hazard_set], shipped.fitted, POINT),
        "labels": label_calibration(calibration, shipped.held_back, shipped.fitted),
        "worst": worst_mistakes(own, shipped.logits, shipped.fitted, POINT),
    }


def check_rows(report: Mapping[str, Any], tests: Mapping[str, Sequence[Row]], calibration: Sequence[Row]) -> None:
    """Raise RecordError unless ``report`` was made on these very rows."""
    for called, found, wanted in (
        ("test rows", describe_sets(tests), report["data"]),
        ("calibration rows", rows_sha256(calibration), report["calibration_data"]["sha256"]),
    ):
        if found != wanted:
            raise RecordError(
                f"the report was made on other {called}. Measure every stage (python -m convert evaluate)."
            )


def renew_int8(
    report: dict[str, Any],
    int8: MeasuredStage,
    int4_logits: Mapping[str, NDArray[Any]],
    fitted: Fitted,
    tests: Mapping[str, Sequence[Row]],
    *,
    road: str,
) -> None:
    """Put a new stage of INT8 compute into a report of :func:`make_report`, in place; the other stages stay.

    ``int4_logits``: of the shipped file, [n, K] by set of ``tests``; ``fitted``: what it ships with. The rows must be
    those of the report (:func:`check_rows`).
    """
    stages = {**report["stages"], INT8: _entry(int8, report["data"], report["calibration_data"]["sha256"])}
    report["stages"] = {name: stages[name] for name in STAGES if name in stages}
    report["lost"] = losses(report["stages"], road=road)
    report["int8"] = _int8_against_int4(int4_logits, int8.logits, fitted, tests)


def _int8_against_int4(
    int4: Mapping[str, NDArray[Any]],
    int8: Mapping[str, NDArray[Any]],
    fitted: Fitted,
    tests: Mapping[str, Sequence[Row]],
) -> dict[str, Any]:
    """What computing in INT8 changes, over all rows that both judged, with the calibration that ships for both.

    ``int4``, ``int8``: logits [n, K] by set.
    """
    names = [name for name in int4 if name in int8]
    rows = [row for name in names for row in tests[name]]
    logits = [np.concatenate([stage[name] for name in names]) for stage in (int4, int8)]
    before, sets = ({name: measure_set(tests[name], stage[name], fitted) for name in names} for stage in (int4, int8))
    return {
        **verdict_parity(rows, logits[0], logits[1], fitted, POINT),
        "sets": sets,
        "f1_lost": mean_lost(before, sets, POINT),
        "auprc_lost": mean_lost(before, sets, POINT, "auprc"),
    }


def _entry(stage: MeasuredStage, data: Mapping[str, Any], calibration_sha256: str) -> dict[str, Any]:
    source = "scores_sha256" if stage.name == TEACHER else "weights_sha256"
    comparable = _comparable({name: data[name] for name in stage.sets}, calibration_sha256)
    return {source: stage.key, "comparable": comparable, **stage.fitted.to_dict(), "sets": dict(stage.sets)}


def _comparable(data: Mapping[str, Any], calibration_sha256: str) -> dict[str, Any]:
    """What figures stand on, by set and for all sets, and one hash of it all."""
    sets = {
        name: {"revision": entry["rows_sha256"], "split": entry["split"], "labels": _sha256(entry["labels"])}
        for name, entry in data.items()
    }
    conditions = {"policy": _sha256(POLICY), "calibration": calibration_sha256, "sets": sets}
    return {"sha256": _sha256(json.dumps(conditions, sort_keys=True)), **conditions}


def describe_sets(tests: Mapping[str, Sequence[Row]]) -> dict[str, dict[str, Any]]:
    """By test set: rows measured and their hash, the file's checksum, split, and the rule that made its labels.

    Raises RecordError for a set without labelled rows.
    """
    described = {}
    for name, rows in tests.items():
        if not rows:
            raise RecordError(f"{name}: has no labelled rows. Take it out of the recipe's [evaluate].")
        known = get_set(rows[0].set)
        described[name] = {
            "rows": len(rows),
            "rows_sha256": rows_sha256(rows),
            "file_sha256": known.sha256,
            "split": known.role if known.role == "test" else f"held out of {known.name}",
            "labels": known.rule,
        }
    return described


def rows_sha256(rows: Sequence[Row]) -> str:
    """Hash of ids, labels, targets and texts, in their order."""
    digest = hashlib.sha256()
    for row in rows:
        digest.update(repr((row.id, row.label, row.target, row.messages())).encode("utf-8", "replace"))
    return digest.hexdigest()


def check_comparable(stages: Mapping[str, Mapping[str, Any]]) -> None:
    """Raise RecordError unless the stages (name -> entry of ``report["stages"]``) may share a table.

    Threshold policy and calibration rows must be the same, and data revision, split and label mapping of every set that
    two of them have.
    """
    for name, stage in stages.items():
        if "comparable" not in stage:
            raise RecordError(
                f"{name}: does not say what it was measured on. Measure it again (`python -m convert evaluate`)."
            )
    sets: dict[str, tuple[str, Mapping[str, str]]] = {}
    first = next(iter(stages), "")
    for name, stage in stages.items():
        found, wanted = stage["comparable"], stages[first]["comparable"]
        for key, called in CONDITIONS.items():
            _refuse_unless_equal((first, wanted[key]), (name, found[key]), called)
        for set_name, conditions in found["sets"].items():
            other, expected = sets.setdefault(set_name, (name, conditions))
            for key, called in SET_CONDITIONS.items():
                _refuse_unless_equal((other, expected[key]), (name, conditions[key]), f"{called} of {set_name}")


def _refuse_unless_equal(one: tuple[str, str], other: tuple[str, str], called: str) -> None:
    if one[1] != other[1]:
        raise RecordError(
            f"{one[0]} and {other[0]} may not share a table: the {called} is {one[1][:12]} for one and {other[1][:12]} "
            "for the other. Measure both with the same recipe and data (`python -m convert evaluate`)."
        )


def common_sets(stages: Mapping[str, Mapping[str, Any]], figure: str = "f1", point: str = POINT) -> list[str]:
    """The sets on which every stage has ``figure``."""
    defined = [
        [name for name, entry in stage["sets"].items() if entry["points"][point][figure] is not None]
        for stage in stages.values()
    ]
    return [name for name in defined[0] if all(name in other for other in defined)] if defined else []


def losses(stages: Mapping[str, Mapping[str, Any]], point: str = POINT, *, road: str = QAT) -> dict[str, Any]:
    """By stage: F1 points lost to the stage ``before`` it, to ``fp32`` and to the ``teacher``, by set and in the mean.

    The teacher, which comes before fp32, loses nothing to it. A stage that was not measured is passed over: the stage
    before is then the one before that, and is named. Null where there is none.
    """
    check_comparable(stages)
    lost: dict[str, Any] = {}
    for name in stages:
        found = {
            "before": _measured_before(name, stages, road),
            "fp32": REFERENCE if REFERENCE in stages and name != TEACHER else None,
            "teacher": TEACHER if TEACHER in stages else None,
        }
        lost[name] = {
            what: None
            if other in (None, name)
            else {"stage": other, **mean_lost(stages[str(other)]["sets"], stages[name]["sets"], point)}
            for what, other in found.items()
        }
    return lost


def _measured_before(name: str, stages: Mapping[str, Any], road: str) -> str | None:
    before = road if name in CONTAINERS else _kind(name).before
    while before is not None and before not in stages:
        before = _kind(before).before
    return before


def roads_table(stages: Mapping[str, Mapping[str, Any]], point: str = POINT, *, road: str = QAT) -> dict[str, Any]:
    """What each road to INT4 costs against fp32, in points of F1 and AUPRC, all over the same sets.

    ``road``: the stage of the one that ships; where it was not measured in torch, the shipped file stands for it.
    ``sets``: those that fp32 and every measured road define; ``roads``: name -> stage, ``f1_lost``, ``auprc_lost``.
    Raises RecordError without the fp32 stage.
    """
    if REFERENCE not in stages:
        raise RecordError(f"no stage {REFERENCE}: there is nothing that the roads to INT4 could lose against.")
    found = {name: SHIPPED if stage == road and stage not in stages else stage for name, stage in ROADS.items()}
    measured = {name: stage for name, stage in found.items() if stage in stages}
    chosen = {name: stages[name] for name in (REFERENCE, *measured.values())}
    check_comparable(chosen)
    names, before = common_sets(chosen, "f1", point), stages[REFERENCE]["sets"]
    roads = {
        name: {
            "stage": stage,
            "f1_lost": mean_lost(before, stages[stage]["sets"], point, "f1", names),
            "auprc_lost": mean_lost(before, stages[stage]["sets"], point, "auprc", names),
        }
        for name, stage in measured.items()
    }
    return {"sets": names, "roads": roads}


def _kind(name: str) -> StageKind:
    if name not in STAGES:
        raise RecordError(f"unknown stage {name!r}. Known: {', '.join(STAGES)}.")
    return STAGES[name]


def _sha256(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()
