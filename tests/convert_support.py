"""A recipe for the small world of :mod:`convert.smoke`: every step, in seconds."""

from __future__ import annotations

import json
from pathlib import Path


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

[teacher]
kind = "trained"
layers = 3
max_tokens = 48

[teacher.base]
model = "example/tiny"
folder = {json.dumps(str(base))}

[teacher.train]
lora = {{ rank = 8, alpha = 16, dropout = 0.0 }}
freeze_layers = 0
max_tokens = 48
tokens_per_step = 512
passes = 7.0
learning_rate = 5e-3
head_learning_rate = 1e-2
warmup = 0.1
hazard_weight = 0.3
evaluate_every = 40
checkpoint_every = 20
seed = 3

[distill]
unlabelled = {{ tiny_unlabelled = 40 }}
unlabelled_weight = 1.0
judged = 400
temperature = 2.0
label_weight = 0.5
benign_weight = 0.3

[student]
layers = 2
choose_layers = "importance"
intermediate_size = 64
trim_min_count = 2
samples = 64
max_tokens = 64

[train]
max_tokens = 48
tokens_per_step = 512
passes = 7.0
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

[gptq]
every = 8
rotate = true

[export]
also = ["gguf", "standard"]
samples = 20
tolerance = 0.5

[tune]
tokens_per_step = 512
steps = 10
learning_rate = 1e-3
warmup = 0.1
hidden_weight = 0.1
label_weight = 0.0
evaluate_every = 10
checkpoint_every = 5
seed = 3

[calibrate]
sets = ["tiny_calibration"]

[evaluate]
sets = ["tiny_test", "tiny_unsafe"]
teacher_sets = ["tiny_test"]
compare = ["tiny_test"]
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
