"""``edgeguard verify``: every check that loading a bundle makes, each on a line of its own."""

from __future__ import annotations

import dataclasses
import importlib.util
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from typing import TYPE_CHECKING

import click

from edgeguard.cli.options import json_option, threads_option
from edgeguard.cli.output import console, emit_json, one_line, size
from edgeguard.errors import EdgeguardError

if TYPE_CHECKING:
    from edgeguard.bundle import Bundle

__all__ = ["verify_command"]

NAME_WIDTH = 24
LIBRARIES = {"gguf": "llama_cpp"}  # of an engine whose extra is named like it


@dataclass(frozen=True)
class Check:
    """One check: what was looked at, whether it holds (None: not made), and what was found."""

    check: str
    ok: bool | None
    detail: str


@click.command("verify", short_help="Check a bundle, file by file.")
@click.argument("bundle", metavar="DIR")
@threads_option
@json_option
@click.pass_context
def verify_command(ctx: click.Context, /, bundle: str, threads: int | None, as_json: bool) -> None:
    """Check a bundle: manifest, sizes and checksums, tokenizer, model, self-test.

    DIR is a folder, or hf://owner/name on the Hugging Face Hub. Every check has a line. Skipped: the model after a
    damaged file, and one that nothing here can run. Checksums show damage, not who made the bundle: the manifest itself
    is not signed.

    \b
    edgeguard verify models/edgeguard-mini
    edgeguard verify ./my-bundle --json

    Exit codes: 0 every check that was made holds, 1 one does not, 2 wrong usage.
    """  # noqa: D301 - click reads \b
    failed = False
    for check in _checks(bundle, threads):
        failed |= check.ok is False
        if as_json:
            emit_json(asdict(check))
        else:
            _show(check)
    ctx.exit(1 if failed else 0)


def _checks(spec: str, threads: int | None) -> list[Check]:
    """All checks in order; loading is not tried on files that are not what the manifest says."""
    from edgeguard.bundle import Bundle
    from edgeguard.hub import resolve_bundle
    from edgeguard.manifest import FORMAT_VERSION, MANIFEST_NAME

    try:
        bundle = Bundle.open(resolve_bundle(spec), verify=False)
    except EdgeguardError as error:
        return [Check(MANIFEST_NAME, False, one_line(error))]
    checks = [Check(MANIFEST_NAME, True, f"{bundle.label}, format version {FORMAT_VERSION}")]
    checks += [_check_file(bundle, name) for name in bundle.manifest.files]
    damaged = not all(check.ok for check in checks)
    engines = _engines(bundle)
    if not engines:
        checks.append(Check("self-test", None, "not run: its files are for an app's runtime, not for edgeguard's"))
    for engine in engines:
        name, needed = f"self-test ({engine})", LIBRARIES.get(engine)
        if damaged:
            checks.append(Check(name, None, "not run: a file is not what the manifest says"))
        elif needed is not None and importlib.util.find_spec(needed) is None:
            checks.append(Check(name, None, f"not run: needs pip install 'edgeguard-runtime[{engine}]'"))
        else:
            checks.append(_attempt(name, partial(_self_test, bundle, engine, threads)))
    return checks


def _engines(bundle: Bundle) -> list[str]:
    """Engines that the bundle has a file for; where there is none, ``auto``, which fails, but not for an export."""
    from edgeguard.engines import ENGINES
    from edgeguard.export.make import FACTS_NAME

    held = {entry.engine for entry in bundle.manifest.files.values()}
    return [name for name in ENGINES if name in held] or ([] if FACTS_NAME in bundle.manifest.files else ["auto"])


def _attempt(name: str, check: Callable[[], str]) -> Check:
    try:
        return Check(name, True, check())
    except EdgeguardError as error:
        return Check(name, False, one_line(error))


def _check_file(bundle: Bundle, name: str) -> Check:
    """Size and checksum of one file, by the same code that loading uses."""
    entry = bundle.manifest.files[name]
    alone = dataclasses.replace(bundle, manifest=dataclasses.replace(bundle.manifest, files={name: entry}))

    def check() -> str:
        alone.verify()
        return f"{size(entry.bytes)}, sha256 {entry.sha256[:12]}... as in the manifest"

    return _attempt(name, check)


def _self_test(bundle: Bundle, engine: str, threads: int | None) -> str:
    """Load tokenizer and model and reproduce the manifest's vectors."""
    from edgeguard.engines import create_engine
    from edgeguard.guard import Guard

    guard = Guard(bundle, create_engine(engine, bundle, threads), bundle.load_tokenizer())
    test = bundle.manifest.self_test
    off = guard.self_test()
    return f"{len(test.vectors)} vectors, margins off by {off:.4f} at most, {test.tolerance:g} allowed"


def _show(check: Check) -> None:
    from rich.text import Text

    word, style = {True: ("ok  ", "green"), False: ("FAIL", "bold red"), None: ("skip", "yellow")}[check.ok]
    console().print(Text(word, style=style), f"{check.check:<{NAME_WIDTH}}{check.detail}")
