"""The cache folder: files are whole, checked and made once, whatever happened to the process that made them."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from edgeguard import cache
from edgeguard.cache import CACHE_VARIABLE, cache_folder, cached
from edgeguard.errors import EngineError

ROOT = Path(__file__).resolve().parent.parent
CONTENT = b"whole" * 1000


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv(CACHE_VARIABLE, str(tmp_path / "cache"))
    return tmp_path / "cache"


class Maker:
    """Writes CONTENT, and counts how often."""

    def __init__(self) -> None:
        self.calls = 0

    def __call__(self, path: Path) -> None:
        self.calls += 1
        path.write_bytes(CONTENT)


def run(code: str, folder: Path) -> subprocess.Popen[str]:
    """Another process with the same cache folder."""
    environment = {**os.environ, CACHE_VARIABLE: str(folder)}
    command, pipe = [sys.executable, "-c", code], subprocess.PIPE
    return subprocess.Popen(command, cwd=ROOT, env=environment, stdout=pipe, stderr=pipe, text=True)


def test_a_file_is_made_once(folder: Path) -> None:
    make = Maker()
    assert cached("thing.bin", make) == cached("thing.bin", make) == folder / "thing.bin"
    assert make.calls == 1 and (folder / "thing.bin").read_bytes() == CONTENT
    assert sorted(path.name for path in folder.iterdir()) == ["thing.bin", "thing.bin.sha256"]


def _flip(file: Path) -> None:
    file.write_bytes(b"W" + file.read_bytes()[1:])


def _cut(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-1])


def _lose_sum(file: Path) -> None:
    file.with_name(f"{file.name}.sha256").unlink()


def _spoil_sum(file: Path) -> None:
    file.with_name(f"{file.name}.sha256").write_bytes(b"\xff\x00")


@pytest.mark.parametrize("damage", [_flip, _cut, Path.unlink, _lose_sum, _spoil_sum])
def test_a_damaged_file_is_made_again(folder: Path, damage: Callable[[Path], None]) -> None:
    make = Maker()
    damage(cached("thing.bin", make))
    assert cached("thing.bin", make).read_bytes() == CONTENT
    assert make.calls == 2
    cached("thing.bin", make)
    assert make.calls == 2


def test_a_maker_that_fails_leaves_nothing(folder: Path) -> None:
    def make(path: Path) -> None:
        path.write_bytes(b"half")
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        cached("thing.bin", make)
    assert not list(folder.iterdir())


def test_what_a_killed_process_left_is_never_used(folder: Path) -> None:
    code = """
import os, signal
from edgeguard.cache import cached
def make(path):
    path.write_bytes(b"half")
    os.kill(os.getpid(), signal.SIGKILL)
cached("thing.bin", make)
"""
    process = run(code, folder)
    process.communicate(timeout=60)
    assert process.returncode not in (0, 1)
    (left,) = folder.iterdir()
    assert left.read_bytes() == b"half" and left.name.endswith(".part")
    assert cached("thing.bin", Maker()).read_bytes() == CONTENT
    assert left.exists()  # it might be another process at work
    os.utime(left, (0, 0))
    (folder / "thing.bin").unlink()
    cached("thing.bin", Maker())
    assert not left.exists()


def test_processes_that_make_the_same_file_at_once(folder: Path) -> None:
    code = """
import os, time
from edgeguard.cache import cache_folder, cached
folder = cache_folder()
def make(path):
    (folder / f"ready{os.getpid()}").touch()
    while len(list(folder.glob("ready*"))) < 2:
        time.sleep(0.01)
    for part in range(1000):
        with path.open("ab") as stream:
            stream.write(b"whole")
print(cached("thing.bin", make).read_bytes() == b"whole" * 1000)
"""
    with ThreadPoolExecutor() as pool:  # so that what the one died of is seen where the other waits for it
        processes = [run(code, folder) for _ in range(2)]
        answers = list(pool.map(_answer, processes))
    assert [out.strip() for out, _ in answers] == ["True", "True"], answers
    make = Maker()
    assert cached("thing.bin", make).read_bytes() == CONTENT and make.calls == 0
    assert not list(folder.glob(".*"))


def _answer(process: subprocess.Popen[str]) -> tuple[str, str]:
    """What it printed, on stdout and stderr; of one that does not end, until it was stopped."""
    try:
        return process.communicate(timeout=240)
    except subprocess.TimeoutExpired:
        process.kill()
        return process.communicate()


def test_a_named_folder_that_cannot_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("no folder")
    for bad in (tmp_path / "file", tmp_path / "file" / "below"):
        monkeypatch.setenv(CACHE_VARIABLE, str(bad))
        with pytest.raises(EngineError, match=rf"{CACHE_VARIABLE}={bad}: expected a folder that can be written, found"):
            cached("thing.bin", Maker())


def test_without_a_folder_of_its_own_a_temporary_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("no folder")
    monkeypatch.delenv(CACHE_VARIABLE, raising=False)
    monkeypatch.setattr(cache, "_platform_folder", lambda: tmp_path / "file" / "edgeguard")
    folder, make = cache_folder(), Maker()
    assert folder.is_dir() and folder == cache_folder()
    assert cached("thing.bin", make) == cached("thing.bin", make) == folder / "thing.bin"
    assert make.calls == 1


@pytest.mark.parametrize(
    ("platform", "variables", "expected"),
    [
        ("linux", {}, ".cache/edgeguard"),
        ("linux", {"XDG_CACHE_HOME": "{home}/elsewhere"}, "elsewhere/edgeguard"),
        ("linux", {"XDG_CACHE_HOME": "relative"}, ".cache/edgeguard"),
        ("darwin", {}, "Library/Caches/edgeguard"),
        ("win32", {"LOCALAPPDATA": "{home}/local"}, "local/edgeguard/Cache"),
        ("win32", {}, "AppData/Local/edgeguard/Cache"),
    ],
)
def test_the_platforms_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, platform: str, variables: dict[str, str], expected: str
) -> None:
    for name in ("XDG_CACHE_HOME", "LOCALAPPDATA"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value.format(home=tmp_path))
    monkeypatch.setattr(Path, "home", lambda: tmp_path)
    monkeypatch.setattr(sys, "platform", platform)
    assert cache._platform_folder() == tmp_path / expected
