"""Computes golden.jsonl with ExecuTorch and tokenizers alone, one verdict a line.

Usage: python check_pte.py [other.jsonl]
Exit codes: 0 all lines are right, 2 a line is wrong.
"""

import json
import sys
from pathlib import Path

import torch
from executorch.runtime import Runtime
from rules import run_golden
from tokenizers import Tokenizer

here = Path(__file__).resolve().parent
manifest = json.loads((here / "manifest.json").read_text("utf-8"))
tokenizer = Tokenizer.from_file(str(here / "tokenizer.json"))
tokenizer.encode_special_tokens = True  # "<|im_start|>" in a text stays text
program = Runtime.get().load_program(here / "model.pte")  # kept: the method runs out of its memory
method = program.load_method("forward")


def tokenize(text):
    """Text -> token ids."""
    return tokenizer.encode(text, add_special_tokens=False).ids


def margin_of(ids):
    """Token ids -> logit(unsafe) - logit(safe)."""
    (logits,) = method.execute([torch.tensor([ids])])
    return float(logits[0, 1] - logits[0, 0])


if __name__ == "__main__":
    file = sys.argv[1] if len(sys.argv) > 1 else here / "golden.jsonl"
    sys.exit(run_golden(file, tokenize, margin_of, manifest))
