"""The target ``web``: JavaScript reads texts as Python does, and judges as the guard does."""

from __future__ import annotations

import json
import os
import random
import shutil
import subprocess
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from cli_support import run
from tiny import TEMPLATE, make_tokenizer
from tokenizers import Tokenizer

pytest.importorskip("onnx", reason="onnx is not installed: pip install 'edgeguard-runtime[test]'")


from edgeguard.bundle import default_bundle_path  # noqa: E402
from edgeguard.calibration import Calibration  # noqa: E402
from edgeguard.errors import ParityError  # noqa: E402
from edgeguard.export import ExportError, web  # noqa: E402
from edgeguard.export.make import export_bundle, open_export  # noqa: E402
from edgeguard.export.target import SAMPLES  # noqa: E402
from edgeguard.export.web import MODULES_VARIABLE, portable_tokenizer  # noqa: E402
from edgeguard.policy import decide  # noqa: E402
from edgeguard.prompt import as_messages  # noqa: E402

needs_node = pytest.mark.skipif(shutil.which("node") is None, reason="node is not installed")
needs_modules = pytest.mark.skipif(
    MODULES_VARIABLE not in os.environ,
    reason=f"{MODULES_VARIABLE} names no folder with {' and '.join(web.PACKAGES)}",
)


def in_node(script: str, value: Any, folder: Path) -> Any:
    """Run an ES module that has ``value``, and the functions of edgeguard.mjs; what it gives to ``tell`` comes back."""
    (folder / "value.json").write_text(json.dumps(value))
    module = (SAMPLES / "web" / "edgeguard.mjs").as_uri()
    (folder / "script.mjs").write_text(
        f'import {{ readFileSync }} from "node:fs";\nimport {{ encode, verdict, Guard }} from "{module}";\n'
        'const value = JSON.parse(readFileSync("value.json", "utf-8"));\n'
        f"const tell = (found) => console.log(JSON.stringify(found));\n{script}\n"
    )
    done = subprocess.run(["node", "script.mjs"], cwd=folder, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


class CodePoints:
    """A tokenizer that both languages have: a token a character."""

    def encode(self, text: str, add_special_tokens: bool) -> SimpleNamespace:
        return SimpleNamespace(ids=[ord(character) + 100 for character in text])


@needs_node
def test_javascript_encodes_as_python_does(tmp_path: Path) -> None:
    rng = random.Random(0)
    conversations = [
        [
            {
                "role": rng.choice(["system", "user", "assistant"]),
                "content": "aé🙂 \n"[rng.randrange(4) :] * rng.randrange(9),
            }
            for _ in range(rng.randint(1, 6))
        ]
        for _ in range(300)
    ]
    conversations = [talk for talk in conversations if talk[-1]["content"].strip("\x00 \t\r\n")]
    # Longer than is tokenized at all, with a character of two UTF-16 units on either side of every cut.
    conversations += [[{"role": "user", "content": "a" * lead + "🙂" * 9000}] for lead in (0, 1, 2)]
    # Not blank, though nothing is left of it.
    conversations.append([{"role": "user", "content": " " * 20_000 + "a" + " " * 20_000}])
    limits = [rng.randint(24, 60) for _ in conversations]
    found = in_node(
        """
        const tokenize = (text) => Array.from(text, (character) => character.codePointAt(0) + 100);
        const { template, talks, limits } = value;
        tell(talks.map((talk, i) => encode(talk, tokenize, { template, max_tokens: limits[i] })));
        """,
        {"template": TEMPLATE.to_dict(), "talks": conversations, "limits": limits},
        tmp_path,
    )
    for talk, limit, answer in zip(conversations, limits, found, strict=True):
        wanted = TEMPLATE.encode(CodePoints(), as_messages(messages=talk), limit)
        assert answer == {"ids": wanted.ids, "target": wanted.target, "truncated": wanted.truncated}
    assert 20 < sum(answer["truncated"] for answer in found) < len(found) - 20


@needs_node
def test_javascript_decides_as_python_does(tmp_path: Path) -> None:
    calibration = Calibration(1.3, -0.2)
    manifest = {
        "calibration": {"prompt": calibration.to_dict()},
        "operating_points": {"balanced": {"thresholds": {"prompt": 0.6}}},
    }
    margins = [*(i / 7 for i in range(-70, 70)), 1e6, -1e6]
    found = in_node(
        'tell(value.margins.flatMap((m) => [false, true].map((cut) => verdict(m, "prompt", cut, value.manifest))));',
        {"manifest": manifest, "margins": margins},
        tmp_path,
    )
    wanted = [(calibration.probability(m), cut) for m in margins for cut in (False, True)]
    for (p_unsafe, cut), answer in zip(wanted, found, strict=True):
        assert answer["pUnsafe"] == pytest.approx(p_unsafe, abs=1e-12)
        assert answer["action"] == decide(p_unsafe, 0.6, truncated=cut)[1]


@needs_node
def test_javascript_fails_closed(tmp_path: Path) -> None:
    found = in_node(
        """
        const manifest = { template: value, max_tokens: 40, format: "edgeguard-bundle", format_version: 1,
          files: { "model.onnx": { bytes: 1, sha256: "0" }, "tokenizer.json": { bytes: 1, sha256: "0" } } };
        const user = (content) => [{ role: "user", content }];
        const rules = (calibration, thresholds = { prompt: 0.5 }) => ({
          calibration: { prompt: { temperature: 1, bias: 0, ...calibration } },
          operating_points: { balanced: { thresholds } },
        });
        const bytes = (object) => new TextEncoder().encode(JSON.stringify(object));
        const tries = [
          () => encode([], () => [], manifest),
          () => encode(user(" \\n\\0"), () => [5], manifest),
          () => encode(user("x"), () => [1], manifest),
          () => encode([{ role: "wizard", content: "x" }], () => [5], manifest),
          () => verdict(NaN, "prompt", false, rules({})),
          () => verdict(Infinity, "prompt", false, rules({})),
          () => verdict(0, "prompt", false, rules({ temperature: 0 })),
          () => verdict(9, "prompt", false, rules({ bias: "0.1" })),
          () => verdict(9, "prompt", false, rules({}, {})),
          () => Guard.load("file:///", { read: async () => bytes({ format: "other" }) }),
          () => Guard.load("file:///", { read: async (name) => bytes(name === "manifest.json" ? manifest : {}) }),
        ];
        const said = [];
        for (const one of tries) {
          try { await one(); said.push(null); } catch (error) { said.push(String(error)); }
        }
        tell(said);
        """,
        TEMPLATE.to_dict(),
        tmp_path,
    )
    expected = [
        "nothing to judge",
        "nothing to judge",
        "special token",
        "",
        "margin is NaN",
        "margin is Infinity",
        "pUnsafe is NaN",
        "bias is 0.1",
        "threshold is undefined",
        "found other",
        "not the file",
    ]
    assert all(said is not None and words in said for said, words in zip(found, expected, strict=True)), found


# The tokenizer


@pytest.mark.parametrize("of", ["tiny", "shipped"])
def test_the_portable_tokenizer_gives_the_same_ids(of: str) -> None:
    source = make_tokenizer().to_str()
    if of == "shipped":
        source = (default_bundle_path() / "tokenizer.json").read_text(encoding="utf-8")
    made = portable_tokenizer(json.loads(source))
    web._require_same_ids(source, json.dumps(made))
    patterns = [step["pattern"]["Regex"] for step in made["pre_tokenizer"]["pretokenizers"] if step["type"] == "Split"]
    assert patterns and not any("\\s" in pattern or "\\S" in pattern for pattern in patterns)
    assert made["pre_tokenizer"]["pretokenizers"][-1]["use_regex"] is False


def test_a_tokenizer_that_splits_otherwise_is_found() -> None:
    source = make_tokenizer().to_str()
    other = portable_tokenizer(json.loads(source))
    other["pre_tokenizer"]["pretokenizers"][0]["pattern"]["Regex"] = r"\p{L}"
    with pytest.raises(ParityError, match="gives other token ids than the bundle's for"):
        web._require_same_ids(source, json.dumps(other))


def test_an_unknown_way_of_splitting_is_refused() -> None:
    data = json.loads(make_tokenizer().to_str())
    with pytest.raises(ExportError, match="knows the pre-tokenizers Digits, ByteLevel and Split, found"):
        portable_tokenizer({**data, "pre_tokenizer": {"type": "Metaspace"}})
    with pytest.raises(ExportError, match="found {}"):
        portable_tokenizer({**data, "pre_tokenizer": None})


# The export


def test_without_node_the_export_says_what_was_not_verified(
    int4_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    result = run("export", "--target", "web", "--bundle", int4_bundle, "-o", tmp_path / "web")
    assert result.exit_code == 0 and "the golden vectors were not computed: node is not installed" in result.stderr
    export = open_export(tmp_path / "web")
    assert set(export.bundle.manifest.files) == {
        *("model.onnx", "README.md", "check.mjs", "edgeguard.mjs", "export.json"),
        *("golden.jsonl", "index.html", "package.json", "tokenizer.json"),
    }
    assert (tmp_path / "web" / "model.onnx").read_bytes() == (int4_bundle / "model.onnx").read_bytes()
    assert Tokenizer.from_file(str(tmp_path / "web" / "tokenizer.json")).get_vocab_size() > 0
    assert run("verify", tmp_path / "web", "--threads", "1").exit_code == 0


@needs_node
def test_without_the_packages_the_export_says_so(
    int4_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(MODULES_VARIABLE, str(tmp_path / "nowhere"))
    check = export_bundle("web", int4_bundle, tmp_path / "web").facts.check
    assert check.vectors == 0 and "onnxruntime-web, @huggingface/tokenizers is not installed" in check.not_verified[0]
    assert not (tmp_path / "web" / "node_modules").is_symlink()


@needs_node
@needs_modules
def test_the_export_is_verified_in_node(int4_bundle: Path, tmp_path: Path) -> None:
    check = export_bundle("web", int4_bundle, tmp_path / "web").facts.check
    assert check.runtime is not None and check.runtime.startswith("onnxruntime-web ")
    assert check.vectors >= 12 and (check.largest_difference or 0) <= 1.0
    assert check.not_verified == ("no browser was started: device_tests/web does that",)
