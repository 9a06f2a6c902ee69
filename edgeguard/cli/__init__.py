"""The ``edgeguard`` command: a group whose commands are imported only when they are used.

Exit codes, the same for every command, so that a script can fail closed: 0 fine (``classify``: not flagged), 1 error,
2 wrong usage, 3 flagged (``classify`` only), 130 interrupted. Answers go to stdout, everything else to stderr.
Imports no engine, no tokenizer and no rich by itself: ``edgeguard --help`` stays quick.
"""

from __future__ import annotations

import errno
import importlib
import os
import sys
from typing import Any

import click

from edgeguard.cli.output import one_line
from edgeguard.errors import EdgeguardError

__all__ = ["main"]

# Command -> module; each module holds a click command of the same name.
COMMANDS = {name: f"edgeguard.cli.{name}" for name in ("classify", "scan", "eval", "bench", "info", "verify", "export")}
EXIT_INTERRUPTED = 130  # 128 + SIGINT, as shells report it


class LazyGroup(click.Group):
    """Imports a command's module on first use, and turns failures into one line on stderr and an exit code."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        """Names in the order of COMMANDS: most used first."""
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        """The click command, or None when there is none of that name (click then says which exist)."""
        if cmd_name not in COMMANDS:
            return None
        command = getattr(importlib.import_module(COMMANDS[cmd_name]), f"{cmd_name}_command")
        assert isinstance(command, click.Command)  # a programming mistake, not user input
        return command

    def invoke(self, ctx: click.Context) -> Any:  # noqa: ANN401 - click's own signature
        """Run the command; every failure leaves with a code other than 0."""
        try:
            return super().invoke(ctx)
        except EdgeguardError as error:
            raise click.ClickException(one_line(error)) from error
        except KeyboardInterrupt:
            click.echo("interrupted", err=True)
            ctx.exit(EXIT_INTERRUPTED)
        except MemoryError as error:
            raise click.ClickException("out of memory. Try smaller inputs or a smaller --batch-size.") from error
        except OSError as error:
            _abandon_stdout()
            if error.errno == errno.EPIPE:  # the reader left early (| head): quiet, but not a success
                ctx.exit(1)
            raise click.ClickException(one_line(_describe(error))) from error


def _describe(error: OSError) -> str:
    where = f"{error.filename}: " if error.filename else ""
    return f"{where}{error.strerror or error}"


def _abandon_stdout() -> None:
    """Point stdout at the null device, or Python's flush at exit would fail again and replace the exit code."""
    try:
        sys.stdout.flush()
    except (OSError, ValueError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)


def _print_version(ctx: click.Context, _param: click.Parameter, wanted: bool) -> None:
    if wanted and not ctx.resilient_parsing:
        from edgeguard import __version__

        click.echo(f"edgeguard {__version__}")
        ctx.exit()


@click.group(cls=LazyGroup, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.option(
    "--version", is_flag=True, is_eager=True, expose_value=False, callback=_print_version, help="Show the version."
)
def main() -> None:
    """Judge whether text is unsafe, on this machine, offline.

    \b
    edgeguard classify "How do I sharpen a kitchen knife?"
    echo "some text" | edgeguard classify --json
    edgeguard scan chats.jsonl -o judged.jsonl
    edgeguard eval labelled.jsonl

    Exit codes: 0 fine (classify: not flagged), 1 error, 2 wrong usage, 3 flagged (classify only), 130 interrupted.
    A script that lets text through only on 0 therefore blocks on every failure.
    """  # noqa: D301 - click reads \b
