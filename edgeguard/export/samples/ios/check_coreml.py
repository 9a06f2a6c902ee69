"""Computes golden.jsonl with Core ML and tokenizers alone, one verdict a line. Needs a Mac with macOS 15 or newer.

Usage: python check_coreml.py [other.jsonl]; COMPUTE_UNITS=CPU_ONLY, CPU_AND_GPU, CPU_AND_NE (ALL unless told)
Exit codes: 0 all lines are right, 2 a line is wrong.
"""

import functools
import json
import os
import shutil
import sys
import tempfile
from pathlib import Path

import coremltools
import numpy as np
from rules import run_golden
from tokenizers import Tokenizer

here = Path(__file__).resolve().parent
manifest = json.loads((here / "manifest.json").read_text("utf-8"))
tokenizer = Tokenizer.from_file(str(here / "tokenizer.json"))
tokenizer.encode_special_tokens = True  # "<|im_start|>" in a text stays text
scratch = tempfile.TemporaryDirectory()
shutil.unpack_archive(here / "model.mlpackage.zip", scratch.name, "zip")
package = str(Path(scratch.name) / "model.mlpackage")
units = coremltools.ComputeUnit[os.environ.get("COMPUTE_UNITS", "ALL")]
functions = coremltools.utils.load_spec(package).description.functions
lengths = sorted(int(function.name.rpartition("_")[2]) for function in functions)


@functools.cache
def model(length):
    """The function for rows of ``length`` tokens."""
    return coremltools.models.MLModel(package, compute_units=units, function_name=f"tokens_{length}")


def tokenize(text):
    """Text -> token ids."""
    return tokenizer.encode(text, add_special_tokens=False).ids


def margin_of(ids):
    """Token ids -> logit(unsafe) - logit(safe)."""
    length = next(length for length in lengths if length >= len(ids))
    row = np.zeros((1, length), np.int32)
    row[0, : len(ids)] = ids
    logits = model(length).predict({"input_ids": row, "last": np.array([len(ids) - 1], np.int32)})["logits"]
    return float(logits[0, 1]) - float(logits[0, 0])


if __name__ == "__main__":
    file = sys.argv[1] if len(sys.argv) > 1 else here / "golden.jsonl"
    sys.exit(run_golden(file, tokenize, margin_of, manifest))
