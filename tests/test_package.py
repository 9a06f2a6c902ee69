"""What a bundle says of the code that made it."""

from __future__ import annotations

import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

pytest.importorskip("torch", reason="the conversion layer needs edgeguard-runtime[convert]")
pytest.importorskip("transformers", reason="the conversion layer needs edgeguard-runtime[convert]")

from convert.package import commit_of  # noqa: E402

RECIPE = "convert/recipes/tiny.toml"
FILES = (RECIPE, "convert/steps.py", "edgeguard/guard.py", "README.md")


def git(folder: Path, *arguments: str) -> str:
    who = ("-c", "user.name=Test", "-c", "user.email=test@example.org", "-c", "commit.gpgsign=false")
    done = subprocess.run(["git", *who, *arguments], cwd=folder, check=True, capture_output=True, text=True)
    return done.stdout.strip()


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    folder = tmp_path / "checkout"
    for name in FILES:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text("first\n")
    (folder / ".gitignore").write_text("build/\n")
    git(folder, "init", "--quiet")
    git(folder, "add", ".")
    git(folder, "commit", "--quiet", "-m", "first")
    return folder


def test_a_clean_checkout_is_its_commit(checkout: Path) -> None:
    commit = git(checkout, "rev-parse", "HEAD")
    assert commit_of(checkout, checkout / RECIPE) == commit
    (checkout / "README.md").write_text("a word\n")
    (checkout / "build").mkdir()
    (checkout / "build" / "model.onnx").write_text("made")
    assert commit_of(checkout, checkout / RECIPE) == commit  # neither makes another bundle


@pytest.mark.parametrize(
    "change",
    [
        lambda folder: (folder / RECIPE).write_text("seed = 2\n"),
        lambda folder: (folder / "convert/steps.py").unlink(),
        lambda folder: (folder / "edgeguard/guard.py").write_text("second\n"),
        lambda folder: (folder / "edgeguard/new.py").write_text("new\n"),
        lambda folder: [(folder / "convert/steps.py").write_text("staged\n"), git(folder, "add", ".")],
    ],
    ids=["recipe", "removed", "changed", "new", "staged"],
)
def test_what_is_not_committed_is_said(checkout: Path, change: Callable[[Path], object]) -> None:
    change(checkout)
    assert commit_of(checkout, checkout / RECIPE) == f"{git(checkout, 'rev-parse', 'HEAD')}-dirty"


@pytest.mark.parametrize("place", ["build/own.toml", "own.toml", "../own.toml"])
def test_a_recipe_that_is_in_no_commit_is_said(checkout: Path, place: str) -> None:
    recipe = checkout / place
    recipe.parent.mkdir(exist_ok=True)
    recipe.write_text("own\n")
    assert commit_of(checkout, recipe) == f"{git(checkout, 'rev-parse', 'HEAD')}-dirty"


def test_there_is_no_commit_without_git(checkout: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plain = tmp_path / "plain"
    (plain / "convert").mkdir(parents=True)
    (plain / "convert" / "tiny.toml").write_text("first\n")
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path))
    assert commit_of(plain, plain / "convert" / "tiny.toml") is None
    inside = checkout / "build" / "unpacked"  # a release unpacked in somebody's repository
    (inside / "convert").mkdir(parents=True)
    assert commit_of(inside, inside / "convert" / "tiny.toml") is None
    empty = tmp_path / "empty"
    empty.mkdir()
    git(empty, "init", "--quiet")
    assert commit_of(empty, empty / "tiny.toml") is None
    monkeypatch.setenv("PATH", str(empty))
    assert commit_of(checkout, checkout / RECIPE) is None
