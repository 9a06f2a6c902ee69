"""The manifest of a bundle (format version 1): dataclasses and their strict reader.

``manifest.json`` is untrusted until read: unknown keys, values of another type or range, repeated keys and file names
that could leave the folder are refused with a BundleError that names file, place, expected and found.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from edgeguard import schema
from edgeguard.calibration import Calibration, Measured
from edgeguard.errors import BundleError
from edgeguard.prompt import MAX_ID, TARGETS, Template
from edgeguard.taxonomy import HAZARDS, SAFE, UNSAFE

__all__ = [
    "DEFAULT_OPERATING_POINT",
    "FORMAT",
    "FORMAT_VERSION",
    "INT4",
    "MANIFEST_NAME",
    "FileEntry",
    "Manifest",
    "OperatingPoint",
    "Provenance",
    "Quantization",
    "SelfTest",
    "SelfTestVector",
]

FORMAT = "edgeguard-bundle"
FORMAT_VERSION = 1
MANIFEST_NAME = "manifest.json"
DEFAULT_OPERATING_POINT = "balanced"
FILE_ENGINES = ("onnx", "onnx-int8", "gguf", "executorch")
# Fewer tokens than this around the judged text would judge fragments.
MIN_TEXT_TOKENS = 16
MAX_TOKENS = 2**17

# No separators, no drive letters, no leading dot: a name can only mean a file in the bundle's own folder.
NAME_PATTERN = r"[A-Za-z0-9][A-Za-z0-9._+-]{0,127}"
NAME_CALLED = "a plain name of letters, digits, '.', '_', '+' and '-' (no folders)"
SHA256_PATTERN = r"[0-9a-f]{64}"
SHA256_CALLED = "64 lower-case hex digits"


@dataclass(frozen=True)
class FileEntry:
    """A file of the bundle; ``engine`` is None for what every engine needs (the tokenizer)."""

    sha256: str
    bytes: int
    engine: str | None

    @classmethod
    def from_dict(cls, data: object, where: str) -> FileEntry:
        """Read ``{"sha256", "bytes", "engine"}``."""
        fields = schema.record(data, where, ["sha256", "bytes", "engine"])
        engine = fields["engine"]
        if engine is not None and engine not in FILE_ENGINES:
            schema.fail(f"{where}.engine", f"null or one of {list(FILE_ENGINES)}", engine)
        return cls(
            sha256=schema.text(fields["sha256"], f"{where}.sha256", pattern=SHA256_PATTERN, called=SHA256_CALLED),
            bytes=schema.integer(fields["bytes"], f"{where}.bytes", low=1, high=2**40),
            engine=engine,
        )


@dataclass(frozen=True)
class OperatingPoint:
    """Thresholds on p_unsafe, and what they did on the calibration split, per target."""

    thresholds: Mapping[str, float]
    measured: Mapping[str, Measured]

    @classmethod
    def from_dict(cls, data: object, where: str) -> OperatingPoint:
        """Read ``{"thresholds": {target: value}, "measured": {target: figures}}``."""
        fields = schema.record(data, where, ["thresholds", "measured"])
        thresholds = schema.record(fields["thresholds"], f"{where}.thresholds", TARGETS)
        measured = schema.record(fields["measured"], f"{where}.measured", TARGETS)
        return cls(
            thresholds={t: schema.number(thresholds[t], f"{where}.thresholds.{t}", low=0, high=1) for t in TARGETS},
            measured={t: Measured.from_dict(measured[t], f"{where}.measured.{t}") for t in TARGETS},
        )


@dataclass(frozen=True)
class Quantization:
    """How weights are stored: integers in ``grid``, one scale per ``group_size`` weights."""

    scheme: str
    grid: tuple[int, int]
    group_size: int
    scale_dtype: str
    embedding: bool

    @classmethod
    def from_dict(cls, data: object, where: str) -> Quantization:
        """Read the five fields."""
        fields = schema.record(data, where, ["scheme", "grid", "group_size", "scale_dtype", "embedding"])
        grid = fields["grid"]
        if not isinstance(grid, list) or [type(v) for v in grid] != [int, int] or grid[0] >= grid[1]:
            schema.fail(f"{where}.grid", "two whole numbers, the lower first", grid)
        if not isinstance(fields["embedding"], bool):
            schema.fail(f"{where}.embedding", "true or false", fields["embedding"])
        return cls(
            scheme=schema.text(fields["scheme"], f"{where}.scheme"),
            grid=(grid[0], grid[1]),
            group_size=schema.integer(fields["group_size"], f"{where}.group_size", low=1, high=2**20),
            scale_dtype=schema.text(fields["scale_dtype"], f"{where}.scale_dtype"),
            embedding=fields["embedding"],
        )

    def to_dict(self) -> dict[str, Any]:
        """The object that :meth:`from_dict` reads."""
        return {**asdict(self), "grid": list(self.grid)}


# The grid of every bundle made here: GGUF's Q4_0, ONNX's MatMulNBits.
INT4 = Quantization("int4-symmetric", (-8, 7), group_size=32, scale_dtype="float16", embedding=True)


@dataclass(frozen=True)
class SelfTestVector:
    """A text whose token count and uncalibrated margin the bundle must reproduce."""

    prompt: str | None
    response: str | None
    tokens: int
    margin: float

    @classmethod
    def from_dict(cls, data: object, where: str) -> SelfTestVector:
        """Read ``{"prompt", "response", "tokens", "margin"}``; one of the texts may be null."""
        fields = schema.record(data, where, ["prompt", "response", "tokens", "margin"])
        prompt = schema.optional_text(fields["prompt"], f"{where}.prompt")
        response = schema.optional_text(fields["response"], f"{where}.response")
        if prompt is None and response is None:
            schema.fail(where, "a prompt or a response", "two nulls")
        return cls(
            prompt=prompt,
            response=response,
            tokens=schema.integer(fields["tokens"], f"{where}.tokens", low=1, high=MAX_TOKENS),
            margin=schema.number(fields["margin"], f"{where}.margin"),
        )


@dataclass(frozen=True)
class SelfTest:
    """Vectors, and how far a margin may be off (logits)."""

    tolerance: float
    vectors: tuple[SelfTestVector, ...]

    @classmethod
    def from_dict(cls, data: object, where: str) -> SelfTest:
        """Read ``{"tolerance", "vectors"}``; at least one vector."""
        fields = schema.record(data, where, ["tolerance", "vectors"])
        vectors = fields["vectors"]
        if not isinstance(vectors, list) or not vectors:
            schema.fail(f"{where}.vectors", "a list of at least one vector", vectors)
        return cls(
            tolerance=schema.number(fields["tolerance"], f"{where}.tolerance", low=0, above=True),
            vectors=tuple(SelfTestVector.from_dict(v, f"{where}.vectors[{i}]") for i, v in enumerate(vectors)),
        )


@dataclass(frozen=True)
class Provenance:
    """Where the bundle comes from; null where it was not recorded."""

    recipe: str | None
    recipe_sha256: str | None
    data_sha256: str | None
    commit: str | None

    @classmethod
    def from_dict(cls, data: object, where: str) -> Provenance:
        """Read the four fields."""
        fields = schema.record(data, where, ["recipe", "recipe_sha256", "data_sha256", "commit"])
        sums = {
            name: schema.optional_text(
                fields[name], f"{where}.{name}", pattern=SHA256_PATTERN, called=f"{SHA256_CALLED}, or null"
            )
            for name in ("recipe_sha256", "data_sha256")
        }
        return cls(
            recipe=schema.optional_text(fields["recipe"], f"{where}.recipe"),
            recipe_sha256=sums["recipe_sha256"],
            data_sha256=sums["data_sha256"],
            commit=schema.optional_text(fields["commit"], f"{where}.commit"),
        )


@dataclass(frozen=True)
class Manifest:
    """All that the runtime knows about a bundle. ``head``: labels of the K logits, in their order.

    ``head_tokens``: label -> token id, for a judge whose head is rows of its vocabulary (its verdict is the first token
    that it would write); None, and not in the file, for a head of K rows.
    """

    name: str
    version: str
    license: str
    base_model: str
    teacher: str | None
    languages: tuple[str, ...]
    max_tokens: int
    template: Template
    head: tuple[str, ...]
    calibration: Mapping[str, Calibration]
    operating_points: Mapping[str, OperatingPoint]
    files: Mapping[str, FileEntry]
    quantization: Quantization | None
    self_test: SelfTest
    provenance: Provenance
    head_tokens: Mapping[str, int] | None = None

    @classmethod
    def from_json(cls, raw: bytes, where: str = MANIFEST_NAME) -> Manifest:
        """Read the bytes of a manifest. ``where`` begins every message."""
        return cls.from_dict(schema.json_object(raw, where), where)

    @classmethod
    def from_dict(cls, data: Mapping[str, Any], where: str = MANIFEST_NAME) -> Manifest:
        """Read a parsed manifest. Raises BundleError that names the place, what was expected and found."""
        _check_format(data, where)
        known = ["format", "format_version", *cls.__dataclass_fields__]
        fields = schema.record({"head_tokens": None, **data}, where, known)
        names = {n: schema.text(fields[n], f"{where}: {n}") for n in ("license", "base_model")}
        for n in ("name", "version"):
            names[n] = schema.text(fields[n], f"{where}: {n}", pattern=NAME_PATTERN, called=NAME_CALLED)
        template = _template(fields["template"], where)
        stored = fields["quantization"]
        head = _head(fields["head"], f"{where}: head")
        return cls(
            **names,
            teacher=schema.optional_text(fields["teacher"], f"{where}: teacher"),
            languages=schema.texts(fields["languages"], f"{where}: languages"),
            max_tokens=_max_tokens(fields["max_tokens"], template, where),
            template=template,
            head=head,
            calibration=_calibration(fields["calibration"], f"{where}: calibration"),
            operating_points=_operating_points(fields["operating_points"], f"{where}: operating_points"),
            files=_files(fields["files"], f"{where}: files"),
            quantization=None if stored is None else Quantization.from_dict(stored, f"{where}: quantization"),
            self_test=SelfTest.from_dict(fields["self_test"], f"{where}: self_test"),
            provenance=Provenance.from_dict(fields["provenance"], f"{where}: provenance"),
            head_tokens=_head_tokens(fields["head_tokens"], head, f"{where}: head_tokens"),
        )

    def to_dict(self) -> dict[str, Any]:
        """The JSON object that :meth:`from_dict` reads."""
        data = asdict(self)
        data["template"] = self.template.to_dict()
        data["languages"], data["head"] = list(self.languages), list(self.head)
        if self.quantization is not None:
            data["quantization"] = self.quantization.to_dict()
        data["self_test"]["vectors"] = list(data["self_test"]["vectors"])
        if self.head_tokens is None:  # as manifests were before there was such a head
            del data["head_tokens"]
        return {"format": FORMAT, "format_version": FORMAT_VERSION, **data}

    @property
    def thresholds(self) -> dict[str, Mapping[str, float]]:
        """Operating point -> target -> threshold on p_unsafe."""
        return {name: point.thresholds for name, point in self.operating_points.items()}


def _check_format(data: Mapping[str, Any], where: str) -> None:
    """First of all, so that a newer manifest is told from a damaged one."""
    if data.get("format") != FORMAT:
        schema.fail(f"{where}: format", repr(FORMAT), data.get("format"))
    version = data.get("format_version")
    if type(version) is not int or version != FORMAT_VERSION:
        raise BundleError(
            f"{where}: format_version: expected {FORMAT_VERSION}, found {version!r:.80}. "
            "Use a bundle made for this version of edgeguard, or upgrade edgeguard-runtime."
        )


def _template(data: object, where: str) -> Template:
    fields = schema.record(data, f"{where}: template", ["opening", "closing", "read", "reserved", "pad_id"])
    try:
        template = Template.from_dict(fields)
    except BundleError as error:
        raise BundleError(f"{where}: {error}") from error
    for role, ids in template.opening.items():
        if template.reserved.isdisjoint(ids):  # otherwise plain text could open a turn of its own
            schema.fail(f"{where}: template.opening.{role}", "at least one of the reserved ids", list(ids))
    return template


def _max_tokens(value: object, template: Template, where: str) -> int:
    opening = max(map(len, template.opening.values()))
    least = opening + len(template.closing) + max(map(len, template.read.values())) + MIN_TEXT_TOKENS
    return schema.integer(value, f"{where}: max_tokens", low=least, high=MAX_TOKENS)


def _head(value: object, where: str) -> tuple[str, ...]:
    labels = schema.texts(value, where)
    if labels[:2] != (SAFE, UNSAFE):
        schema.fail(where, f"the labels to start with {SAFE!r}, {UNSAFE!r}", list(labels[:2]))
    unknown = [label for label in labels[2:] if label not in HAZARDS]
    if unknown:
        schema.fail(where, f"hazard codes from {', '.join(HAZARDS)}", unknown[0])
    return labels


def _head_tokens(value: object, head: tuple[str, ...], where: str) -> dict[str, int] | None:
    if value is None:
        return None
    fields = schema.record(value, where, head)
    tokens = {label: schema.integer(fields[label], f"{where}.{label}", low=0, high=MAX_ID - 1) for label in head}
    if len(set(tokens.values())) < len(tokens):  # two labels of one logit: neither would be judged
        schema.fail(where, "another token for each label", tokens)
    return tokens


def _calibration(value: object, where: str) -> dict[str, Calibration]:
    fields = schema.record(value, where, TARGETS)
    return {target: Calibration.from_dict(fields[target], f"{where}.{target}") for target in TARGETS}


def _operating_points(value: object, where: str) -> dict[str, OperatingPoint]:
    fields = schema.objects(value, where)
    if DEFAULT_OPERATING_POINT not in fields:
        schema.fail(where, f"a point named {DEFAULT_OPERATING_POINT!r}", sorted(fields))
    for name in fields:
        schema.text(name, f"{where}: name", pattern=NAME_PATTERN, called=NAME_CALLED)
    return {name: OperatingPoint.from_dict(point, f"{where}.{name}") for name, point in fields.items()}


def _files(value: object, where: str) -> dict[str, FileEntry]:
    fields = schema.objects(value, where)
    for name in fields:
        schema.text(name, f"{where}: name", pattern=NAME_PATTERN, called=NAME_CALLED)
        if name == MANIFEST_NAME:
            schema.fail(f"{where}: name", "a file other than the manifest itself", name)
    return {name: FileEntry.from_dict(entry, f"{where}.{name}") for name, entry in fields.items()}
