"""A bundle on disk: a folder with ``manifest.json``, weights and tokenizer, verified before anything is used.

Opening reads the manifest (:mod:`edgeguard.manifest`) and compares every listed file's size and SHA-256. What the
manifest does not list (a model card, a report) is never read.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from edgeguard.errors import BundleError
from edgeguard.manifest import MANIFEST_NAME, Manifest

if TYPE_CHECKING:
    from tokenizers import Tokenizer

__all__ = ["DEFAULT_BUNDLE", "TOKENIZER_NAME", "Bundle", "Manifest", "default_bundle_path", "sha256_of"]

DEFAULT_BUNDLE = "edgeguard-mini"
TOKENIZER_NAME = "tokenizer.json"
# A manifest has a few kilobytes; more is not worth parsing.
MAX_MANIFEST_BYTES = 4 * 2**20
CHUNK_BYTES = 2**20


@dataclass(frozen=True)
class Bundle:
    """An opened bundle: its folder and its manifest."""

    path: Path
    manifest: Manifest

    @classmethod
    def open(cls, path: str | Path, *, verify: bool = True) -> Bundle:
        """Open the bundle in the folder ``path``; ``verify`` compares sizes and checksums as well.

        Raises BundleError for a folder, manifest or file that is missing, damaged or not understood.
        """
        folder = Path(path)
        source = folder / MANIFEST_NAME
        try:
            if not folder.is_dir():
                raise BundleError(
                    f"{folder}: expected a bundle folder, found {'a file' if folder.exists() else 'nothing'}."
                )
            if not source.is_file():
                raise BundleError(f"{source}: expected the manifest of a bundle, found nothing.")
            if source.stat().st_size > MAX_MANIFEST_BYTES:
                raise BundleError(
                    f"{source}: expected at most {MAX_MANIFEST_BYTES} bytes, found {source.stat().st_size}."
                )
            raw = source.read_bytes()
        except (OSError, ValueError) as error:  # ValueError: a NUL byte in the path
            raise BundleError(f"{source}: expected a readable manifest, found {error}.") from error
        bundle = cls(folder, Manifest.from_json(raw, str(source)))
        if TOKENIZER_NAME not in bundle.manifest.files:
            raise BundleError(f"{source}: files: expected {TOKENIZER_NAME!r} among them, found {_names(bundle)}.")
        if verify:
            bundle.verify()
        return bundle

    @property
    def label(self) -> str:
        """Name and version, as verdicts carry them: ``edgeguard-mini@0.1.0``."""
        return f"{self.manifest.name}@{self.manifest.version}"

    @property
    def size_bytes(self) -> int:
        """Size of all listed files."""
        return sum(entry.bytes for entry in self.manifest.files.values())

    def verify(self) -> None:
        """Compare every listed file with its size and SHA-256. Raises BundleError for the first that differs."""
        for name, entry in self.manifest.files.items():
            file = self.path / name
            try:
                if not file.is_file():
                    raise BundleError(f"{file}: expected a file of {entry.bytes} bytes, found nothing. {_ADVICE}")
                size = file.stat().st_size
                if size != entry.bytes:
                    raise BundleError(f"{file}: expected {entry.bytes} bytes, found {size}. {_ADVICE}")
                digest = sha256_of(file)
            except OSError as error:
                raise BundleError(f"{file}: expected a readable file, found {error}.") from error
            if digest != entry.sha256:
                raise BundleError(f"{file}: expected sha256 {entry.sha256}, found {digest}. {_ADVICE}")

    def file_for(self, engine: str) -> Path:
        """The file that ``engine`` runs. Raises BundleError when the bundle has none or several."""
        found = [name for name, entry in self.manifest.files.items() if entry.engine == engine]
        if len(found) != 1:
            raise BundleError(
                f"{self.path / MANIFEST_NAME}: files: expected one file for the engine {engine!r}, "
                f"found {found or 'none'}. It has {_names(self)}."
            )
        return self.path / found[0]

    def load_tokenizer(self) -> Tokenizer:
        """The tokenizer, set so that it never cuts, pads, or reads text as a special token."""
        from tokenizers import Tokenizer

        file = self.path / TOKENIZER_NAME
        try:
            tokenizer = Tokenizer.from_file(str(file))
        except Exception as error:  # the library raises plain Exception
            raise BundleError(f"{file}: expected a tokenizers file, found {error}. {_ADVICE}") from error
        tokenizer.no_truncation()
        tokenizer.no_padding()
        tokenizer.encode_special_tokens = True  # "<|im_start|>" in text stays text
        return tokenizer


_ADVICE = "Download the bundle again."


def default_bundle_path() -> Path:
    """The shipped bundle: package data of an installed wheel, or ``models/`` of a checkout.

    Raises BundleError naming both places when neither holds it.
    """
    package = Path(__file__).resolve().parent
    places = [package / "models" / DEFAULT_BUNDLE, package.parent / "models" / DEFAULT_BUNDLE]
    for place in places:
        if (place / MANIFEST_NAME).is_file():
            return place
    raise BundleError(
        f"{places[0]}: expected the shipped bundle there or in {places[1]}, found neither. Install edgeguard-runtime "
        "again, or pass the folder of a bundle."
    )


def sha256_of(file: Path) -> str:
    """SHA-256 of a file as 64 hex digits, read in chunks."""
    digest = hashlib.sha256()
    with file.open("rb") as stream:
        while chunk := stream.read(CHUNK_BYTES):
            digest.update(chunk)
    return digest.hexdigest()


def _names(bundle: Bundle) -> str:
    return ", ".join(bundle.manifest.files)
