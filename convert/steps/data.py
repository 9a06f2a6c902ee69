"""What a guard is made of: its base model, the training mix, and the rows to calibrate and measure with."""

from __future__ import annotations

import gzip
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

from convert.base import chat_template, fetch_base, plain_tokenizer_json
from convert.corpora.mix import (
    MixedRow,
    build_mix,
    check_calibration,
    check_no_test_rows,
    check_splits,
    labelled_rows,
    leak_keys,
    row_keys,
)
from convert.corpora.registry import CorpusError, Row, get_set
from convert.files import read_json, write_json, write_whole
from convert.recipe import Recipe, RecipeError
from convert.steps.kept import is_made
from edgeguard.prompt import Template

if TYPE_CHECKING:
    from tokenizers import Tokenizer

    from convert.batches import Batch, Example
    from convert.teachers.score_file import Score

__all__ = [
    "base",
    "calibration_rows",
    "corpus",
    "data_sha256",
    "encode_mixed",
    "evaluation_rows",
    "files_of",
    "read_examples",
    "read_mix",
    "sample_batches",
    "spread",
    "text_side",
    "trimmed_base",
]

SAMPLE_TOKENS = 4096  # of one batch of a sample


def base(recipe: Recipe) -> Path:
    """Step ``base``: the base model as a transformers folder."""
    return fetch_base(recipe.base, recipe.build / "base")


def corpus(recipe: Recipe) -> Path:
    """Step ``corpus``: ``mix.jsonl.gz`` and ``data_manifest.json``."""
    folder = recipe.build / "corpus"
    path = folder / "mix.jsonl.gz"
    inputs = {"corpus": recipe.corpus, "files": files_of(recipe.corpus["sets"])}
    if not is_made(path, inputs, folder):
        keys = leak_keys(recipe.evaluate["sets"])
        sets, constructed = recipe.corpus["sets"], recipe.corpus["constructed"]
        mix = build_mix(sets, constructed, seed=recipe.corpus["seed"], keys=keys)
        check_splits(mix.rows)
        # What could not be calibrated or measured in the end is refused before anything is trained.
        _held_back(recipe, mix.rows)
        _check_curves(recipe, evaluation_rows(recipe))
        lines = [json.dumps({**asdict(m.row), "split": m.split, "weight": m.weight}) for m in mix.rows]
        write_json(folder / "data_manifest.json", mix.manifest)
        write_whole(path, lambda p: p.write_bytes(gzip.compress(("\n".join(lines) + "\n").encode())))
    return path


def files_of(sets: Iterable[str]) -> dict[str, str]:
    """The SHA-256 of each set's file, which changes when the set is corrected."""
    return {name: get_set(name).sha256 for name in sets}


def read_mix(recipe: Recipe) -> list[MixedRow]:
    """The rows that step ``corpus`` wrote."""
    rows = []
    for line in gzip.decompress(corpus(recipe).read_bytes()).decode().split("\n"):
        if line:
            data = json.loads(line)
            split, weight = data.pop("split"), data.pop("weight")
            data["hazards"], data["turns"] = tuple(data["hazards"]), tuple((r, t) for r, t in data["turns"])
            rows.append(MixedRow(Row(**data), split, weight))
    return rows


def trimmed_base(recipe: Recipe) -> Path:
    """The student's base: with the tokens alone that the mix uses, where the recipe says so."""
    from convert.trim import trim_base

    least = recipe.student.get("trim_min_count")
    if not least:
        return base(recipe)
    if recipe.start:
        return trimmed_base(recipe.start)  # whose student has that vocabulary
    folder = recipe.build / "trimmed"
    record = folder / "trimmed.json"
    inputs = {"base": recipe.base, "trim_min_count": least, "data": data_sha256(recipe)}
    inputs["target_tokens"] = recipe.student.get("target_tokens")
    if not is_made(record, inputs, folder):
        texts = [text for m in read_mix(recipe) if m.split == "train" for _, text in m.row.messages()]
        texts += [text for text in recipe.student.get("target_tokens", {}).values() for _ in range(least)]
        write_json(record, trim_base(base(recipe), folder, texts, min_count=least))
    return folder


def text_side(folder: Path) -> tuple[Template, Tokenizer]:
    """Template and tokenizer of the base in ``folder``; those of the student's base are what the bundle carries."""
    from tokenizers import Tokenizer

    return chat_template(folder), Tokenizer.from_str(plain_tokenizer_json(folder))


def evaluation_rows(recipe: Recipe) -> dict[str, list[Row]]:
    """The labelled rows of every test set that the recipe names, in its order."""
    return {name: labelled_rows(name) for name in recipe.evaluate["sets"]}


def _check_curves(recipe: Recipe, tests: Mapping[str, Sequence[Row]]) -> None:
    for name in recipe.evaluate["curves"]:
        if len({row.label for row in tests[name]}) < 2:
            raise RecipeError(f"{recipe.path.name}: [evaluate] curves: {name} has rows of one class, and no curve.")


def calibration_rows(recipe: Recipe) -> list[Row]:
    """The split put aside before training, and the recipe's calibration sets, clear of the tests' texts."""
    return _held_back(recipe, read_mix(recipe))


def _held_back(recipe: Recipe, mixed: Sequence[MixedRow]) -> list[Row]:
    tests = leak_keys(recipe.evaluate["sets"])
    rows = [m.row for m in mixed if m.split == "calibration"]
    for name in recipe.calibrate["sets"]:
        if get_set(name).role != "calibration":
            raise CorpusError(f"{name}: role {get_set(name).role}; only calibration sets may be named in [calibrate].")
        rows += [row for row in labelled_rows(name) if tests.isdisjoint(row_keys(row))]
    check_calibration(rows)
    return rows


def data_sha256(recipe: Recipe) -> str:
    """The hash of the mix, over every row."""
    return str(read_json(corpus(recipe).with_name("data_manifest.json"))["sha256"])


def read_examples(recipe: Recipe, split: str, max_tokens: int, source: Path) -> list[Example]:
    """The labelled rows of a split, encoded for the base in ``source``."""
    mixed = [m for m in read_mix(recipe) if m.split == split]
    if split == "train":
        check_no_test_rows((m.row for m in mixed), leak_keys(recipe.evaluate["sets"]))
    return encode_mixed(mixed, max_tokens, source)


def encode_mixed(
    mixed: Sequence[MixedRow], max_tokens: int, source: Path, scores: Mapping[str, Score] | None = None
) -> list[Example]:
    """Rows with their weights, and with the teacher's ``scores`` of them, encoded for the base in ``source``."""
    from convert.batches import encode_rows

    return encode_rows([m.row for m in mixed], *text_side(source), max_tokens, [m.weight for m in mixed], scores)


def spread(examples: list[Example], count: int) -> list[Example]:
    """About ``count`` examples from all over the mix, whose sets follow one another."""
    return examples[:: max(1, len(examples) // count)]


def sample_batches(examples: Sequence[Example], source: Path) -> list[Batch]:
    """``examples`` in a few batches, for what looks at activations."""
    from convert.batches import batches

    return [batch for _, batch in batches(examples, SAMPLE_TOKENS, text_side(source)[0].pad_id)]
