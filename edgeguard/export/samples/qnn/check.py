"""Computes golden.jsonl with onnxruntime and tokenizers alone, one verdict a line.

Usage: python check.py [other.jsonl]
Exit codes: 0 all lines are right, 2 a line is wrong. UNIT=npu in the environment computes on Qualcomm's NPU (package
onnxruntime-qnn; on x86-64 its emulation), UNIT=cpu on onnxruntime's CPU provider; npu where that package is installed.
"""

import importlib.util
import json
import os
import sys
from functools import cache
from pathlib import Path

import numpy as np
import onnxruntime
from rules import run_golden
from tokenizers import Tokenizer

here = Path(__file__).resolve().parent
manifest = json.loads((here / "manifest.json").read_text("utf-8"))
tokenizer = Tokenizer.from_file(str(here / "tokenizer.json"))
tokenizer.encode_special_tokens = True  # "<|im_start|>" in a text stays text
lengths = sorted(int(name.split(".")[1]) for name in manifest["files"] if name.endswith(".onnx"))
unit = os.environ.get("UNIT") or ("npu" if importlib.util.find_spec("onnxruntime_qnn") else "cpu")
options = onnxruntime.SessionOptions()
providers = ["CPUExecutionProvider"]
if unit == "npu":
    import onnxruntime_qnn

    name = "QNNExecutionProvider"
    onnxruntime.register_execution_provider_library(name, onnxruntime_qnn.get_library_path())
    found = [device for device in onnxruntime.get_ep_devices() if device.ep_name == name]
    npus = [device for device in found if device.device.type == onnxruntime.OrtHardwareDeviceType.NPU]
    # On x86-64 the library offers no NPU, and emulates one on the CPU.
    options.add_provider_for_devices(
        (npus or found)[:1], {"backend_path": onnxruntime_qnn.get_qnn_htp_path(), "offload_graph_io_quantization": "0"}
    )
    options.add_session_config_entry("session.record_ep_graph_assignment_info", "1")
    providers = None


@cache
def session(length):
    """The graph for so many tokens, loaded once."""
    loaded = onnxruntime.InferenceSession(str(here / f"model.{length}.onnx"), options, providers=providers)
    if others := nodes(loaded).keys() - {unit}:
        print(f"warning: model.{length}.onnx: nodes fell back to {', '.join(others)}: {nodes(loaded)}", file=sys.stderr)
    return loaded


def nodes(loaded):
    """How many nodes run on which unit, as onnxruntime tells it; empty where only the CPU was asked for."""
    if unit == "cpu":
        return {}
    units = {"QNNExecutionProvider": "npu", "CPUExecutionProvider": "cpu"}
    counts = {}
    for part in loaded.get_provider_graph_assignment_info():
        counts[units[part.ep_name]] = counts.get(units[part.ep_name], 0) + len(part.get_nodes())
    return counts


def tokenize(text):
    """Text -> token ids."""
    return tokenizer.encode(text, add_special_tokens=False).ids


def margin_of(ids):
    """Token ids -> logit(unsafe) - logit(safe), by the shortest graph that they fit; padding is never seen."""
    length = next(length for length in lengths if length >= len(ids))
    row = np.full((1, length), manifest["template"]["pad_id"], np.int32)
    row[0, : len(ids)] = ids
    (logits,) = session(length).run(["logits"], {"input_ids": row, "last": np.array([len(ids) - 1], np.int32)})
    return float(logits[0, 1] - logits[0, 0])


if __name__ == "__main__":
    sys.stdout = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # Qualcomm's library prints to stdout, which is for verdicts alone
    file = sys.argv[1] if len(sys.argv) > 1 else here / "golden.jsonl"
    sys.exit(run_golden(file, tokenize, margin_of, manifest))
