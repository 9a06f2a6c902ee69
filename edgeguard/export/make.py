"""Making an export: a folder that an app can bundle, written whole or not at all, verified before it is there.

Every export is a bundle of edgeguard as well (``edgeguard verify`` accepts it): ``manifest.json`` lists all files with
size and SHA-256. Beside the model there are ``tokenizer.json``, ``golden.jsonl``, code and README of the platform, and
``export.json``, which says what it was made of and what was verified (:class:`ExportFacts`).
"""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from edgeguard import __version__, schema
from edgeguard.bundle import TOKENIZER_NAME, Bundle, sha256_of
from edgeguard.engines import ENGINES, create_engine
from edgeguard.export.golden import GOLDEN_NAME, golden_conversations, golden_lines, write_golden
from edgeguard.export.target import SAMPLES, Check, ExportError, Target, load_target
from edgeguard.files import installed_version
from edgeguard.guard import Guard
from edgeguard.manifest import MANIFEST_NAME, FileEntry, Manifest
from edgeguard.prompt import Message, as_messages

__all__ = ["FACTS_NAME", "Export", "ExportFacts", "export_bundle", "is_free", "open_export", "reference_guard"]

FACTS_FORMAT, FACTS_VERSION = "edgeguard-export", 1
FACTS_NAME = "export.json"
README_NAME = "README.md"


@dataclass(frozen=True)
class ExportFacts:
    """What an export was made of, and what was verified.

    ``bundle``: name and version; ``bundle_manifest_sha256``: of the manifest that it was made from;
    ``reference_engine``: what computed the golden margins; ``model_files``: of the files, those that the device's
    runtime loads; ``versions``: of edgeguard and of the packages that made or verified it, None for one that is not
    installed.
    """

    target: str
    bundle: str
    bundle_manifest_sha256: str
    max_tokens: int
    reference_engine: str
    tolerance: float
    model_files: tuple[str, ...]
    versions: Mapping[str, str | None]
    check: Check

    @classmethod
    def from_dict(cls, data: object, where: str) -> ExportFacts:
        """Read the object of ``export.json``. Raises BundleError."""
        fields = schema.record(data, where, ["format", "format_version", *cls.__dataclass_fields__])
        if (fields["format"], fields["format_version"]) != (FACTS_FORMAT, FACTS_VERSION):
            schema.fail(
                where, f"{FACTS_FORMAT} of version {FACTS_VERSION}", [fields["format"], fields["format_version"]]
            )
        texts = ("target", "bundle", "bundle_manifest_sha256", "reference_engine")
        return cls(
            **{name: schema.text(fields[name], f"{where}: {name}") for name in texts},
            max_tokens=schema.integer(fields["max_tokens"], f"{where}: max_tokens", low=1, high=2**31),
            tolerance=schema.number(fields["tolerance"], f"{where}: tolerance", low=0, above=True),
            model_files=schema.texts(fields["model_files"], f"{where}: model_files"),
            versions=schema.objects(fields["versions"], f"{where}: versions"),
            check=Check.from_dict(fields["check"], f"{where}: check"),
        )

    def to_dict(self) -> dict[str, Any]:
        """The object that :meth:`from_dict` reads."""
        return {"format": FACTS_FORMAT, "format_version": FACTS_VERSION, **dataclasses.asdict(self)}


@dataclass(frozen=True)
class Export:
    """An export on disk: as a bundle, and its facts."""

    bundle: Bundle
    facts: ExportFacts

    @property
    def model_bytes(self) -> int:
        """Size of what the device's runtime loads."""
        return sum(self.bundle.manifest.files[name].bytes for name in self.facts.model_files)


def open_export(folder: Path) -> Export:
    """Open an export, every checksum verified. Raises BundleError for a folder that is none, or was changed."""
    bundle = Bundle.open(folder)
    if FACTS_NAME not in bundle.manifest.files:
        schema.fail(str(folder), f"an export, with {FACTS_NAME}", sorted(bundle.manifest.files))
    where = folder / FACTS_NAME
    facts = ExportFacts.from_dict(schema.json_object(where.read_bytes(), str(where)), str(where))
    if unlisted := [name for name in facts.model_files if name not in bundle.manifest.files]:
        schema.fail(f"{where}: model_files", "names of files that the manifest lists", unlisted)
    return Export(bundle, facts)


def is_free(output: Path) -> bool:
    """Whether an export can be written there: nothing, or an empty folder, not the current one or a link."""
    if not os.path.lexists(output):
        return True
    if not output.is_dir() or output.is_symlink() or output.samefile(Path.cwd()):
        return False
    return not any(output.iterdir())


def export_bundle(
    target: str,
    bundle: Path,
    output: Path,
    *,
    max_tokens: int | None = None,
    calibration: Sequence[Sequence[Message]] = (),
    say: Callable[[str], None] = lambda _: None,
) -> Export:
    """Write the bundle in the folder ``bundle`` as ``target`` into the new folder ``output``.

    ``max_tokens``: of the longest text, template included; None for the bundle's own. ``calibration``: conversations
    beside the golden ones, for a target that quantizes activations. ``say`` is told what is done.
    Raises ExportError for what cannot be made here, ParityError for an export that does not reproduce the bundle,
    BundleError and EngineError for a bundle that does not load; nothing is written then.
    """
    how = load_target(target)
    if calibration:
        if how.calibrated is None:
            raise ExportError(f"the target {target!r} calibrates nothing: its numbers are the bundle's own.")
        how = how.calibrated(calibration)
    source = Bundle.open(bundle)
    limited = _limited(source, max_tokens)
    with _whole_folder(output) as folder:
        say(f"{target}: making the model of {source.label} ...")
        engines = how.make(limited, folder)
        say(f"{target}: golden vectors of the reference ...")
        guard = reference_guard(source, max_tokens)
        tolerance = _tolerance(how, limited.manifest)
        manifest = _write_golden(guard, source, tolerance, folder)
        _copy_files(source, how, folder)
        manifest = _write_manifest(folder, manifest, engines)
        say(f"{target}: verifying ...")
        facts = ExportFacts(
            target=target,
            bundle=source.label,
            bundle_manifest_sha256=sha256_of(source.path / MANIFEST_NAME),
            max_tokens=manifest.max_tokens,
            reference_engine=guard.info()["engine"]["name"],
            tolerance=tolerance,
            model_files=tuple(engines),
            versions={"edgeguard": __version__, **{name: installed_version(name) for name in how.packages}},
            check=how.check(folder),
        )
        _write_text(folder / FACTS_NAME, json.dumps(facts.to_dict(), indent=1, ensure_ascii=False) + "\n")
        _write_text(folder / README_NAME, _readme(target, source.label, manifest, facts))
        _write_manifest(folder, manifest, engines)
        open_export(folder)
    return open_export(output)


def reference_guard(source: Bundle, max_tokens: int | None = None) -> Guard:
    """What golden margins come from: the bundle in its first engine (``onnx`` where it has such a file), self-tested.

    ``max_tokens``: another limit than the bundle's. Raises ExportError for one that is larger, BundleError for one that
    leaves no room for a text; BundleError and EngineError for a bundle that does not load.
    """
    held = {entry.engine for entry in source.manifest.files.values()}
    name = next((name for name in ENGINES if name in held), next(iter(ENGINES)))
    limited = _limited(source, max_tokens)
    engine, tokenizer = create_engine(name, source), source.load_tokenizer()
    Guard(source, engine, tokenizer).self_test()
    return Guard(limited, engine, tokenizer)


def _limited(bundle: Bundle, max_tokens: int | None) -> Bundle:
    """The bundle with another limit of tokens."""
    if max_tokens is None:
        return bundle
    if max_tokens > bundle.manifest.max_tokens:
        raise ExportError(
            f"{bundle.label} reads at most {bundle.manifest.max_tokens} tokens, and was asked for {max_tokens}: its "
            "model was trained and measured for no more. Ask for fewer."
        )
    data = {**bundle.manifest.to_dict(), "max_tokens": max_tokens}
    manifest = Manifest.from_dict(json.loads(json.dumps(data)), "a manifest for so few tokens")
    return dataclasses.replace(bundle, manifest=manifest)


def _write_golden(guard: Guard, source: Bundle, tolerance: float, folder: Path) -> Manifest:
    """Write the golden vectors; returns the manifest, its self-test made again where the limit is another one."""
    manifest = guard.bundle.manifest
    test = manifest.self_test
    own = [as_messages(prompt=vector.prompt, response=vector.response) for vector in test.vectors]
    conversations = golden_conversations(manifest.max_tokens, own)
    write_golden(folder / GOLDEN_NAME, golden_lines(guard, conversations, tolerance))
    if manifest.max_tokens == source.manifest.max_tokens:
        return manifest
    vectors = []
    for vector in test.vectors:
        verdict = guard.classify(prompt=vector.prompt, response=vector.response)
        vectors.append(dataclasses.replace(vector, tokens=verdict.tokens, margin=verdict.margin))
    return dataclasses.replace(manifest, self_test=dataclasses.replace(test, vectors=tuple(vectors)))


def _tolerance(how: Target, manifest: Manifest) -> float:
    return manifest.self_test.tolerance if how.tolerance is None else how.tolerance


def _copy_files(source: Bundle, how: Target, folder: Path) -> None:
    """The tokenizer, where the target wrote none of its own, and the platform's code."""
    if not (folder / TOKENIZER_NAME).exists():
        shutil.copyfile(source.path / TOKENIZER_NAME, folder / TOKENIZER_NAME)
    for name in how.samples:
        shutil.copyfile(SAMPLES / name, folder / Path(name).name)


def _write_manifest(folder: Path, manifest: Manifest, engines: Mapping[str, str | None]) -> Manifest:
    """Write the manifest with the files that are there: models first, the rest by name."""
    names = [*engines, *sorted(file.name for file in folder.iterdir() if file.name not in {*engines, MANIFEST_NAME})]
    files = {
        name: FileEntry(sha256_of(folder / name), (folder / name).stat().st_size, engines.get(name)) for name in names
    }
    manifest = dataclasses.replace(manifest, files=files)
    _write_text(folder / MANIFEST_NAME, json.dumps(manifest.to_dict(), indent=1, ensure_ascii=False) + "\n")
    return manifest


def _readme(target: str, label: str, manifest: Manifest, facts: ExportFacts) -> str:
    """The target's README with its placeholders filled."""
    keep = (SAMPLES / "keep.md").read_text(encoding="utf-8").strip()
    text = (SAMPLES / target / README_NAME).read_text(encoding="utf-8").replace("{{keep}}", keep)
    rows = [f"| `{name}` | {entry.bytes:,} | `{entry.sha256}` |" for name, entry in manifest.files.items()]
    check = [f"- {line}." for line in facts.check.verified]
    check += [f"- **Not verified:** {line}." for line in facts.check.not_verified]
    filled = {
        "label": label,
        "max_tokens": str(manifest.max_tokens),
        "files": "\n".join(["| file | bytes | SHA-256 |", "|---|---:|---|", *rows]),
        "check": "\n".join(check),
    }
    for name, value in filled.items():
        text = text.replace(f"{{{{{name}}}}}", value)
    return text


def _write_text(file: Path, text: str) -> None:
    file.write_text(text, encoding="utf-8", newline="\n")


@contextmanager
def _whole_folder(output: Path) -> Iterator[Path]:
    """A folder beside ``output`` that takes its place when the block ends well, and is gone otherwise."""
    if not is_free(output):
        raise ExportError(
            f"{output}: expected nothing there, or an empty folder other than the current one, found something else. "
            "Name another folder."
        )
    parent = output.absolute().parent
    parent.mkdir(parents=True, exist_ok=True)
    scratch = Path(tempfile.mkdtemp(prefix=f".{output.name}.", dir=parent))
    try:
        folder = scratch / "export"  # made by mkdir, so that it has the usual permissions
        folder.mkdir()
        yield folder
        if output.is_dir():
            output.rmdir()
        os.replace(folder, output)  # noqa: PTH105 - a folder
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
