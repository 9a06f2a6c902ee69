"""Do the containers of a bundle judge alike? Each is made from the bundle's integers and asked on the same public rows.

``convert evaluate`` answers that for a recipe's build; this needs the packaged bundle alone.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

from convert.corpora.registry import Row
from edgeguard.bundle import Bundle, sha256_of
from edgeguard.manifest import MANIFEST_NAME

if TYPE_CHECKING:
    from convert.scores import Stage

__all__ = ["SETS", "bundle_parity", "parity_markdown", "public_rows"]

SETS = ("openai_moderation", "toxicchat_test", "xstest", "beavertails_test", "xstest_response")
POINT = "balanced"
REFERENCE = "onnx-float32"


def public_rows(names: Sequence[str], count: int) -> list[Row]:
    """``count`` rows of the sets ``names``, the same ones every time. Raises CorpusError without the data."""
    from convert.corpora.mix import labelled_rows
    from convert.evaluate import parity_rows

    return parity_rows({name: labelled_rows(name) for name in names}, count)


def bundle_parity(folder: Path, rows: Sequence[Row], kept: Path) -> dict[str, Any]:
    """By container: largest and mean difference of the margin to :data:`REFERENCE`, and the share of same decisions.

    The reference is the bundle's INT4 integers, dequantized, in float32 products. Decisions are those at ``balanced``
    under the bundle's calibration. ``gguf`` is left out where llama-cpp-python is not installed. What a container
    answered stands in ``kept``, in a folder of the bundle's own, and is read back when neither it nor the rows changed.
    Raises BundleError, TranscodeError.
    """
    from convert.evaluate import Fitted, verdict_parity
    from convert.scores import score_rows

    bundle = Bundle.open(folder)
    manifest, tokenizer, logits = bundle.manifest, bundle.load_tokenizer(), {}
    manifest_sha256 = sha256_of(folder / MANIFEST_NAME)
    kept = kept / manifest_sha256[:16]  # the manifest names the tokenizer too
    with TemporaryDirectory() as made:
        for stage in _stages(bundle, Path(made)):
            logits[stage.name] = score_rows(
                stage, "parity", rows, manifest.template, tokenizer, manifest.max_tokens, kept
            )
    reference, fitted = logits.pop(REFERENCE), Fitted.of_manifest(manifest)
    compared = {name: verdict_parity(rows, reference, found, fitted, POINT) for name, found in logits.items()}
    figures = ("max_abs_diff", "mean_abs_diff", "agreement")
    containers = {name: {key: entry[key] for key in figures} for name, entry in compared.items()}
    return {
        "bundle": bundle.label,
        "manifest_sha256": manifest_sha256,
        "reference": REFERENCE,
        "operating_point": POINT,
        "rows": len(rows),
        "sets": {name: sum(row.set == name for row in rows) for name in sorted({row.set for row in rows})},
        "containers": containers,
    }


def parity_markdown(record: Mapping[str, Any]) -> str:
    """The table of a record of :func:`bundle_parity`."""
    lines = ["| container | largest difference | mean difference | same decision |", "|---|---|---|---|"]
    lines += [
        f"| {name} | {entry['max_abs_diff']:.3f} | {entry['mean_abs_diff']:.4f} | {entry['agreement']:.4f} |"
        for name, entry in record["containers"].items()
    ]
    head = f"{record['bundle']}: margins against {record['reference']}, {record['rows']} rows, decisions at {POINT}"
    return "\n".join([head, "", *lines])


def _stages(bundle: Bundle, made: Path) -> list[Stage]:
    """The reference and every container; what the bundle does not hold is written into the folder ``made``."""
    import onnx

    from convert.export.onnx_graph import build_guard_graph
    from convert.export.standard_onnx import build_standard_graph
    from convert.scores import gguf_stage, int8_stage, onnx_stage
    from edgeguard.engines.gguf_source import read_onnx
    from edgeguard.export.gguf_transcode import bundle_to_gguf

    source, pad_id = bundle.file_for("onnx"), bundle.manifest.template.pad_id
    student = read_onnx(source)
    graphs = {
        REFERENCE: build_guard_graph(student.weights, student.config, int4=False),
        "standard": build_standard_graph(student.weights, student.config),
    }
    for name, graph in graphs.items():
        onnx.save(graph, made / f"{name}.onnx")
    stages = [
        onnx_stage(REFERENCE, made / f"{REFERENCE}.onnx", pad_id),
        onnx_stage("onnx", source, pad_id),
        onnx_stage("standard", made / "standard.onnx", pad_id),
    ]
    if any(entry.engine == "onnx-int8" for entry in bundle.manifest.files.values()):
        stages.append(int8_stage("onnx-int8", bundle.file_for("onnx-int8"), pad_id))
    if importlib.util.find_spec("llama_cpp"):
        bundle_to_gguf(bundle, made / "model.gguf")
        stages.append(gguf_stage("gguf", made / "model.gguf"))
    return stages
