"""The output file of a scan: written beside its place, renamed into it when whole, and safe to go on with.

While a scan runs there are two files: ``OUT.part`` (the rows so far, whole lines, one per input row) and
``OUT.part.meta`` (what judged them). On --resume each row so far is compared with the input again, so a changed or
other input is refused and none is lost or doubled; what follows the last newline was being written when the scan died
and is cut off. Rows appended to the input since are simply judged too.
"""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import IO, Any

from edgeguard.cli.rows import Row
from edgeguard.errors import EdgeguardError, InputError

__all__ = ["Journal", "check_output", "kept_fields"]

NEW_FIELDS = ("verdict", "error")


def kept_fields(row: Row) -> dict[str, Any]:
    """What the output keeps of an input row: every field; for a bad line its number and text.

    A field called ``verdict`` or ``error`` already (the output of an earlier scan) becomes ``input_verdict``...
    """
    if row.data is None:
        return {"line": row.line, "raw": row.raw}
    kept = {key: value for key, value in row.data.items() if key not in NEW_FIELDS}
    for key in NEW_FIELDS:
        if key in row.data:
            name = f"input_{key}"
            while name in kept:
                name = f"input_{name}"
            kept[name] = row.data[key]
    return kept


def check_output(source: str, out: Path, *, resume: bool, force: bool) -> None:
    """Refuse an output that would destroy something. Raises InputError that says what to do instead."""
    if out.exists() and not out.is_file():
        raise InputError(f"{out}: not a regular file. Leave -o out and redirect stdout instead.")
    if not out.parent.is_dir():
        raise InputError(f"{out.parent}: no such folder. Make it first.")
    part = _part(out)
    if source != "-" and any(path.exists() and os.path.samefile(source, path) for path in (out, part)):  # noqa: PTH121
        raise InputError(f"{source}: input and output are the same file. Choose another -o.")
    if force:
        return
    if out.exists():
        hint = "There is nothing to resume; " if resume and not part.exists() else ""
        raise InputError(f"{out}: exists already. {hint}choose another -o, or --force to replace it.")
    if part.exists() and not resume:
        raise InputError(f"{part}: an unfinished scan. Go on with --resume, or start again with --force.")


def _part(out: Path) -> Path:
    return out.with_name(out.name + ".part")


class Journal:
    """The unfinished output of one scan. Use as a context manager; call :meth:`finish` when every row is in."""

    def __init__(self, out: Path, *, fresh: bool) -> None:
        """Open and lock what there is of ``out``; ``fresh`` empties it, and replaces ``out``.

        Raises InputError when another scan has it, or has made ``out`` meanwhile.
        """
        self.out = out
        self.part = _part(self.out)
        self.meta = self.part.with_name(self.part.name + ".meta")
        self._file: IO[bytes] = open(self.part, "ab+", buffering=0)  # noqa: PTH123 - with buffering
        _lock(self._file, self.part)
        if out.exists() and not fresh:  # of a scan that ended since check_output looked
            made_here = self._file.seek(0, os.SEEK_END) == 0
            self._file.close()
            if made_here:
                self.part.unlink()
            raise InputError(f"{out}: exists already. Choose another -o, or --force to replace it.")
        if fresh:
            self._file.truncate(0)
            self.meta.unlink(missing_ok=True)

    def __enter__(self) -> Journal:
        """Itself."""
        return self

    def __exit__(self, *_: object) -> None:
        """Close; what was written stays for --resume."""
        self._file.close()

    def bind(self, judged_by: Mapping[str, str]) -> None:
        """Record what judges this output, or check that the same judged what is there already."""
        if self._file.seek(0, os.SEEK_END) == 0:
            draft = self.meta.with_name(self.meta.name + ".new")
            draft.write_text(json.dumps(judged_by, indent=1) + "\n", encoding="utf-8")
            draft.replace(self.meta)
            return
        try:
            found = json.loads(self.meta.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise InputError(f"{self.meta}: cannot be read ({error}). Start again with --force.") from error
        for name, value in judged_by.items():
            was = found.get(name) if isinstance(found, dict) else None
            if was != value:
                raise InputError(
                    f"{self.part}: judged with another {name} ({was}, now {value}). "
                    "Use the same again, or start over with --force."
                )

    def replay(self, rows: Iterator[Row], seen: Callable[[Mapping[str, Any]], None]) -> None:
        """Take from ``rows`` those that are done, telling ``seen`` each, and cut off a half-written last line."""
        self._file.seek(0)
        whole = 0
        with open(self.part, "rb") as done:  # noqa: PTH123
            for line in done:
                if not line.endswith(b"\n"):
                    break
                seen(self._compare(line, next(rows, None)))
                whole += len(line)
        self._file.truncate(whole)

    def _compare(self, line: bytes, row: Row | None) -> Mapping[str, Any]:
        """The output row of ``line``. Raises InputError unless it came from ``row``."""
        try:
            done = json.loads(line)
        except (ValueError, RecursionError):
            done = None
        kept = {key: value for key, value in done.items() if key not in NEW_FIELDS} if isinstance(done, dict) else None
        if row is None or kept != kept_fields(row) or len(done) != len(kept) + 1:
            where = f"line {row.line} of the input" if row else "the end of the input"
            raise InputError(
                f"{self.part}: does not belong to this input (they differ at {where}). "
                "Give the input that it was started with, or start over with --force."
            )
        assert isinstance(done, dict)  # for the type checker
        return done

    def write(self, data: bytes) -> None:
        """Append, whatever it takes: a raw write may take only a part (a nearly full disk) before it fails."""
        view = memoryview(data)
        try:
            while view:
                view = view[self._file.write(view) :]
        except OSError as error:
            raise EdgeguardError(f"{self.part}: {error.strerror}. Make room, then go on with --resume.") from error

    def finish(self) -> None:
        """Put the output in its place, in one step, after it has reached the disk."""
        os.fsync(self._file.fileno())
        if os.name == "nt":  # Windows renames no open file; elsewhere it stays open, and locked, until it is in place
            self._file.close()
        self.part.replace(self.out)
        self.meta.unlink(missing_ok=True)


def _lock(file: IO[bytes], path: Path) -> None:
    """Keep a second scan off the same output. The lock goes with the process, however it ends."""
    with contextlib.suppress(ImportError):  # no fcntl on Windows: unguarded there
        import fcntl

        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise InputError(f"{path}: another scan is writing it. Wait for it, or choose another -o.") from error
        except OSError:
            return  # a file system without locks: unguarded
        if not path.exists() or not os.path.samestat(os.fstat(file.fileno()), path.stat()):
            raise InputError(f"{path}: another scan has just finished it. Look at its output first.")
