"""Opening a bundle: hostile and damaged ones are refused, each with an error that names file, expected and found."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tiny import HEAD, edit_manifest, refresh_files, write_bundle

import edgeguard.bundle
from edgeguard.bundle import Bundle, default_bundle_path
from edgeguard.errors import BundleError
from edgeguard.manifest import Manifest


def put(path: str, value: object) -> Any:
    """An edit that sets ``a/b/c`` of the manifest; ``value`` ... removes it."""

    def edit(manifest: dict[str, Any]) -> None:
        *parents, last = [int(part) if part.isdigit() else part for part in path.split("/")]
        target: Any = manifest
        for parent in parents:
            target = target[parent]
        if value is ...:
            del target[last]
        else:
            target[last] = value

    return edit


def test_a_sound_bundle_opens(tiny_bundle: Path) -> None:
    bundle = Bundle.open(tiny_bundle)
    assert bundle.label == "tiny@0.0.1"
    assert bundle.file_for("onnx") == tiny_bundle / "model.onnx"
    assert bundle.size_bytes == sum((tiny_bundle / name).stat().st_size for name in ("model.onnx", "tokenizer.json"))
    assert bundle.manifest.head == tuple(HEAD)
    assert bundle.manifest.thresholds["low_fpr"] == {"prompt": 0.9, "response": 0.95}
    assert bundle.manifest.operating_points["balanced"].measured["response"].fpr is None


def test_the_manifest_survives_a_round_trip(tiny_bundle: Path) -> None:
    written = json.loads((tiny_bundle / "manifest.json").read_text())
    manifest = Manifest.from_dict(written)
    assert json.loads(json.dumps(manifest.to_dict())) == written
    assert Manifest.from_dict({**written, "quantization": None}).to_dict()["quantization"] is None
    assert manifest.head_tokens is None and "head_tokens" not in written
    tokens = {"head": ["safe", "unsafe"], "head_tokens": {"unsafe": 39257, "safe": 19193}}
    assert Manifest.from_dict({**written, **tokens}).to_dict() == {**written, **tokens}


BAD_VALUES = [
    ("format", "gguf", "format: expected 'edgeguard-bundle', found 'gguf'"),
    ("format", ..., "format: expected 'edgeguard-bundle', found None"),
    ("format_version", 2, "format_version: expected 1, found 2. Use a bundle"),
    ("format_version", True, "format_version: expected 1, found True"),
    ("format_version", "1", "format_version: expected 1, found '1'"),
    ("format_version", 1.0, "format_version: expected 1, found 1.0"),
    ("surprise", 1, "found 'surprise'"),
    ("name", ..., "found none of the name 'name'"),
    ("name", "../evil", "name: expected a plain name"),
    ("name", "", "name: expected a plain name"),
    ("version", 1, "version: expected a plain name"),
    ("license", "", "license: expected a text that is not empty, found ''"),
    ("teacher", 3, "teacher: expected a text or null, found 3"),
    ("languages", [], "languages: expected a list of at least one text"),
    ("languages", ["en", "en"], "languages: expected no entry twice"),
    ("max_tokens", 20, "max_tokens: expected a whole number from 21 to 131072, found 20"),
    ("max_tokens", 10**30, "max_tokens: expected a whole number"),
    ("max_tokens", True, "max_tokens: expected a whole number"),
    ("template", None, "template: expected an object with the keys"),
    ("template/pad_id", "0", "template: expected lists of token ids"),
    ("template/opening/user", [11], "template.opening.user: expected at least one of the reserved ids, found [11]"),
    ("template/reserved", [], "template.opening.system: expected at least one of the reserved ids"),
    ("template/extra", 1, "template: expected only the keys"),
    ("head", ["unsafe", "safe", *HEAD[2:]], "head: expected the labels to start with 'safe', 'unsafe'"),
    ("head", ["safe"], "head: expected the labels to start with"),
    ("head", [*HEAD, "S3"], "head: expected no entry twice"),
    ("head", ["safe", "unsafe", "S99"], "head: expected hazard codes from S1"),
    ("head", "safe", "head: expected a list"),
    ("calibration/prompt", ..., "calibration: expected the keys ['prompt', 'response'], found none of the name"),
    ("calibration/prompt/temperature", 0, "calibration.prompt.temperature: expected a finite number above 0"),
    ("calibration/prompt/temperature", -1.5, "found -1.5"),
    ("calibration/prompt/bias", None, "calibration.prompt.bias: expected a finite number"),
    ("calibration/prompt/bias", True, "found True"),
    ("calibration/response/bias", 10**400, "calibration.response.bias: expected a finite number"),
    ("operating_points", {}, "operating_points: expected an object with at least one key"),
    ("operating_points/balanced", ..., "operating_points: expected a point named 'balanced'"),
    ("operating_points/low_fpr/thresholds/prompt", 1.01, "low_fpr.thresholds.prompt: expected a finite number from 0"),
    ("operating_points/low_fpr/thresholds/prompt", -0.01, "found -0.01"),
    ("operating_points/low_fpr/thresholds/video", 0.5, "found 'video'"),
    ("operating_points/low_fpr/measured/prompt/f1", 2, "measured.prompt.f1: expected a finite number"),
    ("operating_points/low_fpr/measured/prompt/n", 0, "measured.prompt.n: expected a whole number"),
    ("files", [], "files: expected an object"),
    ("files/tokenizer.json", ..., "files: expected 'tokenizer.json' among them, found model.onnx"),
    (
        "files/model.onnx/engine",
        "cuda",
        "files.model.onnx.engine: expected null or one of ['onnx', 'onnx-int8', 'gguf'",
    ),
    ("files/model.onnx/engine", ["onnx"], "files.model.onnx.engine: expected null or one of"),
    ("files/model.onnx/bytes", -1, "files.model.onnx.bytes: expected a whole number"),
    ("files/model.onnx/sha256", "A" * 64, "sha256: expected 64 lower-case hex digits"),
    ("files/manifest.json", {"sha256": "0" * 64, "bytes": 1, "engine": None}, "other than the manifest itself"),
    ("quantization", {}, "quantization: expected the keys"),
    ("quantization", 0, "quantization: expected an object"),
    ("quantization/grid", [7, -8], "quantization.grid: expected two whole numbers, the lower first, found [7, -8]"),
    ("quantization/embedding", 1, "quantization.embedding: expected true or false, found 1"),
    ("self_test/vectors", [], "self_test.vectors: expected a list of at least one vector"),
    ("self_test/tolerance", 0, "self_test.tolerance: expected a finite number above 0"),
    ("self_test/vectors/0/prompt", None, "self_test.vectors[0]: expected a prompt or a response"),
    ("self_test/vectors/0/tokens", 0, "self_test.vectors[0].tokens: expected a whole number"),
    ("self_test/vectors/0/margin", "1", "self_test.vectors[0].margin: expected a finite number"),
    ("provenance/data_sha256", "abc", "provenance.data_sha256: expected 64 lower-case hex digits, or null"),
    ("provenance/commit", ..., "provenance: expected the keys"),
    ("head_tokens", {"safe": 1, "unsafe": 2}, "head_tokens: expected the keys"),
    ("head_tokens", {label: i for i, label in enumerate([*HEAD, "S15"])}, "head_tokens: expected only the keys"),
    ("head_tokens", [1, 2], "head_tokens: expected an object with the keys"),
    ("head_tokens", dict.fromkeys(HEAD, 7), "head_tokens: expected another token for each label"),
    ("head_tokens", dict.fromkeys(HEAD, -1), "head_tokens.safe: expected a whole number from 0"),
    ("head_tokens", dict.fromkeys(HEAD, True), "head_tokens.safe: expected a whole number from 0"),
    ("head_tokens", dict.fromkeys(HEAD, 2**31), "head_tokens.safe: expected a whole number from 0"),
]


@pytest.mark.parametrize(("path", "value", "message"), BAD_VALUES)
def test_bad_manifest_values(bundle_copy: Path, path: str, value: object, message: str) -> None:
    edit_manifest(bundle_copy, put(path, value))
    with pytest.raises(BundleError, match=re.escape(message)) as caught:
        Bundle.open(bundle_copy)
    assert "manifest.json" in str(caught.value)
    assert len(str(caught.value)) < 1000


@pytest.mark.parametrize(
    "name",
    [
        "../model.onnx",
        "/etc/passwd",
        "..",
        ".",
        "",
        "a/b",
        "a\\b",
        "C:evil",
        ".hidden",
        "a\x00b",
        "é",
        "a\n",
        "x" * 200,
    ],
)
def test_file_names_that_could_leave_the_folder(bundle_copy: Path, name: str) -> None:
    edit_manifest(bundle_copy, put("files", {name: {"sha256": "0" * 64, "bytes": 1, "engine": None}}))
    with pytest.raises(BundleError, match=r"files: name: expected a plain name .* found "):
        Bundle.open(bundle_copy)


@pytest.mark.parametrize(
    ("raw", "message"),
    [
        (b"", "one JSON object"),
        (b"[]", "one JSON object, found []"),
        (b"null", "one JSON object, found None"),
        (b"\xff\xfe{}", "one JSON object"),
        (b'{"format": "edgeguard-bundle", "format": "x"}', "the key 'format' twice"),
        (b'{"format": NaN}', "NaN, which is not JSON"),
        (b'{"format": -Infinity}', "-Infinity, which is not JSON"),
        (b"[" * 100_000, "one JSON object"),
        (b'{"a":' * 100_000, "one JSON object"),
        (b" " * (5 * 2**20), "expected at most 4194304 bytes, found 5242880"),
    ],
    ids=["empty", "list", "null", "encoding", "twice", "nan", "infinity", "deep-list", "deep-object", "huge"],
)
def test_manifests_that_are_not_json(bundle_copy: Path, raw: bytes, message: str) -> None:
    (bundle_copy / "manifest.json").write_bytes(raw)
    with pytest.raises(BundleError, match=re.escape(message)):
        Bundle.open(bundle_copy)


@pytest.mark.parametrize("number", ["1e999", "-1e999"])
def test_numbers_that_overflow_to_infinity(bundle_copy: Path, number: str) -> None:
    file = bundle_copy / "manifest.json"
    edit_manifest(bundle_copy, put("calibration/prompt/bias", 12345.5))
    file.write_text(file.read_text().replace("12345.5", number))
    with pytest.raises(BundleError, match=r"bias: expected a finite number .* found -?inf"):
        Bundle.open(bundle_copy)


@given(value=st.recursive(st.none() | st.booleans() | st.floats() | st.integers() | st.text(), st.lists, max_leaves=5))
def test_no_json_value_anywhere_escapes_as_another_error(tiny_bundle: Path, value: object) -> None:
    written = json.loads((tiny_bundle / "manifest.json").read_text())
    for field in written:
        try:
            Manifest.from_dict({**written, field: value})
        except BundleError as error:
            assert f"manifest.json: {field}" in str(error)


def test_a_missing_file(bundle_copy: Path) -> None:
    size = (bundle_copy / "model.onnx").stat().st_size
    (bundle_copy / "model.onnx").unlink()
    with pytest.raises(BundleError, match=rf"model.onnx: expected a file of {size} bytes, found nothing"):
        Bundle.open(bundle_copy)


def test_a_folder_in_place_of_a_file(bundle_copy: Path) -> None:
    (bundle_copy / "model.onnx").unlink()
    (bundle_copy / "model.onnx").mkdir()
    with pytest.raises(BundleError, match=r"model.onnx: expected a file of"):
        Bundle.open(bundle_copy)


def test_a_file_of_another_size(bundle_copy: Path) -> None:
    file = bundle_copy / "tokenizer.json"
    size = file.stat().st_size
    file.write_bytes(file.read_bytes() + b"\n")
    with pytest.raises(BundleError, match=rf"tokenizer.json: expected {size} bytes, found {size + 1}"):
        Bundle.open(bundle_copy)


def test_one_flipped_bit(bundle_copy: Path) -> None:
    file = bundle_copy / "model.onnx"
    raw = bytearray(file.read_bytes())
    raw[len(raw) // 2] ^= 1
    file.write_bytes(raw)
    with pytest.raises(BundleError, match=r"model.onnx: expected sha256 [0-9a-f]{64}, found [0-9a-f]{64}"):
        Bundle.open(bundle_copy)
    assert Bundle.open(bundle_copy, verify=False).label == "tiny@0.0.1"


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("nowhere", "expected a bundle folder, found nothing"),
        ("tiny/model.onnx", "expected a bundle folder, found a file"),
        ("", "manifest.json: expected the manifest of a bundle, found nothing"),
        ("nul\x00byte", "nul"),
        ("x" * 5000, "found"),
    ],
)
def test_paths_that_are_no_bundle(bundle_copy: Path, name: str, message: str) -> None:
    with pytest.raises(BundleError, match=message):
        Bundle.open(bundle_copy.parent / name)


def test_file_for_needs_exactly_one(bundle_copy: Path) -> None:
    with pytest.raises(BundleError, match=r"one file for the engine 'gguf', found none"):
        Bundle.open(bundle_copy).file_for("gguf")
    shutil.copy(bundle_copy / "model.onnx", bundle_copy / "second.onnx")
    edit_manifest(bundle_copy, put("files/second.onnx", {"engine": "onnx"}))
    refresh_files(bundle_copy)
    with pytest.raises(BundleError, match=r"found \['model.onnx', 'second.onnx'\]"):
        Bundle.open(bundle_copy).file_for("onnx")


def test_a_tokenizer_file_that_is_none(bundle_copy: Path) -> None:
    (bundle_copy / "tokenizer.json").write_text("{}")
    refresh_files(bundle_copy)
    with pytest.raises(BundleError, match=r"tokenizer.json: expected a tokenizers file"):
        Bundle.open(bundle_copy).load_tokenizer()


def test_the_tokenizer_never_cuts_or_pads(bundle_copy: Path) -> None:
    from tokenizers import Tokenizer

    file = bundle_copy / "tokenizer.json"
    tokenizer = Tokenizer.from_file(str(file))
    tokenizer.enable_truncation(4)
    tokenizer.enable_padding(length=50)
    tokenizer.save(str(file))
    refresh_files(bundle_copy)
    loaded = Bundle.open(bundle_copy).load_tokenizer()
    assert 10 <= len(loaded.encode("zqzqzqzqzqzq").ids) < 50


@pytest.mark.parametrize("place", ["edgeguard/models/edgeguard-mini", "models/edgeguard-mini"])
def test_the_shipped_bundle_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, place: str) -> None:
    monkeypatch.setattr(edgeguard.bundle, "__file__", str(tmp_path / "edgeguard" / "bundle.py"))
    with pytest.raises(BundleError, match=r"expected the shipped bundle there or in .*, found neither"):
        default_bundle_path()
    write_bundle(tmp_path / place)
    assert default_bundle_path() == tmp_path / place
