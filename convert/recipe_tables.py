"""What a recipe holds: every table, key, type and range, and what they must be together. :data:`RECIPE` is all of it.

A key that is not here is refused, so a misspelt setting never leaves a default in its place without a word. What the
settings mean is said where they are read: ``convert/distill.py`` and the steps; docs/convert.md shows them at work.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from convert.checks import Named, OneOf, Table, Value, choice, many, number, text, whole
from convert.corpora.mix import CONSTRUCTED_KINDS
from convert.teachers.formats import TeacherError, find_format
from edgeguard.manifest import MAX_TOKENS, NAME_CALLED, NAME_PATTERN, SHA256_CALLED, SHA256_PATTERN
from edgeguard.taxonomy import HAZARDS, SAFE, UNSAFE

__all__ = ["LIKE", "RECIPE"]

TEXT = text()
NAME = text(NAME_PATTERN, NAME_CALLED)
COUNT = whole(1)
TOKENS = whole(1, MAX_TOKENS)
RATE = number(0, 1, above=True)
SHARE = number(0, 1)
WEIGHT = number(0)
ABOVE_ZERO = number(0, above=True)
SWITCH = Value("true or false", lambda v: isinstance(v, bool))
GROUPS = whole(32, multiple_of=32)  # of weights that share a scale in INT4
BESIDE = text(r"[^/\\]+\.toml", "the name of a recipe beside this one, ending in .toml")

LIKE = Table(required={"like": BESIDE})
"""A table that is another recipe's."""


def _in_sets(table: Mapping[str, Any]) -> str | None:
    named = {
        "hazards": [table["hazards"]],
        **{key: table.get(key, []) for key in ("teacher_sets", "compare", "curves")},
    }
    for key, names in named.items():
        if others := [name for name in names if name not in table["sets"]]:
            return f"{key}: expected sets that `sets` names too, found {', '.join(others)}."
    return None


def _known_guard(table: Mapping[str, Any]) -> str | None:
    try:
        find_format(str(table.get("guard") or table.get("model", "")))
    except TeacherError as error:
        return str(error)
    return None


def _revision_of_something(table: Mapping[str, Any]) -> str | None:
    return "revision needs a model, whose it is." if "revision" in table and "model" not in table else None


def _one_length(table: Mapping[str, Any]) -> str | None:
    return "expected `passes` or `steps`, found both." if {"passes", "steps"} <= set(table) else None


def _labels(table: Mapping[str, Any]) -> str | None:
    return None if {SAFE, UNSAFE} & set(table) else "expected how many rows to take: safe, unsafe or both."


def _heads(table: Mapping[str, Any]) -> str | None:
    heads, kv_heads, width = (table[key] for key in ("num_heads", "num_kv_heads", "head_dim"))
    if heads % kv_heads or width % 2 or heads * width % 32:
        return (
            "expected num_heads to be a multiple of num_kv_heads, head_dim even and their product a multiple of 32, "
            f"found {heads} / {kv_heads} heads of {width}."
        )
    if len(table.get("rope_factors", [1.0] * (width // 2))) != width // 2:
        return f"rope_factors: expected {width // 2}, half of head_dim, found {len(table['rope_factors'])}."
    return None


def _cut_already(table: Mapping[str, Any]) -> str | None:
    cuts = ("start_from", "choose_layers", "intermediate_size", "trim_min_count", "target_tokens")
    if "start_bundle" in table and (others := [name for name in cuts if name in table]):
        return f"start_bundle is a student that is cut already: {', '.join(others)} cannot stand beside it."
    return None


def _sampled(table: Mapping[str, Any]) -> str | None:
    measures = table.get("choose_layers") == "importance" or "intermediate_size" in table
    if measures and "samples" not in table:
        return "samples is missing; importances are measured on so many rows of the mix."
    return None


BASE = OneOf(
    {
        "wheels": Table(
            required={
                "model": TEXT,
                "wheels": many(text(r"[\w.-]+==[\w.+!-]+", "a requirement as name==version"), 1),
                "sha256": text(SHA256_PATTERN, SHA256_CALLED),
            }
        ),
        "hub": Table(required={"model": TEXT, "hub": TEXT}, optional={"revision": TEXT}),
        "folder": Table(required={"model": TEXT, "folder": TEXT}),
    }
)

LORA = Table(required={"rank": COUNT, "alpha": ABOVE_ZERO, "dropout": SHARE})
STEPS: dict[str, Value] = {
    "tokens_per_step": COUNT,
    "learning_rate": RATE,
    "warmup": SHARE,
    "evaluate_every": COUNT,
    "checkpoint_every": COUNT,
    "seed": whole(),
}
COURSE: dict[str, Value] = {
    "passes": ABOVE_ZERO,
    "steps": COUNT,
    "tokens_per_pass": COUNT,
    "freeze_layers": whole(),
    "patience": COUNT,
}
TRAINING = {**STEPS, "head_learning_rate": RATE, "max_tokens": TOKENS, "hazard_weight": WEIGHT}
TRAIN = Table(required=TRAINING, optional={**COURSE, "lora": LORA}, rules=(_one_length,))
QAT = Table(
    required={**STEPS, "hidden_weight": WEIGHT, "label_weight": WEIGHT},
    optional={**COURSE, "head_learning_rate": RATE},
    rules=(_one_length,),
)

TEACHER = OneOf(
    {
        "transformers": Table(
            required={"model": TEXT},
            optional={"guard": TEXT, "revision": TEXT, "max_tokens": TOKENS},
            rules=(_known_guard,),
        ),
        "gguf": Table(
            required={"file": TEXT},
            optional={"guard": TEXT, "model": TEXT, "revision": TEXT, "max_tokens": TOKENS, "threads": COUNT},
            rules=(_known_guard, _revision_of_something),
        ),
        "trained": Table(
            required={
                "base": BASE,
                "train": Table(required={**TRAINING, "lora": LORA}, optional=COURSE, rules=(_one_length,)),
                "layers": COUNT,
                "max_tokens": TOKENS,
            }
        ),
        "scores": Table(required={"file": TEXT}, optional={"model": TEXT}),
    },
    by="kind",
)

DISTILL = Table(
    required={
        "unlabelled": Named(TEXT, whole()),
        "unlabelled_weight": ABOVE_ZERO,
        "judged": COUNT,
        "temperature": ABOVE_ZERO,
        "label_weight": WEIGHT,
        "benign_weight": WEIGHT,
    },
    optional={"start_share": SHARE},
)

STUDENT = Table(
    required={"layers": COUNT, "max_tokens": TOKENS},
    optional={
        "start_from": BESIDE,
        "start_bundle": Table(required={"bundle": TEXT, "manifest_sha256": text(SHA256_PATTERN, SHA256_CALLED)}),
        "choose_layers": choice("lowest", "importance"),
        "intermediate_size": GROUPS,
        "samples": COUNT,
        "trim_min_count": whole(),
        "target_tokens": Named(choice(SAFE, UNSAFE, *HAZARDS), text(".+", "the text of one token")),
    },
    rules=(_sampled, _cut_already),
)

SHAPE = Table(
    required={
        "vocab_size": many(whole(256), 1),
        "hidden_size": GROUPS,
        "intermediate_size": GROUPS,
        "num_layers": COUNT,
        "num_heads": COUNT,
        "num_kv_heads": COUNT,
        "head_dim": COUNT,
        "rms_norm_eps": ABOVE_ZERO,
        "rope_theta": ABOVE_ZERO,
        "max_tokens": TOKENS,
        "head_size": COUNT,
    },
    optional={
        "rope_factors": Value(
            "a list of numbers above 0", lambda v: isinstance(v, list) and all(map(ABOVE_ZERO.holds, v))
        )
    },
    rules=(_heads,),
)

CORPUS = Table(
    required={
        "seed": whole(),
        "constructed": Table(optional=dict.fromkeys(CONSTRUCTED_KINDS, whole())),
        "sets": Named(TEXT, Table(optional={SAFE: whole(), UNSAFE: whole(), "weight": ABOVE_ZERO}, rules=(_labels,))),
    }
)


def _teacher_is_used(recipe: Mapping[str, Any]) -> str | None:
    asked, there = "distill" in recipe or recipe["evaluate"].get("teacher_sets"), "teacher" in recipe
    if asked and not there:
        table = "[distill]" if "distill" in recipe else "teacher_sets of [evaluate]"
        return f"{table} needs a [teacher]."
    if there and not asked:
        return "[teacher] is read by nothing. Add [distill], or name teacher_sets in [evaluate]."
    return None


def _start_is_named(recipe: Mapping[str, Any]) -> str | None:
    if "start_share" in recipe.get("distill", {}) and not {"start_from", "start_bundle"} & set(recipe["student"]):
        return "start_share of [distill] needs start_from or start_bundle in [student]."
    return None


def _road_is_there(recipe: Mapping[str, Any]) -> str | None:
    road = recipe["export"].get("road", "qat")
    return None if road in recipe else f"the road to INT4 of [export], {road}, needs a table [{road}]."


def _integers_to_tune(recipe: Mapping[str, Any]) -> str | None:
    lacking = "tune" in recipe and "gptq" not in recipe
    return "[tune] trains the scales of GPTQ's integers, so it needs a table [gptq]." if lacking else None


def _something_learns(recipe: Mapping[str, Any]) -> str | None:
    teacher = recipe.get("teacher", {})
    trained = {name: (recipe["student"], recipe[name]) for name in ("train", "qat", "tune") if name in recipe}
    if teacher.get("kind") == "trained":
        trained["teacher.train"] = (teacher, teacher["train"])
    for name, (model, table) in trained.items():
        most = model["layers"] - (1 if "lora" in table else 0)  # an adapter needs a layer to stand in
        if table.get("freeze_layers", 0) > most:
            found = f"found {table['freeze_layers']} of {model['layers']} layers"
            return f"[{name}] freeze_layers: expected at most {most}, {found}."
    return None


RECIPE = Table(
    required={
        "name": NAME,
        "version": NAME,
        "license": TEXT,
        "languages": many(TEXT, 1),
        "base": BASE,
        "student": STUDENT,
        "train": TRAIN,
        "export": Table(
            required={"samples": COUNT, "tolerance": WEIGHT},
            optional={
                "road": choice("qat", "gptq", "tune"),
                "also": many(choice("onnx", "gguf", "standard")),
                "max_bytes": COUNT,
            },
        ),
        "calibrate": Table(required={"sets": many(TEXT)}),
        "evaluate": Table(
            required={"sets": many(TEXT, 1), "curves": many(TEXT), "hazards": TEXT},
            optional={"teacher_sets": many(TEXT), "compare": many(TEXT)},
            rules=(_in_sets,),
        ),
        "corpus": CORPUS,
    },
    optional={
        "teacher": TEACHER,
        "distill": DISTILL,
        "qat": QAT,
        "gptq": Table(required={"every": COUNT}, optional={"rotate": SWITCH}),
        "tune": QAT,
        "shape": SHAPE,
    },
    rules=(_teacher_is_used, _start_is_named, _road_is_there, _integers_to_tune, _something_learns),
)
