"""A whole small world for the conversion layer: a tiny base model, labelled sets and a recipe. No network."""

from __future__ import annotations

import gzip
import hashlib
import json
import random
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from transformers import LlamaConfig

# One word decides the label, so that a tiny student learns it in seconds.
SAFE_VERBS = ("bake", "paint", "repair", "clean", "draw", "grow")
UNSAFE_VERBS = ("hurt", "rob", "poison", "stalk", "threaten", "blackmail")
THINGS = tuple(
    f"{colour} {thing}" for colour in ("red", "blue", "old", "new") for thing in ("car", "cake", "shop", "man")
)
ENTRY = {
    "commercial": "yes",
    "license": "CC0-1.0",
    "labels_by": "construction",
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
        text = f"{rng.choice(verbs)} the {rng.choice(THINGS)} {name} {index}"
        if index % 3:
            rows.append(row(name, index, f"How do I {text}?", label))
        else:
            rows.append(row(name, index, f"What now, {name} {index}?", label, f"You {text}."))
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
    """A data folder with a train, a calibration and two test sets."""
    return write_sets(
        folder,
        {
            "tiny_train": ({"role": "train"}, requests("alpha", 600, 1)),
            "tiny_calibration": ({"role": "calibration"}, requests("beta", 120, 2)),
            "tiny_test": ({"role": "test"}, requests("gamma", 60, 3)),
            "tiny_unsafe": ({"role": "test"}, [r for r in requests("delta", 40, 4) if r["label"] == "unsafe"]),
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


def write_base(folder: Path) -> Path:
    """A random three-layer Llama with a byte-level tokenizer and ChatML markers, as a transformers folder."""
    import torch
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import LlamaForCausalLM

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    texts = [r["prompt"] for r in requests("alpha", 300, 1)] + ["system user assistant prompt response"] * 5
    trainer = trainers.BpeTrainer(
        vocab_size=512,
        special_tokens=["<|endoftext|>", "<|im_start|>", "<|im_end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.add_special_tokens([AddedToken("<|im_start|>", special=True)])
    torch.manual_seed(0)
    config = llama_config(tokenizer.get_vocab_size(), num_hidden_layers=3, tie_word_embeddings=True)
    LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save(str(folder / "tokenizer.json"))
    return folder


def write_recipe(path: Path, base: Path) -> Path:
    """The shipped recipe's shape, made small."""
    path.write_text(
        f"""
name = "tiny-guard"
version = "0.0.1"
license = "Apache-2.0"
languages = ["en"]

[base]
model = "example/tiny"
folder = {json.dumps(str(base))}

[student]
layers = 2
max_tokens = 64

[train]
max_tokens = 48
tokens_per_step = 512
passes = 4.0
learning_rate = 3e-3
head_learning_rate = 1e-2
warmup = 0.1
freeze_layers = 0
hazard_weight = 0.3
evaluate_every = 40
checkpoint_every = 20
seed = 1

[qat]
tokens_per_step = 512
steps = 20
learning_rate = 1e-3
warmup = 0.1
hidden_weight = 0.1
label_weight = 0.5
evaluate_every = 20
checkpoint_every = 10
seed = 2

[export]
samples = 20
tolerance = 0.5

[calibrate]
sets = ["tiny_calibration"]

[evaluate]
sets = ["tiny_test", "tiny_unsafe"]
curves = ["tiny_test"]
hazards = "tiny_unsafe"

[corpus]
seed = 1

[corpus.constructed]
refusals = 5
creative = 10

[corpus.sets]
tiny_train = {{ safe = 250, unsafe = 250 }}
"""
    )
    return path
