"""Files that are written whole or not at all, by one process or several."""

from __future__ import annotations

import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NoReturn

import pytest

from edgeguard.files import read_or_none, write_whole


def test_what_was_there_is_replaced_in_one_step(tmp_path: Path) -> None:
    file = tmp_path / "a.json"
    file.write_text("old")

    def write(part: Path) -> None:
        part.write_text("new")
        assert file.read_text() == "old"

    umask = os.umask(0o022)
    try:
        write_whole(file, write)
    finally:
        os.umask(umask)
    assert file.read_text() == "new" and list(tmp_path.iterdir()) == [file]
    if os.name == "posix":
        assert file.stat().st_mode & 0o777 == 0o644, "as any other new file"


def test_a_writer_that_fails_leaves_what_was_there(tmp_path: Path) -> None:
    def write(part: Path) -> NoReturn:
        part.write_text("half")
        raise ZeroDivisionError

    file = tmp_path / "a.json"
    file.write_text("old")
    with pytest.raises(ZeroDivisionError):
        write_whole(file, write)
    assert file.read_text() == "old" and list(tmp_path.iterdir()) == [file]


def test_many_writers_of_one_file(tmp_path: Path) -> None:
    file = tmp_path / "a.txt"
    texts = [str(number) * 100_000 for number in range(8)]
    with ThreadPoolExecutor(len(texts)) as pool:
        list(pool.map(lambda text: write_whole(file, lambda part: part.write_text(text)), texts))
    assert file.read_text() in texts and list(tmp_path.iterdir()) == [file]


def test_what_cannot_be_read_is_none(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b" 12 \xff\n")
    assert read_or_none(tmp_path / "a") == "12 \ufffd"
    assert read_or_none(tmp_path / "b") is None and read_or_none(tmp_path) is None
