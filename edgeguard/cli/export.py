"""``edgeguard export``: a bundle as files that another platform's runtime reads, verified there."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from edgeguard.cli.options import bundle_option, json_option
from edgeguard.cli.output import console, emit_json, size, warn
from edgeguard.export.target import TARGETS

if TYPE_CHECKING:
    from edgeguard.export.make import Export
    from edgeguard.prompt import Message

__all__ = ["export_command"]

NAME_WIDTH = 16
TARGET_LINES = "\n".join(f"    {name:<8}{summary}" for name, summary in TARGETS.items())


def _free_folder(ctx: click.Context, param: click.Parameter, value: str) -> Path:
    from edgeguard.export.make import is_free

    if not is_free(Path(value)):
        raise click.BadParameter(
            f"{value} is not free: name a new folder, or an empty one that is not the current folder.", ctx, param
        )
    return Path(value)


def _conversations(ctx: click.Context, param: click.Parameter, value: str | None) -> list[list[Message]]:
    """The rows of a file as messages; a row that cannot be read is refused."""
    from edgeguard.cli.rows import RowFile
    from edgeguard.errors import InputError
    from edgeguard.prompt import as_messages

    if value is None:
        return []
    found = []
    try:
        with RowFile(value) as rows:
            for row in rows:
                try:
                    found.append(as_messages(**row.item()))
                except InputError as error:
                    raise click.BadParameter(f"{value}: line {row.line}: {error}", ctx, param) from error
    except (OSError, InputError) as error:
        raise click.BadParameter(f"{value}: {error}", ctx, param) from error
    if not found:
        raise click.BadParameter(f"{value}: no rows in it.", ctx, param)
    return found


@click.command(
    "export",
    short_help="Write the bundle for another runtime, verified.",
    help=f"""Write the bundle for another runtime: a folder that an app can carry, verified before it is there.

    \b
    Targets:
{TARGET_LINES}

    The folder holds the model, tokenizer.json, manifest.json (sizes and SHA-256 of all files), golden.jsonl (texts with
    the token ids and margins that any platform must reproduce), a README.md with the platform's code, and export.json,
    which says what was verified. The golden vectors are computed with the target's own runtime, without edgeguard,
    where it is installed; where it is not, that is said. A folder that does not reproduce the bundle is not written.

    \b
    edgeguard export --target onnx -o guard-onnx && python guard-onnx/check.py
    edgeguard export --target gguf --max-tokens 256 -o guard-gguf
    edgeguard export --target gguf --bundle ./my-bundle -o guard-gguf --json
    edgeguard export --target qnn --calibration texts.jsonl -o guard-qnn

    Exit codes: 0 written, 1 it cannot be made or does not reproduce the bundle (nothing is written), 2 wrong usage.
    """,
)
@click.option("--target", type=click.Choice(list(TARGETS)), required=True, help="What to write.")
@bundle_option
@click.option(
    "--max-tokens",
    metavar="N",
    type=click.IntRange(min=1),
    help="Longest text, template included: less memory on the device. Default, and at most: the bundle's.",
)
@click.option(
    "--calibration",
    metavar="FILE",
    callback=_conversations,
    help="qnn: JSON Lines with the fields of `edgeguard scan`, added to the golden texts for ranges of activations.",
)
@click.option(
    "-o",
    "--output",
    metavar="DIR",
    required=True,
    callback=_free_folder,
    help="Folder to write: a new one, or an empty one.",
)
@json_option
def export_command(
    target: str,
    bundle: str | None,
    max_tokens: int | None,
    calibration: list[list[Message]],
    output: Path,
    as_json: bool,
) -> None:
    """See the decorator: the list of targets is part of the help."""
    from edgeguard.bundle import default_bundle_path
    from edgeguard.export.make import export_bundle
    from edgeguard.hub import resolve_bundle

    folder = default_bundle_path() if bundle is None else resolve_bundle(bundle)
    made = export_bundle(
        target,
        folder,
        output,
        max_tokens=max_tokens,
        calibration=calibration,
        say=lambda line: click.echo(line, err=True),
    )
    for line in made.facts.check.not_verified:
        warn(f"not verified: {line}")
    if as_json:
        emit_json(_report(made))
    else:
        _show(made)


def _report(made: Export) -> dict[str, Any]:
    """The facts of export.json, where the folder is, and its files."""
    files = {name: {"bytes": e.bytes, "sha256": e.sha256} for name, e in made.bundle.manifest.files.items()}
    return {
        "path": str(made.bundle.path),
        **made.facts.to_dict(),
        "files": files,
        "size_bytes": made.bundle.size_bytes,
        "model_bytes": made.model_bytes,
    }


def _show(made: Export) -> None:
    facts, manifest = made.facts, made.bundle.manifest
    out = console()
    out.print(f"{facts.bundle} for {facts.target}, at most {facts.max_tokens} tokens: {made.bundle.path}")
    for name, entry in manifest.files.items():
        out.print(f"  {name:<{NAME_WIDTH}}{size(entry.bytes):>10}  sha256 {entry.sha256[:12]}...")
    for line in facts.check.verified:
        out.print(f"  verified: {line}")
