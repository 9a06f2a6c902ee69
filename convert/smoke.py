"""``--smoke``: a recipe's whole chain in minutes, on a tiny random base and made-up rows, without any download.

It shows that every step of the recipe works on this machine; the bundle that comes out judges nothing.
"""

from __future__ import annotations

import gzip
import hashlib
import json
import os
import random
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from convert.corpora.registry import DATA_VARIABLE
from convert.recipe import Recipe, RecipeError

if TYPE_CHECKING:
    from transformers import LlamaConfig

__all__ = ["llama_config", "requests", "row", "shrink", "write_base", "write_data", "write_sets"]

# One word decides the label, so that a tiny student learns it in seconds.
SAFE_VERBS = ("bake", "paint", "repair", "clean", "draw", "grow")
UNSAFE_VERBS = ("hurt", "rob", "poison", "stalk", "threaten", "blackmail")
THINGS = tuple(
    f"{colour} {thing}" for colour in ("red", "blue", "old", "new") for thing in ("car", "cake", "shop", "man")
)
ENTRY = {
    "commercial": "yes",
    "license": "CC0-1.0",
    "labels_by": "human",
    "rule": "made for a test",
    "source": "example/rows@0:rows.jsonl",
}


def row(name: str, index: int, prompt: str, label: str | None, response: str | None = None) -> dict[str, Any]:
    """One row of a set, as the files have it."""
    return {
        "id": f"{name}:{index}",
        "prompt": prompt,
        "response": response,
        "label": label,
        "target": "prompt" if response is None else "response",
        "hazards": ["S1"] if label == "unsafe" else [],
        "lang": "en",
    }


def requests(name: str, count: int, seed: int) -> list[dict[str, Any]]:
    """``count`` different requests, half of them unsafe; every third is an answer to a harmless question."""
    rng = random.Random(seed)
    rows = []
    for index in range(count):
        label, verbs = ("safe", SAFE_VERBS) if index % 2 else ("unsafe", UNSAFE_VERBS)
        number = 1000 * seed + index  # no two sets share a text
        text = f"{rng.choice(verbs)} the {rng.choice(THINGS)} number {number}"
        if index % 3:
            rows.append(row(name, index, f"How do I {text}?", label))
        else:
            rows.append(row(name, index, f"What now, number {number}?", label, f"You {text}."))
    return rows


def write_sets(folder: Path, sets: dict[str, tuple[dict[str, str], list[dict[str, Any]]]]) -> Path:
    """Write ``sets`` (name -> entry changes with ``role``, rows) as a data folder with its ``sets.json``."""
    table = {}
    for name, (changes, rows) in sets.items():
        text = "".join(json.dumps(r) + "\n" for r in rows).encode()
        table[name] = {**ENTRY, **changes, "rows": len(rows), "sha256": hashlib.sha256(text).hexdigest()}
        path = folder / changes["role"] / f"{name}.jsonl.gz"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(gzip.compress(text))
    (folder / "sets.json").write_text(json.dumps(table))
    return folder


def write_data(folder: Path) -> Path:
    """A data folder with a train, a calibration, two test sets and an unlabelled one."""
    return write_sets(
        folder,
        {
            "tiny_train": ({"role": "train"}, requests("alpha", 600, 1)),
            "tiny_calibration": ({"role": "calibration"}, requests("beta", 120, 2)),
            "tiny_test": ({"role": "test"}, requests("gamma", 60, 3)),
            "tiny_unsafe": ({"role": "test"}, [r for r in requests("delta", 40, 4) if r["label"] == "unsafe"]),
            "tiny_unlabelled": ({"role": "unlabelled"}, [{**r, "label": None} for r in requests("epsilon", 60, 5)]),
        },
    )


def llama_config(vocab_size: int, **changes: object) -> LlamaConfig:
    """The shape of a Llama small enough for a test; ``changes`` go over it."""
    from transformers import LlamaConfig

    shape = {
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "use_cache": False,
    }
    return LlamaConfig(vocab_size=vocab_size, **{**shape, **changes})


CHATML = ("<|im_start|>", "<|im_end|>")
LLAMA_3 = ("<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>")


def write_base(folder: Path, markers: Sequence[str] = CHATML) -> Path:
    """A random three-layer Llama with a byte-level tokenizer and the turn ``markers``, as a transformers folder."""
    import torch
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import LlamaForCausalLM

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    texts = [r["prompt"] for r in requests("alpha", 300, 1)] + ["system user assistant prompt response"] * 5
    texts += ["safe unsafe", *(str(n) for n in range(10, 15)), "safe", "unsafe"] * 5
    trainer = trainers.BpeTrainer(
        vocab_size=512,
        special_tokens=["<|endoftext|>", *markers],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.add_special_tokens([AddedToken(markers[0], special=True)])
    torch.manual_seed(0)
    config = llama_config(tokenizer.get_vocab_size(), num_hidden_layers=3, tie_word_embeddings=True)
    LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save(str(folder / "tokenizer.json"))
    return folder


SHORT = {"tokens_per_step": 512, "max_tokens": 48, "evaluate_every": 40, "checkpoint_every": 20, "freeze_layers": 0}
TRAINING = {**SHORT, "passes": 7.0, "learning_rate": 3e-3, "head_learning_rate": 1e-2, "warmup": 0.1}


def _short(table: Mapping[str, Any]) -> dict[str, Any]:
    """Settings of a training run that takes a minute; ``passes`` say how long, whatever the table has."""
    return {**{name: value for name, value in table.items() if name != "steps"}, **TRAINING}


def shrink(recipe: Recipe) -> Recipe:
    """The recipe with everything large made small, in a ``smoke`` folder of its build; sets the data folder.

    What kinds of teacher, pruning, loss and container it names stays as it is; a recipe to start from becomes one that
    learns from the labels, a bundle to start from the base. A teacher from a GGUF or a score file cannot be made small:
    raises RecipeError.
    """
    folder = recipe.build / "smoke"
    shutil.rmtree(folder, ignore_errors=True)  # an earlier one would be found made, and show nothing
    os.environ[DATA_VARIABLE] = str(write_data(folder / "data"))
    markers = LLAMA_3 if "Llama" in recipe.base["model"] else CHATML
    base = {"model": "smoke/tiny", "folder": str(write_base(folder / "base", markers))}
    changes: dict[str, Any] = {
        "base": base,
        "student": {**recipe.student, "layers": 2, "max_tokens": 64, "samples": 64},
        "train": _short(recipe.train),
        "qat": {**recipe.qat, **SHORT, "steps": 20, "learning_rate": 1e-3} if recipe.qat else {},
        "export": {**recipe.export, "samples": 20},
        "gptq": {**recipe.gptq, "every": 8} if recipe.gptq else {},
        "tune": {**recipe.tune, **SHORT, "steps": 20, "learning_rate": 1e-3} if recipe.tune else {},
        "calibrate": {"sets": ["tiny_calibration"]},
        "evaluate": {
            "sets": ["tiny_test", "tiny_unsafe"],
            "teacher_sets": ["tiny_test"] if recipe.teacher else [],
            "compare": ["tiny_test"],
            "curves": ["tiny_test"],
            "hazards": "tiny_unsafe",
        },
        "corpus": {
            "seed": 1,
            "constructed": {"refusals": 5, "creative": 10},
            "sets": {"tiny_train": {"safe": 250, "unsafe": 250}},
        },
    }
    changes["student"].pop("start_bundle", None)  # which no tiny base fits: the student is cut instead
    if "intermediate_size" in recipe.student:
        changes["student"]["intermediate_size"] = 64
    if recipe.teacher.get("kind") == "trained":
        training = _short(recipe.teacher["train"])
        changes["teacher"] = {**recipe.teacher, "base": base, "layers": 3, "max_tokens": 48, "train": training}
    elif recipe.teacher.get("kind") == "transformers":
        from convert.teachers.formats import find_format
        from convert.tiny_judges import write_judge

        guard = find_format(recipe.teacher.get("guard") or recipe.teacher["model"]).name
        judge = write_judge(folder / "judge", guard)
        changes["teacher"] = {"kind": "transformers", "guard": guard, "model": str(judge)}
    elif recipe.teacher:
        raise RecipeError(f"--smoke has no small stand-in for a teacher of kind {recipe.teacher['kind']!r}.")
    # A random judge knows nothing: the labels teach, so that there is something to calibrate and to compare.
    random_judge = recipe.teacher.get("kind") == "transformers"
    if random_judge:
        changes["evaluate"]["teacher_sets"] = []
    if recipe.distill:
        changes["distill"] = {**recipe.distill, "unlabelled": {"tiny_unlabelled": 40}, "judged": 400}
        if random_judge:
            changes["distill"]["label_weight"] = 20.0
    small = replace(recipe, **changes, build=folder / "build", models=folder / "models")
    if recipe.start:
        small = replace(small, start=replace(small, teacher={}, distill={}, start=None, build=folder / "start"))
    return small
