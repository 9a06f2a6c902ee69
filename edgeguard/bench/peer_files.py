"""Files for the peers, made from a bundle's INT4 integers: GGUF without loss, floats by dequantizing.

They are written into a folder of the run and gone with it.
"""

from __future__ import annotations

import json
import runpy
import shutil
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edgeguard.bench.records import BenchError
from edgeguard.bundle import TOKENIZER_NAME, Bundle
from edgeguard.errors import BundleError

if TYPE_CHECKING:
    from edgeguard.engines.gguf_source import OnnxStudent
    from edgeguard.engines.int4_weights import StudentConfig

__all__ = ["FILES", "HEAD_BIAS", "PeerFiles", "prepare", "size_of"]

HEAD_BIAS = "head_bias.json"  # transformers' classification head has no bias; it is added to what a peer returns
SHARD_BYTES = 2**28
GENAI_BUILDER = "onnxruntime_genai.models.builder"
NEEDS = (
    "{error}. Its files are written with what \"pip install 'edgeguard-runtime[convert]'\" brings, and with the "
    "library's own tools."
)


@dataclass(frozen=True)
class PeerFiles:
    """``place``: (bundle folder, folder of the run) -> the model to load. ``write``: makes it; None: it is there."""

    place: Callable[[Path, Path], Path]
    write: Callable[[Path, Path, int], None] | None


def prepare(files: str, bundle: Path, folder: Path, threads: int) -> None:
    """Make what the peers of the kind ``files`` read, unless it is in ``folder`` already.

    Raises BenchError without the packages that write them, TranscodeError for a bundle that has no INT4 Llama.
    """
    kind = FILES[files]
    if kind.write is None:
        kind.place(bundle, folder)  # raises BundleError where the bundle has no such file
    elif not kind.place(bundle, folder).exists():
        try:
            kind.write(bundle, folder, threads)
        except ImportError as error:
            raise BenchError(NEEDS.format(error=error)) from error


def size_of(files: str, bundle: Path, folder: Path) -> int:
    """Bytes of what such a peer loads."""
    place = FILES[files].place(bundle, folder)
    return sum(file.stat().st_size for file in ([place] if place.is_file() else place.rglob("*")) if file.is_file())


def _onnx_place(bundle: Path, _: Path) -> Path:
    return Bundle.open(bundle, verify=False).file_for("onnx")


def _gguf_place(bundle: Path, folder: Path) -> Path:
    """The bundle's own GGUF where it has one."""
    try:
        return Bundle.open(bundle, verify=False).file_for("gguf")
    except BundleError:
        return folder / "model.gguf"


def _write_gguf(bundle: Path, folder: Path, _: int) -> None:
    from edgeguard.export.gguf_transcode import bundle_to_gguf

    bundle_to_gguf(Bundle.open(bundle), folder / "model.gguf")


def _write_transformers(bundle: Path, folder: Path, _: int) -> None:
    """A float32 LlamaForSequenceClassification whose classes are the rows of the head."""
    from edgeguard.engines.gguf_source import read_onnx

    source = Bundle.open(bundle, verify=False)
    student = read_onnx(source.file_for("onnx"))
    target = folder / "transformers"
    target.mkdir()
    _write_shards(student, target)
    config = transformers_config(student.config, source.manifest.head, source.manifest.template.pad_id)
    (target / "config.json").write_text(json.dumps(config, indent=1))
    bias: list[float] = student.weights["head.bias"].tolist()  # type: ignore[union-attr]
    (folder / HEAD_BIAS).write_text(json.dumps(bias))


def transformers_config(config: StudentConfig, labels: tuple[str, ...], pad_id: int) -> dict[str, Any]:
    """The ``config.json`` of that model.

    Factors of a scaled RoPE stand as "longrope", which divides by each of them.
    """
    scaling = None
    if config.rope_factors is not None:
        factors = list(config.rope_factors)
        scaling = {"rope_type": "longrope", "short_factor": factors, "long_factor": factors, "attention_factor": 1.0}
    return {
        "architectures": ["LlamaForSequenceClassification"],
        "model_type": "llama",
        "hidden_act": "silu",
        "torch_dtype": "float32",
        "vocab_size": config.vocab_size,
        "hidden_size": config.hidden_size,
        "intermediate_size": config.intermediate_size,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_heads,
        "num_key_value_heads": config.num_kv_heads,
        "head_dim": config.head_dim,
        "rms_norm_eps": config.rms_norm_eps,
        "rope_theta": config.rope_theta,
        "rope_scaling": scaling,
        "max_position_embeddings": config.max_tokens,
        "tie_word_embeddings": True,
        "bos_token_id": pad_id,
        "eos_token_id": pad_id,
        "pad_token_id": pad_id,
        "id2label": {str(i): label for i, label in enumerate(labels)},
        "label2id": {label: i for i, label in enumerate(labels)},
    }


def _write_shards(student: OnnxStudent, target: Path) -> None:
    """Dequantize weight by weight and write them in files of a bounded size, so that memory stays bounded too."""
    from safetensors.numpy import save_file

    from edgeguard.engines.int4_weights import as_float32

    where: dict[str, str] = {}
    shard: dict[str, Any] = {}

    def flush() -> None:
        if shard:
            name = f"model-{len(set(where.values())):05d}.safetensors"
            save_file(shard, target / name, metadata={"format": "pt"})
            where.update(dict.fromkeys(shard, name))
            shard.clear()

    for name, weight in student.weights.items():
        if name == "head.bias":
            continue
        shard["score.weight" if name == "head.weight" else name] = as_float32(weight)
        if sum(value.nbytes for value in shard.values()) >= SHARD_BYTES:
            flush()
    flush()
    index = {"metadata": {}, "weight_map": where}
    (target / "model.safetensors.index.json").write_text(json.dumps(index))


def _write_optimum(bundle: Path, folder: Path, threads: int) -> None:
    """What optimum's own exporter makes of the float32 model."""
    from optimum.exporters.onnx import main_export

    prepare("transformers", bundle, folder, threads)
    target = folder / "optimum"
    part = folder / "optimum.part"
    main_export(str(folder / "transformers"), part, task="text-classification", do_validation=False)
    part.rename(target)


def _write_genai(bundle: Path, folder: Path, threads: int) -> None:
    """What onnxruntime-genai's builder makes of the float32 model: it rounds to INT4 again, by its own rule."""
    prepare("transformers", bundle, folder, threads)
    source, part = folder / "genai.source", folder / "genai.part"
    source.mkdir()
    for file in (folder / "transformers").iterdir():
        (source / file.name).hardlink_to(file)
    config = json.loads((source / "config.json").read_text())
    (source / "config.json").unlink()
    (source / "config.json").write_text(json.dumps({**config, "architectures": ["LlamaForCausalLM"]}))
    shutil.copyfile(bundle / TOKENIZER_NAME, source / TOKENIZER_NAME)
    (source / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "PreTrainedTokenizerFast"}))
    arguments = ["-i", str(source), "-o", str(part), "-p", "int4", "-e", "cpu", "-c", str(folder / "genai.cache")]
    before = sys.argv
    sys.argv = [GENAI_BUILDER, *arguments]
    try:
        runpy.run_module(GENAI_BUILDER, run_name="__main__")
    except SystemExit as error:
        if error.code:
            raise BenchError(f"{GENAI_BUILDER} ended with {error.code}.") from error
    finally:
        sys.argv = before
    _tell_threads(part / "genai_config.json", threads)
    part.rename(folder / "genai")


def _tell_threads(file: Path, threads: int) -> None:
    config = json.loads(file.read_text())
    config["model"]["decoder"]["session_options"]["intra_op_num_threads"] = threads
    file.write_text(json.dumps(config, indent=1))


FILES: dict[str, PeerFiles] = {
    "onnx": PeerFiles(_onnx_place, None),
    "gguf": PeerFiles(_gguf_place, _write_gguf),
    "transformers": PeerFiles(lambda _, folder: folder / "transformers", _write_transformers),
    "optimum": PeerFiles(lambda _, folder: folder / "optimum", _write_optimum),
    "genai": PeerFiles(lambda _, folder: folder / "genai", _write_genai),
}
