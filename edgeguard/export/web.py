"""Target ``web``: the bundle's INT4 ONNX file for onnxruntime-web, with a JavaScript module and a demo page.

onnxruntime-web's WebAssembly build has the CPU provider's operators, those of com.microsoft included, so the file is
the bundle's own. The tokenizer is read by @huggingface/tokenizers, which leaves regular expressions to JavaScript: its
white space is not that of the Rust library (U+0085, U+FEFF), and its splitting at digits knows ASCII alone. So
tokenizer.json is written with Unicode properties instead, which mean the same everywhere, and compared with the
bundle's on texts made for it.

Sources: onnxruntime-web 1.30, @huggingface/tokenizers 0.2 (npm); tokenizers ``pre_tokenizers/byte_level.rs``,
``digits.rs``; Unicode ``PropList.txt`` (White_Space).
"""

from __future__ import annotations

import json
import os
import random
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edgeguard.bundle import TOKENIZER_NAME
from edgeguard.errors import ParityError
from edgeguard.export import onnx
from edgeguard.export.check_script import check_with_command, not_checked
from edgeguard.export.target import Check, ExportError, Target

if TYPE_CHECKING:
    from edgeguard.bundle import Bundle

__all__ = ["MODULES_VARIABLE", "TARGET", "portable_tokenizer", "write_portable_tokenizer"]

MODULES_VARIABLE = "EDGEGUARD_NODE_MODULES"
PACKAGES = ("onnxruntime-web", "@huggingface/tokenizers")
INSTALL = f"npm install {' '.join(PACKAGES)}"
# How the Rust library's ByteLevel splits (GPT-2's expression), with \s and \S spelled out.
GPT_2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
PIECES = (
    *"word Word WORD don't I'll've 12 345 3.14 ½ ² Ⅷ ٣ १२ ﬁ é e\u0301 ß 東京 日本語123 مرحبا ก็".split(),
    *"🙂 👩\u200d👩\u200d👧 🇩🇪 _x_ $5 <|im_start|> </s>".split(),
    *(" ", "  ", "\t", "\n", "\r\n", "\x00", "\x85", "\xa0", "\u2028", "\u200d", "\ufeff", "\u3000"),
)
RANDOM_TEXTS, PIECES_A_TEXT = 300, 12


def _make(bundle: Bundle, folder: Path) -> dict[str, str | None]:
    made = dict(onnx.TARGET.make(bundle, folder))
    write_portable_tokenizer(bundle, folder)
    return made


def write_portable_tokenizer(bundle: Bundle, folder: Path) -> None:
    """Write the bundle's tokenizer.json into ``folder`` so that other engines of regular expressions split alike.

    Raises ExportError for a way of splitting that is not known here, ParityError where the ids differ.
    """
    source = (bundle.path / TOKENIZER_NAME).read_text(encoding="utf-8")
    target = json.dumps(portable_tokenizer(json.loads(source)), ensure_ascii=False)
    _require_same_ids(source, target)
    (folder / TOKENIZER_NAME).write_text(target, encoding="utf-8", newline="\n")


def portable_tokenizer(tokenizer: dict[str, Any]) -> dict[str, Any]:
    """The object of a tokenizer.json that splits texts alike in Rust and in JavaScript.

    Raises ExportError for a way of splitting that is not known here.
    """
    stated = tokenizer["pre_tokenizer"] or {}
    steps = stated["pretokenizers"] if stated.get("type") == "Sequence" else [stated]
    portable = [step for old in steps for step in _portable_steps(old)]
    return {**tokenizer, "pre_tokenizer": {"type": "Sequence", "pretokenizers": portable}}


def _portable_steps(step: dict[str, Any]) -> Iterator[dict[str, Any]]:
    kind = step.get("type")
    if kind == "Digits":
        yield _split(r"\p{N}" if step.get("individual_digits") else r"\p{N}+")
    elif kind == "ByteLevel":
        if step.get("use_regex", True):
            yield _split(GPT_2)
        yield {**step, "use_regex": False}
    elif kind == "Split" and "Regex" in step["pattern"]:
        yield {**step, "pattern": {"Regex": _spelled_out(step["pattern"]["Regex"])}}
    else:
        raise ExportError(
            f"the target 'web' knows the pre-tokenizers Digits, ByteLevel and Split, found {step}. Nobody has compared "
            "how JavaScript reads it."
        )


def _split(pattern: str) -> dict[str, Any]:
    return {"type": "Split", "pattern": {"Regex": _spelled_out(pattern)}, "behavior": "Isolated", "invert": False}


def _spelled_out(pattern: str) -> str:
    return pattern.replace(r"\s", r"\p{White_Space}").replace(r"\S", r"\P{White_Space}")


def _require_same_ids(source: str, target: str) -> None:
    """Compare two tokenizers on texts made of what platforms read differently. Raises ParityError."""
    from tokenizers import Tokenizer

    rng = random.Random(0)
    texts = [*PIECES, *("".join(rng.choices(PIECES, k=PIECES_A_TEXT)) for _ in range(RANDOM_TEXTS))]
    read = [Tokenizer.from_str(text) for text in (source, target)]
    for tokenizer in read:
        tokenizer.encode_special_tokens = True
    for text in texts:
        wanted, found = (tokenizer.encode(text, add_special_tokens=False).ids for tokenizer in read)
        if wanted != found:
            raise ParityError(
                f"tokenizer.json for JavaScript gives other token ids than the bundle's for {text!r}. Report this."
            )


def _check(folder: Path) -> Check:
    if shutil.which("node") is None:
        return not_checked(f"node is not installed here (nodejs.org; then {INSTALL})")
    with _modules(folder) as modules:
        missing = [name for name in PACKAGES if modules is None or not (modules / name).is_dir()]
        if modules is None or missing:
            return not_checked(
                f"{', '.join(missing)} is not installed in {MODULES_VARIABLE} or beside the export ({INSTALL})"
            )
        version = json.loads((modules / PACKAGES[0] / "package.json").read_text(encoding="utf-8"))["version"]
        check = check_with_command(folder, ["node", "check.mjs"], f"onnxruntime-web {version}, WebAssembly in Node")
    return Check(
        verified=(*check.verified, f"the tokenizer's ids are the bundle's on {len(PIECES) + RANDOM_TEXTS} texts"),
        not_verified=("no browser was started: device_tests/web does that",),
        runtime=check.runtime,
        vectors=check.vectors,
        largest_difference=check.largest_difference,
    )


@contextmanager
def _modules(folder: Path) -> Iterator[Path | None]:
    """The ``node_modules`` that Node finds from ``folder``: the variable's, linked there for now, or one above."""
    named = os.environ.get(MODULES_VARIABLE)
    if named:
        link = folder / "node_modules"
        link.symlink_to(Path(named).expanduser().absolute(), target_is_directory=True)
        try:
            yield link
        finally:
            link.unlink()
    else:
        above = (parent / "node_modules" for parent in folder.absolute().parents)
        yield next((found for found in above if (found / PACKAGES[0]).is_dir()), None)


TARGET = Target(
    name="web",
    make=_make,
    check=_check,
    samples=("web/edgeguard.mjs", "web/check.mjs", "web/index.html", "web/package.json"),
    packages=("tokenizers",),
)
