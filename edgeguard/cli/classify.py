"""``edgeguard classify``: judge one text or conversation."""

from __future__ import annotations

import codecs
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from edgeguard.cli.options import guard_options, json_option, load_guard, threshold_of
from edgeguard.cli.output import console, emit_json, warn
from edgeguard.cli.rows import decode_json, stdin_bytes, target_of
from edgeguard.errors import InputError
from edgeguard.taxonomy import HAZARDS

if TYPE_CHECKING:
    from edgeguard.verdict import Verdict

__all__ = ["classify_command"]

EXIT_FLAGGED = 3
STDIN = "-"
# UTF-32's before UTF-16's, which are their beginning.
BYTE_ORDER_MARKS = {
    codecs.BOM_UTF8: "utf-8-sig",
    codecs.BOM_UTF32_LE: "utf-32",
    codecs.BOM_UTF32_BE: "utf-32",
    codecs.BOM_UTF16_LE: "utf-16",
    codecs.BOM_UTF16_BE: "utf-16",
}
CONVERT_IT = "Nothing was judged: convert the text to UTF-8."
# Hazards shown to people; --json has all of them.
HAZARDS_SHOWN = 3
COLORS = {"allow": "green", "block": "bold red", "escalate": "bold yellow"}
MEANINGS = {
    "allow": "not flagged",
    "block": "flagged as unsafe",
    "escalate": "too long to be read whole, so not called safe",
}


@click.command("classify", short_help="Judge one text, response or conversation.")
@click.argument("text", required=False)
@click.option("--file", metavar="F", help="Judge the text of this file (- for stdin).")
@click.option("--prompt", metavar="P", help="Judge this user prompt; with --response, the prompt it answers.")
@click.option("--response", metavar="R", help="Judge this response of an assistant.")
@click.option("--messages", metavar="F.json", help="Judge the last message of this conversation (- for stdin).")
@guard_options
@json_option
@click.pass_context
def classify_command(
    ctx: click.Context,
    /,
    text: str | None,
    file: str | None,
    prompt: str | None,
    response: str | None,
    messages: str | None,
    as_json: bool,
    **guard_settings: Any,  # noqa: ANN401 - checked by click, passed to load_guard
) -> None:
    """Judge one text, as a user would send it, or one response or conversation.

    The text comes from TEXT, from --file, or from stdin when TEXT is - or is left out in a pipe. In scripts use a pipe,
    or put -- before a text that may begin with a dash. --messages reads a JSON list like
    [{"role": "user", "content": "..."}].

    \b
    edgeguard classify "How do I sharpen a kitchen knife?"
    edgeguard classify --prompt "Tell me a story" --response "Once upon a time..."
    cat letter.txt | edgeguard classify --json
    edgeguard classify -- "$TEXT" && echo "may pass"

    Exit codes: 0 not flagged, 1 an error, 2 wrong usage, 3 flagged (unsafe, or too long to be read whole).
    """  # noqa: D301 - click reads \b
    given = _one_input(text, file, prompt, response, messages)
    guard = load_guard(**guard_settings)
    verdict = guard.classify(**given)
    if as_json:
        emit_json(verdict.to_dict())
    else:
        _show(verdict, threshold_of(guard, verdict.operating_point, target_of(given)))
    if verdict.truncated:
        warn("the text is longer than the guard can read at once; only its head and tail were judged.")
    ctx.exit(EXIT_FLAGGED if verdict.flagged else 0)


def _one_input(
    text: str | None, file: str | None, prompt: str | None, response: str | None, messages: str | None
) -> dict[str, Any]:
    """The keyword arguments of Guard.classify. An empty text counts as given: it must not fall through to stdin."""
    pair = prompt is not None or response is not None
    names = ("TEXT", "--file", "--prompt/--response", "--messages")
    there = (text is not None, file is not None, pair, messages is not None)
    given = [name for name, is_given in zip(names, there, strict=True) if is_given]
    if len(given) > 1:
        raise click.UsageError(f"give one input, not {' and '.join(given)}.")
    if messages is not None:
        return {"messages": _parse_messages(messages)}
    if pair:
        return {"prompt": _checked(prompt, "--prompt"), "response": _checked(response, "--response")}
    if text is not None and text != STDIN:
        return {"text": _checked(text, "TEXT")}
    if file is None and text is None and _stdin_is_terminal():
        raise click.UsageError(
            "nothing to judge. Give a TEXT in quotes, --file, or pipe text in (- reads the keyboard)."
        )
    return {"text": _read(STDIN if file is None else file)}


def _stdin_is_terminal() -> bool:
    return sys.stdin is None or sys.stdin.closed or sys.stdin.isatty()


def _read(path: str) -> str:
    """The text of a file or of stdin: UTF-8, or what the byte order mark says. Raises InputError for anything else.

    What another program would read there must not be judged as something else: PowerShell 5 writes UTF-16.
    """
    name = "stdin" if path == STDIN else path
    data = stdin_bytes().read() if path == STDIN else Path(path).read_bytes()
    encoding = next((encoding for mark, encoding in BYTE_ORDER_MARKS.items() if data.startswith(mark)), "utf-8")
    try:
        text = data.decode(encoding)
    except UnicodeDecodeError as error:
        raise InputError(f"{name}: not {encoding} (first at byte {error.start + 1}). {CONVERT_IT}") from error
    if "\0" in text:
        raise InputError(f"{name}: holds NUL characters, as UTF-16 without a byte order mark does. {CONVERT_IT}")
    return text


def _checked(text: str | None, name: str) -> str | None:
    """Refuse an argument with bytes that are no UTF-8 (Python keeps them as lone surrogates). Raises InputError."""
    if text is not None and any("\ud800" <= char <= "\udfff" for char in text):
        raise InputError(f"{name}: not UTF-8. {CONVERT_IT}")
    return text


def _parse_messages(path: str) -> Sequence[Any]:
    name = "stdin" if path == STDIN else path
    try:
        messages = decode_json(_read(path))
    except ValueError as error:
        raise InputError(f'{name}: not JSON ({error}). Expected [{{"role": "user", "content": "..."}}].') from error
    if not isinstance(messages, list):
        raise InputError(f"{name}: expected a JSON list of messages, found {type(messages).__name__}.")
    return messages


def _show(verdict: Verdict, threshold: float) -> None:
    """A compact block for people: decision, probability, hazards when flagged, and what it cost."""
    from rich.text import Text

    out = console()
    out.print(Text(verdict.action.upper(), style=COLORS.get(verdict.action, "")), MEANINGS.get(verdict.action, ""))
    out.print(f"  p_unsafe {verdict.p_unsafe:.4f} ({verdict.operating_point} flags from {threshold:.4f})")
    if verdict.flagged:
        for code, probability in sorted(verdict.hazards.items(), key=lambda hazard: -hazard[1])[:HAZARDS_SHOWN]:
            out.print(f"  {code:<4}{_hazard_name(code):<27}{probability:.3f}")
    cut = ", truncated" if verdict.truncated else ""
    out.print(f"  {verdict.tokens} tokens{cut}, {verdict.latency_ms:.1f} ms, {verdict.bundle} ({verdict.engine})")


def _hazard_name(code: str) -> str:
    return HAZARDS[code].name if code in HAZARDS else "(not of the taxonomy)"
